"""Batches of examples, and the rows that they are made of."""

import json

import numpy as np
import pytest
import torch

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.examples import UNLABELLED, Example, ExampleStream, collate, fingerprint, held_out_batches


def example(number, length=None):
    return Example(np.full(length or number % 5 + 1, number, dtype=np.int32), number)


def tokens(number, length, labelled):
    labels = np.full(length, UNLABELLED, dtype=np.int32)
    labels[length - labelled :] = number
    return Example(np.full(length, number, dtype=np.int32), labels)


EXAMPLES = [example(number) for number in range(30)]


def streams(world, micro, seed=0, examples=EXAMPLES):
    sizes = {"global_batch_size": 12, "micro_batch_size": micro, "world_size": world, "seed": seed}
    return [ExampleStream(examples, 99, rank=rank, **sizes) for rank in range(world)]


def seen(world, micro, steps, **more):
    """The examples of each step, over the ranks in order."""
    ranks = streams(world, micro, **more)
    found = []
    for _ in range(steps):
        parts = [stream.next_step() for stream in ranks]
        assert len({part.tokens for part in parts}) == 1
        found.append([label for part in parts for batch in part.batches for label in batch["labels"].tolist()])
    return found


def test_a_step_is_the_same_on_any_number_of_ranks_and_in_any_micro_batches():
    alone = seen(1, 12, 6)
    assert seen(1, 3, 6) == seen(2, 6, 6) == seen(3, 2, 6) == seen(4, 1, 6) == alone
    assert seen(1, 12, 6, seed=1) != alone


def test_an_epoch_visits_nothing_twice_and_leaves_out_less_than_a_batch():
    first, second = np.split(np.array(seen(1, 12, 4)), 2)
    assert len(set(first.ravel())) == len(set(second.ravel())) == 24
    assert set(first.ravel()) != set(second.ravel())
    assert streams(1, 12)[0].steps_per_epoch == 2


def test_a_position_is_resumed_and_another_run_s_is_refused():
    (stream,) = streams(1, 4)
    stream.next_step()
    state = json.loads(json.dumps(stream.state_dict()))
    expected = stream.next_step()
    resumed = streams(2, 2)
    for rank in resumed:
        rank.load_state_dict(state)
    found = torch.cat([b["labels"] for rank in resumed for b in rank.next_step().batches])
    assert torch.equal(found, torch.cat([batch["labels"] for batch in expected.batches]))
    with pytest.raises(DataError, match=r"fingerprint was .* Restore these settings"):
        streams(1, 4, examples=EXAMPLES[:-1])[0].load_state_dict(state)
    with pytest.raises(DataError, match="seed was 0 and is 1"):
        streams(1, 4, seed=1)[0].load_state_dict(state)


def test_the_fingerprint_sees_every_token_and_label():
    changed = [EXAMPLES[0]._replace(labels=1), example(0, 2), *EXAMPLES[1:]]
    assert len({fingerprint(EXAMPLES), fingerprint(changed[:1] + changed[2:]), fingerprint(changed[1:])}) == 3


def test_a_batch_is_padded_to_its_longest_example():
    batch = collate([example(3, 2), example(4, 3)], pad_id=9)
    assert batch["input_ids"].tolist() == [[3, 3, 9], [4, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [3, 4] and batch["labels"].dtype == torch.int64
    segments = [e._replace(token_types=np.arange(len(e.input_ids))) for e in (example(3, 2), example(4, 3))]
    assert collate(segments, 9)["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert collate([tokens(3, 3, 1), tokens(4, 2, 2)], 9)["labels"].tolist() == [[-100, -100, 3], [4, 4, -100]]


def test_every_target_of_a_step_weighs_the_same():
    """The first token of a text is predicted by none, so of two labelled tokens of two one counts."""
    examples = [tokens(number, 4, 3 if number % 2 else 1) for number in range(11)] + [tokens(11, 2, 2)]
    for stream in streams(2, 3, examples=examples):
        batches = stream.next_step().batches
        assert [batch["num_items_in_batch"].item() for batch in batches] == [(5 * 3 + 6 * 1 + 1) / 4] * 2


def test_too_few_examples_are_refused():
    with pytest.raises(DataError, match="11 training examples are fewer than one batch of 12"):
        streams(1, 4, examples=EXAMPLES[:11])


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_examples_count_once_and_all_ranks_run_as_many_forwards(count, world):
    shares = [
        held_out_batches(EXAMPLES[:count], 99, micro_batch_size=2, rank=rank, world_size=world) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [e.labels for share in shares for batch in share for e in batch.examples]
    assert sorted(counted) == list(range(count))
    for share in shares:
        for batch, examples in share:
            assert not examples or batch["labels"].tolist() == [e.labels for e in examples]
