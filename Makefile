# Plain Python (3.11 or newer), pip and make are enough. `make eval` and `make test` set up what they
# need in .venv; `make PYTHON=python3.12 test` chooses another Python.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

TORCH := torch==2.13.0
LOCK := --quiet --universal --python-version 3.11 --no-header --no-emit-index-url \
  --no-emit-find-links --upgrade

.PHONY: help eval test slow browser bench bench-gpu precision sanitize fuzz tpu docs lint types check lock clean

help:
	@echo "make eval    set up and score the quickstart checkpoint on its held-out questions"
	@echo "make test    set up and run the tests"
	@echo "make slow    the longest tests: dozens of kills, a fault at every request, Ray; 10 minutes"
	@echo "make browser  set up playwright and try the page of results in this machine's Chromium"
	@echo "make bench   set up other engines and measure flaxqa beside them; 20 minutes on 2 cores"
	@echo "make bench-gpu  the same on this machine's accelerator, beside torch; 8 minutes on an H100"
	@echo "make precision  what bfloat16 and float8 cost in EM and F1; 8 minutes on 2 cores"
	@echo "make sanitize  the compiled encoder under sanitizers of memory and threads; 5 minutes"
	@echo "make fuzz    mutated files of every kind; one minute, or SECONDS=600"
	@echo "make tpu     set up TPU's compiler and compile flaxqa for chips that are not here; 5 minutes"
	@echo "make docs    set up and build the documentation in site/; a broken link fails"
	@echo "make check   set up, lint and check types"
	@echo "make lock    resolve the locked versions anew (needs uv)"
	@echo "make clean   remove the environment and caches"

eval: .venv/.run
	$(BIN)/flaxqa eval --config quickstart

test: .venv/.test
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

slow: .venv/.test
	$(BIN)/python -m pytest -m slow

browser: .venv/.browser
	PYTHONPATH=.venv/browser $(BIN)/python -m pytest -m browser

bench: .venv/.bench
	$(BIN)/flaxqa compare --config bench $(SUBJECT)

# MODEL=DIR and DATA=FILE measure another checkpoint and data than the quickstart's. An environment
# that has JAX and torch for its devices already is taken with GPU_PYTHON=python3.
GPU_PYTHON := $(BIN)/python
SUBJECT = $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))
bench-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),.venv/.gpu)
	$(GPU_PYTHON) -m flaxqa compare --config bench-gpu $(SUBJECT)

sanitize: .venv/.test
	$(BIN)/python tests/sanitize.py

fuzz: .venv/.test
	$(BIN)/python tests/fuzz.py --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0)

precision: .venv/.run
	$(BIN)/python -m flaxqa.eval.precision $(SUBJECT) --output runs/precision.json

# Beside the environment, which would look for a TPU with it.
tpu: .venv/.tpu
	PYTHONPATH=.venv/tpu $(BIN)/python -m flaxqa.eval.aot --output runs/tpu.json --limits benchmarks/tpu.json
	PYTHONPATH=.venv/tpu $(BIN)/python -m pytest -m tpu

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

check: lint types

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

NATIVE := $(addprefix flaxqa/native/,build.py encoder.cc encoder.h ffi.cc)

.venv/.run: .venv/bin/python requirements.lock pyproject.toml $(NATIVE)
	$(PIP) --requirement requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.test: .venv/.run requirements-test.lock
	$(PIP) --requirement requirements-test.lock $(TORCH)
	@touch $@

.venv/.bench: .venv/.run requirements-bench.lock
	$(PIP) --requirement requirements-bench.lock $(TORCH)
	@touch $@

.venv/.gpu: .venv/.run
	$(PIP) --constraint requirements.lock "jax[cuda13]" torch
	@touch $@

# In an environment of its own, so that its packages cannot change those of the tests.
.venv/.docs: .venv/bin/python requirements-docs.lock
	$(BIN)/python -m venv .venv/docs
	.venv/docs/bin/python -m pip --disable-pip-version-check install --quiet \
	  --requirement requirements-docs.lock
	@touch $@

# Beside the environment, too: it has a program of 100 MB, and only these tests need it.
.venv/.browser: .venv/.test
	$(PIP) --target .venv/browser playwright==1.65.2
	@touch $@

LIBTPU := import importlib.metadata as m; \
  print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))

.venv/.tpu: .venv/.test
	$(PIP) --no-deps --upgrade --target .venv/tpu "$$($(BIN)/python -c '$(LIBTPU)')"
	@touch $@

lock:
	uv pip compile $(LOCK) --output-file requirements.lock pyproject.toml --group build
	uv pip compile $(LOCK) --constraint requirements.lock --output-file requirements-test.lock \
	  --group test
	uv pip compile $(LOCK) --constraint requirements.lock --output-file requirements-bench.lock \
	  --group bench
	uv pip compile $(LOCK) --output-file requirements-docs.lock --group docs

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist runs site
