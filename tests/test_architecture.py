"""The rules of the house, held by reading the source: who may import whom, and how long anything may be."""

import ast
import io
import re
import statistics
import sys
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "qwen3_next"
FILES = sorted(PACKAGE.rglob("*.py"))

LINES_OF_CODE = {
    "ops": 2000,
    "model": 2850,
    "engine": 3500,
    "train": 1800,
    "server": 1600,
    "cli": 825,
    "config": 650,
    "__init__": 80,
    "__main__": 10,
    "errors": 50,
    "auto": 50,
}
LINES_OF_CODE_IN_KERNELS = 4500
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
LINES_OF_A_KERNEL = 150
LINES_OF_THE_MEDIAN_FUNCTION = 10

# What each part of the package may import of the others. `__init__` offers the public names; nothing inside needs it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "ops": {"errors"},
    "model": {"errors", "config", "ops"},
    "auto": {"errors", "config", "model"},
    "train": {"errors", "config", "ops", "model"},
    "engine": {"errors", "config", "ops", "model"},
    "server": {"errors", "engine"},
    "cli": {"errors", "config", "ops", "model", "auto", "train", "engine", "server"},
    "__main__": {"cli"},
    "__init__": {"errors", "config", "ops", "model", "auto", "engine"},
}
ENTRY_POINTS = {"cli.py", "__main__.py"}

# Who owns which page and slot, and who takes part in a call, is decided in plain Python.
WITHOUT_TORCH = {
    "memory.py",
    "plan.py",
    "prefix_cache.py",
    "queue_entry.py",
    "request.py",
    "scheduler.py",
    "scheduler_config.py",
}


def part_of(module: str) -> str:
    """Return the part that a module belongs to: `model` for `qwen3_next.model.moe`; config.py's helpers are config.

    So are those of cli.py part of cli.
    """
    name = (module.removeprefix("qwen3_next").strip(".") or "__init__").split(".")[0]
    return name.split("_")[0] if name.startswith(("config_", "cli_")) else name


def module_of(path: Path) -> str:
    names = ("qwen3_next", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 2 else names)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported_modules(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever in the file the import stands."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for name in node.names:
                yield f"{source}.{name.name}" if is_module(f"{source}.{name.name}") else source


def own_imports(path: Path) -> set[str]:
    return {name for name in imported_modules(path) if name.split(".")[0] == "qwen3_next"}


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its number of lines without decorators and docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None and first.end_lineno is not None:
                lines -= first.end_lineno - first.lineno + 1
            yield node.name, lines


def lines_of_code(source: str) -> int:
    """Count the lines that hold code: no blank lines, comments or docstrings, those of attributes included."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(module_of(path))
    assert part in MAY_IMPORT, f"{shown(path)} belongs to no known part: say in MAY_IMPORT what {part!r} may import"
    for module in own_imports(path):
        target = part_of(module)
        assert target == part or target in MAY_IMPORT[part], f"{shown(path)} must not import {module}"


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_owning_and_scheduling_need_no_torch(name: str) -> None:
    own = {f"qwen3_next.engine.{Path(other).stem}" for other in WITHOUT_TORCH} | {"qwen3_next.errors"}
    for module in imported_modules(PACKAGE / "engine" / name):
        assert module in own or module.split(".")[0] in sys.stdlib_module_names, f"{name} must not import {module}"


def test_the_parts_form_no_circle() -> None:
    done: set[str] = set()
    while ready := [part for part in MAY_IMPORT if part not in done and MAY_IMPORT[part] <= done]:
        done.update(ready)
    assert done == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_only_ops_mentions_triton(path: Path) -> None:
    if part_of(module_of(path)) != "ops":
        assert not re.search("triton", path.read_text(encoding="utf-8"), re.IGNORECASE)


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_only_the_command_line_reads_the_environment(path: Path) -> None:
    if path.name == "cli.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in {"environ", "environb", "getenv", "getenvb"}, f"{shown(path)} reads the environment"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_files_and_functions_keep_their_budget(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LINES_OF_A_FILE
    budget = LINES_OF_A_KERNEL if path.stem.endswith("_triton") else LINES_OF_A_FUNCTION
    for name, lines in functions_of(path):
        assert lines < budget, f"{shown(path)}: {name} has {lines} lines"


def test_the_source_keeps_its_budget() -> None:
    kernels = [path for path in FILES if path.stem.endswith("_triton")]
    assert sum(lines_of_code(path.read_text(encoding="utf-8")) for path in kernels) < LINES_OF_CODE_IN_KERNELS
    parts = Counter[str]()
    for path in set(FILES) - set(kernels):
        parts[part_of(module_of(path))] += lines_of_code(path.read_text(encoding="utf-8"))
    assert parts.keys() <= LINES_OF_CODE.keys()
    assert {part: lines for part, lines in parts.items() if lines >= LINES_OF_CODE[part]} == {}


def test_lines_of_code_are_those_that_do_something() -> None:
    source = '''\
    """What it is
    for."""

    # Why.
    LIMIT = 3  # counted: one
    """Of an attribute,

    not code."""

    def f(x: str) -> str:  # two
        """Short."""
        return """a string
        of three lines

        is four of code""" + x  # six with the blank line inside
    '''
    assert lines_of_code(textwrap.dedent(source)) == 6


def test_the_median_function_is_short() -> None:
    lengths = [lines for path in FILES for _, lines in functions_of(path)]
    assert statistics.median(lengths) < LINES_OF_THE_MEDIAN_FUNCTION


def test_every_module_is_used() -> None:
    imported = {module for path in FILES for module in own_imports(path)}
    for path in FILES:  # `@accelerated("<module>")` names the module of a twin
        named = re.findall(r'^@accelerated\("(\w+)"\)', path.read_text(encoding="utf-8"), re.MULTILINE)
        imported.update(f"qwen3_next.ops.{name}" for name in named)
    for path in FILES:
        if path.name != "__init__.py" and path.name not in ENTRY_POINTS:
            assert module_of(path) in imported, f"nothing imports {shown(path)}"


def test_the_written_map_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in FILES:
        assert path.name == "__init__.py" or path.name in text, f"ARCHITECTURE.md does not mention {shown(path)}"


def test_no_file_is_empty() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{shown(path)} does not say what it is for"
        )
