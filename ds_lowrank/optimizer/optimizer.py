"""One ``torch.optim.Optimizer`` for every method: parameter groups, binding to a layout, ``step``, ``state_dict``.

It works on plain parameters, and on whatever DeepSpeed's wrappers turn them into. :meth:`LowRankOptimizer.bind`, called
by the first step at the latest, reads where the elements are, after DeepSpeed has arranged them. The order of a step is
in :mod:`ds_lowrank.optimizer.step`. DeepSpeed unscales and clips the gradients before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.environment.huggingface import check_optimizer_is_kept
from ds_lowrank.errors import MISSES_SHARDS, ConfigError
from ds_lowrank.methods.base import Method, Options, PerturbingMethod
from ds_lowrank.optimizer.accumulation import Accumulation
from ds_lowrank.optimizer.adamw import adamw_step
from ds_lowrank.optimizer.build_slots import build_slots
from ds_lowrank.optimizer.captured_energy import captured_energies
from ds_lowrank.optimizer.check_masters import check_masters
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.optimizer.param_groups import ParameterGroups
from ds_lowrank.optimizer.perturbation import Perturbation
from ds_lowrank.optimizer.projected import DataParallel, ProjectedReduction, alone
from ds_lowrank.optimizer.refresh_clock import RefreshClock
from ds_lowrank.optimizer.report import log_roles
from ds_lowrank.optimizer.rows import state_pieces
from ds_lowrank.optimizer.saved_state import Parts, load_everything, plain_state
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.optimizer.state_dict import dump_state, load_state
from ds_lowrank.optimizer.step import all_finite, step_matrices
from ds_lowrank.optimizer.unfreezing import refuse_gradients, with_late
from ds_lowrank.optimizer.update_norms import UpdateNorms, shares_of
from ds_lowrank.optimizer.waiting import mark_waiting
from ds_lowrank.placement.averaging import check_averaging
from ds_lowrank.placement.grid import Grid, for_cpu_tensors, initialized_grid, joined
from ds_lowrank.placement.parameter_names import tag_parameters
from ds_lowrank.placement.zero import Interval, read_placement, with_copies
from ds_lowrank.sharding.pieces import Piece, Source
from ds_lowrank.sharding.reduce import Distributed, Executor, Rounds, SingleProcess

UNPERTURBED_GRADIENT = (
    "{} takes its gradient where the loss is higher than at the weights, and this one was taken at the weights: call "
    "ds_lowrank.forward_backward(engine, forward) instead of engine(...) and engine.backward(loss), with a "
    "PipelineEngine ds_lowrank.train_batch(engine, batches), in a Hugging Face Trainer use "
    "ds_lowrank.ForwardBackwardMixin, or set perturbation_radius to 0"
)
UNCHECKED_OFFLOAD = (
    "offload_optimizer in an engine that DeepSpeed's own initialize built: it leaves old gradients on the CPU. Call "
    "ds_lowrank.initialize, or ds_lowrank.register() before anything imports deepspeed.initialize"
)


class LowRankOptimizer(torch.optim.Optimizer):
    """A low-rank method on the matrices, AdamW on everything else.

    Args:
        params: the model; or, after :func:`ds_lowrank.tag_parameters` of the model, parameters, named parameters or
            groups (dicts) of either. A group may override any option, for example ``lr``, ``weight_decay`` and
            ``rank``.
        grid: tensor and pipeline parallelism; None for what is initialised in this process.
        lr: the learning rate; 1e-3.
        betas: of the moments; (0.9, 0.999).
        eps: added to the root of the second moment; 1e-8.
        eps_root: beside which root, that of the ``corrected`` second moment (the default) or of the ``uncorrected``
            one, as in the published codes.
        weight_decay: decoupled, as in AdamW; 0.0.
        weight_decay_order: whether weights decay ``before`` the update (the default) or ``after`` it.
        lr_scale: multiplies the group's ``lr``, also under a scheduler that writes one ``lr`` into every group; 1.0.
        proj_type: the side that is compressed, ``std`` for the smaller dimension (the default), ``reverse_std`` for the
            other, ``left`` or ``right``.
        target_modules: globs on parameter names; None for every matrix except embeddings and the output head.
        exclude_modules: globs on parameter names that are not projected; ().
        tensor_parallel_projection: what is projected if tensor parallelism splits a matrix, the ``logical`` matrix (the
            default) or each rank's ``local`` shard on its own.
        reduction: what is summed over data-parallel ranks and micro-batches, the ``gradient`` (the default) or its
            ``projected`` form, at ZeRO 0 without masters.
        projected_gradient_clipping: the largest norm under ``projected`` reduction; 0.0 for no clipping.
        state_dtype: how moments are stored, ``fp32`` (the default), ``bf16`` or ``int8``.
        matmul_precision: in which a card multiplies with gradients and weights, ``fp32``, or ``tf32``, which is several
            times as fast and keeps 10 bits of each factor; None leaves it to
            ``torch.set_float32_matmul_precision``; None.
        master_weights: whether bf16 weights have fp32 copies, which DeepSpeed keeps; without, new weights are rounded
            to bf16 stochastically; True.
        seed: of random sketches and projections; 0.
        options: all of these except params and grid, and the method's own, by the names they have in
            ``optimizer.params`` of a DeepSpeed JSON.

    Attributes:
        method: what steps the matrices.
        wrapper: how DeepSpeed has arranged the parameters, once bound.
        grid: the grid that it is bound to.

    Raises:
        ConfigError: an unknown or invalid option, a parameter without a name, or a pattern that matches nothing.
    """

    method: ClassVar[type[Method]]
    wrapper: str
    grid: Grid

    def __init__(self, params: torch.nn.Module | Iterable[Any], *, grid: Grid | None = None, **options: Any) -> None:
        self._given_grid = grid
        self._groups = ParameterGroups(self.method, options, self._grid_of)
        self._slots: dict[int, list[Slot]] | None = None
        self._intervals: dict[torch.nn.Parameter, Interval] = {}
        self._executor: Executor = SingleProcess()
        self.wrapper, self.grid, self._is_local = "none", Grid(), False
        self._counts = {"skipped_updates": 0, "refreshes": 0}
        self._refresh_clock = RefreshClock()
        self._update_norms: UpdateNorms | None = None
        self._perturbation: Perturbation | None = None
        self._projected: ProjectedReduction | None = None
        self._data_parallel: DataParallel | None = None
        self._stacks = {"projected": Stacks(self.method), "rest": Stacks(None)}
        parsed = parse_options(self.method, options)
        check_optimizer_is_kept(self.method.name)
        if isinstance(params, torch.nn.Module):
            tag_parameters(params)
            params = list(params.parameters())
        super().__init__(params, parsed.model_dump())
        self._groups.check(parsed)
        _ = self.reduces_projections  # refused now if it cannot be
        mark_waiting(chain.from_iterable(self._groups.parameters), self.method.name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. This is possible only before the first step.

        Args:
            param_group: a dict with ``params`` and the options that the group overrides.

        Raises:
            RuntimeError: the optimizer is already bound to a layout.
            ConfigError: an option or a parameter of the group is refused.
        """
        if self._slots is not None:
            raise RuntimeError("a parameter group can be added only before the first step")
        group, options, present = self._groups.validated(param_group)
        super().add_param_group(group)
        self._groups.add(self.param_groups[-1], options, present)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied.

        Raises:
            TypeError: always.
        """
        raise TypeError("an optimizer that knows process groups cannot be copied or pickled; use state_dict()")

    def set_grid(self, grid: Grid | None) -> None:
        """Tell an optimizer that was built before its engine the engine's grid.

        Args:
            grid: the engine's; None to change nothing.
        """
        self._given_grid = self._given_grid if grid is None else grid
        if self._slots is None:
            self._groups.take_unfrozen()  # the last chance: DeepSpeed arranges the groups next

    @property
    def reduces_projections(self) -> bool:
        """Whether ``reduction`` is ``projected``.

        Raises:
            ConfigError: the groups disagree, or the method needs whole gradients.
        """
        return self._groups.reduces_projections

    def set_data_parallel(self, ranks: DataParallel) -> None:
        """Tell an optimizer that reduces projections itself which ranks have gradients of their own.

        Args:
            ranks: with copies of the weights.
        """
        self._data_parallel = ranks

    def _grid_of(self, parameters: Iterable[torch.nn.Parameter]) -> Grid:
        """The grid of some of the parameters. AutoTP may create its groups after a client optimizer is built."""
        return initialized_grid(parameters) if self._given_grid is None else self._given_grid

    @torch.inference_mode(False)  # state that is made in inference mode cannot be changed outside
    def bind(self, *, may_offload: bool = False) -> None:
        """Read where DeepSpeed put the elements, and create all state.

        Idempotent; the first step calls it at the latest. Collective over the ranks that share the matrices, and over
        the world where groups have to be made.

        Args:
            may_offload: whether the elements may be on the CPU while the model is on a device: whether the engine's
                configuration was checked, and it forgets old gradients.

        Raises:
            ConfigError: the layout or the grid is not supported; the message says what to change.
        """
        if self._slots is not None:
            self._take_unfrozen()
            return
        self.grid, ascent = self._groups.grid, self._groups.ascent
        if ascent is not None and ascent.per_micro_batch and self.grid.pipeline is not None:
            raise ConfigError(
                "accumulation 'per_micro_batch' moves the weights for each micro-batch, and a pipeline works on "
                "several at a time: set accumulation to 'per_step'"
            )
        placement = read_placement(self._groups.parameters, self._groups.param_groups)
        if placement.wrapper == "none" and self._groups.take_unfrozen():
            placement = read_placement(self._groups.parameters, self._groups.param_groups)
        if placement.is_offloaded and not may_offload:
            raise ConfigError(UNCHECKED_OFFLOAD)
        check_averaging(self.grid, placement.process_group)
        if self._groups.reduces_projections:
            self._data_parallel = self._data_parallel or alone()
            placement = with_copies(placement, self._data_parallel.group)
        if placement.wrapper == "FP16_UnfusedOptimizer" and self.grid.tensor is not None:
            raise ConfigError(MISSES_SHARDS)
        self._is_local = self.grid.tensor is not None and self._groups.project_locally
        # Tensor-parallel ranks that project their own shards have nothing to exchange, and may do so in other rounds.
        group = placement.process_group if self._is_local else joined(placement.process_group, self.grid.tensor)
        group = for_cpu_tensors(group) if placement.is_offloaded else group
        if group is not None and dist.get_world_size(group) > 1:
            self._executor = Distributed(group)
        self.wrapper = placement.wrapper
        parameters = self._groups.logical_parameters(self.state)
        with raise_on_all_ranks() if self.grid.pipeline else nullcontext():  # one stage alone may be refused
            slots = build_slots(self.method, parameters, placement, self.grid, group)
            check_masters(slots, self.wrapper)
        self._groups.check_roles(self.grid.pipeline, self._may_unfreeze)
        devices = {str(slot.fragment.store.device) for slot in slots}
        if len(devices) > 1:
            raise ConfigError(f"the parameters are on {sorted(devices)}; one optimizer works on one device")
        by_store: dict[int, list[Slot]] = {}
        for slot in slots:
            by_store.setdefault(id(slot.fragment.store), []).append(slot)
        self._slots = by_store
        pairs = zip(chain.from_iterable(self._groups.parameters), chain.from_iterable(placement.intervals), strict=True)
        self._intervals = dict(pairs)
        if self._groups.reduces_projections:
            self._project_gradients()
        mark_waiting(chain.from_iterable(self._groups.parameters), None)
        log_roles(f"{self.method.name} on {self.wrapper}", slots, self._executor, self.grid, self._is_local)

    def _project_gradients(self) -> None:
        """Take the gradients of projected matrices from backward, from now on."""
        ranks = self._data_parallel
        assert ranks is not None
        if self._projected is not None:
            self._projected.accumulation.close()
        accumulation = Accumulation(self.method, self._stacks["projected"], self._executor, ranks.share)
        self._projected = ProjectedReduction(self.slots, accumulation, ranks, self._executor, self.grid, self._is_local)
        accumulation.prepare(self.options)
        self.get_grads_for_reduction = self._projected.gradients_to_reduce  # DeepSpeed asks whoever has it

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, and what was accumulated of them.

        Args:
            set_to_none: as in torch; what was accumulated is forgotten either way.
        """
        super().zero_grad(set_to_none)
        if self._projected is not None:
            self._projected.accumulation.drop()

    @property
    def _may_unfreeze(self) -> bool:
        """Whether parameters can be taken up after binding: nothing was arranged, and there is nobody to agree with."""
        is_alone = isinstance(self._executor, SingleProcess) and self.grid.pipeline is None
        return self.wrapper == "none" and is_alone and self._projected is None

    def _take_unfrozen(self) -> None:
        """Take up what was frozen when the optimizer was bound and is not now, where that is possible."""
        if self._slots is None or not self._may_unfreeze or not (late := self._groups.take_unfrozen()):
            return
        self._slots = with_late(self.method, self._groups, late, self.state, self._slots, self.grid)
        if self._perturbation is not None:
            self._perturbation.slots = [slot for slot in self.slots if slot.is_projected]
        log_roles(f"{self.method.name}, from now on", self.slots, self._executor, self.grid, self._is_local)

    @property
    def slots(self) -> list[Slot]:
        """One slot per logical matrix or vector; those that are stepped in one call are adjacent."""
        self.bind()
        assert self._slots is not None
        return [slot for slots in self._slots.values() for slot in slots]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient.

        Under ZeRO, DeepSpeed calls it once per group (stages 1 and 2) or once per sub-group (stage 3); each parameter
        counts its own steps.

        Args:
            closure: computes the loss again, with gradients, before the step.

        Returns:
            The loss that the closure returned, else None.

        Raises:
            RuntimeError: the parameter groups hold other tensors than those that were bound, a gradient is sparse, or
                it was not taken where the method needs it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.bind()
        assert self._slots is not None
        plain = "a grid" if self._projected is None else "projected reduction"
        arranged = f"the {self.wrapper} of DeepSpeed" if self.wrapper != "none" else plain
        ranks = self._executor.group if isinstance(self._executor, Distributed) else None
        refuse_gradients(self._groups, arranged, ranks)
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
        if self._projected is not None:
            self._projected.accumulation.finish(self.options)
        slots = [s for store in stores for s in self._slots[id(store)] if store.grad is not None or s.is_accumulated]
        if slots:
            with torch.autocast(slots[0].fragment.store.device.type, enabled=False):
                self._executor.run(self._step(slots))
        if self._projected is not None:
            self._projected.accumulation.drop()
            self._projected.accumulation.prepare(self.options)
            self._global_grad_norm = self._projected.norm  # DeepSpeed's engine reports it
        return loss

    def _step(self, slots: Sequence[Slot]) -> Rounds[None]:
        """Step the projected matrices, then AdamW on the rest."""
        options = self.options
        projected = [slot for slot in slots if slot.is_projected]
        rest = [slot for slot in slots if not slot.is_projected]
        clock, device = self._refresh_clock, slots[0].fragment.store.device
        marks = [clock.mark(device)]

        def proceed(magnitudes: Sequence[float]) -> bool:
            marks.append(clock.mark(device))
            if not self._agree_all_finite(all_finite(magnitudes)):
                return False
            perturbs = {key for key, own in options.items() if own.ascent is not None}
            for slot, magnitude in zip(projected, magnitudes, strict=False) if perturbs else ():
                if magnitude and not slot.perturbed and id(slot.group) in perturbs:
                    raise RuntimeError(UNPERTURBED_GRADIENT.format(self.method.name))
            return True

        for slot in slots:
            slot.matrix.options, slot.matrix.updated = options[id(slot.group)], False
        matrices = [slot.matrix for slot in projected]
        others = [slot.fragment.gradient for slot in rest]
        limit = self._groups.projected_gradient_clipping
        clip = None if self._projected is None else partial(self._projected.clip, limit, slots)
        norms = self._update_norms
        written = None if norms is None else partial(norms.around, shares_of(projected))
        report = yield from step_matrices(
            self.method, matrices, self._executor.size, others, proceed, self._stacks["projected"], clip, written
        )
        for slot in projected:
            if slot.matrix.updated:
                slot.mark_stepped()
        self._counts["skipped_updates"] += report.skipped
        self._counts["refreshes"] += report.refreshes
        if report.refreshes:
            clock.add(*marks)
        sizes = zip(rest, report.other_magnitudes, strict=not report.skipped)
        live = [slot for slot, magnitude in sizes if slot.has_begun or magnitude > 0]
        yield from adamw_step(live, options, self._stacks["rest"])
        for slot in live:
            slot.mark_stepped()

    def _agree_all_finite(self, finite: bool) -> bool:
        """Whether all ranks found their gradients finite, including those that exchange nothing with this one.

        The other ranks are asked only if no wrapper of DeepSpeed's has checked this already.
        """
        others = (self.grid.tensor if self._is_local else None, self.grid.pipeline)
        groups = [group for group in others if group is not None and self.wrapper == "none"]
        if not groups:
            return finite
        found = torch.tensor(finite, dtype=torch.int32, device=self.slots[0].fragment.store.device)
        for group in groups:
            dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
        return bool(found)

    @property
    def options(self) -> dict[int, Options]:
        """The validated options of every parameter group, by the group's ``id``."""
        return self._groups.options

    @property
    def perturbation(self) -> Perturbation | None:
        """Moves the weights before the gradient is taken; None if the method takes its gradient at the weights."""
        self.bind()
        ascent = self._groups.ascent
        if self._perturbation is None and ascent is not None and issubclass(self.method, PerturbingMethod):
            slots = [slot for slot in self.slots if slot.is_projected]
            like = self.slots[0].parameter
            self._perturbation = Perturbation(
                self.method, slots, ascent, self._executor, self.grid, self._is_local, like
            )
        return self._perturbation

    @property
    def skipped_updates(self) -> int:
        """Calls of ``step`` that changed nothing because a gradient was not finite.

        Under ZeRO 1 to 3 DeepSpeed skips such a step itself; there, a call is one group or sub-group.
        """
        return self._counts["skipped_updates"]

    @property
    def refresh_seconds(self) -> float:
        """Seconds in which this process has found new bases, with the products on them. Waits for the device.

        It counts the first half of every call of ``step`` that renews a basis.
        """
        return self._refresh_clock.seconds()

    def metrics(self) -> dict[str, float]:
        """Metrics for a log, by name.

        How many parameters the last call of ``step`` changed by each rule, the skipped updates and new bases so far,
        and the mean rank and bytes of state of the projected matrices, the bytes summed over the ranks that share it.
        """
        stepped = [slot for slot in self.slots if slot.stepped]
        matrices = [slot for slot in self.slots if slot.is_projected]
        perturbation = self.perturbation
        return {
            "lowrank/projected_matrices": sum(slot.is_projected for slot in stepped),
            "lowrank/adamw_parameters": sum(not slot.is_projected for slot in stepped),
            "lowrank/skipped_updates": self._counts["skipped_updates"],
            "lowrank/refreshes": self._counts["refreshes"],
            "lowrank/mean_rank": sum(slot.rank for slot in matrices) / max(1, len(matrices)),
            "lowrank/state_bytes": sum(slot.state_bytes for slot in matrices),
            **(perturbation.metrics() if perturbation else {}),
        }

    def captured_energy(self) -> dict[str, float | None]:
        """How much of their gradients new bases capture, ``|H Q|^2 / |H|^2``: metrics for a log, by name.

        Collective over the ranks that share the matrices, and over the grid: steps send nothing for it.

        Returns:
            The mean and the least over the matrices that have got a new basis since the last call; None if none has, or
            it was not found in a gradient that some rank, or all together, have whole.
        """
        known = captured_energies(self.slots, self._executor, self.grid, self._is_local)
        return {
            "lowrank/captured_energy": sum(known) / len(known) if known else None,
            "lowrank/least_captured_energy": min(known, default=None),
        }

    @contextmanager
    def updates_measured(self) -> Iterator[Callable[[], float | None]]:
        """Measure how far the optimizer step in this context moves the projected matrices.

        The step takes memory for a copy of the weights of one stack, and the same bits.

        Yields:
            What returns ``|W_after - W_before| / |W_before|`` over all projected matrices of the model, after the step;
            None if it moved none. Collective over the ranks that share the matrices, and over the grid.
        """
        norms = self._update_norms = UpdateNorms()
        try:
            yield lambda: norms.ratio(self.slots, self._executor, self.grid, self._is_local)
        finally:
            self._update_norms = None

    def matrices(self) -> dict[str, dict[str, int]]:
        """Current rank, and bytes of state summed over ranks, of every matrix whose rank is not fixed, by its name."""
        return {
            slot.tag.name: {"rank": slot.rank, "state_bytes": slot.state_bytes}
            for slot in self.slots
            if "rank" in slot.state
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's state under parameter names, in plain values that ``torch.load(weights_only=True)`` reads."""
        return dump_state(self.method.name, self.slots, self._groups.param_groups, self._counts)

    def interval_of(self, parameter: torch.nn.Parameter) -> Interval | None:
        """Where this rank's elements of a parameter are stored and stepped; None if the optimizer was not given it.

        Args:
            parameter: of the model.
        """
        self.bind()
        return self._intervals.get(parameter)

    def state_pieces(self) -> Iterator[Piece]:
        """This rank's rows of the state, as pieces of logical tensors: what a checkpoint for any grid consists of."""
        yield from state_pieces(self.slots)

    def plain_state(self) -> dict[str, Any]:
        """What belongs to a checkpoint for any grid besides tensors: of this pipeline stage, the same on its ranks."""
        return plain_state(self.method.name, self.slots, self._groups.param_groups, self._counts)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_rows(self, source: Source, saved: dict[str, Any], parts: Parts = "all") -> None:
        """Load a state that was saved on whatever grid. Nothing is changed unless all of it fits.

        Args:
            source: has the pieces of :meth:`state_pieces` of all ranks.
            saved: what :meth:`plain_state` returned, of all stages.
            parts: ``all``; ``state`` without the options; or ``rest`` to begin anew with the projected matrices.

        Raises:
            CheckpointError: it belongs to another method, model or configuration; the message says which.
        """
        slots, groups = self.slots, self._groups
        frozen = [groups.name_of(parameter) for parameter in groups.left_out()]
        fixed = self.method.Options.fixed_on_resume
        counts = load_everything(self.method.name, slots, groups.param_groups, source, saved, fixed, frozen, parts)
        self._stacks = {"projected": Stacks(self.method), "rest": Stacks(None)}
        self._counts |= counts
        for slot in slots:
            slot.matrix.gathered.clear()
        if self._projected is not None:
            self._project_gradients()

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on the same layout. Nothing is changed unless all of it fits.

        Args:
            state_dict: this rank's.

        Raises:
            CheckpointError: it belongs to another method, model, layout or configuration; the message says which.
        """
        fixed = self.method.Options.fixed_on_resume
        slots, groups = self.slots, self._groups
        frozen = [groups.name_of(parameter) for parameter in groups.left_out()]
        self._stacks = {"projected": Stacks(self.method), "rest": Stacks(None)}  # the old ones keep the old state
        self._counts = load_state(self.method.name, slots, groups.param_groups, state_dict, fixed, frozen)
        for slot in slots:
            slot.matrix.gathered.clear()
            slot.matrix.energies = None
        if self._projected is not None:
            self._project_gradients()
