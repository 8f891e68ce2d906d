# make finetune   set up, then fine-tune glattn_atto on real handwritten digits, from its weights and from scratch
# make test       set up, then pass the tests
# make check      what CI runs: format, lint, types, tests

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: setup finetune test check lint tables

# stamped with the project file, so that a changed dependency installs again
$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(RUN)/python -m pip install --quiet --group dev --editable ".[all]"
	touch $@

setup: $(VENV)/.stamp

finetune: setup
	$(RUN)/glattn train --config configs/digits.yaml run=runs/digits resume=auto
	$(RUN)/glattn train --config configs/digits.yaml run=runs/digits-scratch resume=auto pretrained=false
	$(RUN)/python scripts/compare_runs.py runs/digits runs/digits-scratch

# two processes of one thread each
test: setup
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist worksteal

lint: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

check: lint test

# the generated parts of README.md and docs/
tables: setup
	$(RUN)/python scripts/make_tables.py
	$(RUN)/python scripts/draw_block.py
