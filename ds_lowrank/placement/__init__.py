"""Reads what DeepSpeed and Megatron did to parameters; the only reader of their private attributes."""
