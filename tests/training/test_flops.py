"""The FLOPs of a model: counted on fake tensors, by the formula, and what a meter makes of them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from ds_lowrank.adapters.lora import add_lora
from ds_lowrank.adapters.model import add_adapters
from ds_lowrank.checkpoint.manifest import Progress
from ds_lowrank.environment.peaks import peak_of
from ds_lowrank.training import meter
from ds_lowrank.training.flops import CLOSED_FORM, COUNTED, closed_form, count, model_flops, on_meta
from ds_lowrank.training.meter import Meter
from tests.engines.pool import run_ranks

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(vocab_size=100, **SIZES)
# Of one layer: q, k, v and o, and the three of the MLP; then the head.
WEIGHTS = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 100 * 32


def of_sequence(flops, length, rows=1):
    return flops.of([{"input_ids": torch.zeros(rows, length, dtype=torch.long)}])


@pytest.mark.parametrize("length", [16, 40])
def test_a_llama_is_counted_exactly(length):
    """6 for each weight in a matrix and token, and 12 L d for each pair of tokens: 2 products, 2 FLOPs, 3 passes."""
    by_hand = 6 * WEIGHTS * length + 12 * 2 * 32 * length**2
    model = on_meta(LlamaForCausalLM, LLAMA)
    assert count(model, length) == by_hand
    assert of_sequence(model_flops(model, length), length, rows=3) == 3 * by_hand
    assert of_sequence(model_flops(model), length) == pytest.approx(by_hand, rel=1e-12)
    assert of_sequence(closed_form(model), length) == by_hand
    assert (model_flops(model, length).source, closed_form(model).source) == (COUNTED, CLOSED_FORM)


def test_fake_tensors_count_what_a_real_step_does():
    model = LlamaForCausalLM(LLAMA)
    model.set_attn_implementation("eager")  # whose products the counter sees on every device
    tokens = torch.arange(3 * 16).reshape(3, 16)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert of_sequence(model_flops(model, 16), 16, rows=3) == counter.get_total_flops()


def test_sequences_of_any_length_follow_a_parabola():
    """Exactly, as every product is of tokens and weights or of tokens and tokens; BERT's head is on one token."""
    model = BertForSequenceClassification(BertConfig(vocab_size=100, **SIZES))
    flops = model_flops(model)
    assert flops.source == COUNTED and flops.constant > 0
    for length in (4, 33, 100):
        assert of_sequence(flops, length) == pytest.approx(count(model, length), rel=1e-9)


def test_counting_changes_nothing():
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=100, pad_token_id=0, attention_dropout=0.1, **SIZES))
    model.train()
    model.gradient_checkpointing_enable()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    plain = on_meta(LlamaForSequenceClassification, model.config)
    assert model_flops(model) == model_flops(plain)  # what is recomputed counts once
    assert model.training and model.is_gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_weights_have_no_gradient_to_compute():
    model = on_meta(LlamaForCausalLM, LLAMA)
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    trained = 100 * 32  # the head
    expected = 4 * WEIGHTS * 16 + 2 * trained * 16 + 12 * 2 * 32 * 16**2
    assert count(model, 16) == expected == of_sequence(closed_form(model), 16)


def test_adapters_cost_less_than_their_model():
    whole = of_sequence(model_flops(on_meta(LlamaForCausalLM, LLAMA)), 16)
    model = LlamaForCausalLM(LLAMA)
    lora = add_lora(LlamaForCausalLM(LLAMA), "causal-lm", 4, 8.0, None)
    add_adapters(model, adapter_rank=4)
    counted, computed = model_flops(lora), closed_form(model)
    assert counted.source == COUNTED
    assert whole * 2 / 3 < of_sequence(counted, 16) < whole
    assert whole * 2 / 3 < of_sequence(computed, 16) < whole


def test_a_token_uses_some_of_the_experts():
    config = MixtralConfig(vocab_size=100, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, **SIZES)
    flops = model_flops(on_meta(MixtralForCausalLM, config), 16)
    per_layer = 4 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 64  # attention, the router, two of the four experts
    assert flops.source == CLOSED_FORM
    assert of_sequence(flops, 16) == 6 * (2 * per_layer + 100 * 32) * 16 + 12 * 2 * 32 * 16**2


def test_a_model_that_looks_at_values_is_not_counted():
    class Curious(LlamaForCausalLM):
        def forward(self, input_ids):
            assert int(input_ids.max()) < 100
            return super().forward(input_ids)

    assert model_flops(Curious(LLAMA), 16) == closed_form(on_meta(LlamaForCausalLM, LLAMA))


def test_the_7b_is_counted_without_its_weights():
    """6.6 billion weights without the embeddings, none of which is allocated."""
    from ds_lowrank.models.llama import load_config
    from tests.unit.pages import ROOT

    model = on_meta(LlamaForCausalLM, load_config(ROOT / "ds_configs/models/llama_7b.json"))
    flops = of_sequence(model_flops(model, 256), 256)
    assert flops == of_sequence(closed_form(model), 256)
    assert flops / 256 / 6 == pytest.approx(6.6e9, rel=0.03)


def speed_of(sharers, card):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meter, "_card", lambda: (card, peak_of(card)))
        flops = model_flops(on_meta(LlamaForCausalLM, LLAMA), 16)
        measured = Meter(100, flops, sharers, "bf16")
        line = measured.describe()
        batch = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
        speeds = []
        for step in (1, 3):
            for _ in range(step):
                measured.add([batch, batch])
            since = Progress(step - 1, 64 * (step - 1), 2.0 * (step - 1))
            speeds.append(measured.read(Progress(step, 64 * step, 2.0 * step), since))
        return line, of_sequence(flops, 16, rows=4), speeds


@pytest.mark.parametrize(("sharers", "card"), [(1, "NVIDIA H100 80GB HBM3"), (2, "NVIDIA H100 80GB HBM3"), (1, "X1")])
def test_a_meter_divides_what_was_done_by_the_time(sharers, card):
    (line, step, (first, later)) = run_ranks(1, speed_of, sharers, card)[0]
    assert first.tflops_per_gpu == pytest.approx(step / sharers / 2.0 / 1e12)
    assert later.tflops_per_gpu == pytest.approx(3 * step / sharers / 2.0 / 1e12)  # of three steps in two seconds
    assert first.tokens_per_second == first.tokens_per_second_per_gpu == 32
    assert first.remaining_seconds is None and first.projected_end is None
    assert 0 <= later.remaining_seconds < 60 and later.projected_end is not None
    if card == "X1":
        assert first.mfu is None and line == "model FLOPs by torch's counter; no MFU, as the peak of X1 is not known"
    else:
        assert first.mfu == pytest.approx(first.tflops_per_gpu / 989)
        assert line.endswith("MFU is of the 989 TFLOPS of NVIDIA H100 80GB HBM3 in bf16")
