# Every target sets up what it needs: a virtual environment with locked, hashed dependencies.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/quix/.ready

.PHONY: help up demo test test-faults check format bench lock clean
help:            ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

up: $(READY)     ## start everything on this machine: Kafka, PostgreSQL, API, workers, Stripe simulator
	$(VENV)/bin/tidemeter up

demo: $(READY)   ## push 20,000 events through everything, kill a worker, and prove the sums
	$(VENV)/bin/tidemeter demo --events 20000 --seed 7 --once

test: $(READY) $(BENCH_READY)   ## all tests but the long fault tests
	$(VENV)/bin/pytest -m "not faults"

test-faults: $(READY)   ## the long fault tests: hundreds of real SIGKILLs and more; SEED=n repeats a run
	FAULT_SEED=$(SEED) $(VENV)/bin/pytest -m faults

check: $(READY)  ## lint, format, types, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(READY) ## rewrite the sources in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(READY) $(BENCH_READY)   ## measure against Faust tables and Quix Streams, in one run
	$(VENV)/bin/tidemeter bench

lock: $(READY)   ## resolve the dependencies again (needs uv)
	uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --python-version 3.11 pyproject.toml --extra embedded --extra dev --upgrade \
	  -o deploy/requirements.lock
	uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --python-version 3.11 pyproject.toml -c deploy/requirements.lock \
	  -o deploy/runtime.lock
	uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --python-version 3.11 bench/rivals/quix.in --upgrade -o bench/rivals/quix.lock

clean:           ## remove the virtual environments and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(READY): deploy/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tidemeter needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes -r deploy/requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Quix Streams pins an older confluent-kafka, so the rival lives in an environment of its own.
$(BENCH_READY): bench/rivals/quix.lock $(READY)
	$(PYTHON) -m venv $(VENV)/quix
	$(VENV)/quix/bin/python -m pip install --quiet --require-hashes -r bench/rivals/quix.lock
	@touch $@
