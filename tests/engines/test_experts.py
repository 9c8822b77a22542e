"""Mixtures of experts whose weights are stacks: every expert's matrix steps as the dense reference of that matrix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.engines import grids
from tests.engines.grids import VOCAB
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, config, full_weights, max_relative_difference, train_step
from tests.methods import dense

STEPS = 6
AFTER_ONE, AFTER_ALL = 1e-5, 1e-4
"""As for the other models: sums in another order, divided by Adam's small second moments."""
AFTER_ALL_PROBED = 5e-4
"""Lorenza's probes divide a difference of two losses, with their rounding, by a radius of 1e-3, and so pass on more of
it: up to 1.5e-4 over the seeds 0 to 12, but 1.2e-2 at one of them, where tokens may change their expert. Probes of
another seed differ by 0.5."""


def make_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=40,
            intermediate_size=60,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


class ExpertOracle(Oracle):
    """The oracle, with a rule of its own for every matrix of a stack."""

    def __init__(self, router, model=None, **options):
        kinds = ("embed", "lm_head") if router else ("embed", "lm_head", "mlp.gate.")
        super().__init__(
            model=model or make_mixtral(), projected=lambda name: not any(kind in name for kind in kinds), **options
        )
        matrix = dense(options.get("method", "GaLore"))
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 3:
                del self.rules[name]
                for number, one in enumerate(parameter.data):
                    self.rules[f"{name}.{number}"] = matrix(one, name=f"{name}.{number}", **self.options)

    def gradients(self, step):
        """Those of the model, with one for every matrix of a stack."""
        found = {}
        for name, gradient in super().gradients(step).items():
            of_stack = {f"{name}.{number}": one for number, one in enumerate(gradient)}
            found |= of_stack if gradient.ndim == 3 else {name: gradient}
        return found


def train(settings, steps):
    import ds_lowrank

    model = make_mixtral()
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    weights = []
    for step in range(steps):
        train_step(engine, step)
        weights.append(full_weights(engine))
    slots = engine.basic_optimizer.slots
    return weights, sorted(slot.tag.name for slot in slots if slot.is_projected)


CASES = [(method, number % 4) for number, method in enumerate(METHODS)] + [("GaLore", stage) for stage in (1, 2, 3)]


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_every_expert_steps_as_a_matrix_of_its_own(method, stage):
    # A router's softmax leaves its gradient one rank short, and rounding decides how most methods step in what is left.
    router = method == "GaLore"
    params = {} if router else {"exclude_modules": ["*.mlp.gate"]}
    oracle, expected = ExpertOracle(router, method=method), []
    for step in range(STEPS):
        oracle.step(step)
        expected.append(oracle.weights())
    for weights, projected in run_ranks(2, train, config(stage, 2, method=method, params=params), STEPS):
        assert max_relative_difference(weights[0], expected[0]) < AFTER_ONE
        bound = AFTER_ALL_PROBED if method == "Lorenza" else AFTER_ALL
        assert max_relative_difference(weights[-1], expected[-1]) < bound
        layers = [f"model.layers.{layer}." for layer in range(2)]
        experts = [f"mlp.experts.{stack}.{number}" for stack in ("gate_up_proj", "down_proj") for number in range(3)]
        others = [*(["mlp.gate.weight"] if router else []), *(f"self_attn.{one}_proj.weight" for one in "qkvo")]
        assert projected == sorted(layer + name for layer in layers for name in (*experts, *others))


