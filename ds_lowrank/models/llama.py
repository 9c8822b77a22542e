"""Hugging Face's LLaMA from a JSON file, with the same initial weights whether it is whole or partitioned.

Every weight is drawn from a generator seeded by the run's seed and the parameter's name. The initial model of a seed
therefore does not depend on the ZeRO stage, the number of ranks, or the order in which modules are built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ds_lowrank.errors import ConfigError, closest_name

logger = logging.getLogger("ds_lowrank")

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim")
# What the constructor turns into fields, for the nearest name of a misspelt key.
OLDER_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "model_type", "num_labels")
WeightSource = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Returns the whole weight for a parameter's name in the model and its shape."""


def load_config(path: str | Path) -> LlamaConfig:
    """Read a LLaMA configuration from a JSON file with Hugging Face's key names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete LLaMA configuration; the message names the file and the key.
    """
    path = Path(path)
    entries = _entries(path)
    _check_keys(entries, path)
    return _config(entries, path)


def config_of_folder(folder: Path) -> LlamaConfig:
    """Read the configuration of a Hugging Face folder.

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: the configuration cannot be read, or is not that of a LLaMA.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face folder: it has no config.json")
    entries = _entries(path)
    if entries.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {entries.get('model_type')!r}, but only 'llama' can be built")
    return _config(entries, path)


def _entries(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())  # which finds out the encoding, also by a byte order mark
    except FileNotFoundError:
        raise FileNotFoundError(f"no model configuration at {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must contain one JSON object, not a {type(entries).__name__}")
    return entries


def _config(entries: dict[str, Any], path: Path) -> LlamaConfig:
    """The configuration, by the constructor that Hugging Face's own loading of a folder calls."""
    try:
        config = LlamaConfig(**entries | {"use_cache": False})
    except Exception as error:  # its validators raise classes of their own
        raise ValueError(f"{path} is not a valid LLaMA configuration: {' '.join(str(error).split())}") from error
    rope = config.rope_parameters or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or entries.get("rope_interleaved"):
        raise ValueError(
            f"{path}: a LLaMA rotates all of a head, in halves: remove partial_rotary_factor and rope_interleaved"
        )
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"{path}: rope_type is {kind!r}; known are default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    _check_values(config, path)
    return config


def _check_values(config: LlamaConfig, path: Path) -> None:
    """Refuse values of the right type with which a model cannot be built, or computes only NaN."""
    for key in SIZES:
        if not 1 <= getattr(config, key) < 2**31:
            raise ValueError(f"{path}: {key} is {getattr(config, key)}: it must be at least 1 and below 2^31")
    heads, shared, pad = config.num_attention_heads, config.num_key_value_heads, config.pad_token_id
    theta = (config.rope_parameters or {}).get("rope_theta", 1.0)
    for wrong, problem in (
        (heads % shared, f"num_key_value_heads {shared} does not divide num_attention_heads {heads}"),
        (config.hidden_act not in ACT2FN, f"hidden_act is {config.hidden_act!r}; known are {', '.join(ACT2FN)}"),
        (not 0 <= config.attention_dropout <= 1, f"attention_dropout is {config.attention_dropout}, not from 0 to 1"),
        (not config.rms_norm_eps >= 0, f"rms_norm_eps is {config.rms_norm_eps}, below 0"),
        (not theta > 0, f"rope_theta is {theta}: it must be above 0"),
        (pad is not None and pad >= config.vocab_size, f"pad_token_id {pad} is no id below vocab_size"),
    ):
        if wrong:
            raise ValueError(f"{path}: {problem}")


