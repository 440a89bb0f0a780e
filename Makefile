# Two commands set everything up on a fresh clone: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHOLE_RUNS := tests/sim tests/strategies/contract
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test test-all lint types docs bench lock clean

help:
	@echo "make demo      install, then compare local, one-way and mutual learning on digits"
	@echo "make test      install, then run the tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff and the floors (import-linter)"
	@echo "make types     mypy --strict"
	@echo "make docs      the documentation as a site, site/index.html; fails on a dead link or an undocumented name"
	@echo "make bench     run all benchmarks (about an hour) and print their table"
	@echo "make lock      pin in constraints.txt what is installed, after versions were moved"
	@echo "make clean     remove the virtual environment and caches"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Our losses are compared with its. It asks for torchvision, which its losses do not need and
	# which has no build beside a torch without CUDA.
	$(BIN)/pip install --quiet --no-deps torchdistill==1.1.5
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/fedkd compare conf/quickstart.yaml

# Whole runs are judged by their digests, bytes and events. There only the algorithms' own shapes are
# checked at each call: those of everything below take three times as long, and the tests of the parts
# and `make test-all` check them.
test: $(VENV)/.installed
	$(BIN)/pytest -q -n 3 --dist loadgroup -m "not slow" $(WHOLE_RUNS:%=--ignore=%)
	$(BIN)/pytest -q -n 3 --dist loadgroup -m "not slow" $(WHOLE_RUNS) \
	  --jaxtyping-packages=strategies,beartype.beartype

test-all: $(VENV)/.installed
	$(BIN)/pytest -q -n 2 --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

# Not --quiet: what is not shown is not counted, and nothing would fail. Material's note that MkDocs is
# not developed further is no news at every build.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# pfl pins other versions than we do; it is measured from an environment of its own.
.venv-pfl/.installed:
	$(PYTHON) -m venv .venv-pfl
	.venv-pfl/bin/pip install --quiet pfl==0.6.0 torch==2.13.0
	@touch $@

bench: $(VENV)/.installed .venv-pfl/.installed
	$(BIN)/python benchmarks/table.py

# torchdistill is installed without what it asks for; a build's mark (+cpu) is no version of a package.
lock: $(VENV)/.installed
	head -n 1 constraints.txt > constraints.new
	$(BIN)/pip freeze --exclude-editable --exclude torchdistill | sed 's/+cpu$$//' >> constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
