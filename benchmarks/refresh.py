"""GaLore's randomized refresh and Online Subspace Descent's PCA step against an exact SVD: time and captured energy.

python -m benchmarks.refresh

The matrices are gradients of a 2-layer LLaMA with the shapes of the 350M model, on the standard library's source as
bytes, at initialisation and after ten AdamW steps. One thread, fp32. *energy* is the share of the gradient's squared
norm that the basis captures, relative to the best basis of that rank: the smallest of all repeats, each of which has
its own sketch.

*PCA step* is one step on the basis: its gradient and Adam's update. Like the refreshes, it does not include the
projection of the gradient, which every training step needs. Gaussian matrices represent the shapes of other models.
"""

from __future__ import annotations

import random
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Numbers, interleaved, medians, options, report
from ds_lowrank.methods.blocks.range_finder import randomized_range
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.methods.blocks.subspace import Projection
from ds_lowrank.methods.online_subspace_descent import (
    OnlineSubspaceDescentMethod,
    OnlineSubspaceDescentOptions,
    move_basis,
)
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import whole
from ds_lowrank.sharding.matrix import MatrixShard, shard_of
from ds_lowrank.sharding.reduce import SingleProcess, lockstep

SPEED_TARGET, ENERGY_TARGET, PCA_TARGET = 15.0, 0.99, 20.0
SEQUENCES, LENGTH, STEPS = 16, 256, 10
MATRICES = {
    "model.layers.0.mlp.down_proj.weight": (256, 128, 32),
    "model.layers.1.mlp.down_proj.weight": (256,),
    "model.layers.1.self_attn.q_proj.weight": (256, 128, 32),
    "model.layers.1.mlp.up_proj.weight": (256, 128, 32),
}
"""The ranks at which each matrix is refreshed. The targets hold for ``down_proj``, 1024 x 2736, at rank 256."""
OTHER_SHAPES = {(512, 1376): 128, (2048, 5461): 512}
"""Shapes of the 60M and 1B models, and a quarter of their hidden sizes as the rank."""


Gradients = Mapping[str, Mapping[str, torch.Tensor]]
"""Gradients by when they were taken, then by parameter name."""


