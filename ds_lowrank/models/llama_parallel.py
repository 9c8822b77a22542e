"""A LLaMA on a grid of ranks, made of megatron-core's layers, with the weights of Hugging Face's under the same names.

Without pipeline parallelism it is a module like any other; with it, a ``PipelineModule`` of DeepSpeed. Both say what
their parameters are called in a ``LlamaForCausalLM`` (:meth:`logical_names`), so that the same subspaces are found, and
weights go back and forth.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, distributed, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

from ds_lowrank.models.llama import Weights, check_split, drawn
from ds_lowrank.models.llama_layers import DecoderLayer, Embedding, Head, LayerConfig, Norm, causal_loss, tied_head
from ds_lowrank.placement.grid import Grid, grid_of
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.sharding.logical import shard_of


class LlamaTensorParallel(nn.Module):
    """All layers on every rank, each split over the tensor-parallel ranks. Called like a ``LlamaForCausalLM``."""

    def __init__(self, recipe: LayerConfig) -> None:
        super().__init__()
        self.config = recipe.llama
        self.embed_tokens = Embedding(recipe)
        self.layers = nn.ModuleList(DecoderLayer(recipe) for _ in range(recipe.llama.num_hidden_layers))
        self.norm = Norm(recipe)
        self.lm_head = None if recipe.llama.tie_word_embeddings else Head(recipe)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """``logits`` are this rank's share of them, ``sequence x batch x vocabulary / ranks``, without labels only."""
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        logits = tied_head(self.embed_tokens, hidden) if self.lm_head is None else self.lm_head(hidden)
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(loss=causal_loss(logits, labels))

    def logical_names(self) -> dict[str, str]:
        return {name: _as_in_hugging_face(name) for name, _ in self.named_parameters()}


def _as_in_hugging_face(name: str) -> str:
    return name.replace(".projection.", ".") if name.startswith("lm_head.") else f"model.{name}"


class LlamaPipeline(PipelineModule):  # type: ignore[misc]
    """The layers dealt over the stages of a pipeline, the decoder layers evenly."""

    def __init__(self, recipe: LayerConfig, topology: PipeModelDataParallelTopology) -> None:
        self.config = recipe.llama
        count = recipe.llama.num_hidden_layers
        decoder = [LayerSpec(DecoderLayer, recipe) for _ in range(count)]
        self._prefixes = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(count)), "model.norm", "lm_head"]
        if recipe.llama.tie_word_embeddings:
            first: LayerSpec = TiedLayerSpec("embedding", Embedding, recipe)
            last: LayerSpec = TiedLayerSpec("embedding", Embedding, recipe, forward_fn=tied_head)
        else:
            first, last = LayerSpec(Embedding, recipe), LayerSpec(Head, recipe)
        with redirect_stdout(StringIO()):  # DeepSpeed prints the layers and every rank's coordinates
            super().__init__(
                [first, *decoder, LayerSpec(Norm, recipe), last],
                topology=topology,
                loss_fn=causal_loss,
                partition_method="type:DecoderLayer",
            )

    def logical_names(self) -> dict[str, str]:
        return {name: self._name(name) for name, _ in self.named_parameters()}

    def _name(self, name: str) -> str:
        if name.startswith("tied_modules.embedding."):
            return name.replace("tied_modules.embedding", "model.embed_tokens")
        layer, _, rest = name.partition(".")
        return f"{self._prefixes[int(layer)]}.{rest.removeprefix('projection.')}"


ParallelLlama = LlamaTensorParallel | LlamaPipeline


def build(
    config: LlamaConfig,
    seed: int,
    tensor: int,
    pipeline: int,
    *,
    sequence_parallel: bool = False,
    recompute: bool = False,
    weights: Weights | None = None,
) -> ParallelLlama:
    """A LLaMA on the grid of :func:`ds_lowrank.make_grid`, with the weights of ``llama.build`` for a seed.

    Args:
        weights: the whole ones of a ``LlamaForCausalLM`` by name and shape, instead of those of the seed.

    Raises:
        ConfigError: the model cannot be split so.
    """
    check_split(config, tensor, pipeline)
    recipe = LayerConfig(config, sequence_parallel and tensor > 1, recompute)
    if pipeline > 1:
        data = distributed.get_world_size() // (tensor * pipeline)
        model: ParallelLlama = LlamaPipeline(recipe, PipeModelDataParallelTopology(pipeline, tensor, data))
    else:
        model = LlamaTensorParallel(recipe)
    _fill(model, weights or drawn(seed, config))
    return model


@torch.no_grad()
def _fill(model: ParallelLlama, weight: Weights) -> None:
    """Give every parameter its shard of the whole weight of that name and shape."""
    grid, names = _grid(model), model.logical_names()
    for name, parameter in model.named_parameters():
        (logical,) = logical_matrices(parameter, tuple(parameter.shape), names[name], grid)
        parameter.copy_(shard_of(weight(logical.name, logical.shape), logical).view(parameter.shape))


def _grid(model: ParallelLlama) -> Grid:
    return grid_of(model.mpu() if isinstance(model, PipelineModule) else None)
