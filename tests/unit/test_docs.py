"""The documentation is true: its Python runs, its commands parse, its tables say what the code says."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ds_lowrank
from ds_lowrank import slots
from ds_lowrank.config import METHODS, parse_options
from ds_lowrank.methods.base import Options
from ds_lowrank.methods.galore import GaLore, GaLoreOptions
from ds_lowrank.sharding.layout import length, whole
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Alone, lockstep
from ds_lowrank.sharding.world import SimulatedWorld
from ds_lowrank.support import REFUSALS, check_supported
from tests.engines.pool import run_ranks
from tests.simulated.test_galore import whole_step
from tests.unit.test_architecture import ALLOWED

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("getting_started", "configuration", "sharding")}


class Fence(NamedTuple):
    """A fenced block: its language, what else its opening line says, its text."""

    page: str
    number: int
    language: str
    info: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}-{self.number}"


def fences(language: str, info: str | None = None) -> list[Fence]:
    found = []
    for page, text in PAGES.items():
        for number, match in enumerate(re.finditer(r"^```(\w+) ?(.*?)\n(.*?)^```$", text, re.M | re.S)):
            fence = Fence(page, number, match[1], match[2], match[3])
            if fence.language == language and (info is None or fence.info.startswith(info)):
                found.append(fence)
    return found


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a line that starts with ``heading``, without its head."""
    lines = itertools.dropwhile(lambda line: not line.startswith(heading), PAGES[page].splitlines())
    table = itertools.takewhile(lambda x: x[:1] == "|", itertools.dropwhile(lambda x: x[:1] != "|", lines))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in list(table)[2:]]


