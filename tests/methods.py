"""Every method as the tests run it.

The tests iterate over the registry, ``ds_lowrank.methods.METHODS``. Each method has a row in ``tests/rows``; one
without is run with options that its model suggests (``Row.of_options``). One without a dense reference fails where it
would be compared with it, with a message that says what to add.
"""

from __future__ import annotations

from collections.abc import Callable

from ds_lowrank.methods import METHODS
from ds_lowrank.reference import DENSE, DenseMethod
from tests.rows import ROWS
from tests.rows.row import Options, Row


def of(name: str) -> Row:
    """The row of a registered method, or what its options suggest."""
    return ROWS[name] if name in ROWS else Row.of_options(METHODS[name].Options.model_fields)


def taken(name: str, changes: Options, options: Options | None = None) -> Options:
    """Those of the changes that a method has keys for, each of which goes with its other options.

    Online Subspace Descent has an interval only for a basis that is drawn.
    """
    model, given = METHODS[name].Options, options or {}

    def fits(key: str) -> bool:
        try:
            model(**{**given, key: changes[key]})
        except ValueError:
            return False
        return True

    return {key: value for key, value in changes.items() if key in model.model_fields and fits(key)}


def cases() -> list[tuple[str, Options]]:
    """Every registered method with each of its cases."""
    return [(name, options) for name in METHODS for options in of(name).cases]


def dense(name: str) -> Callable[..., DenseMethod]:
    """The dense reference of a method.

    Raises:
        LookupError: it has none; says what to add.
    """
    if name not in DENSE:
        raise LookupError(what_to_add(name))
    return DENSE[name]


def what_to_add(name: str) -> str:
    """What a new method lacks before the tests can compare it."""
    return (
        f"{name} cannot be compared yet. Write its dense reference in ds_lowrank/reference (one process, whole "
        f"matrices, the paper's equations) and add it to DENSE in ds_lowrank/reference/__init__.py. Then give {name} a "
        "row in tests/rows, with cases that reach every option"
    )
