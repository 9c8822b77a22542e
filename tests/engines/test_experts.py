"""Mixtures of experts whose weights are stacks: every expert's matrix steps as the dense reference of that matrix."""

from __future__ import annotations

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, config, full_weights, max_relative_difference, train_step

STEPS = 6
AFTER_ONE, AFTER_ALL = 1e-5, 1e-4
"""As for the other models: sums in another order, divided by Adam's small second moments."""


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
            vocab_size=131,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


class ExpertOracle(Oracle):
    """The oracle, with a rule of its own for every matrix of a stack."""

    def __init__(self, router, **options):
        kinds = ("embed", "lm_head") if router else ("embed", "lm_head", "mlp.gate.")
        super().__init__(
            model=make_mixtral(), projected=lambda name: not any(kind in name for kind in kinds), **options
        )
        matrix = type(self.rules["model.layers.0.self_attn.q_proj.weight"])
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
        assert max_relative_difference(weights[-1], expected[-1]) < AFTER_ALL
        layers = [f"model.layers.{layer}." for layer in range(2)]
        experts = [f"mlp.experts.{stack}.{number}" for stack in ("gate_up_proj", "down_proj") for number in range(3)]
        others = [*(["mlp.gate.weight"] if router else []), *(f"self_attn.{one}_proj.weight" for one in "qkvo")]
        assert projected == sorted(layer + name for layer in layers for name in (*experts, *others))
