"""The house as texts: its layers, the homes of foreign libraries, the reading direction, and that what others
call is described."""
import ast
import functools
import re
import symtable

import pytest
from conftest import ROOT

DOOR = 'agentbackend'
RULE = re.compile(r'# -{60,}')
# From the ground up: each file knows only those before it. The docstring of the door is the same list, from
# the top down.
LAYERS = ('errors', 'timing', 'dockerlog', 'translators', 'agents', 'giturls', 'sshkeys', 'wire',
          'positions', 'schemas', 'config', 'records', 'store', 'mirror', 'state', 'activity', 'dockerclient',
          'alone', 'engine', 'claim', 'nodes', 'distribution', 'swarm', 'access', 'runs', 'execs', 'detached',
          'terminals', 'files', 'gitstate', 'repeats', 'images', 'views', 'pages', 'events', 'waits', 'logs',
          'probes', 'drafts', 'recipe', 'pool', 'workspaces', 'keeper', 'gate', 'routing', 'talks', 'tasks',
          'feeds', 'clients', 'server', 'remote', 'transfer', 'console', 'shapes', 'mcp', 'cli', DOOR)
# They stand apart: clients over HTTP, each of which pays for what it imports only when it needs that.
APART = {'remote', 'transfer', 'console', 'shapes', 'mcp', 'cli'}
HOMES = {  # foreign library -> the files that may use it
    'docker': {'dockerclient', 'engine', 'images'}, 'requests': {'dockerclient'}, 'urllib3': {'dockerclient'},
    'jsonschema': {'schemas'}, 'referencing': {'schemas'},
    'sqlite3': {'store'}, 'click': {'cli', 'console'}, 'websocket': {'remote'}, 'mcp': {'mcp'},
    'bottle': {'gate', 'routing'}, 'geventwebsocket': {'wire'},
}
LONGEST = 40  # lines of a function, beside its docstring
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Module:
    """A file as a text."""

    def __init__(self, name):
        self.name = name
        self.path = ROOT / 'agentbackend.py' if name == DOOR else ROOT / '_agentbackend' / f'{name}.py'
        self.text = self.path.read_text()
        self.tree = ast.parse(self.text)

    def functions(self):
        """Yield (name with its class, node) of every function that stands in the module or in a class."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                yield node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from ((f'{node.name}.{item.name}', item) for item in node.body
                            if isinstance(item, ast.FunctionDef))

    @functools.cache  # noqa: B019 - there are as many as files
    def imports(self):
        """Return [(line, module)] of everything that is imported, wherever it stands."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append((node.lineno, node.module))
        return found


MODULES = [Module(name) for name in LAYERS]
every_module = pytest.mark.parametrize('module', MODULES, ids=LAYERS)


def bound_by(node):
    """Yield the names that a statement at the top level binds."""
    if isinstance(node, DEFINITIONS):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).partition('.')[0] for alias in node.names)
    else:
        yield from (item.id for item in ast.walk(node) if isinstance(item, ast.Name)
                    and isinstance(item.ctx, ast.Store))


def taken_from_the_module(text, node):
    """Return the names that a top-level statement takes from its module: those that no scope within it gives
    a meaning of its own."""
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(item.lineno for item in getattr(node, 'decorator_list', ()))])
    statement = ''.join(lines[first - 1:node.end_lineno])
    found, tables = set(), [symtable.symtable(statement, '<statement>', 'exec')]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {item.get_name() for item in table.get_symbols()
                  if item.is_referenced() and (item.is_global() or table.get_type() == 'module')}
    return found


def section_of(module, node):
    """Return the number of banners above a statement: a file without any is one section."""
    lines = module.text.splitlines()[:node.lineno - 1]
    return sum(bool(RULE.fullmatch(above) and RULE.fullmatch(below))
               for above, below in zip(lines, lines[2:], strict=False))


def length(function):
    """Return how many lines a function has beside its docstring."""
    if not ast.get_docstring(function):
        return function.end_lineno - function.lineno + 1
    docstring = function.body[0]
    return function.end_lineno - function.lineno - (docstring.end_lineno - docstring.lineno)


def test_the_map_lists_every_file_from_the_top_down():
    listed = re.findall(r'^    (\w+) +\S', ast.get_docstring(MODULES[-1].tree, clean=False), re.MULTILINE)
    assert set(listed) == set(LAYERS) - {DOOR}
    for name in listed:
        known = {module.rpartition('.')[2] for _, module in MODULES[LAYERS.index(name)].imports()
                 if module.startswith('_agentbackend.')}
        wrong = known - set(listed[listed.index(name) + 1:])
        assert not wrong, f'the map has {name} below {", ".join(wrong)}, which it imports: move its line up'


def test_the_map_is_all_there_is():
    assert {path.stem for path in ROOT.glob('*.py')} == {DOOR}
    there = {path.stem for path in (ROOT / '_agentbackend').glob('*.py')} - {'__init__'}
    assert there == set(LAYERS) - {DOOR}, 'a file without a layer belongs into LAYERS and into the map'


