"""Nobody's GPUs stay idle without a word."""

import pytest
import torch

from system.config import ClusterConfig
from system.devices import idle_gpus_remark, visible_gpus


def test_gpus_that_get_no_work_are_named_with_the_keys_that_give_it() -> None:
    remark = idle_gpus_remark(ClusterConfig(), 8, "this machine")
    assert remark is not None and remark.startswith("this machine has 8 GPUs, but ")
    for name in ("cluster.tuner_gpus", "cluster.scorer_gpus", "cluster.train_gpus", "bfloat16"):
        assert name in remark


def test_one_kind_of_work_left_to_the_cpu_is_named_alone() -> None:
    cluster = ClusterConfig(tuner_gpus=1, scorer_gpus=0.5)
    remark = idle_gpus_remark(cluster, 1, "this machine")
    assert remark is not None and "1 GPU, but training will run on the CPU" in remark
    assert "cluster.train_gpus is 0" in remark and "scorer_gpus" not in remark


@pytest.mark.parametrize(
    ("cluster", "num_gpus"),
    [(ClusterConfig(), 0), (ClusterConfig(tuner_gpus=1, scorer_gpus=1, train_gpus=1), 4)],
    ids=["no GPUs", "all in use"],
)
def test_otherwise_there_is_nothing_to_say(cluster: ClusterConfig, num_gpus: int) -> None:
    assert idle_gpus_remark(cluster, num_gpus, "this machine") is None


def test_the_count_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert visible_gpus() == 3
