"""Fine-tuning of Hugging Face checkpoints: `model` and `tasks` make what the loop in `training` runs."""
