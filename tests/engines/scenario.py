"""A small LLaMA trained by a real DeepSpeed engine on every rank, and by one dense fp32 process: the oracle."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ds_lowrank.methods import METHODS as REGISTRY
from ds_lowrank.reference.galore import DenseAdamW
from ds_lowrank.reference.lorenza import DenseLorenza, climb
from tests.methods import dense, of

VOCAB, LENGTH, BATCH = 131, 12, 24
METHODS = {name: of(name).engine for name in REGISTRY}
"""The options of every registered method for the scenario's matrices of 40 x 40, 99 x 40 and 40 x 99."""


def make_model(tied: bool = False, hidden: int = 40, intermediate: int = 99) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def make_model_for(settings: dict[str, Any], zero_init: bool, **options: Any) -> torch.nn.Module:
    """The same model; under ``zero.Init`` if asked, and then with other weights."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=settings) if zero_init else contextlib.nullcontext():
        return make_model(**options)


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator, device="cpu")


def config(
    stage: int,
    world: int,
    dtype: str = "fp32",
    gas: int = 1,
    clip: float = 0.0,
    method: str = "GaLore",
    **changes: Any,
) -> dict[str, Any]:
    """A DeepSpeed configuration of the scenario; ``changes`` replace or add top-level sections."""
    settings: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // (world * gas),
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "optimizer": {"type": method, "params": dict(METHODS[method])},
        "zero_optimization": {"stage": stage},
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if dtype == "bf16_fp32_accumulation":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    zero = settings["zero_optimization"] | changes.pop("zero_optimization", {})
    params = settings["optimizer"]["params"] | changes.pop("params", {})
    settings |= changes
    settings["zero_optimization"] = zero
    settings["optimizer"] = {**settings["optimizer"], "params": params}
    return settings


def train_step(engine: Any, step: int, device: str = "cpu") -> None:
    """One optimizer step on this rank's share of the global batch, in as many micro-batches as configured."""
    import torch.distributed as dist

    import ds_lowrank

    mine = tokens(step).to(device).chunk(dist.get_world_size())[dist.get_rank()]
    micros = mine.chunk(engine.gradient_accumulation_steps())
    ds_lowrank.forward_backward(engine, [lambda m=micro: engine(input_ids=m, labels=m).loss for micro in micros])
    engine.step()


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 weights of the whole model, gathered on every rank; frozen ones are converted from their dtype."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().float().clone()
            continue
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:
            whole = parameter if parameter.dtype == torch.float32 else master_of(engine, parameter)
        weights[name] = whole.detach().float().clone()
    return weights


def master_of(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 clone that FP16_UnfusedOptimizer keeps of a parameter; the parameter if nothing is wrapped."""
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return parameter
    for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for a, b in zip(low, high, strict=True):
            if a is parameter:
                return b
    return parameter


def run_engine(
    settings: dict[str, Any], steps: int, zero_init: bool = False, model_options: dict[str, Any] | None = None
):
    """Train; the weights after the first and after the last step, and what the optimizer reports."""

    import ds_lowrank
    from ds_lowrank.optimizer.report import state_bytes

    model = make_model_for(settings, zero_init, **(model_options or {}))
    if zero_init:
        broadcast_dense_init(model, model_options or {})
    engine, *_ = ds_lowrank.initialize(model=model, config=settings, model_parameters=model.named_parameters())
    first = None
    for step in range(steps):
        train_step(engine, step)
        if step == 0:
            first = full_weights(engine)
    optimizer = engine.basic_optimizer
    return {
        "first": first,
        "last": full_weights(engine),
        "wrapper": type(engine.optimizer).__name__,
        "metrics": optimizer.metrics(),
        "matrices": optimizer.matrices(),
        "bytes": state_bytes(optimizer.slots),
        "straddles": any(
            s.is_projected and s.geometry.part.rectangles and s.geometry.part.rectangles[0].col for s in optimizer.slots
        ),
        "skipped": optimizer.skipped_updates,
    }


def broadcast_dense_init(model: torch.nn.Module, model_options: dict[str, Any]) -> None:
    """Give a model built under zero.Init the weights of the dense one, so that both start alike."""
    import deepspeed

    dense = dict(make_model(**model_options).named_parameters())
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(dense[name].data)


class Oracle:
    """The same training in one fp32 process, on whole matrices, by the dense references.

    Attributes:
        norms: the norm of each step's gradient, before clipping.
    """

    batch = staticmethod(tokens)

    def __init__(
        self,
        clip: float = 0.0,
        model: torch.nn.Module | None = None,
        projected=None,
        method: str = "GaLore",
        **options: Any,
    ) -> None:
        self.model = make_model() if model is None else model
        self.clip, self.t, self.norms = clip, 0, []
        self.options = options = METHODS[method] | options
        self.rules = {}
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            if projected is not None:
                is_matrix = parameter.ndim == 2 and projected(name)
            rule = dense(method) if is_matrix else DenseAdamW
            self.rules[name] = rule(parameter.data, name=name, **options)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def gradients(self, step: int) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        batch = self.batch(step)
        climbers = [rule for rule in self.rules.values() if isinstance(rule, DenseLorenza)]
        saved = [rule.weight.clone() for rule in climbers]
        with torch.no_grad():
            climb(climbers, lambda: self.loss(batch), self.t, **self.options)
        self.loss(batch).backward()
        for rule, weight in zip(climbers, saved, strict=True):
            rule.weight.copy_(weight)
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in found.values()]))
        self.norms.append(norm.item())
        if self.clip and norm > self.clip:
            found = {name: gradient * (self.clip / (norm + 1e-6)) for name, gradient in found.items()}
        return found

    def step(self, step: int, lr: float | None = None) -> None:
        for name, gradient in self.gradients(step).items():
            if self.rules[name].t or gradient.any():  # the first step waits for a gradient
                self.rules[name].step(gradient, lr)
        self.t += 1

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def max_relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any parameter, in norm."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)).item() for n in a if a[n].numel())
