"""``python -m ds_lowrank estimate``: its formulas, what it prints, what it proposes, and what it says of bad input."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_lowrank import __main__
from ds_lowrank.estimate.activations import Pass, activations
from ds_lowrank.estimate.deepspeed import bytes_sent, kept
from ds_lowrank.estimate.fit import COSTLY, search
from ds_lowrank.estimate.live import LiveBytes
from ds_lowrank.estimate.optimizer import Counter, Model
from ds_lowrank.estimate.sizes import read_size, size_text
from ds_lowrank.estimate.total import Estimator
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.simulated import Rehearsal, SimulatedOptimizer
from ds_lowrank.placement.simulated import SimulatedGrid, intervals
from ds_lowrank.sharding.world import SimulatedWorld
from tests.engines.estimates import setup_of
from tests.engines.scenario import config
from tests.unit.pages import ROOT
from tests.unit.saved import saved_bytes

CONFIGS = ROOT / "ds_configs"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 64,
    "use_cache": False,
}
MODEL = LlamaConfig(**SIZES)
TOKENS = torch.zeros(4, 64, dtype=torch.int64)


def model_of(dtype, checkpointing, **changes):
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def estimated(model, checkpointing, layers=3):
    one = Pass(4, 64, next(model.parameters()).element_size(), 1, checkpointing)
    return activations(model.config, one, layers, has_loss=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"head_dim": 32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(dtype, changes, checkpointing):
    """Within 2 %: tokens, positions and angles are left out, which are few where the model is wide."""
    model = model_of(dtype, checkpointing, **changes)
    saved = saved_bytes(model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
    found = estimated(model, checkpointing)
    assert found.saved + found.loss == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("vocabulary", [100, 4000])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_pass_is_that_of_live_tensors(dtype, checkpointing, vocabulary):
    """Within 10 %, at the loss (a large vocabulary) and in the last layer. Gradients are there before the pass."""
    model = model_of(dtype, checkpointing, vocab_size=vocabulary)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    of_a_weight = max(p.nbytes for p in model.parameters())  # its new gradient, before it is added
    assert estimated(model, checkpointing).peak == pytest.approx(live.peak, rel=0.1, abs=of_a_weight)


def test_a_stage_of_a_pipeline_keeps_several_micro_batches():
    one = Pass(1, 64, 2)
    single, double = (activations(MODEL, one, 3, has_loss=False, in_flight=n) for n in (1, 2))
    assert double.peak - single.peak == single.saved and single.loss == 0


def test_live_bytes_follow_tensors_until_they_are_freed():
    before = torch.zeros(100)
    with LiveBytes() as live:
        a = torch.zeros(10)
        b = a + before[:10]
        _ = b.view(5, 2)
        before.add_(1)
        assert live.now == live.peak == 80
        del a
        assert (live.now, live.peak) == (40, 80)
        live.restart()
        assert live.peak == 40
    del b, _
    assert live.now == 0


def slots_of_all_ranks(method, params, data, tensor, zero):
    """Of the small model on every rank of a group, on the meta device."""
    setup = setup_of(MODEL, config(zero, data, method=method, params=params), data * tensor, tensor)
    model = Model(setup)
    (stage,) = model.stages
    held = intervals(stage.numels, data, zero)
    found = []
    for rank in range(data * tensor):
        grid = SimulatedGrid(number=rank % tensor, size=tensor)
        optimizer = SimulatedOptimizer(METHODS[method], model.parameters, setup.params, grid)
        found.append(optimizer.slots(stage.parameters, held, rank, True, torch.float32))
    return setup, model, stage, found


@pytest.mark.parametrize(("data", "tensor", "zero"), [(3, 1, 1), (3, 1, 3), (2, 2, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_sent_is_what_a_simulated_world_sends(method, data, tensor, zero):
    params = {"state_dtype": "int8"} if method == "GaLore" else {}
    params |= {"granularity": 2} if method == "VLoRP" else {}
    setup, model, stage, ranks = slots_of_all_ranks(method, params, data, tensor, zero)
    of = METHODS[method]
    rehearsals = [Rehearsal(of, slots) for slots in ranks]
    sent = []
    for number in (0, 1):
        world = SimulatedWorld(len(ranks))
        with torch.no_grad():
            world.run([rehearsal.rounds(number, len(ranks)) for rehearsal in rehearsals])
        sent.append(round(sum(world.bytes_sent) / len(ranks)))
    part = Counter(setup, model, stage).part()
    assert part.sent_ordinary == sent[1]
    assert part.sent_refresh >= sent[0]  # a later one may also rotate moments
    assert part.refresh > 0 and part.ordinary > 0


def test_a_step_needs_what_the_documented_formula_says():
    """At ZeRO 3, for every matrix: the held rows of the basis and the owned rows of R, 4 r (H(c) + O(k)) bytes."""
    setup, model, stage, ranks = slots_of_all_ranks("GaLore", {"rank": 16}, 4, 1, 3)
    expected = 0
    for slot in (slot for slot in ranks[0] if slot.is_projected):
        compressed, kept_ = slot.geometry.compressed, slot.geometry.kept
        held = sum(hi - lo for lo, hi in compressed.held.get(0, ()))
        owned = sum(hi - lo for lo, hi in kept_.owned.get(0, ()))
        expected += 4 * slot.rank * (held + owned)
    # On top come one bucket's directions and buffers, here of all matrices: at most as much again for each.
    assert expected < Counter(setup, model, stage).part().ordinary < 4 * expected


@pytest.mark.parametrize(("zero", "halves"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_rings_send_what_they_must(zero, halves):
    """Half a ring for each of: gradients reduced, weights gathered; at ZeRO 3 weights twice."""
    numels = [64 * 64, 64]
    for ranks in (1, 4):
        setup = setup_of(MODEL, config(zero, ranks, dtype="bf16"), ranks)
        assert bytes_sent(setup, numels) == halves * 2 * sum(numels) * (ranks - 1) // ranks


def test_deepspeeds_estimators_agree_for_adam():
    """They are 2 N + 18 P at ZeRO 2, with gradients in 16 bits beside those in 32, and 18 P at ZeRO 3, without."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    numels, ranks = [4096] * 8, 4
    theirs = {
        2: estimate_zero2_model_states_mem_needs(sum(numels), ranks, 1, cpu_offload=False)[1],
        3: estimate_zero3_model_states_mem_needs(sum(numels), 0, ranks, 1, cpu_offload=False)[1],
    }
    for zero, expected in theirs.items():
        settings = {"stage3_param_persistence_threshold": 0}
        found = kept(setup_of(MODEL, config(zero, ranks, dtype="bf16", zero_optimization=settings), ranks), numels)
        stepped = sum(numels) // ranks
        gradients = {2: 2 + 4, 3: 4}[zero] * stepped
        assert found.weights + found.masters + 8 * stepped + gradients == expected
        assert found.gradients == 2 * stepped


PROJECTED = {"rank": 16, "reduction": "projected", "update_proj_gap": 10}


@pytest.mark.parametrize(("staggers", "renewed"), [(False, 1.0), (True, 0.4)])
def test_projected_gradients_are_never_whole(staggers, renewed):
    """Without masters, two ranks: matrices that renew bases at once, one layer's, or all."""
    first = {"stagger": True, "first_basis": "random"} if staggers else {}
    params = {**PROJECTED, **first, "master_weights": False}
    setup = setup_of(MODEL, config(0, 2, dtype="bf16", params=params), 2)
    (rank,) = Estimator().estimate(setup).ranks
    found, matrices = rank.optimizer.projections, 3 * (4 * 64 * 64 + 3 * 64 * 172)
    assert found.largest_layer == matrices // 3
    assert found.renewed == matrices if renewed == 1 else 0 < found.renewed <= renewed * matrices
    assert found.rest == 2 * 500 * 64 + 7 * 64
    assert found.sums == 4 * 16 * 3 * (4 * 64 + 3 * 172) and rank.optimizer.gathered == 4 * 16 * 3 * 7 * 64
    assert rank.kept.gradients == 2 * (found.rest + max(found.renewed, found.largest_layer)) + found.sums
    assert rank.kept.masters == 0
    # A reduce-scatter of R and an all-gather of N; the decision sends one number a parameter and rank.
    assert rank.traffic.optimizer == found.sums + 4 * (3 * 9 + 3)
    assert rank.traffic.gradients_and_weights == 2 * found.rest  # 2 (W - 1) / W of bf16


def estimate(monkeypatch, capsys, *arguments, model="llama_9m", deepspeed="galore_zero2_bf16"):
    given = ["--model", CONFIGS / f"models/{model}.json", "--deepspeed_config", CONFIGS / f"{deepspeed}.json"]
    return command(monkeypatch, capsys, *given, *arguments)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ds_lowrank", "estimate", *map(str, arguments)])
    try:
        code = __main__.main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_the_table_has_the_method_and_adamw_at_the_same_stage(monkeypatch, capsys):
    code, printed = estimate(monkeypatch, capsys, "--gpus", 2, "--sequence-length", 256)
    lines = printed.out.splitlines()
    assert (code, printed.err) == (0, "")
    assert lines[0].startswith("2 ranks (data 2 x tensor 1 x pipeline 1), micro-batch 8 x 256 tokens, 1 per step")
    head = next(line for line in lines if "ZeRO" in line)
    assert [cell.strip() for cell in head.split("  ")[-2:]] == ["GaLore, ZeRO 2", "AdamW, ZeRO 2"]
    cells = {line[:37].strip(): line[37:].split("  ") for line in lines if line.startswith("  ")}
    assert {"weights", "fp32 masters", "states of matrices: bases", "activations, checkpointed"} <= cells.keys()
    assert "sent: pipeline" not in cells


def test_the_kinds_of_ranks_of_a_pipeline(monkeypatch, capsys):
    arguments = ("--gpus", 8, "--tensor-parallel", 2, "--pipeline-parallel", 4, "--global-batch-size", 64)
    code, printed = estimate(monkeypatch, capsys, *arguments, deepspeed="galore_zero1_bf16")
    assert code == 0
    assert re.findall(r"^Bytes on (.*):$", printed.out, re.M) == ["first stage", "middle stages", "last stage"]
    assert "sent: pipeline" in printed.out and "sent: tensor parallelism" in printed.out


def test_json_is_in_bytes_and_consistent(monkeypatch, capsys):
    code, printed = estimate(monkeypatch, capsys, "--json", "--fit", "100GB")
    found = json.loads(printed.out)
    galore, adamw = found["runs"]
    (rank,) = galore["ranks"]
    assert code == 0 and (galore["optimizer"], adamw["optimizer"]) == ("GaLore", "AdamW")
    assert rank["peak"] == galore["peak"] == max(rank["backward"], rank["step"])
    assert (
        rank["optimizer"]["states"]["moments"] + rank["optimizer"]["states"]["bases"] == galore["lowrank/state_bytes"]
    )
    assert found["fit"] == {"size": 10**11, "tried": found["fit"]["tried"], "best": []}


@pytest.mark.parametrize("share", [1.0, 0.9, 0.4, 0.15])
def test_what_is_proposed_fits_and_is_the_cheapest_tried(monkeypatch, capsys, share):
    arguments = ("--json", "--gpus", 2)
    peak = json.loads(estimate(monkeypatch, capsys, *arguments)[1].out)["runs"][0]["peak"]
    size = int(share * peak)
    code, printed = estimate(monkeypatch, capsys, *arguments, "--fit", f"{size}B")
    fit = json.loads(printed.out)["fit"]
    chosen = next(one for one in fit["tried"] if one["changes"] == fit["best"])
    assert code == 0 and chosen["peak"] <= size
    assert all(one["costly"] >= chosen["costly"] for one in fit["tried"] if one["fits"])
    assert (fit["best"] == []) == (share == 1)


def test_nothing_fits(monkeypatch, capsys):
    code, printed = estimate(monkeypatch, capsys, "--fit", "10MB")
    assert code == 1
    assert "Nothing fits 10.0 MB: lower the rank, or use more ranks or a smaller model." in printed.out


def test_changes_that_cost_speed_come_last():
    setup = setup_of(MODEL, config(2, 2, dtype="bf16"), 2)
    estimator = Estimator()
    peak = estimator.estimate(setup).peak
    assert [one.changes for one in search(setup, peak, estimator).tried] == [()]
    found = search(setup, peak - 1, estimator)
    assert found.best is not None and found.best.costly == 0 and found.best.changes
    costly = {change.text for change in COSTLY}
    assert all(one.costly == len(costly & set(one.changes)) for one in found.tried)


BAD = {
    "a model that is not there": (["--model", "nowhere.json"], "no model configuration at nowhere.json"),
    "a degree that does not divide": (["--gpus", "8", "--tensor-parallel", "5"], "not a multiple"),
    "a sequence that is too long": (["--sequence-length", "100000"], "lower it"),
    "a batch that does not divide": (["--gpus", "3", "--global-batch-size", "4"], "the batch does not divide"),
    "no ranks": (["--gpus", "0"], "'0' is not a whole number from 1 to"),
    "half a rank": (["--gpus", "1.5"], "'1.5' is not a whole number from 1 to"),
    "a size without a unit": (["--fit", "24"], "'24' is no size of memory: write 24GB or 24GiB"),
    "no memory": (["--fit", "0GB"], "'0GB' is no size of memory"),
    "a configuration that is not there": (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, name):
    arguments, message = BAD[name]
    code, printed = estimate(monkeypatch, capsys, *arguments)
    assert (code, printed.out) == (2, "")
    assert message in printed.err.splitlines()[-1] and "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "GaLore", "params": {"lr": 1e-3, "rnk": 4}}}, "did you mean 'rank'?"),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}}, "Lion"),
        (
            {"optimizer": {"type": "GradNormLoRP", "params": {"lr": 1e-3, "parametrization": "adapter"}}},
            "adapters are not estimated",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "give --tensor-parallel"),
        ({"optimizer": {"type": "GaLore", "params": {"lr": 1e-3, "reduction": "projected"}}}, "Set it to 0"),
        ({"optimizer": {"type": "GaLore", "params": {"lr": 1e-3, "master_weights": False}}}, "trains in fp32"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size is not supported"),
    ],
)
def test_configurations_that_are_refused(monkeypatch, capsys, tmp_path, changes, message):
    file = tmp_path / "ds.json"
    base = json.loads((CONFIGS / "galore_zero1.json").read_text())
    file.write_text(json.dumps(base | changes))
    given = ("--model", CONFIGS / "models/llama_60m.json", "--deepspeed_config", file, "--gpus", 2)
    code, printed = command(monkeypatch, capsys, *given)
    assert (code, printed.out) == (2, "") and message in printed.err and printed.err.count("\n") == 1


def test_sizes():
    assert read_size("24GB") == 24 * 10**9 and read_size("1.5 GiB") == 3 * 2**29 and read_size("80gb") == 80 * 10**9
    assert [size_text(n) for n in (0, 12, 1500, 999_960_000, 24 * 10**9)] == [
        "-",
        "12 B",
        "1.5 kB",
        "1.00 GB",
        "24.00 GB",
    ]
    for text in ("GB", "-1GB", "1e3GB", "24Gb/s", ""):
        with pytest.raises(ValueError, match="no size"):
            read_size(text)
