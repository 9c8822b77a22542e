"""What autograd saves of a LLaMA's forward pass, and what a pass holds at its fullest moment.

Of one decoder layer, for t tokens (micro-batch x sequence) in weights of w bytes on one of T tensor-parallel ranks,
with H the hidden size, I the intermediate size, A and K the widths of all query and of all key heads, and h query
heads:

    2 norms           2 t (H (4 + w + w) + 4)     the input in fp32, the normalized and the scaled output, the root
    attention         w t (2 A + 2 K) / T + 4 t h / T     queries, keys, values, output; the logarithm of the sums
    MLP               4 w t I / T                 gate, its activation, up, their product

Scores of attention are never stored (torch's fused kernels). Where megatron-core's layers have several key heads on a
rank, and fewer than query heads, the repeated keys and values are stored, A instead of K. After the last layer come
another norm and the softmax of the logits in fp32, 4 t V / T. With checkpointing a layer keeps its input, w t H, and
one layer at a time is recomputed.

Besides what is saved, the loss holds the logits in two precisions or its gradient in two, and a layer's backward pass
the gradients of its widest tensors. All are bytes of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one pipeline stage on one rank.

    Attributes:
        saved: by the layers of the stage, of one micro-batch.
        layer: by one decoder layer that is not checkpointed.
        loss: by the last norm and the loss; 0 before the last stage.
        working: temporary tensors of a layer's backward pass.
        at_the_loss: temporary tensors of the loss.
        in_flight: micro-batches whose activations are kept at a time; more than one in a pipeline.
        is_checkpointed: whether a layer keeps its input only.
    """

    saved: int
    layer: int
    loss: int
    working: int
    at_the_loss: int
    in_flight: int = 1
    is_checkpointed: bool = False

    @property
    def peak(self) -> int:
        """At the fullest moment: at the loss, or in the last layer's backward pass."""
        recomputed = self.layer if self.is_checkpointed else 0
        at_the_loss = self.loss + self.at_the_loss if self.loss else 0
        return self.in_flight * self.saved + max(at_the_loss, recomputed + self.working)

    @property
    def at_the_end(self) -> int:
        """While the first layer's gradients are taken, with nothing else left of the micro-batch."""
        return (self.in_flight - 1) * self.saved + self.layer + self.working


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro-batch on one rank.

    Attributes:
        micro: sequences.
        sequence: tokens of each.
        weight: bytes of a weight and of an activation.
        tensor: over how many ranks a layer is split.
        checkpointing: whether a layer's activations are recomputed.
    """

    micro: int
    sequence: int
    weight: int
    tensor: int = 1
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.micro * self.sequence


def activations(config: LlamaConfig, one: Pass, layers: int, has_loss: bool, in_flight: int = 1) -> Activations:
    """Bytes of a stage's activations.

    Args:
        config: sizes of the model.
        one: the pass.
        layers: decoder layers of the stage.
        has_loss: whether the stage ends with the loss.
        in_flight: micro-batches whose activations are kept at a time.
    """
    layer, kept = layer_bytes(config, one), one.weight * one.tokens * config.hidden_size
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim) // one.tensor
    logits = one.tokens * config.vocab_size // one.tensor
    return Activations(
        saved=layers * (kept if one.checkpointing else layer),
        layer=layer,
        loss=norm_bytes(config, one) + 4 * logits if has_loss else 0,
        working=one.weight * one.tokens * (2 * widest + config.hidden_size),
        at_the_loss=8 * logits,
        in_flight=in_flight,
        is_checkpointed=one.checkpointing,
    )


def norm_bytes(config: LlamaConfig, one: Pass) -> int:
    """Bytes that are saved by a norm and by the layer after it.

    Args:
        config: sizes of the model.
        one: the pass.
    """
    return one.tokens * (int(config.hidden_size) * (4 + 2 * one.weight) + 4)


def layer_bytes(config: LlamaConfig, one: Pass) -> int:
    """Bytes that are saved by a decoder layer that is not checkpointed.

    Args:
        config: sizes of the model.
        one: the pass.
    """
    heads, keys = int(config.num_attention_heads), int(config.num_key_value_heads)
    is_repeated = one.tensor > 1 and keys < heads and keys // one.tensor > 1
    widths = 2 * heads + 2 * (heads if is_repeated else keys)
    attention = one.tokens * (one.weight * widths * int(config.head_dim) + 4 * heads) // one.tensor
    mlp = 4 * one.weight * one.tokens * int(config.intermediate_size) // one.tensor
    return 2 * norm_bytes(config, one) + attention + mlp
