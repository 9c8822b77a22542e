"""Size, time and memory of checkpoints, beside torch.save and torch's distributed checkpoint (DCP) on the same disk.

python -m benchmarks.checkpoint_speed --work runs/checkpoint_speed

*Size*: bytes of the files over those of weights and states, from real engines at ZeRO 0 to 3. *Time*: one rank's
gigabyte of pieces, written and read in turns with torch.save and DCP of the same tensors; every write is flushed to
the disk (fsync). What is read is still in memory (the page cache), as it is after a save. Reading includes the check of
the checksum. *Stall*: how long training stands still for a save in the background, over the time of one in the
foreground. *Memory*: what loading on another grid needs beyond what a rank has anyway, from the kernel's count of each
process. At ZeRO 1 and 2 that has the gather by which DeepSpeed fills the forward weights, as after every step: gloo
copies them meanwhile. Needs the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint

from benchmarks.common import Numbers, interleaved, options, report
from ds_lowrank.checkpoint.disk import flush, flush_folder
from ds_lowrank.checkpoint.manifest import Manifest, Progress, check_files
from ds_lowrank.checkpoint.reader import SavedTensors
from ds_lowrank.checkpoint.tensor_file import write_pieces
from ds_lowrank.integration.checkpoint import Snapshots, begin_saving
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import Piece
from tests.engines.pool import run_ranks

dcp: Any = torch.distributed.checkpoint
SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816), (1024, 128), (128, 2816))
"""Of the tensors of a gigabyte, in turns: matrices of a model, and bases and moments of rank 128."""
MODEL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
MIDDLE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
METHOD = "GaLore"


def pieces_of(mebibytes: int) -> list[Piece]:
    """One rank's pieces, fp32.

    Args:
        mebibytes: how large they are together.
    """
    found: list[Piece] = []
    left = mebibytes * 2**18
    while left > 0:
        rows, columns = SHAPES[len(found) % len(SHAPES)]
        rows = min(rows, -(-left // columns))
        name = f"model.layers.{len(found)}.weight"
        data = torch.randn(rows, columns, dtype=torch.float32, device="cpu")
        found.append(Piece(name, (rows, columns), (Rectangle(0, 0, rows, columns, 0),), data))
        left -= rows * columns
    return found


def times(work: Path, mebibytes: int, repeats: int) -> Numbers:
    """Seconds to save and to load, and what each takes over torch.

    Args:
        work: a folder on the disk to measure.
        mebibytes: of a rank.
        repeats: how often each is measured.
    """
    pieces = pieces_of(mebibytes)
    tensors = {piece.key: piece.data for piece in pieces}
    out = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
    ours, stock, theirs, hugging = work / "ours", work / "torch.pt", work / "dcp", work / "dcp_safetensors"
    ours.mkdir(parents=True)
    sealed: list[Manifest] = []

    def save() -> None:
        written = write_pieces(ours / "rank_00000.safetensors", pieces, {})
        sealed[:] = [Manifest(Progress(), {}, {"rank_00000.safetensors": written})]

    def load() -> None:
        check_files(ours, sealed[0])
        with SavedTensors(ours, ["rank_00000.safetensors"]) as source:
            for piece in pieces:
                source.read(piece.key, piece.rectangles, out[piece.key])

    def save_stock() -> None:
        torch.save(tensors, stock)
        flush(stock)

    def load_stock() -> None:
        for key, tensor in torch.load(stock, weights_only=True).items():
            out[key].copy_(tensor)

    def save_safetensors() -> None:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(hugging)), no_dist=True)
        flush_folder(hugging)

    saves: dict[str, Callable[[], object]] = {
        "ours": save,
        "torch.save": save_stock,
        "DCP": lambda: dcp.save(tensors, checkpoint_id=theirs, no_dist=True),
        "DCP as safetensors": save_safetensors,
    }
    loads: dict[str, Callable[[], object]] = {
        "ours": load,
        "torch.save": load_stock,
        "DCP": lambda: dcp.load(out, checkpoint_id=theirs, no_dist=True),
        "DCP as safetensors": lambda: dcp.load(
            out, storage_reader=dcp.HuggingFaceStorageReader(str(hugging)), no_dist=True
        ),
    }
    written, read = interleaved(saves, repeats), interleaved(loads, repeats)
    held = sum(tensor.numel() * 4 for tensor in tensors.values())
    places = {"ours": ours, "torch.save": stock, "DCP": theirs, "DCP as safetensors": hugging}
    rows = [
        {
            "what": name,
            "save s": median(written[name]),
            "over torch.save": _ratio(written[name], written["torch.save"]),
            "load s": median(read[name]),
            "over torch.load": _ratio(read[name], read["torch.save"]),
            "bytes over tensors": _size(places[name]) / held,
        }
        for name in saves
    ]
    shutil.rmtree(work)
    return rows


def _ratio(own: list[float], other: list[float]) -> float:
    """The median of the ratios of measurements that follow each other."""
    return median(a / b for a, b in zip(own, other, strict=True))


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _engine(stage: int, ranks: int, sizes: Mapping[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    import ds_lowrank

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **sizes))
    params = {"lr": 1e-2, "rank": 64 if sizes["hidden_size"] > 64 else 16}
    settings = {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": METHOD, "params": params},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    return ds_lowrank.initialize(model=model, config=settings)[0]


def _saved(stage: int, ranks: int, sizes: Mapping[str, int], directory: str) -> tuple[int, int]:
    """On each rank: save, and return the bytes of all weights, and of this rank's states."""
    from ds_lowrank.optimizer.report import state_bytes

    engine = _engine(stage, ranks, sizes)
    engine.save_checkpoint(directory, tag="saved")
    weights = sum(getattr(p, "ds_numel", p.numel()) * 4 for p in engine.module.parameters())
    return int(weights), sum(state_bytes(engine.basic_optimizer.slots))


