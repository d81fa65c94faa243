# Two commands for everybody: `make demo` and `make test`. Both set up .venv first, where that is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup browser demo test lint gpu-test clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      render a video with the embedded sample model, dense and accelerated, on a CPU"
	@echo "make test      run the tests"
	@echo "make browser   install the Chromium that reports are tested in (apt, as root); make test does it too"
	@echo "make lint      ruff and mypy"
	@echo "make gpu-test  run the tests that need a CUDA GPU"

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,triton]'
	# Apart, for one test: where diffusers finds torchao it imports it, and both write to stderr.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/apart torchao
	@touch $@

setup: .venv/.ready

demo: setup
	$(BIN)/vidaccel demo --output out/demo

# Reports are tested in a real Chromium, which apt brings where it may (CI runs as root); there, one that is missing fails.
# Other users without one are told, and go on without these tests. VIDACCEL_BROWSER=none leaves them out anywhere.
browser:
	@[ "$$VIDACCEL_BROWSER" = none ] || [ -n "$$(command -v chromium || command -v google-chrome)" ] || \
	[ "$$(id -u)" != 0 ] || [ -z "$$(command -v apt-get)" ] || { \
		echo "installing chromium with apt: reports are tested in it"; \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; \
	} || true

# One process a core, each with one thread: most tests are too small for more.
test: setup browser
	@if [ "$$(id -u)" != 0 ] && [ -z "$$VIDACCEL_BROWSER$$(command -v chromium || command -v google-chrome)" ]; then \
		echo "no chromium, and no root to install one: the tests of reports in a browser are left out"; \
		export VIDACCEL_BROWSER=none; \
	fi; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Uses the Python at hand rather than .venv: GPU machines bring their own torch and triton.
gpu-test:
	$(PYTHON) -m pytest -m gpu

clean:
	rm -rf .venv build dist *.egg-info out
