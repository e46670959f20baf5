# The few commands that everyone needs. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Each process takes whole test modules, so what a module starts (a Ray, an engine) starts once; the
# longest, in tests/e2e, come first.
JOBS := 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Every process imports torch, most vLLM. With compiled modules that takes a third of the time, so a
# setting that forbids to keep them does not reach what runs here.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test test-slow test-all check format clean

help:
	@echo "make quickstart   set up and run the whole job on generated data (about ten minutes with set-up)"
	@echo "make test         set up and run the tests (about a quarter of an hour)"
	@echo "make test-slow    the slow tests and the real-model check (about forty minutes)"
	@echo "make test-all     all tests, also those marked long (two hours)"
	@echo "make check        lint, format check, types"
	@echo "make setup        only set up: virtual environment and packages in $(VENV)"

# uv resolves in seconds what takes pip minutes; it comes from the same registry. It does not read
# pip's find-links setting by itself.
$(READY): pyproject.toml deploy/cpu-overrides.txt
	@echo "== setting up: virtual environment and packages in $(VENV) (about 4 GB, once)"
	@test -x $(BIN)/python || $(PYTHON) -c "import sys; (3, 11) <= sys.version_info < (3, 13) or \
		sys.exit('Python 3.11 or 3.12 is needed, $(PYTHON) is another: make PYTHON=python3.12 ...')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet "uv>=0.9,<1"
	@UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --python $(BIN)/python \
		--override deploy/cpu-overrides.txt -e ".[cpu,dev]"
	@touch $(READY)
	@echo "== ready"

setup: $(READY)

quickstart: $(READY)
	@echo "== running the whole job: generated instructions, a tiny model, a local Ray"
	@$(BIN)/instructmix quickstart

test: $(READY)
	@echo "== running the tests, in $(JOBS) processes"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not long and not real_model"

test-slow: $(READY)
	@echo "== slow tests and the real-model check, in $(JOBS) processes"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=60 -m "(slow or real_model) and not long"

test-all: test test-slow
	$(BIN)/python -m pytest -m long

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
