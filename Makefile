# make setup   .venv with everything that constraints.txt pins
# make demo    train the digits VLM: on 8 CPU ranks, or on the GPUs that torch sees
# make test    format, lint, types, tests (make check is the same)

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
PYTHON ?= $(shell for p in python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)

export OMP_NUM_THREADS ?= 1
# Processes that run tests; each has a pool of eight ranks.
WORKERS ?= 2

.PHONY: setup demo test check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "colocc needs python 3.12 or newer on PATH" >&2; exit 1; }
	test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

demo: setup
	$(BIN)/python examples/digits.py demo

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q --numprocesses $(WORKERS) --dist worksteal

check: test

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
