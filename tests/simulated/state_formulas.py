"""The documented formulas of state, as functions of a matrix's two dimensions."""

from fractions import Fraction

from ds_lowrank.methods import METHODS
from tests.methods import of
from tests.unit.pages import state_rows


def _state_formula(method, options, text):
    def formula(kept, compressed):
        r = METHODS[method].rank((kept, compressed), METHODS[method].Options(**options))
        c = Fraction(options.get("granularity", 1))
        return eval(text, {"D": kept, "d": compressed, "r": r, "c": c})

    return formula


STATE = [
    (method, of_costs, _state_formula(method, of_costs, text))
    for method, changes, text in state_rows()
    if not {"m", "n"} & set(text)
    for of_costs in [of(method).cost_options(changes)]
]
