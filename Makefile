# Two commands on a fresh machine: make demo, make test. Everything they need goes into .venv.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: demo test test-slow test-gpu check format clean

demo: .venv/core            ## fine-tune on the sample set, measure it, write a report
	$(BIN)/vitrail train samples:emoji --recipe demo

test: .venv/dev             ## the default tests: about 11 minutes of CPU time
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: .venv/dev        ## the tests that take minutes
	$(BIN)/pytest -m slow

test-gpu: .venv/dev         ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

check: .venv/dev            ## style, types, and the arrows between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vitrail needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/core: .venv/python pyproject.toml constraints.txt
	@echo "setting up .venv (torch alone is about 200 MB)"
	$(PIP) -e '.[onnx]'
	@touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps lightly  # losses to compare with; what it needs besides is not used
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
