"""``python -m ds_lowrank evaluate``: lm-eval on the model of a run."""

from __future__ import annotations

import json
import logging
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ds_lowrank.environment.packages import is_importable, one_line
from ds_lowrank.errors import ConfigError

ABOUT = "measure the model of a run with lm-eval"
FOLDERS = ("best", "export")
"""Where a run keeps a Hugging Face model, the first that is there."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run with best/ or export/, or a Hugging Face folder"
    )
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names or patterns of lm-eval's tasks and groups"
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    parser.add_argument("--num-fewshot", type=_count, metavar="N", help="examples in the prompt; the task's by default")
    parser.add_argument("--limit", type=_limit, metavar="N", help="documents of each task, or below 1 a fraction")
    parser.add_argument("--batch-size", type=_batch_size, default=1, metavar="N", help="or auto; 1 by default")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; a GPU if there is one by default")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--apply-chat-template", action="store_true", help="ask in the tokenizer's chat template")
    parser.add_argument("--output", type=Path, metavar="FILE", help="RUN/evaluation/TASKS.json by default")


def run(arguments: Namespace) -> int:
    """Evaluate, print lm-eval's table and write its results; 1 after an error of the user's, which is printed."""
    try:
        _evaluate(arguments)
    except (ConfigError, OSError) as error:
        print(f"python -m ds_lowrank evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def find_model(run: Path) -> Path:
    """The Hugging Face folder of a run.

    Args:
        run: the run's folder, or the Hugging Face folder itself.

    Raises:
        ConfigError: there is none, or it is not that of a causal language model with its tokenizer.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder")
    found = [folder for folder in (run, *(run / name for name in FOLDERS)) if (folder / "config.json").is_file()]
    if not found:
        raise ConfigError(
            f"{run} has no model: neither best/, which launch/finetune.py writes, nor export/, which both programs "
            "write with --export; nor is it a Hugging Face folder"
        )
    _check_model(found[0])
    return found[0]


def _check_model(folder: Path) -> None:
    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or [
            "model without a name"
        ]
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is damaged ({error})") from error
    if not architectures[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise ConfigError(
            f"{folder} is a {architectures[0]}, and lm-eval measures language models: a classifier's metrics are in "
            "the summary.json of its run"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ConfigError(f"{folder} has no tokenizer: put the tokenizer's files there")


def _evaluate(arguments: Namespace) -> None:
    folder = find_model(arguments.run)
    arguments.device = _device(arguments.device)
    if not is_importable("lm_eval"):
        raise ConfigError("lm-eval is missing: pip install '.[train,evaluate]'")
    print(f"evaluating {folder}", flush=True)
    manager, names = _find_tasks(arguments.tasks, arguments.include_path, folder)
    tasks = [part for name in names for part in _loaded(manager, name)]
    results = _measure(arguments, folder, manager, tasks)
    if results is None:  # on the other processes of accelerate launch
        return
    _print(results)
    path = arguments.output or arguments.run / "evaluation" / f"{_file_name(names)}.json"
    _write(path, {"run": str(arguments.run), "folder": str(folder), **results})
    print(f"results in {path}")


def _find_tasks(patterns: Sequence[str], include: Path | None, model: Path) -> tuple[Any, list[str]]:
    """Find the tasks of some names and patterns.

    The index of lm-eval's own tasks takes seconds, and is read only if the folder does not have all.

    Returns:
        lm-eval's ``TaskManager``, and the names.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ConfigError(f"--include-path {include}: no such folder")
    common: dict[str, Any] = {"include_path": None if include is None else str(include)}
    common["metadata"] = {"pretrained": str(model)}  # some tasks make their prompts with the model's tokenizer
    manager = None if include is None else TaskManager(**common, include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in patterns):
        manager = TaskManager(**common)
    known: list[str] = []
    for name in patterns:
        matching = manager.match_tasks([name])
        if not matching:
            near = get_close_matches(name, manager.all_tasks, 3)
            meant = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
            raise ConfigError(f"--tasks {name}: lm-eval has no such task; {meant}")
        known += [match for match in matching if match not in known]
    return manager, known


def _loaded(manager: Any, name: str) -> list[Any]:
    """Load a task's or a group's data: lm-eval's objects, without those that are in a group among them."""
    with _quiet("huggingface_hub"):  # its retries
        try:
            found = manager.load([name])
        except Exception as error:  # of datasets, of the hub's client, or of the task's own code
            reach = "check the network, or fill the cache of datasets where there is one"
            advice = reach if isinstance(error, OSError) else "check its YAML file and its data"
            raise ConfigError(f"--tasks {name} cannot be loaded ({one_line(error)}); {advice}") from error
    groups, tasks = found.get("groups", {}), found["tasks"]
    children = {child for names in found.get("group_map", {}).values() for child in names}
    return [part for own, part in {**groups, **tasks}.items() if own not in children]


def _measure(arguments: Namespace, folder: Path, manager: Any, tasks: list[Any]) -> dict[str, Any] | None:
    from lm_eval import simple_evaluate

    try:
        found: dict[str, Any] | None = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": arguments.dtype},
            tasks=tasks,
            task_manager=manager,  # a new one would read the index again
            num_fewshot=arguments.num_fewshot,
            batch_size=arguments.batch_size,
            device=arguments.device,
            limit=arguments.limit,
            log_samples=False,
            apply_chat_template=arguments.apply_chat_template,
        )
    except (ValueError, OSError, AssertionError) as error:  # what lm-eval and transformers raise about their input
        raise ConfigError(f"lm-eval cannot measure {folder}: {one_line(error)}") from error
    return found


def _print(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def _write(path: Path, results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    from ds_lowrank.training.atomic_write import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=2, default=handle_non_serializable) + "\n")


def _file_name(names: Sequence[str]) -> str:
    joined = "+".join(names).replace("/", "_")
    return joined if len(joined) <= 100 else f"{names[0]}+{len(names) - 1}_more"


def _device(name: str | None) -> str:
    """The device to use. One that is not there is refused: lm-eval would take another one without a word."""
    import torch

    there = ["cpu"]
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None:
        there = [found.type, *(f"{found.type}:{n}" for n in range(torch.accelerator.device_count())), "cpu"]
    if name is not None and name not in there:
        raise ConfigError(f"--device {name}: this machine has {', '.join(there)}")
    return name or there[0]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _limit(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or (value >= 1 and value != int(value)):
        raise ArgumentTypeError(f"{text!r} is neither a number of documents nor a fraction below 1")
    return int(value) if value >= 1 else value


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is neither a whole number of at least 1 nor auto")
    return int(text)
