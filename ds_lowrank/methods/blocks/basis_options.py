"""The options of methods that store a basis."""

from __future__ import annotations

from typing import Literal

from ds_lowrank.linalg.int4 import Int4
from ds_lowrank.linalg.quantization import FP32, BFloat16, Quantizer
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import TensorSpec
from ds_lowrank.sharding.matrix import MatrixShard


class BasisOptions(Options):
    """The key that every method with a stored basis has."""

    basis_dtype: Literal["fp32", "bf16", "int4"] = "fp32"
    """How bases are stored between steps. Methods compute with them in fp32. The step that finds a basis has it as it
    was found; the steps after it have it as it is stored."""

    @property
    def basis_quantizer(self) -> Quantizer:
        """The format that ``basis_dtype`` names."""
        match self.basis_dtype:
            case "bf16":
                return BFloat16()
            case "int4":
                return Int4()
        return FP32

    def basis_spec(self, shard: MatrixShard, rank: int) -> TensorSpec:
        """The spec of a basis: compressed x rank.

        Args:
            shard: the stack.
            rank: columns of the basis.
        """
        return TensorSpec(shard.compressed, rank, self.basis_quantizer, is_basis=True)

    @property
    def block_rows(self) -> int:
        """How many consecutive rows of the state must be on one rank, because they are quantized together."""
        return max(super().block_rows, self.basis_quantizer.block_rows)
