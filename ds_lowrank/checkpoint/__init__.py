"""Checkpoints of a run, and trained models exported as Hugging Face folders."""
