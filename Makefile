# make quickstart   distil SmolLM2-135M-Instruct into a 5-layer student on this machine and write a report
# make test         the whole test suite
# TORCH_INDEX=https://download.pytorch.org/whl/cpu chooses the CPU build of torch; OUTPUT= another folder of results.

PYTHON ?= python3
OUTPUT ?= runs/quickstart
TORCH_INDEX ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Two PyTorch processes that spin on the same cores slow each other down a hundredfold.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint clean
.DEFAULT_GOAL := quickstart

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "potstill needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/potstill run quickstart output=$(OUTPUT) --resume

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist
