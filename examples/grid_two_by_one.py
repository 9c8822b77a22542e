"""Train one model split over two tensor-parallel ranks (a grid of 2 x 1: tensor 2, pipeline 1) at ZeRO 1.

    deepspeed --num_gpus 2 examples/grid_two_by_one.py
    deepspeed --num_gpus 1 examples/grid_two_by_one.py    # the whole model on one rank: prints the same losses

The layers are megatron-core's. A split matrix is projected as the whole matrix. Runs on a CPU in seconds. Needs
``pip install ".[train,megatron]"``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.nn.functional import gelu, mse_loss

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "optimizer": {"type": "GaLore", "params": {"lr": 0.01, "rank": 8, "update_proj_gap": 20}},
    "zero_optimization": {"stage": 1},
}


class Perceptron(torch.nn.Module):
    """``up`` (128 x 32) is split by rows, ``down`` (16 x 128) by columns, over the tensor-parallel ranks."""

    def __init__(self, tensor: int) -> None:
        super().__init__()
        config = ModelParallelConfig(tensor_model_parallel_size=tensor, use_cpu_initialization=True)
        common = {"config": config, "init_method": torch.nn.init.xavier_normal_, "bias": False}
        self.up = ColumnParallelLinear(32, 128, gather_output=False, **common)
        self.down = RowParallelLinear(128, 16, input_is_parallel=True, skip_bias_add=False, **common)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` ... x 32, the result ... x 16, the same on all tensor-parallel ranks."""
        outputs: torch.Tensor = self.down(gelu(self.up(inputs)[0]))[0]
        return outputs


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 64 samples of a step: the ranks of one model see the same."""
    teacher = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 32**0.5
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(1 + step))
    return inputs, torch.tanh(inputs @ teacher)


def train(steps: int = 100) -> torch.nn.Module:
    """Train, print the loss, and return this rank's part of the model."""
    tensor = dist.get_world_size()
    mpu = ds_lowrank.make_grid(tensor=tensor, pipeline=1)
    torch.manual_seed(0)
    model = Perceptron(tensor)
    engine, *_ = ds_lowrank.initialize(model=model, mpu=mpu, config=CONFIG)
    for step in range(steps):
        inputs, targets = (part.to(engine.device) for part in batch(step))

        def forward(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            return mse_loss(engine(inputs), targets)

        (loss,) = ds_lowrank.forward_backward(engine, forward)
        engine.step()
        if dist.get_rank() == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {loss.item():.4f}")
    return model


if __name__ == "__main__":
    join()  # deepspeed or torchrun; on GPUs where there are any
    train()
    leave()
