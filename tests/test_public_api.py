"""What the package offers, says so and nothing else; importing it changes nothing."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3_next

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "qwen3_next"
PACKAGES = sorted(
    ".".join(("qwen3_next", *path.parent.relative_to(PACKAGE).parts)) for path in PACKAGE.rglob("__init__.py")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

WITHOUT_SIDE_EFFECTS = """
import os, random, sys
import numpy, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

before = dict(os.environ), torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
loaded = set(sys.modules)
import qwen3_next

after = dict(os.environ), torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
assert before[0] == after[0], "environment"
assert torch.equal(before[1], after[1]) and before[2:] == after[2:], "random state or default dtype"
assert not torch.cuda.is_initialized(), "CUDA"
for module in ("matplotlib", "tensorboard", "typer", "qwen3_next.cli", "qwen3_next.train"):
    assert module not in set(sys.modules) - loaded, module
assert type(AutoConfig.for_model("qwen3_next")).__module__.startswith("transformers."), "AutoConfig"
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_says_what_it_offers(name: str) -> None:
    package = importlib.import_module(name)
    offered = list(package.__all__)
    assert len(offered) == len(set(offered)), "each name once; the order is ruff's to hold"
    for public in offered:
        assert hasattr(package, public), public
        assert public == "__version__" or not public.startswith("_"), public


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_offers_all_that_it_gathers(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__file__ is not None
    gathered: set[str] = set()
    for node in ast.parse(Path(package.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("qwen3_next")):
            gathered.update(alias.asname or alias.name for alias in node.names)
    assert gathered <= set(package.__all__)


def test_the_public_names_have_a_docstring() -> None:
    for name in qwen3_next.__all__:
        public = getattr(qwen3_next, name)
        assert name == "__version__" or (public.__doc__ or "").strip(), name


def test_the_public_names_are_in_the_documents() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for name in qwen3_next.__all__:
        assert name == "__version__" or re.search(rf"\b{name}\b", text), f"no document mentions {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_the_documents_import_exists(path: Path) -> None:
    for block in re.findall(r"```(?:python|py)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        try:
            tree = ast.parse(block)
        except SyntaxError:
            continue  # an excerpt, or a page of design: not a program
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwen3_next"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{path.name}: from {node.module} import {alias.name}"


def test_the_version_is_that_of_the_distribution() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{qwen3_next.__version__}"' in project


def test_importing_the_package_has_no_side_effect() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_SIDE_EFFECTS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
