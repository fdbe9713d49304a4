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
CXX_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh python/*.cpp python/*.h tests/native/*.cpp tests/native/*.h tests/native/*/*.h)

.DELETE_ON_ERROR:
.PHONY: help demo test test-all nightly huge mutants fuzz build bench gpu gpu-first gpu-test gpu-bench gpu-sweep gpu-sanitizer format lint check-install check-wheel clean

# Threads that spin while they wait take the cores from each other as soon as two processes share them: a small operation then
# lasts a hundred times longer. `bench` keeps the default, as its users have it.
demo test test-all huge mutants fuzz: export OMP_WAIT_POLICY := passive

help:  ## list the targets
	@awk -F ":.*## *" '/^[a-z-]+:.*##/ { printf "%-15s %s\n", $$1, $$2 }' Makefile

demo: build  ## install, build and run the main job: joint training beside AIM, with pictures
	$(BIN)/python -m aim_kernels demo

test: build  ## install, build and run the tests of a few minutes: what to run after every change
	$(BIN)/python -m pytest -n $(WORKERS) -m "not gpu and not slow and not nightly" $(PYTEST_ARGS)

test-all: test  ## ... and the others that need no GPU: sanitizers, emulated devices, processes, compilers, trainings
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations=20 -m "slow and not gpu and not nightly" $(PYTEST_ARGS)

nightly: huge fuzz mutants check-install check-wheel  ## hours: the next three, and the source archive and wheel in empty environments

huge: build  ## more than 2^31 elements (11 GiB of memory), and a wheel from the source archive
	$(BIN)/python -m pytest -n 1 -m "nightly and not gpu" $(PYTEST_ARGS)

MUTANTS ?=
mutants: build  ## plant the bugs of tests/mutants, one at a time: every one has to be caught
	$(BIN)/python tests/mutants/mutants.py $(MUTANTS)

# Times the examples of the suite, and others in every run.
FUZZ ?= 20
fuzz: build  ## hypothesis for as long as FUZZ says, over whole runs and over the binding's arguments
	AIM_KERNELS_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n $(WORKERS) tests/optim/test_property.py tests/step/test_binding.py $(PYTEST_ARGS)

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

# For a machine that has a GPU and no network: the Python, torch, triton and nvcc that are there, nothing installed. Each
# target is done within GPU_LIMIT seconds, needs none of the others, and goes on where a part of it fails
# (benchmarks/gpu_parts.sh). Kernels are built for the architecture of the devices that are there.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results/gpu
GPU_LIMIT ?= 225
GPU_WORKERS ?= 8
GPU_BENCH_ARGS ?=
GPU_TARGETS := gpu-first gpu-test gpu-bench
GPU_TESTS := $(addprefix tests/backends/test_,device_step.py gpu.py gpu_use.py packed_device.py phases.py) \
  $(addprefix tests/optim/test_,clipping.py edits.py frozen.py scaling.py) $(addprefix tests/step/test_,numbers.py sizes.py)
GPU_ALONE := gpu-sweep gpu-sanitizer
gpu $(GPU_TARGETS) $(GPU_ALONE): export PYTHONPATH := $(CURDIR)
gpu $(GPU_TARGETS) $(GPU_ALONE): export PYTHONUNBUFFERED := 1
gpu $(GPU_TARGETS) $(GPU_ALONE): export AIM_KERNELS_CUDA := 1
gpu $(GPU_TARGETS) $(GPU_ALONE): export AIM_KERNELS_CUDA_ARCHS ?= native
GPU_BUILD = $(GPU_PYTHON) setup.py --quiet build_ext --inplace
# Where nvcc fails, Triton can be tested and timed all the same.
GPU_PARTS = @bash benchmarks/gpu_parts.sh $@ $(GPU_LIMIT) "$(GPU_OUT)" \
  --part build 150 sh -c '$(GPU_BUILD) || { AIM_KERNELS_CUDA=0 $(GPU_BUILD); exit 1; }'
