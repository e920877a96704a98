# Two commands: `make demo` and `make test`. Both make .venv on first use; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint label clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo all --out demo

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Processes that share the tests; each takes one core and up to 3 GB.
TEST_PROCESSES ?= 2

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

# The environment of MONAI Label, which wants older packages (docs/monai_label.md).
LABEL_PYTHON ?= $(PYTHON)

.label/installed: tools/label_requirements.txt
	$(LABEL_PYTHON) -m venv .label
	.label/bin/python -m pip install --quiet --upgrade pip
	.label/bin/python -m pip install --quiet --requirement $<
	touch $@

label: .label/installed

clean:
	rm -rf demo runs build dist .pytest_cache .mypy_cache .ruff_cache
