"""``python -m ds_lowrank doctor --bench``: what is measured, and what is called wrong."""

import subprocess
import sys

import pytest
import torch

from ds_lowrank import __main__
from ds_lowrank.environment import bench, speed
from ds_lowrank.environment.bench import memory_line, network_line, product_line, report, threads_line
from ds_lowrank.environment.peaks import peak_of
from ds_lowrank.environment.speed import Speeds, best_seconds

CPU, H100 = torch.device("cpu"), peak_of("NVIDIA H100 80GB HBM3")


def of(bf16=700.0, memory=3000.0, network=200.0, host="node1", **products):
    return Speeds(host, {"bf16": bf16, **products}, memory, network)


def test_a_healthy_card_is_told_its_share_of_the_data_sheet():
    everyone = [of(bf16=700.0 + rank) for rank in range(8)]
    line = product_line("bf16", everyone, H100, on_cpu=False)
    assert (line.name, line.value, line.text, line.wrong) == ("bf16 products", "700 TFLOPS", "71% of 989", False)
    line = memory_line(everyone, H100)
    assert (line.value, line.text, line.wrong) == ("3e+03 GB/s", "90% of 3350", False)
    line = network_line(everyone, "nccl")
    assert (line.value, line.wrong) == ("200 GB/s", False)
    assert line.text == "bus bandwidth, 8 ranks on 1 machine, all-reduce by nccl"


@pytest.mark.parametrize("share", [0.49, 0.51])
def test_a_card_that_does_less_than_half_is_wrong(share):
    line = product_line("bf16", [of(bf16=share * 989)] * 2, H100, on_cpu=False)
    assert line.wrong is (share < 0.5) and bool(line.remedy) is line.wrong
    assert line.text == f"{share:.0%} of 989"


def test_a_card_with_slow_memory_is_wrong():
    assert memory_line([of(memory=0.59 * 3350)], H100).wrong and not memory_line([of(memory=0.61 * 3350)], H100).wrong


def test_one_rank_that_holds_up_the_others_is_named():
    everyone = [of(), of(), of(host="node2"), of(bf16=500.0, memory=2000.0, host="node2")]
    for line in (product_line("bf16", everyone, H100, on_cpu=False), memory_line(everyone, H100)):
        assert line.wrong and line.text.startswith("rank 3 on node2 holds up the others, whose median is")


@pytest.mark.parametrize(
    ("gb", "hosts", "backend", "wrong"),
    [
        (1.2, 1, "nccl", True),
        (1.3, 1, "nccl", False),
        (1.2, 2, "nccl", False),  # between machines it may be Ethernet
        (0.12, 2, "nccl", True),
        (0.13, 1, "gloo", False),
    ],
)
def test_a_network_is_wrong_only_where_no_network_is_that_slow(gb, hosts, backend, wrong):
    line = network_line([of(network=gb, host=f"node{rank % hosts}") for rank in range(4)], backend)
    assert line.wrong is wrong and ("is normal" in line.text) is wrong
    assert f"4 ranks on {hosts} machine" in line.text


def test_one_rank_has_no_network():
    line = network_line([of(network=None)], "gloo")
    assert (line.value, line.text, line.wrong) == ("not measured", "there is one rank", False)
    assert line.remedy == "torchrun --standalone --nproc_per_node 2 -m ds_lowrank doctor --bench"


def test_a_product_at_the_speed_of_memory_is_wrong():
    """2 FLOPs for each 8 bytes: what three nested loops do without blocks."""
    slow = Speeds("node", {"fp32": 0.25 * 20 / 1000, "bf16": 1.0}, 20.0, None)
    fast = Speeds("node", {"fp32": 0.1, "bf16": 0.05}, 20.0, None)
    assert product_line("fp32", [slow], None, on_cpu=True).wrong
    assert not product_line("fp32", [fast], None, on_cpu=True).wrong
    line = product_line("bf16", [fast], None, on_cpu=True)
    assert not line.wrong and line.text.startswith("slower than fp32")


