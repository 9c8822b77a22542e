"""One ``torch.optim.Optimizer`` for every method; it works with or without an engine.

Entry points are the classes of :mod:`ds_lowrank.optimizer.optimizers`; the order of a step is in
:mod:`ds_lowrank.optimizer.step`.
"""
