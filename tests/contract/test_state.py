"""The state of every optimizer: complete from the start, counted, quantized as asked, resumed bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import ds_lowrank
from ds_lowrank.linalg.quantization import FP32
from ds_lowrank.methods.blocks.state_spec import TensorSpec
from ds_lowrank.optimizer.report import gathered_bytes, role_table, state_bytes, take_inventory
from tests.contract.cases import EVERY, assert_equal, build, copy_of, run, small_model
from tests.methods import of

STATE_DTYPES = pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])


def tensors_of(state):
    return {key: value for key, value in state.items() if torch.is_tensor(value)}


@EVERY
def test_state_is_complete_at_start_and_keeps_its_shapes(name):
    """Of a matrix whose rank changes (``rank`` is in its state), the keys only."""
    model = small_model()
    optimizer = build(name, model)

    def shapes():
        return {
            parameter: {key: "rank" in state or value.shape for key, value in tensors_of(state).items()}
            for parameter, state in optimizer.state_dict()["state"].items()
        }

    before, keys = shapes(), {n: set(state) for n, state in optimizer.state_dict()["state"].items()}
    run(optimizer, model, range(5))
    assert before.keys() == {n for n, _ in model.named_parameters()}
    assert {n: set(state) for n, state in optimizer.state_dict()["state"].items()} == keys
    assert shapes() == before


@EVERY
@STATE_DTYPES
def test_state_bytes_equal_stored_bytes(name, state_dtype):
    """``metrics`` and ``matrices`` compute them; here the tensors are counted."""
    model = small_model()
    optimizer = build(name, model, state_dtype=state_dtype)
    for _ in range(3):
        stored = [v for slot in optimizer.slots if slot.is_projected for v in tensors_of(slot.state).values()]
        assert optimizer.metrics()["lowrank/state_bytes"] == sum(v.numel() * v.element_size() for v in stored)
        run(optimizer, model, range(2))


@EVERY
@STATE_DTYPES
def test_saved_state_resumes_bit_for_bit_and_loads_weights_only(name, state_dtype):
    model = small_model()
    optimizer = build(name, model, state_dtype=state_dtype)
    run(optimizer, model, range(4))
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    twin = copy.deepcopy(model)
    resumed = build(name, twin, state_dtype=state_dtype)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    run(optimizer, model, range(4, 9))
    run(resumed, twin, range(4, 9))
    assert_equal(model.parameters(), twin.parameters())


def quantized(slot):
    """The keys of the state that is stored in ``state_dtype``: moments, under whatever names a method gives them."""
    spec = slot.state_store.spec(slot.rank)
    return [key for key, rows in spec.items() if isinstance(rows, TensorSpec) and rows.quantizer is not FP32]


@EVERY
@pytest.mark.parametrize(
    ("state_dtype", "stored", "bound"), [("bf16", torch.bfloat16, 0.02), ("int8", torch.uint8, 0.1)]
)
def test_quantized_moments_are_stored_as_such_and_follow_fp32(name, state_dtype, stored, bound):
    """A first moment in bf16 is off by up to 2^-8, in int8 by up to 9 %, either way, and so is a step."""
    plain, rounded = small_model(), small_model()
    start = copy_of(plain)
    exact, coarse = build(name, plain), build(name, rounded, state_dtype=state_dtype)
    run(exact, plain, range(3))
    run(coarse, rounded, range(3))
    for slot, twin in zip(coarse.slots, exact.slots, strict=True):
        if slot.is_projected and not of(name).keeps_moments:
            assert not quantized(slot) and slot.state_bytes == twin.state_bytes
            continue
        assert {slot.state[key].dtype for key in quantized(slot)} == {stored}
        assert all((f"{key}_scale" in slot.state) == (state_dtype == "int8") for key in quantized(slot))
        assert {v.dtype for v in tensors_of(twin.state).values()} == {torch.float32}
        assert slot.state_bytes < twin.state_bytes
    for a, b, s in zip(plain.parameters(), rounded.parameters(), start, strict=True):
        assert (a - b).norm() < bound * (a - s).norm()


@STATE_DTYPES
def test_role_table_names_state_dtype_and_counts_bytes(state_dtype):
    slots = build("GaLore", small_model(), state_dtype=state_dtype).slots
    text = role_table([take_inventory(slots, [])], state_bytes(slots), 1)
    assert text.endswith("." if state_dtype == "fp32" else f"Moments are stored in {state_dtype}.")
    stored = [v for slot in slots for v in tensors_of(slot.state).values()]
    assert sum(state_bytes(slots)) == sum(v.numel() * v.element_size() for v in stored)


def test_role_table_says_what_gathered_bases_take(caplog):
    """On one rank they are the bases themselves, but not of a group that gathers them in every step."""
    weights = {name: torch.nn.Parameter(torch.randn(12, 8, dtype=torch.float32, device="cpu")) for name in "ab"}
    groups = [
        {"params": [(name, weight)], "basis_placement": placement}
        for (name, weight), placement in zip(weights.items(), ("replicated", "partitioned"), strict=True)
    ]
    with caplog.at_level("INFO", "ds_lowrank"):
        slots = ds_lowrank.GaLore(groups, rank=2).slots
    assert gathered_bytes(slots) == slots[0].state["basis"].nbytes == 4 * 8 * 2
    assert "Gathered bases take another 0.00 MiB on this rank." in caplog.text


@pytest.mark.parametrize(
    "options", [{"basis_placement": "partitioned"}, {"rank": None, "basis_placement": "replicated"}]
)
def test_what_gathers_no_bases_says_nothing_of_them(options):
    slots = build("Lorenza", small_model(), **options).slots
    assert gathered_bytes(slots) == 0
    assert "athered" not in role_table([take_inventory(slots, [])], state_bytes(slots), 1, gathered_bytes(slots))
