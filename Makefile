# make demo  plain OPD, EffOPD and newton_search on the built-in testbed: runs/demo/
# make real-model  SmolLM2-135M: a teacher, plain OPD and newton_search on 2 cores: runs/compare-smollm2/
# make test  the whole test suite, on WORKERS=2 cores
# make test-fast  the inner loop: without the tests marked slow
# make lint  ruff, mypy, spelling of pages and code, links between pages
# make docs  the documentation site, with warnings as errors: site/
# Each sets up .venv by itself from constraints.txt (Python 3.11 or newer, pip, make).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo real-model test test-fast lint format docs clean

demo: | say-demo $(READY)
	$(BIN)/effopd quickstart --output_dir runs/demo

.PHONY: say-demo
say-demo:
	@echo "make demo: 1. Python packages in $(VENV) (once, some minutes, mostly torch)  2. effopd quickstart (about 3 minutes)"

TEACHER := runs/smollm2/chain_sum/teacher/model.safetensors

real-model: $(READY) $(TEACHER)
	$(BIN)/effopd compare recipes/compare-smollm2.yaml --only '*chain_sum/plain/lr-3e-05/seed-0' \
		--only '*chain_sum/newton_search/lr-3e-06/seed-0'

$(TEACHER): | $(READY)
	$(BIN)/effopd testbed fetch smollm2
	test -e runs/smollm2/chain_sum/sft/card.json || \
		$(BIN)/effopd testbed sft chain_sum --output_dir runs/smollm2/chain_sum/sft
	$(BIN)/effopd rl --config recipes/smollm2-rl-chain_sum.yaml

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python benchmarks/check_links.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# torch first, at the pinned version; a CPU build is enough
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) (several GB with CUDA, some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@echo "installing the other packages of constraints.txt into $(VENV) (some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
