"""``python -m benchmarks.thin_wire`` on a small model: a real wire, and what is known to be sent over it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.thin_wire.__main__ import SMALL, VOCABULARY
from benchmarks.thin_wire.contenders import Contender
from benchmarks.thin_wire.race import Measured, Race
from benchmarks.thin_wire.ranks import Ranks
from benchmarks.thin_wire.tables import loss_rows, speed_rows
from benchmarks.thin_wire.wire import Wire, missing
from tests.unit.pages import ROOT

LACKING = missing()
CHOSEN = ("AdamW, ZeRO 1", "AdamW, DDP", "PowerSGD 4, DDP", "PowerSGD 4, DDP, x 4")
BURST = 32 * 1024
"""Bytes that the token bucket lets through at once."""


def shapes():
    """The small model's parameters."""
    hidden, inner = SMALL["hidden_size"], SMALL["intermediate_size"]
    layer = [*[(hidden, hidden)] * 4, *[(inner, hidden)] * 2, (hidden, inner), (hidden,), (hidden,)]
    return [(VOCABULARY, hidden), *layer * SMALL["num_hidden_layers"], (hidden,), (VOCABULARY, hidden)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("wire") / "found.json"
    command = [sys.executable, "-m", "benchmarks.thin_wire", "--quick", "--losses", "3", "--json", str(file), "--only"]
    done = subprocess.run([*command, *CHOSEN], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_what_is_sent_is_what_the_algorithms_send(found):
    rows = {row["contender"]: row for row in found["numbers"]}
    numel = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes())
    power = sum(4 * sum(shape) if len(shape) == 2 else shape[0] for shape in shapes())
    # On two ranks a ring all-reduce sends as many bytes as there are, and ZeRO 1 also gathers half of the weights.
    # Headers are 66 bytes of 1514; acknowledgements of what comes the other way, gloo's own headers and DeepSpeed's
    # small sums add less than a tenth, and to PowerSGD's few bytes less than a fourth.
    for name, numbers, more in (
        ("AdamW, DDP", numel, 0.1),
        ("AdamW, ZeRO 1", 1.5 * numel, 0.1),
        ("PowerSGD 4, DDP", power, 0.25),
        ("PowerSGD 4, DDP, x 4", power, 0.25),
    ):
        assert 4e-6 * numbers < rows[name]["MB sent"] < (1 + more) * 4e-6 * numbers, name


@pytest.mark.slow
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_no_step_is_faster_than_its_wire(found):
    for row in found["numbers"]:
        assert row["s"] > row["wire s"] - 8e-8 * BURST, row["contender"]


@pytest.mark.slow
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_all_start_from_the_same_weights_and_text(found):
    first = {row["contender"]: row["first loss"] for row in found["numbers"]}
    # The mean of the ranks' fp32 losses, which are alike to rounding.
    assert first["AdamW, ZeRO 1"] == pytest.approx(first["AdamW, DDP"], rel=1e-6)
    assert first["PowerSGD 4, DDP"] == pytest.approx(first["AdamW, DDP"], rel=1e-6)
    assert {row["steps"] for row in found["losses"]} == {3}


@pytest.mark.slow
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_a_round_uses_both_directions_of_the_wire_at_once():
    with Wire() as wire, Ranks(wire) as ranks:
        rows = {row["collective"]: row for row in Race(wire, ranks).probe(20.0, 2**19)}
    # A mebibyte each way at 20 Mbit/s: 0.44 s with headers, twice that where one direction waits for the other. A busy
    # machine adds some hundredths of a second.
    assert rows["a round of ds_lowrank"]["ms"] < 1.5 * 8e-3 * 1.05 * 2**20 / 20


def measured(name, seconds, losses=(), micro_batches=1):
    return Measured(
        Contender(name, micro_batches), seconds={100.0: seconds}, sent={100.0: [10**6]}, losses=list(losses)
    )


def test_speeds_are_compared_with_peers_of_as_many_micro_batches():
    peers = [measured("AdamW, ZeRO 1", [3.0, 4.0, 5.0]), measured("PowerSGD 1, DDP", [2.0])]
    *rows, several = speed_rows([*peers, measured("GaLore 128, ZeRO 1, x 4", [8.0], micro_batches=4)], 100.0)
    assert [row["tokens/s"] for row in rows] == [64.0, 128.0]
    assert [row["x AdamW"] for row in rows] == [1.0, 2.0]
    assert [row["x best PowerSGD"] for row in rows] == [0.5, 1.0]
    assert (several["tokens/s"], several["x AdamW"]) == (128.0, None)
    assert rows[0]["wire s"] == pytest.approx(0.08)


def test_time_to_a_loss_is_counted_in_steps_of_the_median():
    dense = measured("AdamW, ZeRO 1", [4.0], [5.0, 4.0, 3.0, 2.0])
    slow = measured("PowerSGD 1, DDP", [1.0], [5.0, 4.5, 4.0, 3.5])
    rows = loss_rows([dense, slow])
    assert [row["loss"] for row in rows] == [2.0, 3.5]
    assert [row["s to AdamW's at half, 100 Mbit/s"] for row in rows] == [12.0, None]
