"""Imported once by the fork server: every rank of every test starts from here instead of importing for five seconds."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import deepspeed.ops
import scipy.stats
import sklearn.metrics
import torch
import transformers

import ds_lowrank
import ds_lowrank.finetuning.setup
import ds_lowrank.models.llama_parallel

# DeepSpeed's shared-memory all-reduce compiles for half a minute and leaves files in /dev/shm.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
_ = transformers.LlamaForSequenceClassification, transformers.RobertaForSequenceClassification
_ = ds_lowrank.GaLore, ds_lowrank.finetuning.setup, ds_lowrank.models.llama_parallel, scipy.stats, sklearn.metrics
