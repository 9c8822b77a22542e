"""Cost and quality of GaLore's randomized subspace refresh, against the exact SVD that it stands in for.

python benchmarks/refresh.py

The matrices are gradients of a 2-layer LLaMA of the 350M shapes on the standard library's source, byte by byte, at
initialisation and after ten AdamW steps. One thread, fp32. *Energy* is what the basis captures of the gradient's
square over what the best basis of that rank would: the smallest of all repeats, each with a sketch of its own.
"""

from __future__ import annotations

import random
import sysconfig
import tempfile
from itertools import count
from pathlib import Path
from statistics import median

import torch
from common import Numbers, interleaved, options, report
from transformers import LlamaConfig, LlamaForCausalLM

from ds_lowrank.methods.galore import randomized_range
from ds_lowrank.sharding.layout import whole
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Alone, lockstep

SPEED_TARGET, ENERGY_TARGET = 15.0, 0.99
SEQUENCES, LENGTH, STEPS = 16, 256, 10
MATRICES = {
    "model.layers.0.mlp.down_proj.weight": (256, 128, 32),
    "model.layers.1.mlp.down_proj.weight": (256,),
    "model.layers.1.self_attn.q_proj.weight": (256, 128, 32),
    "model.layers.1.mlp.up_proj.weight": (256, 128, 32),
}
"""The ranks that each is refreshed at. The targets are for ``down_proj``, 1024 x 2736, at rank 256."""


def gradients(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """The matrices' gradients at ``step 0`` and ``step 10``; kept in the temporary folder for the next time."""
    cache = Path(tempfile.gettempdir()) / f"ds_lowrank_gradients_{SEQUENCES}x{LENGTH}_{STEPS}_{seed}.pt"
    if not cache.exists():
        found = _train(seed)
        partial = cache.with_suffix(".partial")
        torch.save(found, partial)
        partial.replace(cache)
    loaded: dict[str, dict[str, torch.Tensor]] = torch.load(cache, weights_only=True)
    return loaded


def _train(seed: int) -> dict[str, dict[str, torch.Tensor]]:
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
    for step in range(STEPS + 1):
        starts = torch.randint(len(text) - LENGTH, (SEQUENCES, 1))
        batch = text[starts + torch.arange(LENGTH)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step in (0, STEPS):
            found[f"step {step}"] = {name: model.get_parameter(name).grad.clone() for name in MATRICES}
        optimizer.step()
    return found


def source_bytes(seed: int, files: int = 200) -> torch.Tensor:
    """The bytes of some modules of the standard library, int64."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = random.Random(seed).sample(paths, min(files, len(paths)))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in chosen)), dtype=torch.uint8).long()


def refresh(name: str, gradient: torch.Tensor, rank: int, seed: int, counter: int) -> torch.Tensor:
    """The basis as one process finds it, compressed x rank."""
    m, n = gradient.shape
    shard = MatrixShard(name, (m, n), [whole((m, n))], 0, "right" if m >= n else "left", 0)
    shard.attach(gradient.flatten())
    (basis,) = Alone().run(lockstep([randomized_range(shard, rank, seed, counter)]))
    return basis


def measure(seed: int, repeats: int) -> Numbers:
    """One record for each gradient and rank."""
    threads = torch.get_num_threads()
    found = gradients(seed)
    torch.set_num_threads(1)
    try:
        return [
            _compare(when, name, gradient, rank, seed, repeats)
            for when, matrices in found.items()
            for name, gradient in matrices.items()
            for rank in MATRICES[name]
        ]
    finally:
        torch.set_num_threads(threads)


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
    turned = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T
    best = singular_values[:rank].square().sum()
    svd, ours = median(seconds["svd"]), median(seconds["randomized"])
    layer, matrix = name.split(".")[2], name.split(".")[-2]
    return {
        "gradient": f"layer {layer} {matrix}, {when}",
        "shape": "x".join(map(str, gradient.shape)),
        "rank": rank,
        "svd s": svd,
        "randomized s": ours,
        "times faster": svd / ours,
        "energy": min(float((turned @ basis).square().sum() / best) for basis in bases),
        "best share": float(best / singular_values.square().sum()),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = measure(arguments.seed, 1 if arguments.quick else arguments.repeats)
    report(rows, arguments)
    print(f"\nTargets, 1024x2736 at rank 256: {SPEED_TARGET:g} times faster, energy {ENERGY_TARGET}.")


if __name__ == "__main__":
    main()
