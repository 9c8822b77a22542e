"""Damaged checkpoints: each is refused in one line that names a file, and nothing it says is run or allocated.

python -m benchmarks.damaged_checkpoints

Two runs on two gloo ranks at ZeRO 2 save checkpoints. Each trial copies one, damages the copy, and loads it with
``engine.load_checkpoint`` on both ranks: files that are cut, flipped, missing, of another step or another run; and
files whose contents lie, with a manifest whose checksums were recomputed. Weights and states must be as before, nothing
may run, and the peak of a rank's memory may not rise with a lie. At the end the undamaged checkpoint is loaded. The
exit code says whether all held. Needs the ``dev`` extra.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import options, report
from benchmarks.faults.damage import edit_manifest
from ds_lowrank.checkpoint.common import COMMON, rank_file
from tests.engines import grids
from tests.engines.pool import run_ranks
from tests.engines.scenario import config

RANKS = 2
MANIFEST = "manifest.json"
MOST_BYTES = 64 * 2**20
"""By how much a rank's memory may rise: interpreters and allocators take some of it. Lies are of terabytes."""
Header = dict[str, Any]
dense_model: Callable[..., torch.nn.Module] = grids.dense_model
train_step: Callable[..., float] = grids.train_step
settings_of: Callable[..., dict[str, Any]] = config


@dataclass(frozen=True)
class Damage:
    """What is done to a checkpoint.

    Attributes:
        name: of it.
        file: that a refusal must name; empty if any line will do.
        act: does it to the folder.
        compact: whether ``make test`` tries it.
    """

    name: str
    file: str
    act: Callable[[Path], object]
    compact: bool = False


