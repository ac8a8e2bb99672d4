# make demo  plain OPD, EffOPD and line_search on the built-in testbed: runs/demo/
# make test  the whole test suite, on WORKERS=2 cores
# make test-fast  the inner loop: without the tests marked slow
# make lint  ruff and mypy
# Each sets up .venv by itself from constraints.txt (Python 3.11 or newer, pip, make).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-fast lint format clean

demo: $(READY)
	$(BIN)/effopd quickstart --output_dir runs/demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, at the pinned version; a CPU build is enough
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
