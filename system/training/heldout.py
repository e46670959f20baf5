"""The held-out loss that a training measures on itself, at its checkpoints.

It decides which checkpoint is the best one, and nothing else: no gradient, no dropout, no random
number is taken, so a training ends in the same bits with it and without it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from system.errors import StageError
from system.training.plan import TrainPlan
from system.training.train import Training


def held_out_loss(training: Training, plan: TrainPlan) -> float:
    """Mean nats per response token of a plan's rows under the weights of now; all ranks call it.

    Args:
        training: entered.
        plan: rows that it does not train on; its steps are only a way to cut them up.

    Returns:
        The same number on all ranks; equal bits at equal world size.

    Raises:
        StageError: the loss is not finite.
    """
    totals = np.zeros(2)
    training.model.eval()
    try:
        with torch.no_grad():
            for step in range(plan.num_steps):
                for rows, counts in training.passes(plan, step):
                    total, nll_M = training.objective(training.microbatch(plan, rows))
                    if counts:
                        totals += float(total), len(nll_M)
    finally:
        training.model.train()
        # Without a backward pass nothing shards the outermost parameters again, and whoever saves
        # next would find whole ones that the optimiser does not know.
        for module in training.objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    summed = torch.from_numpy(totals)
    if training.group is not None:
        summed = summed.to(training.device)
        dist.all_reduce(summed, group=training.group)
    nll, labels = summed.tolist()
    if not np.isfinite(nll):
        raise StageError(
            f"the held-out loss of the weights so far is not finite ({nll} over {labels:.0f} "
            "tokens): the training diverged. Lower train.learning_rate; the weights of the newest "
            "checkpoint are whole."
        )
    return nll / labels
