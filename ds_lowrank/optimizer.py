"""One ``torch.optim.Optimizer`` for every method: groups, roles, the order of a step, ``state_dict``.

It works on plain parameters, and on whatever DeepSpeed's wrappers turn them into: where the elements lie is read at the
first step (or by :meth:`LowRankOptimizer.finalize`), after DeepSpeed has arranged them. The order of a step is always

    basis if due, project, stop if a gradient is not finite, moments, lift, decay, write

and DeepSpeed has unscaled and clipped the gradients before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch

from ds_lowrank.config import parse_options
from ds_lowrank.elementwise import step_elementwise
from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Climb, Method, Options
from ds_lowrank.perturbation import Perturbation
from ds_lowrank.placing import Member, check_fit, make_slots, members_of, names_in
from ds_lowrank.report import Inventory, logger, role_table, state_bytes, take_inventory
from ds_lowrank.roles import Tag, check_patterns, tag_from_name, tag_of
from ds_lowrank.sharding.grid import Grid, grid_of, joined
from ds_lowrank.sharding.reduce import Alone, Distributed, Executor, Request, Rounds, everyone, lockstep
from ds_lowrank.sharding.zero import read_placement, shape_before_zero
from ds_lowrank.slots import Slot, Work, groups_of, largest_magnitude, waves
from ds_lowrank.state import dump_state, load_state
from ds_lowrank.together import together

LARGEST = 1e16
"""A gradient beyond it is taken as not finite: sums of its squares leave the range of fp32."""
NOT_LOOKED_AROUND = (
    "{} takes its gradient where the loss is higher than at the weights, and this one was taken at the weights: call "
    "ds_lowrank.forward_backward(engine, forward) instead of engine(...) and engine.backward(loss), with a "
    "PipelineEngine ds_lowrank.train_batch(engine, batches), or set perturbation_radius to 0"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("target_modules", "exclude_modules")
UNVALIDATED_GROUP_KEYS = frozenset({"params", "param_names", "name", "initial_lr"})


class LowRankOptimizer(torch.optim.Optimizer):
    """A low-rank method on the matrices, AdamW on everything else.

    Args:
        params: ``model.named_parameters()``, or parameters tagged by :func:`ds_lowrank.tag_parameters`, or groups
            (dicts) of either. A group may override any option, ``lr`` and ``weight_decay`` and ``rank`` for example.
        grid: tensor and pipeline parallelism; None for what is initialised in this process.
        options: the keys of the method's options, as in ``optimizer.params`` of a DeepSpeed JSON.

    Raises:
        ConfigError: an unknown or invalid option, a parameter without a name, a pattern that matches nothing.
    """

    method: ClassVar[type[Method]]

    def __init__(self, params: Iterable[Any], *, grid: Grid | None = None, **options: Any) -> None:
        self._given, self._given_grid = options, grid
        self._options = parse_options(self.method, options)
        self._names: list[str] = []
        self._tags: dict[torch.Tensor, Tag] = {}
        self._patterns: list[tuple[str, str]] = []
        self._own: list[list[torch.nn.Parameter]] = []
        self._own_groups: list[dict[str, Any]] = []
        self._slots: dict[int, list[Slot]] | None = None
        self._executor: Executor = Alone()
        self.wrapper, self.grid = "none", Grid()
        self._counts = {"skipped_updates": 0, "refreshes": 0}
        self._perturbation: Perturbation | None = None
        super().__init__(params, self._options.model_dump())
        if problem := self.method.lacks(self._names, self._options):
            raise ConfigError(f"{self.method.name}: {problem}")
        for key in PATTERNS:
            self._must_match(self._names, key, getattr(self._options, key) or ())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Only before the first step."""
        if self._slots is not None:
            raise RuntimeError("a parameter group can be added before the first step only")
        super().add_param_group(self._plain_group(param_group))
        if self.param_groups[-1]["params"]:
            self._own.append(list(self.param_groups[-1]["params"]))
            self._own_groups.append(self.param_groups[-1])

    def _plain_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with validated options and plain parameters that have something to train; their tags are noted."""
        given = {key: value for key, value in group.items() if key not in UNVALIDATED_GROUP_KEYS}
        options = parse_options(self.method, {**self._given, **given})
        entries = group["params"]
        entries = [entries] if isinstance(entries, torch.Tensor) else list(entries)
        named = [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]
        tags = [self._checked_tag(name, parameter) for name, parameter in named]
        names = [name for (_, p), tag in zip(named, tags, strict=True) for name in names_in(p, tag)]
        for key in PATTERNS:
            self._must_match(names, key, given.get(key) or ())
        self._tags |= {parameter: tag for (_, parameter), tag in zip(named, tags, strict=True)}
        trained = [p for _, p in named if p.requires_grad and 0 not in shape_before_zero(p)]
        for parameter in trained:
            if parameter.dtype not in DTYPES:
                name, dtype = self._tags[parameter].name, parameter.dtype
                raise ConfigError(f"{name} is {dtype}; the arithmetic is fp32: use fp32, bf16 or fp16")
        grid = self._grid()
        check_fit(self.method, [m for p in trained for m in members_of(p, self._tags[p], group, options, {}, grid)])
        values = {key: getattr(options, key) for key in self.method.Options.model_fields}
        return {**group, **values, "params": trained}

    def _must_match(self, names: Iterable[str], key: str, patterns: Iterable[str]) -> None:
        """Every pattern has a parameter here, or in a pipeline on some stage: that is asked when all are there."""
        if self._grid().pipeline is None:
            check_patterns(names, key, patterns)
        else:
            self._patterns += [(key, pattern) for pattern in patterns]

    def _checked_tag(self, name: str | None, parameter: torch.nn.Parameter) -> Tag:
        tag = tag_of(parameter) or (tag_from_name(name) if name is not None else None)
        if tag is None:
            raise ConfigError(
                f"{self.method.name} got a parameter without a name, and a shape cannot tell an embedding from a "
                "weight. Pass model.named_parameters(), or call ds_lowrank.tag_parameters(model) first."
            )
        names = names_in(parameter, tag)
        if twice := next((name for name in names if name in self._names), None):
            raise ConfigError(f"{twice}: given twice. State and seeds belong to a name; each parameter needs its own")
        self._names += names
        return tag

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an optimizer that knows process groups cannot be copied or pickled; use state_dict()")

    def _grid(self) -> Grid:
        """As it is now: AutoTP makes its groups after a client optimizer was built."""
        return grid_of(None) if self._given_grid is None else self._given_grid

    def finalize(self) -> None:
        """Read where DeepSpeed put the elements and create all state. Idempotent; the first step does it at last."""
        if self._slots is not None:
            return
        self._climb()
        self.grid = self._grid()
        placement = read_placement(self._own, self._own_groups)
        group = joined([placement.process_group, self.grid.tensor]) if self.grid.tensor else placement.process_group
        if group is not None and torch.distributed.get_world_size(group) > 1:
            self._executor = Distributed(group)
        self.wrapper = placement.wrapper
        with together() if self.grid.pipeline else nullcontext():  # a stage alone may have what does not fit
            slots = make_slots(self.method, self._members(), placement, self.grid, group)
        self._match_on_all_stages()
        devices = {str(slot.fragment.store.device) for slot in slots}
        if len(devices) > 1:
            raise ConfigError(f"the parameters lie on {sorted(devices)}; one optimizer works on one device")
        by_store: dict[int, list[Slot]] = {}
        for slot in slots:
            by_store.setdefault(id(slot.fragment.store), []).append(slot)
        self._slots = by_store
        self._log_roles(slots)

    def _match_on_all_stages(self) -> None:
        if self.grid.pipeline is None:
            return
        stages: list[list[str]] = [[]] * self.grid.pipeline_size
        torch.distributed.all_gather_object(stages, self._names, group=self.grid.pipeline)
        for key, pattern in self._patterns:
            check_patterns([name for names in stages for name in names], key, [pattern])

    def _log_roles(self, slots: list[Slot]) -> None:
        own = take_inventory(slots, self._executor.group if isinstance(self._executor, Distributed) else None)
        stages: list[Inventory] = [own] * self.grid.pipeline_size
        if self.grid.pipeline is not None:
            torch.distributed.all_gather_object(stages, own, group=self.grid.pipeline)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            table = role_table(stages, state_bytes(slots), self._executor.size * self.grid.pipeline_size)
            logger.info("%s on %s\n%s", self.method.name, self.wrapper, table)

    def _members(self) -> list[Member]:
        return [
            member
            for own, group in zip(self._own, self._own_groups, strict=True)
            for parameter in own
            for member in members_of(
                *(parameter, self._tags[parameter], group, self._group_options(group)),
                *(self.state[parameter], self.grid),
            )
        ]

    def _group_options(self, group: dict[str, Any]) -> Options:
        return parse_options(self.method, {key: group[key] for key in self.method.Options.model_fields})

    @property
    def slots(self) -> list[Slot]:
        """One entry a trainable parameter; those that are stepped together stand together."""
        self.finalize()
        assert self._slots is not None
        return [slot for slots in self._slots.values() for slot in slots]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter whose gradient is there.

        Under ZeRO, DeepSpeed calls it once a group (stages 1 and 2) or once a sub-group (stage 3); each parameter
        counts its own steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.finalize()
        assert self._slots is not None
        if self._perturbation is not None:
            self._perturbation.restore()  # within a PipelineEngine's step nobody else could
        stores = [store for group in self.param_groups for store in group["params"]]
        if any(id(store) not in self._slots for store in stores):
            raise RuntimeError(
                "the parameter groups hold tensors that the optimizer was not built with: something replaced them "
                "after the first step. Build a new optimizer for them"
            )
        if any(store.grad is not None and store.grad.is_sparse for store in stores):
            raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
        for slot in (slot for store in stores for slot in self._slots[id(store)]):
            slot.stepped = False
        slots = [slot for store in stores if store.grad is not None for slot in self._slots[id(store)]]
        if slots:
            with torch.autocast(slots[0].fragment.store.device.type, enabled=False):
                self._executor.run(self._step_rounds(slots))
        return loss

    def _step_rounds(self, slots: list[Slot]) -> Rounds[None]:
        options = {id(group): self._group_options(group) for group in groups_of(slots)}
        matrices = [Work(slot, options[id(slot.group)]) for slot in slots if slot.is_projected]
        rest = [slot for slot in slots if not slot.is_projected]
        try:
            for work in matrices:
                work.shard.attach(work.slot.fragment.gradient, work.slot.fragment.weights)
            for wave in waves(matrices):
                yield from self._project(wave)
            found = [work.seen.projected for work in matrices] + [slot.fragment.gradient for slot in rest]
            sizes = yield from self._magnitudes(found)
            if not self._on_all_stages(all(size < LARGEST for size in sizes)):
                self._counts["skipped_updates"] += 1
                return
            for work, size in zip(matrices, sizes, strict=False):
                work.seen.size = size
                if work.options.climb is not None and not work.slot.looked_around and size:
                    raise RuntimeError(NOT_LOOKED_AROUND.format(self.method.name))
            for wave in waves([work for work in matrices if work.slot.has_begun or not work.seen.is_zero]):
                yield from self._update(wave)
        finally:
            for work in matrices:
                work.shard.detach()
        live = [slot for slot, size in zip(rest, sizes[len(matrices) :], strict=True) if slot.has_begun or size > 0]
        yield from step_elementwise(live, options)
        for slot in live:
            slot.count_step()

    def _project(self, wave: list[Work]) -> Rounds[None]:
        seen = yield from lockstep(
            self.method.project(work.shard, work.slot.state, work.options, work.slot.state["step"]) for work in wave
        )
        for work, projection in zip(wave, seen, strict=True):
            work.seen = projection

    def _update(self, wave: list[Work]) -> Rounds[None]:
        states = [work.slot.keep.opened(work.slot.state) for work in wave]
        updates = yield from lockstep(
            self.method.update(work.shard, state, work.options, state["step"], work.seen)
            for work, state in zip(wave, states, strict=True)
        )
        for work, state, update in zip(wave, states, updates, strict=True):
            rate, weights = work.options.rate, work.shard.weights
            work.shard.write(weights, update, rate, rate * work.options.weight_decay)
            work.slot.fragment.put(weights)
            work.slot.keep.close(work.slot.state, state)
            work.slot.count_step()
            self._counts["refreshes"] += work.seen.refreshed
            del work.seen

    def _magnitudes(self, tensors: list[torch.Tensor]) -> Rounds[list[float]]:
        """For tensors of which every rank has a part, a number that is the same on all ranks.

        It is zero where all elements are, and not finite where one is not: the sum of every rank's largest magnitude,
        which neither overflows nor underflows where a sum of squares would.
        """
        largest = [largest_magnitude(tensor) for tensor in tensors]
        route = everyone(self._executor.size, len(largest))
        (total,) = yield [Request(route, torch.stack(largest).view(-1, 1))]
        sizes: list[float] = total.view(-1).tolist()
        return sizes

    def _on_all_stages(self, finite: bool) -> bool:
        """Whether every stage of the pipeline found its gradients finite; asked where no wrapper looks for that."""
        if self.grid.pipeline is None or self.wrapper != "none":
            return finite
        everywhere = torch.tensor(finite, dtype=torch.int32, device=self.slots[0].fragment.store.device)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group=self.grid.pipeline)
        return bool(everywhere)

    @property
    def options(self) -> dict[int, Options]:
        """Of each group as it is now, by the group's id."""
        return {id(group): self._group_options(group) for group in self._own_groups}

    @property
    def perturbation(self) -> Perturbation | None:
        """What moves the weights before the gradient is taken, for a method that asks for it."""
        self.finalize()
        if self._perturbation is None and (climb := self._climb()) is not None:
            slots = [slot for slot in self.slots if slot.is_projected]
            self._perturbation = Perturbation(
                *(self.method, slots, climb, self._executor, self.grid), self.slots[0].parameter
            )
        return self._perturbation

    def _climb(self) -> Climb | None:
        """The one of all groups: their matrices are moved together."""
        climbs = {options.climb for options in self.options.values()}
        if len(climbs) > 1:
            raise ConfigError(
                f"{self.method.name}: all parameter groups are perturbed together, and must agree on probes, "
                "probe_radius, perturbation_radius, two_sided, norm and accumulation"
            )
        return next(iter(climbs), None)

    @property
    def skipped_updates(self) -> int:
        """Calls of ``step`` that changed nothing because a gradient was not finite.

        Under ZeRO 1 to 3 DeepSpeed skips such a step before it calls; a call there is one group or sub-group.
        """
        return self._counts["skipped_updates"]

    def metrics(self) -> dict[str, float]:
        """Numbers for a log: parameters that the last call of ``step`` changed by each rule, what happened so far
        (skipped updates, new bases), and the state of the projected matrices over all ranks that share it.
        """
        stepped = [slot for slot in self.slots if slot.stepped]
        matrices = [slot for slot in self.slots if slot.is_projected]
        return {
            "lowrank/projected_matrices": sum(slot.is_projected for slot in stepped),
            "lowrank/adamw_parameters": sum(not slot.is_projected for slot in stepped),
            "lowrank/skipped_updates": self._counts["skipped_updates"],
            "lowrank/refreshes": self._counts["refreshes"],
            "lowrank/mean_rank": sum(slot.rank for slot in matrices) / max(1, len(matrices)),
            "lowrank/state_bytes": sum(slot.state_bytes for slot in matrices),
            **self._perturbation_metrics(),
        }

    def _perturbation_metrics(self) -> dict[str, float]:
        perturbation = self.perturbation
        if perturbation is None:
            return {}
        return {"lowrank/perturbation_norm": perturbation.norm, "lowrank/without_slope": perturbation.without}

    def matrices(self) -> dict[str, dict[str, int]]:
        """Present rank, and bytes of state over all ranks that share it, of every matrix whose rank is not fixed."""
        return {
            slot.tag.name: {"rank": slot.rank, "state_bytes": slot.state_bytes}
            for slot in self.slots
            if "rank" in slot.state
        }

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """This rank's state under parameter names, in plain values that ``weights_only=True`` loads."""
        return dump_state(self.method.name, self.slots, self._own_groups, self._counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Load what :meth:`state_dict` gave on the same layout. Nothing is changed unless all of it fits.

        Raises:
            CheckpointError: it belongs to another method, model, layout or configuration; says which.
        """
        structure = self.method.Options.structure
        self._counts = load_state(self.method.name, self.slots, self._own_groups, state_dict, structure)
