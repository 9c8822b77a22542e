"""The LLaMA of parallel layers computes what Hugging Face's does, and exports its weights."""

from __future__ import annotations

import pytest
import torch

from tests.engines.grids import VOCAB, Grid, dense_model, llama_config, settings_of, start, tokens, train_step
from tests.engines.pool import run_ranks

VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_act": "gelu"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_and_loss_equal_hugging_faces(tensor, changes):
    model = irregular_model(changes)
    with torch.no_grad():
        expected = model(input_ids=tokens(0)[:3], labels=tokens(0)[:3])
    for logits, loss in run_ranks(tensor, logits_and_loss, tensor, changes):
        # Both sum some tens of products of about one in fp32.
        assert ((logits - expected.logits).norm() / expected.logits.norm()).item() < 1e-5
        assert abs(loss / expected.loss.item() - 1) < 1e-5


def irregular_model(changes):
    """A model with noise on every weight, norms and biases included."""
    model = dense_model(**changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def parallel_model(tensor, changes):
    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel

    make_grid(tensor, 1)
    weights = irregular_model(changes).state_dict()
    return llama_parallel.build(llama_config(**changes), 0, tensor, 1, weights=lambda name, shape: weights[name])


def logits_and_loss(tensor, changes):
    model, batch = parallel_model(tensor, changes), tokens(0)[:3]
    with torch.no_grad():
        return whole_logits(model(batch).logits).transpose(0, 1), model(batch, labels=batch).loss.item()


def whole_logits(own):
    """Join the tensor-parallel ranks' shares of the vocabulary."""
    import torch.distributed as dist

    from ds_lowrank.placement.grid import initialized_tensor_group

    if own.shape[-1] == VOCAB:
        return own
    group = initialized_tensor_group()
    shares = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, own, group=group)
    return torch.cat(shares, dim=-1)


EXPORTED_GRIDS = [Grid(1, 2, 2, 1), Grid(2, 2, 1, 3), Grid(2, 1, 2, 0), Grid(2, 2, 1, 2, "autotp")]


@pytest.mark.parametrize("grid", EXPORTED_GRIDS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_export_equals_the_trained_model(grid, tied, tmp_path):
    from transformers import LlamaForCausalLM

    results = run_ranks(grid.world, export_and_evaluate, grid, tied, tmp_path / "export")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        expected = model(input_ids=tokens(1), labels=tokens(1))
    for _, logits in results:
        if logits is not None:
            assert ((logits - expected.logits[:3]).norm() / expected.logits[:3].norm()).item() < 1e-5
    assert abs(sum(loss for loss, _ in results) / len(results) / expected.loss.item() - 1) < 1e-5
    assert model.config.tie_word_embeddings is tied


def export_and_evaluate(grid, tied, directory):
    """Take a step and export.

    Returns:
        The loss of the next batch at the exported weights, and without a pipeline logits.
    """
    from ds_lowrank.checkpoint.export import export

    engine = start(grid, settings_of(grid, gas=2), tie_word_embeddings=tied)
    train_step(engine, 0)
    export(engine, None, directory)
    logits = None
    if grid.pipeline == 1:
        with torch.no_grad():
            logits = engine(input_ids=tokens(1)[:3]).logits
        logits = whole_logits(logits.transpose(0, 1) if grid.layers == "megatron" else logits)
    return train_step(engine, 1), logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_a_seed_gives_the_same_weights_on_every_grid(changes):
    for grid in (Grid(1, 2, 2, 0), Grid(1, 4, 1, 0)):
        sizes = {"num_key_value_heads": 4} if grid.tensor == 4 else {}
        expected = dense_model(**changes, **sizes).state_dict()
        weights, *_ = run_ranks(grid.world, initial_weights, grid, **changes, **sizes)
        assert weights.keys() == expected.keys() - ({"lm_head.weight"} if changes else set())
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def initial_weights(grid, **changes):
    from ds_lowrank.checkpoint.gather import whole_weights

    return whole_weights(start(grid, settings_of(grid), **changes))
