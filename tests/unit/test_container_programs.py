"""What the image starts: entry point, sshd, smoke; and how build_and_run hands pip's settings into a build."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.container import main, pip_settings
from tests.unit.container_programs import ENTRYPOINT, FOLDER, program
from tests.unit.pages import ROOT


def fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def enter(*words: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    environment = {**os.environ, "PATH": search, **variables}
    return subprocess.run([ENTRYPOINT, *words], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [(), ("help",), ("--help",)])
def test_the_entry_point_without_a_command_says_what_can_be_run(words):
    done = enter(*words)
    assert done.returncode == 0
    for command in ("smoke", "python -m ds_lowrank doctor", "deepspeed --quiet --num_gpus 2", "torchrun", "sshd"):
        assert f"\n  {command}" in done.stdout


def test_its_quick_start_is_that_of_the_makefile():
    recipe = re.search(r"^pretrain:.*?\n\t(.*?)\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)[1]
    values = {"BIN": "", "RANKS": "2", "STEPS": "200", "OUTPUT": "runs/quickstart"}
    recipe = re.sub(r"\$\((\w+)\)/?", lambda match: values[match[1]], recipe.replace("\\\n", " "))
    usage = " ".join(enter().stdout.replace("\\\n", " ").split())
    assert " ".join(recipe.split()) in usage


def test_it_becomes_the_command_and_returns_its_exit_code():
    with subprocess.Popen([ENTRYPOINT, "sh", "-c", "echo $$; exit 7"], stdout=subprocess.PIPE, text=True) as started:
        assert int(started.stdout.read()) == started.pid
    assert started.returncode == 7


def test_sigterm_reaches_the_command():
    code = "trap 'echo saved; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen([ENTRYPOINT, "sh", "-c", code], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "ready\n"
        started.send_signal(signal.SIGTERM)
        assert started.stdout.read() == "saved\n"
    assert started.returncode == 3


def test_a_command_that_does_not_exist_is_one_line():
    done = enter("pretrain")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "error: there is no command pretrain in the image: run it without a command for a list\n"


@pytest.mark.parametrize("name", ["smoke", "sshd"])
def test_its_own_commands(name, tmp_path):
    fake(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    done = enter(name, "--ranks", "a b", path=tmp_path / "bin")
    assert done.stdout.splitlines() == [str(FOLDER / f"{name}.py"), "--ranks", "a b"]


def test_without_a_home_there_is_one_and_a_name(tmp_path):
    fake(tmp_path / "bin", "id", "exit 1")
    variables = {"HOME": "/nowhere/at/all", "USER": "", "LOGNAME": "", "TMPDIR": str(tmp_path)}
    done = enter("sh", "-c", 'echo "$HOME $USER $LOGNAME"; test -w "$HOME"', path=tmp_path / "bin", **variables)
    home, *names = done.stdout.split()
    assert done.returncode == 0 and Path(home).parent == tmp_path and names == ["user", "user"]
    assert enter("sh", "-c", "echo $HOME", HOME=str(tmp_path)).stdout == f"{tmp_path}\n"


def test_sshd_hands_on_the_environment_of_the_container(tmp_path):
    sshd = program("sshd")
    environment = {
        "PATH": "/opt/venv/bin:/usr/bin",
        "HF_HOME": "/cache/a b",
        "ODD": 'a"b\\c',
        "LINES": "1\n2",
        "HOME": "/root",
    }
    text = sshd.configuration(environment, 2299, tmp_path / "host_key", Path("/home/trainer/.ssh/authorized_keys"))
    (line,) = (line for line in text.splitlines() if line.startswith("SetEnv"))
    assert line == r'SetEnv "HF_HOME=/cache/a b" "ODD=a\"b\\c" "PATH=/opt/venv/bin:/usr/bin"'
    if not Path("/usr/sbin/sshd").exists() or shutil.which("ssh-keygen") is None:
        pytest.skip("OpenSSH is not installed")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "host_key"], check=True)
    (tmp_path / "config").write_text(text)
    command = ["/usr/sbin/sshd", "-T", "-f", tmp_path / "config"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "privilege separation directory" in done.stderr:
        pytest.skip("sshd as root needs /run/sshd, which a service makes")
    assert done.returncode == 0, done.stderr
    expected = {"port 2299", "passwordauthentication no", "usepam no", "strictmodes no", "setenv HF_HOME=/cache/a b"}
    assert expected <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("variables", "keys", "message"),
    [
        ({}, False, r"error: cannot read .*/\.ssh/authorized_keys: mount a folder with the keys on .*/\.ssh$"),
        ({"SSHD_PORT": "ssh"}, True, r"error: the environment variable SSHD_PORT is 'ssh': it must be a port$"),
    ],
)
def test_what_sshd_needs_is_said_in_one_line(monkeypatch, tmp_path, variables, keys, message):
    sshd = program("sshd")
    monkeypatch.setattr(sshd.pwd, "getpwuid", lambda uid: type("User", (), {"pw_dir": str(tmp_path)}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if keys:
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/authorized_keys").touch()
    with pytest.raises(SystemExit, match=message):
        sshd.main()


def test_sshd_needs_a_user_with_a_name(monkeypatch):
    sshd = program("sshd")
    monkeypatch.setattr(sshd.os, "getuid", lambda: 987654)
    with pytest.raises(SystemExit, match=r"error: ssh needs a user that the image knows, not 987654: run as 1000$"):
        sshd.main()


def test_ssh_uses_the_port_of_sshd():
    assert re.search(r"^ +Port 2222$", (FOLDER / "ssh_config").read_text(), re.M)
    assert program("sshd").PORT == 2222


def test_smoke_trains_what_the_programs_take(tmp_path):
    from ds_lowrank.training.arguments import parse

    command = program("smoke").training(tmp_path, 2, 10)
    assert command[:4] == ["deepspeed", "--num_gpus", "2", "launch/pretrain.py"]
    arguments = parse(command[4:])
    assert all((ROOT / path).exists() for path in (arguments.deepspeed_config, arguments.model, arguments.data))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({1: 3.0, 3: 2.0}, r"steps \[1, 3\] are recorded, not 1 to 3"),
        ({1: 3.0, 2: 2.0, 3: 3.0}, "the loss does not fall"),
        ({1: 3.0, 2: float("nan"), 3: 2.0}, "the loss does not fall"),
    ],
)
def test_smoke_sees_a_run_that_does_not_learn(losses, message):
    smoke = program("smoke")
    with pytest.raises(smoke.SmokeError, match=message):
        smoke.check_losses(losses, 3)
    assert smoke.check_losses({1: 3.0, 2: 2.5, 3: 2.0}, 3) == "loss 3.00 to 2.00"


def test_smoke_ends_at_the_first_part_that_fails_with_what_it_said(monkeypatch, capsys, tmp_path):
    smoke = program("smoke")
    code = "import sys; print('out of memory'); sys.exit(5)"
    failing = {
        "doctor": lambda output, ranks: "fine",
        "training": lambda output, ranks: smoke.run([sys.executable, "-c", code]),
        "resume": lambda output, ranks: pytest.fail("went on"),
    }
    monkeypatch.setattr(smoke, "PARTS", failing)
    assert smoke.smoke(tmp_path, 1) == 1
    assert re.fullmatch(
        r"smoke: doctor +[\d.]+ s  fine\nout of memory\nexit code 5\nsmoke: training failed\n", capsys.readouterr().out
    )


@pytest.mark.slow
def test_smoke_passes_here():
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, FOLDER / "smoke.py", "--ranks", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^smoke: (\w+)", done.stdout, re.M) == ["doctor", "training", "resume", "export"]


def test_pips_settings_are_handed_on_and_variables_win(tmp_path):
    index = tmp_path / "index/simple"
    index.mkdir(parents=True)
    listed = (
        ":env:.find-links='/no/such/folder'\n"
        "global.constraint='/etc/constraints.txt'\n"
        f"global.extra-index-url='\\nhttps://me:word@host/simple\\nfile://{index}'\n"
        "global.find-links='/elsewhere'\n"
        "global.index-url='https://pypi.org/simple'\n"
    )
    settings = pip_settings.parse(listed)
    assert settings.text == (
        "[global]\nextra-index-url = https://me:word@host/simple file:///run/pip/0/simple\n"
        "find-links = /no/such/folder\nindex-url = https://pypi.org/simple\n"
    )
    assert settings.mounts == {tmp_path / "index": "/run/pip/0"}
    assert settings.places == ["https://me:word@host/simple", f"file://{index}", "/no/such/folder"]


def test_what_the_trial_lacks_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(main.os, "geteuid", lambda: 1000)
    assert main.missing().startswith("it needs root")
    monkeypatch.setattr(main.os, "geteuid", lambda: 0)
    monkeypatch.setattr(main.shutil, "which", lambda name: None if name in ("buildah", "ip") else f"/usr/bin/{name}")
    assert main.missing() == "Debian's buildah, iproute2 are missing: apt-get install buildah iproute2"
    monkeypatch.setattr(main.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert main.missing() is None
