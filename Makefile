# Everything a developer runs. Each target sets up .venv by itself; only Python >= 3.11 and make are needed.
#   make demo    search real images with real pretrained weights, end to end, in a few minutes
#   make test    lint, types and all tests
#   make test-slow  the tests that 'make test' leaves out: whole benchmarks, long kills and restarts
#   make lint    ruff and mypy only
#   make bench   a search against a scikit-learn script, on your data (bench/RESULTS.md)
# PYTHON=python3.12 chooses the interpreter, VENV=DIR another environment.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tlauto-installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
DEMO_DATA ?= demo-data
DEMO_OUT ?= tlauto-runs

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench constraints clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

# The stamp is as new as the last install: a change of versions or of a plugin's metadata installs again.
$(STAMP): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	@test -n "$(PYTHON)" || { echo "error: tlauto needs Python 3.11 or newer; name one with 'make PYTHON=/path/to/python'" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev,fast]' $(addprefix -e ./,$(PLUGINS))
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file's tests share fixtures and stay in one process; one arithmetic thread each, since the cores are taken.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m slow $(ARGS)

# A study that exists goes on: the second 'make demo' only shows what the first one found. '--split test' of
# data without a test part measures on the images that the model was not fitted on.
demo: setup
	test -d $(DEMO_DATA) || $(BIN)/tlauto demo-data $(DEMO_DATA) --per-class 40
	$(BIN)/tlauto search --data $(DEMO_DATA) --out $(DEMO_OUT) --study demo --backbones 'efficientnet-lite:*' \
		--offline --preset fast --trials 12 --time 5m --seed 0
	$(BIN)/tlauto evaluate $(DEMO_OUT)/demo/model --data $(DEMO_DATA) --split test
	$(BIN)/tlauto predict $(DEMO_OUT)/demo/model $$(find $(DEMO_DATA) -name '*.png' | sort | awk 'NR % 67 == 0')

# On the datasets and weights in the folders TLAUTO_BENCH_DATA and TLAUTO_WEIGHTS; ARGS='--preset fast' goes to the search.
bench: setup
	$(BIN)/python bench/search_vs_probe.py $(ARGS)

# Rewrite constraints.txt from what is installed in $(VENV) now.
constraints: setup
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(DEMO_DATA) $(DEMO_OUT) build dist
