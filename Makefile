# make demo: train, save, reload, generate and draw, in a few minutes.   make test: the test suite.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow check format bench clean

# Installed anew whenever the dependencies change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m scripts.demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Moderate sizes; docs/benchmarks.md has the commands for full ones.
SMALL = --parameters 2500000 --layers 4
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.memory_bank --time 256 1024 4096 16384 --json outputs/bench/memory_bank.json
	$(BIN)/python -m benchmarks.training $(SMALL) --time 512 4096 --tokens_per_step 4096 \
		--json outputs/bench/training.json
	$(BIN)/python -m benchmarks.prefill $(SMALL) --time 512 2048 8192 --json outputs/bench/prefill.json
	$(BIN)/python -m benchmarks.decode $(SMALL) --contexts 1024 32768 --models "plain core" stack llama mamba2 \
		--no-compile --json outputs/bench/decode.json
	$(BIN)/python -m benchmarks.decode $(SMALL) --contexts 1024 --batch_size 1 --models "plain core" llama \
		--json outputs/bench/decode_compiled.json
	$(BIN)/python -m benchmarks.halting $(SMALL) --time 1024 --json outputs/bench/halting.json
	$(BIN)/python -m benchmarks.profile_model $(SMALL) --json outputs/bench/profile.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
