# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv first (stamp files: only what changed).
#
#   make setup    virtual environment, pinned dependencies, compiled extension
#   make demo     the main job on real data; tables on the screen, numbers in runs/demo/metrics.json
#   make test     lint, format check, types, the fast test suite; make test-all: slow tests too, property tests with new examples
#   make zoo      about 160 architectures through tracing and compaction (ARGS=--quick: a dozen)
#   make accuracy every pruning method at equal budgets over five seeds, about an hour and a half of two cores;
#                 goes on where it was stopped (ARGS=--quick: in miniature, ARGS=--report: only draw)
#   make lint     only the checks;  make format  rewrites;  make clean  removes what was built

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
ZOO := .venv-zoo
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := requirements/dev.txt
CPP_SOURCES = $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.hpp' \) 2>/dev/null)

# A fresh virtual environment is not "activated"; ninja and the formatters must still be found.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-all zoo accuracy lint format clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMPS)/extension

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "The pinned development environment needs CPython 3.11 to 3.13, found: $$($(PYTHON) --version 2>&1). Run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first and alone (see requirements/dev.txt). Unpinned torch, or torch among the rest, may pull a CUDA build.
$(STAMPS)/requirements: $(REQUIREMENTS) | $(STAMPS)/venv
	$(PIP) install --quiet $$(grep -E '^torch==' $(REQUIREMENTS))
	$(PIP) install --quiet -r $(REQUIREMENTS)
	touch $@

$(STAMPS)/package: setup.py pyproject.toml $(STAMPS)/requirements
	LIGHTNING_PRUNE_FORCE_EXT=1 $(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

# After a change in csrc only the changed files are compiled again (ninja).
$(STAMPS)/extension: $(STAMPS)/package $(CPP_SOURCES)
	LIGHTNING_PRUNE_FORCE_EXT=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/python -m lightning_prune demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES))
	$(BIN)/mypy lightning_prune

test: lint
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=random

# An environment of its own: torchvision, which timm imports, must not stand beside the CPU build of torch in .venv.
$(ZOO)/stamp: requirements/zoo.txt $(STAMPS)/extension
	$(PYTHON) -m venv $(ZOO)
	echo "$(CURDIR)/$$(cd $(VENV) && echo lib/python3*/site-packages | sed 's|^|$(VENV)/|')" > $$(echo $(ZOO)/lib/python3*/site-packages)/project.pth
	echo "$(CURDIR)" >> $$(echo $(ZOO)/lib/python3*/site-packages)/project.pth
	$(ZOO)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/zoo.txt
	touch $@

zoo: $(ZOO)/stamp
	$(ZOO)/bin/python benchmarks/zoo.py $(ARGS)

accuracy: setup
	$(BIN)/python benchmarks/accuracy.py --jobs $(JOBS) $(ARGS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

clean:
	rm -rf $(VENV) $(ZOO) build dist *.egg-info runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lightning_prune -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
