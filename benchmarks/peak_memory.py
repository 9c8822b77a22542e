"""Peak memory of whole training steps at one rank, as it is measured: by the allocator of a GPU, or counted on a CPU.

python -m benchmarks.peak_memory
python -m benchmarks.peak_memory --cases 7b --memory 24

Every case is a process of its own: a LLaMA with random weights, made where it is trained, gradient checkpointing, an
engine of ``ds_lowrank.initialize``, a few steps of as many micro-batches as the case says on random tokens. ``peak`` is
the most that was allocated from the first step on, everything included; ``reserved`` is what the allocator took from
the device. On a CPU the bytes of all live tensors are followed, and models are small unless ``--cases`` asks;
``--sequence`` makes that quicker.

With ``--memory`` the process may take no more than so many GB of the card (a GB is 10^9 bytes), CUDA's own context
apart: what does not fit fails as it would there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Numbers, options, report
from benchmarks.ranks import free_port

ROOT = Path(__file__).parents[1]
HEADLINE = json.loads((ROOT / "ds_configs/llama_7b_24gb.json").read_text())["optimizer"]["params"]
PROJECTED = {**HEADLINE, "proj_type": "std", "rank": 128}
GALORE = {"rank": 128, "update_proj_gap": 200}


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        size: of ``ds_configs/models``.
        name: of the row.
        params: ``optimizer.params`` of GaLore; None for DeepSpeed's AdamW.
        sequence: tokens of a sequence; a micro-batch is one.
        micros: micro-batches of a step.
        stage: of ZeRO.
    """

    size: str
    name: str
    params: dict[str, Any] | None
    sequence: int = 1024
    micros: int = 4
    stage: int = 0

    def settings(self) -> dict[str, Any]:
        """The DeepSpeed configuration."""
        optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
        if self.params is not None:
            optimizer = {"type": "GaLore", "params": {"lr": 1e-3, **self.params}}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.micros,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "optimizer": optimizer,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": self.stage},
        }


CASES = {
    "350m": [
        Case("350m", "AdamW, masters", None),
        Case("350m", "GaLore, masters", GALORE),
        Case("350m", "GaLore, masters, int8", {**GALORE, "state_dtype": "int8"}),
        Case("350m", "GaLore, ZeRO 2, masters, int8", {**GALORE, "state_dtype": "int8"}, stage=2),
        Case("350m", "GaLore, no masters, int8", {**GALORE, "state_dtype": "int8", "master_weights": False}),
        Case("350m", "GaLore, projected, no masters, int8", PROJECTED),
    ],
    "7b": [Case("7b", "GaLore of llama_7b_24gb.json", HEADLINE, 2048, 2)],
    "quickstart": [
        Case("quickstart", "GaLore, masters", {**GALORE, "rank": 32}, 64, 2),
        Case("quickstart", "GaLore, projected, no masters, int8", {**PROJECTED, "rank": 32}, 64, 2),
    ],
}


@dataclass
class Found:
    """What a case's process found."""

    peak: int = 0
    reserved: int | None = None
    weights: int = 0
    peaks: list[int] = field(default_factory=list)
    state: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(case: Case, steps: int, seed: int, limit: float | None) -> Found:
    """Train in this process.

    Args:
        case: the row.
        steps: optimizer steps.
        seed: of weights and tokens.
        limit: the most GB of the device; None for all.
    """
    import ds_lowrank

    on_card = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_card else torch.device("cpu")
    if not on_card:
        torch.set_num_threads(1)
    if on_card and limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total), device)
    counter = _counter(on_card)
    found = Found()
    with counter:
        model = _model(case.size, device, seed)
        vocabulary = model.config.vocab_size
        engine = ds_lowrank.initialize(model=model, config=case.settings())[0]
        found.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        counter.restart()
        generator = torch.Generator(device=device).manual_seed(seed)
        for _ in range(steps):
            started = time.perf_counter()
            losses = []
            for _ in range(case.micros):
                shape = 1, case.sequence
                tokens = torch.randint(vocabulary, shape, generator=generator, device=device, dtype=torch.int64)
                loss = engine(input_ids=tokens, labels=tokens).loss
                engine.backward(loss)
                losses.append(loss.detach())
                engine.step()
            found.peaks.append(counter.peak)
            counter.restart()
            found.losses.append(float(torch.stack(losses).mean()))  # waits for the device
            found.seconds.append(time.perf_counter() - started)
        found.peak = max(found.peaks)
        found.reserved = torch.cuda.max_memory_reserved() if on_card else None
    if case.params is not None:
        from ds_lowrank.optimizer.report import state_bytes

        found.state = sum(state_bytes(engine.basic_optimizer.slots))
    return found


