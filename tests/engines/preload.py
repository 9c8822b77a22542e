"""Imported once by the fork server: every rank of every test starts from here instead of importing for five seconds."""

import gc
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the programs of launch/ do

import deepspeed
import deepspeed.module_inject.auto_ep_layer  # by every engine, as it is built, like the next but one
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.utils.nvtx
import scipy.stats
import sklearn.metrics
import torch
import transformers

import ds_lowrank
import ds_lowrank.finetuning.setup
import ds_lowrank.models.llama_parallel
from tests.engines.scenario import make_model, tokens

# DeepSpeed's shared-memory all-reduce compiles for half a minute and leaves files in /dev/shm.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Ranges for a profiler, opened and closed for a tenth of the time of a step of stage 3.
deepspeed.utils.nvtx.enable_nvtx = False
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
_ = transformers.LlamaForSequenceClassification, transformers.RobertaForSequenceClassification
_ = ds_lowrank.GaLore, ds_lowrank.finetuning.setup, ds_lowrank.models.llama_parallel, scipy.stats, sklearn.metrics

# transformers compiles its patterns and looks up its attention at the first model.
with torch.no_grad():
    make_model()(input_ids=tokens(0))

# As in the tests' own process: hundreds a rank, about what DeepSpeed calls.
warnings.simplefilter("ignore", FutureWarning)
# A collection in a rank would look at, and so copy, the page of every object imported here; stage 3 asks for some.
gc.collect()
gc.freeze()
