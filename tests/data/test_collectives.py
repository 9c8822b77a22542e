"""Collectives on real gloo ranks, which are forked from the test process so that nothing is imported twice."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from ds_lowrank.collectives import (
    RemoteError,
    broadcast_from_rank0,
    first_on_node,
    once_per_node,
    raise_if_any_failed,
    raise_on_all_ranks,
)
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.packing import pack
from ds_lowrank.data.sources import open_source
from ds_lowrank.data.tokenizer import load_tokenizer

WORLD = 3
TIMEOUT = 120


def on_ranks(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(rank)`` on three ranks; return its results, or the type's name and the message of an error."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(rank: int) -> None:
        os.environ.pop("LOCAL_RANK", None)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
        try:
            outcome = work(rank)
        except Exception as error:
            outcome = (type(error).__name__, str(error))
        results.put((rank, outcome))
        dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        outcomes = dict(results.get(timeout=TIMEOUT) for _ in processes)
    finally:
        for process in processes:
            process.join(TIMEOUT)
            process.kill()
    return [outcomes[rank] for rank in range(WORLD)]


def test_one_ranks_error_is_raised_on_every_rank(tmp_path):
    def work(rank: int) -> None:
        with raise_on_all_ranks():
            if rank == 1:
                raise DataError("no such file")

    remote = ("RemoteError", "another rank failed; rank 1: DataError: no such file")
    assert on_ranks(tmp_path, work) == [remote, ("DataError", "no such file"), remote]


def test_ranks_that_all_succeed_share_the_first_ranks_value(tmp_path):
    def work(rank: int) -> tuple[int, str]:
        with raise_on_all_ranks():
            pass
        raise_if_any_failed(None)
        return broadcast_from_rank0(lambda: 10 + rank), once_per_node(lambda: f"of rank {rank}", "the value")

    assert on_ranks(tmp_path, work) == [(10, "of rank 0")] * WORLD


def test_failure_of_the_first_rank_is_raised_on_every_rank(tmp_path):
    def work(rank: int) -> int:
        return broadcast_from_rank0(lambda: 1 // rank)

    remote = ("RemoteError", "another rank failed; rank 0: ZeroDivisionError: integer division or modulo by zero")
    assert on_ranks(tmp_path, work) == [("ZeroDivisionError", remote[1].rpartition(": ")[2]), remote, remote]


def test_nodes_with_different_data_are_refused_on_every_rank(tmp_path):
    def work(rank: int) -> str:
        os.environ["LOCAL_RANK"] = "0" if rank != 1 else "1"  # ranks 0 and 1 on one node, rank 2 on another
        return once_per_node(lambda: "same" if rank != 2 else "other", "the data")

    (first, *others) = on_ranks(tmp_path, work)
    message = "the data differs between the nodes of this job; give every node the same files and packages"
    assert first == ("ValueError", message)
    assert others == [first, first]


def test_local_rank_0_builds_the_cache_and_all_ranks_read_it(tmp_path, jsonl, cache_dir):
    def work(rank: int) -> tuple[list[int], str, bool]:
        encoded = []
        source = open_source(str(jsonl), "train")
        tokenizer = load_tokenizer("bpe", source.documents, vocab_size=270, cache_dir=cache_dir)
        encode = tokenizer.encode_documents
        tokenizer.encode_documents = lambda documents: encoded.append(1) or encode(documents)
        data = pack(source, tokenizer, sequence_length=16, cache_dir=cache_dir)
        return np.asarray(data.tokens).tolist(), data.fingerprint, bool(encoded)

    outcomes = on_ranks(tmp_path, work)
    assert [built for *_, built in outcomes] == [True, False, False]
    assert len({(tuple(tokens), fingerprint) for tokens, fingerprint, _ in outcomes}) == 1
    source = open_source(str(jsonl), "train")
    tokenizer = load_tokenizer("bpe", source.documents, vocab_size=270, cache_dir=cache_dir)
    (ids,) = tokenizer.encode_documents([next(source.documents())])
    assert outcomes[0][0][: len(ids) + 1] == [*ids, tokenizer.eos_id]


def test_one_process_builds_for_all_nodes_that_share_a_cache_and_one_of_each_that_has_its_own(tmp_path, jsonl):
    def work(rank: int) -> tuple[str, list[int], int]:
        os.environ["LOCAL_RANK"] = "0"  # as on three nodes
        cache = tmp_path / ("shared" if rank != 1 else "own")
        built = []
        source = open_source(str(jsonl), "train")
        tokenizer = load_tokenizer("bytes", source.documents, cache_dir=cache)
        encode = tokenizer.encode_documents
        tokenizer.encode_documents = lambda documents: built.append(1) or encode(documents)
        data = pack(source, tokenizer, sequence_length=16, cache_dir=cache)
        return data.fingerprint, data.tokens.tolist(), len(built)

    outcomes = on_ranks(tmp_path, work)
    assert [built for *_, built in outcomes] == [1, 1, 0]
    assert len({(fingerprint, tuple(tokens)) for fingerprint, tokens, _ in outcomes}) == 1
    for name in ("shared", "own"):
        assert sorted(path.name.partition("-")[0] for path in (tmp_path / name).iterdir()) == ["tokens"] * 2


def test_a_cache_that_was_built_elsewhere_and_cannot_be_written_is_read(tmp_path, jsonl, cache_dir):
    def work(rank: int) -> list[int]:
        os.environ["LOCAL_RANK"] = "0"
        source = open_source(str(jsonl), "train")
        tokenizer = load_tokenizer("bytes", source.documents, cache_dir=cache_dir)
        if rank:
            Path.touch = refused  # in this process only
        return pack(source, tokenizer, sequence_length=16, cache_dir=cache_dir).tokens.tolist()

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    source = open_source(str(jsonl), "train")
    pack(
        source, load_tokenizer("bytes", source.documents, cache_dir=cache_dir), sequence_length=16, cache_dir=cache_dir
    )
    first, *others = on_ranks(tmp_path, work)
    assert first and others == [first, first]


def test_one_process_of_a_node_downloads_before_the_others(tmp_path):
    def work(rank: int) -> tuple[int, bool]:
        os.environ["LOCAL_RANK"] = "1" if rank == 1 else "0"  # ranks 0 and 1 on one node, rank 2 on another
        downloaded = tmp_path / ("node1" if rank < 2 else "node2")

        def load() -> tuple[int, bool]:
            found = downloaded.exists()
            downloaded.touch()
            return rank, found

        return first_on_node(load)

    assert on_ranks(tmp_path, work) == [(0, False), (1, True), (2, False)]


def test_errors_and_differences_name_the_nodes(tmp_path, monkeypatch):
    def differs(rank: int) -> str:
        socket.gethostname = lambda: f"node{rank}"  # in this process only
        os.environ["LOCAL_RANK"] = "0"
        return once_per_node(lambda: "other" if rank == 2 else "same", "the data")

    def fails(rank: int) -> None:
        socket.gethostname = lambda: f"node{rank}"
        with raise_on_all_ranks():
            if rank == 1:
                raise DataError("no such file")

    (tmp_path / "fails").mkdir()
    message = "the data differs between the nodes of this job (node2 from node0); give every node the same files and "
    assert on_ranks(tmp_path, differs) == [("ValueError", f"{message}packages")] * 3
    remote = ("RemoteError", "another rank failed; rank 1 on node1: DataError: no such file")
    assert on_ranks(tmp_path / "fails", fails) == [remote, ("DataError", "no such file"), remote]


def test_unusable_data_stops_every_rank(tmp_path, cache_dir):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"txt": "b"}\n')

    def train(rank: int) -> None:
        load_tokenizer("bpe", open_source(str(bad), "train").documents, cache_dir=cache_dir)

    def packed(rank: int) -> None:
        source = open_source(str(bad), "train")
        tokenizer = load_tokenizer("bytes", source.documents, cache_dir=cache_dir)
        pack(source, tokenizer, sequence_length=4, cache_dir=cache_dir)

    for number, work in enumerate((train, packed)):
        (tmp_path / str(number)).mkdir()
        own, *others = on_ranks(tmp_path / str(number), work)
        assert own[0] == "DataError" and "bad.jsonl, line 2: no text in the field 'text'" in own[1]
        assert others == [("RemoteError", f"another rank failed; rank 0: DataError: {own[1]}")] * 2


def test_collectives_are_local_without_a_process_group():
    with pytest.raises(ZeroDivisionError), raise_on_all_ranks():
        raise ZeroDivisionError
    assert broadcast_from_rank0(lambda: 3) == 3 and once_per_node(lambda: 4, "the value") == 4
    assert issubclass(RemoteError, RuntimeError)
