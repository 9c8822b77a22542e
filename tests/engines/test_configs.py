"""Every file in ``ds_configs/`` loads and trains."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.engines.pool import run_ranks
from tests.engines.scenario import BATCH, Oracle, max_relative_difference, run_engine

RANK = 4  # the files ask for 64, more than a matrix of the scenario has well-separated directions
FOLDER = Path(__file__).parents[2] / "ds_configs"
GALORE = sorted(FOLDER.glob("galore_*.json"))
TRAINERS = set(FOLDER.glob("hf_*.json"))  # with "auto" values, tested in tests/huggingface
OTHERS = sorted(set(FOLDER.glob("*.json")) - set(GALORE) - TRAINERS)
STEPS = 5


@functools.cache
def after_one_step():
    params = json.loads((FOLDER / "galore_zero2.json").read_text())["optimizer"]["params"]
    oracle = Oracle(clip=1.0, **params | {"rank": RANK})
    oracle.step(0)
    return oracle.weights()


def test_every_method_has_its_configuration_files():
    methods = {"online_subspace_descent", "vlorp", "adarankgrad", "apollo", "apollo_mini", "gradnormlorp", "lorenza"}
    methods |= {"tandem"}
    methods |= {"scale", "racs"}
    methods |= {"fira", "frugal"}
    methods |= {"ldadam", "subtrack"}
    methods |= {"sumo", "gum", "muon"}
    methods |= {"flora"}
    methods |= {"cosmos"}
    assert {path.stem for path in GALORE} == {
        *(f"galore_zero{stage}{dtype}" for stage in range(4) for dtype in ("", "_bf16")),
        "galore_zero2_offload",
    }
    assert {path.stem for path in OTHERS} == {f"{method}_zero2_bf16" for method in methods} | {
        "adamw_zero2",
        "adazo_sam_zero2",
        "llama_7b_24gb",
    }


@pytest.mark.parametrize("path", GALORE, ids=lambda path: path.stem)
def test_galores_files_take_the_step_of_the_oracle_on_two_ranks(path):
    settings = json.loads(path.read_text())
    settings |= {"train_micro_batch_size_per_gpu": BATCH // 2, "train_batch_size": BATCH}
    settings["optimizer"]["params"]["rank"] = RANK
    results = run_ranks(2, run_engine, settings, 1)
    for result in results:
        assert result["metrics"]["lowrank/projected_matrices"] == 14
        # Adam's first step is the sign of the projected gradient, which bf16 forward and backward flip here and there:
        # with the rate of 0.01 one flipped element moves a weight by 0.005.
        bound = 0.1 if "bf16" in settings else 1e-5
        assert max_relative_difference(result["first"], after_one_step()) < bound


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_the_quickstart_model_learns_a_batch_on_two_ranks(path):
    settings = json.loads(path.read_text())
    results = run_ranks(2, repeat_one_batch, settings)
    for result in results:
        # From ln 4096 = 8.3, four steps at the full rate take off two nats and more.
        assert result["losses"][-1] < result["losses"][0] - 1, result["losses"]
        if settings["optimizer"]["type"] != "AdamW":
            assert result["metrics"]["lowrank/projected_matrices"] == 28  # seven in each of four blocks
            assert result["metrics"]["lowrank/skipped_updates"] == 0
    assert results[0]["losses"] == results[1]["losses"]


def repeat_one_batch(settings):
    """Train the model of the quickstart with the unchanged file; every rank sees the same sequences."""
    import torch

    import ds_lowrank
    from ds_lowrank.models import llama

    model = llama.build(llama.load_config(FOLDER / "models" / "llama_quickstart.json"), seed=0)
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    shape = (settings["train_micro_batch_size_per_gpu"], 16)
    batch = torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(STEPS):
        (loss,) = ds_lowrank.forward_backward(engine, lambda: engine(input_ids=batch, labels=batch).loss)
        engine.step()
        losses.append(loss.item())
    metrics = engine.basic_optimizer.metrics() if hasattr(engine.basic_optimizer, "metrics") else {}
    return {"losses": losses, "metrics": metrics}
