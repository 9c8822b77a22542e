"""Options and their errors; roles; what is refused."""

import pytest
import torch

from ds_lowrank import ConfigError, GaLore, tag_parameters
from ds_lowrank.config import METHODS, looks_like_method, method_named, parse_options
from ds_lowrank.roles import matches, role_of, tag_from_name, tag_of
from ds_lowrank.support import REFUSALS, check_supported

METHOD = METHODS["GaLore"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"update_proj_gp": 5}, "update_proj_gp .*unknown key; did you mean 'update_proj_gap'.*Valid: "),
        ({"rank": 0}, r"params.rank .*greater than 0, got 0"),
        ({"rank": 1.5}, r"params.rank .*valid integer, got 1.5"),
        ({"rank": "auto"}, r"params.rank .*'auto' is filled in by the Hugging Face Trainer only"),
        ({"proj_type": "both"}, r"params.proj_type .*'std', 'reverse_std', 'left' or 'right'"),
        ({"projector": "qr"}, r"params.projector .*'randomized' or 'svd'"),
        ({"betas": [0.9, 1.0]}, r"betas must lie in \[0, 1\)"),
        ({"betas": [0.9]}, "betas"),
        ({"lr": -1}, "greater than or equal to 0"),
        ({"lr": float("nan")}, "finite"),
        ({"weight_decay": -0.1}, "greater than or equal to 0"),
        ({"state_dtype": "int8"}, "'fp32' or 'bf16'"),
        ({"rank": 0, "gap": 3}, "(?s)rank.*gap|gap.*rank"),
    ],
)
def test_a_bad_option_says_where_and_what_is_valid(params, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(METHOD, params)


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
    ("name", "shape", "projected", "reason"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), True, "matrix"),
        ("model.layers.0.mlp.up_proj.bias", (8,), False, "1-D"),
        ("experts.weight", (2, 8, 4), False, "3-D"),
        ("model.embed_tokens.weight", (8, 4), False, "embedding"),
        ("transformer.wte.weight", (8, 4), False, "embedding"),
        ("lm_head.weight", (8, 4), False, "head"),
    ],
)
def test_default_roles(name, shape, projected, reason):
    role = role_of(tag_from_name(name), shape, None, ())
    assert (role.projected, role.reason) == (projected, reason)


def test_excludes_win_over_targets_and_targets_over_kinds():
    tag = tag_from_name("model.embed_tokens.weight")
    assert role_of(tag, (8, 4), ["*embed*"], ()).projected
    assert not role_of(tag, (8, 4), ["*embed*"], ["embed_tokens"]).projected
    assert role_of(tag_from_name("a.b.weight"), (8, 4), ["*embed*"], ()).reason == "not in target_modules"


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
        GaLore(torch.nn.Sequential(torch.nn.Linear(3, 3)).named_parameters(), target_modules=["*attn*"])


REFUSED = [
    {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    {"zero_optimization": {"offload_param": {"device": "nvme"}}},
    {"zero_optimization": {"cpu_offload": True}},
    {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
    {"zero_optimization": {"zero_hpz_partition_size": 8}},
    {"bf16": {"enabled": True, "check_grad_overflow": False}},
    {"zero_optimization": {"elastic_checkpoint": True}},
    {"checkpoint": {"load_universal": True}},
    {"amp": {"enabled": True}},
    {"torch_autocast": {"enabled": True}},
    {"tensor_parallel": {"autotp_size": 2}},
    {"sparse_gradients": True},
]


@pytest.mark.parametrize("config", REFUSED, ids=str)
def test_what_is_not_supported_is_refused_with_advice(config):
    with pytest.raises(ConfigError, match=r"is not supported with GaLore: .+"):
        check_supported(config, "GaLore")


def test_every_refusal_is_tested_and_harmless_values_pass():
    assert len(REFUSED) == len(REFUSALS)
    check_supported(
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "zero_hpz_partition_size": 1},
            "tensor_parallel": {"autotp_size": 1},
            "amp": {"enabled": False},
        },
        "GaLore",
    )
