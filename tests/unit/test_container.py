"""The image's Dockerfile, and its page, without a container.

tests/container/build_and_run builds and runs the image, where there is root.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ds_lowrank
from tests.unit.container_programs import ENTRYPOINT, program
from tests.unit.pages import PAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def arguments_of(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last pattern that matches it, or a folder that it is in, counts."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            parts = Path(path).parts
            prefixes = ["/".join(parts[: number + 1]) for number in range(len(parts))]
            anywhere = pattern.startswith("**/") and any(fnmatch(part, pattern[3:]) for part in parts)
            if anywhere or any(fnmatch(prefix, pattern) for prefix in prefixes):
                verdict = not line.startswith("!")
    return verdict


def test_the_image_ends_with_a_user_that_is_not_root_and_has_no_healthcheck():
    assert arguments_of("USER")[-1] == "1000:1000"
    assert not arguments_of("HEALTHCHECK")
    assert arguments_of("ENTRYPOINT") == ['["/opt/ds_lowrank/launch/container/entrypoint"]']
    assert ENTRYPOINT.stat().st_mode & 0o111 == 0o111


def test_no_variable_of_the_image_is_made_for_a_secret():
    names = [argument.partition("=")[0] for argument in arguments_of("ARG")]
    names += [word.partition("=")[0] for rest in arguments_of("ENV") for word in shlex.split(rest)]
    assert {"BASE", "EXTRAS", "VERSION", "PATH", "XDG_CACHE_HOME"} <= set(names)
    assert not [name for name in names if re.search(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|URL", name)]
    installs = [rest for rest in arguments_of("RUN") if "pip install" in rest and "--no-index" not in rest]
    assert installs and all(rest.startswith("--mount=type=secret,id=pip ") for rest in installs)


def test_what_is_copied_exists_and_is_not_ignored():
    sources = [source for rest in arguments_of("COPY") for source in rest.split()[:-1]]
    assert sources[-1] == "."
    for source in sources[:-1]:
        assert (ROOT / source).exists() and not ignored(source), source


@pytest.mark.parametrize(
    ("path", "kept_out"),
    [
        *(
            (name, False)
            for name in ("launch/pretrain.py", "launch/container/entrypoint", "ds_configs/galore_zero2.json")
        ),
        *((name, False) for name in ("ds_lowrank/linalg/sketch.py", "ds_lowrank/py.typed", "LICENSE", "README.md")),
        *((name, True) for name in (".git/config", ".env", "id_ed25519", "runs/a/export/config.json", ".venv/bin/pip")),
        *((name, True) for name in ("tests/methods.py", "ds_lowrank/__pycache__/errors.pyc", "Dockerfile")),
    ],
)
def test_what_is_ignored(path, kept_out):
    assert ignored(path) == kept_out


def test_packages_are_installed_before_the_code_is_copied():
    steps = [f"{name} {rest}" for name, rest in instructions()]
    (code,) = (number for number, step in enumerate(steps) if step == "COPY . .")
    (packages,) = (number for number, step in enumerate(steps) if "--requirement /opt/venv/requirements.txt" in step)
    copied = " ".join(step for step in steps[:packages] if step.startswith("COPY"))
    assert packages < code and "ds_lowrank" not in copied
    assert not [step for step in steps[code:] if step.startswith("RUN") and "--no-index" not in step]


def test_the_extras_exist_and_are_those_that_the_programs_need():
    (default,) = (rest.partition("=")[2] for rest in arguments_of("ARG") if rest.startswith("EXTRAS"))
    assert default.split(",") == ["train", "finetune", "huggingface", "megatron"]
    assert set(default.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_labels_are_those_of_the_package():
    (text,) = arguments_of("LABEL")
    prefix = "org.opencontainers.image."
    labels = dict(word.removeprefix(prefix).split("=", 1) for word in shlex.split(text))
    assert labels.keys() == {"title", "description", "licenses", "version", "base.name"}
    assert labels["licenses"] == PROJECT["license"] and labels["version"] == "${VERSION}"
    assert f"VERSION={ds_lowrank.__version__}" in arguments_of("ARG")
    assert PROJECT["description"].startswith("Low-rank gradient projection")
    assert labels["title"] == "ds_lowrank" and labels["description"].startswith("Low-rank gradient projection")


NVIDIAS = {
    "torch": "2.12.0a0+0291f960b6.nv26.6",
    "pytorch-triton": "3.7.0+git5",
    "torchvision": "0.26.0a0",
    "transformer-engine": "2.14.0",
    "nvidia-cudnn-frontend": "1.20",
    "numpy": "2.3.0",
}


def test_a_torch_that_the_base_has_is_kept_with_what_belongs_to_it():
    requirements = program("requirements")
    kept = requirements.kept(NVIDIAS)
    assert kept.keys() == NVIDIAS.keys() - {"numpy"}
    lines = requirements.constraints((ROOT / "constraints.txt").read_text(), kept)
    pinned = [Requirement(line) for line in lines]
    names = [requirements.canonical(one.name) for one in pinned]
    assert len(set(names)) == len(names)
    (torch,) = (one for one in pinned if one.name == "torch")
    assert torch.specifier.contains(NVIDIAS["torch"]) and not torch.specifier.contains("2.13.0")
    assert "deepspeed==0.19.8" in lines and "numpy==2.4.6" in lines


def test_without_a_torch_in_the_base_the_projects_versions_are_taken():
    requirements = program("requirements")
    assert requirements.kept({"nvidia-ml-py": "13.0", "numpy": "1.26"}) == {}
    text = (ROOT / "constraints.txt").read_text()
    assert requirements.constraints(text, {}) == [line for line in text.splitlines() if not line.startswith("#")]


def test_requirements_are_those_of_the_extras_and_of_the_build():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = program("requirements")
    found = requirements.requirements(project, ["train", "megatron"])
    assert {"setuptools>=77", "deepspeed==0.19.8", "tokenizers", "megatron-core==0.16.1"} <= set(found)
    assert "ruff" not in found
    with pytest.raises(SystemExit, match=r"error: no extra no_such in pyproject\.toml: it has dev, "):
        requirements.requirements(project, ["no_such"])


def documented() -> list[list[str]]:
    """What docs/containers.md runs in a container: the words after the name of the image, or of the container."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGES["containers"], re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for words in lines:
        if words[:2] in (["docker", "run"], ["docker", "exec"]):
            name = re.compile(r"ds-lowrank:[\w.-]+" if words[1] == "run" else "lowrank")
            found.append(words[next(number for number, word in enumerate(words) if name.fullmatch(word)) + 1 :])
    return found


@pytest.mark.parametrize("command", documented(), ids=lambda command: " ".join(command)[:40])
def test_documented_commands_can_be_run(command):
    from ds_lowrank.training.arguments import parse

    if "launch/pretrain.py" not in command:
        assert command in (["smoke"], ["sshd"])
        return
    arguments = parse(command[command.index("launch/pretrain.py") + 1 :])
    assert (ROOT / arguments.deepspeed_config).is_file() and (ROOT / arguments.model).is_file()


def test_the_page_names_what_the_dockerfile_has():
    page = PAGES["containers"]
    for default in arguments_of("ARG"):
        name, _, value = default.partition("=")
        assert f"| `{name}` |" in page
        assert not value or value in page or name == "VERSION"
    assert len(documented()) == 5
    for image in re.findall(r"ds-lowrank:([\w.]+)", page):
        assert image == ds_lowrank.__version__
