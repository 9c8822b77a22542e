"""The manifests in launch/kubernetes/ have only fields of the API, and name programs, files and an image that exist.

Fields are compared with the models of Kubeflow Trainer's own client, which has Kubernetes' types too. Those of an
MPIJob around its pods are written here, from the reference of ``kubeflow.org/v2beta1``: no package has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import ds_lowrank
from tests.unit.pages import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
TRAIN_JOB, MPI_JOB, STORAGE = (
    yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("trainjob", "mpijob", "storage")
)

WHOLE, TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


REPLICAS = fields(
    ("template",),
    replicas=WHOLE,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template={"type": "object"},  # a PodTemplateSpec
)
MPI_JOB_SCHEMA = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata={"type": "object"},
    spec=fields(
        ("mpiReplicaSpecs",),
        slotsPerWorker=WHOLE,
        runLauncherAsWorker={"type": "boolean"},
        sshAuthMountPath=TEXT,
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        runPolicy=fields(
            cleanPodPolicy={"enum": ["Running", "All", "None"]},
            ttlSecondsAfterFinished=WHOLE,
            activeDeadlineSeconds=WHOLE,
            backoffLimit=WHOLE,
            suspend={"type": "boolean"},
            managedBy=TEXT,
            schedulingPolicy=fields(
                minAvailable=WHOLE,
                queue=TEXT,
                minResources={"type": "object"},
                priorityClass=TEXT,
                scheduleTimeoutSeconds=WHOLE,
            ),
        ),
        mpiReplicaSpecs=fields(("Launcher", "Worker"), Launcher=REPLICAS, Worker=REPLICAS),
    ),
)


def model(name: str) -> Any:
    """A type of the API, as a pydantic model."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    return getattr(models, name)


def check_train_job(manifest: dict[str, Any]) -> None:
    check(model("TrainerV1alpha1TrainJob"), manifest)


def check_mpi_job(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, MPI_JOB_SCHEMA)
    for replicas in manifest["spec"]["mpiReplicaSpecs"].values():
        check(model("IoK8sApiCoreV1PodTemplateSpec"), replicas["template"])


def check(kind: Any, manifest: dict[str, Any]) -> None:
    """Raise if a field is unknown, which a cluster would drop in silence, or of another type."""
    known = kind.from_dict(manifest).to_dict()
    assert known == manifest


CHECKS = [pytest.param(check_train_job, TRAIN_JOB, id="trainjob"), pytest.param(check_mpi_job, MPI_JOB, id="mpijob")]


@pytest.mark.parametrize(("check_job", "manifest"), CHECKS)
def test_every_field_is_in_the_api(check_job, manifest):
    check_job(manifest)


def places(node: Any) -> list[dict[str, Any]]:
    """All objects of a manifest, except maps with free keys."""
    if isinstance(node, list):
        return [found for item in node for found in places(item)]
    if not isinstance(node, dict):
        return []
    free = ("metadata", "requests", "limits")
    return [node, *(found for key, value in node.items() if key not in free for found in places(value))]


@pytest.mark.parametrize(("check_job", "manifest"), CHECKS)
def test_a_field_that_the_api_does_not_have_is_found_wherever_it_is(check_job, manifest):
    wrong = copy.deepcopy(manifest)
    found = places(wrong)
    assert len(found) > 20
    for place in found:
        place["replicaz"] = 1
        with pytest.raises(Exception):  # noqa: B017  # of jsonschema, of pydantic, or an AssertionError
            check_job(wrong)
        del place["replicaz"]
    check_job(wrong)


def test_the_claim_is_one_and_is_the_one_that_the_jobs_use():
    kind = model("IoK8sApiCoreV1PersistentVolumeClaimSpec")
    check(kind, STORAGE["spec"])
    assert (STORAGE["apiVersion"], STORAGE["kind"]) == ("v1", "PersistentVolumeClaim")
    used = {
        place["persistentVolumeClaim"]["claimName"]
        for job in (TRAIN_JOB, MPI_JOB)
        for place in places(job)
        if "persistentVolumeClaim" in place
    }
    assert used == {STORAGE["metadata"]["name"]}


def containers() -> list[dict[str, Any]]:
    """The trainer of the TrainJob and the containers of the MPIJob."""
    replicas = MPI_JOB["spec"]["mpiReplicaSpecs"]
    return [TRAIN_JOB["spec"]["trainer"], *(pod["template"]["spec"]["containers"][0] for pod in replicas.values())]


def test_the_image_is_that_of_this_version():
    assert {container["image"] for container in containers()} == {f"ds-lowrank:{ds_lowrank.__version__}"}


def test_the_commands_parse_and_are_the_same_run():
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    from ds_lowrank.training import arguments as pretrain

    launchers: dict[str, Callable[[list[str]], Any]] = {
        "deepspeed": runner.parse_args,
        "torchrun": get_args_parser().parse_args,
    }
    runs = []
    for launcher, *words in (container["args"] for container in containers()[:2]):
        launchers[launcher](words)
        flags = words[words.index("launch/pretrain.py") + 1 :]
        arguments = pretrain.parse(flags)
        assert Path(ROOT, arguments.deepspeed_config).is_file() and Path(ROOT, arguments.model).is_file()
        assert arguments.resume == ""
        runs.append(flags)
    assert runs[0] == runs[1]


def test_the_run_has_as_many_ranks_as_gpus_and_time_to_save():
    trainer, spec = TRAIN_JOB["spec"]["trainer"], MPI_JOB["spec"]
    assert trainer["numProcPerNode"] == int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])
    (worker,) = spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert spec["slotsPerWorker"] == int(worker["resources"]["limits"]["nvidia.com/gpu"])
    (grace,) = (
        place["terminationGracePeriodSeconds"]
        for place in places(TRAIN_JOB)
        if "terminationGracePeriodSeconds" in place
    )
    (waits,) = (int(word.partition("=")[2]) for word in trainer["args"] if word.startswith("--shutdown-timeout"))
    assert waits < grace
