# Two commands do it all on a fresh machine: `make train`, `make test`. `make check` is what CI runs.
PYTHON ?= python3
BIN := .venv/bin

# Modules are compiled once, not in each of the processes that tests start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: install train test test-slow lint types check house bench bench-gpu docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: install
	$(BIN)/torchrelay train digits

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

# How the code is laid out, in figures: before and now.
house: install
	$(BIN)/python -m tools.house

bench: install
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,peers]'
	$(BIN)/python -m benchmarks --out docs/evidence/benchmarks.md

# On a machine with a GPU, whose own Python serves where there is no .venv. The times to an accuracy take files of yours:
# make bench-gpu RECORDS="--root FOLDER --airbench FILE --speedrun FILE --reference"
GPU_PYTHON = $(firstword $(wildcard $(BIN)/python) $(PYTHON))

bench-gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -m gpu; tests=$$?; \
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.speed.gpu $(RECORDS) --out docs/evidence/gpu.md && exit $$tests

# The site, into build/docs; first the pages and pictures that are made from the code.
docs: install
	$(BIN)/python -m tools.augmentations --out docs/pictures/augmentations.png
	$(BIN)/python -m tools.schedules --out docs/pictures/schedules.png
	$(BIN)/python -m tools.reference
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs build/docs

clean:
	rm -rf .venv build docs/reference/api docs/root .pytest_cache .mypy_cache .ruff_cache