def _check_keys(entries: dict[str, Any], path: Path) -> None:
    """Refuse keys that the constructor does not understand.

    A file that transformers wrote may contain attributes of other programs, which transformers itself does not use; in
    it only what looks like a misspelt key is refused.
    """
    known = {field.name for field in dataclasses.fields(LlamaConfig)} | set(OLDER_KEYS)
    published = "transformers_version" in entries
    ignored = []
    for key in (key for key in entries if key not in known and not _is_understood(key, entries[key])):
        closest = closest_name(key, known, 0.8 if published else 0.6)
        if closest or not published:
            hint = f", did you mean {closest!r}?" if closest else "; the keys are those of Hugging Face's LlamaConfig"
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
        ignored.append(key)
    if ignored and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.info("%s: not used, as transformers does not use it either: %s", path, ", ".join(ignored))
    missing = [key for key in REQUIRED if key not in entries]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    if entries.get("model_type", "llama") != "llama":
        raise ValueError(f"{path}: model_type is {entries['model_type']!r}, but only 'llama' can be built")


def _is_understood(key: str, value: Any) -> bool:
    """Whether the constructor does something with a key that is not a field, and not merely keep it as an attribute."""
    try:
        return key.startswith("_") or key not in vars(LlamaConfig(**{key: value}))
    except Exception:  # of its validators: it is understood, but has another error
        return True


def build(
    config: LlamaConfig,
    seed: int,
    ds_config: dict[str, Any] | None = None,
    architecture: type[PreTrainedModel] = LlamaForCausalLM,
    weights: WeightSource | None = None,
) -> Any:
    """Build a LLaMA whose weights depend only on ``seed`` and the configuration. Collective at ZeRO 3.

    At ZeRO stage 3 the parameters are partitioned as they are created, so that the whole model is never on one rank,
    and they have the training dtype. Otherwise they are whole, in fp32 and on the CPU.

    Args:
        config: sizes of the model.
        seed: seed of the weights.
        ds_config: the DeepSpeed configuration, from which the ZeRO stage and the dtype are read; None for no ZeRO.
        architecture: the class of the model.
        weights: where to take the weights from instead of drawing them from the seed.

    Returns:
        A model of the class ``architecture``.
    """
    partitioned = ds_config is not None and ds_config.get("zero_optimization", {}).get("stage", 0) == 3
    context: AbstractContextManager[Any] = nullcontext()
    if partitioned:
        context = deepspeed.zero.Init(config_dict_or_path=ds_config)
    with context, no_init_weights():
        model = architecture(config)
        model.tie_weights()
    # zero.Init creates every tensor in the training dtype, and angles from bf16 frequencies would be far off.
    rotary = model.model.rotary_emb
    for name, buffer in LlamaRotaryEmbedding(config).named_buffers():
        setattr(rotary, name, buffer.to(getattr(rotary, name).device))
    weights = weights or drawn(seed, config)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if not partitioned or dist.get_rank() == 0:  # whose weights the other ranks receive
                parameter.copy_(weights(name, tuple(parameter.shape)))
    return model


def drawn(seed: int, config: LlamaConfig) -> WeightSource:
    """The initial weights of a seed, drawn when they are asked for."""
    return partial(draw_weight, seed=seed, std=config.initializer_range)


def draw_weight(name: str, shape: tuple[int, ...], seed: int, std: float) -> torch.Tensor:
    """Draw the initial weight of one parameter: ones for norms, zeros for biases, else N(0, std^2).

    Args:
        name: the parameter's name in the model, which seeds the generator together with ``seed``.
        shape: its shape.
        seed: the run's seed.
        std: the standard deviation of matrices.

    Returns:
        An fp32 tensor on the CPU.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float32, device="cpu")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def check_split(config: LlamaConfig, tensor: int, pipeline: int) -> None:
    """Check that a model can be split over a grid of ranks.

    Args:
        config: sizes of the model.
        tensor: degree of tensor parallelism.
        pipeline: the number of pipeline stages.

    Raises:
        ConfigError: a width is not divisible, there are not enough layers for the stages, or attention dropout is used.
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
                f"{name} {width} is not a multiple of tensor-parallel {tensor}: choose a degree that divides it"
            )
    if pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"{pipeline} pipeline stages for num_hidden_layers {config.num_hidden_layers}: every stage needs a layer, "
            "lower --pipeline-parallel"
        )
    if tensor * pipeline > 1 and config.attention_dropout:
        raise ConfigError("attention_dropout is not supported with tensor or pipeline parallelism: set it to 0")
