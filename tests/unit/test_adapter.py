"""Adapters: the formula and its exact gradients, what is converted, merging, and every refusal."""

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ds_lowrank.adapters.model import AdapterLinear, add_adapters, has_adapters, merge_adapters, merged_weights
from ds_lowrank.errors import ConfigError
from tests.engines.scenario import make_model, tokens

AXES = ["output", "input"]
M, N, RANK = 7, 5, 3


def layer(norm_axis="output", dtype=torch.float64, m=M, n=N, alpha=6.0, bias=True, dropout=0.0, detach_norm=False):
    """A layer in the middle of training: B is not zero, and g is not the norm of anything."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(n, m, bias=bias)
    made = AdapterLinear(linear, "layer", RANK, alpha, dropout, norm_axis, detach_norm=detach_norm).double()
    with torch.no_grad():
        made.lora_B.normal_()
        made.magnitude.uniform_(0.5, 2)
    return made.to(dtype)


def dense(made, weight=None):
    """g V / |V| as written, for autograd."""
    dim = 1 if made.norm_axis == "output" else 0
    direction = (made.weight if weight is None else weight) + made.scaling * made.lora_B @ made.lora_A
    norms = direction.norm(dim=dim, keepdim=True)
    return torch.where(norms > 0, made.magnitude.unsqueeze(dim) * direction / norms, direction)


def gradients(made, outputs):
    probe = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made.zero_grad()
    (outputs * probe.to(outputs.dtype)).sum().backward()
    return [p.grad.clone() for p in (made.lora_A, made.lora_B, made.magnitude)]


def inputs_of(made, rows=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, rows, made.in_features, generator=generator, dtype=torch.float64).to(made.weight.dtype)


def as_function(made):
    def function(inputs, lora_a, lora_b, magnitude):
        parameters = {"lora_A": lora_a, "lora_B": lora_b, "magnitude": magnitude}
        return torch.func.functional_call(made, parameters, (inputs,))

    return function


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_formula(norm_axis, bias):
    made = layer(norm_axis, bias=bias)
    inputs = inputs_of(made).requires_grad_()
    outputs = made(inputs)
    expected = torch.nn.functional.linear(inputs, dense(made), made.bias)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(made, outputs), gradients(made, expected))
    trained = [p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B, made.magnitude)]
    assert torch.autograd.gradcheck(as_function(made), (inputs, *trained))


@pytest.mark.parametrize("norm_axis", AXES)
def test_a_detached_norm_is_a_constant_in_the_backward_pass_only(norm_axis):
    made, exact = layer(norm_axis, detach_norm=True), layer(norm_axis)
    inputs = inputs_of(made).requires_grad_()
    outputs = made(inputs)
    assert torch.equal(outputs, exact(inputs))
    dim = 1 if norm_axis == "output" else 0
    direction = made.weight + made.scaling * made.lora_B @ made.lora_A
    weight = made.magnitude.unsqueeze(dim) * direction / direction.norm(dim=dim, keepdim=True).detach()
    expected = gradients(made, torch.nn.functional.linear(inputs, weight, made.bias))
    found, full = gradients(made, outputs), gradients(exact, exact(inputs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[2], full[2])
    assert all((a - b).norm() > 0.1 * b.norm() for a, b in zip(found[:2], full[:2], strict=True))


def test_gradients_with_a_detached_norm_are_those_of_dora_in_peft():
    peft = pytest.importorskip("peft")
    made = layer(dtype=torch.float32, detach_norm=True)
    base = torch.nn.Sequential(torch.nn.Linear(N, M))
    base.load_state_dict({"0.weight": made.weight, "0.bias": made.bias})
    config = peft.LoraConfig(r=RANK, lora_alpha=6, lora_dropout=0.0, target_modules=["0"], use_dora=True)
    dora = peft.get_peft_model(base, config).base_model.model[0]
    theirs = [
        dora.lora_A["default"].weight,
        dora.lora_B["default"].weight,
        dora.lora_magnitude_vector["default"].weight,
    ]
    own = [made.lora_A, made.lora_B, made.magnitude]
    with torch.no_grad():
        for to, value in zip(theirs, own, strict=True):
            to.copy_(value)
    inputs = inputs_of(made)
    outputs, expected = made(inputs), dora(inputs)
    torch.testing.assert_close(outputs, expected)
    found = gradients(made, outputs)
    probe = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected * probe.float()).sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in theirs])


def with_zero_vector(norm_axis, factor_too):
    """The first vector of W0 is zero, and that of the factor beside it if `factor_too`: then V's is."""
    made = layer(norm_axis)
    with torch.no_grad():
        (made.weight if norm_axis == "output" else made.weight.T)[0] = 0
        if factor_too:
            (made.lora_B if norm_axis == "output" else made.lora_A.T)[0] = 0
    return made


