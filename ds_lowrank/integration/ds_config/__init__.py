"""The one reading of a DeepSpeed configuration: ``read`` reads files, ``validate`` checks, ``values`` says what is set.

``schema`` has the keys and types of every block: DeepSpeed's own classes where it has them. ``structure`` compares a
configuration with them; ``optimizer_block`` and ``scheduler_block`` check what these two blocks name.
"""
