"""The documentation is true: its Python runs, its commands parse, and its tables agree with the code."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import pytest
import torch

import ds_lowrank
from benchmarks.memory import CASES, measure
from ds_lowrank.commands import checkpoint, estimate, evaluate, export, glue
from ds_lowrank.integration.unsupported_settings import UNSUPPORTED_SETTINGS, check_supported
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.lazy_refresh import LazyRefreshOptions
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.range_finder import RangeFinderOptions
from ds_lowrank.methods.blocks.subspace import SubspaceOptions
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.engines.pool import run_ranks
from tests.unit.pages import PAGES, ROOT, rows, weights
from tests.unit.test_architecture import ALLOWED
from tests.unit.test_parallel_marks import Wrapped


class Fence(NamedTuple):
    """A fenced block: its language, the rest of its opening line, and its text."""

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


def furnish() -> None:
    """Create what the snippets read in the current folder: the metrics and the exports of finished runs."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from ds_lowrank.data.tokenizer import load_tokenizer

    record = {"step": 1, "tokens": 8, "loss": 2.0, "eval_loss": 2.0}
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/metrics.jsonl").write_text(json.dumps(record) + "\n")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))
    model.save_pretrained("runs/galore_60m/export")
    classifier = LlamaForSequenceClassification(LlamaConfig(vocab_size=257, pad_token_id=256, **sizes))
    classifier.save_pretrained("runs/finetuned/best")
    for folder in ("galore_60m/export", "finetuned/best"):
        load_tokenizer("bytes", lambda: iter(()), cache_dir=Path("cache")).save(Path("runs", folder))


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
def parsers():
    """The argument parsers of both scripts, by the page that documents their flags."""
    from ds_lowrank.finetuning import arguments as finetune
    from ds_lowrank.training import arguments as pretrain

    def grab(parser, *_):
        raise ParserError(parser)

    found = {}
    for page, module in (("configuration", pretrain), ("finetuning", finetune)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ParserError) as caught:
            patch.setattr(argparse.ArgumentParser, "parse_args", grab)
            module.parse([])
        found[page] = caught.value.args[0]
    return found


SCRIPTS = {"launch/pretrain.py", "launch/finetune.py"}


