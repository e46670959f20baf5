"""Where GPUs are and the configuration leaves them idle.

By default everything runs on the CPU: a configuration says how many GPUs each kind of actor takes.
"""

from __future__ import annotations

from system.config import ClusterConfig

_KINDS = {
    "tuner_gpus": "intervention runs",
    "scorer_gpus": "scoring",
    "train_gpus": "training",
}
"""Field of `cluster` -> what runs on these GPUs."""


def visible_gpus() -> int:
    """How many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()


def idle_gpus_remark(cluster: ClusterConfig, num_gpus: int, where: str) -> str | None:
    """What to tell a user whose GPUs do not get all kinds of work; None: nothing.

    Args:
        cluster: how many GPUs each kind of actor takes.
        num_gpus: how many there are.
        where: who has them, such as `this machine`.
    """
    fields = [field for field in _KINDS if getattr(cluster, field) == 0]
    if num_gpus == 0 or not fields:
        return None
    names = ", ".join(f"cluster.{field}" for field in fields)
    work = " and ".join(_KINDS[field] for field in fields)
    return (
        f"{where} has {num_gpus} GPU{'s' if num_gpus > 1 else ''}, but {work} will run on the CPU: "
        f"{names} {'is' if len(fields) == 1 else 'are'} 0. Set them, and model.dtype to bfloat16, "
        "as configs/gpu.yaml does"
    )
