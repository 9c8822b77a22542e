"""Low-rank adapters on frozen weights: GradNormLoRP's parametrization, and LoRA as a baseline."""
