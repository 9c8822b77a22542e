"""Trials of faults: what a run does when it is killed, its files are damaged, or its configuration is wrong.

``python -m benchmarks.faults`` runs all of them; ``tests/faults`` runs a selection.
"""
