# The one place that says how to do a thing. CI and the README only call these targets.
#
#   make demo       install, then train, prune, export and fine-tune a small network on real data (minutes)
#   make setup      everything that development needs, in .venv
#   make lint       ruff and mypy
#   make test       the fast tests
#   make test-all   every test, the sweeps too
#   make coverage   prune every timm family, with a table in runs/coverage
#   make bench      the benchmarks, each beside its baseline

PYTHON ?= $(firstword $(foreach name,python3.11 python3 python,$(shell command -v $(name) 2>/dev/null)))
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# One stamp for each set of extras; a stamp older than pyproject.toml is out of date.
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

.PHONY: demo setup lint test test-all bench coverage clean

demo: $(DEMO)
	$(BIN)/python recipes/demo.py

setup: $(DEV)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(DEV)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

test-all: $(DEV) $(BENCH)
	$(BIN)/python -m pytest -n $(WORKERS)

bench: $(BENCH)
	$(BIN)/python tools/bench_attach.py
	$(BIN)/python tools/bench_budget.py
	$(BIN)/python tools/bench_families.py
	$(BIN)/python tools/bench_gumbel.py
	$(BIN)/python tools/bench_step.py
	$(BIN)/python tools/bench_speed.py
	$(BIN)/python tools/bench_scale.py

coverage: $(DEV)
	$(BIN)/python tools/coverage.py --timm families --jobs $(WORKERS) --output runs/coverage

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info
