"""One ``torch.optim.Optimizer`` for every method: groups, roles, the order of a step, ``state_dict``.

It works on plain parameters, and on whatever DeepSpeed's wrappers turn them into: where the elements lie is read at the
first step (or by :meth:`LowRankOptimizer.bind`), after DeepSpeed has arranged them. The order of a step is always

    basis if due, project, stop if a gradient is not finite, moments, lift, decay, write

and DeepSpeed has unscaled and clipped the gradients before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch

from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Ascent, Options
from ds_lowrank.optimizer.adamw import adamw_step
from ds_lowrank.optimizer.build_slots import make_slots
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.optimizer.param_groups import ParameterGroups
from ds_lowrank.optimizer.perturbation import Perturbation
from ds_lowrank.optimizer.report import Inventory, logger, role_table, state_bytes, take_inventory
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.state_dict import dump_state, load_state
from ds_lowrank.optimizer.step import PendingUpdate, buckets, groups_of, largest_magnitude
from ds_lowrank.placement.grid import Grid, grid_of, joined
from ds_lowrank.placement.zero import MISSES_SHARDS, read_placement
from ds_lowrank.sharding.reduce import (
    Distributed,
    Executor,
    Request,
    Rounds,
    SingleProcess,
    all_reduce_route,
    lockstep,
)

LARGEST = 1e16
"""A gradient beyond it is taken as not finite: sums of its squares leave the range of fp32."""
UNPERTURBED_GRADIENT = (
    "{} takes its gradient where the loss is higher than at the weights, and this one was taken at the weights: call "
    "ds_lowrank.forward_backward(engine, forward) instead of engine(...) and engine.backward(loss), with a "
    "PipelineEngine ds_lowrank.train_batch(engine, batches), or set perturbation_radius to 0"
)


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
        self._given_grid = grid
        self._groups = ParameterGroups(self.method, options, self._grid)
        self._slots: dict[int, list[Slot]] | None = None
        self._executor: Executor = SingleProcess()
        self.wrapper, self.grid, self._is_local = "none", Grid(), False
        self._counts = {"skipped_updates": 0, "refreshes": 0}
        self._perturbation: Perturbation | None = None
        parsed = parse_options(self.method, options)
        super().__init__(params, parsed.model_dump())
        self._groups.check(parsed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Only before the first step."""
        if self._slots is not None:
            raise RuntimeError("a parameter group can be added before the first step only")
        super().add_param_group(self._groups.validated(param_group))
        self._groups.add(self.param_groups[-1])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an optimizer that knows process groups cannot be copied or pickled; use state_dict()")

    def _grid(self) -> Grid:
        """As it is now: AutoTP makes its groups after a client optimizer was built."""
        return grid_of(None) if self._given_grid is None else self._given_grid

    def set_grid(self, grid: Grid | None) -> None:
        """Take the grid of the engine that the optimizer, built before it, is given to."""
        self._given_grid = self._given_grid if grid is None else grid

    def bind(self) -> None:
        """Read where DeepSpeed put the elements and create all state. Idempotent; the first step does it at last."""
        if self._slots is not None:
            return
        self.grid, ascent = self._grid(), self._ascent()
        if ascent is not None and ascent.per_micro_batch and self.grid.pipeline is not None:
            raise ConfigError(
                "accumulation 'per_micro_batch' moves the weights for each micro-batch, and a pipeline works on "
                "several at a time: set accumulation to 'per_step'"
            )
        placement = read_placement(self._groups.parameters, self._groups.param_groups)
        if placement.wrapper == "FP16_UnfusedOptimizer" and self.grid.tensor is not None:
            raise ConfigError(MISSES_SHARDS)
        self._is_local = self._projects_locally()
        # Tensor-parallel ranks that project their own shards have nothing to exchange, and may do so in other rounds.
        group = placement.process_group if self._is_local else joined(placement.process_group, self.grid.tensor)
        if group is not None and torch.distributed.get_world_size(group) > 1:
            self._executor = Distributed(group)
        self.wrapper = placement.wrapper
        with raise_on_all_ranks() if self.grid.pipeline else nullcontext():  # a stage alone may have what does not fit
            slots = make_slots(self.method, self._groups.members(self.state), placement, self.grid, group)
        self._groups.match_patterns(self.grid.pipeline)
        devices = {str(slot.fragment.store.device) for slot in slots}
        if len(devices) > 1:
            raise ConfigError(f"the parameters lie on {sorted(devices)}; one optimizer works on one device")
        by_store: dict[int, list[Slot]] = {}
        for slot in slots:
            by_store.setdefault(id(slot.fragment.store), []).append(slot)
        self._slots = by_store
        self._log_roles(slots)

    def _log_roles(self, slots: list[Slot]) -> None:
        groups = [self._executor.group] if isinstance(self._executor, Distributed) else []
        if self._is_local and self.grid.tensor is not None:
            groups.append(self.grid.tensor)
        own = take_inventory(slots, groups)
        stages: list[Inventory] = [own] * self.grid.pipeline_size
        if self.grid.pipeline is not None:
            torch.distributed.all_gather_object(stages, own, group=self.grid.pipeline)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            ranks = self._executor.size * self.grid.pipeline_size * (self.grid.tensor_size if self._is_local else 1)
            table = role_table(stages, state_bytes(slots), ranks)
            logger.info("%s on %s\n%s", self.method.name, self.wrapper, table)

    @property
    def slots(self) -> list[Slot]:
        """One entry a trainable parameter; those that are stepped together stand together."""
        self.bind()
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
        self.bind()
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
        options = {id(group): self._groups.options_of(group) for group in groups_of(slots)}
        matrices = [PendingUpdate(slot, options[id(slot.group)]) for slot in slots if slot.is_projected]
        rest = [slot for slot in slots if not slot.is_projected]
        try:
            for work in matrices:
                work.shard.attach(work.slot.fragment.gradient, work.slot.fragment.weights)
            for bucket in buckets(matrices):
                yield from self._project(bucket)
            found = [work.seen.projected for work in matrices] + [slot.fragment.gradient for slot in rest]
            sizes = yield from self._magnitudes(found)
            if not self._agree_all_finite(all(size < LARGEST for size in sizes)):
                self._counts["skipped_updates"] += 1
                return
            for work, size in zip(matrices, sizes, strict=False):
                work.seen.magnitude = size
                if work.options.ascent is not None and not work.slot.perturbed and size:
                    raise RuntimeError(UNPERTURBED_GRADIENT.format(self.method.name))
            for bucket in buckets([work for work in matrices if work.slot.has_begun or not work.seen.is_zero]):
                yield from self._update(bucket)
        finally:
            for work in matrices:
                work.shard.detach()
        live = [slot for slot, size in zip(rest, sizes[len(matrices) :], strict=True) if slot.has_begun or size > 0]
        yield from adamw_step(live, options)
        for slot in live:
            slot.count_step()

    def _project(self, bucket: list[PendingUpdate]) -> Rounds[None]:
        seen = yield from lockstep(
            self.method.project(work.shard, work.slot.state, work.options, work.slot.state["step"]) for work in bucket
        )
        for work, projection in zip(bucket, seen, strict=True):
            work.seen = projection

    def _update(self, bucket: list[PendingUpdate]) -> Rounds[None]:
        states = [work.slot.state_store.decode(work.slot.state) for work in bucket]
        updates = yield from lockstep(
            self.method.update(work.shard, state, work.options, state["step"], work.seen)
            for work, state in zip(bucket, states, strict=True)
        )
        for work, state, update in zip(bucket, states, updates, strict=True):
            rate, weights = work.options.effective_lr, work.shard.weights
            work.shard.write(weights, update, rate, rate * work.options.weight_decay)
            work.slot.fragment.put(weights)
            work.slot.state_store.encode(work.slot.state, state)
            work.slot.count_step()
            self._counts["refreshes"] += work.seen.refreshed
            del work.seen

    def _magnitudes(self, tensors: list[torch.Tensor]) -> Rounds[list[float]]:
        """For tensors of which every rank has a part, a number that is the same on all ranks.

        It is zero where all elements are, and not finite where one is not: the sum of every rank's largest magnitude,
        which neither overflows nor underflows where a sum of squares would.
        """
        largest = [largest_magnitude(tensor) for tensor in tensors]
        route = all_reduce_route(self._executor.size, len(largest))
        (total,) = yield [Request(route, torch.stack(largest).view(-1, 1))]
        sizes: list[float] = total.view(-1).tolist()
        return sizes

    def _agree_all_finite(self, finite: bool) -> bool:
        """Whether all ranks found their gradients finite, those too that exchange nothing with this one.

        Only asked where no wrapper of DeepSpeed's has looked for that.
        """
        apart = (self.grid.tensor if self._is_local else None, self.grid.pipeline)
        groups = [group for group in apart if group is not None and self.wrapper == "none"]
        if not groups:
            return finite
        found = torch.tensor(finite, dtype=torch.int32, device=self.slots[0].fragment.store.device)
        for group in groups:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=group)
        return bool(found)

    def _projects_locally(self) -> bool:
        """Whether tensor-parallel ranks project their own shards."""
        chosen = {options.tensor_parallel_projection for options in self.options.values()}
        if len(chosen) > 1:
            raise ConfigError("tensor_parallel_projection must be the same in all parameter groups")
        return self.grid.tensor is not None and "local" in chosen

    @property
    def options(self) -> dict[int, Options]:
        """Of each group as it is now, by the group's id."""
        return self._groups.options

    @property
    def perturbation(self) -> Perturbation | None:
        """What moves the weights before the gradient is taken, for a method that asks for it."""
        self.bind()
        if self._perturbation is None and (ascent := self._ascent()) is not None:
            slots = [slot for slot in self.slots if slot.is_projected]
            self._perturbation = Perturbation(
                *(self.method, slots, ascent, self._executor, self.grid), self._is_local, self.slots[0].parameter
            )
        return self._perturbation

    def _ascent(self) -> Ascent | None:
        """The one of all groups: their matrices are moved together."""
        climbs = {options.ascent for options in self.options.values()}
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
        return {"lowrank/perturbation_norm": perturbation.norm, "lowrank/failed_ascents": perturbation.failed_ascents}

    def matrices(self) -> dict[str, dict[str, int]]:
        """Present rank, and bytes of state over all ranks that share it, of every matrix whose rank is not fixed."""
        return {
            slot.tag.name: {"rank": slot.rank, "state_bytes": slot.state_bytes}
            for slot in self.slots
            if "rank" in slot.state
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's state under parameter names, in plain values that ``weights_only=True`` loads."""
        return dump_state(self.method.name, self.slots, self._groups.param_groups, self._counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave on the same layout. Nothing is changed unless all of it fits.

        Raises:
            CheckpointError: it belongs to another method, model, layout or configuration; says which.
        """
        fixed_on_resume = self.method.Options.fixed_on_resume
        self._counts = load_state(self.method.name, self.slots, self._groups.param_groups, state_dict, fixed_on_resume)
