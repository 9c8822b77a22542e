"""The parameters of a LLaMA as one rank of a grid has them, on the meta device: shapes and names, without weights."""

from __future__ import annotations

from collections import defaultdict

import torch
from deepspeed.runtime.utils import partition_balanced
from transformers import LlamaConfig, LlamaForCausalLM

from ds_lowrank.placement.simulated import shard

BY_COLUMNS = ("o_proj", "down_proj")
"""The layers whose inputs are split over tensor-parallel ranks; of all others but the norms it is the outputs."""


def on_meta(config: LlamaConfig, tensor: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The whole model of one tensor-parallel rank, with megatron-core's marks, in Hugging Face's order.

    Args:
        config: sizes of the model.
        tensor: degree of tensor parallelism; it divides the widths.
        dtype: of the weights.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if tensor == 1:
        return model
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            is_norm = name.endswith("norm")
            by_columns = name.endswith(BY_COLUMNS)
            if is_norm or (by_columns and key == "bias"):
                continue
            setattr(module, key, shard(parameter, int(by_columns), tensor))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def names_of_stages(model: LlamaForCausalLM, stages: int) -> list[list[str]]:
    """The names of the parameters of every pipeline stage, in the order in which its optimizer has them.

    The last stage has a copy of a tied embedding, in front of its other parameters.

    Args:
        model: the whole model.
        stages: into how many stages its decoder layers are divided, as ``LlamaPipeline`` divides them.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = model.config.num_hidden_layers
    of_layer: dict[int, list[str]] = defaultdict(list)
    for name in names:
        of_layer[_place(name, layers)].append(name)
    if stages == 1:
        return [names]
    bounds = partition_balanced([0, *[1] * layers, 0, 0], stages)
    found = [[name for i in range(bounds[s], bounds[s + 1]) for name in of_layer[i]] for s in range(stages)]
    if model.config.tie_word_embeddings:
        found[-1][:0] = [name for name in of_layer[0] if name not in found[-1]]
    return found


def _place(name: str, layers: int) -> int:
    """The position of a parameter's layer among the embedding, the decoder layers, the last norm and the head."""
    if name.startswith("lm_head."):
        return layers + 2
    if name.startswith("model.norm."):
        return layers + 1
    return int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
