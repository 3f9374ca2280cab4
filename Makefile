# make tables: set up and run the whole pipeline. make test: the tests. `make` alone lists the targets.
# PYTHON chooses the interpreter of a new .venv; pip's own PIP_* variables are respected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup tables test test-all lint format clean-results clean-venv

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make .venv and install the packages that constraints.txt pins

tables: $(VENV)/ready ## run the pipeline at the default scale: tables, figures and an HTML report under results/
	@$(BIN)/snakemake --profile workflow/profiles/local

test: $(VENV)/ready-dev ## run the fast tests
	@$(BIN)/python -m pytest -q -m "not slow"

test-all: $(VENV)/ready-dev ## run every test
	@$(BIN)/python -m pytest -q

lint: $(VENV)/ready-dev ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/snakefmt --check Snakefile workflow
	@$(BIN)/mypy

format: $(VENV)/ready-dev ## format the sources
	@$(BIN)/ruff format .
	@$(BIN)/snakefmt Snakefile workflow

clean-results: ## delete what the pipeline made (data/tiny, results/tiny, resume/tiny, logs), nothing else
	rm -rf data/tiny results/tiny resume/tiny logs

clean-venv: ## delete .venv
	rm -rf $(VENV)

# The stamps are older than what they were made from when pyproject.toml or constraints.txt change: pip then runs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): name another with make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the packages of constraints.txt into $(VENV) (some minutes, once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cluster]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@echo "Installing the packages of the tests into $(VENV) (once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
