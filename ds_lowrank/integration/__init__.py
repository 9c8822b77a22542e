"""Tensor and pipeline parallelism beside ZeRO: the grid, and what DeepSpeed's engines need to be right on it."""
