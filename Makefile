# Graft. `make quickstart` and `make test` are all a newcomer needs; `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
OUT    ?= moecap_out/quickstart

BIN  := $(VENV)/bin
CODE := moecap_eval plugins tests benchmarks examples tools

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-gpu bench lint format

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## Make the full environment (.venv): every framework and the test tools
	@$(PYTHON) tools/environment.py full --venv $(VENV)

quickstart:  ## Evaluate plain vLLM against expert offloading on a small trained MoE; writes a report
	@$(PYTHON) tools/environment.py quickstart --venv $(VENV)
	@$(BIN)/moecap run examples/quickstart.yaml -o $(OUT)

test: setup lint  ## Lint, then run every test that needs no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

test-gpu:  ## Run the GPU tests with the current python (TESTS=... selects)
	$(PYTHON) -m pytest -m gpu $(or $(TESTS),tests)

bench:  ## Run every CPU benchmark and write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

lint:  ## ruff, mypy and import-linter
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy moecap_eval $(wildcard plugins/*) tools
	$(BIN)/lint-imports

format:  ## Let ruff mend what it can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
