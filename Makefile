# `make quickstart` and `make test` are all that a fresh machine needs. Each target makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-slow lint bench clean

quickstart: $(INSTALLED)
	$(BIN)/learned-opt quickstart --resume

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# mup_transfer.py takes hours and two meta-training runs, search_comparison.py two hours
LONG := benchmarks/mup_transfer.py benchmarks/search_comparison.py benchmarks/search_heldout.py
bench: $(INSTALLED)
	for script in $(filter-out $(LONG),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, got {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache runs *.egg-info
