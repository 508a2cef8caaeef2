# make demo   install, then the whole quickstart: teacher -> student -> builds -> selection -> edge package
# make test   install, then the tests            make lint    ruff and mypy
# make families  all checks of model families, and docs/families.md from their results: an hour on 2 cores
# make ecosystem  other people's runtimes over our folders, in environments of their own under work/environments
# make check  lint and test                      make clean   remove what the tools and the demo wrote
#
# The environment is made once, in .venv, with the exact versions of constraints.txt; it is brought up to date only when
# pyproject.toml or constraints.txt change. Everything after the install works offline.

VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE ?= examples/quickstart.toml
RUN ?= work/quickstart

.DEFAULT_GOAL := help
.PHONY: help install demo test lint check families ecosystem clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/slmdeploy run $(RECIPE) -o $(RUN)

# Two processes, whole files each: tests run on one thread, and fixtures of a file are made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

families: $(STAMP)
	rm -f work/families.jsonl && mkdir -p work
	FAMILIES_JSON=work/families.jsonl $(BIN)/python -m pytest tests/exporting -m "slow or not slow"
	$(BIN)/python benchmarks/families_table.py work/families.jsonl docs/families.md

ecosystem: $(STAMP)
	SLMDEPLOY_TEST_ENVIRONMENTS=work/environments $(BIN)/python -m pytest tests/ecosystem -m slow

clean:
	rm -rf work dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# A pyenv shim answers to a name whose version is not installed, so a candidate counts only once it has run.
$(BIN)/python:
	@for python in "$(PYTHON)" python3.11 python3; do \
	  if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "slmdeploy needs Python 3.11 or newer and found neither python3.11 nor such a python3: install one, or run make PYTHON=/path/to/python3.11" >&2; exit 2

# Two steps, because build backends have to be there before anything is built without isolation: hatchling for slmdeploy,
# setuptools for three packages of lm_eval's that have no wheel.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[build,openvino,eval,package,serve,dev]'
	@touch $@
