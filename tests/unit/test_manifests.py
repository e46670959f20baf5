"""The KubeRay manifests against the operator's definitions and the rules its webhook adds."""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from system.load import parse_config

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy/kuberay/rayjob.yaml"


def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def definitions() -> Path:
    given = os.environ.get("INSTRUCTMIX_KUBERAY_CRDS")
    folder = Path(given) if given else ROOT.parent / "shared/data/kuberay"
    if not folder.is_dir():
        pytest.skip("no KubeRay definitions at hand: set INSTRUCTMIX_KUBERAY_CRDS to their folder")
    return folder


def strict(schema: Any) -> Any:
    """The openAPI schema as JSON schema that refuses unknown fields, as the API server prunes."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return result


def rayjob_validator() -> jsonschema.Draft202012Validator:
    text = (definitions() / "ray.io_rayjobs.yaml").read_text()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(strict(schema))


def test_rayjob_fits_the_custom_resource_definition() -> None:
    errors = [
        f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}"
        for e in rayjob_validator().iter_errors(documents()["RayJob"])
    ]
    assert errors == []


def test_the_check_would_catch_a_misspelt_field() -> None:
    job = documents()["RayJob"]
    job["spec"]["entryPoint"] = job["spec"].pop("entrypoint")
    assert list(rayjob_validator().iter_errors(job))


def test_rayjob_keeps_the_operators_own_rules() -> None:
    job = documents()["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    assert len(job["metadata"]["name"]) <= 47
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # ttlSecondsAfterFinished needs it
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in templates:
        assert group["template"]["spec"]["restartPolicy"] == "Never"  # autoscaler v2 needs it
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # no work on the head


def test_training_group_holds_all_workers_of_the_configuration() -> None:
    everything = documents()
    config = parse_config(yaml.safe_load(everything["ConfigMap"]["data"]["run.yaml"]), "manifest")
    groups = {
        group["groupName"]: group
        for group in everything["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    train = groups["gpu-train"]
    limits = train["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert train["minReplicas"] == train["maxReplicas"] == train["replicas"]
    have = train["replicas"] * int(limits["nvidia.com/gpu"])
    assert isinstance(config.train.num_workers, int)
    assert have >= config.train.num_workers * config.cluster.train_gpus
    assert (
        groups["gpu-score"]["maxReplicas"] >= config.cluster.num_scorers + config.cluster.num_tuners
    )
