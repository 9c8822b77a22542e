"""The layers of a LLaMA, split over tensor-parallel ranks with megatron-core. They compute what Hugging Face's do.

Hidden states are ``sequence x batch x hidden``; with sequence parallelism, they are this rank's part of the sequence.
Parameters have Hugging Face's names within a layer. Queries, keys and values (likewise gate and up) share one copy of
their input, so that its gradient is summed over the ranks once and not once per projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

IGNORED = -100
"""The label of tokens that the loss ignores, as in Hugging Face's losses."""


@dataclass(frozen=True)
class LayerConfig:
    """How to build the layers of a model.

    Attributes:
        llama: sizes of the model.
        sequence_parallel: whether the sequence is split over the tensor-parallel ranks between the split layers.
        recompute: whether a decoder layer's activations are recomputed in the backward pass instead of stored.
    """

    llama: LlamaConfig
    sequence_parallel: bool = False
    recompute: bool = False

    @property
    def megatron(self) -> ModelParallelConfig:
        """The configuration for megatron-core's layers. Weights are created on the CPU and filled by name later."""
        return ModelParallelConfig(
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            sequence_parallel=self.sequence_parallel,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )

    def column(self, inputs: int, outputs: int, bias: bool = False) -> ColumnParallelLinear:
        """Build a linear layer whose outputs are split over the ranks. Its input must come from :meth:`entering`.

        Args:
            inputs: width of the whole input.
            outputs: width of the whole output.
            bias: whether it has a bias.
        """
        config = self.megatron
        config.sequence_parallel = False  # the input is gathered once for several layers
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=config,
            init_method=nn.Identity(),
            bias=bias,
            gather_output=False,
            disable_grad_reduce=True,
        )

    def row(self, inputs: int, outputs: int, bias: bool = False) -> RowParallelLinear:
        """Build a linear layer whose inputs are split over the ranks.

        Args:
            inputs: width of the whole input.
            outputs: width of the whole output.
            bias: whether it has a bias.
        """
        layer = RowParallelLinear(
            inputs,
            outputs,
            config=self.megatron,
            init_method=nn.Identity(),
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        if bias and self.sequence_parallel:
            layer.bias.register_hook(_summed_over_tensor_ranks)
        return layer

    def entering(self, hidden: Tensor) -> Tensor:
        """Prepare the input of layers whose outputs are split: the whole sequence, the same on every rank."""
        entered: Tensor
        if self.sequence_parallel:
            entered = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            entered = copy_to_tensor_model_parallel_region(hidden)
        return entered


class Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    """The token embedding, with the vocabulary split over the ranks."""

    def __init__(self, config: LayerConfig) -> None:
        llama = config.llama
        super().__init__(llama.vocab_size, llama.hidden_size, init_method=nn.Identity(), config=config.megatron)
        self._layer_config = config

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids, ``batch x sequence``, to hidden states."""
        hidden: Tensor = super().forward(ids).transpose(0, 1).contiguous()
        if self._layer_config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        return hidden


class Norm(LlamaRMSNorm):  # type: ignore[misc]
    """Hugging Face's RMSNorm. With sequence parallelism, its partial gradients are summed over the ranks."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config.llama.hidden_size, eps=config.llama.rms_norm_eps)
        if config.sequence_parallel:
            self.weight.register_hook(_summed_over_tensor_ranks)


def _summed_over_tensor_ranks(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries, with the heads split over the ranks."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        llama = config.llama
        ranks, hidden = parallel_state.get_tensor_model_parallel_world_size(), llama.hidden_size
        self._layer_config, self._head = config, llama.head_dim
        self._queries_per_key = llama.num_attention_heads // llama.num_key_value_heads
        self._heads = llama.num_attention_heads // ranks
        # In a list, so that casting the model does not cast its fp32 frequencies.
        self._rotary = [LlamaRotaryEmbedding(llama)]
        keys = llama.num_key_value_heads * self._head
        self.q_proj = config.column(hidden, llama.num_attention_heads * self._head, llama.attention_bias)
        self.k_proj = config.column(hidden, keys, llama.attention_bias)
        self.v_proj = config.column(hidden, keys, llama.attention_bias)
        self.o_proj = config.row(llama.num_attention_heads * self._head, hidden, llama.attention_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states to the attention output, both ``sequence x batch x hidden``."""
        hidden = self._layer_config.entering(hidden)
        query, key, value = (
            self._by_head(projection(hidden)[0]) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(0)
        query, key = apply_rotary_pos_emb(query, key, *self._rotary[0](hidden, positions))
        key, value = repeat_kv(key, self._queries_per_key), repeat_kv(value, self._queries_per_key)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.permute(2, 0, 1, 3).reshape(hidden.shape[0], hidden.shape[1], self._heads * self._head)
        output: Tensor = self.o_proj(mixed)[0]
        return output

    def _by_head(self, projected: Tensor) -> Tensor:
        """Reshape ``sequence x batch x (heads * head)`` to ``batch x heads x sequence x head``."""
        return projected.view(*projected.shape[:2], -1, self._head).permute(1, 2, 0, 3)


class MLP(nn.Module):
    """The feed-forward layer ``down(act(gate x) * up x)``, with its inner units split over the ranks."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        llama = config.llama
        self._layer_config, self._act = config, ACT2FN[llama.hidden_act]
        self.gate_proj = config.column(llama.hidden_size, llama.intermediate_size, llama.mlp_bias)
        self.up_proj = config.column(llama.hidden_size, llama.intermediate_size, llama.mlp_bias)
        self.down_proj = config.row(llama.intermediate_size, llama.hidden_size, llama.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states to the layer's output, both ``sequence x batch x hidden``."""
        hidden = self._layer_config.entering(hidden)
        output: Tensor = self.down_proj(self._act(self.gate_proj(hidden)[0]) * self.up_proj(hidden)[0])[0]
        return output


class DecoderLayer(nn.Module):
    """One decoder layer: attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self._recompute = config.recompute
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config)
        self.post_attention_layernorm = Norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states to hidden states, ``sequence x batch x hidden``."""
        if self._recompute and self.training:
            recomputed: Tensor = checkpoint(self._forward, hidden, use_reentrant=False)
            return recomputed
        return self._forward(hidden)

    def _forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Head(nn.Module):
    """The output layer, with the vocabulary split over the ranks."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self._layer_config = config
        self.projection = config.column(config.llama.hidden_size, config.llama.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states to this rank's share of the logits, ``sequence x batch x vocabulary / ranks``."""
        logits: Tensor = self.projection(self._layer_config.entering(hidden))[0]
        return logits


def tied_head(embedding: Embedding, hidden: Tensor) -> Tensor:
    """This rank's share of the logits, as in :class:`Head`, computed with the weight of the embedding."""
    return nn.functional.linear(embedding._layer_config.entering(hidden), embedding.weight)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over all tokens except the first of each sequence.

    Args:
        logits: this rank's share of the logits; see :class:`Head`.
        labels: token ids, ``batch x sequence``; tokens with label -100 are ignored.

    Returns:
        A scalar, the same on every tensor-parallel rank.
    """
    targets = labels.T[1:]
    counts = targets != IGNORED
    losses: Any = vocab_parallel_cross_entropy(logits[:-1].float(), targets.masked_fill(~counts, 0).contiguous())
    mean: Tensor = (losses * counts).sum() / counts.sum()
    return mean
