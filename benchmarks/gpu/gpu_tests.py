"""The tests marked ``gpu``, in a process of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \((.*)\))?\s+\[")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.+?) - (.*)")
TAIL = 4000
"""Characters of the output that the record keeps where not every test passed."""


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """Run the tests and return what became of them.

    Args:
        device: ``cpu`` hides every card from the tests, which then skip.
        seconds: The time limit.

    Returns:
        ``outcome`` is ``passed``, ``failed``, ``skipped`` (all of them), ``timed out`` or ``not run``; ``why`` explains
        the last three. ``tests`` has an entry for every test that ended.
    """
    if find_spec("pytest") is None:
        return _record("not run", why="pytest is not installed")
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"), key=lambda file: ("compiled" in file.name, file.name))
    paths = [str(file.relative_to(ROOT)) for file in files]  # what compiles comes last: it takes a minute
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", *paths, "-v", "-p", "no:cacheprovider"]
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    environment = os.environ | {"COLUMNS": "400", "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return judge(output.read(), code, seconds)


def judge(text: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Read pytest's verbose output.

    Args:
        text: The output.
        code: pytest's exit code; None if it was stopped at its time limit.
        seconds: The time limit.
    """
    lines = text.splitlines()
    reasons = {match[1]: match[2] for match in map(FAILURE.match, lines) if match}
    tests = [
        {"test": match[1], "outcome": match[2].lower(), "why": match[3] or reasons.get(match[1], "")}
        for match in map(LINE.match, lines)
        if match
    ]
    outcomes = Counter(test["outcome"] for test in tests)
    if code is None:
        why = f"stopped after {seconds:.0f} s; {len(tests)} tests had ended"
        return _record("timed out", tests, why=why, output=text[-TAIL:])
    if code == 5:  # pytest's code for an empty selection
        return _record("not run", why="no test was selected", output=text[-TAIL:])
    if code or outcomes["failed"] or outcomes["error"]:
        return _record("failed", tests, output=text[-TAIL:])
    if outcomes["skipped"] == len(tests):
        return _record("skipped", tests, why="; ".join(sorted({test["why"] for test in tests})))
    return _record("passed", tests)


def _record(outcome: str, tests: list[dict[str, str]] | None = None, **more: str) -> dict[str, Any]:
    counts = Counter(test["outcome"] for test in tests or [])
    numbers = {name: counts[name] for name in ("passed", "failed", "error", "skipped")}
    return {"outcome": outcome, **numbers, **more, "tests": tests or []}
