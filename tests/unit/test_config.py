"""Options and their errors; roles; what is refused."""

import re
from fractions import Fraction

import pytest
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ds_lowrank import ConfigError, GaLore, tag_parameters
from ds_lowrank.integration.replaced import without_forced_adam
from ds_lowrank.integration.unsupported_settings import UNSUPPORTED_SETTINGS, check_supported
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.options import looks_like_method, method_named, parse_options
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.optimizer.roles import role_of
from ds_lowrank.placement.parameter_names import Tag, matches, tag_of

METHOD = METHODS["GaLore"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"update_proj_gp": 5}, "update_proj_gp .*unknown key; did you mean 'update_proj_gap'.*Valid: "),
        ({"rank": 0}, r"params.rank .*greater than 0, got 0"),
        ({"rank": 1.5}, r"params.rank .*valid integer, got 1.5"),
        ({"rank": "auto"}, r"params.rank .*only the Hugging Face Trainer fills in 'auto'"),
        ({"rank": "4"}, r"params.rank .*valid integer, got '4'"),
        ({"seed": True}, r"params.seed .*valid integer, got True"),
        ({"lr": "1e-3"}, r"params.lr .*valid number, got '1e-3'"),
        ({"lr": 1e308}, r"params.lr .*a number that fp32 can hold, got 1e\+308"),
        ({"weight_decay": False}, r"params.weight_decay .*valid number, got False"),
        ({"betas": ["0.9", 0.99]}, r"params.betas .*valid number, got \['0.9', 0.99\]"),
        ({"proj_type": "both"}, r"params.proj_type .*'std', 'reverse_std', 'left' or 'right'"),
        ({"projector": "qr"}, r"params.projector .*'randomized', 'svd', 'random', 'sampled' or 'dct'"),
        ({"betas": [0.9, 1.0]}, r"betas must lie in \[0, 1\)"),
        ({"betas": [0.9]}, "betas"),
        ({"lr": -1}, "greater than or equal to 0"),
        ({"lr": float("nan")}, "finite"),
        ({"weight_decay": -0.1}, "greater than or equal to 0"),
        ({"state_dtype": "fp4"}, "'fp32', 'bf16' or 'int8'"),
        ({"rank": 0, "gap": 3}, "(?s)rank.*gap|gap.*rank"),
    ],
)
def test_a_bad_option_says_where_and_what_is_valid(params, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(METHOD, params)


def test_a_float_that_is_whole_is_a_whole_number():
    options = parse_options(METHOD, {"rank": 64.0, "update_proj_gap": 1e3, "lr": 1, "seed": 2.0})
    assert (options.rank, options.update_proj_gap, options.lr, options.seed) == (64, 1000, 1.0, 2)
    assert all(isinstance(value, int) for value in (options.rank, options.update_proj_gap, options.seed))


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("GaLore", {"inner": "adam"}, "params.inner .*'adamw', 'adafactor', 'lion' or 'sgd'"),
        ("GaLore", {"momentum": 0.9}, "momentum belongs to inner 'sgd', inner is 'adamw': remove one of them"),
        ("GaLore", {"inner": "sgd", "momentum": 1.0}, "params.momentum .*less than 1"),
        ("GaLore", {"lion_sign": "original"}, "lion_sign belongs to inner 'lion', inner is 'adamw'"),
        ("GaLore", {"inner": "adafactor", "moments": "rotate"}, "inner 'adafactor' has no moments that 'rotate' could"),
        ("GaLore", {"inner": "sgd", "moments": "rotate"}, "inner 'sgd' has no moments that 'rotate' could carry"),
        ("Apollo", {"mini": 1}, "params.mini .*valid boolean"),
        ("OnlineSubspaceDescent", {"update_proj_gap": 100}, "update_proj_gap belongs to basis_optimizer 'random'"),
        ("OnlineSubspaceDescent", {"stagger": True}, "stagger .*unknown key.*Valid: .*basis_lr_ratio"),
        ("OnlineSubspaceDescent", {"pca_lambda": -0.1}, "params.pca_lambda .*greater than or equal to 0"),
        ("OnlineSubspaceDescent", {"basis_optimizer": "adamw"}, "'adafactor', 'random' or 'package.module:Class'"),
        ("OnlineSubspaceDescent", {"basis_optimizer": 3}, "'adafactor', 'random' or 'package.module:Class'"),
        ("OnlineSubspaceDescent", {"basis_optimizer": "no_such:Rule"}, "'no_such' cannot be imported .*PYTHONPATH"),
        ("OnlineSubspaceDescent", {"basis_optimizer": "math:Rule"}, "the module 'math' has no 'Rule'"),
        (
            "OnlineSubspaceDescent",
            {"basis_optimizer": "torch.optim:SGD"},
            "'torch.optim:SGD' is not a subclass of",
        ),
        (
            "OnlineSubspaceDescent",
            {"basis_optimizer": "ds_lowrank.methods.blocks.inner_optimizers:InnerOptimizer"},
            "does not define direction, state",
        ),
        (
            "OnlineSubspaceDescent",
            {"basis_optimizer": "random", "pca_lambda": 0.0},
            "pca_lambda belongs to a basis",
        ),
        (
            "OnlineSubspaceDescent",
            {"basis_optimizer": "random", "basis_betas": [0.9, 0.99]},
            "basis_betas belongs",
        ),
        ("OnlineSubspaceDescent", {"basis_optimizer": "sgd", "basis_betas": [0.9, 0.99]}, "'sgd' has none: remove one"),
        ("OnlineSubspaceDescent", {"basis_betas": [0.9, 1.0]}, r"basis_betas must lie in \[0, 1\)"),
        ("OnlineSubspaceDescent", {"alpha": 5}, "alpha .*unknown key"),
        ("VLoRP", {"granularity": 0}, "a granularity is a positive number or a fraction like '1/4'"),
        ("VLoRP", {"granularity": -2}, "a granularity is a positive number"),
        ("VLoRP", {"granularity": "1/0"}, "a granularity is a positive number"),
        ("VLoRP", {"granularity": "four"}, "a granularity is a positive number"),
        ("VLoRP", {"granularity": float("nan")}, "a granularity is a positive number"),
        ("VLoRP", {"granularity": True}, "a granularity is a positive number"),
        ("VLoRP", {"granularity": None}, "a granularity is a positive number"),
        (
            "VLoRP",
            {"update_scheme": "original_space", "moment_on_resample": "reset"},
            "set moment_on_resample to 'keep'",
        ),
        ("VLoRP", {"update_scheme": "sgd", "moment_on_resample": "reproject"}, "update_scheme 'sgd' has no moments"),
        ("VLoRP", {"update_scheme": "sgd", "eps_position": "inside"}, "eps_position belongs to update_scheme"),
        ("VLoRP", {"update_scheme": "subspace", "eps_position": "inside"}, "eps_position belongs to update_scheme"),
        ("VLoRP", {"update_scheme": "subspace", "bias_correction": "linear"}, "bias_correction belongs to"),
        ("VLoRP", {"granularty": 4}, "did you mean 'granularity'"),
        ("AdaRankGrad", {"rank_min": 9, "rank_max": 8}, "rank_min 9 is above rank_max 8: set rank_min to at most 8"),
        ("AdaRankGrad", {"rank_multiple": 16, "rank_max": 8}, "rank_multiple 16 is above rank_max 8"),
        ("AdaRankGrad", {"residual_tol": 0.0}, "params.residual_tol .*greater than 0"),
        ("AdaRankGrad", {"residual_tol": 1.0}, "params.residual_tol .*less than 1"),
        ("AdaRankGrad", {"grad_norm_ratio_tol": 1.0}, "params.grad_norm_ratio_tol .*less than 1"),
        ("AdaRankGrad", {"grad_norm_tol": -1}, "params.grad_norm_tol .*greater than or equal to 0"),
        ("AdaRankGrad", {"rank": 8}, "params.rank .*unknown key; did you mean 'rank_m"),
        ("Lorenza", {"right_factor": "svd", "probe_form": "gaussian"}, "right_factor belongs to probe_form 'diagonal'"),
        ("Lorenza", {"right_factor": "svd", "rank": None}, "right_factor belongs to probe_form 'diagonal'"),
        ("Apollo", {"mini": True, "rank": 4}, "mini has rank 1, got rank 4: set rank to 1, or mini to false"),
        ("Apollo", {"norm_growth_limit": 0.9}, "params.norm_growth_limit .*greater than or equal to 1"),
    ],
)
def test_a_bad_option_of_every_method_says_what_would_work(method, params, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(METHODS[method], params)


@pytest.mark.parametrize(
    ("given", "kept", "value"),
    [
        (4, 4, 4),
        (4.0, 4, 4),
        ("4", 4, 4),
        (0.25, "1/4", 1 / 4),
        ("2/8", "1/4", 1 / 4),
        (1.5, "3/2", 3 / 2),
        (1 / 43, "1/43", 1 / 43),
    ],
)
def test_a_granularity_is_kept_as_json_and_a_checkpoint_can_hold_it(given, kept, value):
    options = parse_options(METHODS["VLoRP"], {"granularity": given})
    assert options.granularity == kept
    assert float(options.c) == value
    assert parse_options(METHODS["VLoRP"], options.model_dump()) == options


POWERS = "1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048"


@pytest.mark.parametrize(
    ("shape", "c", "fitting"),
    [
        ((2048, 5461), 2, None),
        ((5461, 2048), "1/43", None),
        ((5461, 2048), "64/127", None),
        ((5461, 2048), "1/2", f"p in {{{POWERS}}} and q in {{1, 43, 127, 5461}}"),
        ((2048, 5461), 3, f"p in {{{POWERS}}} and q in {{1, 43, 127, 5461}}"),
        ((40, 20), 3, "p in {1, 2, 4, 5, 10, 20} and q in {1, 2, 4, 5, 8, 10, 20, 40}"),
    ],
)
def test_granularity_is_checked_on_the_dimension_it_divides(shape, c, fitting):
    """c divides the smaller dimension and multiplies the larger: 5461 = 43 x 127 allows few fractions."""
    problem = METHODS["VLoRP"].unsupported_shape(shape, parse_options(METHODS["VLoRP"], {"granularity": c}))
    assert problem == (fitting and f"granularity {c} does not fit; p/q does for {fitting}")


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (12, 12)])
def test_the_granularities_that_are_named_are_those_that_fit(shape):
    method = METHODS["VLoRP"]
    problem = method.unsupported_shape(shape, method.Options(granularity="97/89"))
    p, q = (set(map(int, numbers.split(", "))) for numbers in re.findall(r"{(.*?)}", problem))
    for c in {Fraction(a, b) for a in range(1, 15) for b in range(1, 15)}:
        fits = method.unsupported_shape(shape, method.Options(granularity=str(c))) is None
        assert fits == (c.numerator in p and c.denominator in q)


