# Everything a newcomer, a contributor and CI run. Needs make and Python 3.11; all else goes into .venv/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=
WORKERS ?= 3
DEMO_ARGS ?=
BENCH_ARGS ?=

# Compiled modules are kept, whatever the shell says: without them each of the many processes compiles all of it again.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --quiet

.PHONY: help demo test check format lint types floors docs wheel bench clean
.DEFAULT_GOAL := help

help: ## list what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## a flash sale without any server, and the proof that Redis and database agree
	@$(BIN)/inventory-sdk demo $(DEMO_ARGS)

test: $(VENV)/.test ## the tests; those whose server isn't there are skipped by name (PYTEST_ARGS=…, WORKERS=3)
	@$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist worksteal --ignore=tests/typing $(PYTEST_ARGS)

check: lint types floors docs wheel ## everything CI checks besides the tests

format: $(VENV)/.check ## lay out the code and sort its imports
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

lint: $(VENV)/.check ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.check ## mypy --strict and pyright, over the package and over users' decorated functions
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/typing

floors: $(VENV)/.test ## imports run one way, from the roof to the ground
	$(BIN)/python -m pytest -q tests/unit/test_floors.py

docs: $(VENV)/.check ## the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.check ## build the wheel, install it in an empty environment, run its demo there
	$(BIN)/python .ci/check_wheel.py

bench: $(VENV)/.test ## one hot SKU, five ways (needs Redis, RabbitMQ, PostgreSQL; BENCH_ARGS=…)
	$(BIN)/python -m benchmarks.hot_sku $(BENCH_ARGS)

clean: ## remove everything that was made here
	rm -rf $(VENV) site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment grows in steps, so that the first demo doesn't wait for linters. A stamp is younger than pyproject.toml
# or its step runs again.

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "No python3.11 found; say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version)'
	@echo "Making the environment in $(VENV)/ (once; a minute or two) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "pip>=25.1"
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	@$(PIP) --editable ".[embedded,cli]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Adding what the tests need …"
	@$(PIP) --editable ".[embedded,cli,postgresql,mysql,otel,admin,elasticsearch]" --group test
	@touch $@

$(VENV)/.check: $(VENV)/.test
	@echo "Adding linters, type checkers and the documentation's tools …"
	@$(PIP) --group check
	@touch $@
