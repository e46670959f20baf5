"""Data parallelism: parameters and gradients are replicated on all ranks, or sharded over them.

Both ways *sum* gradients over ranks (the loss is already divided by the tokens of the whole step),
compute the same global norm, and use the same optimiser, so they train the same model.

    Replicated   one flat gradient buffer, which is zeroed, all-reduced, and clipped as a whole
    Sharded      FSDP2 (`fully_shard`): parameters, gradients, and optimiser state are sharded;
                 every rank must make the same number of forward passes
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from system.training.objective import Objective
from system.training.optim import build_optimizer
from system.training.settings import TrainSettings


class Parallel(Protocol):
    """The interface that the training loop uses."""

    optimizer: torch.optim.AdamW
    needs_equal_passes: bool

    def zero_gradient(self) -> None:
        """Starts a step."""
        ...

    def sum_gradient(self) -> None:
        """Sums the gradient over all ranks."""
        ...

    def clip_gradient(self, max_norm: float) -> float:
        """Scales the gradient to at most `max_norm`; returns its 2-norm before, over all ranks."""
        ...

    def close(self) -> None:
        """Frees gradients and optimiser state."""
        ...


def make_parallel(
    objective: Objective, settings: TrainSettings, group: dist.ProcessGroup | None
) -> Parallel:
    """The way that the settings name; a single process is never sharded."""
    if settings.parallel == "fsdp" and group is not None:
        return Sharded(objective, settings, group)
    return Replicated(objective, settings, group)


class Replicated:
    """Every rank holds all parameters, gradients, and optimiser state."""

    needs_equal_passes = False

    def __init__(
        self, objective: Objective, settings: TrainSettings, group: dist.ProcessGroup | None
    ) -> None:
        self._group = group
        self._parameters = [p for p in objective.model.parameters() if p.requires_grad]
        self._flat = torch.zeros(
            sum(p.numel() for p in self._parameters),
            device=self._parameters[0].device,
            dtype=torch.float32,
        )
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.grad = self._flat[start:stop].view_as(parameter)
            start = stop
        self.optimizer = build_optimizer(objective.model.named_parameters(), settings)

    def zero_gradient(self) -> None:
        """Starts a step."""
        self._flat.zero_()

    def sum_gradient(self) -> None:
        """Sums the flat gradient over the group."""
        if self._group is not None:
            dist.all_reduce(self._flat, group=self._group)

    def clip_gradient(self, max_norm: float) -> float:
        """Scales the gradient to at most `max_norm`; returns its norm before."""
        norm = float(torch.linalg.vector_norm(self._flat))
        if norm > max_norm:
            self._flat.mul_(max_norm / norm)
        return norm

    def close(self) -> None:
        """Frees the gradient buffer and the optimiser."""
        for parameter in self._parameters:
            parameter.grad = None
        del self._flat, self.optimizer


class Sharded:
    """Every rank holds its shard; FSDP gathers a layer when it is used."""

    needs_equal_passes = True

    def __init__(
        self, objective: Objective, settings: TrainSettings, group: dist.ProcessGroup
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._group = group
        device = next(objective.model.parameters()).device
        mesh = DeviceMesh.from_group(group, device.type)
        lower = objective.compute_dtype != torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=objective.compute_dtype if lower else None,
            reduce_dtype=torch.float32 if lower else None,
        )
        for layer in decoder_layers(objective.model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=policy)
        # FSDP averages by default; the loss is already divided, so gradients must be summed.
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._parameters = [p for p in objective.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            objective.model.named_parameters(), settings, is_sharded=True
        )

    def zero_gradient(self) -> None:
        """Starts a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def sum_gradient(self) -> None:
        """Adds missing zero gradients; the sum itself is part of the backward pass of FSDP."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip_gradient(self, max_norm: float) -> float:
        """Scales the gradient to at most `max_norm`; returns its norm over all shards before."""
        shards = [_local(parameter.grad) for parameter in self._parameters]
        squares = torch.stack([shard.double().square().sum() for shard in shards]).sum()
        dist.all_reduce(squares, group=self._group)
        norm = float(squares.sqrt())
        if norm > max_norm:
            for shard in shards:
                shard.mul_(max_norm / norm)
        return norm

    def close(self) -> None:
        """Frees gradients and optimiser state; the parameters stay sharded."""
        self.optimizer.zero_grad(set_to_none=True)
        del self.optimizer


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a transformer: the longest list of modules of one type in it."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0]
    same = [m for m in lists if len({type(child) for child in m}) == 1]
    return list(max(same, key=len)) if same else []


def _local(gradient: Any) -> torch.Tensor:
    return gradient.to_local()
