# Everything goes through one virtual environment, .venv, made on the first call. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST_ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check
# The pin of torch stands in one place, and so do the build requirements.
TORCH := $(shell grep '^torch==' constraints-dev.txt)
BUILD_REQUIRES = $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'
CXX_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh python/*.cpp python/*.h tests/native/*.cpp tests/native/*.h tests/native/*/*.h)

.DELETE_ON_ERROR:
.PHONY: help demo test mutants fuzz build bench gpu gpu-build gpu-test gpu-bench format lint check-install check-wheel clean

# Threads that spin while they wait take the cores from each other as soon as two processes share them: a small operation then
# lasts a hundred times longer. `bench` keeps the default, as its users have it.
demo test mutants fuzz: export OMP_WAIT_POLICY := passive

help:  ## list the targets
	@awk -F ":.*## *" '/^[a-z-]+:.*##/ { printf "%-15s %s\n", $$1, $$2 }' Makefile

demo: build  ## install, build and run the main job: joint training beside AIM, with pictures
	$(BIN)/python -m aim_kernels demo

test: build  ## install, build and run every test that needs no GPU, style checks included
	$(BIN)/python -m pytest -n $(WORKERS) -m "not gpu" $(PYTEST_ARGS)

MUTANTS ?=
mutants: build  ## plant the bugs of tests/mutant_*.py, one at a time: every one has to be caught
	$(BIN)/python tests/mutants.py $(MUTANTS)

# Times the examples of the suite, and others in every run.
FUZZ ?= 20
fuzz: build  ## hypothesis for as long as FUZZ says, over whole runs and over the binding's arguments
	AIM_KERNELS_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n $(WORKERS) tests/test_property.py tests/test_binding.py $(PYTEST_ARGS)

# torch goes first and alone, exactly as pinned, so that no later requirement can choose another build of it.
$(STAMP): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "no virtual environment: on Debian, apt install python3-venv python3-dev" >&2; exit 1; }
	$(PIP) install $(TORCH)
	$(BUILD_REQUIRES) | $(PIP) install -c constraints-dev.txt -r /dev/stdin
	$(PIP) install -c constraints-dev.txt --no-build-isolation -e '.[dev]'
	touch $@

build: $(STAMP)  ## rebuild the extension where its sources changed
	@$(BIN)/python setup.py --quiet build_ext --inplace

bench: build  ## this machine's table: the kernels, their peers and the memory floor
	$(BIN)/python -m aim_kernels bench

# For a machine that has a GPU and no network: the Python, torch, triton and nvcc that are there, nothing installed.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results
GPU_WORKERS ?= 4
GPU_BENCH_ARGS ?= --sweep
gpu gpu-build gpu-test gpu-bench: export PYTHONPATH := $(CURDIR)
gpu gpu-build gpu-test gpu-bench: export PYTHONUNBUFFERED := 1
gpu gpu-build gpu-test gpu-bench: export AIM_KERNELS_CUDA := 1
gpu: gpu-build gpu-test gpu-bench  ## on a machine with a GPU: build with what is there, run the GPU tests, then the GPU benchmarks

gpu-build:  ## ... its first part
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m aim_kernels

gpu-test:  ## ... its second part
	$(GPU_PYTHON) -m pytest -m gpu -q -n $(GPU_WORKERS) --maxfail=20 --durations=10 $(PYTEST_ARGS)

gpu-bench:  ## ... its third part: GPU_OUT names the folder of the results
	$(GPU_PYTHON) -m aim_kernels bench --device cuda $(GPU_BENCH_ARGS) --out $(GPU_OUT)

format: $(STAMP)  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

lint: $(STAMP)  ## style, types and formatting, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

check-install: $(STAMP)  ## prove `pip install`: sdist, then an isolated build in an empty environment, then one example
	rm -rf build/check-install
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("build/check-install")'
	$(PYTHON) -m venv build/check-install/venv
	build/check-install/venv/bin/python -m pip install $(TORCH)
	build/check-install/venv/bin/python -m pip install build/check-install/*.tar.gz
	cd build/check-install && venv/bin/python -m aim_kernels && venv/bin/python ../../examples/drop_in.py
	rm -rf build/check-install

# The oldest PyTorch that pyproject.toml promises, and the one that development is pinned to.
WHEEL_TORCHES ?= $(shell sed -n 's/^dependencies = .*torch>=\([0-9.]*\)".*/\1.0/p' pyproject.toml) $(lastword $(subst ==, ,$(TORCH)))
WHEELS := build/check-wheel

# Found without PATH, an installed toolkit would go into the wheel; a machine without one decides by itself.
check-wheel: export AIM_KERNELS_CUDA := $(if $(wildcard /usr/local/cuda/bin/nvcc),0,auto)
check-wheel:  ## prove the wheel: built without torch and nvcc, looked through, then run with every torch of WHEEL_TORCHES (gigabytes)
	rm -rf $(WHEELS)
	$(PYTHON) -m venv $(WHEELS)/builder
	$(WHEELS)/builder/bin/python -m pip install build
	! $(WHEELS)/builder/bin/python -c 'import torch' 2> /dev/null
	! PATH=/usr/bin:/bin command -v nvcc
	env -u PYTHONPATH -u NVCC -u CUDA_HOME PATH=/usr/bin:/bin $(WHEELS)/builder/bin/python -m build --outdir $(WHEELS) .
	$(WHEELS)/builder/bin/python tests/wheel_contents.py $(WHEELS)/*.whl
	set -e; for torch in $(WHEEL_TORCHES); do \
	  $(PYTHON) -m venv $(WHEELS)/with-torch; \
	  $(WHEELS)/with-torch/bin/python -m pip install --quiet torch==$$torch; \
	  $(WHEELS)/with-torch/bin/python -m pip install --quiet $(WHEELS)/*.whl; \
	  env -u PYTHONPATH $(WHEELS)/with-torch/bin/python tests/wheel_smoke.py; \
	  rm -rf $(WHEELS)/with-torch; \
	done
	rm -rf $(WHEELS)

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info aim_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(STAMP)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
