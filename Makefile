# One-line verbs. Each that needs the virtual environment makes it first, and
# that is quick when nothing has changed. PYTHON=/path/to/python chooses another.
.DEFAULT_GOAL := help
.PHONY: help setup protos lint type test test-fast test-rootless escape chaos check demo bench neighbours clean
export PYTHON

# Its scripts hold absolute paths, this one does not: the tree may lie anywhere.
VENV := .venv/bin
ARGS ?=

help:       ## Say what each verb does
	@awk -F ':|## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$3 }' Makefile

setup:      ## Make .venv with everything in it; install Debian packages when root and missing
	@scripts/setup

protos: setup ## Make the gRPC stubs again
	@$(VENV)/python hatch_build.py

lint: setup ## Check style, format, and who imports whom
	@scripts/lint

type: setup ## Check types, strictly
	@$(VENV)/python -m mypy

test: setup ## Run every test; ARGS="-k name" chooses
	@$(VENV)/python -m pytest $(ARGS)

test-fast: setup ## Run the tests that take moments
	@$(VENV)/python -m pytest -m "not slow" $(ARGS)

escape: setup ## Attack every wall from inside, also with it taken away; print what each answered
	@$(VENV)/python -m pytest tests/escape --escape-table -q $(ARGS)

chaos: setup ## Break everything at random, then judge the log; ARGS="--chaos-seconds 60 --chaos-seed 7"
	@$(VENV)/python -m pytest tests/chaos -m chaos -q $(ARGS)

test-rootless: setup ## Run the tests as an ordinary user, whom root makes for the while; ARGS="--bare" with no grants
	@scripts/test-rootless $(ARGS)

check: lint type test ## Do all of the above

demo: setup ## Run the main job on real workers
	@$(VENV)/python examples/main_job.py $(ARGS)

bench: setup ## Measure, beside bubblewrap where it is installed
	@$(VENV)/python bench $(ARGS)

neighbours: setup ## Measure what a worker that wears the machine down costs others (stress-ng)
	@$(VENV)/python bench --only neighbours

clean:      ## Remove what all of this made
	@scripts/clean
