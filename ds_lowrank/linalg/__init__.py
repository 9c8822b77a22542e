"""Tensors in, tensors out; no process groups."""
