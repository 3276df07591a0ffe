# `make demo` and `make test` need git, make and Python 3.11 or newer, and nothing else.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo test lint clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(READY)  ## create .venv with the library and its development tools

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "v2m needs Python 3.11 or newer with venv and pip (on Debian and Ubuntu: apt install python3-venv). If you have one, say: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing v2m and PyTorch into $(VENV) (once; a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## train, evaluate and report on the bundled images: runs/demo/report.html
	@$(BIN)/v2m train --recipe demo --output runs/demo --overwrite

test: $(READY)  ## the default test suite
	@$(BIN)/python -m pytest -n 2

lint: $(READY)  ## style and correctness of the source
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:  ## remove the environment and the demo's run
	rm -rf $(VENV) runs/demo