def test_every_matrix_that_does_not_fit_is_named():
    weights = {
        name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (("a", (8, 6)), ("b", (8, 6)), ("c", (9, 7)))
    }
    message = (
        r"(?s)8 x 6: granularity 4 .*q in {1, 2, 4, 8} \(a, b; 2 in all\).*9 x 7: .*q in {1, 3, 9} \(c; 1 in all\)"
    )
    with pytest.raises(ConfigError, match=message):
        OPTIMIZERS["VLoRP"](weights.items(), granularity=4)
    weights |= {"d": torch.nn.Parameter(torch.zeros(8, 4))}
    OPTIMIZERS["VLoRP"](weights.items(), granularity=4, target_modules=["d"])  # the others are not projected


def test_every_method_is_an_attribute_of_the_package():
    import ds_lowrank

    assert {name: getattr(ds_lowrank, name).method for name in METHODS} == METHODS
    with pytest.raises(AttributeError, match="no attribute 'Galore'; did you mean 'GaLore'"):
        _ = ds_lowrank.Galore


def test_published_settings_paste_in():
    options = parse_options(
        METHOD, {"lr": 0.01, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    )
    assert (options.lr, options.rank, options.update_proj_gap, options.scale) == (0.01, 128, 200, 0.25)


def test_unknown_methods_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'GaLore'"):
        method_named("GaLoree")
    assert looks_like_method("galore") == "GaLore"
    assert looks_like_method("AdamW") is None


@pytest.mark.parametrize("name", [*DEEPSPEED_OPTIMIZERS, *(n for n in dir(torch.optim) if n not in METHODS)])
def test_an_optimizer_of_torch_or_deepspeed_is_not_taken_for_a_misspelt_method(name):
    assert looks_like_method(name) is None


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "*attn*", True),
        ("model.layers.0.self_attn.q_proj.weight", "q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.?.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", "proj", False),
        ("lm_head.weight", "*_head", True),
    ],
)
def test_patterns_match_names_modules_and_components(name, pattern, expected):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("kind", "shape", "projected", "reason"),
    [
        ("weight", (8, 4), True, "matrix"),
        ("weight", (8,), False, "1-D"),
        ("weight", (2, 8, 4), False, "3-D"),
        ("embedding", (8, 4), False, "embedding"),
        ("head", (8, 4), False, "head"),
    ],
)
def test_default_roles(kind, shape, projected, reason):
    role = role_of(Tag("a.b.weight", kind), shape, None, ())
    assert (role.projected, role.reason) == (projected, reason)


