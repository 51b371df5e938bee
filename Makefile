# make setup, or any other target: they set up what is out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: help setup demo test lint types bench docs clean

help:
	@echo "make demo   train mac on its grid-world, with a progress bar, a table and a figure"
	@echo "make test   the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make bench  throughput beside RLlib, stable-baselines3 and a plain torch loop; mean fields beside MFGLib and OpenSpiel;"
	@echo "            offline steps beside d3rlpy, trading beside NumPy, congestion games beside their double loop, scaling over env runners,"
	@echo "            the service beside a bare Serve deployment"
	@echo "make docs   the site, into site/"
	@echo "make setup  the environment in $(VENV), from constraints.txt (the others call it when needed)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mobula needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/mobula train mac --env goal_grid --stop env_steps=20000 --seed 1

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/algorithms tests/dashboards tests/envs
	$(BIN)/python -m pytest tests/cluster tests/platform tests/serving

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

types: $(STAMP)
	$(BIN)/mypy -p mobula

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/peers 'mfglib==0.3.0' 'osqp<1' 'optuna<4' qdldl
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/peers-openspiel 'open_spiel>=2,<3' absl-py ml_collections
	PYTHONPATH=build/peers:build/peers-openspiel $(BIN)/python -m benchmarks.meanfield
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/peers-offline d3rlpy structlog colorama dataclasses-json \
		marshmallow typing-inspect mypy-extensions gym gym-notices
	PYTHONPATH=build/peers-offline $(BIN)/python -m benchmarks.offline
	$(BIN)/python -m benchmarks.finance
	$(BIN)/python -m benchmarks.congestion
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.serve

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf site build dist .mypy_cache .pytest_cache .ruff_cache
