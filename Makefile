# The commands of the project. Each makes its own .venv first; see tools/environment.py.
#   make train                          trains a small language model on this machine, in 5 minutes
#   make train ARGS="run.minutes=30"    with other values
#   make test, make lint, make bench
# TORCH_INDEX_URL=... chooses another build of PyTorch (see README.md).

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif
ifeq ($(PYTHON),)
PYTHON := python3
endif
# Every rank imports PyTorch: where bytecode isn't kept, each compiles 3,000 files first, for 10 seconds.
export PYTHONDONTWRITEBYTECODE =

PINNED = requirements/base.txt pyproject.toml tools/environment.py
MAKE_ENVIRONMENT = $(PYTHON) tools/environment.py

.PHONY: train test lint bench clean

train: .venv/.base
	.venv/bin/python -m colossus train $(ARGS)

# Tests wait about as often as they compute: three of them keep two cores busy.
test: .venv/.test
	.venv/bin/python -m pytest -n 3 $(ARGS)

lint: .venv/.lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python tools/check_floors.py

bench: .venv/.test
	@for file in $$(grep -l __main__ benchmarks/*.py); do name=$$(basename $$file .py); echo; echo "== $$name"; \
		.venv/bin/python -m benchmarks.$$name --quick $(ARGS) || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/.base: $(PINNED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }
	$(MAKE_ENVIRONMENT) base
	@touch $@

.venv/.test: .venv/.base requirements/test.txt requirements/hf.txt requirements/eval.txt
	$(MAKE_ENVIRONMENT) test hf eval
	@touch $@

.venv/.lint: .venv/.base requirements/lint.txt
	$(MAKE_ENVIRONMENT) lint
	@touch $@
