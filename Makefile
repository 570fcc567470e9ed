# The two commands of this project are `make demo` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## Debian packages, virtual environment, compiled parts (once)

$(STAMP): pyproject.toml setup.py tests/support/debian-packages.txt $(wildcard filer/*/*.c) filer/core_filer/_libnfs_build.py
	@tests/support/install-debian-packages
	@test -x $(BIN)/python || { echo "creating the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the package and its Python dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: install  ## all tests; T='-k words' selects
	$(BIN)/python -m pytest $(T)

lint: install  ## ruff
	$(BIN)/ruff check filer cluster tests setup.py

types: install  ## mypy, strict
	$(BIN)/mypy

demo: install  ## a far-away NAS, one filer node, a small render job
	$(BIN)/python -m tests.demo

bench: install  ## the figures of ARCHITECTURE.md; ONLY=N1,N5 and SCALE=0.1 for a quick look
	$(BIN)/python -m tests.bench --only "$(ONLY)" --scale "$(or $(SCALE),1)"

clean:  ## what builds leave behind
	rm -rf build *.egg-info $(VENV)

.PHONY: help install test lint types demo bench clean
