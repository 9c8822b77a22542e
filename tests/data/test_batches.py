"""The promise of `batches`, on every kind of source: the same global batches for any number of ranks, exact resume."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch

from ds_lowrank.data.batches import BatchStream, validation_batches
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.global_batch import check_batch_sizes
from ds_lowrank.data.packing import PackedBlocks, pack
from ds_lowrank.data.sources import open_source
from tests.data.conftest import byte_ids

GLOBAL, LENGTH = 12, 16


def blocks(count: int, *, fingerprint: str = "data", sequence_length: int = LENGTH) -> PackedBlocks:
    """`count` sequences, number `n` holding `n * LENGTH` and on, and a few tokens more."""
    tokens = np.arange(count * sequence_length + 5, dtype=np.uint32)
    return PackedBlocks("made", tokens, sequence_length, len(tokens) - 1, fingerprint)


def numbers(rows: torch.Tensor) -> list[int]:
    """Which sequences of `blocks` these are; each must be whole."""
    assert torch.equal(rows, rows[:, :1] + torch.arange(LENGTH))
    return (rows[:, 0] // LENGTH).tolist()


def open_stream(data, *, micro: int = 1, rank: int = 0, world: int = 1, seed: int = 7, size: int = GLOBAL):
    return BatchStream(data, global_batch_size=size, micro_batch_size=micro, rank=rank, world_size=world, seed=seed)


@pytest.fixture(params=["jsonl", "folder", "megatron", "hf"])
def data(request, byte_tokenizer, cache_dir, tmp_path):
    """Each kind of source, a few steps an epoch."""
    if request.param == "jsonl":
        spec = str(request.getfixturevalue("jsonl"))
    elif request.param == "folder":
        folder = tmp_path / "texts"
        folder.mkdir()
        for number in range(60):
            (folder / f"{number}.txt").write_text(f"text number {number} " * 4)
        spec = str(folder)
    elif request.param == "megatron":
        documents = [[number, *range(20)] for number in range(150)]
        spec = "megatron:" + request.getfixturevalue("megatron_prefix")(documents)
    else:
        spec = f"hf:{request.getfixturevalue('hf_folder')}"
    return pack(open_source(spec, "train"), byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir)


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (4, 3)])
def test_global_batch_is_the_same_for_every_number_of_ranks_and_micro_batch(data, world, micro):
    whole = open_stream(data, micro=GLOBAL)
    ranks = [open_stream(data, micro=micro, rank=rank, world=world) for rank in range(world)]
    for _ in range(60):
        (expected,) = whole.next_step()
        shares = [rank.next_step() for rank in ranks]
        assert all(batch.shape == (micro, LENGTH) and batch.dtype == torch.int64 for s in shares for batch in s)
        assert all(len(share) == GLOBAL // world // micro for share in shares)
        assert torch.equal(torch.cat([batch for share in shares for batch in share]), expected)
    assert whole.epoch >= 1


@pytest.mark.parametrize("saved_after", [0, 1, 7, 40])
def test_resume_is_exact_in_and_across_epochs_and_on_another_number_of_ranks(data, saved_after):
    running = open_stream(data, micro=GLOBAL)
    for _ in range(saved_after):
        running.next_step()
    file = io.BytesIO()
    torch.save(running.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = [open_stream(data, micro=2, rank=rank, world=3) for rank in range(3)]
    for stream in resumed:
        stream.next_step()  # a position to be forgotten
        stream.load_state_dict(state)
        # Saved again before any step, the position is still the same.
        again = stream.state_dict()
        assert again["step"] == saved_after and str(again) == str(state)
    for _ in range(40):
        (expected,) = running.next_step()
        assert torch.equal(torch.cat([batch for stream in resumed for batch in stream.next_step()]), expected)
    assert resumed[0].step == saved_after + 40 and resumed[0].epoch == running.epoch


def test_epoch_visits_no_sequence_twice_and_each_has_its_own_order():
    stream = open_stream(blocks(40), micro=GLOBAL)  # three steps of 12 an epoch, 4 left out
    epochs = []
    for epoch in range(30):
        visited = []
        for _ in range(3):
            assert stream.epoch == epoch
            visited += numbers(stream.next_step()[0])
        assert len(set(visited)) == 36
        epochs.append(visited)
    assert len({tuple(visited) for visited in epochs}) == 30
    times = Counter(number for visited in epochs for number in visited)
    assert set(times) == set(range(40))  # (4/40)^30: what one epoch leaves out others visit


def test_order_is_the_documented_permutation():
    (rows,) = open_stream(blocks(40), micro=GLOBAL, seed=3).next_step()
    assert numbers(rows) == np.random.default_rng([3, 0]).permutation(40)[:GLOBAL].tolist()


def test_stream_goes_through_the_data_in_order_and_starts_again(hf_folder, byte_tokenizer, cache_dir):
    packed = pack(open_source(f"hf:{hf_folder}", "train"), byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir)
    texts = [f"shard {shard} document {number}" for shard in range(3) for number in range(100)]
    epoch = byte_ids(texts)
    stream = open_stream(packed, micro=GLOBAL)
    steps = len(epoch) // (GLOBAL * LENGTH) + 5
    read = torch.cat([stream.next_step()[0] for _ in range(steps)]).flatten().tolist()
    assert read == (epoch * 2)[: len(read)] and stream.epoch == 1


def test_resumed_stream_does_not_read_the_shards_before_its_position(hf_folder, byte_tokenizer, cache_dir):
    packed = pack(open_source(f"hf:{hf_folder}", "train"), byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir)
    running = open_stream(packed, micro=GLOBAL)
    for _ in range(24):  # 4608 tokens of 5970, 1990 a shard: the reader stands in the last one
        running.next_step()
    state = running.state_dict()
    (expected,) = running.next_step()
    (hf_folder / "train-0.jsonl").write_text("not read")
    resumed = open_stream(packed, micro=GLOBAL)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next_step()[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"size": 24}, "global_batch_size was 12 and is 24"),
        ({"fingerprint": "other"}, "fingerprint was 'data' and is 'other'"),
        ({"sequence_length": 8}, "sequence_length was 16 and is 8"),
    ],
)
def test_position_of_another_run_is_refused(change, message):
    state = open_stream(blocks(40)).state_dict()
    made = {name: change.pop(name) for name in ("fingerprint", "sequence_length") if name in change}
    other = open_stream(blocks(40, **made), **change)
    with pytest.raises(DataError, match=message):
        other.load_state_dict(state)
    assert other.step == 0


def test_data_smaller_than_one_global_batch_are_refused(hf_folder, byte_tokenizer, cache_dir):
    with pytest.raises(DataError, match="'made' holds 11 sequences; one batch needs 12 sequences of 16 tokens"):
        open_stream(blocks(11))
    packed = pack(open_source(f"hf:{hf_folder}", "train"), byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir)
    # 3 x (10 x 18 + 90 x 19) characters and 300 ends of text: 5970 tokens, 373 sequences.
    with pytest.raises(DataError, match="holds 5970 tokens; one batch needs 400 sequences"):
        open_stream(packed, size=400).next_step()


def test_stream_that_runs_dry_later_is_an_error_and_no_endless_search(hf_folder, byte_tokenizer, cache_dir):
    packed = pack(open_source(f"hf:{hf_folder}", "train"), byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir)
    stream = open_stream(packed, micro=GLOBAL)
    for _ in range(31):  # 5952 of the 5970 tokens
        stream.next_step()
    for shard in range(3):
        (hf_folder / f"train-{shard}.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds 0 tokens"):
        stream.next_step()


def test_batch_sizes_must_fit_together():
    check_batch_sizes(12, 2, 3)
    with pytest.raises(DataError, match="must be a multiple of 2 x 3 = 6; use 6 or 12"):
        check_batch_sizes(10, 2, 3)
    with pytest.raises(DataError, match=r"must be a multiple of 4 x 2 = 8; use 8$"):
        open_stream(blocks(40), size=6, micro=4, world=2)
    with pytest.raises(DataError, match="must be 1 or more"):
        check_batch_sizes(0, 1, 1)
    with pytest.raises(DataError, match="rank 2 is not one of the 2"):
        open_stream(blocks(40), rank=2, world=2)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 25])
@pytest.mark.parametrize(("micro", "most"), [(1, 20), (4, 20), (4, 23), (3, 1000)])
def test_validation_deals_the_same_sequences_once_in_equally_many_batches(world, micro, most):
    held_out = blocks(60)
    ranks = [
        validation_batches(held_out, max_sequences=most, micro_batch_size=micro, rank=rank, world_size=world)
        for rank in range(world)
    ]
    counted = [number for batches in ranks for batch in batches if batch.sequences for number in numbers(batch.tokens)]
    count = min(most, 60)
    assert sorted(counted) == [number * 60 // count for number in range(count)]
    assert len({len(batches) for batches in ranks}) == 1
    for batch in (batch for batches in ranks for batch in batches):
        assert 1 <= len(batch.tokens) <= micro and batch.sequences in (0, len(batch.tokens))


def test_validation_of_a_stream_is_its_first_sequences(hf_folder, byte_tokenizer, cache_dir):
    source = open_source(f"hf:{hf_folder}", "validation")
    packed = pack(source, byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir)
    tokens = byte_ids(f"held out {number}" for number in range(20))
    for most, count in ((5, 5), (1000, len(tokens) // LENGTH)):
        batches = validation_batches(packed, max_sequences=most, micro_batch_size=2, rank=0, world_size=1)
        assert torch.cat([batch.tokens for batch in batches]).flatten().tolist() == tokens[: count * LENGTH]


def test_validation_split_shorter_than_a_sequence_is_refused():
    with pytest.raises(DataError, match="less than one sequence of validation text"):
        validation_batches(blocks(0), max_sequences=4, micro_batch_size=1, rank=0, world_size=1)
    with pytest.raises(DataError, match="max_sequences and micro_batch_size must be 1 or more"):
        validation_batches(blocks(9), max_sequences=0, micro_batch_size=1, rank=0, world_size=1)


def test_a_stream_is_compared_with_the_model_while_it_is_read(hf_folder, byte_tokenizer, cache_dir):
    """The third document contains the only byte above 200."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a" * 300, "b" * 300, "ü", "c" * 300)]
    for shard in range(3):
        (hf_folder / f"train-{shard}.jsonl").write_text("\n".join(lines if shard == 0 else lines[:1]), encoding="utf-8")
    source = open_source(f"hf:{hf_folder}", "train")
    byte_tokenizer.eos_id = 10  # below 200, as all but one
    packed = pack(source, byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir, model_vocab=190)
    with pytest.raises(DataError, match=r"hf' uses token id 195 .* vocab_size is 190"):
        open_stream(packed).next_step()
    packed = pack(source, byte_tokenizer, sequence_length=LENGTH, cache_dir=cache_dir, model_vocab=196)
    assert open_stream(packed, micro=GLOBAL).next_step()[0].shape == (GLOBAL, LENGTH)
