# The project's commands. On a new machine each first installs what it needs into .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
PIP = $(BIN)/python -m pip install --disable-pip-version-check
TORCH := torch==2.13.0
# for a torch that comes without Triton: the version that the kernels were tested with
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help run test attack lint format bench doctor tune clean

help:  ## list these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 16

# one process per GPU, or per core: on small matrices, processes of one thread are faster than one process of many threads;
# nproc obeys OMP_NUM_THREADS, which is about threads, so it runs without that variable
PROCESSES = $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c GPU); [ $$n -gt 0 ] || n=$$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc); for p in 8 4 2 1; do [ $$p -le $$n ] && echo $$p && break; done)

run: $(READY)  ## train, quantize and score a small model on the standard library's text (4 minutes)
	@echo "quickstart on $(PROCESSES) processes: about four minutes on two quiet cores; PyTorch loads first"
	OMP_NUM_THREADS=1 $(BIN)/golf run --processes $(PROCESSES) --recipe quickstart --samples end

# one process per core, one thread each: on small tensors more threads only wait for each other
test: $(TESTABLE)  ## run all tests and list the 15 slowest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations=15

MINUTES ?= 5
attack: $(TESTABLE)  ## damage files, kill commands, give odd input for MINUTES=5; count what held and broke
	PYTHONPATH=.:tests:tests/helpers OMP_NUM_THREADS=1 CODE_FORM=plain $(BIN)/python -m attack --minutes $(MINUTES)

lint: $(TESTABLE)  ## check with ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(TESTABLE)  ## format the sources with ruff
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# bench_artifact measures a run, so it is called by hand
BENCHES = $(filter-out bench_artifact,$(basename $(notdir $(wildcard benchmarks/bench_*.py))))

bench: $(READY)  ## run all benchmarks, write tables and plots (without a GPU: tiny shapes, no speed claim)
	@tiny=$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "--tiny")') || exit 1; failed=; \
	for name in $(BENCHES); do \
	  echo "== $$name $$tiny"; OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name $$tiny || failed="$$failed $$name"; \
	done; \
	$(BIN)/python -m benchmarks report || failed="$$failed report"; \
	[ -z "$$failed" ] || { echo "error: failed:$$failed"; exit 1; }

doctor: $(READY)  ## show what was built and which backend each operator takes; self-check
	$(BIN)/python -m golf_kernels

tune: $(READY)  ## check and measure every kernel on this GPU, and remember which to use
	$(BIN)/python -m golf_kernels tune

clean:  ## delete .venv and everything built
	rm -rf $(VENV) build golf_kernels/_C*.so golf_kernels/_build_info.json *.egg-info

# A torch that the base interpreter has is used as it is, because another one may not match the GPU's driver. Its folder
# goes into a .pth file: if that interpreter is itself a virtual environment, .venv would not look there.
$(READY): pyproject.toml setup.py $(wildcard csrc/*) $(wildcard golf_kernels/version.py)
	@echo "setting up $(VENV): looking for a torch that $(PYTHON) already has"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: install a newer one and run make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module: apt install python3-venv, then run make again"; exit 2; }
	@set -e; \
	if torch_folder=$$($(PYTHON) -c 'import torch, os, sys; print(os.path.dirname(torch.__path__[0])); sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11))' 2>/dev/null); then \
	  echo "using it; some small packages and the C++ code take a minute or two"; \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv --system-site-packages $(VENV); \
	  echo "$$torch_folder" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_base.pth"; \
	  torch=; \
	else \
	  echo "there is none: $(TORCH), some small packages and the C++ code take several minutes, most of them for the download"; \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
	  torch=$(TORCH); \
	fi; \
	echo "1 of 2: pip installs $$torch setuptools wheel pybind11 ninja"; \
	$(PIP) $$torch "setuptools>=66.1" wheel "pybind11>=2.13" "ninja>=1.11" && \
	echo "2 of 2: pip installs what training needs, and compiles golf_kernels" && \
	$(PIP) --no-build-isolation --editable ".[train]" || { $(NOT_INSTALLED); }; \
	touch $@

# what tests and linters need besides
$(TESTABLE): $(READY)
	@echo "installing what tests and linters need: a minute or two"; \
	triton=; $(BIN)/python -c 'import triton' 2>/dev/null || triton=$(TRITON); \
	$(PIP) --no-build-isolation $$triton --editable ".[train,test]" || { $(NOT_INSTALLED); }; \
	touch $@

NOT_INSTALLED = echo "error: pip could not install what is missing, see above; without a network, $(PYTHON) -m pip install --no-build-isolation --no-deps -e . needs only a torch, setuptools, wheel, pybind11 and ninja that are there"; exit 2