def test_excludes_win_over_targets_and_targets_over_kinds():
    tag = Tag("model.embed_tokens.weight", "embedding")
    assert role_of(tag, (8, 4), ["*embed*"], ()).projected
    assert not role_of(tag, (8, 4), ["*embed*"], ["embed_tokens"]).projected
    assert role_of(Tag("a.b.weight", "weight"), (8, 4), ["*embed*"], ()).reason == "not in target_modules"


def test_tags_know_embeddings_and_heads_by_type_whatever_their_name():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(5, 4)
            self.middle = torch.nn.Linear(4, 4)
            self.logits = torch.nn.Linear(4, 5)

        def get_output_embeddings(self):
            return self.logits

    model = Model()
    tag_parameters(model)
    kinds = {name: tag_of(parameter).kind for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert kinds == {"words.weight": "embedding", "middle.weight": "weight", "logits.weight": "head"}


def test_a_target_that_matches_nothing_is_an_error_with_examples():
    with pytest.raises(ConfigError, match=r"'\*attn\*' matches no parameter.*0\.weight"):
        GaLore(torch.nn.Sequential(torch.nn.Linear(3, 3)), target_modules=["*attn*"])


def zero(**block):
    return {"zero_optimization": block}


REFUSED = [
    zero(offload_optimizer={"device": "cpu"}),
    zero(stage=2, offload_optimizer={"device": "nvme"}),
    zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True}),
    zero(offload_param={"device": "nvme"}),
    zero(cpu_offload=True),
    zero(cpu_offload_param=True),
    zero(zenflow={"topk_ratio": 0.1}),
    zero(zero_hpz_partition_size=8),
    zero(zero_quantized_weights=True),
    zero(zero_quantized_nontrainable_weights=True),
    zero(zero_quantized_gradients=True),
    zero(elastic_checkpoint=True),
    zero(load_from_fp32_weights=False),
    zero(legacy_stage1=True),
    zero(stage=3, stage3_module_granularity_threshold=1000),
    zero(stage=2, compute_grad_norm=False),
    {"weight_quantization": {"enabled": True}},
    {"checkpoint": {"load_universal": True}},
    {"bf16": {"enabled": True, "check_grad_overflow": False}},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
    {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
    {"fp16": {"enabled": True, "auto_cast": True}},
    {"bfloat16": {"enabled": True}},
    {"amp": {"enabled": True}},
    {"torch_autocast": {"enabled": True}},
    {"sparse_gradients": True},
    {"sequence_parallel_size": 2},
    {"data_parallel_size": 2},
    {"expert_parallel": {"enabled": True}},
    {"managed_gradient_accumulation": False},
    {"compile": {"deepcompile": True}},
    {"hybrid_engine": {"enabled": True}},
    {"data_efficiency": {"enabled": True}},
    {"autotuning": {"enabled": True}},
]


