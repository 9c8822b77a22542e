"""The reading of a DeepSpeed configuration: keys, types and values as DeepSpeed reads them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import ds_lowrank
from ds_lowrank import ConfigError
from ds_lowrank.integration.ds_config.optimizer_block import optimizer_names
from ds_lowrank.integration.ds_config.read import read_file, without_comments
from ds_lowrank.integration.ds_config.schema import Block, Settings
from ds_lowrank.integration.ds_config.structure import REMOVED, _fields, _split
from ds_lowrank.integration.ds_config.validate import validate, validate_program
from ds_lowrank.integration.ds_config.values import autotp_size, precision, zero_stage

BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
GALORE = {"optimizer": {"type": "GaLore", "params": {"lr": 0.01}}}


class Recorder(dict):
    """A configuration that remembers which keys it was asked for."""

    def __init__(self, *values, asked):
        super().__init__(*values)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self


def asked_by_deepspeed(block=None):
    """The keys that DeepSpeed looks for at the top level, or in a block that it has no class for."""
    asked, config = set(), dict(BATCH)
    if block is None:
        config = Recorder(config, asked=asked)
    else:
        inner = Recorder({"writer": Recorder(asked=set())} if block == "checkpoint" else {}, asked=asked)
        config[block] = inner
    DeepSpeedConfig(config)
    return asked


# Read elsewhere: beside "zero_optimization": true; in deepspeed.initialize; and by HF's code, as no mpu exists there.
ELSEWHERE = {"allgather_size", "data_parallel_size", "sequence_parallel_size"}


def test_the_keys_of_the_top_level_are_those_that_deepspeed_asks_for():
    removed = {key for key in REMOVED if "." not in key}
    assert set(_fields(Settings)) - ELSEWHERE == asked_by_deepspeed() - removed - ELSEWHERE


COMPARED_OTHERWISE = ("pipeline", "optimizer", "scheduler", "torch_autocast", "expert_parallel")
OWN = [
    key
    for key, annotation in _fields(Settings).items()
    for block in _split(annotation)[0]
    if issubclass(block, Block) and key not in COMPARED_OTHERWISE
]


@pytest.mark.parametrize("key", OWN)
def test_the_keys_of_a_block_without_a_class_are_those_that_deepspeed_asks_for(key):
    ((block, *_), _) = _split(_fields(Settings)[key])
    assert set(_fields(block)) == asked_by_deepspeed(key)


def test_the_keys_of_a_pipeline_are_deepspeeds_defaults():
    ((block, *_), _) = _split(_fields(Settings)["pipeline"])
    defaults = DeepSpeedConfig(dict(BATCH)).pipeline
    # The pipeline's engine, not the configuration, has a default for the last one.
    assert {name: info.default for name, info in block.model_fields.items()} == defaults | {"use_reentrant": True}


@pytest.mark.parametrize(
    ("config", "stage", "kind", "autotp"),
    [
        ({}, 0, "fp32", 1),
        ({"zero_optimization": True}, 1, "fp32", 1),
        ({"zero_optimization": False}, 0, "fp32", 1),
        ({"zero_optimization": {"stage": 3}}, 3, "fp32", 1),
        ({"zero_optimization": {"stage": "auto"}}, 0, "fp32", 1),
        ({"bf16": {"enabled": True}}, 0, "bf16", 1),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, 0, "fp32", 1),
        ({"fp16": {"enabled": True}}, 0, "fp16", 1),
        ({"bfloat16": {"enabled": True}}, 0, "bf16", 1),
        ({"tensor_parallel": {"autotp_size": 0}}, 0, "fp32", 1),
        ({"tensor_parallel": {"autotp_size": 2}}, 0, "fp32", 2),
    ],
)
def test_stage_precision_and_tensor_parallelism_are_read_as_deepspeed_reads_them(config, stage, kind, autotp):
    theirs = DeepSpeedConfig(BATCH | config)
    low = {"bf16": theirs.bfloat16_config.enabled, "fp16": theirs.float16_config.enabled}
    assert (zero_stage(config), precision(config), autotp_size(config)) == (stage, kind, autotp)
    assert theirs.zero_optimization_stage == stage
    assert low == {name: name == kind for name in low}
    assert max(1, theirs.tensor_parallel_config.autotp_size) == autotp


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise: unknown",
        ),
        ({"qqqqq": 1}, "qqqqq: unknown key. Valid: activation_checkpointing, "),
        ({"zero_optimization": 2}, "zero_optimization must be an object in braces, not a number"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: Input should be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: Input should be a number, got True"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping: .*, got '1.0': this is a string, write 1.0 without quotes"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping must be a finite number, not nan"),
        ({"tensor_parallel": {"dtype": "bf16"}}, "tensor_parallel.dtype: cannot be set in JSON, remove it"),
        ({"zero_optimization": {"allgather_bucket_size": 0}}, "zero_optimization.allgather_bucket_size must be at"),
        ({"nebula": {}}, "nebula: Nebula checkpointing has been removed."),
        ({"gradient_clipping": "auto"}, "gradient_clipping is 'auto': only the Hugging Face Trainer fills it in"),
        ({"scheduler": {"type": "WarmupRL", "params": {}}}, "scheduler.type: 'WarmupRL' .*did you mean 'WarmupLR'"),
        (
            {"scheduler": {"type": "ExponentialLR", "params": {"gamma": -1}}},
            r"scheduler.params \(ExponentialLR\): they make the learning rate -0.001",
        ),
        ({"comet": {"enabled": True}}, "comet.enabled needs the package comet_ml: pip install comet_ml"),
        ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype is 'fp16', but the model trains in fp32"),
        (
            {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
            "prescale_gradients needs zero_optimization.reduce_scatter false at ZeRO 2",
        ),
        ({"bf16": 1, "fp16": 2}, "ds.json has 2 errors:\n  bf16 must .*\n  fp16 must "),
    ],
)
def test_an_error_names_file_key_and_what_is_right(config, message):
    with pytest.raises(ConfigError, match=f"(?s)^(ds.json: )?{message}"):
        validate(GALORE | config, "ds.json")


def test_many_or_long_errors_do_not_fill_the_screen():
    with pytest.raises(ConfigError, match=r"(?s)^ds.json has 100 errors:\n  key0: unknown.*\n  and 80 more$") as many:
        validate(GALORE | {f"key{number}": 1 for number in range(100)}, "ds.json")
    assert "key20:" not in str(many.value)
    with pytest.raises(ConfigError, match=r"^ds.json: kkk.* \.\.\. .*unknown key") as long:
        validate(GALORE | {"k" * 100_000: 1}, "ds.json")
    assert len(str(long.value)) < 2100


@pytest.mark.parametrize("depth", [600, 100_000])
def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path, depth):
    file = tmp_path / "ds.json"
    file.write_text('{"wandb": ' + '{"a": ' * depth + "1" + "}" * depth + "}")
    with pytest.raises(ConfigError, match=r"ds.json is not a valid DeepSpeed configuration: it is nested too deeply"):
        read_file(file)


def test_auto_is_absent_where_deepspeed_takes_it_so_but_is_named(caplog):
    config = GALORE | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}
    with caplog.at_level(logging.WARNING, "ds_lowrank"):
        validate(config, "ds.json")
    assert "ds.json leaves 'auto', which DeepSpeed reads as absent" in caplog.text
    assert "bf16.enabled, zero_optimization.reduce_bucket_size" in caplog.text
    with pytest.raises(ConfigError, match=r"(?s)2 errors.*bf16\.enabled is 'auto'.*reduce_bucket_size is 'auto'"):
        validate_program(config, "ds.json", filled_in=())


def test_what_accelerate_and_the_trainer_write_passes():
    validate(
        GALORE
        | {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 4,
            "steps_per_print": float("inf"),
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "wall_clock_breakdown": False,
            "fp16": {
                "enabled": False,
                "loss_scale": 0,
                "loss_scale_window": 1000,
                "initial_scale_power": 16,
                "hysteresis": 2,
                "min_loss_scale": 1,
            },
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "none", "nvme_path": None},
                "offload_param": {"device": "none", "pin_memory": True},
                "overlap_comm": True,
                "contiguous_gradients": True,
                "sub_group_size": 1e9,
                "reduce_bucket_size": 4096,
                "stage3_prefetch_bucket_size": 3686,
                "stage3_param_persistence_threshold": 640,
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1, "total_num_steps": 9},
            },
        }
    )


SCHEDULERS = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 10, "lr_range_test_step_rate": 5},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "decay_lr_rate": 1e-3, "cycle_first_step_size": 10},
    "WarmupLR": {"warmup_min_lr": [0], "warmup_max_lr": [0.01], "warmup_num_steps": 4},
    "WarmupCosineLR": {"total_num_steps": 1e4, "warmup_num_steps": 4, "cos_min_ratio": 0.1},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [3, 5], "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 9},
    "OneCycleLR": {"max_lr": 0.01, "total_steps": 9},
    "PolynomialLR": {"total_iters": 9},
    "LinearLR": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_deepspeed_and_torch_pass(name):
    validate(GALORE | {"scheduler": {"type": name, "params": SCHEDULERS[name]}})


@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        {"type": "adam", "params": {"lr": 1e-3, "adam_w_mode": False, "torch_adam": True, "foreach": False}},
        {"type": "Adagrad", "params": {"lr": 1e-3}},
        {"type": "Muon", "params": {"lr": 1e-3, "muon_lr": 1e-2, "momentum": 0.95}},
        {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9, "nesterov": True}},
        {"type": "GaLore"},
    ],
    ids=lambda block: block["type"],
)
def test_optimizers_of_deepspeed_and_torch_pass(optimizer):
    validate_program({"optimizer": optimizer, "zero_allow_untested_optimizer": True}, "ds.json", filled_in=())


def test_every_optimizer_that_is_suggested_exists():
    names = set(optimizer_names())
    assert {"GaLore", "AdamW", "SGD", "Lion", "Muon"} <= names
    assert all(hasattr(torch.optim, name) or name in {"Lamb", "Lion"} or hasattr(ds_lowrank, name) for name in names)


def test_comments_are_left_out_at_every_level(tmp_path):
    path = tmp_path / "ds.json"
    given = {"_a": 1, "zero_optimization": {"//": "x", "stage": 1, "#b": 2}, "Comment": "c", "comments": 3}
    path.write_text(json.dumps(given))
    assert read_file(path) == without_comments(given) == {"zero_optimization": {"stage": 1}, "comments": 3}


def test_a_configuration_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="must be a dict or the path of a file, not a number"):
        ds_lowrank.initialize(model=torch.nn.Linear(2, 2), config=3)


def test_initialize_reads_files_as_deepspeed_does(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"optimizer": {"type": "GaLore"}, "gradient_cliping": 1}  // Hjson', encoding="utf-8-sig")
    with pytest.raises(ConfigError, match=r"ds\.json: gradient_cliping: unknown key; did you mean 'gradient_clipping'"):
        ds_lowrank.initialize(model=torch.nn.Linear(2, 2), config=str(path))
