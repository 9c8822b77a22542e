"""Benchmarks and the numbers of docs/results.md: ``python -m benchmarks.NAME``; see README.md here."""
