# A fresh machine needs Python 3.11 or newer, make and a C compiler; each target does its own set-up in .venv.
#   PYTHON=python3   the Python to build .venv with
#   TORCH=cpu        the CPU build of torch, no CUDA package; TORCH=gpu takes the ordinary build
PYTHON ?= python3
TORCH ?= cpu
BIN := .venv/bin
# Notebooks run as tests touch nobody's Jupyter or IPython settings, and two at a time leave a core each.
QUIET := IN_TEST=1 OMP_NUM_THREADS=1 JUPYTER_CONFIG_DIR=$(CURDIR)/.venv/jupyter IPYTHONDIR=$(CURDIR)/.venv/ipython

.DEFAULT_GOAL := help
.PHONY: help setup demo test lab clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), TORCH=$(TORCH) (cpu or gpu)"

setup:  ## .venv with the package and its tools
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash .ci/setup

demo: setup  ## from synthetic tiles to a number and a picture, on a CPU
	@$(BIN)/python -m mmearth.experiment demo

test: setup  ## clean notebooks, exported modules, house rules, every notebook, every test
	@echo "== nbdev-clean leaves no difference"
	@$(QUIET) bash .ci/unchanged $(BIN)/nbdev-clean
	@echo "== nbdev-export leaves no difference"
	@$(QUIET) bash .ci/unchanged $(BIN)/nbdev-export
	@echo "== the rules of the house"
	@$(BIN)/python -m mmearth.house
	@echo "== every notebook runs"
	@$(QUIET) $(BIN)/nbdev-test --n-workers 2 --timing
	@echo "== pytest"
	@$(BIN)/python -m pytest -q

lab: setup  ## JupyterLab on this folder
	@$(BIN)/jupyter lab

clean:  ## removes .venv and caches; notebooks, data and reports stay
	rm -rf .venv .pytest_cache *.egg-info mmearth/__pycache__ tests/__pycache__
