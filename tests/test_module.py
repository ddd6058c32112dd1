"""The module as a text: its order, its borders, and that what others call is described."""
import ast
import re

import pytest
from conftest import ROOT

SOURCE = (ROOT / 'agentbackend.py').read_text()
TREE = ast.parse(SOURCE)
LINES = SOURCE.splitlines()
RULE = re.compile(r'# -{60,}')
HEAD = ''  # what stands above the first banner
HOMES = {  # foreign library -> the sections that may use it
    'docker': {'Engine'}, 'requests': {'Engine'}, 'urllib3': {'Engine'},
    'jsonschema': {'Schemas'}, 'referencing': {'Schemas'},
    'bottle': {'Routes', 'Streams', 'OpenAPI', 'Server'},
}
LONGEST = 40  # lines of a function
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def banners():
    """Return [(line number, name)] of the three-line banners."""
    return [(number, line[2:]) for number, line in enumerate(LINES, 1)
            if line.startswith('# ') and 1 < number < len(LINES) and RULE.fullmatch(LINES[number - 2]) and RULE.fullmatch(LINES[number])]


BANNERS = banners()


def section_of(node):
    return next((name for number, name in reversed(BANNERS) if number <= node.lineno), HEAD)


def place_of(node):
    return sum(number <= node.lineno for number, _ in BANNERS)


def bound_by(node):
    """Yield the names that a statement at the top level binds."""
    if isinstance(node, DEFINITIONS):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).partition('.')[0] for alias in node.names)
    else:
        yield from (item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store))


def own_names(node):
    """Return the names that a definition gives a meaning of its own: its arguments and what it assigns."""
    found = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    return found | {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Load)}


def used_names(node):
    """Yield (name, node) of what a top-level statement takes from the module."""
    own = own_names(node) if isinstance(node, DEFINITIONS) else set()
    for item in ast.walk(node):
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load) and item.id not in own:
            yield item.id, item


def functions():
    """Yield (name with its class, node) of every function that stands in the module or in a class."""
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f'{node.name}.{item.name}', item) for item in node.body if isinstance(item, ast.FunctionDef))


def test_the_docstring_lists_the_sections_in_their_order():
    listed = re.findall(r'^([A-Z]\w*) {2,}\S', ast.get_docstring(TREE, clean=False), re.MULTILINE)
    assert listed == [name for _, name in BANNERS] and len(listed) > 5


def test_every_rule_belongs_to_a_banner():
    assert sum(bool(RULE.fullmatch(line)) for line in LINES) == 2 * len(BANNERS)


def test_a_section_is_read_after_those_it_uses():
    home = {}
    for node in TREE.body:
        for name in bound_by(node):
            home.setdefault(name, place_of(node))
    upward = [f'line {item.lineno}: {section_of(item)} uses {name}, which comes later'
              for node in TREE.body for name, item in used_names(node) if home.get(name, 0) > place_of(node)]
    assert not upward, '\n'.join(upward)


@pytest.mark.parametrize('library', HOMES)
def test_a_foreign_library_has_its_home(library):
    used = {}
    for node in TREE.body:
        for name, item in used_names(node):
            if name == library:
                used.setdefault(section_of(item), item.lineno)
    strangers = {section: line for section, line in used.items() if section not in HOMES[library]}
    assert used and not strangers, f'{library} is used by {strangers}'


def test_imports_stand_at_the_head():
    late = [node.lineno for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom)) and section_of(node) != HEAD]
    assert not late


def test_gevent_is_patched_before_anything_else():
    first, second, third = TREE.body[:3]
    assert isinstance(first, ast.Expr)  # the docstring
    assert ast.unparse(second) == 'from gevent import monkey' and ast.unparse(third) == 'monkey.patch_all()'


def test_only_main_reads_the_environment():
    readers = {name for name, node in [*functions(), *((f'line {item.lineno}', item) for item in TREE.body if not isinstance(item, DEFINITIONS))]
               for item in ast.walk(node)
               if (isinstance(item, ast.Attribute) and ast.unparse(item) in ('os.environ', 'os.getenv', 'os.environb'))}
    assert readers == {'main'}


def test_no_function_is_long():
    found = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert not {name: lines for name, lines in found.items() if lines > LONGEST}
    lengths = sorted(found.values())
    assert lengths[len(lengths) // 2] <= 9 and lengths[len(lengths) * 9 // 10] <= 25


def test_no_function_says_global():
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)]


def test_what_others_call_has_a_docstring():
    public = [(name, node) for name, node in functions() if not name.rpartition('.')[2].startswith('_') and not name.startswith('_')]
    public += [(node.name, node) for node in TREE.body
               if isinstance(node, ast.ClassDef) and not node.name.startswith('_') and node.end_lineno > node.lineno]
    silent = [f'line {node.lineno}: {name}' for name, node in public if not ast.get_docstring(node)]
    assert not silent, '\n'.join(silent)


def test_a_docstring_is_a_sentence():
    bad = [f'line {node.lineno}: {node.name}' for node in ast.walk(TREE) if isinstance(node, DEFINITIONS) and ast.get_docstring(node)
           and not re.match(r"[A-Z`'{(].*[.:]$", ast.get_docstring(node).splitlines()[0])]
    assert not bad, '\n'.join(bad)