class CutExperts(torch.nn.Module):
    """Four experts of which every rank of a tensor-parallel group has some, mixed with fixed weights."""

    COUNT = 4

    def __init__(self, tensor, rank):
        super().__init__()
        self.tensor = tensor
        own = slice(rank * self.COUNT // tensor, (rank + 1) * self.COUNT // tensor)
        generator = torch.Generator().manual_seed(5)
        self.w = torch.nn.Parameter(torch.randn(self.COUNT, 24, 40, generator=generator)[own].clone() / 6)
        self.mixing = torch.rand(self.COUNT, generator=generator)[own]
        if tensor > 1:
            self.w.tensor_model_parallel, self.w.partition_dim, self.w.partition_stride = True, 0, 1

    def forward(self, x):
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        x = copy_to_tensor_model_parallel_region(x) if self.tensor > 1 else x
        partial = sum(share * (x @ w.T).tanh() for share, w in zip(self.mixing, self.w, strict=True))
        return reduce_from_tensor_model_parallel_region(partial) if self.tensor > 1 else partial


class CutModel(torch.nn.Module):
    """An embedding, cut experts and a head."""

    def __init__(self, tensor=1, rank=0):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.lm_head = torch.nn.Embedding(VOCAB, 40), torch.nn.Linear(24, VOCAB, bias=False)
        self.experts = CutExperts(tensor, rank)

    def forward(self, input_ids, labels):
        logits = self.lm_head(self.experts(self.embed(input_ids)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss)


def train_cut(settings, steps):
    import torch.distributed as dist

    import ds_lowrank
    from ds_lowrank.integration.mpu import make_grid

    mpu = make_grid(2, 1)
    model = CutModel(2, dist.get_rank(mpu.get_tensor_model_parallel_group()))
    engine = ds_lowrank.initialize(model=model, config=settings, mpu=mpu)[0]
    return grids.train_and_gather(engine, range(steps))


class GridOracle(ExpertOracle):
    batch = staticmethod(grids.tokens)


@pytest.mark.parametrize("projection", ["logical", "local"])
@pytest.mark.parametrize("stage", range(4))
def test_experts_that_are_cut_over_tensor_parallel_ranks_step_as_whole_ones(stage, projection):
    """Each is whole on one rank, so that local projection is the same."""
    oracle = GridOracle(True, model=CutModel())
    for step in range(STEPS):
        oracle.step(step)
    settings = config(stage, 2, params={"tensor_parallel_projection": projection})
    weights = run_ranks(4, train_cut, settings, STEPS)[0]
    assert max_relative_difference(weights, oracle.weights()) < AFTER_ALL


def train_autotp(settings, steps):
    import ds_lowrank

    specs = [
        {"patterns": [rf".*\.self_attn\.{names}_proj\.weight$"], "partition_type": kind}
        for names, kind in (("[qkv]", "column"), ("o", "row"))
    ]  # DeepSpeed refuses the model's own plan, which would split the experts
    tensor_parallel = {"autotp_size": 2, "partition_config": {"layer_specs": specs}}
    settings = {**settings, "tensor_parallel": tensor_parallel}
    del settings["train_batch_size"]  # DeepSpeed takes every rank for a data-parallel one when it checks it
    engine = ds_lowrank.initialize(model=make_mixtral(), config=settings)[0]
    return grids.train_and_gather(engine, range(steps))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_experts_that_are_whole_on_every_rank_of_autotp_step_as_on_one(stage):
    oracle = GridOracle(True)
    for step in range(STEPS):
        oracle.step(step)
    weights = run_ranks(4, train_autotp, config(stage, 2), STEPS)[0]
    assert max_relative_difference(weights, oracle.weights()) < AFTER_ALL


def train_interrupted(settings, folder):
    """Four steps, and two and two with a checkpoint and a new engine between them."""
    import ds_lowrank

    def start():
        return ds_lowrank.initialize(model=make_mixtral(), config=settings)[0]

    whole = start()
    for step in range(4):
        train_step(whole, step)
    first = start()
    for step in range(2):
        train_step(first, step)
    first.save_checkpoint(folder)
    second = start()
    second.load_checkpoint(folder)
    for step in range(2, 4):
        train_step(second, step)
    return full_weights(whole), full_weights(second)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_mixture_goes_on_bit_for_bit(stage, tmp_path):
    settings = config(stage, 2, params={"state_dtype": "int8"})
    for whole, resumed in run_ranks(2, train_interrupted, settings, str(tmp_path)):
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
