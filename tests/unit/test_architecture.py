"""Who may import whom (docs/architecture.md draws the same picture), who touches DeepSpeed, and what imports cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ds_lowrank"

# The rooms, lowest first: a file may import its own room and those named here.
ALLOWED = {
    "errors": set(),
    "collectives": set(),
    "reference": set(),
    "linalg": set(),
    "sharding": {"errors"},
    "placement": {"errors", "sharding"},
    "methods/blocks": {"linalg", "sharding"},
    "methods": {"linalg", "methods/blocks", "sharding"},
    "environment": {"errors"},
    "optimizer": {
        "collectives",
        "environment",
        "errors",
        "linalg",
        "methods",
        "methods/blocks",
        "placement",
        "sharding",
    },
    "adapters": {"errors", "linalg", "optimizer", "placement"},
    "checkpoint": {"adapters", "collectives", "errors", "placement", "sharding"},
    "integration": {
        "adapters",
        "checkpoint",
        "collectives",
        "environment",
        "errors",
        "optimizer",
        "placement",
        "sharding",
    },
    # The parts of the two programs in launch/.
    "models": {"errors", "placement"},
    "data": {"collectives"},
    "training": {
        "checkpoint",
        "collectives",
        "data",
        "environment",
        "errors",
        "integration",
        "models",
        "optimizer",
        "placement",
    },
    "finetuning": {"adapters", "checkpoint", "collectives", "data", "errors", "models", "training"},
    "estimate": {"errors", "integration", "models", "optimizer", "placement", "sharding", "training"},
    "commands": {"checkpoint", "data", "environment", "errors", "estimate", "integration", "training"},
    "__main__": {"commands"},
}


def room_of(module):
    """The room of a module, given as the parts of its name below the package."""
    return "methods/blocks" if module[:2] == ("methods", "blocks") else module[0]


def room_of_file(path):
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below(path):
    own = room_of_file(path)
    for module in imports_of(path):
        if module.startswith("ds_lowrank."):
            other = room_of(tuple(module.split(".")[1:]))
            assert other == own or other in ALLOWED[own], f"{own} must not import {other}"


def test_the_rooms_are_few_and_every_arrow_points_down():
    """A room may import only rooms that are listed before it: there are no circles, and no arrow runs upwards."""
    rooms = list(ALLOWED)
    assert all(rooms.index(below) < rooms.index(room) for room in rooms for below in ALLOWED[room])
    assert set(rooms) == {room_of_file(path) for path in FILES}
    assert len(rooms) <= 24 and sum(map(len, ALLOWED.values())) <= 80
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("layer", ["linalg", "methods"])
def test_the_mathematics_does_not_know_about_distribution(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        assert not any(m.startswith(("torch.distributed", "deepspeed", "megatron")) for m in imports_of(path)), path


def test_references_import_nothing_else_of_the_package():
    """Also not in ``__init__.py``: an oracle that shares code with the package would share its errors."""
    imported = {module for path in (PACKAGE / "reference").glob("*.py") for module in imports_of(path)}
    own = {module for module in imported if module.split(".")[0] == "ds_lowrank"}
    assert own and all(module.startswith("ds_lowrank.reference") for module in own)
    assert {module.split(".")[0] for module in imported - own} <= {*sys.stdlib_module_names, "torch", "numpy"}


def test_only_a_few_rooms_import_deepspeed():
    users = {room_of_file(p) for p in FILES if any(m.split(".")[0] == "deepspeed" for m in imports_of(p))}
    assert users == {"adapters", "checkpoint", "environment", "finetuning", "integration", "models", "training"}


# What DeepSpeed, megatron-core and AutoTP write on parameters, and what ZeRO's wrappers call their parts.
MARKS = {
    "_TENSOR_MODEL_PARALLEL_GROUP",
    "_dp_group",
    "_hp_mapping",
    "_z3_optimizer",
    "allreduce",
    "ds_autotp_universal_checkpoint_meta",
    "ds_id",
    "ds_numel",
    "ds_pipe_replicated",
    "ds_process_group",
    "ds_shape",
    "ds_tensor",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_position",
    "parameter_offload",
    "partition_dim",
    "partition_numel",
    "partition_stride",
    "tensor_model_parallel",
}


def names_and_strings_of(path):
    """Every attribute that is read or written, and every string that is no docstring: a getattr's name, for example."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_only_placement_reads_what_deepspeed_and_megatron_write_on_parameters():
    readers = {room_of_file(p) for p in FILES if MARKS & set(names_and_strings_of(p))}
    assert readers == {"placement"}
    found = {mark for path in FILES for mark in MARKS & set(names_and_strings_of(path))}
    assert found == MARKS, "a mark that nothing reads guards nothing"


