import json

import pytest

from ds_lowrank.training.config import BatchSizes, precision, read_config, set_batch_sizes, set_learning_rate

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
    with pytest.raises(ValueError, match="no learning rate"):
        set_learning_rate({"optimizer": {"type": "AdamW"}}, None)


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
