# The commands of the README. Everything lives inside the checkout: .venv/ and .cache/.
#
#   make demo    generate modules and decode a paged batch through them
#   make example serve requests with a small DeepSeek-V3 of transformers (EXAMPLE_ARGS="--device cuda --graph")
#   make test    lint, types, and every test that this machine can run
#   make build   build modules ahead of time into modules/ (ARCH="cpu sm_90a", DTYPE="bfloat16 float16")
#   make bench-check
#                on an H100: fail where a case falls more than 5% behind its ratio to a peer in tuning_logs/
#                (BENCH_ARGS="--peer sgl_kernel.flash_mla"; on an H200 BENCH_RECORD names its log)
#   make lint, make types, make check, make wheel, make format, make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
# What a machine without a GPU gets is up to the package index: 2.13.0 is the version that the suite runs with. A machine
# with a GPU keeps its own, or gets the newest.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
ARCH ?= cpu sm_90a
DTYPE ?= bfloat16 float16
# Processes of the test suite; its tests are mostly single-threaded.
TEST_JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
EXAMPLE_ARGS ?=
BENCH_RECORD := tuning_logs/mla_decode_sm_90a_bf16_dense_d576_v512_p64_m64/h100.bench.jsonl

# Modules that are generated on demand, and compilers' own caches, stay in the checkout too.
export TILEMLA_CACHE_DIR ?= $(CURDIR)/$(CACHE)/tilemla
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := $(wildcard runtime/*.py runtime/*/*.py dsl/*.py dsl/*/*.py codegen/*.py tuning_logs/*.py)

.PHONY: demo example test check lint types build wheel bench-check format clean

demo: $(VENV)/.run
	@$(BIN)/python -m tilemla.demo

example: $(VENV)/.example
	@$(BIN)/python examples/serve.py $(EXAMPLE_ARGS)

test: check
	@$(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

check: lint types

lint: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

# mypy cannot follow an editable install, so it reads an installed copy.
types: $(CACHE)/types/.installed
	@MYPYPATH=$(CACHE)/types $(BIN)/mypy --cache-dir=$(CACHE)/mypy

build: $(VENV)/.run
	@$(BIN)/tilemla build $(ARCH:%=--arch %) $(DTYPE:%=--dtype %) --out-dir modules

wheel: $(VENV)/.run
	@rm -rf build
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

bench-check: $(VENV)/.run
	@$(BIN)/tilemla bench --cases grid --cases small --cases imbalanced --check $(BENCH_RECORD) $(BENCH_ARGS)

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(CACHE) build dist modules *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# A machine that has torch keeps it: the environment then looks into the system's packages too.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, got " + sys.version)'
	$(PYTHON) -m venv $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	@touch $@

# setuptools and wheel build this package itself without another download.
$(VENV)/.run: $(VENV)/.made pyproject.toml
	@$(BIN)/pip install --quiet 'setuptools>=77' wheel
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(TORCH) || $(BIN)/pip install torch
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[codegen]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[test,dev]'
	@touch $@

$(VENV)/.example: $(VENV)/.run pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[examples]'
	@touch $@

$(CACHE)/types/.installed: $(VENV)/.dev pyproject.toml $(SOURCES)
	@rm -rf $(CACHE)/types build
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(CACHE)/types .
	@rm -rf build
	@touch $@
