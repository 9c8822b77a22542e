import json
from pathlib import Path

import deepspeed
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ds_lowrank.models.llama import build, config_of_folder, load_config
from ds_lowrank.models.weights import FolderWeights
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.plan import make_plan
from tests.engines.pool import run_ranks
from tests.training.runs import MODEL, ROOT, deepspeed_config

MODELS = ROOT / "ds_configs" / "models"

# Embedding + head + seven matrices a layer + norms, as in the tables of the GaLore papers.
PARAMETERS = {
    "9m": 9.00e6,
    "20m": 19.55e6,
    "35m": 35.20e6,
    "60m": 58.07e6,
    "130m": 134.11e6,
    "350m": 367.97e6,
    "1b": 1339.08e6,
    "3b": 2685.83e6,
    "7b": 6738.42e6,
    "quickstart": 3.34e6,
}


def test_every_model_file_is_counted_here():
    assert {path.stem.removeprefix("llama_") for path in MODELS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    config = load_config(MODELS / f"llama_{name}.json")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PARAMETERS[name], abs=0.005e6)  # the tables give two decimals of a million
    assert not config.tie_word_embeddings and not config.use_cache
    assert config.max_position_embeddings == {"7b": 2048, "quickstart": 512}.get(name, 1024)


@pytest.fixture
def model_file(tmp_path):
    def write(**changes):
        path = tmp_path / "model.json"
        entries = {key: value for key, value in (MODEL | changes).items() if value is not ...}
        path.write_text(json.dumps(entries))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 32}, "unknown key 'hiden_size', did you mean 'hidden_size'"),
        ({"rope_tetha": 1e6}, "unknown key 'rope_tetha', did you mean 'rope_theta'"),
        ({"kv_heads": 2}, "unknown key 'kv_heads'; the keys are those of"),
        ({"num_key_value_head": 2, "transformers_version": "4.43.0"}, "did you mean 'num_key_value_heads'"),
        ({"rope_interleaved": True, "transformers_version": "4.43.0"}, "remove partial_rotary_factor and rope_inter"),
        ({"partial_rotary_factor": 0.5}, "remove partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "lama3", "factor": 2.0}}, "rope_type is 'lama3'; known are default, .*llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "not a valid LLaMA .*low_freq_factor"),
        ({"vocab_size": ...}, "missing vocab_size"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"num_attention_heads": 3}, "not a valid LLaMA configuration"),
        ({"hidden_size": "wide"}, "not a valid LLaMA configuration"),
        ({"hidden_size": 0}, "hidden_size is 0: it must be at least 1"),
        ({"intermediate_size": -4}, "intermediate_size is -4: it must be at least 1"),
        ({"vocab_size": 10**13}, "vocab_size is 10000000000000: it must be at least 1 and below 2"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_att.* 4"),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2'; known are .*silu"),
        ({"attention_dropout": 2.0}, "attention_dropout is 2.0, not from 0 to 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, below 0"),
        ({"rope_theta": 0}, "rope_theta is 0: it must be above 0"),
        ({"pad_token_id": 10**6}, "pad_token_id 1000000 is no id below vocab_size"),
    ],
)
def test_unusable_configurations_are_refused_by_name(model_file, changes, message):
    path = model_file(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


SIZES = {  # of a model that is built in a moment
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
COMMON = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "use_cache": True,
}  # fmt: skip
PUBLISHED = {
    "Llama 2": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 4,
        "max_length": 64, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
    },
    "Llama 3.1": {
        "bos_token_id": 1, "eos_token_id": [2, 3, 4], "mlp_bias": False, "num_key_value_heads": 2,
        "rope_scaling": LLAMA3 | {"factor": 8.0}, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
    },
    "Llama 3.2": {
        "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16, "mlp_bias": False, "num_key_value_heads": 2,
        "rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    },
    "SmolLM2": {
        "bos_token_id": 1, "eos_token_id": 2, "is_llama_config": True, "mlp_bias": False, "num_key_value_heads": 4,
        "pad_token_id": 2, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "linear scaling": {
        "_attn_implementation_autoset": True, "max_sequence_length": 64, "num_key_value_heads": 4,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "dtype": "bfloat16", "unsloth_fixed": True,
        "transformers_version": "4.51.3",
    },
    "transformers 5": {
        "rope_parameters": LLAMA3 | {"factor": 8.0, "rope_theta": 1e6}, "dtype": "bfloat16",
        "transformers_version": "5.0.0", "num_key_value_heads": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_published_configurations_give_the_model_of_the_folder_route(tmp_path, name, encoding):
    """As text, in the layout and with the keys of each; the sizes are small. A byte order mark changes nothing."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(COMMON | SIZES | PUBLISHED[name]), encoding=encoding)
    config, of_folder = load_config(path), config_of_folder(tmp_path)
    assert config.to_dict() == of_folder.to_dict() and not config.use_cache
    path.write_text(json.dumps(COMMON | SIZES | PUBLISHED[name]))
    assert config.rope_parameters == LlamaConfig.from_pretrained(tmp_path).rope_parameters
    model = build(config, 0)
    frequencies = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path)).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model configuration"):
        load_config(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_config(tmp_path / "broken.json")


def test_weights_follow_the_seed_and_have_the_configured_spread(model_file):
    config = load_config(model_file(hidden_size=128, initializer_range=0.05))
    first, again, other = (dict(build(config, seed).named_parameters()) for seed in (0, 0, 1))
    matrix = "model.layers.1.self_attn.q_proj.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[matrix], other[matrix])
    assert not torch.equal(first[matrix], first["model.layers.0.self_attn.q_proj.weight"])
    # 16384 draws: the standard error of the standard deviation is 0.6 %, of the mean 0.0004.
    assert first[matrix].std().item() == pytest.approx(0.05, rel=0.03)
    assert first[matrix].mean().item() == pytest.approx(0.0, abs=0.002)
    assert torch.equal(first["model.norm.weight"], torch.ones(128))


@pytest.fixture
def folder(tmp_path, model_file):
    """A Hugging Face folder, its weights in several files."""
    model = build(load_config(model_file(num_key_value_heads=1)), 3)
    model.save_pretrained(tmp_path / "folder", max_shard_size="20KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    return tmp_path / "folder"


@pytest.mark.parametrize("single", [False, True])
def test_a_folder_gives_its_model(folder, single):
    expected = LlamaForCausalLM.from_pretrained(folder)
    if single:
        for path in folder.glob("model*"):
            path.unlink()
        expected.bfloat16().save_pretrained(folder)
    config = config_of_folder(folder)
    model = build(config, 0, weights=FolderWeights(folder, config))
    assert config.num_key_value_heads == 1 and not config.use_cache
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected.state_dict()[name].float()), name


def rewrite(folder, change):
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    for path in folder.glob("model*"):
        path.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors")


NORM = "model.norm.weight"
BAD_FOLDERS = {
    "has no model.safetensors": lambda folder: [path.unlink() for path in folder.glob("model*")],
    "no weights for 1 parameters of a LlamaForCausalLM, the first is model.norm.weight": lambda folder: rewrite(
        folder, lambda weights: weights.pop(NORM)
    ),
    r"model.norm.weight is \(7,\) in the weights, but \(32,\) by config.json": lambda folder: rewrite(
        folder, lambda weights: weights.update({NORM: torch.ones(7)})
    ),
    "has no model-9.safetensors: model.safetensors.index.json names it": lambda folder: (
        folder / "model.safetensors.index.json"
    ).write_text('{"weight_map": {"a": "model-9.safetensors"}}'),
    "cannot be read": lambda folder: [path.write_bytes(b"x" * 99) for path in folder.glob("*.safetensors")],
    "the weights cannot be read": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "only 'llama' can be built": lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
    "config.json is not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_a_folder_that_is_no_llama_is_refused_before_it_is_read(folder, message):
    BAD_FOLDERS[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FolderWeights(folder, config_of_folder(folder))


def test_a_folder_brings_its_tokenizer(folder, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed_config()))
    arguments = ["--deepspeed_config", str(tmp_path / "ds.json"), "--steps", "1", "--output", str(tmp_path / "out")]
    arguments += ["--model", str(folder), "--sequence-length", "8"]
    assert make_plan(parse(arguments), 1).tokenizer == str(folder)
    assert isinstance(make_plan(parse(arguments), 1).weights, FolderWeights)
    assert make_plan(parse([*arguments, "--tokenizer", "bytes"]), 1).tokenizer == "bytes"
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        make_plan(parse(arguments), 1)


def _whole_weights(path: Path, bf16: bool):
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": bf16},
    }
    model = build(load_config(path), 7, ds_config)
    weights, held = {}, 0
    for name, parameter in model.named_parameters():
        held += parameter.ds_tensor.numel()
        assert parameter.numel() == 0  # nothing whole is left on this rank
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().float().numpy().copy()
    return weights, held, model.model.rotary_emb.inv_freq.numpy().copy()


@pytest.mark.parametrize("bf16", [False, True])
def test_partitioned_weights_are_those_of_the_whole_model(model_file, bf16):
    path = model_file()
    whole = build(load_config(path), 7)
    results = run_ranks(2, _whole_weights, path, bf16)
    count = sum(parameter.numel() for parameter in whole.parameters())
    for weights, held, inverse_frequencies in results:
        assert set(weights) == {name for name, _ in whole.named_parameters()}
        for name, parameter in whole.named_parameters():
            wanted = parameter.detach().bfloat16().float() if bf16 else parameter.detach()
            assert torch.equal(torch.from_numpy(weights[name]), wanted)
        assert held == pytest.approx(count / 2, abs=len(weights))  # halves, each rounded up
        assert torch.equal(torch.from_numpy(inverse_frequencies), whole.model.rotary_emb.inv_freq)