@pytest.mark.parametrize("norm_axis", AXES)
def test_gradients_where_only_the_frozen_vector_is_zero(norm_axis):
    made = with_zero_vector(norm_axis, factor_too=False)
    trained = [p.detach().clone().requires_grad_() for p in (made.lora_A, made.lora_B, made.magnitude)]
    assert torch.autograd.gradcheck(as_function(made), (inputs_of(made), *trained))


@pytest.mark.parametrize("norm_axis", AXES)
def test_a_zero_vector_acts_as_itself_and_can_leave(norm_axis):
    made = with_zero_vector(norm_axis, factor_too=True)
    inputs = inputs_of(made)
    torch.testing.assert_close(made(inputs), torch.nn.functional.linear(inputs, dense(made), made.bias))
    grad_a, grad_b, grad_g = gradients(made, made(inputs))
    assert all(grad.isfinite().all() for grad in (grad_a, grad_b, grad_g))
    assert grad_g[0] == 0
    # What is trained of the vector has the gradient that it has of a plain V = W0 + s B A.
    plain = made.weight + made.scaling * made.lora_B @ made.lora_A
    plain_a, plain_b, _ = gradients(made, torch.nn.functional.linear(inputs, plain) + 0 * made.magnitude.sum())
    own, expected = (grad_b, plain_b) if norm_axis == "output" else (grad_a.T, plain_a.T)
    assert expected[0].norm() > 0.1
    torch.testing.assert_close(own[0], expected[0])
    # The formula jumps as the vector leaves zero, so only what keeps it there can be checked by differences.
    still = ["magnitude", "lora_A" if norm_axis == "output" else "lora_B"]
    function = functools.partial(torch.func.functional_call, made)
    variables = [getattr(made, name).detach().clone().requires_grad_() for name in still]
    assert torch.autograd.gradcheck(lambda *v: function(dict(zip(still, v, strict=True)), inputs), variables)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes, but for views of `weight`."""

    def __init__(self, weight):
        super().__init__()
        self.numel, self.weight = 0, weight.data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != self.weight:
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operation_makes_a_matrix(norm_axis, dtype):
    made = layer(norm_axis, dtype, m=64, n=48)
    inputs = inputs_of(made, rows=2).requires_grad_()
    with Largest(made.weight) as largest:
        made(inputs).float().sum().backward()
    assert 0 < largest.numel <= 4 * 64
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        made(inputs)
    assert all(tensor.numel() <= 4 * 64 or tensor.data_ptr() == made.weight.data_ptr() for tensor in saved)


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_norms_are_fp32_in_a_module_of_sixteen_bits(norm_axis, cast):
    made = layer(norm_axis, torch.float32, m=96, n=80, alpha=0.3)
    made(inputs_of(made))  # remembers the norms of the fp32 weight
    low = copy.deepcopy(made).to(cast)
    exact = copy.deepcopy(low).double()
    torch.testing.assert_close(low._base_squares(), low.weight.float().norm(dim=low._dim) ** 2)
    assert low._base_squares().dtype == torch.float32
    factor, expected = low._factor().double(), exact._factor()
    assert ((factor - expected) / expected).abs().max() < 2e-4  # a bf16 number has 4e-3
    inputs = inputs_of(low)
    outputs, expected = low(inputs), exact(inputs.double())
    assert (outputs - expected).norm() < 1e-2 * expected.norm()
    for grad, wanted in zip(gradients(low, outputs), gradients(exact, expected), strict=True):
        assert (grad - wanted).norm() < 2e-2 * wanted.norm()


def test_norms_follow_the_weight_that_is_there():
    made = layer()
    inputs = inputs_of(made)
    with torch.inference_mode():
        made(inputs)
    made.load_state_dict({**made.state_dict(), "weight": torch.randn(M, N).double()})
    outputs = made(inputs)
    torch.testing.assert_close(outputs, torch.nn.functional.linear(inputs, dense(made), made.bias))
    made.weight.data = torch.randn(M, N).double()
    torch.testing.assert_close(made(inputs), torch.nn.functional.linear(inputs, dense(made), made.bias))
    gradients(made, made(inputs))


def test_norms_are_fp32_under_autocast():
    made = layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made._factor(), layer()._factor().float())
        assert made(inputs_of(made)).dtype == torch.bfloat16


def test_dropout_is_on_the_input_of_a_alone():
    made = layer(dropout=0.5)
    inputs = inputs_of(made)
    torch.manual_seed(5)
    outputs = made(inputs)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(inputs, 0.5)
    low = made.scaling * dropped @ made.lora_A.T @ made.lora_B.T
    torch.testing.assert_close(outputs, (inputs @ made.weight.T + low) * made._factor() + made.bias)
    made.eval()
    torch.testing.assert_close(made(inputs), torch.nn.functional.linear(inputs, dense(made), made.bias))


def llama(tied=False):
    return make_model(tied=tied)


def roberta():
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=131,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=40,
            num_labels=3,
        )
    ).eval()


MODELS = {"llama": llama, "tied_llama": lambda: llama(tied=True), "roberta": roberta}
LLAMA_LAYERS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
ROBERTA_LAYERS = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense"
)


def logits(model, step=0):
    with torch.no_grad():
        return model(input_ids=tokens(step)).logits


def trained(kind, steps=4, **options):
    """A converted model after steps of SGD that move every trainable parameter far."""
    model = MODELS[kind]()
    add_adapters(model, adapter_rank=3, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(steps):
        batch = tokens(step)
        labels = batch if "llama" in kind else batch[:, 0] % 3
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_model_computes_what_it_did(kind, norm_axis):
    model = MODELS[kind]()
    before, weights = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not has_adapters(model)
    names = add_adapters(model, adapter_rank=4, norm_axis=norm_axis)
    assert has_adapters(model)
    prefix, layers = ("roberta.encoder.layer", ROBERTA_LAYERS) if kind == "roberta" else ("model.layers", LLAMA_LAYERS)
    assert names == [f"{prefix}.{i}.{layer}" for i in range(2) for layer in layers.split()]
    assert (logits(model) - before).abs().max() < 1e-6
    for name, parameter in model.named_parameters():
        factor = name.rpartition(".")[2] in ("lora_A", "lora_B", "magnitude")
        assert parameter.requires_grad == (factor or name.startswith("classifier.")), name
        if not factor:
            assert torch.equal(parameter, weights.pop(name)), name
    assert not weights


def test_bf16_model_computes_what_it_did():
    for order in ("cast before", "cast after"):
        model = llama()
        before = logits(copy.deepcopy(model).bfloat16())
        model = model.bfloat16() if order == "cast before" else model
        add_adapters(model)
        model = model.bfloat16()
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        assert (logits(model) - before).norm() < 2e-2 * before.norm()


def test_a_seed_and_a_name_make_the_factor():
    models = [llama(), llama(), llama()]
    add_adapters(models[0], seed=1)
    add_adapters(models[1], seed=1, target_modules=["*.1.*.q_proj"])
    add_adapters(models[2], seed=2)
    first, second, other = (model.model.layers[1].self_attn.q_proj.lora_A for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first, models[0].model.layers[0].self_attn.q_proj.lora_A)
    assert 0.9 < first.abs().max() * 40**0.5 <= 1


def test_patterns_choose_the_layers():
    names = add_adapters(llama(), target_modules=["q_proj", "*.mlp.*"], exclude_modules=["*.0.*", "up_proj"])
    assert names == [f"model.layers.1.{layer}" for layer in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]


def test_modules_to_save_stay_trainable_and_win():
    model = roberta()
    names = add_adapters(model, target_modules=["*"], modules_to_save=["classifier", "*.layer.0.*", "LayerNorm"])
    assert [name for name in names if ".layer.1." not in name] == []
    free = {name for name, p in model.named_parameters() if p.requires_grad and ".layer.1." not in name}
    assert {"classifier.out_proj.bias", "roberta.encoder.layer.0.output.dense.weight"} < free
    assert "roberta.embeddings.LayerNorm.weight" in free
    assert "roberta.embeddings.word_embeddings.weight" not in free


def test_a_new_head_of_any_name_stays_trainable_but_a_language_models_does_not():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "max_position_embeddings": 12}
    config = BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2, tie_word_embeddings=False)
    classifier, language_model = BartForSequenceClassification(config), BartForConditionalGeneration(config)
    for model in (classifier, language_model):
        assert all(".layers.0." in name for name in add_adapters(model))
    free = [name for name, p in classifier.named_parameters() if p.requires_grad and ".layers." not in name]
    assert free == [
        f"classification_head.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")
    ]
    assert all(".layers." in name for name, p in language_model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("kind", MODELS)
def test_merged_the_model_is_the_original_architecture(kind, norm_axis, tmp_path):
    model = trained(kind, norm_axis=norm_axis).eval()
    plain = MODELS[kind]()
    expected = logits(model)
    assert (expected - logits(plain.eval())).abs().max() > 0.1
    weights = merged_weights(model, {name: p.detach() for name, p in model.named_parameters()})
    assert weights.keys() == dict(plain.named_parameters()).keys()
    model.save_pretrained(tmp_path, state_dict=weights)
    auto = AutoModelForSequenceClassification if kind == "roberta" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert (logits(loaded) - expected).abs().max() < 1e-5
    merge_adapters(model)
    assert not has_adapters(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert (logits(model) - expected).abs().max() < 1e-5


def test_merging_a_zero_vector_makes_no_nan():
    for norm_axis in AXES:
        made = with_zero_vector(norm_axis, factor_too=True)
        merged = made.merged(made.weight, made.lora_A, made.lora_B, made.magnitude)
        torch.testing.assert_close(merged, dense(made))


def test_a_layer_with_two_names_stays_one():
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared)})
    assert add_adapters(model, adapter_rank=2) == ["a"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], AdapterLinear)
    merge_adapters(model)
    assert type(model["a"]) is torch.nn.Linear
    assert model["a"] is model["b"][0]


def tied_pair():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def with_adapters():
    model = llama()
    add_adapters(model)
    return model


REFUSED = {
    "rank_above": (llama, {"adapter_rank": 41}, r"adapter_rank 41 .*q_proj \(40 x 40\): at most 40"),
    "rank_zero": (llama, {"adapter_rank": 0}, "adapter_rank: 0 must be a whole number"),
    "rank_fraction": (llama, {"adapter_rank": 2.0}, "adapter_rank: 2.0 must be a whole number"),
    "alpha_zero": (llama, {"adapter_alpha": 0}, "adapter_alpha: 0 must be above 0"),
    "alpha_nan": (llama, {"adapter_alpha": float("nan")}, "adapter_alpha: nan must be"),
    "dropout_one": (llama, {"adapter_dropout": 1.0}, "adapter_dropout: 1.0 must be"),
    "axis": (llama, {"norm_axis": "row"}, "norm_axis: 'row' must be 'output' or 'input'"),
    "no_linear": (lambda: torch.nn.Sequential(torch.nn.Embedding(4, 4)), {}, "contains no torch.nn.Linear"),
    "bare_linear": (lambda: torch.nn.Linear(4, 4), {}, "contains no torch.nn.Linear"),
    "nothing_left": (llama, {"exclude_modules": ["*_proj"]}, "no linear layer is left"),
    "saved_wins": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["model"]}, "no linear layer is left"),
    "no_target": (llama, {"target_modules": ["q_poj"]}, "target_modules: 'q_poj' matches no parameter"),
    "target_is_no_linear": (llama, {"target_modules": ["embed_tokens"]}, "target_modules: 'embed_tokens' matches no"),
    "no_exclude": (llama, {"exclude_modules": ["c_attn"]}, "exclude_modules: 'c_attn' matches no parameter"),
    "no_saved": (llama, {"modules_to_save": ["score"]}, "modules_to_save: 'score' matches no parameter"),
    "tied": (tied_pair, {"adapter_rank": 2}, "another module shares its weight"),
    "tied_head": (lambda: llama(tied=True), {"target_modules": ["lm_head"]}, "lm_head: another module shares"),
    "meta": (lambda: llama().to("meta"), {}, "meta device"),
    "twice": (with_adapters, {}, "already has adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_and_nothing_changed(case):
    build, options, message = REFUSED[case]
    model = build()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ConfigError, match=message):
        add_adapters(model, **options)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
