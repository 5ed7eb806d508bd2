"""The shape of the source: imports point down a list of floors, files and functions stay short.

The rules read source text only. Each is also shown to fail on a small package that breaks it.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "loraparam"

# A module may import from the lines above its own, never from its own line or below. Names are relative to the
# package; "" is its __init__. A module whose name is not here takes the first pattern that fits: a new method, file
# format or command needs no change to this list.
FLOORS = (
    ("errors", "functional", "finite", "marks", "overrides", "watching"),
    ("catalogue",),
    ("layouts", "fused", "fused_conv", "execution", "lists"),
    ("sharding",),
    ("refusals",),
    ("slices", "forms"),
    ("targets", "methods.base", "effective", "squares"),
    ("methods.lowrank", "operations.registry"),
    ("methods.*", "operations.*"),
    ("methods", "operations"),
    ("plans", "stack"),
    ("reading",),
    ("guarded",),
    ("hosts", "snapshots", "freezing"),
    ("suspension",),
    ("managers",),
    ("adapters",),
    ("merging", "check", "training"),
    ("state", "formats.files"),
    ("handmade", "formats.bases"),
    ("formats.content", "formats.products"),
    ("formats.portable",),
    ("formats.peft_patterns", "formats.peft_shapes", "formats.peft_starts", "formats.peft_products"),
    ("formats.peft_keys",),
    ("formats.peft_config", "formats.peft_header", "formats.peft_wrappers"),
    ("formats.peft_places", "formats.peft_values", "formats.peft_saved"),
    ("formats.peft_read", "formats.peft_scaled"),
    ("formats.peft_write",),
    ("formats.leaves", "formats.components"),
    ("formats.kohya_products",),
    ("formats.pairs",),
    ("formats.kohya_write", "formats.diffusers_write"),
    ("formats.unscaled", "formats.stacking"),
    ("formats.*",),
    ("formats",),
    ("tools.spectra", "tools.entrywise", "tools.reports", "tools.fitting", "tools.told"),
    ("tools.*",),
    ("tools",),
    ("",),  # the public surface
    ("testing.seeding",),
    ("dropins", "integrations", "testing.layer_cases", "testing.subjects", "testing.comparisons", "cli.demo_data"),
    ("loralib", "loratorch", "integrations.*", "testing.*", "cli.common", "cli.demo_*"),
    ("testing.layer_laws", "testing.undo_laws", "testing.state_laws", "testing.layers", "cli.*"),
    ("testing.laws", "cli"),
    ("testing.checks",),
    ("testing.parametrization",),
    ("testing",),
    ("__main__",),
)
METHOD_LINES, FILE_LINES, FUNCTION_LINES = 150, 350, 40
REQUIRED = {"torch", "safetensors", "tqdm"}  # the runtime dependencies in pyproject.toml

Sources = dict[str, str]  # module name, relative to the package, to its text
Import = tuple[str, int, bool]  # what is imported ("loraparam.errors", "torch.nn"), line, whether inside a function


def library() -> Sources:
    folder = ROOT / PACKAGE
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return {
        name.removesuffix("__init__").rstrip("/").replace("/", "."): path.read_text(encoding="utf-8")
        for name, path in names.items()
    }


# --- the rules: each takes sources and returns what breaks it -------------------------------------------------------


def climbing_imports(sources: Sources) -> list[str]:
    return [
        f"{module or PACKAGE}:{line} imports {other or PACKAGE}, which is not below it"
        for module in sources
        for other, line in internal_imports(module, sources)
        if not floor(other) < floor(module)
    ]


def import_cycle(sources: Sources) -> list[str]:
    graph = {module: {other for other, _ in internal_imports(module, sources)} for module in sources}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [name or PACKAGE for name in error.args[1]]
    return []


def hidden_imports(sources: Sources) -> list[str]:
    """Imports inside functions of what is always there."""
    always = REQUIRED | sys.stdlib_module_names | {PACKAGE}
    return [
        f"{module}:{line} imports {name} inside a function"
        for module in sources
        for name, line, inside in imports(module, sources)
        if inside and name.partition(".")[0] in always
    ]


def imports_of_testing(sources: Sources) -> list[str]:
    return [
        f"{module}:{line} imports {other}"
        for module in sources
        for other, line in internal_imports(module, sources)
        if is_testing(other) and not is_testing(module)
    ]


def long_files(sources: Sources) -> list[str]:
    found = []
    for module, text in sources.items():
        allowed = METHOD_LINES if module.partition(".")[0] == "methods" else FILE_LINES
        if (lines := len(text.splitlines())) > allowed:
            found.append(f"{module or PACKAGE}: {lines} lines; allowed: {allowed}")
    return found


def long_functions(sources: Sources) -> list[str]:
    return [
        f"{module}:{node.lineno} {node.name}: {length(node)} lines without its docstring; allowed: {FUNCTION_LINES}"
        for module, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length(node) > FUNCTION_LINES
    ]


# --- what they are made of ------------------------------------------------------------------------------------------


def floor(module: str) -> int:
    exact = [i for i, names in enumerate(FLOORS) if module in names]
    fitting = [i for i, names in enumerate(FLOORS) if any(fnmatchcase(module, name) for name in names)]
    assert exact or fitting, f"{module!r} is on no floor; give it a place in FLOORS"
    return (exact or fitting)[0]


def is_testing(module: str) -> bool:
    return module.partition(".")[0] == "testing"


def internal_imports(module: str, sources: Sources) -> list[tuple[str, int]]:
    """(module of the package, line) for each import of one."""
    return [
        (name.partition(".")[2], line)
        for name, line, _ in imports(module, sources)
        if name.partition(".")[0] == PACKAGE
    ]


def imports(module: str, sources: Sources) -> list[Import]:
    return list(_imports(ast.parse(sources[module]), module, sources, inside=False))


def _imports(tree: ast.AST, module: str, sources: Sources, *, inside: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, sources)
            for alias in node.names:
                # `from package import x` means the submodule x where there is one.
                name = f"{source}.{alias.name}"
                is_module = name.removeprefix(f"{PACKAGE}.") in sources
                yield name if is_module else source, node.lineno, inside
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports(node, module, sources, inside=inside or function)


def _absolute(node: ast.ImportFrom, module: str, sources: Sources) -> str:
    """The full name of the module in `from … import`."""
    if not node.level:
        return node.module or ""
    full = f"{PACKAGE}.{module}".rstrip(".")
    is_package = not module or any(name.startswith(f"{module}.") for name in sources)
    parts = full.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


# --- the tests ------------------------------------------------------------------------------------------------------

RULES = (climbing_imports, import_cycle, hidden_imports, imports_of_testing, long_files, long_functions)


@pytest.mark.parametrize("rule", RULES)
def test_library_keeps_the_rule(rule):
    sources = library()
    assert {"", "errors", "methods", "methods.lora", "formats.native", "cli"} <= set(sources)
    assert rule(sources) == []


BROKEN = [
    (climbing_imports, {"errors": "from .targets import find", "targets": ""}),
    (climbing_imports, {"slices": "from . import targets", "targets": ""}),
    (climbing_imports, {"slices": "import loraparam.targets", "targets": ""}),
    (climbing_imports, {"slices": "if x:\n    from loraparam import targets", "targets": ""}),
    (climbing_imports, {"methods": "", "methods.base": "from ..adapters import attach", "adapters": ""}),
    (climbing_imports, {"methods": "", "methods.one": "from .two import f", "methods.two": ""}),
    (climbing_imports, {"": "f = 1", "adapters": "from . import f"}),
    (import_cycle, {"slices": "from .targets import f", "targets": "from .slices import g"}),
    (hidden_imports, {"state": "def f():\n    import json"}),
    (hidden_imports, {"state": "class C:\n    async def f(self):\n        from torch import nn"}),
    (hidden_imports, {"state": "def f():\n    from .errors import nearest", "errors": ""}),
    (imports_of_testing, {"state": "from .testing import laws", "testing": ""}),
    (imports_of_testing, {"cli": "", "cli.demo": "from ..testing.laws import f", "testing": "", "testing.laws": ""}),
    (long_files, {"methods": "", "methods.lora": "\n" * 151}),
    (long_files, {"state": "\n" * 351}),
    (long_functions, {"state": "def f(\n    x,\n):\n" + "    x += 1\n" * 38}),
    (long_functions, {"state": "class C:\n    async def f(self):\n" + "        await x\n" * 40}),
]

KEPT = [
    (climbing_imports, {"": "from . import targets", "targets": "from .errors import E", "errors": "import torch"}),
    (climbing_imports, {"methods": "from .new import New", "methods.new": "from .base import M", "methods.base": ""}),
    (import_cycle, {"targets": "from . import slices", "slices": "import json"}),
    (hidden_imports, {"state": "import json\n\ndef f():\n    import transformers"}),
    (imports_of_testing, {"testing": "from .laws import f", "testing.laws": "from ..errors import E", "errors": ""}),
    (long_files, {"methods": "", "methods.lora": "\n" * 150, "state": "\n" * 350}),
    (long_functions, {"state": 'def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * 39}),
]


@pytest.mark.parametrize(("rule", "sources"), BROKEN)
def test_rule_sees_what_breaks_it(rule, sources):
    assert rule(sources) != []


@pytest.mark.parametrize(("rule", "sources"), KEPT)
def test_rule_allows_what_keeps_it(rule, sources):
    assert rule(sources) == []


def test_module_without_a_floor_is_an_error():
    with pytest.raises(AssertionError, match="'stray' is on no floor"):
        climbing_imports({"stray": "from .errors import E", "errors": ""})
