"""The held-out loss of a training, measured at its checkpoints.

It decides only which checkpoint is the best.  It uses no gradient, no dropout, and no random
numbers, so the trained weights are the same bits with and without it.
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
    """Mean nats per response token of held-out rows with the current weights.

    All ranks must call it.

    Args:
        training: entered.
        plan: the held-out rows; its steps only divide them into batches.

    Returns:
        The same number on all ranks; the same bits at the same world size.

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
        # FSDP reshards the outermost parameters in the backward pass.  Without it, the next
        # checkpoint would find unsharded parameters, which the optimiser does not know.
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
            f"the held-out loss of the current weights is not finite ({nll} over {labels:.0f} "
            "tokens): the training diverged. Lower train.learning_rate; the newest checkpoint has "
            "finite weights."
        )
    return nll / labels