@every_module
def test_a_file_knows_only_those_below_it(module):
    below = {f'_agentbackend.{name}' for name in LAYERS[:LAYERS.index(module.name)]} | {'_agentbackend'}
    for line, imported in module.imports():
        if imported.partition('.')[0] in ('_agentbackend', DOOR):
            assert imported in below, (
                f'{module.path.name}:{line} imports {imported}, which stands above it: what both need '
                'belongs into a file below both, or is handed in by whoever composes them')


def test_clients_know_nothing_of_the_server_and_the_server_nothing_of_them():
    for module in MODULES:
        ours = {imported.rpartition('.')[2] for _, imported in module.imports()
                if imported.startswith('_agentbackend.') or imported == DOOR}
        assert not ours - APART if module.name in APART else not ours & APART, module.name


@every_module
def test_a_foreign_library_has_its_home(module):
    for line, imported in module.imports():
        library = imported.partition('.')[0]
        homes = HOMES.get(library, {module.name})
        assert module.name in homes, (f'{module.path.name}:{line} imports {library}, whose home is '
                                      f'{" and ".join(sorted(homes))}: '
                                      'ask that file for what is needed')


def test_every_home_is_lived_in():
    for library, homes in HOMES.items():
        users = {module.name for module in MODULES for _, imported in module.imports()
                 if imported.partition('.')[0] == library}
        assert users == homes, f'{library} is said to live in {homes}, and is used by {users}'


@every_module
def test_a_section_is_read_after_those_it_uses(module):
    home = {}
    for node in module.tree.body:
        for name in bound_by(node):
            home.setdefault(name, section_of(module, node))
    for node in module.tree.body:
        upward = [name for name in taken_from_the_module(module.text, node)
                  if home.get(name, 0) > section_of(module, node)]
        assert not upward, (f'{module.path.name}:{node.lineno} uses {", ".join(upward)} of a later section: '
                            'move it up, or this down')


@every_module
def test_imports_stand_at_the_head(module):
    heads = [node for node in module.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    inside = [node.lineno for node in ast.walk(module.tree) if isinstance(node, (ast.Import, ast.ImportFrom))
              and node not in heads]
    others = [node.lineno for node in module.tree.body if isinstance(node, DEFINITIONS)]
    inside = [] if module.name in APART else inside
    assert not inside and not [node.lineno for node in heads if others and node.lineno > others[0]]


def test_no_test_module_imports_another():
    """What several need stands in helpers.py, or in a module beside it that says what it is for."""
    found = []
    for path in (ROOT / 'tests').glob('*.py'):
        imports = [node for node in ast.walk(ast.parse(path.read_text()))
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in imports for alias in node.names} | {
            node.module for node in imports if isinstance(node, ast.ImportFrom)}
        found += [f'{path.name} imports {name}: move what it needs to helpers.py'
                  for name in names if name.startswith('test_')]
    assert not found, '\n'.join(found)


def test_gevent_is_patched_before_anything_else():
    docstring, imports, _, patches = MODULES[-1].tree.body[:4]
    assert isinstance(docstring, ast.Expr)
    assert ast.unparse(imports) == 'from gevent import events, monkey'
    assert ast.unparse(patches) == 'monkey.patch_all()'


@every_module
def test_only_main_reads_the_environment(module):
    statements = [(f'line {item.lineno}', item) for item in module.tree.body
                  if not isinstance(item, DEFINITIONS)]
    readers = {name for name, node in [*module.functions(), *statements] for item in ast.walk(node)
               if isinstance(item, ast.Attribute)
               and ast.unparse(item) in ('os.environ', 'os.getenv', 'os.environb')}
    assert readers == {DOOR: {'main'}, 'console': {'Talk.__init__'}}.get(module.name, set())


@every_module
def test_no_function_is_long(module):
    found = {name: length(node) for name, node in module.functions()}
    assert not {name: lines for name, lines in found.items() if lines > LONGEST}


def test_most_functions_are_short():
    lengths = sorted(length(node) for module in MODULES for _, node in module.functions())
    assert lengths[len(lengths) // 2] <= 9 and lengths[len(lengths) * 9 // 10] <= 25


@every_module
def test_no_function_says_global(module):
    assert not [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Global)]


@every_module
def test_what_others_call_has_a_docstring(module):
    public = [(name, node) for name, node in module.functions() if not name.startswith('_')
              and not name.rpartition('.')[2].startswith('_')]
    public += [(node.name, node) for node in module.tree.body
               if isinstance(node, ast.ClassDef) and not node.name.startswith('_')
               and node.end_lineno > node.lineno]
    silent = [f'line {node.lineno}: {name}' for name, node in public if not ast.get_docstring(node)]
    assert not silent, '\n'.join(silent)


@every_module
def test_a_docstring_begins_with_a_sentence(module):
    bad = [f'line {node.lineno}: {node.name}' for node in ast.walk(module.tree)
           if isinstance(node, DEFINITIONS) and ast.get_docstring(node)
           and not re.search(r'[.:]$', ast.get_docstring(node).partition('\n\n')[0])]
    assert not bad, '\n'.join(bad)
