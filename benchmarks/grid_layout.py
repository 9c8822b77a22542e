"""A LLaMA on a grid of ranks as one of them sees it: parameters, DeepSpeed's intervals, shards. No processes, no data.

The ranks that share a stage's matrices are numbered as in their process group: data-parallel rank by data-parallel
rank, tensor-parallel ranks side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ds_lowrank.methods.galore import GaLoreMethod, GaLoreOptions
from ds_lowrank.optimizer.logical_parameters import logical_parameters_of
from ds_lowrank.optimizer.matrices import Matrices
from ds_lowrank.optimizer.stack import SteppedMatrix
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.placement.kinds import Kind
from ds_lowrank.placement.parameter_names import Tag
from ds_lowrank.placement.simulated import SimulatedGrid, intervals, shard
from ds_lowrank.sharding.layout import Range

KINDS: dict[str, Kind] = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}


@dataclass(frozen=True)
class Degrees:
    """The degrees of parallelism, and the ZeRO stage: 0, 1 (2 lays out alike) or 3."""

    data: int
    tensor: int
    pipeline: int = 1
    zero: int = 1

    @property
    def sharing(self) -> int:
        """How many ranks share the matrices of one stage."""
        return self.data * self.tensor


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline stage steps.

    Attributes:
        matrices: the projected ones.
        parameters: how many parameters there are, norms included.
    """

    matrices: list[SteppedMatrix]
    parameters: int


def parameters_of(model: Mapping[str, int], degrees: Degrees, stage: int) -> list[tuple[str, torch.nn.Parameter]]:
    """A stage's parameters as they lie on a tensor-parallel rank, in the model's order, with megatron-core's marks.

    Args:
        model: sizes, under the keys of Hugging Face's configurations.
        degrees: of parallelism.
        stage: of the pipeline.
    """
    hidden, inner, vocabulary = model["hidden_size"], model["intermediate_size"], model["vocab_size"]
    layers = model["num_hidden_layers"] // degrees.pipeline
    square = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    wide = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    found = [("model.embed_tokens.weight", _split((vocabulary, hidden), 0, degrees.tensor))] if stage == 0 else []
    for number in range(stage * layers, (stage + 1) * layers):
        for name, shape in (square | wide).items():
            by_columns = name.endswith(("o_proj", "down_proj"))
            found.append((f"model.layers.{number}.{name}.weight", _split(shape, int(by_columns), degrees.tensor)))
        for name in ("input_layernorm", "post_attention_layernorm"):
            found.append((f"model.layers.{number}.{name}.weight", _on_meta(hidden)))
    if stage == degrees.pipeline - 1:
        found.append(("model.norm.weight", _on_meta(hidden)))
        found.append(("lm_head.weight", _split((vocabulary, hidden), 0, degrees.tensor)))
    return found


def _on_meta(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, device="meta"))


def _split(shape: tuple[int, int], dim: int, ranks: int) -> torch.nn.Parameter:
    return shard(_on_meta(*shape), dim, ranks)


def stage_on(
    rank: int, model: Mapping[str, int], degrees: Degrees, stage: int, options: GaLoreOptions, device: str = "meta"
) -> Stage:
    """A stage on one of the ranks that share it, with state, weights and gradients of ones.

    Args:
        rank: among those ranks.
        model: sizes, under the keys of Hugging Face's configurations.
        degrees: of parallelism.
        stage: of the pipeline.
        options: GaLore's.
        device: of state, weights and gradients. Nothing is allocated on ``meta``.
    """
    named = parameters_of(model, degrees, stage)
    held = intervals([parameter.numel() for _, parameter in named], degrees.data, degrees.zero)
    grid = SimulatedGrid(number=rank % degrees.tensor, size=degrees.tensor)
    fragments = _fragments(held[rank // degrees.tensor], torch.device(device))
    matrices, found = Matrices(GaLoreMethod, rank), list[SteppedMatrix]()
    for number, (name, parameter) in enumerate(named):
        (one,) = logical_parameters_of(parameter, Tag(name, KINDS.get(name, "weight")), {}, options, {}, grid)
        role = one.role(GaLoreMethod)
        if not role.projected:
            continue
        logical, (m, n) = one.stepped_matrix(role), one.logical.shape
        parts = [logical.part(r % degrees.tensor, *held[r // degrees.tensor][number]) for r in range(degrees.sharing)]
        found.append(matrices.projected(name, (m, n), parts, options, fragments[number]))
    matrices.make_states()
    for state in (matrix.state for matrix in found):
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.fill_(1)
    return Stage(found, len(named))


def _fragments(held: Sequence[Range], device: torch.device) -> list[Fragment]:
    """A rank's elements of every parameter behind one another in one store, with gradients of ones."""
    ends = list(accumulate(high - low for low, high in held))
    store = torch.ones(ends[-1], dtype=torch.float32, device=device)
    store.grad = torch.ones_like(store)
    return [Fragment(store, ((end - (high - low), end),)) for (low, high), end in zip(held, ends, strict=True)]
