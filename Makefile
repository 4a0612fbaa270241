# Every target makes the environment first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ONCE ?=

.PHONY: install demo serve test test-library test-service lint bench drills soak

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/specdecode demo $(if $(ONCE),--once)

serve: $(STAMP)
	$(BIN)/specdecode serve --config configs/tiny/serve.yaml

# Two halves at a time, as most of a test is on one core or waits. Each in a process of its own (-n 1), so that how one with Ray and
# torch in it ends is no part of the verdict.
test: $(STAMP)
	$(MAKE) --jobs=2 --keep-going test-library test-service

test-library: $(STAMP)
	$(BIN)/pytest -n 1 $(filter-out tests/serve tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))

test-service: $(STAMP)
	$(BIN)/pytest -n 1 tests/serve $(wildcard tests/test_*.py)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/specdecode benchmark --config configs/tiny/benchmark.yaml

drills: $(STAMP)
	$(BIN)/python -m jobs.drills --config configs/tiny/drills.yaml

soak: $(STAMP)
	$(BIN)/python -m jobs.soak --config configs/tiny/soak.yaml
