"""The GPU entry, ``python -m benchmarks.gpu``: tests, agreement with the CPU, times and memory on one card."""
