"""A LLaMA on a grid of ranks, built from megatron-core's layers, with Hugging Face's weights and parameter names.

Without pipeline parallelism it is an ordinary module, with it a DeepSpeed ``PipelineModule``. The ``logical_names`` of
both map their parameters to those of a ``LlamaForCausalLM``, so that they get the same subspaces and weights can be
imported and exported.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

from ds_lowrank.models.llama import WeightSource, check_split, drawn
from ds_lowrank.models.llama_layers import DecoderLayer, Embedding, Head, LayerConfig, Norm, causal_loss, tied_head
from ds_lowrank.placement.grid import Grid, grid_of
from ds_lowrank.placement.tensor_parallel import logical_matrices


class LlamaTensorParallel(nn.Module):
    """A LLaMA with all layers on every rank, each split over the tensor-parallel ranks.

    Args:
        config: how to build the layers.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config.llama
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.llama.num_hidden_layers))
        self.norm = Norm(config)
        self.lm_head = None if config.llama.tie_word_embeddings else Head(config)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """Compute the loss, or without labels the logits, like ``LlamaForCausalLM``.

        Args:
            input_ids: token ids, ``batch x sequence``.
            labels: token ids, ``batch x sequence``; None for no loss.

        Returns:
            With labels, only ``loss``, a scalar. Without, only ``logits``, this rank's share of them:
            ``sequence x batch x vocabulary / ranks``.
        """
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        logits = tied_head(self.embed_tokens, hidden) if self.lm_head is None else self.lm_head(hidden)
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(loss=causal_loss(logits, labels))

    def logical_names(self) -> dict[str, str]:
        """The names that this model's parameters have in a ``LlamaForCausalLM``, keyed by their names here."""
        return {name: _as_in_hugging_face(name) for name, _ in self.named_parameters()}


def _as_in_hugging_face(name: str) -> str:
    return name.replace(".projection.", ".") if name.startswith("lm_head.") else f"model.{name}"


class LlamaPipeline(PipelineModule):  # type: ignore[misc]
    """A LLaMA whose layers are distributed over pipeline stages, with the decoder layers divided evenly.

    Args:
        config: how to build the layers.
        topology: the grid of ranks.
    """

    def __init__(self, config: LayerConfig, topology: PipeModelDataParallelTopology) -> None:
        self.config = config.llama
        count = config.llama.num_hidden_layers
        decoder = [LayerSpec(DecoderLayer, config) for _ in range(count)]
        self._prefixes = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(count)), "model.norm", "lm_head"]
        if config.llama.tie_word_embeddings:
            first: LayerSpec = TiedLayerSpec("embedding", Embedding, config)
            last: LayerSpec = TiedLayerSpec("embedding", Embedding, config, forward_fn=tied_head)
        else:
            first, last = LayerSpec(Embedding, config), LayerSpec(Head, config)
        with redirect_stdout(StringIO()):  # DeepSpeed would print the layers and every rank's coordinates
            super().__init__(
                [first, *decoder, LayerSpec(Norm, config), last],
                topology=topology,
                loss_fn=causal_loss,
                partition_method="type:DecoderLayer",
            )

    def logical_names(self) -> dict[str, str]:
        """The names that this stage's parameters have in a ``LlamaForCausalLM``, keyed by their names here."""
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
    weights: WeightSource | None = None,
) -> ParallelLlama:
    """Build a LLaMA on the grid of :func:`ds_lowrank.integration.mpu.make_grid`, with the weights of ``llama.build``.

    Args:
        config: sizes of the model.
        seed: seed of the weights.
        tensor: degree of tensor parallelism.
        pipeline: the number of pipeline stages.
        sequence_parallel: whether to split the sequence over the tensor-parallel ranks between the split layers.
        recompute: whether to recompute a decoder layer's activations in the backward pass instead of storing them.
        weights: where to take the whole weights of a ``LlamaForCausalLM`` from instead of drawing them from the seed.

    Returns:
        This rank's part of the model: a :class:`LlamaPipeline` with more than one stage, else a
        :class:`LlamaTensorParallel`.

    Raises:
        ConfigError: the model cannot be split over such a grid.
    """
    check_split(config, tensor, pipeline)
    layer_config = LayerConfig(config, sequence_parallel and tensor > 1, recompute)
    if pipeline > 1:
        data = dist.get_world_size() // (tensor * pipeline)
        model: ParallelLlama = LlamaPipeline(layer_config, PipeModelDataParallelTopology(pipeline, tensor, data))
    else:
        model = LlamaTensorParallel(layer_config)
    _fill(model, weights or drawn(seed, config))
    return model


@torch.no_grad()
def _fill(model: ParallelLlama, weight: WeightSource) -> None:
    """Copy into every parameter its shard of the whole weight."""
    grid, names = _grid(model), model.logical_names()
    for name, parameter in model.named_parameters():
        (logical,) = logical_matrices(parameter, tuple(parameter.shape), names[name], grid)
        parameter.copy_(logical.shard_of(weight(logical.name, logical.shape)).view(parameter.shape))


def _grid(model: ParallelLlama) -> Grid:
    return grid_of(model.mpu() if isinstance(model, PipelineModule) else parallel_state)
