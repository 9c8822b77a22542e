"""What `make pretrain` and `make finetune` print on a terminal before the first step: little, and nothing idle."""

import fcntl
import os
import pty
import re
import shlex
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.unit.pages import ROOT

MOST_LINES = 25
# What libraries say of themselves, which no user of ours can do anything about.
NOISE = re.compile(
    r"\[INFO\]|Warning|deprecat|NUMA|numactl|OMP_NUM_THREADS|destroy_process_group|parallelism|pydantic|torchvision"
    r"|async_io|triton|Gloo|socket\.cpp|TORCH_|Traceback|libaio|nvcc|kernel",
    re.IGNORECASE,
)
# DeepSpeed's two launcher processes, on a machine where it finds no GPU: who has one has to know it.
ABOUT_THE_DEVICE = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


def command_of(target: str, *variables: str) -> list[str]:
    """The command that a target of the Makefile runs, on a free port."""
    printed = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target, f"VENV={sys.prefix}", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", " ")
    (line,) = [line for line in printed.splitlines() if f"launch/{target}.py" in line]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = shlex.split(line)
    launcher = next(i for i, word in enumerate(words) if word.endswith("/deepspeed"))
    quiet = [] if {"-q", "--quiet"} & set(words) else ["--quiet"]
    return [*words[: launcher + 1], *quiet, "--master_port", port, *words[launcher + 1 :]]


def on_a_terminal(command: list[str], cache: Path) -> tuple[int, str]:
    """Run a command on a terminal of 24 x 120 characters; its exit code and all that it printed there."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "DS_LOG_LEVEL")}
    environment |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["env", *command], cwd=ROOT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(controller, 65536)
        except OSError:  # the last process has closed the terminal
            break
    os.close(controller)
    return process.wait(), output.decode()


@pytest.mark.slow
def test_the_first_step_is_on_the_first_screen(tmp_path):
    output, cache = tmp_path / "run", tmp_path / "cache"
    commands = {
        "pretrain": command_of("pretrain", "STEPS=2", f"OUTPUT={output}"),
        "finetune": command_of("finetune", f"OUTPUT={output}", f"FINETUNED={tmp_path / 'finetuned'}"),
    }
    epochs = commands["finetune"].index("--epochs")
    commands["finetune"][epochs : epochs + 2] = ["--steps", "2"]  # instead of two passes over the data
    for target, command in commands.items():
        code, printed = on_a_terminal(command, cache)
        assert code == 0, printed
        before = printed.partition("step 1/2 | loss")[0]
        assert before != printed, printed
        lines = [line.rpartition("\r")[2] for line in before.replace("\r\n", "\n").splitlines()]
        lines = [line for line in lines if line.strip()]
        assert len(lines) <= MOST_LINES, "\n".join(lines)
        device = [line for line in lines if ABOUT_THE_DEVICE in line]
        assert len(device) <= 2
        idle = [line for line in lines if NOISE.search(line) and line not in device and "fused AdamW" not in line]
        assert not idle, f"{target}:\n" + "\n".join(idle)
        after = printed.partition("step 2/2 | loss")[2]
        assert not NOISE.search(after), after
