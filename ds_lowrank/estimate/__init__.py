"""What a run needs on every kind of rank, and what it sends, before anything is built.

Nothing is allocated: the model, the optimizer's states and its steps are on the meta device, where the code of a run
makes them. What DeepSpeed keeps follows its rules, and activations follow a formula that tests compare with autograd.
"""