def furnish() -> None:
    """What the snippets read: the metrics and the export of a finished run, in the current folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_lowrank.data.tokenizer import load_tokenizer

    record = {"step": 1, "tokens": 8, "loss": 2.0, "eval_loss": 2.0}
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/metrics.jsonl").write_text(json.dumps(record) + "\n")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))
    model.save_pretrained("runs/galore_60m/export")
    load_tokenizer("bytes", lambda: iter(()), cache_dir=Path("cache")).save(Path("runs/galore_60m/export"))


def execute(code: str, folder: str) -> None:
    os.chdir(folder)
    if "runs/" in code:
        furnish()
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


RUN = [fence for fence in fences("python") if not fence.info.startswith("excerpt")]


@pytest.mark.parametrize("fence", RUN, ids=lambda fence: fence.id)
def test_python_runs(fence, tmp_path):
    if fence.info.startswith("needs ") and importlib.util.find_spec(fence.info.split()[1]) is None:
        pytest.skip(f"{fence.info.split()[1]} is not installed")
    run_ranks(1, execute, fence.text, str(tmp_path))


@pytest.mark.parametrize("fence", fences("python", "excerpt"), ids=lambda fence: fence.id)
def test_excerpts_are_the_code(fence):
    assert fence.text in (ROOT / fence.info.split()[1]).read_text()


@pytest.mark.parametrize("fence", fences("json"), ids=lambda fence: fence.id)
def test_json_is_valid(fence):
    from deepspeed.runtime.config import DeepSpeedConfig

    block = json.loads(fence.text)
    check_supported(block, "GaLore")
    if "optimizer" in block:
        parse_options(METHODS[block["optimizer"]["type"]], block["optimizer"]["params"])
    known = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, **block})
    for monitor in {"tensorboard", "wandb", "csv_monitor"} & block.keys():
        parsed = getattr(known.monitor_config, monitor)
        assert {key: getattr(parsed, key) for key in block[monitor]} == block[monitor]


class ParserError(Exception):
    """Carries a parser out of the function that builds it."""


@pytest.fixture(scope="module")
def pretrain_parser():
    from ds_lowrank.training import arguments

    def grab(parser, *_):
        raise ParserError(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParserError) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", grab)
        arguments.parse([])
    return caught.value.args[0]


def commands() -> list[list[str]]:
    lines = [line for fence in fences("bash") for line in fence.text.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [command for command in split if "launch/pretrain.py" in command]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_commands_parse_and_name_files_that_exist(command):
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    from ds_lowrank.training.arguments import parse

    split = command.index("launch/pretrain.py")
    launchers = {"deepspeed": runner.parse_args, "torchrun": lambda args: get_args_parser().parse_args(args)}
    if command[0] != "python":
        launchers[command[0]](command[1:])
    arguments = parse(command[split + 1 :])
    assert (ROOT / arguments.deepspeed_config).is_file()
    assert (ROOT / arguments.model).is_file()


def test_every_flag_that_is_mentioned_exists(pretrain_parser):
    elsewhere = {"--num_gpus", "--hostfile", "--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend"}
    elsewhere |= {"--rdzv_endpoint", "--constraint", "--logdir", "--help"}
    known = set(pretrain_parser._option_string_actions) | elsewhere
    for page, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known, page


def test_every_flag_of_the_script_is_documented_with_its_default(pretrain_parser):
    hidden = {"--help", "--local_rank", "--deepscale", "--deepscale_config"}
    documented = {flag.strip("`"): default.strip("`") for flag, default, _ in rows("configuration", "## Flags")}
    actions = {action.option_strings[-1]: action for action in pretrain_parser._actions}
    assert documented.keys() == actions.keys() - hidden
    for flag, default in documented.items():
        required = actions[flag].required or flag == "--deepspeed_config"
        if flag != "--cache":  # depends on the environment
            assert default == ("required" if required else str(actions[flag].default)), flag


def test_every_option_is_documented_with_its_default():
    common = {key: default for key, _, default, _ in rows("configuration", "### Keys of every method")}
    own = {key: default for key, _, default, _ in rows("configuration", "### Keys of GaLore")}
    fields = GaLoreOptions.model_fields
    assert {key.strip("`") for key in common} == Options.model_fields.keys()
    assert {key.strip("`") for key in own} == fields.keys() - Options.model_fields.keys()
    for key, default in (common | own).items():
        assert json.loads(default.strip("`")) == json.loads(json.dumps(fields[key.strip("`")].default)), key


def test_every_refusal_is_documented_with_its_advice():
    documented = {key.strip("`"): advice for key, advice in rows("configuration", "### What is refused")}
    assert documented == {refusal.key: refusal.advice for refusal in REFUSALS}


def weights(*shapes, **like):
    return [(f"w{i}", torch.nn.Parameter(torch.ones(shape, **like))) for i, shape in enumerate(shapes)]


def step_with_a_sparse_gradient():
    embedding = torch.nn.Embedding(4, 4, sparse=True)
    optimizer = ds_lowrank.GaLore([("embedding.weight", embedding.weight)])
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()


REFUSED = {
    "a parameter without a name or tag": lambda: ds_lowrank.GaLore([weights((4, 4))[0][1]]),
    "two parameters of one name, or one parameter twice": lambda: ds_lowrank.GaLore(weights((4, 4)) * 2),
    "an fp64 (or integer) parameter": lambda: ds_lowrank.GaLore(weights((4, 4), dtype=torch.float64)),
    "a parameter that is not contiguous": lambda: ds_lowrank.GaLore(
        [("w", torch.nn.Parameter(torch.ones(4, 6).T))]
    ).finalize(),
    "parameters on several devices": lambda: ds_lowrank.GaLore(
        [*weights((4, 4)), ("other", torch.nn.Parameter(torch.ones(4, 4, device="meta")))]
    ).finalize(),
    "a sparse gradient": step_with_a_sparse_gradient,
}


def test_every_refused_parameter_gets_the_documented_message():
    documented = dict(rows("configuration", "### Parameters that are refused"))
    assert documented.keys() == REFUSED.keys()
    for given, message in documented.items():
        with pytest.raises((ds_lowrank.ConfigError, RuntimeError), match=re.escape(message)):
            REFUSED[given]()


def test_every_metric_is_documented():
    documented = {key for cells in rows("getting_started", "### Reading") for key in re.findall(r"`([^`]+)`", cells[0])}
    source = ast.parse((ROOT / "ds_lowrank/training/record.py").read_text())
    record = max((node for node in ast.walk(source) if isinstance(node, ast.Dict)), key=lambda node: len(node.keys))
    weight = torch.nn.Parameter(torch.ones(2, 2))
    counters = ds_lowrank.GaLore([("w", weight)]).metrics().keys()
    assert documented == {key.value for key in record.keys if key is not None} | counters | {"eval_loss"}


def test_the_layers_are_those_that_are_enforced():
    documented = {name.strip("`"): set(re.findall(r"`(\w+)`", below)) for name, below in layer_rows()}
    assert documented == ALLOWED


def layer_rows() -> list[tuple[str, str]]:
    table = rows("sharding", "## Layers")
    return [(cells[0].rstrip(" |"), cells[1] if len(cells) > 1 else "") for cells in table]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        other, _, anchor = target.partition("#")
        text = PAGES[other.removesuffix(".md") if other else page]
        titles = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")]
        anchors = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, target


ROUNDS = {
    "ordinary": ({}, 1),
    "refresh, `randomized`": ({}, 0),
    "refresh, `svd`": ({"projector": "svd"}, 0),
}


def count(shape, ranks, step, **changes):
    """One step of one matrix in even shares; the shards, and the world that counted."""
    options = GaLoreOptions(rank=4, **changes)
    cuts = [shape[0] * shape[1] * rank // ranks for rank in range(ranks + 1)]
    parts = [whole(shape, *cut) for cut in itertools.pairwise(cuts)]
    shards = [MatrixShard("w", shape, parts, i, GaLore.side(shape, options), factor_rank=0) for i in range(ranks)]
    states = [GaLore.init_state(shard, options, torch.device("cpu")) for shard in shards]
    gradient, world = torch.randn(shape), SimulatedWorld(ranks)
    for shard in shards:
        shard.attach(gradient.view(-1)[shard.part.start : shard.part.end])
    pairs = zip(shards, states, strict=True)
    world.run([lockstep([whole_step(shard, state, options, step)]) for shard, state in pairs])
    return shards, world


def formula(shards, rank, kind):
    """What docs/sharding.md says that a rank sends, in elements."""
    r, first, others = 4, rank == 0, range(1, len(shards))

    def held(axis, i):
        lo, hi = getattr(shards[i], axis).held
        return hi - lo

    def owned(axis, i):
        return length(getattr(shards[i], axis).owned)

    def copies(axis):
        spans = getattr(shards[rank], axis).owned
        peers = [getattr(shards[j], axis).held for j in range(len(shards)) if j != rank]
        return sum(max(0, min(b, d) - max(a, c)) for a, b in spans for c, d in peers)

    shared = {axis: held(axis, rank) - owned(axis, rank) for axis in ("kept", "compressed")}
    ordinary = copies("compressed") + shared["kept"] + copies("kept")
    if kind == "ordinary":
        return r * ordinary
    if kind == "refresh, `svd`":
        low, high = shards[rank].part.rows
        handed = r * sum(owned("compressed", j) for j in others)
        return r * ordinary + (handed if first else (high - low) * shards[rank].shape[1])
    handed = sum(owned("kept", j) + owned("compressed", j) for j in others)
    collected = owned("kept", rank) + owned("compressed", rank)
    again = shared["kept"] + copies("kept") + shared["compressed"]
    return r * (ordinary + again + (handed if first else collected))


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rounds_and_volumes_are_as_documented(kind, shape, ranks):
    documented = dict(rows("sharding", "## What one step exchanges"))
    changes, step = ROUNDS[kind]
    shards, world = count(shape, ranks, step, **changes)
    assert world.rounds == int(documented[kind])
    assert world.bytes_sent == [4 * formula(shards, rank, kind) for rank in range(ranks)]


@pytest.mark.parametrize("changes", [{}, {"projector": "svd"}], ids=str)
def test_a_rotation_costs_what_is_documented(changes):
    documented = dict(rows("sharding", "## What one step exchanges"))
    (_, plain), (_, rotated) = (count((48, 20), 3, 200, moments=moments, **changes) for moments in ("keep", "rotate"))
    assert rotated.rounds - plain.rounds == int(documented["refresh after the first with `moments: rotate`, on top"])
    r, world, dealt = 4, 3, (1, 2, 1)
    sent = [4 * r * (r + (world - 2) * own) for own in dealt]
    assert [a - b for a, b in zip(rotated.bytes_sent, plain.bytes_sent, strict=True)] == sent


class Counting(Alone):
    """Counts collectives."""

    def __init__(self):
        self.rounds = 0

    def exchange(self, requests):
        self.rounds += 1
        return super().exchange(requests)


def collectives(gradients, matrices=3):
    """How many each of some calls of ``step`` takes, on matrices of 8 x 8 at rank 2; a gradient is one number."""
    named = weights(*[(8, 8)] * matrices)
    optimizer = ds_lowrank.GaLore(named, rank=2, update_proj_gap=2)
    optimizer._executor = executor = Counting()
    counts = []
    for gradient in gradients:
        for _, weight in named:
            weight.grad = torch.full_like(weight, gradient)
        before = executor.rounds
        optimizer.step()
        counts.append(executor.rounds - before)
    return counts


def test_the_decision_and_a_zero_gradient_cost_what_is_documented():
    documented = {kind: int(rounds) for kind, rounds in rows("sharding", "## What one step exchanges")}
    decision, ordinary = documented["decision: one number a parameter"], documented["ordinary"]
    refresh, zero = (
        documented["refresh, `randomized`"],
        documented["a matrix whose projected gradient is all zero, on top"],
    )
    assert collectives([1, 1, 0, 0]) == [
        refresh + decision,
        ordinary + decision,
        refresh + decision + zero,
        ordinary + decision + zero,
    ]
    assert f"a step costs {ordinary + decision} collectives" in PAGES["sharding"]
    assert f"a step with a randomized refresh {refresh + decision}," in PAGES["sharding"]


@pytest.mark.parametrize(("room", "count"), [(1, 3), (32, 3), (64, 2), (96, 1)])
def test_waves_cost_what_is_documented(monkeypatch, room, count):
    """Each of the three matrices takes 2 (8 + 8) = 32 elements of the room."""
    assert "`WAVE` = 2^28" in PAGES["sharding"]
    assert slots.WAVE == 2**28
    monkeypatch.setattr(slots, "WAVE", room)
    assert "3 w + 1\nand 10 w + 1" in PAGES["sharding"]
    assert collectives([1, 1]) == [10 * count + 1, 3 * count + 1]