def _flip(name: str, place: float, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    (folder / name).write_bytes(content)


def _resize(name: str, change: Callable[[int], int], folder: Path) -> None:
    os.truncate(folder / name, change((folder / name).stat().st_size))


def _copy(source: str, name: str, folder: Path) -> None:
    """Take a file of another checkpoint beside the folder."""
    shutil.copy(folder.parent / source / name, folder / name)


def _swap(folder: Path) -> None:
    first, second = folder / rank_file(0), folder / rank_file(1)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _twice(folder: Path) -> None:
    """Some rows twice and the others not at all."""
    shutil.copy(folder / FIRST, folder / SECOND)
    edit_manifest(folder)


def _link(name: str, to: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(to)


FIRST, SECOND = rank_file(0), rank_file(1)
AS_SAVED: dict[str, Callable[[str], Callable[[Path], object]]] = {
    "cut in half": lambda name: partial(_resize, name, lambda size: size // 2),
    "cut by one byte": lambda name: partial(_resize, name, lambda size: size - 1),
    "one byte too long": lambda name: partial(_resize, name, lambda size: size + 1),
    "empty": lambda name: partial(_resize, name, lambda _: 0),
    "missing": lambda name: lambda folder: (folder / name).unlink(),
    "a bit flipped at its start": lambda name: partial(_flip, name, 0.0),
    "a bit flipped near its start": lambda name: partial(_flip, name, 0.02),
    "a bit flipped at its end": lambda name: partial(_flip, name, 1.0),
    "that of another step": lambda name: partial(_copy, "global_step2", name),
    "that of another run": lambda name: partial(_copy, "other", name),
    "a link to itself": lambda name: partial(_link, name, name),
    "a device": lambda name: partial(_link, name, "/dev/zero"),
}
"""What happens to files, while the manifest stays as it was saved."""


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def _bomb(zipped: bool, folder: Path) -> None:
    bomb = _Bomb(folder.parent / "ran")
    content = {"optimizer": bomb, "engine": {}, "caller": {}, "progress": {}}
    torch.save(content, folder / COMMON, _use_new_zipfile_serialization=zipped)
    edit_manifest(folder)


def _common(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    content = torch.load(folder / COMMON, weights_only=True)
    change(content)
    torch.save(content, folder / COMMON)
    edit_manifest(folder)


def _bytes(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    edit_manifest(folder)


def _foreign(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(40)}, folder / SECOND)
    edit_manifest(folder)


def _lie(change: Callable[[Header, Header], object], folder: Path, name: str = SECOND) -> None:
    """Rewrite the header of a file, which ``change`` gets with the places of its pieces; the manifest confirms it."""
    content = (folder / name).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    places = json.loads(header["__metadata__"]["pieces"])
    change(header, places)
    if "__metadata__" in header:
        header["__metadata__"].setdefault("pieces", json.dumps(places))
        if header["__metadata__"]["pieces"] != "kept":
            header["__metadata__"]["pieces"] = json.dumps(places)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    edit_manifest(folder)


def _header_length(length: int, folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    _bytes(SECOND, struct.pack("<Q", length) + content[8:], folder)


def _of_matrix(change: Callable[[Header, Header], object]) -> Callable[[Header, Header], object]:
    """Change a piece that is one rectangle of several rows, the entry of its tensor in the header and its place."""

    def act(header: Header, places: Header) -> object:
        key = next(k for k, p in places.items() if "/" not in k and p["rectangles"][-1][2] > 2)
        return change(header[key], places[key])

    return act


def _overlap(_: Header, place: Header) -> None:
    """As many elements as before, some of them twice and some not at all."""
    last = place["rectangles"][-1]
    last[0] += -1 if last[0] else 1


def _huge(entry: Header, place: Header) -> None:
    place["shape"] = [10**7, 10**7]
    place["rectangles"] = [[0, 0, 10**7, 10**7]]
    entry["shape"] = [10**14]


def _huge_offsets(entry: Header, place: Header) -> None:
    _huge(entry, place)
    entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][0] + 4 * 10**14]


def _drop_first(header: Header, places: Header) -> None:
    """A piece that the file has is not listed."""
    del places[next(iter(places))]


def _rename(header: Header, places: Header) -> None:
    key = next(k for k in places if "/" not in k)
    header["another"], places["another"] = header.pop(key), places.pop(key)


def _state_of(text: str, header: Header, places: Header) -> str:
    return next(key for key in places if key.endswith(text))


def _without_states(header: Header, places: Header) -> None:
    key = next(k for k in places if "/" in k)
    header["other/state"], places["other/state"] = header.pop(key), places.pop(key)


LIES: dict[str, Callable[[Header, Header], object]] = {
    "a tensor of terabytes": _of_matrix(_huge),
    "a tensor of terabytes, also in the file's offsets": _of_matrix(_huge_offsets),
    "only the logical shape is of terabytes": _of_matrix(lambda _, place: place.update(shape=[10**7, 10**7])),
    "a rectangle outside of its tensor": _of_matrix(lambda _, p: p["rectangles"][-1].__setitem__(0, 10**6)),
    "a rectangle at a negative row": _of_matrix(lambda _, p: p["rectangles"][-1].__setitem__(0, -1)),
    "a rectangle that is too tall": _of_matrix(lambda _, p: p["rectangles"][-1].__setitem__(2, 10**6)),
    "a number of rows that is a text": _of_matrix(lambda _, p: p["rectangles"][-1].__setitem__(2, "7")),
    "rectangles that overlap and leave a hole": _of_matrix(_overlap),
    "no rectangles": _of_matrix(lambda _, p: p.update(rectangles=[])),
    "a million dimensions": _of_matrix(lambda _, p: p.update(shape=[1] * 10**6)),
    "an unknown dtype": _of_matrix(lambda entry, _: entry.update(dtype="F8_E5M2")),
    "a dtype that does not exist": _of_matrix(lambda entry, _: entry.update(dtype="F33")),
    "a dtype of half the size": _of_matrix(lambda entry, _: entry.update(dtype="BF16")),
    "data that overlaps": _of_matrix(
        lambda entry, _: entry.update(data_offsets=[n + 4 for n in entry["data_offsets"]])
    ),
    "a piece that is not listed": _drop_first,
    "no places": lambda header, _: header.pop("__metadata__"),
    "places that are no JSON": lambda header, _: header["__metadata__"].update(pieces="kept"),
    "a tensor under another name": _rename,
    "a state under another name": _without_states,
}
"""What the header of a file says, which the manifest confirms."""


def damages() -> list[Damage]:
    """All that is tried."""
    compact = {"cut in half", "a bit flipped near its start", "that of another step"}
    found = [
        Damage(f"{name}: {what}", name, act(name), what in compact and name == SECOND)
        for name in (SECOND, COMMON)
        for what, act in AS_SAVED.items()
    ]
    found += [
        Damage("the files of two ranks are swapped", "safetensors", _swap),
        Damage("a file too many", "extra.pt", lambda f: shutil.copy(f / COMMON, f / "extra.pt"), True),
        Damage("a rank too many", rank_file(2), lambda f: shutil.copy(f / FIRST, f / rank_file(2)), True),
        Damage(f"{MANIFEST}: a bit flipped", MANIFEST, partial(_flip, MANIFEST, 0.5), True),
        Damage(f"{MANIFEST}: that of another step", "as it was saved", partial(_copy, "global_step2", MANIFEST)),
        Damage(f"{MANIFEST}: missing", MANIFEST, lambda folder: (folder / MANIFEST).unlink()),
        Damage(f"{MANIFEST}: no JSON", MANIFEST, lambda f: (f / MANIFEST).write_bytes(b"[" * 10**5)),
    ]
    outside = {"../other/" + COMMON: {"bytes": 1, "sha256": "0" * 64}}
    far = {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}
    for what, files in (("a file outside", outside), ("an absolute path", far)):
        change = partial(_update_files, files)
        found.append(Damage(f"{MANIFEST}: {what}", MANIFEST, partial(_edit, change), what == "a file outside"))
    found += [
        Damage(f"{MANIFEST}: no files", "", partial(_edit, lambda content: content.update(files={}))),
        Damage(f"{COMMON}: code", COMMON, partial(_bomb, True), True),
        Damage(f"{COMMON}: code, in an older form", COMMON, partial(_bomb, False)),
        Damage(f"{COMMON}: noise", COMMON, partial(_bytes, COMMON, hashlib.sha512(b"noise").digest() * 9)),
        Damage(f"{COMMON}: a part is missing", COMMON, partial(_common, lambda content: content.pop("optimizer"))),
        Damage(f"{COMMON}: a list", COMMON, partial(_common, lambda content: content.clear())),
        Damage(
            f"{COMMON}: numbers where names are", COMMON, partial(_common, lambda c: c["optimizer"].update(values=7))
        ),
        Damage(f"{SECOND}: a header of exabytes", SECOND, partial(_header_length, 2**62), True),
        Damage(f"{SECOND}: a header of 90 MB", SECOND, partial(_header_length, 9 * 10**7)),
        Damage(f"{SECOND}: noise", SECOND, partial(_bytes, SECOND, hashlib.sha512(b"noise").digest() * 9)),
        Damage(f"{SECOND}: of another program", SECOND, _foreign, True),
        Damage(f"{SECOND}: the file of the other rank", SECOND, _twice),
    ]
    shown = {"a tensor of terabytes", "rectangles that overlap and leave a hole", "an unknown dtype"}
    for what, lie in LIES.items():
        named = "" if "another name" in what else SECOND  # what no file has, the line names itself
        found.append(Damage(f"{SECOND}: {what}", named, partial(_lie, lie), what in shown))
    return found


def _edit(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    edit_manifest(folder, change)


def _update_files(files: dict[str, Any], content: dict[str, Any]) -> None:
    content["files"].update(files)


def saved_runs(work: Path) -> None:
    """Make the checkpoints that are damaged: after one step and after two, and one of another run."""
    run_ranks(RANKS, _save, str(work))


def _settings() -> dict[str, Any]:
    return settings_of(2, RANKS, method="GaLore")


def _engine() -> Any:
    import ds_lowrank

    return ds_lowrank.initialize(model=dense_model(), config=_settings())[0]


def _save(work: str) -> None:
    engine = _engine()
    for step in range(2):
        train_step(engine, step)
        engine.save_checkpoint(work)
    engine = _engine()
    train_step(engine, 7)
    engine.save_checkpoint(work, tag="other", client_state={"run": "other"})


def _attempts(work: str, tags: list[str]) -> list[dict[str, Any]]:
    """On each rank: load every damaged checkpoint with one engine, then a whole one."""
    from ds_lowrank.errors import CheckpointError

    engine = _engine()
    found = []
    for tag in tags:
        before, ran = _fingerprint(engine), Path(work) / "ran"
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        start, verdict, message = _peak(), "refused", ""
        try:
            path, _ = engine.load_checkpoint(work, tag=tag)
            verdict = "accepted" if path else "not found"
        except CheckpointError as error:
            message = str(error)
        except Exception as error:
            message = str(error)
            remote = type(error).__name__ == "RemoteError"
            verdict = "refused" if remote else f"{type(error).__name__}"
        if ran.exists():
            verdict = "ran code"
        elif verdict != "accepted" and _fingerprint(engine) != before:
            verdict = "changed"
        found.append({"verdict": verdict, "message": message, "bytes": _peak() - start})
    engine.load_checkpoint(work, tag="global_step2")
    return found


def _fingerprint(engine: Any) -> str:
    """Of this rank's weights and states."""
    from ds_lowrank.integration.engine_weights import weight_pieces

    digest = hashlib.sha256()
    for piece in (*weight_pieces(engine), *engine.basic_optimizer.state_pieces()):
        digest.update(piece.data.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def tried(chosen: list[Damage], work: Path) -> list[dict[str, Any]]:
    """Try some damages; a record for each, with what is wrong with how it ended.

    Args:
        chosen: some of :func:`damages`.
        work: an empty folder.
    """
    saved_runs(work)
    tags = [f"damaged{number}" for number in range(len(chosen))]
    for tag, damage in zip(tags, chosen, strict=True):
        shutil.copytree(work / "global_step1", work / tag)
        damage.act(work / tag)
    by_rank = run_ranks(RANKS, _attempts, str(work), tags, timeout=600)
    records = []
    for damage, outcomes in zip(chosen, zip(*by_rank, strict=True), strict=True):
        problem = next((text for outcome in outcomes if (text := _problem(damage, outcome))), "")
        records.append(
            {
                "damage": damage.name,
                "verdict": outcomes[0]["verdict"],
                "MB": max(outcome["bytes"] for outcome in outcomes) / 2**20,
                "message": outcomes[0]["message"],
                "problem": problem,
            }
        )
    return records


def _problem(damage: Damage, outcome: dict[str, Any]) -> str:
    if outcome["verdict"] != "refused":
        return str(outcome["verdict"])
    message = outcome["message"]
    if "\n" in message.strip():
        return "more than one line"
    if damage.file not in message:
        return f"does not name {damage.file}"
    return "memory" if outcome["bytes"] > MOST_BYTES else ""


def main() -> int:
    """Try all and report."""
    arguments = options(__doc__).parse_args()
    chosen = [damage for damage in damages() if damage.compact or not arguments.quick]
    with tempfile.TemporaryDirectory(prefix="damaged") as work:
        records = tried(chosen, Path(work))
    wrong = [record for record in records if record["problem"]]
    for record in wrong:
        print(f"{record['damage']}: {record['problem']}: {record['message']}")
    summary = {
        "damaged": len(records),
        "refused": sum(record["verdict"] == "refused" for record in records),
        "wrong": len(wrong),
        "most MB": max(record["MB"] for record in records),
    }
    report([summary], arguments, trials=[{key: r[key] for key in ("damage", "verdict", "MB")} for r in records])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