# Warnings of versions that nobody has seen yet are told, and fail nothing.
GPU_PYTEST = $(GPU_PYTHON) -m pytest -m gpu -q -W default -p no:cacheprovider
# By backend, so that a kernel that breaks the process takes no others along.
GPU_FIGURES = $(GPU_PYTHON) -m aim_kernels bench --device cuda --out "$(GPU_OUT)" $(GPU_BENCH_ARGS) --backends

gpu:  ## on a machine with a GPU: the next three, whatever becomes of them; GPU_OUT names the folder of the results
	@failed=; for target in $(GPU_TARGETS); do $(MAKE) --no-print-directory $$target || failed="$$failed $$target"; done; \
	  echo "gpu: $${failed:+failed:$$failed; }results in $(GPU_OUT)"; test -z "$$failed"

gpu-first:  ## ... builds, a report, one case against the oracle for each backend, float32 figures of three sets
	$(GPU_PARTS) \
	  --part report 30 $(GPU_PYTHON) -m aim_kernels \
	  --part "oracle, cuda" 45 $(GPU_PYTEST) "tests/backends/test_device_step.py::test_oracle_in_lock_step[cuda@gpu-adamw-all]" \
	  --part "oracle, triton" 60 $(GPU_PYTEST) "tests/backends/test_device_step.py::test_oracle_in_lock_step[triton@gpu-adamw-all]" \
	  --part "figures, cuda" 150 $(GPU_FIGURES) cuda --dtypes float32 --sets 256m resnet50 1000x1k \
	  --part "figures, triton" 150 $(GPU_FIGURES) triton --dtypes float32 --sets 256m resnet50 1000x1k

gpu-test:  ## ... builds, every test marked gpu but the sanitizers
	$(GPU_PARTS) \
	  --part tests $(GPU_LIMIT) $(GPU_PYTEST) -n $(GPU_WORKERS) --durations=10 --junitxml="$(GPU_OUT)/gpu-test.xml" \
	  --deselect tests/backends/test_gpu.py::test_compute_sanitizer $(GPU_TESTS) $(PYTEST_ARGS)

gpu-bench:  ## ... builds, the other figures
	$(GPU_PARTS) \
	  --part "figures, cuda, bfloat16" 150 $(GPU_FIGURES) cuda --dtypes bfloat16 \
	  --part "figures, triton, bfloat16" 150 $(GPU_FIGURES) triton --dtypes bfloat16 \
	  --part "figures, cuda, float32" 150 $(GPU_FIGURES) cuda --dtypes float32 --sets vit-l16 \
	  --part "figures, triton, float32" 150 $(GPU_FIGURES) triton --dtypes float32 --sets vit-l16

gpu-sweep:  ## by itself: builds, then times the kernels by chunk and block size
	$(GPU_PARTS) \
	  --part "sweep, cuda" 150 $(GPU_FIGURES) cuda --dtypes float32 --sets 256m resnet50 --sweep \
	  --part "sweep, triton" 150 $(GPU_FIGURES) triton --dtypes float32 --sets 256m resnet50 --sweep

gpu-sanitizer:  ## by itself: builds, then a small case of the CUDA kernels under NVIDIA's checkers
	$(GPU_PARTS) \
	  --part sanitizers $(GPU_LIMIT) $(GPU_PYTEST) -n 4 tests/backends/test_gpu.py::test_compute_sanitizer $(PYTEST_ARGS)

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
	$(WHEELS)/builder/bin/python tests/project/wheel_contents.py $(WHEELS)/*.whl
	set -e; for torch in $(WHEEL_TORCHES); do \
	  $(PYTHON) -m venv $(WHEELS)/with-torch; \
	  $(WHEELS)/with-torch/bin/python -m pip install --quiet torch==$$torch; \
	  $(WHEELS)/with-torch/bin/python -m pip install --quiet $(WHEELS)/*.whl; \
	  env -u PYTHONPATH $(WHEELS)/with-torch/bin/python tests/project/wheel_smoke.py; \
	  rm -rf $(WHEELS)/with-torch; \
	done
	rm -rf $(WHEELS)

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info aim_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(STAMP)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
