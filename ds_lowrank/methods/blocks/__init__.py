"""What several papers share: options, state, bases, inner optimizers, probe directions. No file here is one paper."""
