"""The KubeRay manifests: fields that exist, the operator's own rules, and room for every actor."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_names import validation_schema

from system.config import RunConfig
from system.config.load import parse_config

ROOT = Path(__file__).parents[2]
JOB = ROOT / "deploy/kuberay/rayjob.yaml"
STORAGE = ROOT / "deploy/kuberay/storage.yaml"
SHARED_CPUS = 0.5
"""Of one actor that waits for storage most of the time."""


def documents(path: Path) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def cluster_spec() -> dict[str, Any]:
    return documents(JOB)["RayJob"]["spec"]["rayClusterSpec"]


def pod_specs() -> dict[str, dict[str, Any]]:
    """Every pod of the manifests by name."""
    cluster = cluster_spec()
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    pods = {name: group["template"]["spec"] for name, group in groups.items()}
    return pods | {"shell": documents(STORAGE)["Pod"]["spec"]}


def problems(value: Any, definition: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(validation_schema(definition))
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in validator.iter_errors(value)
    ]


def test_the_rayjob_has_only_fields_that_exist() -> None:
    assert problems(documents(JOB)["RayJob"], "RayJob") == []


def test_the_shells_pod_has_only_fields_that_exist() -> None:
    assert problems(documents(STORAGE)["Pod"]["spec"], "Pod") == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda job: job["spec"].update(entryPoint="x"), "entryPoint"),
        (lambda job: job["spec"].update(backoffLimit="2"), "is not of type 'integer'"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"), "required property"),
        (
            lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
            "required property",
        ),
        (
            lambda job: job["spec"]["rayClusterSpec"].update(authOptions={"mode": "tokens"}),
            "is not one of",
        ),
        (
            lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
                "containers"
            ][0].update(envfrom=[]),
            "envfrom",
        ),
    ],
    ids=["unknown", "type", "required", "required-in-list", "choice", "deep"],
)
def test_the_check_catches_a_mistake(change: Any, complaint: str) -> None:
    job = documents(JOB)["RayJob"]
    change(job)
    (problem,) = problems(job, "RayJob")
    assert complaint in problem


def test_the_operators_own_rules_are_kept() -> None:
    job = documents(JOB)["RayJob"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # ttlSecondsAfterFinished needs it
    for name, pod in pod_specs().items():
        if name != "shell":
            assert pod["restartPolicy"] == "Never"  # the second version of the autoscaler needs it


def test_the_entrypoint_is_one_command() -> None:
    """The submitter gives it to a shell of its own: what followed `&&` or `;` would run there."""
    entrypoint = documents(JOB)["RayJob"]["spec"]["entrypoint"]
    assert not re.search(r"[;&|<>$`\n]", entrypoint)
    assert entrypoint == "instructmix run /etc/instructmix/run.yaml"


def test_pods_start_only_when_a_stage_asks_for_them() -> None:
    cluster = cluster_spec()
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group.get("replicas", 0) == 0
    env = pod_specs()["head"]["containers"][0]["env"]
    (timeout,) = [e["value"] for e in env if e["name"] == "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]
    assert int(timeout) >= 900, "training must outwait the start of a GPU node"


def test_every_pod_may_write_to_the_shared_volume() -> None:
    (user,) = re.findall(r"useradd .*--uid (\d+)", (ROOT / "deploy/Dockerfile").read_text())
    for pod in pod_specs().values():
        security = pod["securityContext"]
        assert security["runAsUser"] == security["fsGroup"] == int(user)
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts["shared"] == "/shared"
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == "shared"]
        name = documents(STORAGE)["PersistentVolumeClaim"]["metadata"]["name"]
        assert claims == [{"claimName": name}]


def test_all_pods_run_one_image_of_the_installed_ray() -> None:
    assert len({pod["containers"][0]["image"] for pod in pod_specs().values()}) == 1
    (minor,) = re.findall(r"ray\[.*\]>=(\d+\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert cluster_spec()["rayVersion"].startswith(f"{minor}.")


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Actors of one kind, each with the same resources."""

    name: str
    number: int
    cpus: float
    gpus: float = 0.0


