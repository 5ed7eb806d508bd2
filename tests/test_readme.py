"""README.md and CONTRIBUTING.md are true: their Python runs and prints what they show, and they leave no name out.

Each Python block of a document is run, in order, in one namespace, in an empty folder. A ``text`` block right after a
Python block is what that block prints (``...`` stands for anything). A Python block that cannot run is preceded by
``<!-- not run: the reason -->``. A ``bash`` block of ``loraparam`` commands alone is run in the same way; each must
return 0, or the number in a comment after it: ``loraparam verify a b  # exit code 1``.
"""

import contextlib
import doctest
import inspect
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import loraparam as lp
from loraparam.cli import main
from loraparam.methods import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
COMMANDS = {
    "demo-command": "python -m venv .venv && .venv/bin/pip install -c constraints.txt . && .venv/bin/loraparam demo",
    "test-command": 'python -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]"'
    " && .venv/bin/python -m pytest -n 2",
}
# Nothing else may be fenced: a block in a language nobody looks at would be a block nobody runs.
LANGUAGES = ("python", "text", "bash")
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
OPT_OUT = re.compile(r"<!--\s*not run\b\s*:?(?P<reason>.*?)-->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the whole info string.
        line: of the first line inside, from 1.
        text: what is inside.
        before: the nearest line above that is not empty.
    """

    language: str
    line: int
    text: str
    before: str


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a Markdown document."""
    lines, found, start = document.splitlines(), [], None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if start is None and fence:
            start, opened = number, fence
        elif start is not None and fence and fence["ticks"] == opened["ticks"] and not fence["info"].strip():
            above = next((text for text in reversed(lines[:start]) if text.strip()), "")
            inside = [text.removeprefix(opened["indent"]) for text in lines[start + 1 : number]]
            found.append(Block(opened["info"].strip(), start + 2, "\n".join(inside) + "\n", above.strip()))
            start = None
    assert start is None, f"line {start + 1}: a fence that is never closed"
    return found


def unfit(document: str) -> list[str]:
    """Blocks in another language, and blocks that opt out of being run without saying why."""
    found = []
    for block in blocks(document):
        if block.language not in LANGUAGES:
            found.append(f"line {block.line}: {block.language!r}; allowed: {', '.join(LANGUAGES)}")
        opted_out = OPT_OUT.search(block.before)
        if opted_out and len(opted_out["reason"].split()) < 3:
            found.append(f"line {block.line}: is not run, and does not say why")
    return found


def run(document: str, name: str) -> None:
    """Run a document's Python blocks in one namespace; a failure shows the document's own lines."""
    module = types.ModuleType("__document__")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    known = dict(REGISTRY)
    printed = None
    try:
        for block in blocks(document):
            if block.language == "text" and printed is not None and FENCE.match(block.before):
                compare(block, printed, name)
            printed = None
            if block.language == "python" and not OPT_OUT.search(block.before):
                printed = execute(block, module, name)
            if block.language == "bash" and all(line.startswith("loraparam ") for line in block.text.splitlines()):
                printed = command_lines(block, name)
    finally:
        del sys.modules[module.__name__]
        REGISTRY.clear()
        REGISTRY.update(known)  # without the methods the document defines


def execute(block: Block, module: types.ModuleType, name: str) -> str:
    """What a block prints."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, name, "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, module.__dict__)
    return printed.getvalue()


def command_lines(block: Block, name: str) -> str:
    """What a block of loraparam's own commands prints."""
    printed = io.StringIO()
    for number, line in enumerate(block.text.splitlines(), block.line):
        command, _, comment = line.partition("#")
        expected = re.search(r"exit code (\d)", comment)
        with contextlib.redirect_stdout(printed):
            code = main(shlex.split(command)[1:])
        assert code == int(expected[1] if expected else 0), f"{name}:{number}: {line!r} returns {code}"
    return printed.getvalue()


def compare(block: Block, printed: str, name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(block.text, printed, options)
    assert same, f"{name}:{block.line}: shown:\n{block.text}\nprinted:\n{printed}"


def commands(document: str) -> dict[str, list[str]]:
    """{marker: the commands in the one-line block that follows each of its occurrences}."""
    found = {
        marker: re.findall(rf"^<!-- {marker} -->\n```bash\n(.*)\n```$", document, re.MULTILINE) for marker in COMMANDS
    }
    for marker in COMMANDS:
        assert document.count(f"<!-- {marker} -->") == len(found[marker]), f"{marker}: no one-line bash block follows"
    return found


def prose(document: str) -> str:
    """A document without its fenced blocks."""
    lines, inside = [], False
    for line in document.splitlines():
        fence = FENCE.match(line)
        inside = inside != bool(fence)
        lines.append("" if inside or fence else line)
    return "\n".join(lines)


def dead_links(document: str, folder: Path) -> list[str]:
    """Relative links to files, and to headings of this document, that lead nowhere."""
    text = prose(document)
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        if (path and not (folder / path).exists()) or (not path and anchor not in anchors):
            dead.append(link)
    return dead


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def public_names() -> Iterator[str]:
    """What ``import loraparam as lp`` offers: all of ``__all__``, and else every name that is not a module."""
    listed = getattr(lp, "__all__", ())
    for name in sorted({*listed, *dir(lp)}):
        if name in listed or not (name.startswith("_") or inspect.ismodule(getattr(lp, name))):
            yield name


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# What torch says of itself: its compiler looks at the .grad of every input, and attention has no batching rule.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_run_and_print_what_is_shown(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(read(name), name)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_block_escapes_being_run(name):
    assert unfit(read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    assert dead_links(read(name), (ROOT / name).parent) == []


def test_set_up_commands_stand_once_each():
    assert commands(read("README.md")) == {marker: [command] for marker, command in COMMANDS.items()}


def test_every_public_name_is_mentioned():
    readme, names = read("README.md"), list(public_names())
    assert {"attach", "LoRA", "RankError"} <= set(names)
    assert [name for name in names if not re.search(rf"\blp\.{name}\b", readme)] == []


def test_every_method_has_its_row():
    readme = read("README.md")
    classes = [(name, getattr(lp, name)) for name in public_names() if inspect.isclass(getattr(lp, name))]
    methods = [name for name, cls in classes if issubclass(cls, lp.Method) and not inspect.isabstract(cls)]
    assert {"LoRA", "DoRA"} <= set(methods)
    assert [name for name in methods if f"\n| `{name}` |" not in readme] == []


# --- each of these checks sees what it is there for -----------------------------------------------------------------


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (fenced("python", "raise ValueError('first')"), "first"),
        (fenced("python", "x = 1") + fenced("python", "raise ValueError(f'x is {x}')"), "x is 1"),
        (fenced("python", "print(1)") + "\n" + fenced("text", "2"), r"document:6: shown:\s+2\s+printed:\s+1"),
        (fenced("bash", "loraparam inspect nothing"), r"document:2: 'loraparam inspect nothing' returns 2"),
        (fenced("bash", "loraparam inspect nothing  # exit code 2") + "\n" + fenced("text", "x"), "shown:\\s+x"),
        ("- item\n\n  ```python\n  raise ValueError('indented')\n  ```\n", "indented"),
    ],
)
def test_running_sees(document, error):
    with pytest.raises((ValueError, AssertionError), match=error):
        run(document, "document")


def test_running_allows():
    run(fenced("python", "print(1)\nprint(2.5)") + fenced("text", "1\n2...") + fenced("bash", "exit 1"), "document")
    run(fenced("bash", "loraparam inspect nothing  # exit code 2\nloraparam inspect no  # exit code 2"), "document")
    run("<!-- not run: it takes hours -->\n" + fenced("python", "1 / 0"), "document")
    run(fenced("python", "print(1)") + "In words:\n" + fenced("text", "something else"), "document")


@pytest.mark.parametrize(
    "document",
    [
        "<!-- not run -->\n" + fenced("python", "1 / 0"),
        "<!-- not run: slow -->\n" + fenced("python", "1 / 0"),
        fenced("python notest", "1 / 0"),
        fenced("py", "1 / 0"),
        fenced("", "1 / 0"),
    ],
)
def test_escaping_is_seen(document):
    assert unfit(document) != []


def test_running_forgets_the_documents_methods():
    method = "import loraparam as lp\nclass Odd(lp.Method):\n    pass"
    run(fenced("python", method), "document")
    assert "Odd" not in REGISTRY
    assert "LoRA" in REGISTRY


def test_dead_links_are_seen(tmp_path):
    (tmp_path / "here.md").touch()
    document = "# The top\n[a](here.md#any) [b](#the-top) [c](https://example.org) [d](gone.md) [e](#gone)\n"
    assert dead_links(document, tmp_path) == ["gone.md", "#gone"]


def test_misplaced_command_is_seen():
    with pytest.raises(AssertionError, match="demo-command: no one-line bash block follows"):
        commands("<!-- demo-command -->\n```bash\none\ntwo\n```\n")