@pytest.mark.parametrize(
    ("threads", "cores", "ranks", "wrong", "fair"),
    [
        (8, 8, 1, False, 8),
        (5, 8, 1, False, 8),
        (1, 8, 1, True, 8),
        (4, 8, 1, True, 8),
        (4, 8, 2, False, 4),
        (8, 8, 2, True, 4),
        (1, 2, 8, False, 1),
    ],
)
def test_threads_should_be_as_many_as_cores(monkeypatch, threads, cores, ranks, wrong, fair):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    line = threads_line(ranks)
    assert line.wrong is wrong and line.value == f"{threads} of {cores} cores"
    assert line.remedy == (f"export OMP_NUM_THREADS={fair}" if wrong else "")


def test_a_cpu_is_compared_with_nothing():
    lines = report([Speeds("node", {"fp32": 0.1, "bf16": 0.2}, 20.0, None)], CPU)
    assert [line.name for line in lines] == ["device", "threads", "fp32 products", "bf16 products", "memory", "network"]
    assert "only what cannot be right is called wrong" in lines[0].text
    assert not any("%" in line.text for line in lines)


class Clock:
    """A time that passes only by what is called."""

    def __init__(self, *durations):
        self.now, self.calls, self._durations = 0.0, 0, durations

    def perf_counter(self):
        return self.now

    def call(self):
        self.now += self._durations[min(self.calls, len(self._durations) - 1)]
        self.calls += 1


def test_the_shortest_time_counts(monkeypatch):
    """Calls of ten milliseconds, of which the first is slow, and another one is disturbed."""
    clock = Clock(0.5, 0.01, 0.01, 0.3, 0.01)
    monkeypatch.setattr(speed, "time", clock)
    assert best_seconds(clock.call, CPU, seconds=0.3) == pytest.approx(0.01)
    assert 10 <= clock.calls <= 40  # about as many as fit


def test_one_call_is_enough_where_it_is_long(monkeypatch):
    clock = Clock(3.0, 2.0)
    monkeypatch.setattr(speed, "time", clock)
    assert best_seconds(clock.call, CPU, seconds=0.3) == pytest.approx(2.0)
    assert clock.calls == 3  # to warm up, to find out, to measure


@pytest.mark.slow
def test_it_measures_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["ds_lowrank", "--local_rank=0", "doctor", "--bench"])
    before = torch.get_float32_matmul_precision()
    code = __main__.main()
    found = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines() if line[:1].strip()}
    assert code == int("WRONG" in " ".join(found.values()))
    for name in ("fp32 products", "bf16 products"):
        assert 1e-4 < float(found[name].split()[2]) < 100  # a tenth of a GFLOPS, a hundred TFLOPS
    assert 0.01 < float(found["memory"].split()[1]) < 10_000
    assert "not measured" in found["network"]
    assert torch.get_float32_matmul_precision() == before


def test_what_a_device_does_not_have_is_left_out(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not implemented for this device")

    monkeypatch.setattr(speed, "best_seconds", refuse)
    assert speed.product_tflops("bf16", CPU) is None


def test_a_rank_without_the_others_ends_with_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("timed out\nafter some time")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(bench.dist, "init_process_group", fail)
    assert bench.bench() == 1
    assert capsys.readouterr().out == (
        "error: the ranks did not find each other: RuntimeError: timed out after some time\n"
    )


@pytest.mark.slow
def test_two_ranks_measure_the_network_between_them():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = subprocess.run(
        [sys.executable, *torchrun, "-m", "ds_lowrank", "doctor", "--bench"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    network = [line for line in run.stdout.splitlines() if line.startswith("network")]
    assert len(network) == 1 and "2 ranks on 1 machine, all-reduce by gloo" in network[0], run.stderr
    assert float(network[0].split()[1]) > 0.001
    assert run.returncode == int("WRONG" in run.stdout)
