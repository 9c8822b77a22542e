"""A linear layer whose weight is a magnitude times a direction with a low-rank update (arXiv 2412.19616).

    W = g * V / |V|,   V = W0 + s B A

W0 is frozen; A, B and g are trained. |V| is the norm of every row of V (one magnitude per output unit) or of every
column. Gradients are those of the full formula, unless ``detach_norm`` treats |V| as a constant, as DoRA in peft does.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_lowrank.linalg.sketch import name_hash
from ds_lowrank.placement.marks import is_partitioned

NormAxis = Literal["output", "input"]


class AdapterLinear(torch.nn.Module):
    """A linear layer with the m x n weight W = g * (W0 + s B A) / |W0 + s B A|.

    At first it computes the same as the layer that it replaces: B is zero and g contains the norms of W0. A is uniform
    in +-1/sqrt(n), as in peft's LoRA.

    Args:
        linear: the layer to replace; its weight and bias become this module's own and are frozen.
        name: the name of the layer in its model, which seeds A together with ``seed``.
        rank: rank r of the update, at most m and n.
        alpha: the scale of the update is s = alpha / r.
        dropout: dropout probability on the input of A. The norm is still that of the whole V.
        norm_axis: ``output`` for one magnitude per row of the weight, ``input`` for one per column.
        seed: seed of A.
        detach_norm: whether |V| counts as a constant in the backward pass; the forward pass is the same.

    Attributes:
        weight: W0, m x n, frozen.
        bias: the bias, m numbers, frozen, or None.
        lora_A: A, r x n.
        lora_B: B, m x r.
        magnitude: g, m numbers (``output``) or n numbers (``input``).
        scaling: s.
        norm_axis: which units have a magnitude.
        detach_norm: whether |V| is left out of the gradients of A and B.
        in_features: n.
        out_features: m.
        rank: r.
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
        detach_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.scaling, self.norm_axis, self.detach_norm = rank, alpha / rank, norm_axis, detach_norm
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)
        self.lora_A = self._parameter(_uniform(seed, name, rank, self.in_features))
        self.lora_B = self._parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device="cpu"))
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
        """Apply the layer to ``inputs`` (... x n); the result is ... x m.

        W is not formed: a row's factor g / |V| scales the output, a column's factor scales the input.
        """
        factor = self._factor()
        if self.norm_axis == "input":
            inputs = inputs * factor.to(inputs.dtype)
        low = F.linear(self.dropout(inputs), self.lora_A) * self.scaling
        outputs = F.linear(inputs, self.weight) + F.linear(low, self.lora_B)
        if self.norm_axis == "output":
            outputs = outputs * factor.to(outputs.dtype)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def _factor(self) -> Tensor:
        """The factor g / |V|, in fp32 or fp64; 1 where V is zero, so that V gets a gradient and can leave zero."""
        factors: list[Tensor] = [self.lora_A, self.lora_B]
        if self.detach_norm:
            factors = [factor.detach() for factor in factors]
        squares: Tensor = DirectionNorms.apply(  # type: ignore[no-untyped-call]
            self.weight, *factors, self._base_squares(), self.scaling, self.norm_axis
        )
        # Where B A cancels W0, rounding can make the square negative.
        alive = squares > 0
        norms = torch.where(alive, squares, 1.0).sqrt()
        return torch.where(alive, self.magnitude.to(norms.dtype) / norms, 1.0)

    def _base_squares(self) -> Tensor:
        """Squared norms of the current W0 in fp32. They change when the module is cast to bf16.

        They are not a buffer, as casting the module would round it. They are cached as long as the weight is the same
        unmodified tensor. At ZeRO 3 that cannot be checked, as DeepSpeed gathers the weight for every forward pass.
        """
        weight = self.weight.detach()
        if is_partitioned(self.weight):
            return squared_norms(weight, self._dim)
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._remembered is None or self._remembered[0] != state:
            self._remembered = (state, squared_norms(weight, self._dim))
        return self._remembered[1]

    def merged(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor) -> Tensor:
        """Compute this layer's W from gathered parameters.

        Args:
            weight: W0, m x n.
            lora_a: A, r x n.
            lora_b: B, m x r.
            magnitude: g, m or n numbers.

        Returns:
            W, m x n, in the dtype of ``weight``; computed in fp32 (or in fp64 for an fp64 weight).
        """
        dtype = _norm_dtype(weight)
        with torch.autocast(weight.device.type, enabled=False):
            direction = weight.to(dtype) + self.scaling * (lora_b.to(dtype) @ lora_a.to(dtype))
        norms = torch.linalg.vector_norm(direction, dim=self._dim)
        alive = norms > 0
        factor = torch.where(alive, magnitude.to(dtype) / torch.where(alive, norms, 1.0), 1.0)
        return (direction * factor.unsqueeze(self._dim)).to(weight.dtype)

    def extra_repr(self) -> str:
        """Sizes and settings, for the module's ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, scaling={self.scaling:g}, norm_axis={self.norm_axis!r}, "
            f"detach_norm={self.detach_norm}"
        )


class DirectionNorms(torch.autograd.Function):
    """The squared norms of the rows (or columns) of V = W0 + s B A, computed without forming V.

    |V_i|^2 = |W0_i|^2 + 2 s B_i (W0 A^T)_i^T + s^2 B_i (A A^T) B_i^T

    Columns are the rows of V^T = W0^T + s A^T B^T. Plain autograd would save a transposed view of W0, which at ZeRO 3
    would keep the gathered W0 in memory. This function saves the parameter itself.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, lora_a: Tensor, lora_b: Tensor, base: Tensor, scaling: float, norm_axis: NormAxis
    ) -> Tensor:
        """Compute the squared norms.

        Args:
            ctx: autograd's context.
            weight: W0, m x n.
            lora_a: A, r x n.
            lora_b: B, m x r.
            base: the squared norms of the rows or columns of W0.
            scaling: s.
            norm_axis: ``output`` for rows, ``input`` for columns.

        Returns:
            m numbers for rows, n for columns, in the dtype of ``base``.
        """
        ctx.save_for_backward(weight, lora_a, lora_b)
        ctx.scaling, ctx.norm_axis = scaling, norm_axis
        w, own, other = _by_rows(weight, lora_a, lora_b, norm_axis)
        with torch.autocast(weight.device.type, enabled=False):
            pull = 2 * _times(other, w.T).T + scaling * (own @ (other @ other.T))
            return base + scaling * (own * pull).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of A and B, where d_i is the gradient of |V_i|^2: dB = 2 s d (V A^T) and dA = 2 s (d B)^T V."""
        s = ctx.scaling
        weight, lora_a, lora_b = ctx.saved_tensors
        w, own, other = _by_rows(weight, lora_a, lora_b, ctx.norm_axis)
        d = 2 * s * grad.unsqueeze(1)
        weighted = (d * own).T
        with torch.autocast(weight.device.type, enabled=False):
            grad_own = d * (_times(other, w.T).T + s * (own @ (other @ other.T)))
            grad_other = _times(weighted, w) + s * (weighted @ own) @ other
        grad_a, grad_b = (grad_other, grad_own) if ctx.norm_axis == "output" else (grad_own.T, grad_other.T)
        return None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None, None


def _by_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm_axis: NormAxis) -> tuple[Tensor, Tensor, Tensor]:
    """Orient W0 and the factors so that the norms are those of the rows of V = W0 + s (own @ other)."""
    dtype = _norm_dtype(weight)
    if norm_axis == "output":
        return weight, lora_b.to(dtype), lora_a.to(dtype)
    return weight.T, lora_a.T.to(dtype), lora_b.T.to(dtype)


def _times(small: Tensor, weight: Tensor) -> Tensor:
    """Compute ``small @ weight`` in the dtype of ``small`` without copying a 16-bit ``weight``.

    Sums are accumulated in fp32 and only their results are rounded to 16 bits. That is a relative error of 2^-9 in the
    cross term, which is small compared with |W0|^2. Scaling by a power of two keeps ``small`` in the range of fp16.
    """
    if small.dtype == weight.dtype:
        return small @ weight
    largest = small.abs().amax().clamp_min(torch.finfo(small.dtype).tiny)
    scale = torch.exp2(torch.log2(largest).ceil())
    product = (small / scale).to(weight.dtype) @ weight
    return product.to(small.dtype) * scale


def squared_norms(weight: Tensor, dim: int) -> Tensor:
    """Squared norms of the vectors along ``dim``, in fp32, or in fp64 for an fp64 weight."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=_norm_dtype(weight))
    return norms.square()


def _norm_dtype(weight: Tensor) -> torch.dtype:
    dtype: torch.dtype = torch.promote_types(weight.dtype, torch.float32)
    return dtype


def _uniform(seed: int, name: str, rank: int, columns: int) -> Tensor:
    """Draw a rank x columns matrix, uniform in +-1/sqrt(columns).

    It depends only on seed and name, and comes from a random stream that no sketch uses.
    """
    generator = torch.Generator("cpu").manual_seed(name_hash(seed, name, "adapter"))
    limit = 1 / float(columns) ** 0.5
    return torch.empty(rank, columns, dtype=torch.float32, device="cpu").uniform_(-limit, limit, generator=generator)
