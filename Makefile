# Every target first calls `setup`, so that any one of them is enough on a fresh machine.
#
#   make demo        a prefill and a decode engine serve the shipped small model; runs/demo/demo.png
#   make test        lint, types, and the tests on 8 simulated CPU devices
#   make test-full   the same with the slow tests; writes benchmarks/results/test-full.json
#   make aot         compile the GPU kernels for an H100 without one; fails if they spill more
#   make lint        ruff, ruff format --check, type checker
#   make format      let ruff fix and format
#   make hooks       run lint before each git commit
#   make lock        pin the newest allowed versions again (needs uv)
#   make clean       remove .venv and caches

SHELL := /bin/sh
BIN := .venv/bin
# Test processes; 0 runs in this one, which is the only way on a GPU.
WORKERS ?= $(if $(filter gpu,$(DSKJAX_TEST_PLATFORM)),0,2)
# More arguments for pytest: make test ARGS="-k router"
ARGS ?=
export LOCK PYTHON

.PHONY: help setup demo test test-full aot lint format hooks lock clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@scripts/setup.sh

demo: setup
	@$(BIN)/python -m dskjax demo

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/basedpyright

# The total is printed by tests/conftest.py, so that pytest's closing line stays the last one.
test: export DSKJAX_TEST_STARTED := $(shell date +%s)
# Half the compile time at LLVM's lowest level; test-full compiles as users do.
test: export XLA_FLAGS := $(if $(filter gpu,$(DSKJAX_TEST_PLATFORM)),,--xla_backend_optimization_level=0) $(XLA_FLAGS)
test: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-full: export DSKJAX_TEST_STARTED := $(shell date +%s)
test-full: lint
	@$(BIN)/python scripts/test_full.py -n $(WORKERS) --dist worksteal $(ARGS)

# An environment of its own, build/aot/venv or AOT_VENV; make aot ARGS=--record records anew.
aot: setup
	@scripts/aot.sh $(ARGS)

format: setup
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

hooks: setup
	@$(BIN)/pre-commit install

# Extras per file: lock.txt = dev + serve + train on a CPU, lock-gpu.txt = the same + gpu. Without
# --upgrade only what pyproject.toml and requirements/constraints.txt force to move moves: make lock UPGRADE=--upgrade
COMPILE = uv pip compile pyproject.toml --no-config --quiet --universal --python-version 3.12 \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	--constraint requirements/constraints.txt $(UPGRADE) --extra dev --extra serve --extra train
lock:
	@command -v uv >/dev/null || { echo "make lock needs uv: https://docs.astral.sh/uv"; exit 1; }
	$(COMPILE) --output-file requirements/lock.txt
	$(COMPILE) --extra gpu --output-file requirements/lock-gpu.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
