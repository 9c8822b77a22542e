"""Who holds which elements of a matrix, and how sums travel: pure geometry, knows neither DeepSpeed nor Megatron."""
