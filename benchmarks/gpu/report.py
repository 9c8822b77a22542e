"""The report of the GPU entry: what ran where, the tables on the screen, one JSON file."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.common import Numbers, hardware, table
from benchmarks.peers import load_galore_adamw

OPTIONAL = {
    "pytest": ("pytest", "the tests marked gpu"),
    "transformers": ("transformers", "whole training steps, engine tests, galore-torch"),
    "galore_torch": ("galore-torch", "the comparison with galore-torch"),
    "apex": ("apex", "the test of apex's fused AdamW"),
    "datasets": ("datasets", "nothing here"),
    "megatron": ("megatron-core", "nothing here"),
    "matplotlib": ("matplotlib", "nothing here"),
}
"""The distribution of each optional module, and what cannot run without it."""
STEP_COLUMNS = (
    "model", "rank", "state_dtype", "products", "optimizer", "ordinary ms", "floor ms", "refresh ms", "over AdamW",
)  # fmt: skip
MEMORY_COLUMNS = ("state MiB", "transient MiB", "peak MiB")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware and software that the numbers were measured on; *device* is what they were measured with."""
    is_cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if is_cuda else None
    return hardware() | {
        "device": str(device),
        "card": properties.name if properties else None,
        "card memory GiB": properties.total_memory / 2**30 if properties else None,
        "driver": _driver() if is_cuda else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "fp32 products": torch.get_float32_matmul_precision(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"
    return ", ".join(sorted(set(done.stdout.split("\n")) - {""}))


def packages() -> dict[str, str]:
    """Return the version of each optional package, or that it is missing and what was skipped for that."""
    found = {}
    for module, (distribution, needed_for) in OPTIONAL.items():
        if find_spec(module) is None:
            found[distribution] = f"missing; skipped for that: {needed_for}"
            continue
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "present, version unknown"
    return found


def peers() -> dict[str, str]:
    """Return the optimizers that ours are compared with: their version, or why one cannot be had."""
    found = {"AdamW (torch, fused)": str(torch.__version__)}
    try:
        load_galore_adamw()
        found["galore-torch"] = version("galore-torch")
    except Exception as error:
        found["galore-torch"] = f"missing: {type(error).__name__}: {' '.join(str(error).split())}"
    return found


def show(record: dict[str, Any]) -> None:
    """Print the record's tables, what was skipped, and the verdict."""
    on = record["hardware"]
    versions = f"driver {on['driver']}, torch {on['torch']}, CUDA {on['cuda']}, Python {on['python']}"
    print(f"{on['card'] or on['cpu']}, {versions}, seed {record['seed']}" + (", smoke run" * record["quick"]))
    _show_tests(record["tests"])
    print("\nWeights after several steps on the device against the CPU, relative difference\n")
    print(table([{**row, "agrees": _word(row["agrees"])} for row in record["agreement"]]))
    _show_times("Optimizer step", record["steps"], ())
    _show_times("Whole training step: forward, backward and step", record["whole_steps"], ("step ms",))
    if record["skipped"]:
        print("\nNot measured\n")
        print(table(record["skipped"]))
    missing = {name: text for name, text in record["packages"].items() if text.startswith("missing")}
    print(*(["", "Packages"] if missing else []), *(f"{name}: {text}" for name, text in missing.items()), sep="\n")
    print("\n" + "\n".join(record["verdict"]))


def _word(agrees: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not compared"}[agrees]


def _show_tests(tests: dict[str, Any]) -> None:
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "error", "skipped"))
    print(f"\nTests marked gpu: {tests['outcome']} ({counts})" + (f": {tests['why']}" if tests.get("why") else ""))
    for test in tests["tests"]:
        if test["outcome"] in ("failed", "error"):
            print(f"  {test['test']}: {test['why']}")


def _show_times(title: str, rows: Numbers, more: tuple[str, ...]) -> None:
    print(f"\n{title}\n")
    measured = [row for row in rows if not row["error"]]
    columns = (*STEP_COLUMNS, *more, *(MEMORY_COLUMNS if any(row["peak MiB"] for row in measured) else ()))
    print(table([{column: row[column] for column in columns} for row in measured]) if measured else "nothing")


def verdict(record: dict[str, Any]) -> tuple[list[str], int]:
    """Return one sentence for each thing that is wrong, or a single one that nothing is, and the exit code.

    A failed test, tests that did not end in time, and a method that disagrees or was not compared make it 1. Tests that
    were skipped or could not be run do not, and neither does a time that could not be measured.
    """
    wrong = []
    if record["tests"]["outcome"] in ("failed", "timed out"):
        wrong.append(f"FAILED: the tests marked gpu {record['tests']['outcome']}")
    for row in record["agreement"]:
        if row["agrees"] is not True:
            name = f"{row['method']} with state_dtype {row['state_dtype']}"
            wrong.append(f"FAILED: {name}: {row['error'] or 'differs from the CPU beyond its bound'}")
    compared = len(record["agreement"])
    tests = record["tests"]["outcome"]
    fine = f"Every method agrees with the CPU ({compared} comparisons); tests marked gpu: {tests}"
    return (wrong, 1) if wrong else ([fine], 0)
