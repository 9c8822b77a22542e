"""One ``torch.optim.Optimizer`` for every method: groups, roles, the order of a step, ``state_dict``.

It works on plain parameters, and on whatever DeepSpeed's wrappers turn them into: where the elements lie is read at the
first step (or by :meth:`LowRankOptimizer.finalize`), after DeepSpeed has arranged them. The order of a step is always

    basis if due, project, stop if a gradient is not finite, moments, lift, decay, write

and DeepSpeed has unscaled and clipped the gradients before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ds_lowrank.config import parse_options
from ds_lowrank.elementwise import init_elementwise_state, step_elementwise
from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options, Projection, State
from ds_lowrank.report import logger, role_table, state_bytes
from ds_lowrank.roles import Role, Tag, check_targets, role_of, tag_from_name, tag_of
from ds_lowrank.sharding.matrix import MatrixShard, everyone
from ds_lowrank.sharding.reduce import Alone, Distributed, Request, Rounds, lockstep
from ds_lowrank.sharding.zero import Fragment, Placement, logical_shape, read_parts, read_placement
from ds_lowrank.state import dump_state, load_state

UNVALIDATED_GROUP_KEYS = frozenset({"params", "param_names", "name", "initial_lr"})


@dataclass
class Slot:
    """One parameter: what it is, where this rank's elements of it are, and its state.

    Attributes:
        world: over how many ranks it is split.
        shard: None where the parameter is not projected.
    """

    tag: Tag
    role: Role
    shape: tuple[int, ...]
    group: dict[str, Any]
    fragment: Fragment
    world: int
    shard: MatrixShard | None
    state: State


class LowRankOptimizer(torch.optim.Optimizer):
    """A low-rank method on the matrices, AdamW on everything else.

    Args:
        params: ``model.named_parameters()``, or parameters tagged by :func:`ds_lowrank.tag_parameters`, or groups
            (dicts) of either. A group may override any option, ``lr`` and ``weight_decay`` and ``rank`` for example.
        options: the keys of the method's options, as in ``optimizer.params`` of a DeepSpeed JSON.

    Raises:
        ConfigError: an unknown or invalid option, a parameter without a name, a target that matches nothing.
    """

    method: ClassVar[type[Method]]

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        self._options = parse_options(self.method, options)
        self._tags: dict[torch.Tensor, Tag] = {}
        self._own: list[list[torch.nn.Parameter]] = []
        self._own_groups: list[dict[str, Any]] = []
        self._slots: dict[int, list[Slot]] | None = None
        self._executor: Alone | Distributed = Alone()
        self._last_counts: dict[tuple[str, int], int] = {}
        self.wrapper = "none"
        self.skipped_updates = 0
        """Calls of ``step`` that changed nothing because a gradient was not finite."""
        entries = list(params)
        as_groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
        super().__init__([self._named_group(group) for group in as_groups], self._options.model_dump())
        if self._options.target_modules is not None:
            check_targets([tag.name for tag in self._tags.values()], self._options.target_modules)

    def _named_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with plain parameters that have something to train; their tags are noted."""
        known = {key: value for key, value in group.items() if key not in UNVALIDATED_GROUP_KEYS}
        parse_options(self.method, {**self._options.model_dump(), **known})
        entries = group["params"]
        parameters = []
        for entry in [entries] if isinstance(entries, torch.Tensor) else entries:
            name, parameter = entry if isinstance(entry, tuple) else (None, entry)
            if not parameter.requires_grad or 0 in logical_shape(parameter):
                continue
            tag = tag_of(parameter) or (tag_from_name(name) if name is not None else None)
            if tag is None:
                raise ConfigError(
                    f"{self.method.name} got a parameter without a name, and a shape cannot tell an embedding from "
                    "a weight. Pass model.named_parameters(), or call ds_lowrank.tag_parameters(model) first."
                )
            self._tags[parameter] = tag
            parameters.append(parameter)
        return {**group, "params": parameters}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Only before the first step."""
        if self._slots is not None:
            raise RuntimeError("a parameter group can be added before the first step only")
        if any(isinstance(p, tuple) or p not in self._tags for p in param_group["params"]):
            param_group = self._named_group(param_group)
        super().add_param_group(param_group)
        if self.param_groups[-1]["params"]:
            self._own.append(list(self.param_groups[-1]["params"]))
            self._own_groups.append(self.param_groups[-1])

    def finalize(self) -> None:
        """Read where DeepSpeed put the elements and create all state. Idempotent; the first step does it at last."""
        if self._slots is not None:
            return
        placement = read_placement(self._own, self._own_groups)
        if placement.process_group is not None and torch.distributed.get_world_size(placement.process_group) > 1:
            self._executor = Distributed(placement.process_group)
        self.wrapper = placement.wrapper
        slots = self._make_slots(placement)
        by_store: dict[int, list[Slot]] = {}
        for slot in slots:
            by_store.setdefault(id(slot.fragment.store), []).append(slot)
        self._slots = by_store
        self._log_roles(slots, placement.process_group)

    def _log_roles(self, slots: list[Slot], process_group: torch.distributed.ProcessGroup | None) -> None:
        totals = torch.tensor(state_bytes(slots), dtype=torch.int64)
        if self._executor.size > 1:
            totals = totals.to(slots[0].fragment.store.device)
            torch.distributed.all_reduce(totals, group=process_group)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            projected, rest = totals.tolist()
            table = role_table(slots, (projected, rest), self._executor.size)
            logger.info("%s on %s\n%s", self.method.name, self.wrapper, table)

    def _make_slots(self, placement: Placement) -> list[Slot]:
        parameters = [p for own in self._own for p in own]
        groups = [group for own, group in zip(self._own, self._own_groups, strict=True) for _ in own]
        fragments = [fragment for found in placement.fragments for fragment in found]
        shapes = [logical_shape(parameter) for parameter in parameters]
        parts = read_parts(shapes, fragments, placement.process_group)
        slots, matrices = [], 0
        for parameter, group, fragment, shape, held in zip(parameters, groups, fragments, shapes, parts, strict=True):
            tag, options = self._tags[parameter], self._group_options(group)
            role = role_of(tag, shape, options.target_modules, options.exclude_modules)
            state: State = self.state[parameter]
            shard = None
            if role.projected:
                side = self.method.side((shape[0], shape[1]), options)
                holders = [rank for rank, part in enumerate(held) if part.numel]
                shard = MatrixShard(
                    tag.name, (shape[0], shape[1]), held, self._executor.rank, side, holders[matrices % len(holders)]
                )
                state |= {"step": 0, **self.method.init_state(shard, options, fragment.store.device)}
                matrices += 1
            else:
                state |= {"step": 0, **init_elementwise_state(fragment, options)}
            slots.append(Slot(tag, role, shape, group, fragment, len(held), shard, state))
        return slots

    def _group_options(self, group: dict[str, Any]) -> Options:
        return parse_options(self.method, {key: group[key] for key in self.method.Options.model_fields})

    @property
    def slots(self) -> list[Slot]:
        """One entry a trainable parameter, in the order given."""
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
        stores = [store for group in self.param_groups for store in group["params"] if store.grad is not None]
        slots = [slot for store in stores for slot in self._slots.get(id(store), [])]
        if slots:
            self._executor.run(self._step_rounds(slots))
        return loss

    def _step_rounds(self, slots: list[Slot]) -> Rounds[None]:
        options = {id(slot.group): self._group_options(slot.group) for slot in slots}
        matrices = [(slot, slot.shard) for slot in slots if slot.shard is not None]
        rest = [slot for slot in slots if slot.shard is None]
        for slot, shard in matrices:
            shard.attach(slot.fragment.gradient)
        seen = yield from lockstep(
            self.method.project(shard, slot.state, options[id(slot.group)], slot.state["step"])
            for slot, shard in matrices
        )
        found = [projection.projected for projection in seen] + [slot.fragment.gradient for slot in rest]
        norms = yield from self._norms(found)
        if all(math.isfinite(norm) for norm in norms):
            for projection, norm in zip(seen, norms, strict=False):
                projection.norm = norm
            yield from self._update_matrices(matrices, seen, options)
            self._update_rest(rest, norms[len(matrices) :], options)
        else:
            self.skipped_updates += 1
        for _, shard in matrices:
            shard.detach()

    def _update_matrices(
        self, matrices: list[tuple[Slot, MatrixShard]], seen: list[Projection], options: dict[int, Options]
    ) -> Rounds[None]:
        live = [
            (slot, shard, projection)
            for (slot, shard), projection in zip(matrices, seen, strict=True)
            if has_begun(slot, projection.norm)
        ]
        updates = yield from lockstep(
            self.method.update(shard, slot.state, options[id(slot.group)], slot.state["step"], projection)
            for slot, shard, projection in live
        )
        for (slot, shard, _), update in zip(live, updates, strict=True):
            lr = effective_lr(slot.group)
            shard.write(slot.fragment.weights, update, lr, lr * slot.group["weight_decay"])
            slot.state["step"] += 1
        self._count("projected", [slot for slot, _ in matrices], len(live))

    def _update_rest(self, rest: list[Slot], norms: list[float], options: dict[int, Options]) -> None:
        live = [slot for slot, norm in zip(rest, norms, strict=True) if has_begun(slot, norm)]
        for group in {id(slot.group): slot.group for slot in live}.values():
            own = [(slot.fragment, slot.state) for slot in live if slot.group is group]
            step_elementwise(own, options[id(group)], effective_lr(group))
        for slot in live:
            slot.state["step"] += 1
        self._count("adamw", rest, len(live))

    def _norms(self, tensors: list[torch.Tensor]) -> Generator[list[Request], list[torch.Tensor], list[float]]:
        """The Frobenius norms of tensors of which every rank has a part, the same on all ranks."""
        squares = [torch.linalg.vector_norm(tensor, dtype=torch.float32).square() for tensor in tensors]
        route = everyone(self._executor.size, len(squares))
        (total,) = yield [Request(route, torch.stack(squares).view(-1, 1))]
        norms: list[float] = total.view(-1).sqrt().tolist()
        return norms

    def _count(self, what: str, slots: list[Slot], done: int) -> None:
        """Note how many parameters of these stores were stepped."""
        for slot in slots[:1]:
            self._last_counts[what, id(slot.fragment.store)] = done

    def metrics(self) -> dict[str, float]:
        """Counters for a log: parameters that the last optimizer step changed by each rule, and skipped updates."""
        counts = dict.fromkeys(("projected", "adamw"), 0)
        for (what, _), done in self._last_counts.items():
            counts[what] += done
        return {
            "lowrank/projected_matrices": counts["projected"],
            "lowrank/adamw_parameters": counts["adamw"],
            "lowrank/skipped_updates": self.skipped_updates,
        }

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """This rank's state under parameter names, in plain values that ``weights_only=True`` loads."""
        return dump_state(self.method.name, self.slots, self._own_groups, self.skipped_updates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Load what :meth:`state_dict` gave on the same layout. Nothing is changed unless all of it fits.

        Raises:
            CheckpointError: it belongs to another method, model, layout or configuration; says which.
        """
        self.skipped_updates = load_state(self.method.name, self.slots, self._own_groups, state_dict)


def has_begun(slot: Slot, norm: float) -> bool:
    """A parameter waits for its first gradient that is not all zero.

    A zero matrix has no subspace, and DeepSpeed steps once with zeros while it is constructed (fp16, bf16 at stage 0).
    """
    return norm > 0 or slot.state["step"] > 0


def effective_lr(group: dict[str, Any]) -> float:
    """The learning rate of a group: what the scheduler wrote, times the group's own factor."""
    lr: float = group["lr"] * group["lr_scale"]
    return lr
