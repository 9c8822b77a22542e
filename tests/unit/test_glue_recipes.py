"""The GLUE settings: what ds_configs/README.md says of them is true, and each could be started as it stands."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import ds_lowrank
from ds_lowrank.adapters.model import add_adapters
from ds_lowrank.data.glue import GLUE
from ds_lowrank.finetuning.arguments import parse
from ds_lowrank.integration.unsupported_settings import check_supported
from ds_lowrank.optimizer.options import METHODS, parse_options
from ds_lowrank.optimizer.roles import role_of
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters
from ds_lowrank.training.config import read_config
from ds_lowrank.training.plan import settle_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ds_configs" / "glue"
README = (ROOT / "ds_configs" / "README.md").read_text()
COMMANDS = re.findall(r"`(glue [^`<]+)`", README)
# Table 7 of GaLore's paper, and the README of GradNormLoRP.
SCALES = {"galore_rank4": 4.0, "galore_rank8": 2.0}
GALORE = {
    4: {"cola": 3e-5, "stsb": 1e-5, "mrpc": 3e-5, "rte": 1e-5, "sst2": 1e-5, "mnli": 1e-5, "qnli": 1e-5, "qqp": 1e-5},
    8: {"cola": 1e-5, "stsb": 3e-5, "mrpc": 2e-5, "rte": 2e-5, "sst2": 2e-5, "mnli": 1e-5, "qnli": 1e-5, "qqp": 2e-5},
}
GRADNORMLORP = ("gradnormlorp_rank8", "gradnormlorp_full_rank4", "gradnormlorp_rank4")
LORA = "lora_rank8"
RATES = {f"galore_rank{rank}": rates for rank, rates in GALORE.items()} | {
    name: dict.fromkeys(GLUE, 3e-5) for name in (*GRADNORMLORP, LORA)
}


def expanded(command: str) -> list[str]:
    """The arguments that a shell gives launch/finetune.py for a command of the README."""
    (function,) = re.findall(r"^```bash\n(glue\(\).*?)^```$", README, re.M | re.S)
    script = f"deepspeed() {{ printf '%q ' \"$@\"; }}\n{function}{command}"
    words = shlex.split(subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout)
    return words[words.index("launch/finetune.py") + 1 :]


def encoder_matrices() -> dict[str, tuple[int, int]]:
    """What the default rule projects in RoBERTa-base."""
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        model = RobertaForSequenceClassification(config)
    tag_parameters(model)
    named = [(name, p, tuple(p.shape)) for name, p in model.named_parameters()]
    return {name: shape for name, p, shape in named if role_of(tag_of(p), shape, None, ()).projected}


def test_every_task_of_the_paper_has_its_settings():
    promised = {(configuration, task) for configuration, tasks in RATES.items() for task in tasks}
    assert {tuple(command.split()[1:3]) for command in COMMANDS} == promised
    assert {path.stem for path in FOLDER.iterdir()} == {configuration for configuration, _ in promised}
    assert all(set(tasks) == set(GLUE) - {"wnli"} for tasks in GALORE.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_setting_can_be_started_as_documented(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parse(expanded(command))
    task = arguments.data.removeprefix("glue:")
    for ranks in (1, 2, 4, 8, 16):
        config = read_config(arguments.deepspeed_config)
        batch = settle_config(arguments, config, ranks)
        large = task == "cola" and "galore" in command
        assert (batch.total, batch.accumulation) == (32 if large else 16, 1)
    check_supported(config, config["optimizer"]["type"])
    params, configuration = config["optimizer"]["params"], Path(arguments.deepspeed_config).stem
    assert (params["lr"], params["weight_decay"], config["gradient_clipping"]) == (RATES[configuration][task], 0.0, 0.0)
    assert (arguments.epochs, arguments.max_length, arguments.schedule, arguments.warmup) == (30, 512, "linear", 0)
    lora = (arguments.lora_rank, arguments.lora_alpha, arguments.lora_targets)
    assert lora == ((8, 16.0, ["query", "value"]) if configuration == LORA else (None, 16.0, None))
    if configuration == LORA:
        return
    method = METHODS[config["optimizer"]["type"]]
    options = parse_options(method, params)
    rank = int(configuration.rpartition("rank")[2])
    scale = SCALES.get(configuration, 4.0)
    assert (options.rank, options.scale, options.update_proj_gap) == (rank, scale, 500)
    assert (options.eps, options.eps_root) == (1e-6, "uncorrected")
    if method.name == "GradNormLoRP" and "full" not in configuration:
        adapter = (options.adapter_rank, options.adapter_alpha, options.adapter_dropout, options.detach_norm)
        assert (options.parametrization, *adapter) == ("adapter", 8, 16.0, 0.1, True)


@pytest.mark.parametrize("path", sorted(set(FOLDER.iterdir()) - {FOLDER / f"{LORA}.json"}), ids=lambda path: path.stem)
def test_the_encoder_s_matrices_are_projected_and_nothing_else(path):
    block = json.loads(path.read_text())["optimizer"]
    method = METHODS[block["type"]]
    options = parse_options(method, block["params"])
    matrices = encoder_matrices()
    assert len(matrices) == 12 * 6 and all(name.startswith("roberta.encoder.layer.") for name in matrices)
    if options.adapters:
        return
    for shape in set(matrices.values()):
        assert method.unsupported_shape(shape, options) is None and method.rank(shape, options) == options.rank


@pytest.mark.parametrize("name", ["gradnormlorp_rank4", "gradnormlorp_rank8"])
def test_adapters_are_where_peft_puts_them_by_default(name):
    params = json.loads((FOLDER / f"{name}.json").read_text())["optimizer"]["params"]
    peft = pytest.importorskip("peft")
    dora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="SEQ_CLS", use_dora=True)
    theirs = peft.get_peft_model(small_roberta(), dora)
    expected = {
        name.removesuffix(".lora_A")
        for name, module in theirs.base_model.model.named_modules()
        if name.endswith(".lora_A") and len(module)
    }
    model = small_roberta()
    added = add_adapters(model, **parse_options(METHODS["GradNormLoRP"], params).adapters)
    assert set(added) == expected and len(added) == 2 * 2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    peft_trained = {name for name, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    heads = {name.replace(".modules_to_save.default", "") for name in peft_trained if "classifier" in name}
    assert {name for name in trained if "classifier" in name} == heads
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    optimizer = ds_lowrank.GradNormLoRP(model, **params)
    optimizer.bind()
    assert len(optimizer.slots) == len(trained)


def small_roberta() -> RobertaForSequenceClassification:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=61, max_position_embeddings=40, **sizes))