def gradients(seed: int, quick: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Return the matrices' gradients at ``step 0`` and ``step 10``, the second unless ``quick``.

    They are kept in the temporary folder for the next time.
    """
    sequences, steps = (1, 0) if quick else (SEQUENCES, STEPS)
    cache = Path(tempfile.gettempdir()) / f"ds_lowrank_gradients_{sequences}x{LENGTH}_{steps}_{seed}.pt"
    if not cache.exists():
        found = _train(seed, sequences, steps)
        partial = cache.with_suffix(".partial")
        torch.save(found, partial)
        partial.replace(cache)
    loaded: dict[str, dict[str, torch.Tensor]] = torch.load(cache, weights_only=True)
    return loaded


def _train(seed: int, sequences: int, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=1024, intermediate_size=2736, num_hidden_layers=2, num_attention_heads=16,
            max_position_embeddings=LENGTH, use_cache=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = source_bytes(seed)
    found = {}
    for step in range(steps + 1):
        starts = torch.randint(len(text) - LENGTH, (sequences, 1))
        batch = text[starts + torch.arange(LENGTH)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step in (0, steps):
            found[f"step {step}"] = {name: model.get_parameter(name).grad.clone() for name in MATRICES}
        optimizer.step()
    return found


def source_bytes(seed: int, files: int = 200) -> torch.Tensor:
    """Return the bytes of some modules of the standard library as int64."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = random.Random(seed).sample(paths, min(files, len(paths)))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in chosen)), dtype=torch.uint8).long()


def refresh(name: str, gradient: torch.Tensor, rank: int, seed: int, counter: int) -> torch.Tensor:
    """Return the basis that one process finds, compressed x rank."""
    (found,) = SingleProcess().run(lockstep([randomized_range(_shard(name, gradient), rank, seed, counter)]))
    basis: torch.Tensor = found[0]
    return basis


def _shard(name: str, gradient: torch.Tensor) -> MatrixShard:
    m, n = gradient.shape
    geometry = Geometry((m, n), [whole((m, n))], 0, "right" if m >= n else "left")
    return shard_of(name, geometry, gradient.flatten())


def _turned(gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient with its compressed dimension, the smaller one, second."""
    return gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T


def pca_steps(gradient: torch.Tensor, basis: torch.Tensor) -> Callable[[], object]:
    """Return a function that takes one step on the basis, compressed x rank, as one process does."""
    shard, rank = _shard("matrix", gradient), basis.shape[1]
    options = OnlineSubspaceDescentOptions.model_validate({"rank": rank})
    store = StateStore(lambda at, _: OnlineSubspaceDescentMethod.state(shard, options, at), rank)
    own = basis.unsqueeze(0)
    (single,) = store.empty(gradient.device, 1)
    state = {key: value.unsqueeze(0) if isinstance(value, torch.Tensor) else value for key, value in single.items()}
    state["basis"] = own
    magnitudes = gradient.abs().amax().view(1)
    seen = Projection(_turned(gradient) @ own, due=False, magnitudes=magnitudes, own=own, basis=own)
    return lambda: SingleProcess().run(lockstep([move_basis(shard, state, options, seen)]))


def measure(found: Gradients, seed: int, repeats: int, quick: bool) -> Numbers:
    """Return one record of the refreshes for each gradient and rank; with ``quick``, for its first rank."""
    return [
        _compare(when, name, gradient, rank, seed, repeats)
        for when, matrices in found.items()
        for name, gradient in matrices.items()
        for rank in MATRICES[name][: 1 if quick else None]
    ]


def measure_pca(found: Gradients, seed: int, repeats: int, quick: bool) -> Numbers:
    """Return one record of the PCA step for each gradient of the target's shape and each other shape.

    With ``quick`` only the smallest of the other shapes is measured.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [
        (_title(name, when), gradient, MATRICES[name][0])
        for when, own in found.items()
        for name, gradient in own.items()
        if "down_proj" in name
    ]
    shapes = list(OTHER_SHAPES.items())[: 1 if quick else None]
    matrices += [("Gaussian", torch.randn(shape, generator=generator), rank) for shape, rank in shapes]
    return [_compare_pca(title, gradient, rank, repeats) for title, gradient, rank in matrices]


def _compare_pca(title: str, gradient: torch.Tensor, rank: int, repeats: int) -> dict[str, object]:
    basis, _ = torch.linalg.qr(torch.randn(min(gradient.shape), rank))
    candidates = {
        "svd": lambda: torch.linalg.svd(gradient, full_matrices=False),
        "pca": pca_steps(gradient, basis),
    }
    seconds = medians(interleaved(candidates, repeats))
    return {
        "gradient": title,
        "shape": "x".join(map(str, gradient.shape)),
        "rank": rank,
        "svd s": seconds["svd"],
        "PCA step s": seconds["pca"],
        "times faster": seconds["svd"] / seconds["pca"],
    }


def _title(name: str, when: str) -> str:
    layer, matrix = name.split(".")[2], name.split(".")[-2]
    return f"layer {layer} {matrix}, {when}"


def _compare(when: str, name: str, gradient: torch.Tensor, rank: int, seed: int, repeats: int) -> dict[str, object]:
    counters = count()
    bases = []
    singular_values = torch.linalg.svdvals(gradient)
    seconds = interleaved(
        {
            "svd": lambda: torch.linalg.svd(gradient, full_matrices=False),
            "randomized": lambda: bases.append(refresh(name, gradient, rank, seed, next(counters))),
        },
        repeats,
    )
    turned = _turned(gradient)
    best = singular_values[:rank].square().sum()
    taken = medians(seconds)
    return {
        "gradient": _title(name, when),
        "shape": "x".join(map(str, gradient.shape)),
        "rank": rank,
        "svd s": taken["svd"],
        "randomized s": taken["randomized"],
        "times faster": taken["svd"] / taken["randomized"],
        "energy": min(float((turned @ basis).square().sum() / best) for basis in bases),
        "best share": float(best / singular_values.square().sum()),
    }


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    seed, quick = arguments.seed, arguments.quick
    repeats = 1 if quick else arguments.repeats
    found = gradients(seed, quick)
    torch.set_num_threads(1)
    report(measure(found, seed, repeats, quick), arguments, pca=measure_pca(found, seed, repeats, quick))
    print(
        f"\nTargets, 1024x2736 at rank 256: {SPEED_TARGET:g} times faster, energy {ENERGY_TARGET}; "
        f"the PCA step {PCA_TARGET:g} times faster."
    )


if __name__ == "__main__":
    main()
