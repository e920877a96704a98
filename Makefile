# Two commands: `make demo` and `make test`. Both make .venv on first use; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint soak mutations label clean

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
	$(BIN)/python -m tools.bundle_checks.expressions bundles/*/configs/*.json

# Processes that share the tests; each takes one core and up to 3 GB.
TEST_PROCESSES ?= 2

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

# Slow reliability tests: kills, full disks, damaged files. Prints "N tried, N survived" and writes the figures.
SOAK_MINUTES ?= 30

soak: $(VENV)/installed
	$(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES) --out docs/measurements/reliability.md

# Deliberate faults, each of which a named test must notice.
mutations: $(VENV)/installed
	$(BIN)/python -m tests.mutations --out docs/measurements/mutations.md

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
