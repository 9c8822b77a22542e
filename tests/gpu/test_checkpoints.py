"""Checkpoints of engines on a card: they are those of a CPU, and a copy in pinned memory is what was trained."""

from __future__ import annotations

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import config, full_weights, make_model, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def started(settings, device):
    import ds_lowrank

    return ds_lowrank.initialize(model=make_model().to(device), config=settings)[0]


def save(settings, directory, device, in_background):
    """Train two steps, save, and go on while files may be written; the weights when it was saved."""
    from pathlib import Path

    from ds_lowrank.checkpoint.manifest import Progress
    from ds_lowrank.integration.checkpoint import Snapshots, begin_saving

    engine = started(settings, device)
    for step in range(2):
        train_step(engine, step, device)
    weights = full_weights(engine)
    saving = begin_saving(
        engine,
        Path(directory),
        "here",
        run={},
        progress=Progress(2),
        common={},
        snapshots=Snapshots() if in_background else None,
    )
    train_step(engine, 2, device)
    saving.complete()
    return {name: weight.cpu() for name, weight in weights.items()}


def load(settings, directory, device):
    engine = started(settings, device)
    engine.load_checkpoint(directory, tag="here")
    return {name: weight.cpu() for name, weight in full_weights(engine).items()}


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_what_a_card_saved_opens_on_a_cpu_and_on_a_card(stage, dtype, state_dtype, in_background, tmp_path):
    settings = config(stage, 1, dtype, params={"state_dtype": state_dtype})
    (saved,) = run_ranks(1, save, settings, str(tmp_path), "cuda", in_background, device="cuda")
    (card,) = run_ranks(1, load, config(1, 1, dtype), str(tmp_path), "cuda", device="cuda")
    (cpu,) = run_ranks(1, load, config(2, 1, dtype), str(tmp_path), "cpu")
    for name, weight in saved.items():
        assert torch.equal(weight, card[name]), name
        assert torch.equal(weight, cpu[name]), name
