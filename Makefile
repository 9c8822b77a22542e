# make test       lint, types and every test, JOBS=2 at a time
# make pretrain   a small LLaMA with GaLore on two ranks at ZeRO 2, from nothing
# make finetune   that model with GaLore on a task that needs no download
# Each creates what it needs in .venv; on a machine with GPUs they use them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/quickstart
RANKS ?= 2
STEPS ?= 200
JOBS ?= 2
FINETUNED ?= runs/finetuned
EPOCHS ?= 2

.PHONY: test lint pretrain finetune environment clean

environment: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,finetune,megatron,dev]'
	$(BIN)/python -m pip install --quiet --no-deps galore-torch==1.0
	touch $@

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

pretrain: environment
	$(BIN)/deepspeed --num_gpus $(RANKS) launch/pretrain.py --deepspeed_config ds_configs/galore_zero2.json \
		--model ds_configs/models/llama_quickstart.json --sequence-length 128 --steps $(STEPS) --eval-interval 100 \
		--save-interval $(STEPS) --output $(OUTPUT) --export

$(OUTPUT)/export/config.json: | environment
	$(MAKE) pretrain

finetune: environment $(OUTPUT)/export/config.json
	$(BIN)/deepspeed --num_gpus $(RANKS) launch/finetune.py --deepspeed_config ds_configs/galore_zero2.json --lr 0.002 \
		--model $(OUTPUT)/export --max-length 128 --epochs $(EPOCHS) --output $(FINETUNED)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