def _model(size: str, device: torch.device, seed: int) -> Any:
    """A LLaMA in bf16 with random weights, made on the device, that recomputes activations."""
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from ds_lowrank.models import llama

    config = llama.load_config(ROOT / f"ds_configs/models/llama_{size}.json")
    torch.manual_seed(seed)
    with torch.device("meta"), no_init_weights():
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=config.initializer_range)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class CardBytes:
    """What the allocator of a GPU counts, in the form of ``LiveBytes``."""

    def __enter__(self) -> CardBytes:
        """Begin."""
        self.restart()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""

    def restart(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        """The most bytes allocated."""
        return torch.cuda.max_memory_allocated()


def _counter(on_card: bool) -> Any:
    if on_card:
        return CardBytes()
    from ds_lowrank.estimate.live import LiveBytes

    return LiveBytes()


def in_own_process(case: Case, arguments: argparse.Namespace) -> Found:
    """Measure a case in a process of its own."""
    group = next(group for group, cases in CASES.items() if case in cases)
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--one", f"{group}:{CASES[group].index(case)}"]
    command += ["--steps", str(arguments.steps), "--seed", str(arguments.seed)]
    command += [] if arguments.sequence is None else ["--sequence", str(arguments.sequence)]
    command += [] if arguments.memory is None else ["--memory", str(arguments.memory)]
    segments = "expandable_segments:True"
    device = {"PYTORCH_CUDA_ALLOC_CONF": segments} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    one_rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        command, cwd=ROOT, text=True, env={**os.environ, **device, **one_rank}, stdout=subprocess.PIPE
    )
    if done.returncode:
        raise SystemExit(f"{case.size}, {case.name}: exit code {done.returncode}")
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def row(case: Case, found: Found, base: int | None) -> dict[str, Any]:
    """The row of a case.

    Args:
        case: what was measured.
        found: what was found.
        base: the peak of GaLore with masters at ZeRO 0; None if it was not measured.
    """
    if not all(map(math.isfinite, found.losses)):
        raise SystemExit(f"{case.size}, {case.name}: a loss is not finite: {found.losses}")
    seconds = min(found.seconds[1:] or found.seconds)
    return {
        "model": case.size,
        "optimizer": case.name,
        "tokens a micro-batch": case.sequence,
        "micro-batches": case.micros,
        "weights GB": round(found.weights / 1e9, 2),
        "state GB": round(found.state / 1e9, 3) if case.params is not None else None,
        "peak GB": round(found.peak / 1e9, 2),
        "peak of each step GB": " ".join(f"{peak / 1e9:.2f}" for peak in found.peaks),
        "over GaLore with masters": None if base is None else round(found.peak / base, 3),
        "reserved GB": None if found.reserved is None else round(found.reserved / 1e9, 2),
        "tokens/s": round(case.sequence * case.micros / seconds, 1),
        "loss": f"{found.losses[0]:.2f} to {found.losses[-1]:.2f}",
    }


def _with_sequence(case: Case, tokens: int | None) -> Case:
    return case if tokens is None else replace(case, sequence=tokens)


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--cases", choices=list(CASES), help="default: 350m on a GPU, quickstart on a CPU")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each case")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence, instead of the case's")
    parser.add_argument("--memory", type=float, metavar="GB", help="the most that a process may take of a GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.one is not None:
        group, index = arguments.one.split(":")
        case = _with_sequence(CASES[group][int(index)], arguments.sequence)
        from ds_lowrank.training import distributed

        distributed.join()
        print(json.dumps(vars(measure(case, arguments.steps, arguments.seed, arguments.memory))), flush=True)
        distributed.leave()
        return
    cases = CASES[arguments.cases or ("350m" if torch.cuda.is_available() and not arguments.quick else "quickstart")]
    measured = [in_own_process(case, arguments) for case in cases]
    cases = [_with_sequence(case, arguments.sequence) for case in cases]
    base = next((f.peak for c, f in zip(cases, measured, strict=True) if c.name == "GaLore, masters"), None)
    rows: Numbers = [row(case, found, base) for case, found in zip(cases, measured, strict=True)]
    report(rows, arguments)


if __name__ == "__main__":
    main()
