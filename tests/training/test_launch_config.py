import json
import logging

import pytest

from ds_lowrank.errors import ConfigError
from ds_lowrank.training.config import (
    BatchSizes,
    precision,
    read_config,
    set_batch_sizes,
    set_learning_rate,
    zero_stage,
)
from tests.training import forked_script
from tests.training.runs import SCRIPT, deepspeed_config

B, M, A = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("config", "total", "micro", "expected"),
    [
        ({B: 16, M: 2}, None, None, BatchSizes(16, 2, 4)),
        ({B: 16, A: 4}, None, None, BatchSizes(16, 2, 4)),
        ({M: 2, A: 4}, None, None, BatchSizes(16, 2, 4)),
        ({B: 16}, None, None, BatchSizes(16, 8, 1)),
        ({M: 3}, None, None, BatchSizes(6, 3, 1)),
        ({B: 16, M: 2, A: 4}, 8, None, BatchSizes(8, 2, 2)),
        ({B: 16, M: 2, A: 4}, None, 8, BatchSizes(16, 8, 1)),
        ({B: "auto", M: "auto", A: "auto"}, 4, 1, BatchSizes(4, 1, 2)),
    ],
)
def test_batch_sizes_are_completed_and_overridden(config, total, micro, expected):
    assert set_batch_sizes(config, ranks=2, total=total, micro=micro) == expected
    assert (config[B], config[M], config[A]) == (expected.total, expected.micro, expected.accumulation)


@pytest.mark.parametrize(
    ("config", "total", "micro", "message"),
    [
        ({B: 16, M: 3}, None, None, "does not divide: train_batch_size 16 must be .* 3 x .* x 2 ranks"),
        ({B: 16, M: 2, A: 2}, None, None, "does not divide"),
        ({B: 1}, None, None, "does not divide"),
        ({M: 2}, 2, None, "does not divide"),
        ({A: 2}, None, None, "no batch size"),
        ({B: 16.5}, None, None, "positive whole number, not 16.5"),
    ],
)
def test_impossible_batch_sizes_are_refused(config, total, micro, message):
    with pytest.raises(ValueError, match=message):
        set_batch_sizes(config, ranks=2, total=total, micro=micro)


def test_learning_rate_of_the_command_line_wins():
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}
    set_learning_rate(config, 0.5)
    assert config["optimizer"]["params"]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"no learning rate: set optimizer\.params\.lr in ds\.json or give --lr"):
        set_learning_rate({"optimizer": {"type": "AdamW"}}, None, "ds.json")


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ("1e-3", "ds.json: optimizer.params.lr is '1e-3', a string: write it without quotes, or give --lr"),
        (True, "ds.json: optimizer.params.lr must be a finite number of at least 0, not true"),
        (-1, "ds.json: optimizer.params.lr must be a finite number of at least 0, not -1"),
        (1e308, "the learning rate 1e+308 is more than fp32 can hold: lower optimizer.params.lr or --lr"),
        (float("inf"), "ds.json: optimizer.params.lr must be a finite number of at least 0, not Infinity"),
    ],
)
def test_a_learning_rate_that_is_none_says_what_it_is(lr, message):
    config = {"optimizer": {"type": "GaLore", "params": {"lr": lr}}}
    with pytest.raises(ValueError) as caught:
        set_learning_rate(config, None, "ds.json")
    assert str(caught.value) == message
    set_learning_rate(config, 0.5, "ds.json")
    assert config["optimizer"]["params"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid DeepSpeed configuration"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[]", "one JSON object"),
        ("{}", "names no optimizer"),
    ],
)
def test_unusable_configurations_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no DeepSpeed configuration at .*none\.json"):
        read_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_precision(config, expected):
    assert precision(json.loads(json.dumps(config))) == expected


def written(tmp_path, config):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return path


def test_the_short_form_of_zero_is_written_out(tmp_path):
    config = read_config(written(tmp_path, deepspeed_config() | {"zero_optimization": True}))
    assert config["zero_optimization"] == {"stage": 1, "allgather_bucket_size": 500_000_000}
    assert zero_stage(config) == 1


@pytest.mark.parametrize("name", ["AdamW", "adam", "Muon"])
def test_on_a_cpu_adam_is_torchs_and_a_line_says_so(tmp_path, caplog, name):
    optimizer = {"type": name, "params": {"lr": 0.1}}
    with caplog.at_level(logging.INFO, "ds_lowrank"):
        config = read_config(written(tmp_path, deepspeed_config() | {"optimizer": optimizer}))
    assert config["optimizer"]["params"] == {"lr": 0.1, "torch_adam": True}
    assert f"optimizer.type {name}: torch's Adam is used" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer: checkpoints are written by this program"),
        ({"datastates_ckpt": True}, "datastates_ckpt: checkpoints are written by this program"),
        ({"autotuning": {"enabled": True}}, "autotuning is not supported with AdamW"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param is not supported with"),
    ],
)
def test_what_the_programs_do_not_support_is_refused_with_every_optimizer(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(written(tmp_path, deepspeed_config("AdamW") | more))
    assert "ds.json" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "last"),
    [
        (["--help"], 0, "stdout", "single process."),
        (["--no-such-flag"], 2, "stderr", "error: the following arguments are required: --model, --steps, --output"),
    ],
)
def test_usage_is_printed_once_for_all_ranks(tmp_path, arguments, code, stream, last):
    done = forked_script.run_script(SCRIPT, arguments, 2, tmp_path, timeout=60)
    assert done.returncode == code
    assert (done.stdout + done.stderr).count("usage:") == 1
    assert last in getattr(done, stream).strip().splitlines()[-1]
