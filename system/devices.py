"""Finds GPUs that a configuration does not use.

By default everything runs on the CPU; the section `cluster` sets the GPUs of each kind of actor.
"""

from __future__ import annotations

from system.config import ClusterConfig

_KINDS = {
    "tuner_gpus": "intervention runs",
    "scorer_gpus": "scoring",
    "train_gpus": "training",
}
"""Field of `cluster` -> the work that runs on these GPUs."""


def visible_gpus() -> int:
    """Number of GPUs that this process can use."""
    import torch

    return torch.cuda.device_count()


def idle_gpus_remark(cluster: ClusterConfig, num_gpus: int, where: str) -> str | None:
    """A remark for users if some kind of work will not use the existing GPUs; None: no remark.

    Args:
        cluster: number of GPUs of each kind of actor.
        num_gpus: number of existing GPUs.
        where: the place of the GPUs, such as `this machine`.
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
