"""Fine-tune a Hugging Face checkpoint under DeepSpeed with the optimizer that its configuration names.

deepspeed launch/finetune.py --deepspeed_config ds_configs/galore_zero2.json --lr 1e-3 \
    --model runs/quickstart/export --output runs/finetune
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch's import: a lost rank is reported in one line

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is first imported

from ds_lowrank.finetuning.arguments import parse
from ds_lowrank.finetuning.setup import set_up
from ds_lowrank.training.script import run_script

if __name__ == "__main__":
    run_script(parse(), set_up)
