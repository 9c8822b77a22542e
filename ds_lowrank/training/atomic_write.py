"""Replacing a text file in one step, so that a crash or a power cut leaves either the old file or the new one."""

from __future__ import annotations

from pathlib import Path

from ds_lowrank.checkpoint.disk import flush


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name in the same folder, then rename it to ``path``.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged, and nothing is left of the temporary file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(text.encode(errors="surrogateescape"))  # so that a text can name every path
        flush(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)
