# make demo   train a small model on this machine's own Python source, and let it write
# make test   the whole test suite
# make check  format, lint, types, imports
# make bench  time and memory beside the floor, mamba.py and transformers: half an hour
# make bench-gpu  the same on an NVIDIA GPU, and the errors of its kernels: a quarter of an hour
# make test-gpu   the tests of the GPU's code there, three minutes
# A second make reuses the virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN ?= runs/demo
DATA ?=
BENCH ?=
GPU ?= h100
RIVALS := $(VENV)/rivals

.PHONY: demo test check bench bench-gpu test-gpu format clean

demo: $(VENV)/installed
	$(BIN)/mambapy train --out $(RUN) --minutes 3 --overwrite $(if $(DATA),--data $(DATA))

test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/installed-dev $(RIVALS)
	$(BIN)/mambapy bench scan --mamba-py $(RIVALS) $(BENCH)
	$(BIN)/mambapy bench block --mamba-py $(RIVALS) $(BENCH)
	$(BIN)/mambapy bench heads $(BENCH)
	$(BIN)/mambapy bench experts $(BENCH)
	$(BIN)/mambapy bench vision $(BENCH)
	$(BIN)/mambapy bench train --mamba-py $(RIVALS) $(BENCH)
	$(BIN)/mambapy bench decode --mamba-py $(RIVALS) $(BENCH)
	$(BIN)/mambapy bench plot

# With the Python whose torch has CUDA, not with .venv.
bench-gpu:
	test -d $(RIVALS) || $(PYTHON) -m pip install --quiet --no-deps --target $(RIVALS) mambapy==1.2.0
	for kind in scan block train decode; do $(PYTHON) -m mambapy.cli bench $$kind --device cuda \
		--mamba-py $(RIVALS) --out benchmarks/results/$(GPU) || exit; done
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_errors.py --out benchmarks/results/$(GPU)
	$(PYTHON) -m mambapy.cli bench plot --results benchmarks/results/$(GPU) --out benchmarks/plots/$(GPU)

test-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_tests.py --out benchmarks/results/$(GPU)

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $(VENV)/installed $@

# mamba.py is called mambapy too: it needs a folder of its own.
$(RIVALS): | $(VENV)/bin/python
	$(PIP) --no-deps --target $@ mambapy==1.2.0

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
