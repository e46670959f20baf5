# The few commands that everyone needs. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help setup quickstart test test-all check format clean

help:
	@echo "make quickstart   set up and run the whole job on generated data (about ten minutes with set-up)"
	@echo "make test         set up and run the tests (under fifteen minutes)"
	@echo "make test-all     all tests, the slow ones and the real-model check too (two hours)"
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
	@echo "== running the tests"
	$(BIN)/python -m pytest -m "not slow and not real_model"

test-all: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
