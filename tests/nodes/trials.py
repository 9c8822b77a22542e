"""What is tried on two nodes. A trial raises ``AssertionError``, or returns what it has measured, in words."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.nodes.cluster import ROOT, Cluster, Running
from tests.nodes.jobs import GRIDS, LAUNCHERS, Start, Trainings, deepspeed, finish, succeed, torchrun
from tests.training.test_launch_grids import assert_close

MINUTE = 60.0
IMPORTS = 120.0
"""Most seconds until the program runs: launchers and the program import torch, on two cores that may be busy."""
LIMIT = 20
"""``--timeout`` in trials of lost nodes, in seconds; longer than a step takes where others use the machine too."""


@dataclass(frozen=True)
class Trial:
    """One thing that is tried.

    Attributes:
        name: says what.
        run: tries it in an empty folder.
        compact: whether ``make test`` includes it.
    """

    name: str
    run: Callable[[Path], str]
    compact: bool = False


def trials() -> Iterator[Trial]:
    """All trials."""
    for launcher, start in LAUNCHERS.items():
        for grid, (ranks, more) in GRIDS.items():
            compact = (launcher, grid) == ("deepspeed --hostfile", "ZeRO 2")
            yield Trial(f"{launcher}, {grid}", partial(curve, start=start, ranks=ranks, more=more), compact)
    yield Trial("a cache on each node", own_caches)
    yield Trial("an output folder on each node", own_outputs)
    yield Trial("an output folder on each node, nothing to save", own_outputs_unsaved)
    yield Trial("data on one node only", data_on_one_node)
    yield Trial("another version on one node", another_version)
    yield Trial("deepspeed, a host that does not answer", partial(unreachable, host="node4"))
    yield Trial("deepspeed, a host that is not there", partial(unreachable, host="node3"))
    yield Trial("torchrun, a node loses its network", partial(lost, start=torchrun), True)
    yield Trial("deepspeed, a node loses its network", partial(lost, start=deepspeed))
    yield Trial("torchrun, a node loses its power", partial(lost, start=torchrun, power=True))
    yield Trial("gloo on an interface that others cannot reach", wrong_interface)


def curve(folder: Path, start: Start, ranks: int, more: list[str]) -> str:
    """A training over both nodes has the curve of one process."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        alone = jobs.alone("alone")
        seconds = succeed(start(cluster, ranks, jobs.arguments("nodes", *more)))
        succeed([alone])
        records, expected = jobs.metrics("nodes"), jobs.metrics("alone")
    assert_close(records, expected)
    worst = max(abs(records[step]["loss"] / expected[step]["loss"] - 1) for step in records)
    return f"losses differ by at most {worst:.1e} in {len(records)} steps; {seconds:.0f} s"


def own_caches(folder: Path) -> str:
    """With a cache on each node, the data are tokenized once on each, and the tokenizer once."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        arguments = jobs.arguments("nodes", "--cache", str(cluster.own / "cache"), "--tokenizer", "bpe")
        succeed(torchrun(cluster, 2, [*arguments, "--vocab-size", "280"]))
        found = {node: sorted(path.name for path in (folder / node / "cache").iterdir()) for node in ("node1", "node2")}
    tokens = {node: [name for name in names if name.startswith("tokens-")] for node, names in found.items()}
    assert tokens["node1"] == tokens["node2"] and len(tokens["node1"]) == 4, found  # two splits, each with its checksum
    rest = {node: {name.partition("-")[0] for name in names} for node, names in found.items()}
    assert rest == {"node1": {"bpe", "tokens"}, "node2": {"tokens"}}, found
    return "built on both"


def own_outputs(folder: Path) -> str:
    """An output folder that is not shared is refused, with the node that does not see it."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        output = cluster.own / "run"
        done = finish(torchrun(cluster, 1, jobs.arguments("nodes", "--output", str(output))))
    assert [one.code for one in done] == [1, 1], done
    (line,) = done[0].errors()
    assert line.startswith(f"error: --output {output} is not one folder for all nodes: node2 does not see what rank 0")
    assert not (folder / "node1" / "run").exists()
    return in_time(done[0].seconds, line)


