"""Everything that a training run consists of besides the optimizer: configuration, data, loop, metrics, output."""
