"""A linear layer whose weight is a magnitude times a direction, the direction with a low-rank part (arXiv 2412.19616).

    W = g * V / |V|,   V = W0 + s B A

W0 is frozen; A, B and g are trained. |V| is the norm of every row of V (one magnitude an output unit) or of every
column. Unlike DoRA in peft, which takes the norm as a constant, gradients are those of the formula.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_lowrank.linalg.sketch import name_hash

NormAxis = Literal["output", "input"]


class AdapterLinear(torch.nn.Module):
    """``torch.nn.Linear`` of m x n with W = g * (W0 + s B A) / |W0 + s B A|.

    It starts as the layer that it is made from: B is zero and g the norms of W0. A is uniform in +-1/sqrt(n), as LoRA
    in peft draws it.

    Args:
        linear: the layer; its weight and bias become this module's own, frozen.
        name: of the layer in its model, which seeds A with ``seed``.
        rank: r, at most m and n.
        alpha: s = alpha / r.
        dropout: probability with which elements of the input of A are dropped. The norm is that of the whole V.
        norm_axis: ``output`` for one magnitude a row of the weight, ``input`` for one a column.

    Attributes:
        weight: W0, m x n.
        lora_A: A, r x n.
        lora_B: B, m x r.
        magnitude: g, m numbers or, by column, n.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        linear: torch.nn.Linear,
        name: str,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        norm_axis: NormAxis = "output",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.scaling, self.norm_axis = rank, alpha / rank, norm_axis
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)
        self.lora_A = self._parameter(_uniform(seed, name, rank, self.in_features))
        self.lora_B = self._parameter(torch.zeros(self.out_features, rank))
        self.magnitude = self._parameter(squared_norms(self.weight.detach(), self._dim).sqrt())
        self.dropout = torch.nn.Dropout(dropout)
        self.train(linear.training)
        self._remembered: tuple[Any, Tensor] | None = None

    def _parameter(self, value: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.to(self.weight.device, self.weight.dtype))

    @property
    def _dim(self) -> int:
        """The dimension of the weight that a norm sums over."""
        return 1 if self.norm_axis == "output" else 0

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` ... x n, the result ... x m: a row's factor g/|V| scales the output, a column's the input."""
        factor = self._factor()
        if self.norm_axis == "input":
            inputs = inputs * factor.to(inputs.dtype)
        low = F.linear(self.dropout(inputs), self.lora_A) * self.scaling
        outputs = F.linear(inputs, self.weight) + F.linear(low, self.lora_B)
        if self.norm_axis == "output":
            outputs = outputs * factor.to(outputs.dtype)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def _factor(self) -> Tensor:
        """g / |V|, fp32 or better. Where V is zero it is 1: the row is then plain V, has a gradient and can leave."""
        factors = (self.lora_A, self.lora_B)
        squares: Tensor = DirectionNorms.apply(  # type: ignore[no-untyped-call]
            self.weight, *factors, self._base_squares(), self.scaling, self.norm_axis
        )
        # Rounding can leave a negative square where B A cancels W0.
        alive = squares > 0
        norms = torch.where(alive, squares, 1.0).sqrt()
        return torch.where(alive, self.magnitude.to(norms.dtype) / norms, 1.0)

    def _base_squares(self) -> Tensor:
        """Squared norms of W0, fp32: of the weight as it is now, for a cast to bf16 changes them.

        They are no buffer, which a cast of the module would round. They are remembered while the weight is the same
        tensor unchanged; at ZeRO 3 that cannot be seen, as DeepSpeed gathers it anew for each forward.
        """
        weight = self.weight.detach()
        if hasattr(self.weight, "ds_id"):
            return squared_norms(weight, self._dim)
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._remembered is None or self._remembered[0] != state:
            self._remembered = (state, squared_norms(weight, self._dim))
        return self._remembered[1]

    def merged(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor) -> Tensor:
        """W of this layer for parameters that are given whole, m x n, computed in fp32, in the weight's dtype."""
        dtype = _norm_dtype(weight)
        direction = weight.to(dtype) + self.scaling * (lora_b.to(dtype) @ lora_a.to(dtype))
        norms = torch.linalg.vector_norm(direction, dim=self._dim)
        alive = norms > 0
        factor = torch.where(alive, magnitude.to(dtype) / torch.where(alive, norms, 1.0), 1.0)
        return (direction * factor.unsqueeze(self._dim)).to(weight.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, scaling={self.scaling:g}, norm_axis={self.norm_axis!r}"
        )


class DirectionNorms(torch.autograd.Function):
    """The squared norms of the rows of V = W0 + s B A (or of its columns), without V.

    |V_i|^2 = |W0_i|^2 + 2 s B_i (W0 A^T)_i^T + s^2 B_i (A A^T) B_i^T

    Columns are the rows of V^T = W0^T + s A^T B^T. Autograd could do it, but not without holding at ZeRO 3 on to the
    gathered W0, of which it saves a transposed view; here the parameter itself is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, lora_a: Tensor, lora_b: Tensor, base: Tensor, scaling: float, norm_axis: NormAxis
    ) -> Tensor:
        """``weight`` m x n, ``lora_a`` r x n, ``lora_b`` m x r, ``base`` the squared norms of W0; m (n) numbers."""
        ctx.save_for_backward(weight, lora_a, lora_b)
        ctx.scaling, ctx.norm_axis = scaling, norm_axis
        w, own, other = _by_rows(weight, lora_a, lora_b, norm_axis)
        with torch.autocast(weight.device.type, enabled=False):
            pull = 2 * _times(other, w.T).T + scaling * (own @ (other @ other.T))
            return base + scaling * (own * pull).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With d_i the gradient of |V_i|^2: that of B is 2 s d (V A^T), that of A is 2 s (d B)^T V."""
        s = ctx.scaling
        weight, lora_a, lora_b = ctx.saved_tensors
        w, own, other = _by_rows(weight, lora_a, lora_b, ctx.norm_axis)
        d = 2 * s * grad.unsqueeze(1)
        grad_own = d * (_times(other, w.T).T + s * (own @ (other @ other.T)))
        weighted = (d * own).T
        grad_other = _times(weighted, w) + s * (weighted @ own) @ other
        grad_a, grad_b = (grad_other, grad_own) if ctx.norm_axis == "output" else (grad_own.T, grad_other.T)
        return None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None, None


def _by_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm_axis: NormAxis) -> tuple[Tensor, Tensor, Tensor]:
    """W0, and the factors with a row and with a column for each norm's vector, so that V = W0 + s (own other)."""
    dtype = _norm_dtype(weight)
    if norm_axis == "output":
        return weight, lora_b.to(dtype), lora_a.to(dtype)
    return weight.T, lora_a.T.to(dtype), lora_b.T.to(dtype)


def _times(small: Tensor, weight: Tensor) -> Tensor:
    """``small @ weight`` in the dtype of ``small``, where ``weight`` may have 16 bits and no copy of it is made.

    The sums are fp32 and only their results are rounded to 16 bits: an error of 2^-9 of the cross term, which is small
    beside |W0|^2. A power of two keeps ``small`` in the range of fp16.
    """
    if small.dtype == weight.dtype:
        return small @ weight
    largest = small.abs().amax().clamp_min(torch.finfo(small.dtype).tiny)
    scale = torch.exp2(torch.log2(largest).ceil())
    product = (small / scale).to(weight.dtype) @ weight
    return product.to(small.dtype) * scale


def squared_norms(weight: Tensor, dim: int) -> Tensor:
    """Squared norms over ``dim``, summed in fp32, or in fp64 for an fp64 weight."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=_norm_dtype(weight))
    return norms.square()


def _norm_dtype(weight: Tensor) -> torch.dtype:
    dtype: torch.dtype = torch.promote_types(weight.dtype, torch.float32)
    return dtype


def _uniform(seed: int, name: str, rank: int, columns: int) -> Tensor:
    """rank x columns in +-1/sqrt(columns): a function of seed and name, from a stream that no sketch is drawn from."""
    generator = torch.Generator().manual_seed(name_hash(seed, name, "adapter"))
    limit = 1 / float(columns) ** 0.5
    return torch.empty(rank, columns).uniform_(-limit, limit, generator=generator)
