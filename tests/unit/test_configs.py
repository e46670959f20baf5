from pathlib import Path

import pytest
import yaml

from system.config.load import load_config, parse_config
from system.devices import idle_gpus_remark

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_configuration_loads(path: Path) -> None:
    load_config(str(path))


def test_the_gpu_example_uses_the_same_gpus_for_measuring_and_for_training() -> None:
    config = load_config(str(ROOT / "configs" / "gpu.yaml"))
    cluster = config.cluster
    measuring = cluster.num_tuners * cluster.tuner_gpus + cluster.num_scorers * cluster.scorer_gpus
    assert isinstance(config.train.num_workers, int)
    assert measuring == config.train.num_workers * cluster.train_gpus == 4
    assert idle_gpus_remark(cluster, 4, "this machine") is None
    assert config.model.dtype == "bfloat16"


def test_the_configuration_inside_the_manifest_loads() -> None:
    documents = yaml.safe_load_all((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    (config,) = [document for document in documents if document["kind"] == "ConfigMap"]
    parsed = parse_config(yaml.safe_load(config["data"]["run.yaml"]), where="rayjob.yaml")
    assert parsed.cluster.address == "auto", "on a cluster the job must join the Ray it runs in"
