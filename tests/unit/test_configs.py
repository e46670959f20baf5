from pathlib import Path

import pytest
import yaml

from system.load import load_config, parse_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_configuration_loads(path: Path) -> None:
    load_config(str(path))


def test_the_configuration_inside_the_manifest_loads() -> None:
    documents = yaml.safe_load_all((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    (config,) = [document for document in documents if document["kind"] == "ConfigMap"]
    parsed = parse_config(yaml.safe_load(config["data"]["run.yaml"]), where="rayjob.yaml")
    assert parsed.cluster.address == "auto", "on a cluster the job must join the Ray it runs in"
