# make demo: train, save, reload, generate and draw, in a few minutes.   make test: the test suite.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow test-matrix test-newest test-transformers check format bench clean

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

# What meets transformers most, with the oldest version that pyproject.toml allows, the pinned one and the newest.
OLDEST = 5.16.0
PINNED = $(shell sed -n 's/^transformers==//p' constraints.txt)
GENERATION_TESTS = $(addprefix tests/test_,versions.py cache.py cache_fit.py generation.py generation_options.py readme.py)
MATRIX_TESTS = $(GENERATION_TESTS) $(addprefix tests/test_,compile.py loading.py saving.py memory_file.py modeling.py \
	packing.py peft.py ecosystem.py training.py)

# A virtual environment for each version. Other packages are the pinned ones, but for those that go with transformers.
$(VENV)-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-$*
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/pip install --quiet --constraint $(VENV)-$*/constraints.txt --editable ".[dev]" \
		$(if $(filter newest,$*),,transformers==$*)
	touch $@

test-matrix: $(VENV)-$(OLDEST)/installed $(VENV)-$(PINNED)/installed $(VENV)-newest/installed
	set -e; for version in $(OLDEST) $(PINNED) newest; do \
		$(VENV)-$$version/bin/python -c "import transformers; print('transformers', transformers.__version__)"; \
		OMP_NUM_THREADS=1 $(VENV)-$$version/bin/python -m pytest -q $(MATRIX_TESTS); done

test-newest: $(VENV)-newest/installed
	$(VENV)-newest/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -q $(GENERATION_TESTS)

# transformers' own tests of causal language models, from a checkout of its repository: TRANSFORMERS=path
test-transformers: $(VENV)/installed
	mkdir -p $(TRANSFORMERS)/tests/models/stackformer
	touch $(TRANSFORMERS)/tests/models/stackformer/__init__.py
	cp tests/transformers_suite.py $(TRANSFORMERS)/tests/models/stackformer/test_modeling_stackformer.py
	$(BIN)/pip install --quiet parameterized
	cd $(TRANSFORMERS) && $(CURDIR)/$(BIN)/python -m pytest -q -W ignore tests/models/stackformer

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
	$(BIN)/python -m benchmarks.delta_bank --time 1024 4096 --json outputs/bench/delta_bank.json
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
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
