"""The modules as texts: their order, their borders, and that what others call is described."""
import ast
import re

import pytest
from conftest import ROOT

RULE = re.compile(r'# -{60,}')
HEAD = ''  # what stands above the first banner
HOMES = {  # foreign library -> the sections that may use it
    'docker': {'Engine'}, 'requests': {'Engine'}, 'urllib3': {'Engine'},
    'jsonschema': {'Schemas'}, 'referencing': {'Schemas'},
    'bottle': {'Routes', 'Server'},
}
# Each module knows only those before it.
LAYERS = ('agentbackend_wire', 'agentbackend_agents', 'agentbackend_config', 'agentbackend_engine', 'agentbackend_pages', 'agentbackend')
LONGEST = 40  # lines of a function, beside its docstring
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Module:
    """A module as a text."""

    def __init__(self, name):
        self.text = (ROOT / name).read_text()
        self.tree = ast.parse(self.text)
        self.lines = self.text.splitlines()
        self.banners = [(number, line[2:]) for number, line in enumerate(self.lines, 1)  # of three lines
                        if line.startswith('# ') and 1 < number < len(self.lines)
                        and RULE.fullmatch(self.lines[number - 2]) and RULE.fullmatch(self.lines[number])]

    def section_of(self, node):
        return next((name for number, name in reversed(self.banners) if number <= node.lineno), HEAD)

    def place_of(self, node):
        return sum(number <= node.lineno for number, _ in self.banners)

    def functions(self):
        """Yield (name with its class, node) of every function that stands in the module or in a class."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                yield node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from ((f'{node.name}.{item.name}', item) for item in node.body if isinstance(item, ast.FunctionDef))


MODULES = [Module(f'{name}.py') for name in LAYERS]
MAIN = MODULES[-1]
every_module = pytest.mark.parametrize('module', MODULES, ids=LAYERS)


def bound_by(node):
    """Yield the names that a statement at the top level binds."""
    if isinstance(node, DEFINITIONS):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).partition('.')[0] for alias in node.names)
    else:
        yield from (item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store))


def used_names(node):
    """Yield (name, node) of what a top-level statement takes from the module."""
    own = set()
    if isinstance(node, DEFINITIONS):  # what it gives a meaning of its own: its arguments and what it assigns
        own = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
        own |= {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Load)}
    for item in ast.walk(node):
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load) and item.id not in own:
            yield item.id, item


def length(function):
    """Return how many lines a function has beside its docstring."""
    docstring = function.body[0].end_lineno - function.body[0].lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring


@every_module
def test_the_docstring_lists_the_sections_in_their_order(module):
    listed = re.findall(r'^([A-Z]\w*(?: \w+)*) {2,}\S', ast.get_docstring(module.tree, clean=False), re.MULTILINE)
    assert listed == [name for _, name in module.banners] and len(listed) > 1


@every_module
def test_every_rule_belongs_to_a_banner(module):
    assert sum(bool(RULE.fullmatch(line)) for line in module.lines) == 2 * len(module.banners)


def test_there_is_no_other_module():
    assert {path.stem for path in ROOT.glob('*.py')} == set(LAYERS)


@every_module
def test_a_section_is_read_after_those_it_uses(module):
    home = {}
    for node in module.tree.body:
        for name in bound_by(node):
            home.setdefault(name, module.place_of(node))
    upward = [f'line {item.lineno}: {module.section_of(item)} uses {name}, which comes later'
              for node in module.tree.body for name, item in used_names(node) if home.get(name, 0) > module.place_of(node)]
    assert not upward, '\n'.join(upward)


@pytest.mark.parametrize('library', HOMES)
def test_a_foreign_library_has_its_home(library):
    used = {}
    for module in MODULES:
        for node in module.tree.body:
            for name, item in used_names(node):
                if name == library:
                    used.setdefault(module.section_of(item), item.lineno)
    strangers = {section: line for section, line in used.items() if section not in HOMES[library]}
    assert used and not strangers, f'{library} is used by {strangers}'


@every_module
def test_a_module_knows_only_those_before_it(module):
    imported = {alias.name for node in ast.walk(module.tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & set(LAYERS[MODULES.index(module):])


@every_module
def test_imports_stand_at_the_head(module):
    assert not [node.lineno for node in ast.walk(module.tree) if isinstance(node, (ast.Import, ast.ImportFrom)) and module.section_of(node) != HEAD]


def test_gevent_is_patched_before_anything_else():
    first, second, third = MAIN.tree.body[:3]
    assert isinstance(first, ast.Expr)  # the docstring
    assert ast.unparse(second) == 'from gevent import monkey' and ast.unparse(third) == 'monkey.patch_all()'


@every_module
def test_only_main_reads_the_environment(module):
    statements = [(f'line {item.lineno}', item) for item in module.tree.body if not isinstance(item, DEFINITIONS)]
    readers = {name for name, node in [*module.functions(), *statements] for item in ast.walk(node)
               if isinstance(item, ast.Attribute) and ast.unparse(item) in ('os.environ', 'os.getenv', 'os.environb')}
    assert readers == ({'main'} if module is MAIN else set())


@every_module
def test_no_function_is_long(module):
    found = {name: length(node) for name, node in module.functions()}
    assert not {name: lines for name, lines in found.items() if lines > LONGEST}
    lengths = sorted(found.values())
    assert lengths[len(lengths) // 2] <= 9 and lengths[len(lengths) * 9 // 10] <= 25


@every_module
def test_no_function_says_global(module):
    assert not [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Global)]


@every_module
def test_what_others_call_has_a_docstring(module):
    public = [(name, node) for name, node in module.functions() if not name.startswith('_') and not name.rpartition('.')[2].startswith('_')]
    public += [(node.name, node) for node in module.tree.body
               if isinstance(node, ast.ClassDef) and not node.name.startswith('_') and node.end_lineno > node.lineno]
    silent = [f'line {node.lineno}: {name}' for name, node in public if not ast.get_docstring(node)]
    assert not silent, '\n'.join(silent)


@every_module
def test_a_docstring_is_a_sentence(module):
    bad = [f'line {node.lineno}: {node.name}' for node in ast.walk(module.tree) if isinstance(node, DEFINITIONS) and ast.get_docstring(node)
           and not re.match(r".*[.:]$", ast.get_docstring(node).splitlines()[0])]
    assert not bad, '\n'.join(bad)
