"""The published recipes: what ds_configs/README.md says of them is true, and each could be started as it stands."""

import functools
import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import config as deepspeed_config
from transformers import LlamaForCausalLM

from ds_lowrank.finetuning import arguments as finetuning
from ds_lowrank.integration.unsupported_settings import check_supported
from ds_lowrank.models.llama import load_config
from ds_lowrank.optimizer.options import METHODS, parse_options
from ds_lowrank.optimizer.roles import role_of
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.config import read_config
from ds_lowrank.training.plan import make_plan, settle_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
MODELS = sorted((CONFIGS / "models").glob("*.json"))
README = (CONFIGS / "README.md").read_text()
PUBLISHED = {
    "galore": {"60m", "130m", "350m", "1b", "7b"},
    "online_subspace_descent": {"60m", "350m", "1b", "7b"},
    "online_subspace_descent_paper": {"60m", "7b"},
    "apollo": {"60m", "130m", "350m", "1b", "7b"},
    "apollo_mini": {"60m", "130m", "350m", "1b", "7b"},
    "apollo_long": {"350m"},
    "apollo_mini_long": {"350m"},
    "gradnormlorp": {"60m"},
}
# What the README's text says of all sizes.
AT_EVERY_SIZE = {
    "GaLore": {"eps_root": "corrected", "eps": 1e-8, "scale": 0.25, "projector": "svd"},
    "OnlineSubspaceDescent": {
        "eps_root": "uncorrected",
        "eps": 1e-6,
        "scale": 0.25,
        "pca_lambda": 0.1,
        "basis_weight_decay": None,
    },
    "Apollo": {
        "eps_root": "uncorrected",
        "ratio_moments": "uncorrected",
        "eps": 1e-6,
        "lr": 0.01,
        "update_proj_gap": 200,
        "norm_growth_limit": 1.01,
    },
    "GradNormLoRP": {
        "eps_root": "uncorrected",
        "eps": 1e-6,
        "scale": 0.25,
        "state_dtype": "int8",
        "parametrization": "full",
    },
}


def documented() -> dict[str, dict[str, str]]:
    """The rows of the tables of recipes: a command, and what its row says under keys that are spelt as in the JSON."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", README, re.M):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for cells in lines if head[0] == "command" else []:
            row = dict(zip(head, cells, strict=True))
            found[row["command"].strip("`")] = {
                key.strip("`"): value for key, value in row.items() if key.startswith("`")
            }
    return found


RECIPES = documented()


def expanded(command: str) -> list[str]:
    """The arguments that a shell gives launch/pretrain.py for a command of the README."""
    (function,) = re.findall(r"^```bash\n(recipe.*?)^```$", README, re.M | re.S)
    script = f"deepspeed() {{ printf '%q ' \"$@\"; }}\n{function}{command}"
    words = shlex.split(subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout)
    return words[words.index("launch/pretrain.py") + 1 :]


@functools.cache
def matrices(model: Path) -> dict[str, tuple[int, int]]:
    """The shapes of what the default rule projects."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(load_config(model))
    tag_parameters(llama)
    named = [(name, p, tuple(p.shape)) for name, p in llama.named_parameters()]
    return {name: shape for name, p, shape in named if role_of(tag_of(p), shape, None, ()).projected}


def test_what_is_published_is_there_and_documented():
    promised = {f"{method}_llama_{size}" for method, sizes in PUBLISHED.items() for size in sizes}
    assert {path.stem for path in (CONFIGS / "recipes").iterdir()} == promised
    assert {"{1}_llama_{2}".format(*command.split()) for command in RECIPES} == promised


