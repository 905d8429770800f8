# Everything runs in a venv of its own (.venv, or VENV=DIR). Nothing is asked, nothing outside this folder is changed.
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.gpurestore-installed
BENCH ?= quick
HOST_PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test lint bench build proto wheel clean prerequisites

help:
	@echo 'make demo    dump, kill and restore a live training job, and compare it with an undisturbed run'
	@echo 'make test    the whole test suite'
	@echo 'make lint    ruff, mypy --strict, and the C core with warnings as errors'
	@echo 'make bench   timings of dump and restore beside what the machine can do, BENCH=full for all; CRIU=PROGRAM compares'
	@echo 'make build   rebuild the C core in place'
	@echo 'make proto   regenerate the protobuf modules'
	@echo 'make wheel   a wheel and a source archive in dist/'

prerequisites:
	@python='$(HOST_PYTHON)' sh ./.ci/prerequisites

$(STAMP): pyproject.toml setup.py | prerequisites
	@test -x $(PY) || $(HOST_PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

# The editable install builds the core too; afterwards only what changed is built again.
build: $(STAMP)
	@$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -m compileall -q gpurestore pipeline devplugins

demo: build
	@$(PY) -m gpurestore demo

test: build
	$(PY) -m pytest $(PYTEST_ARGS)

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	MYPYPATH=perf:tests $(PY) -m mypy --follow-imports=silent perf/*.py perf/cases/*.py tests/support/*.py
	GPURESTORE_WERROR=1 $(PY) setup.py --quiet build_ext --force --build-temp build/lint --build-lib build/lint

bench: build
	$(PY) perf/bench.py $(BENCH) $(BENCH_ARGS)

proto: $(STAMP)
	$(PY) gpurestore/images/proto/generate.py

wheel: $(STAMP)
	$(PY) -m build --outdir dist .

clean:
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f gpurestore/_core*.so
