# Two commands do all the set-up: `make demo` and `make test`, each from an empty clone with Python 3.11 or newer.
# Both install into .venv, with the versions of constraints.txt, and only when those or pyproject.toml have changed.

PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= Once upon a time, in a small village by the sea,
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
HOUSE_RULES := tests/test_architecture.py tests/test_public_api.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-page screenshot check fix bench bench-ops

help:   ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/dev.stamp   ## everything that the other targets need, development tools included

demo: .venv/runtime.stamp   ## stream a completion from the model in the box (PROMPT="...")
	$(BIN)/qwen3-next generate "$(PROMPT)"

test: .venv/dev.stamp   ## all tests
	$(BIN)/python -m pytest

# Every test of the operations has a run for each device ("[cuda-...]" in its name); the CPU's runs are part of `make test`.
test-gpu: .venv/dev.stamp   ## the tests of the operations on a GPU, kernels and large sizes included
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu needs a CUDA device")'
	$(BIN)/python -m pytest tests/ops -k cuda

# They need chromium and chromium-driver, so `make test` leaves them out; pyproject.toml says how.
test-page: .venv/dev.stamp   ## the tests of the chat page in a browser (Debian: chromium, chromium-driver)
	$(BIN)/python -m pytest --override-ini "addopts=--strict-markers --strict-config -ra" tests/page

screenshot: .venv/dev.stamp   ## docs/page.png, made anew
	$(BIN)/python -m tests.page.screenshot

check: .venv/dev.stamp   ## style, types, import rule, line budgets, exports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest --quiet $(HOUSE_RULES)

fix: .venv/dev.stamp   ## correct what ruff can correct
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.stamp   ## the speed of the model beside transformers
	$(BIN)/python benchmarks/model.py

bench-ops: .venv/dev.stamp   ## the speed of the operations on a GPU beside its floor and other packages
	$(BIN)/python -m benchmarks.ops

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "qwen3-next needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Choose another with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/runtime.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the packages that the model needs to run (once) ..."
	$(INSTALL) --editable .
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the package and its development tools (once) ..."
	$(INSTALL) --editable '.[dev]'
	@touch .venv/runtime.stamp $@
