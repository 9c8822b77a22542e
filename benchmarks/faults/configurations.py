"""Trials of malformed DeepSpeed configurations and command lines: each must be refused, in words that name the key.

Most are made from what is known to be valid: every block with every other JSON type, every key misspelt, every key
with a value of another type, every flag with every bad value. They are judged without starting a program, by the
function that reads everything before anything is built. A few are started on ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from benchmarks.faults.malformed import FILES, NUMBERS, OPTIMIZERS, SCHEDULERS, VALUES, WHOLE
from benchmarks.faults.programs import MODEL, run
from benchmarks.faults.trial import Outcome, Trial
from ds_lowrank.finetuning import arguments as finetuning
from ds_lowrank.integration.ds_config.schema import Settings
from ds_lowrank.integration.ds_config.structure import _fields, _split
from ds_lowrank.training import arguments as pretraining
from ds_lowrank.training.plan import make_plan

ONE = ("--data", "text.txt", "--tokenizer", "bytes", "--cache", "cache", "--steps", "2", "--sequence-length", "16")
START = ("--deepspeed_config", "ds.json", "--model", "model.json", "--output", "out", *ONE)
NAMED_BY_TYPE = ("optimizer", "scheduler")
ANYTHING = ("datastates_ckpt", "mpu", "tp_group", "load_balance_coeff", "expert_w3", "partition_config")
"""Keys whose values DeepSpeed hands on, or that only a dict of Python can have."""
WRONG: dict[str, Any] = {"null": None, "a number": 2, "a string": "text", "a list": [], "true": True}


def good() -> dict[str, Any]:
    """A configuration that trains."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "GaLore", "params": {"lr": 0.01, "rank": 4}},
        "zero_optimization": {"stage": 1},
    }


def trials() -> list[Trial]:
    """All trials. Compact are those that start no program; of the long generated lists, every fourth."""
    generated = [*_misspelt(), *_types(), *_flags()]
    found = [replace(trial, compact=number % 4 == 0) for number, trial in enumerate(generated)]
    found += [*_blocks(), *_values(), *_optimizers(), *_files(), *_same(), *_started()]
    names = [trial.name for trial in found]
    assert len(set(names)) == len(names), "two trials have one name"
    return found


def _prepare(folder: Path, config: Any) -> None:
    (folder / "model.json").write_text(json.dumps(MODEL))
    if config is not None:
        (folder / "ds.json").write_text(config if isinstance(config, str) else json.dumps(config))


@cache
def _command_line() -> argparse.Namespace:
    return pretraining.parse(START)


def _plan(folder: Path) -> Any:
    arguments = copy(_command_line())
    for name in ("deepspeed_config", "model", "output", "save", "cache"):
        setattr(arguments, name, folder / getattr(arguments, name))
    return make_plan(arguments, ranks=1)


def _refused(folder: Path, *, config: Any, mentions: tuple[str, ...]) -> Outcome:
    """Read a configuration as launch/pretrain.py does."""
    _prepare(folder, config)
    try:
        _plan(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        named = "ds.json" in message and all(word in message for word in mentions)
        return Outcome("refused" if named else "no message", message)
    except Exception as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}")
    return Outcome("accepted")


def _wrong(name: str, config: Any, *mentions: str) -> Trial:
    return Trial(name, partial(_refused, config=config, mentions=mentions), compact=True)


def _with(path: str, value: Any) -> dict[str, Any]:
    """The good configuration with one key changed."""
    config = good()
    *blocks, key = path.split(".")
    inner = config
    for block in blocks:
        inner = inner.setdefault(block, {})
    inner[key] = value
    return config