def test_the_basis_moves_at_the_rates_of_the_published_code_and_of_the_paper():
    """The code's is 1 / update_proj_gap at the peak, with a gap of 200 and for the 7B of 500; the paper's 5 lr."""
    for size, gap in (("60m", 200), ("350m", 200), ("1b", 200), ("7b", 500)):
        names = [f"online_subspace_descent{kind}_llama_{size}" for kind in ("", "_paper")]
        paths = [CONFIGS / "recipes" / f"{name}.json" for name in names]
        code, *paper = [json.loads(path.read_text())["optimizer"]["params"] for path in paths if path.exists()]
        assert math.isclose(code["basis_lr_ratio"] * code["lr"], 1 / gap)
        for params in paper:
            assert params == code | {"basis_lr_ratio": 5.0}


@pytest.mark.parametrize("command", RECIPES)
def test_a_recipe_can_be_started_as_documented(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parse([*expanded(command), "--output", str(tmp_path)])
    plan = make_plan(arguments, ranks=8)
    config = plan.config
    _, name, size, steps, *_ = command.split()
    assert arguments.deepspeed_config.endswith(f"{name}_llama_{size}.json")
    assert arguments.model.name == f"llama_{size}.json"
    assert (plan.batch.total, plan.tokens_per_step) == (512, 512 * (1024 if "_long" in name else 256))
    assert (arguments.steps, plan.warmup) == (int(steps), int(steps) // 10)
    method = METHODS[config["optimizer"]["type"]]
    check_supported(config, method.name)
    options = parse_options(method, config["optimizer"]["params"])
    for key, value in {"weight_decay": 0, "betas": (0.9, 0.999), **AT_EVERY_SIZE[method.name]}.items():
        assert getattr(options, key) == value, key
    assert config["gradient_clipping"] == {"Apollo": 0, "OnlineSubspaceDescent": 1}.get(
        method.name, config["gradient_clipping"]
    )
    for key, text in RECIPES[command].items():
        value = config[key] if key in config else getattr(options, key)
        # The table rounds sqrt(128) to six digits.
        assert math.isclose(float(text), value, rel_tol=1e-6) if isinstance(value, int | float) else text == value, key


@pytest.mark.parametrize("command", RECIPES)
def test_a_recipe_fits_every_matrix_of_its_model(command):
    _, name, size, *_ = command.split()
    block = json.loads((CONFIGS / "recipes" / f"{name}_llama_{size}.json").read_text())["optimizer"]
    method = METHODS[block["type"]]
    options = parse_options(method, block["params"])
    model = CONFIGS / "models" / f"llama_{size}.json"
    shapes = matrices(model)
    assert len(shapes) == 7 * load_config(model).num_hidden_layers
    for shape in set(shapes.values()):
        assert method.unsupported_shape(shape, options) is None
        assert method.rank(shape, options) == options.rank  # none is so small that it would be clipped


def recipes_and_ranks() -> list[tuple[Path, int]]:
    """Every recipe at the numbers of ranks that the README names."""
    paths = sorted((CONFIGS / "recipes").iterdir())
    return [(path, ranks) for path in paths for ranks in (1, 2, 4, 8, 64) if ranks <= 8 or path.stem.endswith("7b")]


@pytest.mark.parametrize(("path", "ranks"), recipes_and_ranks(), ids=lambda value: getattr(value, "stem", str(value)))
def test_deepspeed_accepts_a_recipe(path, ranks, monkeypatch):
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda *_: 0)
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: ranks)
    read = deepspeed_config.DeepSpeedConfig(str(path), mpu)
    assert read.world_size == ranks
    assert read.train_micro_batch_size_per_gpu * read.gradient_accumulation_steps * ranks == 512
    assert read.bfloat16_config.enabled and read.zero_config.stage == (3 if path.stem.endswith("7b") else 2)
    assert read.gradient_clipping == json.loads(path.read_text())["gradient_clipping"]  # absent, it would be 1.0


