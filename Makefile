# make demo   the main job at its smallest: a report of how BF16, FP8 and FP4 diverge
# make test   lint and tests
# make tables rebuild the README's tables and picture from results/
# make setup  only the environment
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint tables
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m experiments.run --config=configs/demo.py --workdir=runs/demo

tables: setup
	$(BIN)/python -m experiments.tables

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest
