"""launch/pretrain.py from the command line, started in the three ways that users start it, and resumed."""

import json
import signal
import socket
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.runs import SEQUENCE_LENGTH, Workspace, deepspeed_config

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def deepspeed_launcher() -> tuple[str, ...]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port))


@pytest.fixture(scope="module")
def finished(workspace: Workspace) -> str:
    """Six steps by plain python, with checkpoints after the third and the last; their console output."""
    run = workspace.run([*workspace.arguments("whole"), "--save-interval", "3", "--eval-interval", "2", "--export"])
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_metrics_hold_every_step(workspace, finished):
    metrics = workspace.metrics("whole")
    assert list(metrics) == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in metrics.values()] == [8 * SEQUENCE_LENGTH * step for step in metrics]
    assert [step for step, record in metrics.items() if "eval_loss" in record] == [2, 4, 6]
    # One warm-up step at the peak, then the cosine down to a tenth.
    assert [round(record["lr"], 6) for record in metrics.values()] == [
        0.01,
        0.009141,
        0.006891,
        0.004109,
        0.001859,
        0.001,
    ]
    for record in metrics.values():
        assert record["grad_norm"] > 0 and record["tokens_per_second"] > 0 and record["memory_gib"] > 0
        assert record["skipped_steps"] == 0
        assert record["lowrank/projected_matrices"] == 14
        assert record["flops_source"] == "torch's counter" and record["mfu"] is None
        parts = record["forward_seconds"] + record["backward_seconds"] + record["step_seconds"]
        assert 0 < record["reduce_seconds"] < record["backward_seconds"] < parts
        assert record["tokens_per_second_per_gpu"] == record["tokens_per_second"]  # one rank
        # 6 N and 12 L d s for each token, of two layers of width 32 and a head of 300.
        per_token = 6 * (2 * (4 * 32**2 + 3 * 32 * 64) + 300 * 32) + 12 * 2 * 32 * SEQUENCE_LENGTH
        assert record["tflops_per_gpu"] == pytest.approx(per_token * record["tokens_per_second"] / 1e12)
        assert record["memory_gib"] == record["resident_gib"] and record["memory_reserved_gib"] is None
    refreshing = [record["refresh_seconds"] for record in metrics.values()]
    assert refreshing == sorted(refreshing) and refreshing[0] > 0
    assert [later > sooner for sooner, later in pairwise(refreshing)] == [False, True, False, True, False]
    assert metrics[1]["remaining_seconds"] is None and metrics[6]["remaining_seconds"] == 0
    assert metrics[5]["remaining_seconds"] > 0 and metrics[5]["projected_end"] > metrics[2]["projected_end"][:10]
    assert metrics[1]["loss"] == pytest.approx(5.70, abs=0.1)  # ln 300, the loss of a model that knows nothing
    assert metrics[6]["eval_loss"] < metrics[2]["eval_loss"] < metrics[1]["loss"]
    assert f"step 6/6 | loss {metrics[6]['loss']:.4f} | grad" in finished


def test_a_finished_run_leaves_a_plot_a_summary_and_a_model(workspace, finished):
    output = workspace.path / "whole"
    assert {path.name for path in output.iterdir()} == {
        *(".checkpoints", "checkpoints", "export", "loss.png", "metrics.jsonl", "summary.json"),
    }
    summary = json.loads((output / "summary.json").read_text())
    assert summary["finished"] and summary["eval_loss"] == workspace.metrics("whole")[6]["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(output / "export")
    tokenizer = AutoTokenizer.from_pretrained(output / "export")
    tokens = torch.tensor([tokenizer.encode("12 24 36 48 60 72 84 96")])
    assert model(input_ids=tokens, labels=tokens).loss.item() < 4.7  # it learnt which bytes are digits


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(workspace, finished):
    checkpoint = workspace.path / "whole" / "checkpoints" / "global_step3"
    arguments = [*workspace.arguments("resumed"), "--eval-interval", "2", "--export", "--resume", str(checkpoint)]
    run = workspace.run_forked(arguments)
    assert run.returncode == 0, run.stderr
    whole, resumed = workspace.metrics("whole"), workspace.metrics("resumed")
    assert list(resumed) == [4, 5, 6]
    for step, record in resumed.items():
        for key in ("loss", "grad_norm", "lr", "tokens", "eval_loss"):
            assert record.get(key) == whole[step].get(key), (step, key)
    weights = [load_file(workspace.path / output / "export" / "model.safetensors") for output in ("whole", "resumed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_refused_on_every_rank_in_one_line(workspace, finished):
    before = (workspace.path / "whole" / "metrics.jsonl").read_bytes()
    run = workspace.run(workspace.arguments("whole"), TORCHRUN)
    assert run.returncode != 0
    assert run.stderr.count("already contains a run (metrics.jsonl); give another --output") == 1
    assert 'pretrain.py", line' not in run.stderr  # no traceback of ours
    assert (workspace.path / "whole" / "metrics.jsonl").read_bytes() == before


def test_a_model_without_room_for_the_tokenizer_is_refused(workspace):
    model = workspace.path / "small_vocabulary.json"
    model.write_text(json.dumps(json.loads((workspace.path / "model.json").read_text()) | {"vocab_size": 200}))
    run = workspace.run([*workspace.arguments("refused"), "--model", str(model)])
    assert run.returncode == 1
    assert "uses token id 256 ('<|endoftext|>'), but the model's vocab_size is 200" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (workspace.path / "refused").exists()


def test_zero_3_on_two_ranks_under_deepspeed_trains_the_same_model(workspace, finished):
    arguments = workspace.arguments("zero3", config=deepspeed_config(zero_stage=3))
    run = workspace.run(["--deepspeed", *arguments, "--eval-interval", "2", "--export"], deepspeed_launcher())
    assert run.returncode == 0, run.stderr
    whole, zero3 = workspace.metrics("whole"), workspace.metrics("zero3")
    assert list(zero3) == list(whole)
    for step, record in zero3.items():
        # The same weights, batches and updates; sums in fp32 are taken in another order.
        for key in {"loss", "grad_norm", "eval_loss"} & record.keys():
            assert record[key] == pytest.approx(whole[step][key], rel=1e-4), (step, key)
        # The FLOPs of a token are those of the whole model, of which each rank holds a part.
        of_a_token = whole[step]["tflops_per_gpu"] / whole[step]["tokens_per_second_per_gpu"]
        assert record["tflops_per_gpu"] / record["tokens_per_second_per_gpu"] == pytest.approx(of_a_token)
    weights = [load_file(workspace.path / output / "export" / "model.safetensors") for output in ("whole", "zero3")]
    assert {name: weight.shape for name, weight in weights[0].items()} == {
        name: weight.shape for name, weight in weights[1].items()
    }


def test_ranks_that_follow_the_gradient_are_reported_and_resumed(workspace):
    """AdaRankGrad on two ranks: every record has each matrix's rank and bytes, and a resumed run goes on with them."""
    config = deepspeed_config("AdaRankGrad")
    run = workspace.run([*workspace.arguments("adaptive", config=config), "--save-interval", "3"], TORCHRUN)
    assert run.returncode == 0, run.stderr
    metrics = workspace.metrics("adaptive")
    for record in metrics.values():
        matrices = record["matrices"]
        assert len(matrices) == record["lowrank/projected_matrices"] == 14
        for name, found in matrices.items():
            kept, compressed = (64, 32) if "mlp" in name else (32, 32)
            assert found["state_bytes"] == 4 * (found["rank"] * (2 * kept + compressed) + 1)
        ranks = [found["rank"] for found in matrices.values()]
        assert record["lowrank/mean_rank"] == pytest.approx(sum(ranks) / 14)
        assert record["lowrank/state_bytes"] == sum(found["state_bytes"] for found in matrices.values())
    assert metrics[1]["lowrank/refreshes"] == 14 and metrics[3]["lowrank/refreshes"] == 28
    assert max(found["rank"] for found in metrics[6]["matrices"].values()) <= 16
    assert metrics[1]["matrices"] != metrics[6]["matrices"], "no rank changed: the test tests nothing"
    checkpoint = workspace.path / "adaptive" / "checkpoints" / "global_step3"
    resumed = [*workspace.arguments("adaptive_resumed", config=config), "--resume", str(checkpoint)]
    run = workspace.run_forked(resumed, ranks=2)
    assert run.returncode == 0, run.stderr
    for step, record in workspace.metrics("adaptive_resumed").items():
        assert record["matrices"] == metrics[step]["matrices"]
        assert record["loss"] == metrics[step]["loss"]


def test_asked_to_stop_a_run_saves_and_can_go_on(workspace):
    config = deepspeed_config("AdamW", zero_stage=0)
    process = workspace.start(workspace.arguments("stopped", config=config, steps=100_000))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)  # the steps asked for would take twenty minutes
    assert process.returncode == 0, err
    assert "asked to stop at step" in out
    (checkpoint,) = (workspace.path / "stopped" / "checkpoints").glob("global_step*")
    stopped_at = int(checkpoint.name.removeprefix("global_step"))
    assert list(workspace.metrics("stopped")) == list(range(1, stopped_at + 1))
    run = workspace.run_forked([*workspace.arguments("stopped", config=config, steps=stopped_at + 2), "--resume"])
    assert run.returncode == 0, run.stderr
    assert list(workspace.metrics("stopped")) == list(range(1, stopped_at + 3))
