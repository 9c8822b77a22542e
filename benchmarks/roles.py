"""Which parameters of every architecture of transformers are projected, and whether wrappers change it.

python -m benchmarks.roles --json docs/measured/roles.json

Models are built on the meta device, with two layers of everything, and no weight is drawn.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from benchmarks.common import hardware, options, provenance, table, write_json
from ds_lowrank.placement.parameter_names import Tag, tag_of, tag_parameters
from ds_lowrank.placement.stacks import stack_of

TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM")
DEPTH = re.compile(r"(num_)?(hidden_|encoder_|decoder_)?layers?|n_layers?|(en|de)coder_layers|num_blocks|depth")


def architectures() -> Iterator[tuple[str, torch.nn.Module]]:
    """One model after another; those that need a package or a setting are left out, and so are heads shared by many."""
    names = {name for task in TASKS for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()}
    for name in sorted(n for entry in names for n in ([entry] if isinstance(entry, str) else entry)):
        try:
            cls = getattr(transformers, name)
            if any(base.__name__.startswith("GenericFor") for base in cls.__mro__):
                continue
            config = cls.config_class()
            _shrink(config)
            with torch.device("meta"):
                model = cls(config)
        except Exception:
            continue
        yield name, model


def _shrink(config: Any) -> None:
    """Two layers of everything, so that a model is built in milliseconds."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value)
        elif DEPTH.fullmatch(key) and isinstance(value, int) and value > 2:
            setattr(config, key, 2)
        elif key == "layer_types" and value:
            setattr(config, key, value[:2])


def tags(model: torch.nn.Module) -> dict[str, Tag | None]:
    """The tag of every parameter, by the name in it.

    Args:
        model: wrapped or not.
    """
    tag_parameters(model)
    found = [tag_of(parameter) for parameter in model.parameters()]
    return {tag.name: tag for tag in found if tag is not None}


def projected_share(model: torch.nn.Module) -> float:
    """Elements that a method projects by default, divided by all except embeddings and heads.

    Args:
        model: tagged.
    """
    projected = rest = 0
    for parameter in model.parameters():
        tag, shape = tag_of(parameter), tuple(parameter.shape)
        if tag is None or tag.kind in ("embedding", "head"):
            continue
        rest += parameter.numel()
        is_matrix = len(shape) == 2 or stack_of(parameter, shape) is not None
        projected += parameter.numel() if is_matrix and tag.kind == "weight" else 0
    return projected / max(1, rest)


def flat_share(model: torch.nn.Module) -> float:
    """The same if only parameters of two dimensions were matrices, as before stacks were read.

    Args:
        model: tagged.
    """
    inside = [(p, tag_of(p)) for p in model.parameters()]
    rest = [p for p, tag in inside if tag is not None and tag.kind not in ("embedding", "head")]
    return sum(p.numel() for p in rest if p.ndim == 2) / max(1, sum(p.numel() for p in rest))


def main() -> None:
    """Look at all architectures, print what was found and write it."""
    arguments = options(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    built, changed, mixtures = 0, [], {}
    for name, model in architectures():
        if arguments.quick and built == 5:
            break
        built += 1
        plain = tags(model)
        if tags(torch.compile(model)) != plain:  # type: ignore[arg-type]
            changed.append(name)
        if any(stack_of(p, tuple(p.shape)) is not None for p in model.parameters()):
            mixtures[name] = {"two_dimensions": flat_share(model), "stacks": projected_share(model)}
    shares = []
    for kind in ("two_dimensions", "stacks") if mixtures else ():
        of_kind = [one[kind] for one in mixtures.values()]
        shares.append({"matrices": kind, "min": min(of_kind), "median": median(of_kind), "max": max(of_kind)})
    print(f"{built} architectures; torch.compile changes roles of {len(changed)}; {len(mixtures)} mixtures")
    print("share of the mixtures' elements that is projected, without embeddings and heads:")
    print(table(shares))
    if arguments.json is not None:
        record = {"architectures": built, "changed_by_compile": changed, "shares": shares, "mixtures": mixtures}
        write_json(arguments.json, {**provenance("benchmarks.roles", arguments), "hardware": hardware(), **record})


if __name__ == "__main__":
    main()
