# Every target creates what it needs in .venv. On a machine with GPUs, pretrain and finetune use them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/quickstart
RANKS ?= 2
STEPS ?= 200
JOBS ?= 2
FINETUNED ?= runs/finetuned
EPOCHS ?= 2
GPU_OUTPUT ?= runs/gpu
EXTRAS := train,finetune,huggingface,evaluate,megatron,docs,dev
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help pretrain finetune quick test lint format docs gpu environment constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

pretrain: environment ## train a small LLaMA with GaLore on two ranks at ZeRO 2, from scratch
	$(BIN)/deepspeed --quiet --num_gpus $(RANKS) launch/pretrain.py --deepspeed_config ds_configs/galore_zero2.json \
		--model ds_configs/models/llama_quickstart.json --sequence-length 128 --steps $(STEPS) --eval-interval 100 \
		--save-interval $(STEPS) --output $(OUTPUT) --export

$(OUTPUT)/export/config.json: | environment
	$(MAKE) pretrain

finetune: environment $(OUTPUT)/export/config.json ## fine-tune that model with GaLore on a task that needs no download
	$(BIN)/deepspeed --quiet --num_gpus $(RANKS) launch/finetune.py --deepspeed_config ds_configs/galore_zero2.json --lr 0.002 \
		--model $(OUTPUT)/export --max-length 128 --epochs $(EPOCHS) --output $(FINETUNED)

quick: lint ## lint, types and the fast tests: run it before every commit
	$(PYTEST) --quick tests/unit tests/contract tests/simulated

test: lint ## lint, types and every test, JOBS=2 at a time
	$(PYTEST)

lint: environment ## ruff, mypy and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: environment ## format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: environment ## the pages and the API reference as a site, every internal link checked, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu: environment ## measure on the GPUs of this machine, into GPU_OUTPUT=runs/gpu
	$(BIN)/python -m benchmarks.gpu --output $(GPU_OUTPUT)

environment: $(VENV)/.ready ## create .venv with the versions of constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --no-deps galore-torch==1.0 apollo-torch==1.0.3
	touch $@

# Resolves in an environment of its own. A CUDA build of torch brings packages that a CPU build does not have.
constraints: ## rewrite constraints.txt with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet --upgrade pip
	build/constraints/bin/python -m pip install --quiet torch==2.13.0 '.[$(EXTRAS)]'
	echo '# Written by `make constraints`: the versions that the tests run with.' > constraints.txt
	build/constraints/bin/python -m pip freeze --exclude ds-lowrank --exclude setuptools | sed 's/+.*//' \
		| grep -v -E '^(nvidia-|cuda-|triton)' >> constraints.txt

clean: ## remove .venv and all caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
