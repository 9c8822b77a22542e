"""Tokens per second of two ranks over a thin wire, and the bytes that they send.

python -m benchmarks.thin_wire

Needs root. Rank 0 is in one network namespace and rank 1 in another; a veth pair joins them, and a token bucket at each
end lets 100 Mbit/s through each way, then 1 Gbit/s; then there is none. No delay is added. Each rank has one core and
one thread. Contenders with equally many micro-batches are in the same two processes with the same weights and text,
take turns step by step, and are timed from the start of a step until both ranks have ended it, in fp32, without
clipping. A contender that this version of the package refuses is listed with the reason.

*MB sent* is what the busier rank's interface has sent in an ordinary step, TCP/IP's headers included; *wire s* is how
long that takes at the wire's rate. *MB with a refresh* is the first step of a method that computes bases. PowerSGD runs
under DDP with AdamW, error feedback and warm start; its gradients are approximations, so with --losses the contenders
then train for some steps, without a limit: *loss* is the mean of the last fifth, *s to AdamW's at half* how long a
contender takes at a rate, by its median, until a mean of as many steps is what AdamW at ZeRO 1 has after half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Numbers, hardware, options, provenance, table, write_json
from benchmarks.thin_wire.contenders import Contender, contenders
from benchmarks.thin_wire.race import Race
from benchmarks.thin_wire.ranks import Ranks
from benchmarks.thin_wire.tables import loss_rows, speed_rows
from benchmarks.thin_wire.wire import ADDRESSES, Wire, missing

MODEL = Path(__file__).parents[2] / "ds_configs/models/llama_60m.json"
VOCABULARY = 4096
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
RATES = (100.0, 1000.0, 0.0)
PROBE_NUMBERS = 2**20
"""fp32 numbers of a rank that a collective is tried with: 4 MiB."""


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s each way; 0 for no limit")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each contender at each rate")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="contenders whose names contain one")
    parser.add_argument("--losses", type=int, default=0, metavar="STEPS", help="then train so long, for the losses")
    return parser.parse_args()


def heats(words: Sequence[str]) -> list[list[Contender]]:
    """Return the contenders whose names contain one of the words, those with as many micro-batches together.

    Only these are compared with one another, and only these have to fit into memory together.
    """
    chosen = [one for one in contenders() if any(word in one.name for word in words)]
    counts = sorted({one.micro_batches for one in chosen})
    return [[one for one in chosen if one.micro_batches == count] for count in counts]


def main() -> int:
    """Measure, print and record; the exit code says whether the machine can have a wire."""
    arguments = parse()
    lacking = missing()
    if lacking is not None:
        print(f"python -m benchmarks.thin_wire {lacking}", file=sys.stderr)
        return 1
    model: dict[str, Any] = json.loads(MODEL.read_text()) | {"vocab_size": VOCABULARY}
    load = os.getloadavg()[0]
    rates, repeats, numbers = arguments.rates, arguments.repeats, PROBE_NUMBERS
    if arguments.quick:
        model, rates, repeats, numbers = model | SMALL, [100.0], 1, 2**12
    tables: dict[str, Numbers] = {"numbers": [], "losses": [], "collectives": [], "refused": []}
    for heat in heats(arguments.only):
        with Wire() as wire, Ranks(wire) as ranks:
            race = Race(wire, ranks)
            race.build(heat, model, arguments.seed)
            for rate in rates:
                race.run(rate, repeats)
            if not tables["numbers"]:
                tables["collectives"] = [row for rate in rates for row in race.probe(rate, numbers)]
                race.train(arguments.losses)
                tables["losses"] = loss_rows(race.measured)
        tables["numbers"] += [row for rate in rates for row in speed_rows(race.measured, rate)]
        tables["refused"] += race.refused
    print(*(table(one) for one in tables.values() if one), sep="\n\n")
    if arguments.json is not None:
        machine = {**hardware(), "threads a process": 1, "processes": len(ADDRESSES), "load average at start": load}
        record = {**provenance("benchmarks.thin_wire", arguments), "hardware": machine, "model": model, **tables}
        write_json(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
