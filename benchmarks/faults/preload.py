"""What the fork server of :mod:`benchmarks.faults.programs` imports once for all ranks."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the programs do

import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import scipy.stats
import sklearn.metrics
import torch
import transformers

import ds_lowrank.finetuning.setup
import ds_lowrank.finetuning.tasks
import ds_lowrank.models.llama_parallel
import ds_lowrank.training.script

# As in tests/engines/preload.py: in a test process, its ranks may be forked from this server.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
_ = deepspeed.ops, scipy.stats, sklearn.metrics, transformers.LlamaForCausalLM, ds_lowrank
