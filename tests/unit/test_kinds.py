"""Embeddings and heads are known by type and by what a model says of itself, the same on every way in."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers
from torch import nn

import ds_lowrank
from benchmarks.roles import architectures
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters
from tests.engines.pool import run_ranks

HEADS_WITHOUT_BASE = ("classifier", "decoder.cls.predictions.transform.dense")
AT_LEAST = 300  # of about 380 classes; the others need packages or settings
ATTENTION = re.compile("attention|attn", re.I)


def kinds(model):
    tag_parameters(model)
    return {tag_of(p).name: tag_of(p).kind for _, p in model.named_parameters(remove_duplicate=False) if p.ndim == 2}


def linear_layers(model):
    """The names and modules whose weight is a matrix, and no table that is looked up."""
    tables = {id(getattr(m, "weight", None)) for m in model.modules() if "Embedding" in str(type(m).__mro__)}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "Linear" in type(module).__name__ and weight is not None and weight.ndim == 2 and id(weight) not in tables:
            yield name, module


def in_attention_layer(model, name):
    """Whether a linear layer is in an attention, or beside one in a numbered layer."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if any(ATTENTION.search(type(model.get_submodule(prefix)).__name__) for prefix in prefixes):
        return True
    numbered = [prefix for prefix in prefixes if prefix.rpartition(".")[2].isdecimal()]
    return any(ATTENTION.search(type(m).__name__) for p in numbered for m in model.get_submodule(p).modules())


def check_linear_layers(model):
    """By position: what is in the base is a weight, what comes after it a head."""
    said = [m for part in model.modules() if isinstance(part, transformers.PreTrainedModel)
            for m in [part.get_output_embeddings()] if m is not None]  # fmt: skip
    heads = {id(m) for head in said for m in head.modules()}
    base = model.base_model
    for name, module in linear_layers(model):
        kind = tag_of(module.weight).kind
        if id(module) in heads:
            assert kind == "head", name
        elif in_attention_layer(model, name):
            assert kind == "weight", name
        elif base is not model:
            assert kind == ("weight" if any(module is inner for inner in base.modules()) else "head"), name
        else:
            assert kind == ("head" if name in HEADS_WITHOUT_BASE else "weight"), name


@pytest.mark.slow
def test_every_architecture_of_transformers_has_the_roles_that_its_types_and_its_head_tell():
    warnings.filterwarnings("ignore")
    count = 0
    for name, model in architectures():
        found = kinds(model)
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                assert tag_of(module.weight).kind == "embedding", (name, path)
        try:
            check_linear_layers(model)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert kinds(torch.compile(model)) == found, name
        count += 1
    assert count >= AT_LEAST


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "output": nn.Linear(8, 8)})
        self.score = nn.Linear(8, 8)
        self.embed_proj = nn.Linear(8, 8)


class Minimal(nn.Module):
    """Names as in minGPT and Meta's LLaMA."""

    def __init__(self):
        super().__init__()
        self.tok_emb = nn.Embedding(9, 8)
        self.pos_emb = nn.Parameter(torch.zeros(5, 8))
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.output = nn.Linear(8, 9)


def test_names_decide_only_what_has_no_type_and_never_within_a_layer():
    found = kinds(Minimal())
    others = {name: kind for name, kind in found.items() if kind != "weight"}
    assert others == {"tok_emb.weight": "embedding", "pos_emb": "embedding", "output.weight": "head"}
    assert len(found) == 3 + 2 * 4


def test_names_of_ones_own_model_that_others_use_are_no_error():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.register_module("_orig_mod", None)

        def get_input_embeddings(self, ids):
            return self.embed(ids)

    assert kinds(Own()) == {"embed.weight": "embedding", "layer.weight": "weight"}


def test_the_rows_of_an_embedding_that_peft_trains_are_one():
    import peft

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    found = {name: kind for name, kind in kinds(model).items() if "token_adapter.train" in name or "lora" in name}
    assert found.pop("model.embed_tokens.token_adapter.trainable_tokens_delta.default") == "embedding"
    assert len(found) == 2 and set(found.values()) == {"weight"}


def small_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def small_bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "max_position_embeddings": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return transformers.BartForSequenceClassification(transformers.BartConfig(**sizes, **heads))


MODELS = {"T5": small_t5, "BART": small_bart, "minGPT": Minimal}
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "GaLore", "params": {"lr": 0.01, "rank": 2}},
    "zero_optimization": {"stage": 2},
}


def roles(optimizer):
    return {slot.tag.name: (slot.role.projected, slot.role.reason) for slot in optimizer.slots}


def roles_through_deepspeed(which):
    from deepspeed import initialize

    engine, *_ = ds_lowrank.initialize(model=MODELS[which](), config=CONFIG)
    ds_lowrank.register()
    model = MODELS[which]()
    tag_parameters(model)
    stock, *_ = initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    return roles(engine.basic_optimizer), roles(stock.basic_optimizer)


@pytest.mark.parametrize("which", MODELS)
def test_every_way_in_gives_the_same_roles(which):
    alone = roles(ds_lowrank.GaLore(MODELS[which](), rank=2))
    model = MODELS[which]()
    tag_parameters(model)
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == is_2d] for is_2d in (True, False))
    assert roles(ds_lowrank.GaLore(model.named_parameters(), rank=2)) == alone
    assert dict(sorted(roles(ds_lowrank.GaLore([{"params": matrices}, {"params": rest}], rank=2)).items())) == dict(
        sorted(alone.items())
    )
    ((by_initialize, by_stock),) = run_ranks(1, roles_through_deepspeed, which)
    assert by_initialize == by_stock == alone
    tables = {name for name, (_, reason) in alone.items() if reason in ("embedding", "head")}
    biases = {f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")}
    assert (
        tables
        == {
            "T5": {"shared.weight", *biases},  # its head is tied
            "BART": {"model.shared.weight", "classification_head.dense.weight", "classification_head.out_proj.weight"}
            | {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")},
            "minGPT": {"tok_emb.weight", "pos_emb", "output.weight"},
        }[which]
    )


def test_a_model_of_ones_own_with_a_hugging_face_model_in_it_has_the_same_kinds():
    model = small_bart()
    alone = kinds(model)
    assert kinds(nn.ModuleDict({"net": model})) == {f"net.{name}": kind for name, kind in alone.items()}
