# make demo and make test do everything, set-up included. See README.md.
PYTHON ?= python3
MINUTES ?= 9
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo check test test-slow test-gpu mutants lint bench bench-check gpu-report readme docs clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## The main job on the built-in model and data; writes demo-out/
	@rm -rf demo-out
	$(BIN)/secateur demo --out demo-out

check: lint  ## Before a commit: ruff, mypy and the fast tests, in under 3 minutes on two free cores
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m 'not (slow or long or cli or kernels or learned or corpus)'

test: $(READY)  ## The test suite, as CI runs it: a process on each core, a file of tests at a time
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(READY)  ## The tests that take minutes, those on a local cluster of Ray among them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m slow

mutants: $(READY)  ## A sample of changes to the engine, each of which a test must notice; writes tests/mutants/result.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,mutants]'
	$(BIN)/python tests/mutants/run.py

# On a GPU host these two take the Python that is there, with its torch and Triton, and install nothing.
test-gpu:  ## The tests that need a CUDA device, all of them in tests/kernels, with PYTHON's own packages
	PYTHONPATH=engine:kernels $(PYTHON) -m pytest -m gpu tests/kernels

gpu-report:  ## Ceilings, kernels, whole models and tests on a GPU, in MINUTES (9); writes bench/results/ row by row
	PYTHONPATH=engine:kernels $(PYTHON) -m bench.measurements.gpu_report --minutes $(MINUTES)

lint: $(READY)  ## ruff, and mypy --strict on the packages, tests, bench and examples; the hooks' configuration is valid
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

bench: $(READY)  ## Timings and comparisons on this machine, hours of them; writes bench/results/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m bench.run

bench-check: $(READY)  ## A small part of each result file again, in minutes; fails where a ratio or an accuracy differs
	$(BIN)/python -m bench.check

readme: $(READY)  ## The tables and figures of README.md and docs/ from bench/results/
	$(BIN)/python -m bench.report

docs: $(READY)  ## The documentation as a site, in site/; fails on a broken link
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## Removes what make made
	rm -rf $(VENV) demo-out site .pytest_cache .mypy_cache .ruff_cache
