"""Checkpoints go out to stock DeepSpeed and Hugging Face, and come in from it: weights and moments bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_lowrank.checkpoint.convert import Wanted, convert
from ds_lowrank.errors import CheckpointError
from tests.engines import converting
from tests.engines.converting import galore_settings, stock_settings
from tests.engines.pool import run_ranks
from tests.engines.test_any_grid import tensors_of

pytestmark = pytest.mark.slow


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def check_start(directory, expected, stage, again, ranks=1, **changes):
    """A GaLore run starts from a converted checkpoint with these weights, and these moments of what AdamW steps."""
    weights = run_ranks(
        ranks, converting.low_rank_start, galore_settings(stage), str(directory), str(again), **changes
    )[0]
    assert_equal(weights, expected["weights"])
    saved = tensors_of(again / (again / "latest").read_text())
    rest = [
        key for key in saved if key.endswith(("/exp_avg", "/exp_avg_sq")) and f"{key.split('/')[0]}/basis" not in saved
    ]
    assert {key.split("/")[0] for key in rest} >= {"lm_head.weight", "model.norm.weight"} & weights.keys()
    for key in rest:
        name, _, kind = key.partition("/")
        assert torch.equal(saved[key], expected[kind][name]), key


INCOMING = [
    *((stage, "fp32", (stage + 2) % 4) for stage in range(4)),
    *((stage, "bf16", (stage + 1) % 4) for stage in range(4)),
]


@pytest.mark.parametrize(("stage", "dtype", "target"), INCOMING)
def test_a_run_starts_from_a_checkpoint_of_deepspeeds_own(stage, dtype, target, tmp_path):
    expected = run_ranks(2, converting.stock_run, stock_settings(stage, dtype), str(tmp_path / "stock"))[0]
    convert(tmp_path / "stock", tmp_path / "ours", Wanted(to="ours"))
    check_start(tmp_path / "ours", expected, target, tmp_path / "again")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_starts_from_two_groups_a_frozen_and_a_tied_weight_on_three_ranks(stage, tmp_path):
    settings = stock_settings(stage)
    changes = {"frozen": stage > 1, "tie_word_embeddings": stage == 1}
    expected = run_ranks(3, converting.stock_run, settings, str(tmp_path / "stock"), groups=2, **changes)[0]
    convert(tmp_path / "stock", tmp_path / "ours", Wanted(to="ours"))
    check_start(tmp_path / "ours", expected, 2, tmp_path / "again", ranks=2, **changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_starts_from_a_universal_checkpoint(stage, tmp_path):
    changes = {"tie_word_embeddings": stage == 2}
    expected = run_ranks(2, converting.stock_run, stock_settings(stage), str(tmp_path / "stock"), **changes)[0]
    converting.to_universal_by_deepspeed(str(tmp_path / "stock"), str(tmp_path / "universal" / "u"))
    convert(tmp_path / "universal", tmp_path / "ours", Wanted(to="ours", source="universal"))
    check_start(tmp_path / "ours", expected, 1, tmp_path / "again", **changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_universal_checkpoint_of_a_tensor_parallel_run_has_whole_weights(stage, tmp_path):
    run_ranks(2, converting.tensor_parallel_run, stock_settings(stage), str(tmp_path / "stock"))
    with pytest.raises(CheckpointError, match="ds_to_universal"):
        convert(tmp_path / "stock", tmp_path / "ours", Wanted(to="ours"))
    converting.to_universal_by_deepspeed(str(tmp_path / "stock"), str(tmp_path / "universal" / "u"))
    convert(tmp_path / "universal", tmp_path / "ours", Wanted(to="ours"))
    found = tensors_of(tmp_path / "ours" / "global_step0")
    weights = dict(converting.model_of().named_parameters())
    assert_equal({key: tensor for key, tensor in found.items() if "/" not in key}, weights)
    assert all(found[f"{name}/exp_avg"].shape == weight.shape for name, weight in weights.items())


def test_without_moments_there_are_only_weights(tmp_path):
    run_ranks(1, converting.stock_run, stock_settings(2), str(tmp_path / "stock"))
    convert(tmp_path / "stock", tmp_path / "ours", Wanted(to="ours", weights_only=True))
    assert all("/" not in key for key in tensors_of(tmp_path / "ours" / "global_step0"))


OUTGOING = [(stage, ranks, "fp32") for stage in (1, 2, 3) for ranks in (1, 2)] + [(1, 2, "bf16"), (3, 2, "bf16")]


@pytest.mark.parametrize(("stage", "ranks", "dtype"), OUTGOING)
def test_stock_engines_load_the_universal_checkpoint(stage, ranks, dtype, tmp_path):
    weights = run_ranks(2, converting.low_rank_run, galore_settings(4 - stage), str(tmp_path / "ours"))[0]
    convert(tmp_path / "ours", tmp_path / "out", Wanted(to="universal"))
    settings = stock_settings(stage, dtype, checkpoint={"load_universal": True})
    groups = 1 + (dtype == "fp32")
    found = run_ranks(
        ranks, converting.stock_load, settings, str(tmp_path / "out"), groups=groups, load_optimizer_states=False
    )[0]
    assert_equal(found, weights)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 1), (1, 2), (2, 2)])
def test_stock_engines_load_the_module(stage, ranks, tmp_path):
    weights = run_ranks(2, converting.low_rank_run, galore_settings(3), str(tmp_path / "ours"))[0]
    convert(tmp_path / "ours", tmp_path / "out", Wanted(to="deepspeed"))
    settings = stock_settings(stage)
    found = run_ranks(ranks, converting.stock_load, settings, str(tmp_path / "out"), load_module_only=True)[0]
    assert_equal(found, weights)


def test_zero_to_fp32_gives_the_weights(tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = run_ranks(2, converting.low_rank_run, galore_settings(3), str(tmp_path / "ours"))[0]
    convert(tmp_path / "ours", tmp_path / "out", Wanted(to="deepspeed"))
    assert_equal(get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out")), weights)


def config_in(folder: Path, **changes) -> Path:
    from tests.engines.grids import llama_config

    llama_config(**changes).save_pretrained(folder)
    return folder


def test_a_tied_head_has_both_names_where_a_module_is_loaded(tmp_path):
    changes = {"tie_word_embeddings": True}
    weights = run_ranks(1, converting.low_rank_run, galore_settings(1), str(tmp_path / "ours"), **changes)[0]
    config = config_in(tmp_path / "config", **changes)
    convert(tmp_path / "ours", tmp_path / "out", Wanted(to="deepspeed", config=config))
    found = run_ranks(
        *(1, converting.stock_load, stock_settings(1), str(tmp_path / "out")), changes=changes, load_module_only=True
    )[0]
    assert_equal(found, weights)


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_a_hugging_face_folder(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    weights = run_ranks(
        2, converting.low_rank_run, galore_settings(2), str(tmp_path / "ours"), tie_word_embeddings=tied
    )[0]
    config = config_in(tmp_path / "config", tie_word_embeddings=tied)
    for dtype in ("float32", "bfloat16"):
        wanted = Wanted(to="huggingface", config=config, dtype=dtype, max_shard_size="50KB")
        convert(tmp_path / "ours", tmp_path / dtype, wanted)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert len(list((tmp_path / dtype).glob("*.safetensors"))) > 1
        expected = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
        assert_equal(dict(model.named_parameters()), expected)


def test_the_checkpoint_of_a_run_says_which_model_it_is_of(tmp_path):
    from transformers import AutoModelForCausalLM

    weights = run_ranks(
        2, converting.identified_run, galore_settings(1), str(tmp_path / "ours"), tie_word_embeddings=True
    )[0]
    convert(tmp_path / "ours", tmp_path / "export", Wanted(to="huggingface"))
    assert_equal(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "export").named_parameters()), weights)
    convert(tmp_path / "ours", tmp_path / "stock", Wanted(to="deepspeed"))
    states = torch.load(tmp_path / "stock" / "global_step3" / "mp_rank_00_model_states.pt", weights_only=True)
    assert torch.equal(states["module"]["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_stacks_of_experts_go_out_and_come_in_as_the_parameters_of_the_model(tmp_path):
    """In a checkpoint of ours every expert's matrix is one of its own."""
    from transformers import AutoModelForCausalLM

    weights = run_ranks(2, converting.low_rank_run, galore_settings(2), str(tmp_path / "ours"), experts=True)[0]
    assert any(weight.ndim == 3 for weight in weights.values())
    converting.experts_config().save_pretrained(tmp_path / "config")
    wanted = {"config": tmp_path / "config"}
    convert(tmp_path / "ours", tmp_path / "export", Wanted(to="huggingface", **wanted))
    assert_equal(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "export").named_parameters()), weights)

    expected = run_ranks(2, converting.stock_run, stock_settings(1), str(tmp_path / "stock"), experts=True)[0]
    convert(tmp_path / "stock", tmp_path / "in", Wanted(to="ours", **wanted))
    check_start(tmp_path / "in", expected, 2, tmp_path / "again", experts=True)