def assigned_on_objects_of_others(path):
    """Attributes that are set on something that the file did not make: ``engine.x = ...``, ``module.x[...] = ...``."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            inner = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(inner, ast.Attribute):
                root = inner.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in {"engine", "deepspeed", "torch", "utils"}:
                    yield ast.unparse(inner)


def test_what_is_changed_on_foreign_objects_is_listed_in_one_place():
    """The docstring of ds_lowrank.integration names every replaced attribute, and the file that replaces it."""
    import ds_lowrank.integration

    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path in FILES
        for name in assigned_on_objects_of_others(path)
    }
    assert found == {
        "checkpoint/restricted_load.py: engine.checkpoint_engine.load",
        "integration/clipping.py: engine.clip_fp32_gradients",
        "integration/clipping.py: engine.gradient_clipping",
        "integration/gradient_buffers.py: engine.optimizer.step",
        "integration/projected.py: engine.no_sync",
        "integration/engine_checkpoints.py: engine.load_checkpoint",
        "integration/engine_checkpoints.py: engine.save_checkpoint",
        "integration/saved_layout.py: engine.load_checkpoint",
        "integration/stock.py: deepspeed.initialize",
        "training/distributed.py: deepspeed.ops.__compatible_ops__",
    }
    listed = ds_lowrank.integration.__doc__
    assert all(entry.split(": ")[1] in listed for entry in found)
    # The other two are no assignments: setattr and list.extend, and an attribute of self.
    setters = [path.name for path in FILES if "setattr(torch.optim" in path.read_text()]
    assert setters == ["register.py"] and "torch.optim.<method>" in listed and "ZERO_SUPPORTED_OPTIMIZERS" in listed
    savers = [path.name for path in FILES if "checkpoint_engine.save =" in path.read_text()]
    assert savers == ["deferred.py"] and "checkpoint_engine.save" in listed


# What makes a tensor in torch's default dtype or on its default device where a call names neither. Both belong to the
# user's script. The dtype of integers is never the default one.
INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
FLOATS = {
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye"),
    *("rand", "randn", "normal", "linspace", "logspace"),
}


def follows_torchs_defaults(call):
    function, _, name = ast.unparse(call.func).rpartition(".")
    given = {keyword.arg for keyword in call.keywords}
    if function != "torch":
        return False
    if name == "where":  # of two numbers
        return all(isinstance(value, ast.Constant | ast.UnaryOp) for value in call.args[1:])
    if name == "Generator":
        return not call.args and "device" not in given
    if name in INTEGERS:
        return "device" not in given
    return name in FLOATS and not {"dtype", "device"} <= given


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_new_tensor_names_its_dtype_and_device(path):
    """References are exempt: they are the paper's words, run under torch's own defaults."""
    if room_of_file(path) == "reference":
        return
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and follows_torchs_defaults(node)]
    assert not calls, [f"line {call.lineno}: {ast.unparse(call)}" for call in calls]
    imported = {
        a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "torch" for a in n.names
    }
    assert not imported & (INTEGERS | FLOATS), "call it as torch.zeros, for example, so that this test sees it"


def test_importing_the_package_imports_neither_deepspeed_nor_transformers_and_patches_nothing():
    code = (
        "import sys, torch; before = set(dir(torch.optim)); import ds_lowrank;"
        "assert set(dir(torch.optim)) == before;"
        "bad = {'deepspeed', 'megatron', 'apex', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_imports_where_deepspeed_megatron_and_apex_are_missing():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['deepspeed', 'megatron', 'apex']));"
        "import torch, ds_lowrank; w = torch.nn.Parameter(torch.ones(4, 4)); w.grad = torch.eye(4);"
        "ds_lowrank.GaLore([('w', w)], rank=2).step()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