def commands() -> list[list[str]]:
    lines = [line for fence in fences("bash") for line in fence.text.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [command for command in split if SCRIPTS & set(command)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_commands_parse_and_name_files_that_exist(command):
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    from ds_lowrank.finetuning import arguments as finetune
    from ds_lowrank.training import arguments as pretrain

    (script,) = SCRIPTS & set(command)
    split = command.index(script)
    launchers = {"deepspeed": runner.parse_args, "torchrun": lambda args: get_args_parser().parse_args(args)}
    if command[0] != "python":
        launchers[command[0]](command[1:])
    arguments = (finetune if "finetune" in script else pretrain).parse(command[split + 1 :])
    assert (ROOT / arguments.deepspeed_config).is_file()
    of_the_quick_start = Path("runs/quickstart/export")
    assert "finetune" in script or arguments.model == of_the_quick_start or (ROOT / arguments.model).is_file()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of the actions below it."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    of_actions = [options_of(one) for action in below for one in action.choices.values()]
    return set(parser._option_string_actions).union(*of_actions)


def test_every_flag_that_is_mentioned_exists(parsers):
    elsewhere = {"--num_gpus", "--hostfile", "--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend"}
    elsewhere |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue", "--init", "--time"}
    elsewhere |= {"--its", "--config_file", "--deepspeed"}
    elsewhere |= {
        "--rdzv_endpoint",
        "--constraint",
        "--logdir",
        "--no-build-isolation",
        "--help",
        "--picture",
        "--simulated",
        "--basis-placement",
        "--bench",
        "--repeats",
        "--worlds",
        "--cases",
        "--sequence",
        "--memory",
        "--rates",
        "--subjects",
        "--quiet",
        "--x",
    }
    of_slurm = "partition account cpus-per-task mem full me format jobid overlap nodelist pty container-image"
    of_slurm += " container-mounts container-workdir no-container-mount-home"
    of_others = "shutdown-timeout dry-run follow selector max-log-requests output pid prefix"
    of_launchers = "launcher launcher_args master_addr no_ssh ssh_port bind-to mca rdzv-conf rdzv-backend rdzv-endpoint"
    of_launchers += " nproc-per-node"
    elsewhere |= {f"--{name}" for name in f"{of_slurm} {of_launchers} {of_others}".split()}
    # of docker, enroot and ssh, in containers.md
    elsewhere |= {"--build-arg", "--tag", "--secret", "--output", "--rm", "--gpus", "--shm-size", "--user", "--volume"}
    elsewhere |= {"--env", "--ipc", "--network", "--device", "--ulimit", "--detach", "--name", "--ssh_port", "--work"}
    elsewhere |= {"--like-nvidias"}
    known = set().union(*(parser._option_string_actions for parser in parsers.values())) | elsewhere
    for command in (checkpoint, estimate, evaluate, export, glue):
        of_command = argparse.ArgumentParser()
        command.add_arguments(of_command)
        known |= options_of(of_command)
    for page, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known, page


@pytest.mark.parametrize("page", ["configuration", "finetuning"])
def test_every_flag_of_a_script_is_documented_with_its_default(parsers, page):
    hidden = {"--help", "--local_rank", "--deepscale", "--deepscale_config"}
    documented = {flag.strip("`"): default.strip("`") for flag, default, _ in rows(page, "## Flags")}
    actions = {action.option_strings[-1]: action for action in parsers[page]._actions}
    assert documented.keys() == actions.keys() - hidden
    for flag, default in documented.items():
        required = actions[flag].required or flag == "--deepspeed_config"
        if flag != "--cache":  # depends on the environment
            assert default == ("required" if required else str(actions[flag].default)), flag


def test_every_flag_of_evaluate_is_documented():
    parser = argparse.ArgumentParser(add_help=False)
    evaluate.add_arguments(parser)
    documented = {flag.strip("`").lower() for flag, _, _ in rows("finetuning", "## Benchmarks of lm-eval")}
    assert documented == {*parser._option_string_actions, "run"}


SHARED = {
    "### Keys of every method": Options,
    "### Keys of methods that store a basis": BasisOptions,
    "### Keys of methods with a randomized range finder": RangeFinderOptions,
    "### Keys of methods with an inner optimizer": SubspaceOptions,
    "### Keys of methods that find a basis every T steps": LazyRefreshOptions,
}


def documented_keys(heading):
    """Type and default of each documented key."""
    return {key.strip("`"): (kind, default.strip("`")) for key, kind, default, _ in rows("configuration", heading)}


def own_keys(options):
    """The options that a class adds to those it inherits, or whose default or choices it changes."""
    inherited = {key: field for base in options.__bases__ for key, field in base.model_fields.items()}

    def is_inherited(key, field):
        known = inherited.get(key)
        return known is not None and (field.default, field.annotation) == (known.default, known.annotation)

    return {key for key, field in options.model_fields.items() if not is_inherited(key, field)}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_is_documented_with_its_choices_and_its_default(method):
    options = METHODS[method].Options
    tables = {**SHARED, f"### Keys of {method}": options}
    tables = {heading: kind for heading, kind in tables.items() if issubclass(options, kind)}
    for heading, kind in tables.items():
        own = kind.model_fields.keys() if kind is Options else own_keys(kind)
        assert documented_keys(heading).keys() == own, heading
        for key, (described, default) in documented_keys(heading).items():
            field = kind.model_fields[key]
            assert json.loads(default) == json.loads(json.dumps(field.default)), key
            if get_origin(field.annotation) is Literal:
                assert re.findall(r"`(\w+)`", described) == list(get_args(field.annotation)), key


@pytest.mark.parametrize("method", METHODS)
def test_every_own_option_is_mentioned_in_the_section_of_its_method(method):
    pages = PAGES["methods"] + PAGES["lineage"] + "\n## "
    section = re.search(rf"^## {method}\n(.*?)^## ", pages, re.M | re.S)[1]
    mentioned = set(re.findall(r"`(\w+)`", section))
    assert own_keys(METHODS[method].Options) - {"update_proj_gap"} <= mentioned


def test_contradictory_options_get_the_documented_message():
    for method, params, message in rows("configuration", "### How errors look"):
        method, params = method.strip("`"), json.loads(params.strip("`"))
        with pytest.raises(ds_lowrank.ConfigError, match=re.escape(message)):
            OPTIMIZERS[method](weights((8, 12)), **params)


def test_every_unsupported_setting_is_documented_with_its_advice():
    documented = {key.strip("`"): advice for key, advice in rows("configuration", "### What is refused")}
    assert documented == {setting.key: setting.advice for setting in UNSUPPORTED_SETTINGS}


def said_by_the_package() -> list[str]:
    """Every string literal of the package; of an f-string, the constant parts."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "ds_lowrank").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("heading", ["What `launch/pretrain.py` refuses", "And `ds_lowrank.initialize`"])
def test_the_messages_of_a_grid_are_those_of_the_code(heading):
    said = said_by_the_package()
    for given, message in rows("parallelism", heading):
        assert any(message in text for text in said), given


def step_with_a_sparse_gradient():
    embedding = torch.nn.Embedding(4, 4, sparse=True)
    optimizer = ds_lowrank.GaLore(torch.nn.ModuleList([embedding, torch.nn.Linear(4, 4)]))
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()


REFUSED = {
    "a weight of a layer without its model": lambda: ds_lowrank.GaLore(torch.nn.Linear(4, 4).named_parameters()),
    "a parameter of a lazy module": lambda: ds_lowrank.GaLore(torch.nn.LazyLinear(4)),
    "two parameters of one name, or one parameter twice": lambda: ds_lowrank.GaLore(weights((4, 4)) * 2),
    "an fp64 (or integer) parameter": lambda: ds_lowrank.GaLore(weights((4, 4), dtype=torch.float64)),
    "a parameter of PyTorch's FSDP or tensor parallelism, or of another tensor subclass": lambda: ds_lowrank.GaLore(
        [("w", torch.nn.Parameter(Wrapped(torch.ones(4, 4))))]
    ),
    "a parameter that is not contiguous": lambda: ds_lowrank.GaLore(
        [("w", torch.nn.Parameter(torch.ones(4, 6).T))]
    ).bind(),
    "parameters on several devices": lambda: ds_lowrank.GaLore(
        [*weights((4, 4)), ("other", torch.nn.Parameter(torch.ones(4, 4, device="meta")))]
    ).bind(),
    "fp32 or fp16 weights with `master_weights` `false`": lambda: ds_lowrank.GaLore(
        weights((4, 4)), rank=2, master_weights=False
    ).bind(),
    "groups that differ in `master_weights`": lambda: ds_lowrank.GaLore(
        [{"params": weights((4, 4))}, {"params": [("other", weights((4, 4))[0][1])], "master_weights": False}], rank=2
    ).bind(),
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
    source = ast.parse((ROOT / "ds_lowrank/training/step_record.py").read_text())
    record = max((node for node in ast.walk(source) if isinstance(node, ast.Dict)), key=lambda node: len(node.keys))
    counters = ds_lowrank.Lorenza(weights((2, 2))).metrics().keys()  # has those of the others, and its own
    assert documented == {key.value for key in record.keys if key is not None} | counters | {"eval_loss", "matrices"}


def test_the_matrices_of_a_record_are_as_documented():
    weight = torch.nn.Parameter(torch.ones(6, 4))
    assert ds_lowrank.AdaRankGrad([("w", weight)], rank_max=3).matrices() == {
        "w": {"rank": 3, "state_bytes": 4 * (3 * (4 + 2 * 6) + 1)}
    }
    fixed = [name for name in METHODS if not OPTIMIZERS[name](weights((64, 64))).matrices()]
    assert fixed == [name for name in METHODS if name not in ("AdaRankGrad", "Gum")]
    text = " ".join(PAGES["getting_started"].split())
    assert 'an object `{"NAME": {"rank": R, "state_bytes": B}, ...}`' in text


def test_the_documented_imports_are_those_that_are_enforced():
    documented = {name.strip("`"): set(re.findall(r"`([\w/]+)`", below)) for name, below in import_rows()}
    assert documented == ALLOWED


def import_rows() -> list[tuple[str, str]]:
    table = rows("architecture", "### Who may import whom")
    return [(cells[0].rstrip(" |"), cells[1] if len(cells) > 1 else "") for cells in table]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        check_link(ROOT / "docs" / f"{page}.md", target)


def test_the_memory_of_a_choice_is_as_computed():
    numbers = json.loads((ROOT / "docs/measured/memory.json").read_text())["numbers"]
    assert rows("choosing", "## Memory") == [[str(value) for value in row.values()] for row in numbers]
    case = CASES[0]
    assert measure(case) == numbers[0]
    named = {
        cell.strip("`") for row in rows("choosing", "# Choosing") for cell in re.findall(r"`[\w/]+\.json`", row[3])
    }
    assert named
    assert all((ROOT / "ds_configs" / name).is_file() for name in named)


@pytest.mark.parametrize("path", ["README.md", "docs/results.md", "ds_configs/README.md"])
def test_links_of_other_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / path).read_text()):
        check_link(ROOT / path, target)


def check_link(page: Path, target: str) -> None:
    """A relative link names a file that exists and, in a page, a heading that it has."""
    if target.startswith("https://"):
        return
    other, _, anchor = target.partition("#")
    path = page.parent / other if other else page
    assert path.exists(), target
    if anchor:
        titles = [line.lstrip("# ").lower() for line in path.read_text().splitlines() if line.startswith("#")]
        assert anchor in {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}, target


ALL_PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "ds_configs/README.md"])
NOT_OURS = {"script.py", "zero_to_fp32.py", "train.py", "program.py"}
NOT_OURS |= {"src/llamafactory/hparams/parser.py", "train/trainer_utils.py", "utils/schemas/validation.py"}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_are_mentioned_exist(page):
    quoted = re.findall(r"`([^`\n]+)`", page.read_text())
    folders = [ROOT, ROOT / "ds_lowrank", *(ROOT / "ds_lowrank" / room for room in ("sharding", "placement"))]
    for path in {word for text in quoted for word in re.findall(r"[\w/]+\.py\b", text)} - NOT_OURS:
        assert any((folder / path).is_file() for folder in folders), path
    for name in {word for text in quoted for word in re.findall(r"\bds_lowrank(?:\.\w+)+", text)}:
        assert exists(name), name


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return True
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


def test_the_table_of_checkpoint_flags_is_complete():
    """Each flag of ``convert``, and of ``export``, has its row."""
    parser = argparse.ArgumentParser()
    checkpoint.add_arguments(parser)
    (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    flags = set(actions.choices["convert"]._option_string_actions) - {"-h", "--help"}
    of_export = argparse.ArgumentParser()
    export.add_arguments(of_export)
    assert set(of_export._option_string_actions) - {"-h", "--help"} <= flags
    table = re.search(r"\| flag of `convert`.*?\n\n", PAGES["checkpoints"], re.S)[0]
    assert {flag for row in table.splitlines() for flag in re.findall(r"`(--[a-z-]+)`", row.split(" | ")[0])} == flags