@pytest.mark.parametrize("config", REFUSED, ids=str)
def test_what_is_not_supported_is_refused_with_advice(config):
    with pytest.raises(ConfigError, match=r"is not supported with GaLore: .+"):
        check_supported(config, "GaLore")


def test_weights_in_bf16_only_are_taken_if_they_are_asked_for():
    config = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    check_supported(config, "GaLore", has_masters=False)
    with pytest.raises(ConfigError, match=r"set optimizer\.params\.master_weights to false"):
        check_supported(config, "GaLore")


def test_every_refusal_is_tested_and_harmless_values_pass():
    refused = [{setting.key for setting in UNSUPPORTED_SETTINGS if setting.is_set(config)} for config in REFUSED]
    assert all(len(keys) == 1 for keys in refused)
    assert set().union(*refused) == {setting.key for setting in UNSUPPORTED_SETTINGS}
    check_supported(
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "none", "ratio": 0.5, "super_offload": True},
                "zero_hpz_partition_size": 1,
            },
            "tensor_parallel": {"autotp_size": 2},
            "amp": {"enabled": False},
            "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": False},
            "sequence_parallel_size": 1,
        },
        "GaLore",
    )


def test_offload_to_the_cpu_is_supported_under_zero_and_needs_deepspeeds_consent():
    config = zero(stage=1, offload_optimizer={"device": "cpu", "pin_memory": True, "ratio": 1.0})
    check_supported(config, "GaLore")
    assert without_forced_adam(config, "GaLore") == config | {"zero_force_ds_cpu_optimizer": False}
    assert without_forced_adam(zero(stage=1), "GaLore") == zero(stage=1)
    with pytest.raises(ConfigError, match="asks for DeepSpeed's CPU Adam in the place of GaLore: remove it"):
        without_forced_adam(config | {"zero_force_ds_cpu_optimizer": True}, "GaLore")


@pytest.mark.parametrize("config", [{"zero_optimization": True}, {"zero_optimization": 2}, {"amp": 3}, {"bf16": None}])
def test_a_block_of_another_type_is_no_reason_to_fail(config):
    check_supported(config, "GaLore")


def test_a_sequence_parallel_size_beside_an_mpu_only_repeats_it():
    check_supported({"sequence_parallel_size": 2}, "GaLore", has_mpu=True)
    with pytest.raises(ConfigError, match="parallel_state_sp"):
        check_supported({"sequence_parallel_size": 2}, "GaLore")
