"""LLaMA in Hugging Face's implementation, from a JSON file, with the same weights whole or partitioned.

Every weight is drawn from a generator seeded by the run's seed and the parameter's own name, so that neither the ZeRO
stage nor the number of ranks nor the order in which modules are built changes the model that a seed stands for.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed import get_rank
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ds_lowrank.errors import ConfigError

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
Weights = Callable[[str, tuple[int, ...]], torch.Tensor]
"""The whole weight of a name in the model, and a shape."""
# Keys that Hugging Face writes into a config.json beside the fields of LlamaConfig.
DESCRIPTIVE = ("model_type", "architectures", "torch_dtype", "transformers_version")


def load_config(path: str | Path) -> LlamaConfig:
    """Read a LLaMA configuration under Hugging Face's key names.

    Raises FileNotFoundError for a missing file and ValueError, naming the file and the key, for anything that is not a
    complete LLaMA configuration.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no model configuration at {path}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(entries).__name__}")
    _check_keys(entries, path)
    try:
        return LlamaConfig(**{"use_cache": False} | entries)
    except Exception as error:  # its validators raise classes of their own
        raise ValueError(f"{path} is not a valid LLaMA configuration: {error}") from error


def config_of_folder(folder: Path) -> LlamaConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        ValueError, OSError: it has none, or of another model than a LLaMA.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no Hugging Face folder: it has no config.json")
    try:
        kind = json.loads(path.read_text()).get("model_type")
        config = LlamaConfig.from_pretrained(folder, use_cache=False) if kind == "llama" else None
    except Exception as error:  # its validators raise classes of their own
        raise ValueError(f"{path} cannot be read: {error}") from error
    if config is None:
        raise ValueError(f"{path}: model_type is {kind!r}, and only 'llama' can be built")
    return config


def _check_keys(entries: dict[str, Any], path: Path) -> None:
    known = {field.name for field in dataclasses.fields(LlamaConfig)} | set(DESCRIPTIVE)
    for key in entries:
        if key not in known:
            nearest = difflib.get_close_matches(key, sorted(known), n=1)
            hint = (
                f", did you mean {nearest[0]!r}?" if nearest else "; the keys are those of Hugging Face's LlamaConfig"
            )
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
    missing = [key for key in REQUIRED if key not in entries]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    if entries.get("model_type", "llama") != "llama":
        raise ValueError(f"{path}: model_type is {entries['model_type']!r}, and only 'llama' can be built")


def build(
    config: LlamaConfig,
    seed: int,
    ds_config: dict[str, Any] | None = None,
    architecture: type[PreTrainedModel] = LlamaForCausalLM,
    weights: Weights | None = None,
) -> Any:
    """Build a LLaMA of the given architecture with weights that depend on `seed` and the configuration alone.

    weights: by name and shape, instead of those of the seed.

    At ZeRO stage 3 of `ds_config` the parameters are partitioned as they are made, so that no rank ever holds the whole
    model, and their dtype is that of `ds_config`; otherwise they are whole, fp32 and on the CPU.
    """
    partitioned = ds_config is not None and ds_config.get("zero_optimization", {}).get("stage", 0) == 3
    context: AbstractContextManager[Any] = nullcontext()
    if partitioned:
        context = deepspeed.zero.Init(config_dict_or_path=ds_config)
    with context, no_init_weights():
        model = architecture(config)
        model.tie_weights()
    # zero.Init makes every tensor in the training dtype, and rotation angles of a bf16 frequency are far off.
    rotary = model.model.rotary_emb
    for name, buffer in LlamaRotaryEmbedding(config).named_buffers():
        setattr(rotary, name, buffer.to(getattr(rotary, name).device))
    weights = weights or drawn(seed, config)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if not partitioned or get_rank() == 0:  # whose weights the others are given
                parameter.copy_(weights(name, tuple(parameter.shape)))
    return model


def drawn(seed: int, config: LlamaConfig) -> Weights:
    """The weights that a seed stands for."""
    return partial(draw_weight, seed=seed, std=config.initializer_range)


def draw_weight(name: str, shape: tuple[int, ...], seed: int, std: float) -> torch.Tensor:
    """Norms are ones, biases zeros, and everything else is normal with the given standard deviation; fp32."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def check_split(config: LlamaConfig, tensor: int, pipeline: int) -> None:
    """Refuse a model that cannot be split so.

    Raises:
        ConfigError: names the width that does not divide, and what would.
    """
    widths = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for name, width in widths.items():
        if width % tensor:
            raise ConfigError(
                f"{name} {width} is no multiple of tensor-parallel {tensor}: choose a degree that divides it"
            )
    if pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"{pipeline} pipeline stages for num_hidden_layers {config.num_hidden_layers}: every stage needs a layer, "
            "lower --pipeline-parallel"
        )
    if tensor * pipeline > 1 and config.attention_dropout:
        raise ConfigError("attention_dropout is not supported with tensor or pipeline parallelism: set it to 0")