@dataclass(kw_only=True)
class Pod:
    """What of a pod is free."""

    cpus: float
    gpus: float

    def takes(self, actor: Actors) -> bool:
        """Places one actor where it fits; no work without GPUs goes to pods that have some."""
        fits = self.cpus >= actor.cpus and self.gpus >= actor.gpus
        if not fits or (self.gpus > 0) != (actor.gpus > 0):
            return False
        self.cpus -= actor.cpus
        self.gpus -= actor.gpus
        return True


def quantity(resources: dict[str, Any], name: str) -> float:
    """As the operator reads it: the limit, else the request."""
    given = str(resources["limits"].get(name, resources["requests"].get(name, "0")))
    return float(given[:-1]) / 1000 if given.endswith("m") else float(given)


def largest_cluster() -> list[Pod]:
    """All pods that the groups can scale to."""
    pods = []
    for group in cluster_spec()["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        cpus = quantity(container["resources"], "cpu")
        gpus = quantity(container["resources"], "nvidia.com/gpu")
        pods += [Pod(cpus=cpus, gpus=gpus) for _ in range(group["maxReplicas"])]
    return pods


def together(config: RunConfig) -> Iterator[tuple[str, list[Actors]]]:
    """The actors that are up at the same time, by stage."""
    cluster, cpus = config.cluster, config.cluster.actor_cpus
    scorers = Actors(name="scorer", number=cluster.num_scorers, cpus=cpus, gpus=cluster.scorer_gpus)
    tuners = Actors(name="tuner", number=cluster.num_tuners, cpus=cpus, gpus=cluster.tuner_gpus)
    workers = config.train.num_workers
    trainers = Actors(
        name="training worker",
        number=workers if isinstance(workers, int) else workers[1],
        cpus=cpus,
        gpus=cluster.train_gpus,
    )

    def shared(name: str) -> Actors:
        return Actors(name=name, number=cluster.num_ingestors, cpus=SHARED_CPUS)

    yield "ingest", [shared("ingestor")]
    yield "model", [Actors(name="modeler", number=1, cpus=cpus)]
    yield "tag", [scorers, shared("measurer")]
    yield "influence", [tuners, scorers]
    yield "select by text", [shared("selector"), shared("featurer")]
    yield "select by model", [shared("selector"), scorers]
    yield "train and evaluate", [trainers]
    yield "answers", [scorers]


def without_room(stage: list[Actors], pods: list[Pod]) -> list[str]:
    actors = sorted(stage, key=lambda kind: (kind.gpus, kind.cpus), reverse=True)
    return [
        f"{kind.name} {index}"
        for kind in actors
        for index in range(kind.number)
        if not any(pod.takes(kind) for pod in pods)
    ]


def manifest_config() -> RunConfig:
    text = documents(JOB)["ConfigMap"]["data"]["run.yaml"]
    return parse_config(yaml.safe_load(text), where="rayjob.yaml")


def test_every_stage_of_the_configuration_fits_what_the_groups_scale_to() -> None:
    for stage, actors in together(manifest_config()):
        assert without_room(actors, largest_cluster()) == [], stage


@pytest.mark.parametrize(
    ("field", "stage"),
    [
        ("num_ingestors", "ingest"),
        ("actor_cpus", "model"),
        ("num_scorers", "tag"),
        ("num_tuners", "influence"),
        ("train_gpus", "train and evaluate"),
    ],
)
def test_a_configuration_that_asks_for_more_is_noticed(field: str, stage: str) -> None:
    config = manifest_config()
    more = {field: 3 * getattr(config.cluster, field)}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=more)})
    assert without_room(dict(together(config))[stage], largest_cluster())


def test_no_gpu_pod_is_asked_for_before_a_scorer_is() -> None:
    without_gpus = [pod for pod in largest_cluster() if pod.gpus == 0]
    stages = dict(together(manifest_config()))
    assert without_room(stages["ingest"], without_gpus) == []
    assert without_room(stages["model"], without_gpus) == []


def test_all_kinds_of_actors_are_counted_here() -> None:
    """A module that starts actors of its own belongs into `together`."""
    launchers = {
        path.stem
        for path in (ROOT / "actors").rglob("*.py")
        if re.search(r"(?<!class )ActorSpec\($|\(TorchTrainer\):$", path.read_text(), re.MULTILINE)
    }
    assert launchers == {
        "features", "fit", "ingestor", "intervention_runner", "modeler", "scorer", "selector",
        "token_counter",
    }  # fmt: skip
