"""A layer that stores its weight transposed, transformers' Conv1D, is trained as ``torch.nn.Linear`` is."""

import pytest
import torch
import torch.nn.utils.prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import ds_lowrank
from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.parameter_names import tag_of
from tests import methods

SIZES = {"wide": (12, 24), "tall": (24, 12), "square": (12, 12)}  # output x input


def models():
    """The same model twice, once of each kind of layer."""
    linears, transposed = (torch.nn.ModuleDict() for _ in range(2))
    for name, (outputs, inputs) in SIZES.items():
        linears[name] = torch.nn.Linear(inputs, outputs)
        transposed[name] = Conv1D(outputs, inputs)
        transposed[name].weight.data = linears[name].weight.data.T.contiguous()
        transposed[name].bias.data = linears[name].bias.data.clone()
    return linears, transposed


@pytest.mark.parametrize(("name", "options"), methods.cases())
def test_conv1d_is_trained_as_linear_is(name, options):
    torch.manual_seed(0)
    if name == "Lorenza":
        options = options | {"perturbation_radius": 0}  # gradients are given here
    both = models()
    optimizers = []
    for model in both:
        ds_lowrank.tag_parameters(model)
        optimizers.append(getattr(ds_lowrank, name)(model.named_parameters(), **options))
    for _ in range(4):
        for linear, conv in zip(both[0].values(), both[1].values(), strict=True):
            linear.weight.grad, linear.bias.grad = torch.randn(linear.weight.shape), torch.randn(linear.bias.shape)
            conv.weight.grad, conv.bias.grad = linear.weight.grad.T.contiguous(), linear.bias.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for layer, linear in both[0].items():
        found = both[1][layer].weight.detach().T
        # fp32 sums in another order over four steps; measured up to 4e-7.
        assert (found - linear.weight.detach()).norm() < 1e-5 * linear.weight.norm(), layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: torch.nn.utils.prune.identity(layer, "weight"),
        torch.nn.utils.weight_norm,
        torch.nn.utils.parametrizations.weight_norm,
    ],
)
def test_a_changed_conv1d_stores_its_weights_transposed_too(change):
    model = torch.nn.Sequential(Conv1D(3, 4), torch.nn.Linear(3, 4))
    for layer in model:
        change(layer)
    ds_lowrank.tag_parameters(model)
    matrices = {name: tag_of(p).transposed for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices == {name: name.startswith("0.") for name in matrices}


def test_the_official_view_of_a_wide_matrix_needs_it_in_its_own_order():
    _, transposed = models()
    ds_lowrank.tag_parameters(transposed)
    optimizer = ds_lowrank.VLoRP(transposed.named_parameters(), rank=2, granularity=3, left_view="official")
    transposed["wide"].weight.grad = torch.ones(24, 12)
    with pytest.raises(ConfigError, match=r"wide.weight: its layer stores it transposed, .* set left_view to"):
        optimizer.step()


def test_gpt2_is_tagged_by_its_layers_and_has_no_adapters():
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8, tie_word_embeddings=False)
    )
    ds_lowrank.tag_parameters(model)
    transposed = {name for name, parameter in model.named_parameters() if tag_of(parameter).transposed}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert transposed == {f"transformer.h.0.{layer}.weight" for layer in layers}
    message = "h.0.attn.c_attn is a Conv1D of transformers, and only torch.nn.Linear can have an adapter"
    for targets in (None, ["*c_attn*"]):
        with pytest.raises(ConfigError, match=message):
            ds_lowrank.add_adapters(model, target_modules=targets)
    assert ds_lowrank.add_adapters(model, target_modules=["lm_head"], adapter_rank=2) == ["lm_head"]
