# Everything runs in .venv: made on first use, renewed when what it is built from changes.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
STAMP := .venv/.installed
EXTRAS := training,labels,integrations,triton,test,bench,peers,docs,dev
CPP := $(shell find csrc -name '*.[chi]*')
PYTHON312 ?= python3.12
TORCH ?= 2.8.0 2.13.0 2.15.0
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(CPP)

CORE := $(addprefix tests/,rows loss streaming backends/test_native*.py repo/test_repo.py \
  repo/test_journey.py repo/test_public_api.py repo/test_yardstick.py)

define suite
$(1) -m pytest -q tests --ignore-glob 'tests/backends/test_triton*'
$(1) -m pytest -q tests/backends/test_triton*.py  # apart: they put Triton into its interpreter
endef

.DEFAULT_GOAL := help
.PHONY: help install demo recipe check test coverage architectures wheel docs bench microbench
.PHONY: sanitize races semantics lint format clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(STAMP)  ## make .venv and install the package there, editable, with all extras

demo: $(STAMP)  ## distil small students on text, then on a task: tables, pictures, a report of each
	$(BIN)/python -m bgkernels.training demo
	$(BIN)/python -m bgkernels.training demo --task arithmetic

recipe: $(STAMP)  ## prune, distil, fine-tune, sample and reject, DPO: accuracy on a task after each stage
	$(BIN)/python -m bgkernels.training recipe

check: lint  ## check style and types, and run the fast tests of the core: before each commit
	$(BIN)/python -m pytest -q -m 'not slow' $(CORE) $(addprefix --ignore tests/loss/,test_compile.py test_dtensor.py)

test: $(STAMP)  ## run the test suite
	$(call suite,$(BIN)/python)

coverage: $(STAMP)  ## run the test suite and name the lines of the package that it misses
	$(BIN)/coverage erase
	$(call suite,$(BIN)/coverage run)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

architectures: $(STAMP)  ## try every language model of transformers, built small; write docs/architectures.md
	$(BIN)/python -m tests.architectures

sanitize: $(STAMP)  ## run the CPU kernels under the sanitizers of GCC, with a fuzzer
	.ci/sanitize

wheel:  ## build dist/, and test the wheel with each of TORCH (gigabytes)
	.ci/wheel $(TORCH)

docs: $(STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)  ## measure beside the peers and write benchmarks/results (a quarter of an hour)
	$(BIN)/python -m benchmarks.run --suite cpu

microbench: $(STAMP)  ## time the primitives and the small parts alone
	$(BIN)/python -m pytest benchmarks --benchmark-only

races: $(STAMP)  ## run the emulated CUDA kernels under ThreadSanitizer and AddressSanitizer
	$(BIN)/python -m pytest -q tests/backends/test_cuda_sanitized.py

semantics:  ## run what Triton compiles, on the CPU (needs Python 3.12): values, accesses, races
	@test -x .venv-semantics/bin/python || $(PYTHON312) -m venv .venv-semantics || \
	  { echo 'which Python 3.12? make semantics PYTHON312=/path/to/python3.12'; exit 1; }
	.venv-semantics/bin/python -m pip install -q ttsem==0.1.0 'torch==2.14.*' 'triton==3.8.*' \
	  pytest hypothesis
	.venv-semantics/bin/python -m ttsem.sanitize pytest -q tests/backends/test_triton.py

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove the environment, builds and caches
	rm -rf .venv build dist site *.egg-info bgkernels/backends/native/_C.*.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first and alone, so that no other package decides which build of it is fetched.
# The old library is removed before that: after a failed build, tests must not run on it.
$(STAMP): $(BUILD_FILES)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -f $@ bgkernels/backends/native/_C.*.*
	$(PIP) torch
	$(PIP) -e '.[$(EXTRAS)]'
	@ls bgkernels/backends/native/_C.*.* >/dev/null 2>&1 || \
	  echo 'note: the compiled backend was not built; BGKERNELS_NATIVE=ON make -B install says why'
	touch $@