def own_outputs_unsaved(folder: Path) -> str:
    """Nodes without a shared folder can train, if nothing is saved."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        here = jobs.arguments("nodes", "--output", str(cluster.own / "run"), "--save-interval", "0")
        seconds = succeed(torchrun(cluster, 1, here))
    assert (folder / "node1" / "run" / "summary.json").is_file() and not (folder / "node2" / "run").exists()
    return f"{seconds:.0f} s"


def data_on_one_node(folder: Path) -> str:
    """Data that one node does not have are named by the rank there."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        shutil.copytree(cluster.shared / "text", folder / "node1" / "text")
        (done,) = finish(deepspeed(cluster, 1, jobs.arguments("nodes", "--data", str(cluster.own / "text"))))
    assert done.code, done
    lines = sorted(done.errors())
    missing = f"no data at '{folder / 'own' / 'text'}'"
    assert len(lines) == 2 and lines[0].startswith("rank 0 on node1: error: another rank failed; rank 1 on node2: "), (
        lines
    )
    assert lines[1].startswith(f"rank 1 on node2: error: {missing}"), lines
    return in_time(done.seconds, lines[1])


def another_version(folder: Path) -> str:
    """Different versions are refused on every rank, with the package, the versions and the nodes."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        package = ROOT / "ds_lowrank" / "__init__.py"
        older = folder / "__init__.py"
        older.write_text(package.read_text().replace("__version__ = ", "__version__ = '0.0.1'  # "))
        cluster.nodes[1].run_quickly(f"mount --bind {older} {package}")
        (done,) = finish(deepspeed(cluster, 1, jobs.arguments("nodes")))
    assert done.code, done
    lines = sorted(done.errors())
    assert len(lines) == 2 and len({line.partition("error: ")[2] for line in lines}) == 1, lines
    assert "the nodes of this job differ: ds_lowrank is " in lines[0], lines
    assert "0.0.1 (source " in lines[0] and " on node2" in lines[0] and " on node1" in lines[0], lines
    return in_time(done.seconds, lines[0])


def unreachable(folder: Path, host: str) -> str:
    """A host that cannot be reached ends the job on the others."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        cluster.configure_ssh("    ConnectTimeout 10\n")
        (done,) = finish(deepspeed(cluster, 1, jobs.arguments("nodes"), ("node1", host)))
    assert done.code, done
    (line,) = done.errors()
    assert line.startswith("rank 0 on node1: error: rank 1 of 2 did not come within --join-timeout 45 s"), line
    assert f"{host}: ssh: connect to host {host}" in done.text, done
    return in_time(done.seconds, line)


def lost(folder: Path, start: Start, power: bool = False) -> str:
    """A node that goes without a word ends the job on the other, also if it lives on by itself."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        cluster.configure_ssh("    ServerAliveInterval 2\n    ServerAliveCountMax 3\n")
        arguments = jobs.arguments("nodes", "--timeout", str(LIMIT), steps=100_000)
        commands = start(cluster, 1, arguments)
        commands[0].wait_for(lambda text: "step 20/" in text, MINUTE + IMPORTS)
        cut = time.monotonic()
        cluster.nodes[1].cut_off()
        if power:
            cluster.nodes[1].end()
        done = commands[0].finish(time.monotonic() - commands[0].started + MINUTE)
        seconds = time.monotonic() - cut
        if not power and len(commands) == 2:
            check_alone(commands[1])
    assert done.code, done
    (line,) = done.errors()
    assert line.startswith(f"rank 0 on node1: error: no answer from node2 (rank 1) for {LIMIT} s"), line
    return f"{seconds:.0f} s after the cut: {line}"


def check_alone(command: Running) -> None:
    """The ranks of the node that is cut off end too; torchrun itself may go on waiting for its store."""
    command.wait_for(
        lambda text: f"rank 1 on node2: error: no answer from node1 (rank 0) for {LIMIT} s" in text, MINUTE
    )


def wrong_interface(folder: Path) -> str:
    """Ranks that find each other but cannot connect say what to set."""
    with Cluster(folder) as cluster:
        jobs = Trainings(cluster)
        arguments = jobs.arguments("nodes", "--join-timeout", "10")
        program = torchrun(cluster, 1, arguments, GLOO_SOCKET_IFNAME="lo")
        done = finish(program)
    assert all(one.code for one in done), done
    # Both say it, unless torchrun ends the one because the other has ended.
    lines = [line for one in done for line in one.errors()]
    assert lines and all("set GLOO_SOCKET_IFNAME on every node" in line for line in lines), done
    return in_time(done[0].seconds, lines[0])


def in_time(seconds: float, line: str) -> str:
    """Check that an error came within a minute of the program's start."""
    assert seconds < MINUTE + IMPORTS, seconds
    return f"{seconds:.0f} s: {line}"
