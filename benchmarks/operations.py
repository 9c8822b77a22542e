"""How many operations an ordinary step makes, each of which is at least one kernel on a GPU.

pip install galore-torch==1.0
python -m benchmarks.operations

Counted are operators that compute, copy or fill, also in place. Views launch nothing and are left out. What has a
column of its own is no kernel: *allocations*, and *reads* of one number from a tensor (``item``; a ``tolist`` calls no
operator on a CPU), for which the host waits if the tensor is on a GPU, as the step counts of torch's AdamW are not. An
operator on a list of tensors (``torch._foreach_*``, the fused AdamW) counts once, although a GPU launches it in pieces
of some dozens of tensors.

The parameters are those of a LLaMA 1B with sizes divided by 16, so that this runs on a CPU in seconds. What the counts
depend on is the model's: the layers and, since a CPU cuts int8 moments into pieces of a 256th of a GPU's, the pieces.
*a matrix* divides by the 168 projected matrices; the count includes AdamW on the rest.

*compiled* counts what a card runs: random matrices and moments in 8 and 16 bits are made by functions that are compiled
there (:mod:`ds_lowrank.linalg.compiled`), each call of which counts once. It may be a few kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Numbers, options, report
from benchmarks.gpu.cases import is_projected, llama_shapes, model_config
from benchmarks.ordinary import ready, refreshes_of, with_gradients
from ds_lowrank.linalg import dither, quantization, sketch

MODEL, DIVISOR, RANK = "1b", 16, 8
"""The rank is to the hidden size as 128 to 2048."""
FREQUENT = 5
UNDECLARED_VIEWS = {"_unsafe_view"}
"""Operators whose result shares the argument's memory, although their schema does not say so."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
READ = "_local_scalar_dense"
WITH_COMPILED = (dither, quantization, sketch)
"""The modules that call functions which are compiled on a card."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are called while it is active, whatever the device of their tensors.

    Attributes:
        kernels: Calls of operators that compute, copy or fill, by the operator's name.
        allocations: How many calls only allocated.
        reads: How many calls read a number from a tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.allocations = self.reads = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count one call, then make it."""
        namespace, _, name = func._schema.name.partition("::")
        if name in ALLOCATIONS:
            self.allocations += 1
        elif name == READ:
            self.reads += 1
        elif not func.is_view and name not in UNDECLARED_VIEWS and namespace != "profiler":
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], object]) -> Operations:
    """Call a function and return what it called."""
    operations = Operations()
    with operations:
        step()
    return operations


@contextmanager
def compiled_as_one(operations: Operations) -> Iterator[None]:
    """Count every call of a function that is compiled on a card as one operation.

    Args:
        operations: Counts; active in the body.
    """
    own = {
        (module, name): function
        for module in WITH_COMPILED
        for name, function in vars(module).items()
        if isinstance(function, FunctionType) and hasattr(function, "__wrapped__")
    }

    def as_one(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: torch.Tensor) -> Any:
            operations.kernels[name] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*tensors)

        return run

    for (module, name), function in own.items():
        setattr(module, name, as_one(name, function))
    try:
        yield
    finally:
        for (module, name), function in own.items():
            setattr(module, name, function)


def counted_on_a_card(step: Callable[[], object]) -> Operations:
    """Call a function and return what it called, compiled functions as one each."""
    operations = Operations()
    with operations, compiled_as_one(operations):
        step()
    return operations


def shapes(layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the scaled model by its name.

    Args:
        layers: How many layers it has; None for as many as the model has.
    """
    config = model_config(MODEL)
    scaled = {key: config[key] // DIVISOR for key in ("hidden_size", "intermediate_size", "vocab_size")}
    return llama_shapes(config | scaled | ({} if layers is None else {"num_hidden_layers": layers}))


def measure(seed: int, layers: int | None = None) -> Numbers:
    """Return one record for each optimizer and dtype of its moments.

    Args:
        seed: Of weights, gradients and sketches.
        layers: Layers of the model; None for all.

    Raises:
        RuntimeError: A counted step refreshed a basis.
    """
    parameters = with_gradients(shapes(layers), seed)
    matrices = sum(map(is_projected, parameters))
    optimizers = ready(parameters, RANK, seed)
    before = refreshes_of(optimizers)
    found = {key: counted(optimizer.step) for key, optimizer in sorted(optimizers.items())}
    compiled = {key: counted_on_a_card(optimizer.step) for key, optimizer in sorted(optimizers.items())}
    if refreshes_of(optimizers) != before:
        raise RuntimeError("a counted step refreshed a basis: the counts would not be those of ordinary steps")
    return [
        {
            "optimizer": name,
            "state_dtype": state_dtype,
            "operations": operations.kernels.total(),
            "a matrix": operations.kernels.total() / matrices,
            "compiled": compiled[name, state_dtype].kernels.total(),
            "allocations": operations.allocations,
            "reads": operations.reads,
            "most frequent": ", ".join(f"{each} {count}" for each, count in operations.kernels.most_common(FREQUENT)),
        }
        for (name, state_dtype), operations in found.items()
    ]


def main() -> None:
    """Count and report."""
    arguments = options(__doc__).parse_args()
    report(measure(arguments.seed, 1 if arguments.quick else None), arguments)


if __name__ == "__main__":
    main()