FINETUNING = sorted((CONFIGS / "finetuning").iterdir())
(TUNING,) = re.findall(r"^## Fine-tuning\n(.*?)^## ", README, re.M | re.S)
SHAPES = {
    "meta-llama/Llama-2-7b-hf": {(4096, 4096), (11008, 4096), (4096, 11008)},
    "meta-llama/Meta-Llama-3-8B-Instruct": {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)},
    "meta-llama/Llama-3.2-1B": {(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)},
}
"""What is projected in the published models."""
# Batch, warm-up, and what is in optimizer.params.
TUNED = {
    "vlorp_llama2_7b": (
        *(512, 0),
        {"lr": 2e-5, "eps": 1e-6, "scale": 0.25, "rank": 1, "c": 256, "update_proj_gap": 30, "left_view": "official"},
    ),
    "apollo_llama3_8b": (1, 0.1, {"lr": 1e-5, "eps": 1e-6, "rank": 128, "scale": 32**0.5}),
    "apollo_commonsense": (32, 100, {"lr": 3e-4, "eps": 1e-6, "rank": 32, "scale": 5**0.5}),
    "apollo_mini_commonsense": (32, 100, {"lr": 3e-4, "eps": 1e-6, "rank": 1, "scale": 128**0.5, "mini": True}),
}


def tuning_commands() -> dict[str, list[str]]:
    """The arguments of launch/finetune.py by the file that a command names."""
    (block,) = re.findall(r"^```bash\n(.*?)^```$", TUNING, re.M | re.S)
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    found = [line[line.index("launch/finetune.py") + 1 :] for line in lines]
    return {Path(line[line.index("--deepspeed_config") + 1]).stem: line for line in found}


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_a_fine_tuning_can_be_started_as_documented(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = finetuning.parse(tuning_commands()[path.stem])
    config = read_config(arguments.deepspeed_config)
    ranks = (1,) if path.stem == "apollo_llama3_8b" else (1, 2, 4, 8)
    total, warmup, expected = TUNED[path.stem]
    for size in ranks:
        assert settle_config(arguments, read_config(arguments.deepspeed_config), size).total == total
    assert (arguments.warmup, config["gradient_clipping"]) == (warmup, 0.0)
    method = METHODS[config["optimizer"]["type"]]
    check_supported(config, method.name)
    options = parse_options(method, config["optimizer"]["params"])
    for key, value in {"weight_decay": 0.0, "betas": (0.9, 0.999), **expected}.items():
        found = getattr(options, key)
        assert found == value or math.isclose(found, value, rel_tol=1e-6), key
    for shape in SHAPES[str(arguments.model)]:
        assert method.unsupported_shape(shape, options) is None
        assert method.rank(shape, options) == options.rank
    row = next(line for line in TUNING.splitlines() if line.startswith(f"| `{path.name}` |"))
    assert [float(cell) for cell in row.split(" | ")[1:3]] == [options.lr, options.rank]


def test_every_fine_tuning_is_documented():
    assert {path.stem for path in FINETUNING} == set(tuning_commands()) == set(TUNED)


READY = [
    path
    for path in sorted(CONFIGS.glob("*.json"))
    if not path.stem.startswith("hf_") and json.loads(path.read_text())["optimizer"]["type"] in METHODS
]
"""For the programs; what the Trainer fills in first is tested in tests/huggingface."""


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_configuration_fits_every_model(path):
    config = json.loads(path.read_text())
    method = METHODS[config["optimizer"]["type"]]
    check_supported(config, method.name)
    options = parse_options(method, config["optimizer"]["params"])
    for model in MODELS:
        for shape in set(matrices(model).values()):
            assert method.unsupported_shape(shape, options) is None, model.stem


def test_ready_configurations_have_moments_of_the_documented_size():
    """Numbers a row of the longer side: rank, or units a row times rank."""
    for path in READY:
        optimizer = json.loads(path.read_text())["optimizer"]
        params = optimizer["params"]
        is_whole = params.get("rank", 1) is None or params.get("full_share") == 1
        if is_whole or optimizer["type"] in ("Scale", "Racs"):  # nothing is projected
            continue
        width = params.get("rank", params.get("rank_max", 1)) * params.get("granularity", 1)
        own = {"llama_7b_24gb": 256}.get(path.stem, 64)  # what its memory allows
        assert width == (1 if params.get("mini") else own), path.stem
