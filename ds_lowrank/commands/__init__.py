"""``python -m ds_lowrank COMMAND``: one file a command.

Each has ``ABOUT`` (a line of help), ``add_arguments(parser)`` and ``run(arguments)``, which returns the exit code. What
is slow to import is imported by ``run``.
"""