def sizes_on_disk(work: Path, sizes: Mapping[str, int], quick: bool) -> Numbers:
    """Bytes of a checkpoint over those of what it holds.

    Args:
        work: a folder.
        sizes: of the model.
        quick: whether to try one grid only.
    """
    rows: Numbers = []
    for stage in (0, 1, 2, 3):
        for ranks in (2,) if quick else (1, 2, 4):
            by_rank = run_ranks(ranks, _saved, stage, ranks, sizes, str(work))
            states = [state for _, state in by_rank]
            held = by_rank[0][0] + (sum(states) if stage else states[0])  # at ZeRO 0 every rank has all of them
            size = _size(work / "saved")
            rows.append({"ZeRO": stage, "ranks": ranks, "MB": size / 1e6, "over weights and states": size / held})
            shutil.rmtree(work)
    return rows


def _stalls(sizes: Mapping[str, int], directory: str, saves: int) -> list[float]:
    """Seconds of a save in the foreground (median), and for which each save in the background stops the rank."""
    engine, work, snapshots = _engine(1, 1, sizes), Path(directory), Snapshots()

    def begin(tag: str, memory: Snapshots | None) -> Any:
        return begin_saving(engine, work, tag, run={}, progress=Progress(), common={}, keep=1, snapshots=memory)

    whole, still = [], []
    for number in range(saves):
        started = time.perf_counter()
        begin(f"global_step{2 * number}", None).complete()
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        saving = begin(f"global_step{2 * number + 1}", snapshots)
        begun = time.perf_counter() - started
        while saving.is_pending:
            time.sleep(0.01)
        started = time.perf_counter()
        saving.complete()
        still.append(begun + time.perf_counter() - started)
    return [median(whole), *still]


def stalls(work: Path, sizes: Mapping[str, int], saves: int) -> Numbers:
    """How long training stands still for a save in the background.

    Args:
        work: a folder.
        sizes: of the model.
        saves: how many of each.
    """
    whole, first, *later = run_ranks(1, _stalls, sizes, str(work), saves, timeout=600)[0]
    size = _size(work)
    shutil.rmtree(work)
    return [
        {"save": name, "MB": size / 1e6, "s": taken, "over one in the foreground": taken / whole}
        for name, taken in (
            ("in the foreground", whole),
            ("in the background, first", first),
            ("in the background, later", median(later)),
        )
    ]


def _loaded(stage: int, ranks: int, sizes: Mapping[str, int], directory: str) -> dict[str, float]:
    """On each rank: MB that loading needs at its peak beyond what there was before and is there after it."""
    engine = _engine(stage, ranks, sizes)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    engine.load_checkpoint(directory, tag="saved")
    own = sum(piece.data.numel() * 4 for piece in engine.basic_optimizer.state_pieces()) + sum(
        getattr(p, "ds_numel", p.numel()) * 4 for p in engine.module.parameters()
    ) / (ranks if stage else 1)
    return {"own": own / 1e6, "beyond": (_status("VmHWM") - max(before, _status("VmRSS"))) / 1e6}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def memory(work: Path, sizes: Mapping[str, int]) -> Numbers:
    """What loading on another grid needs for a while.

    Args:
        work: a folder.
        sizes: of the model.
    """
    rows: Numbers = []
    for (stage, ranks), (to_stage, to_ranks) in (((1, 3), (3, 2)), ((3, 2), (1, 3)), ((2, 2), (0, 1))):
        run_ranks(ranks, _saved, stage, ranks, sizes, str(work))
        found = run_ranks(to_ranks, _loaded, to_stage, to_ranks, sizes, str(work))
        worst = max(found, key=lambda rank: rank["beyond"])
        rows.append(
            {
                "saved": f"ZeRO {stage}, {ranks} ranks",
                "loaded": f"ZeRO {to_stage}, {to_ranks} ranks",
                "own share MB": worst["own"],
                "peak beyond it MB": worst["beyond"],
            }
        )
        shutil.rmtree(work)
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Numbers]:
    """All tables, by name."""
    quick, work = arguments.quick, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if quick else MODEL
    return {
        "times": times(work / "times", 8 if quick else arguments.mebibytes, 1 if quick else arguments.repeats),
        "sizes": sizes_on_disk(work / "sizes", SMALL if quick else MIDDLE, quick),
        "stalls": stalls(work / "stalls", sizes, 2 if quick else 4),
        "memory": memory(work / "memory", sizes),
    }


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/checkpoint_speed"), metavar="DIR")
    parser.add_argument("--mebibytes", type=int, default=1024, help="of a rank")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments)
    report(found.pop("times"), arguments, **found)
    os.rmdir(arguments.work)


if __name__ == "__main__":
    main()
