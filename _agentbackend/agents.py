"""Agents as adapters: each knows its command line, its environment, how its lines are read, and what it lacks
on this server, in words."""
from _agentbackend.translators import CLAUDE_HAS_NO_KEY, ClaudeLines, CommandLines


class Claude:
    """Claude Code in its one-way form: the task on stdin, JSON lines on stdout."""

    name = 'claude'
    program = 'claude'
    lines = ClaudeLines
    # Without the first two it never tells any steps.
    env = {'CLAUDE_CODE_ENABLE_TODO_TOOLS': '1', 'CLAUDE_CODE_ENABLE_TASKS': '0',
           'CLAUDE_CODE_MAX_RETRIES': '4',
           'CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC': '1', 'DISABLE_AUTOUPDATER': '1'}

    def __init__(self, has_key):
        self.lacks = '' if has_key else CLAUDE_HAS_NO_KEY

    def command(self, session, body):
        """Return the command line of a task: the first of a session, or one that goes on with it."""
        options = [part for option, key in (('--max-turns', 'maxTurns'), ('--max-budget-usd', 'maxBudgetUsd'),
                                            ('--model', 'model'))
                   if key in body for part in (option, str(body[key]))]
        return [self.program, '-p', '--output-format', 'stream-json', '--verbose',
                '--dangerously-skip-permissions',
                '--resume' if session.conversed else '--session-id', session.agent_session_id, *options]


class Command:
    """Any program: it reads the task from stdin, and prints events as JSON or plain text."""

    name = 'command'
    lines = CommandLines
    env = {}
    lacks = ''

    def __init__(self, words):
        self._words = words
        self.program = words[0]

    def command(self, session, body):
        """Return the command line, the same for every task."""
        return list(self._words)


def configured_agents(config):
    """Return the agents that the settings allow, by their names."""
    agents = [Claude(bool(config.agent_keys().keys() - {'ANTHROPIC_BASE_URL'}))]
    if config.agent_command:
        agents.append(Command(config.agent_command))
    return {agent.name: agent for agent in agents}
