"""Projected accumulation: backward multiplies each gradient as soon as it is there, adds up the product, and drops it.

A step needs of a gradient only sums of products that are linear in it (``Method.measure``), except where a new basis is
found. So each micro-batch's gradient lives for as long as its product takes; what accumulates, and what is summed over
data-parallel ranks, has a rank's worth of numbers for every row. A matrix whose next step needs the gradient itself
keeps it, as always, until that step.

What gradients are multiplied by is known after a step, and gathered then: backward runs on other ranks at other times,
and no hook of it may wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from weakref import ref

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stack import Stack
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Executor, lockstep

MAY_CHANGE = ("lr", "lr_scale", "weight_decay", "betas", "eps", "scale", "projected_gradient_clipping")
"""Options that do not decide what gradients are multiplied by."""


class Accumulation:
    """The sums over micro-batches of what an optimizer's next step needs of the gradients.

    Args:
        method: the optimizer's.
        stacks: remembers which matrices are stepped together.
        executor: the optimizer's.
        share: what the gradient of one rank counts in the average over data-parallel ranks: one over their number.
    """

    def __init__(self, method: type[Method], stacks: Stacks, executor: Executor, share: float) -> None:
        self._method, self._stacks, self._executor, self._share = method, stacks, executor, share
        self._slots: dict[torch.nn.Parameter, list[Slot]] = {}
        self._places: dict[int, tuple[Stack, int]] = {}
        self._shards: dict[int, MatrixShard] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._options: Mapping[int, Options] = {}

    def watch(self, slots: Iterable[Slot]) -> None:
        """Take the gradients of projected matrices from backward, from now on.

        Args:
            slots: of the projected matrices, also those that are watched already.
        """
        self.close()
        self._slots = {}
        for slot in slots:
            self._slots.setdefault(slot.parameter, []).append(slot)
            self._shards[slot.matrix.member.number] = MatrixShard(slot.geometry, [slot.matrix.member])
        take = _without_cycle(self._take)
        for parameter in self._slots:
            hook = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, options: Mapping[int, Options]) -> None:
        """Find what the next gradients are multiplied by. Collective over the ranks that share the matrices.

        Args:
            options: of each parameter group, by the group's ``id``.
        """
        self._options = dict(options)
        slots = [slot for own in self._slots.values() for slot in own]
        for slot in slots:
            slot.matrix.options = options[id(slot.group)]
        self._places = {}
        for bucket in self._stacks.buckets([slot.matrix for slot in slots]):
            try:
                for stack in bucket:
                    stack.attach(gradients=False)
                programs = (self._method.factors(s.shard, s.projecting_state, s.options) for s in bucket)
                found = self._executor.run(lockstep(programs))
                for stack, factors in zip(bucket, found, strict=True):
                    self._expect(stack, factors)
            finally:
                for stack in bucket:
                    stack.detach()

    def _expect(self, stack: Stack, factors: Sums | None) -> None:
        stack.keep_basis(is_stored=stack.state["step"] > 0 and not stack.shard.is_basis_new)
        stack.factors = factors
        if factors is None:
            stack.sums = None
        for position, matrix in enumerate(stack.matrices):
            self._places[matrix.member.number] = stack, position

    def _take(self, parameter: torch.nn.Parameter) -> None:
        """Multiply a parameter's gradient and drop it, unless a matrix in it needs it."""
        slots = self._slots[parameter]
        places = [self._places[slot.matrix.member.number] for slot in slots]
        if parameter.grad is None or any(stack.factors is None for stack, _ in places):
            return
        self._measure(slots)
        parameter.grad = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _measure(self, slots: Sequence[Slot]) -> None:
        """Add to the sums what a step needs of the gradients that there are."""
        for slot in slots:
            stack, position = self._places[slot.matrix.member.number]
            if stack.factors is None or not slot.geometry.part.numel:
                continue
            shard, fragment = self._shards[slot.matrix.member.number], slot.fragment
            shard.precision = stack.options.matmul_precision
            shard.attach([fragment.gradient.unsqueeze(0)], [fragment.weights.unsqueeze(0)])
            kind = fragment.store.device.type
            with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():  # which has no autocast
                factors = tuple(factor[position : position + 1] for factor in stack.factors)
                found = self._method.measure(shard, stack.options, factors)
            shard.detach()
            if stack.sums is None:
                stack.sums = tuple(one.new_zeros(len(stack.matrices), *one.shape[1:]) for one in found)
            for total, one in zip(stack.sums, found, strict=True):
                total[position] += one[0]

    @torch.no_grad()
    def finish(self, options: Mapping[int, Options]) -> None:
        """Complete the sums before a step, and make them this rank's share of the average.

        Args:
            options: of each parameter group, by the group's ``id``.

        Raises:
            ConfigError: what gradients were multiplied by does not fit these options.
        """
        for key, own in options.items():
            self._check_unchanged(self._options[key], own)
        for parameter, slots in self._slots.items():
            kept = any(self._places[slot.matrix.member.number][0].factors is None for slot in slots)
            if parameter.grad is None and (kept or self._lack_sums(slots)):
                parameter.grad = torch.zeros_like(parameter)  # other ranks may have one
            if parameter.grad is None:
                continue
            self._measure(slots)
            if kept:
                self._take_share(parameter.grad)
            else:
                parameter.grad = None
        for stack in self._unique_stacks():
            for total in stack.sums or ():
                self._take_share(total)

    def _take_share(self, summed: torch.Tensor) -> None:
        if self._share != 1:
            summed.mul_(self._share)

    def _check_unchanged(self, before: Options, now: Options) -> None:
        if before is now:
            return
        keys = [key for key in type(now).model_fields if getattr(before, key) != getattr(now, key)]
        if changed := [key for key in keys if key not in MAY_CHANGE]:
            raise ConfigError(
                f"{changed[0]} was changed between two steps, and with reduction 'projected' gradients may be "
                "projected already: only " + ", ".join(MAY_CHANGE) + " may change"
            )

    def _lack_sums(self, slots: Sequence[Slot]) -> bool:
        """Whether backward has not reached a matrix, nor one that is stepped with it."""
        stacks = (self._places[slot.matrix.member.number][0] for slot in slots if slot.geometry.part.numel)
        return any(stack.sums is None for stack in stacks)

    def drop(self) -> None:
        """Forget all sums, and the gradients that were kept: after a step, and where a client calls ``zero_grad``."""
        for stack in self._unique_stacks():
            for total in stack.sums or ():
                total.zero_()
        for parameter in self._slots:
            parameter.grad = None

    def _unique_stacks(self) -> list[Stack]:
        return list({id(stack): stack for stack, _ in self._places.values()}.values())


def _without_cycle(method: Callable[[torch.nn.Parameter], None]) -> Callable[[torch.nn.Parameter], None]:
    """A hook that does not keep its owner, and with it the model, alive."""
    owner, name = ref(method.__self__), method.__name__  # type: ignore[attr-defined]

    def hook(parameter: torch.nn.Parameter) -> None:
        if (accumulation := owner()) is not None:
            getattr(accumulation, name)(parameter)

    return hook
