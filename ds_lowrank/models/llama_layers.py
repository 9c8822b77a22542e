"""The layers of a LLaMA, split over tensor-parallel ranks by megatron-core: what Hugging Face's compute, on shards.

Hidden states are ``sequence x batch x hidden``, with sequence parallelism this rank's part of the sequence. Parameters
have Hugging Face's names within a layer. Queries, keys and values (gate and up) read one copy of their input, whose
gradient is summed over the ranks once for all of them.
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
"""A label that does not count, as in Hugging Face's losses."""


@dataclass(frozen=True)
class LayerConfig:
    """What every layer is built from.

    Attributes:
        llama: sizes.
        sequence_parallel: whether the ranks share out the sequence between the split layers.
        recompute: whether a decoder layer's activations are computed again in the backward pass instead of kept.
    """

    llama: LlamaConfig
    sequence_parallel: bool = False
    recompute: bool = False

    @property
    def megatron(self) -> ModelParallelConfig:
        """Weights are made on the CPU and filled by name afterwards."""
        return ModelParallelConfig(
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            sequence_parallel=self.sequence_parallel,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )

    def column(self, inputs: int, outputs: int, bias: bool = False) -> ColumnParallelLinear:
        """A linear layer whose outputs are split; its input comes from :meth:`entering`."""
        config = self.megatron
        config.sequence_parallel = False  # gathered once for several layers
        return ColumnParallelLinear(
            *(inputs, outputs),
            config=config,
            init_method=nn.Identity(),
            bias=bias,
            gather_output=False,
            disable_grad_reduce=True,
        )

    def row(self, inputs: int, outputs: int, bias: bool = False) -> RowParallelLinear:
        """A linear layer whose inputs are split."""
        layer = RowParallelLinear(
            *(inputs, outputs),
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
        """The whole sequence, the same on every rank, on the way into layers whose outputs are split."""
        entered: Tensor
        if self.sequence_parallel:
            entered = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            entered = copy_to_tensor_model_parallel_region(hidden)
        return entered


class Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Token ids, ``batch x sequence``, to hidden states."""

    def __init__(self, recipe: LayerConfig) -> None:
        llama = recipe.llama
        super().__init__(llama.vocab_size, llama.hidden_size, init_method=nn.Identity(), config=recipe.megatron)
        self._recipe = recipe

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = super().forward(ids).transpose(0, 1).contiguous()
        if self._recipe.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        return hidden


class Norm(LlamaRMSNorm):  # type: ignore[misc]
    """Hugging Face's RMSNorm. On a part of the sequence its gradient is a part too, and is summed over the ranks."""

    def __init__(self, recipe: LayerConfig) -> None:
        super().__init__(recipe.llama.hidden_size, eps=recipe.llama.rms_norm_eps)
        if recipe.sequence_parallel:
            self.weight.register_hook(_summed_over_tensor_ranks)


def _summed_over_tensor_ranks(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries; each rank has some of the heads."""

    def __init__(self, recipe: LayerConfig) -> None:
        super().__init__()
        llama = recipe.llama
        ranks, hidden = parallel_state.get_tensor_model_parallel_world_size(), llama.hidden_size
        self._recipe, self._head = recipe, llama.head_dim
        self._queries_per_key = llama.num_attention_heads // llama.num_key_value_heads
        self._heads = llama.num_attention_heads // ranks
        # In a list, so that casting the model leaves its frequencies in fp32.
        self._rotary = [LlamaRotaryEmbedding(llama)]
        keys = llama.num_key_value_heads * self._head
        self.q_proj = recipe.column(hidden, llama.num_attention_heads * self._head, llama.attention_bias)
        self.k_proj = recipe.column(hidden, keys, llama.attention_bias)
        self.v_proj = recipe.column(hidden, keys, llama.attention_bias)
        self.o_proj = recipe.row(llama.num_attention_heads * self._head, hidden, llama.attention_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self._recipe.entering(hidden)
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
        """``sequence x batch x (heads * head)`` to ``batch x heads x sequence x head``."""
        return projected.view(*projected.shape[:2], -1, self._head).permute(1, 2, 0, 3)


class MLP(nn.Module):
    """``down(act(gate x) * up x)``; each rank has some of the inner units."""

    def __init__(self, recipe: LayerConfig) -> None:
        super().__init__()
        llama = recipe.llama
        self._recipe, self._act = recipe, ACT2FN[llama.hidden_act]
        self.gate_proj = recipe.column(llama.hidden_size, llama.intermediate_size, llama.mlp_bias)
        self.up_proj = recipe.column(llama.hidden_size, llama.intermediate_size, llama.mlp_bias)
        self.down_proj = recipe.row(llama.intermediate_size, llama.hidden_size, llama.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self._recipe.entering(hidden)
        output: Tensor = self.down_proj(self._act(self.gate_proj(hidden)[0]) * self.up_proj(hidden)[0])[0]
        return output


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, recipe: LayerConfig) -> None:
        super().__init__()
        self._recompute = recipe.recompute
        self.self_attn = Attention(recipe)
        self.mlp = MLP(recipe)
        self.input_layernorm = Norm(recipe)
        self.post_attention_layernorm = Norm(recipe)

    def forward(self, hidden: Tensor) -> Tensor:
        if self._recompute and self.training:
            recomputed: Tensor = checkpoint(self._forward, hidden, use_reentrant=False)
            return recomputed
        return self._forward(hidden)

    def _forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Head(nn.Module):
    """Hidden states to this rank's share of the logits, ``sequence x batch x vocabulary / ranks``."""

    def __init__(self, recipe: LayerConfig) -> None:
        super().__init__()
        self._recipe = recipe
        self.projection = recipe.column(recipe.llama.hidden_size, recipe.llama.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.projection(self._recipe.entering(hidden))[0]
        return logits


def tied_head(embedding: Embedding, hidden: Tensor) -> Tensor:
    """The same with the weight of the embedding."""
    return nn.functional.linear(embedding._recipe.entering(hidden), embedding.weight)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of every token but the first, the same on every tensor-parallel rank.

    Args:
        logits: this rank's share; see :class:`Head`.
        labels: token ids, ``batch x sequence``; -100 does not count.
    """
    targets = labels.T[1:]
    counts = targets != IGNORED
    losses: Any = vocab_parallel_cross_entropy(logits[:-1].float(), targets.masked_fill(~counts, 0).contiguous())
    mean: Tensor = (losses * counts).sum() / counts.sum()
    return mean