def _models(model: type[BaseModel] = Settings, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every block with its path, the top level first."""
    yield path, model
    for key, annotation in _fields(model).items():
        blocks, _ = _split(annotation)
        if blocks and key not in ("bfloat16", "offload_optimizer", "offload_param", "zenflow"):
            yield from _models(blocks[0], f"{path}.{key}".lstrip("."))


def _blocks() -> Iterator[Trial]:
    for path, _ in _models():
        for kind, value in WRONG.items():
            optional = path.endswith("writer") and value is None
            if path and not optional and (path, kind) not in (("zero_optimization", "true"),):
                yield _wrong(f"{path} is {kind}", _with(path, value), path.split(".")[-1])


def _misspelt() -> Iterator[Trial]:
    for path, model in _models():
        if path in NAMED_BY_TYPE:
            continue
        for key in _fields(model):
            letters = key[:-2] + key[-1] + key[-2] if key[-1] != key[-2] else key + "s"
            at = f"{path}.{letters}".lstrip(".")
            yield _wrong(f"misspelt {at}", _with(at, 1), letters, "unknown key", "did you mean")


def _types() -> Iterator[Trial]:
    for path, model in _models():
        if path in NAMED_BY_TYPE:
            continue
        for key, annotation in _fields(model).items():
            blocks, plain = _split(annotation)
            if blocks or plain is None or path == "weight_quantization" or key in ANYTHING:
                continue
            at = f"{path}.{key}".lstrip(".")
            yield _wrong(f"{at} is an object", _with(at, {"a": 1} if "dict" not in str(plain) else 3), key)
            if "bool" in str(plain) and "dict" not in str(plain):
                yield _wrong(f'{at} is "true"', _with(at, "true"), key, "without quotes")
            elif "int" in str(plain) and "str" not in str(plain) and "Literal" not in str(plain):
                yield _wrong(f'{at} is "3"', _with(at, "3"), key, "without quotes")
                yield _wrong(f"{at} is 1.5", _with(at, 1.5), key)
            elif "str" not in str(plain) and "list" not in str(plain).lower():
                yield _wrong(f"{at} is true", _with(at, True), key)


def _values() -> Iterator[Trial]:
    for path, values in VALUES.items():
        for value in values:
            text = json.dumps(_with(path, value)).replace("Infinity", "1e400")
            block, _, key = path.rpartition(".")
            yield _wrong(f"{path} = {json.dumps(value)}", text, block if key in ("enabled", "type") else key)
    for key in ("zero_optimisation", "gradient_cliping", "optimiser", "shceduler", "BF16", "Train_batch_size"):
        yield _wrong(f"unknown {key}", _with(key, {}), key, "did you mean")
    both = {**good(), "fp16": {"enabled": True}, "bf16": {"enabled": True}}
    yield _wrong("fp16 and bf16", both, "fp16.enabled", "bf16.enabled")


def _optimizers() -> Iterator[Trial]:
    for name, block in SCHEDULERS.items():
        yield _wrong(f"scheduler: {name}", {**good(), "scheduler": block}, "scheduler")
    for name, (block, words) in OPTIMIZERS.items():
        yield _wrong(f"optimizer: {name}", {**good(), "optimizer": block}, words)


def _files() -> Iterator[Trial]:
    for name, text in FILES.items():
        yield _wrong(f"file: {name}", text)
    yield _wrong("file: missing", None)

    def folder_for_file(folder: Path) -> Outcome:
        (folder / "ds.json").mkdir()
        return _refused(folder, config=None, mentions=("folder",))

    def binary(folder: Path) -> Outcome:
        (folder / "ds.json").write_bytes(bytes(range(256)))
        return _refused(folder, config=None, mentions=("UTF-8",))

    yield Trial("file: a folder", folder_for_file, compact=True)
    yield Trial("file: binary", binary, compact=True)


def _parsers() -> Iterator[tuple[str, Any, argparse.ArgumentParser]]:
    for name, module in (("pretrain", pretraining), ("finetune", finetuning)):
        parse = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=KeyError)
        with parse as called, contextlib.suppress(KeyError):
            module.parse([])
        yield name, module, called.call_args.args[0]


def _flags() -> Iterator[Trial]:
    for program, module, parser in _parsers():
        for action in parser._actions:
            flag = action.option_strings[-1] if action.option_strings else ""
            kind = getattr(action.type, "__name__", "")
            values = {"positive": ("0", *WHOLE), "count": WHOLE, "seed": WHOLE, "rate": NUMBERS, "number": NUMBERS}
            bad = values.get(kind, ("",) if kind in ("word", "path") else ())
            for value in bad:
                if not (flag == "--held-out" and value == "-1"):
                    yield _flag(program, module, f"{flag}={value}", flag)
            if action.choices:
                yield _flag(program, module, f"{flag}=other", flag)
            if flag.startswith("--") and len(flag) > 4 and "deep" not in flag and flag != "--local_rank":
                short = flag[:-1] if action.nargs == 0 else f"{flag[:-1]}=1"
                yield _flag(program, module, short, "unrecognized")
        yield _flag(program, module, "--no-such-flag", "unrecognized")
        yield _flag(program, module, "stray", "unrecognized")


def _flag(program: str, module: Any, text: str, mentions: str) -> Trial:
    def judge(folder: Path) -> Outcome:
        finetune = ("--deepspeed_config", "ds.json", "--model", "model.json", "--output", "out")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                module.parse([*(START if program == "pretrain" else finetune), text])
        except SystemExit as end:
            last = printed.getvalue().strip().splitlines()[-1]
            named = end.code == 2 and "error: " in last and mentions in last
            return Outcome("refused" if named else "no message", last)
        except Exception as error:
            return Outcome("traceback", repr(error))
        return Outcome("accepted")

    return Trial(f"{program} {text}", judge, compact=True)


def _same() -> Iterator[Trial]:
    """Configurations that mean the same as another one, and must be read so."""

    def judge(folder: Path, write: Callable[[Path], Any], wanted: dict[str, Any]) -> Outcome:
        _prepare(folder, None)
        write(folder / "ds.json")
        try:
            plan = _plan(folder)
        except Exception as error:
            return Outcome("other result", f"{type(error).__name__}: {error}")
        found = {key: getattr(plan.identity, key) for key in wanted}
        return Outcome("same result" if found == wanted else "other result", str(found))

    def same(name: str, config: dict[str, Any], **wanted: Any) -> Trial:
        write = partial(Path.write_text, data=json.dumps(config))
        return Trial(f"read as DeepSpeed does: {name}", partial(judge, write=write, wanted=wanted), compact=True)

    marked = partial(Path.write_bytes, data=json.dumps(good()).encode("utf-8-sig"))
    yield Trial("read: a byte order mark", partial(judge, write=marked, wanted={"zero_stage": 1}), compact=True)
    yield same("zero_optimization true", _with("zero_optimization", True), zero_stage=1)
    yield same("zero_optimization false", _with("zero_optimization", False), zero_stage=0)
    yield same("a float that is whole", _with("zero_optimization.reduce_bucket_size", 5e8), zero_stage=1)
    yield same("auto batch size", _with("train_batch_size", "auto"), train_batch_size=2)
    yield same("comments", {**good(), "_note": 1, "//": "x", "comment": "y"}, zero_stage=1)
    yield same("bf16", {**good(), "bf16": {"enabled": True}}, precision="bf16")
    yield same("bf16 off", {**good(), "bf16": {"enabled": False}}, precision="fp32")


def _started() -> Iterator[Trial]:
    """A few that are started on two ranks: one line, printed once, and no rank waits."""
    cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "zero_optimization 2": (_with("zero_optimization", 2), ()),
        "misspelt optimiser": (_with("optimiser", {}), ()),
        "scheduler without params": ({**good(), "scheduler": {"type": "WarmupLR"}}, ()),
        "fp16 and bf16": ({**good(), "fp16": {"enabled": True}, "bf16": {"enabled": True}}, ()),
        "wandb": (_with("wandb.enabled", True), ()),
        "autotp 0": (_with("tensor_parallel.autotp_size", 0), ()),
        "three heads over two ranks": (_with("tensor_parallel.autotp_size", 2), ("--model", "three.json")),
        "unknown flag": (good(), ("--no-such-flag",)),
        "seed 2**64": (good(), ("--seed", str(2**64))),
        "matrix-lr-scale -1": (good(), ("--matrix-lr-scale", "-1")),
        "warmup nan": (good(), ("--warmup", "nan")),
        "lr nan": (good(), ("--lr", "nan")),
    }
    for name, (config, flags) in cases.items():
        yield Trial(f"started: {name}", partial(_start, config=config, flags=flags))


def _start(folder: Path, *, config: dict[str, Any], flags: tuple[str, ...]) -> Outcome:
    work = folder / "work"
    work.mkdir()
    _prepare(work, config)
    heads = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    (work / "three.json").write_text(json.dumps(MODEL | heads))
    finished = run("pretrain", [*START, *flags], 2, work)
    outcome = finished.refusal()
    if outcome.verdict == "refused" and finished.err.count("error: ") != 1:
        return Outcome("no message", finished.err)
    return outcome
