"""Fine-tuning Hugging Face checkpoints: model, data, tasks and metrics for the loop in ``training``."""
