"""Gradients the slow way, row by row, that training is compared with."""

from __future__ import annotations

import numpy as np
import torch
from training_builders import (
    build_model,
    build_settings,
    weights_of,
)

from system.training.train import Training, train_on_plan


def trained(plan, *, tied: bool = True, active=None, **changes) -> dict[str, torch.Tensor]:
    model = build_model(tied=tied)
    train_on_plan(model, plan, build_settings(**changes), active=active)
    return weights_of(model)


def reference_gradient(model, plan, step: int, rows=None) -> dict[str, torch.Tensor]:
    """Row by row through transformers' own forward: the definition of the loss, nothing clever."""
    model.zero_grad(set_to_none=True)
    for row in plan.rows(step) if rows is None else rows:
        part = slice(plan.offsets[row], plan.offsets[row + 1])
        ids = torch.from_numpy(plan.input_ids[part].astype(np.int64))[None]
        mask = torch.from_numpy(plan.response_mask[part])[1:]
        logits = model(ids).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        (nll[mask].sum() / float(plan.denominators[step])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loop_gradient(model, plan, step: int, *, active=None, **changes) -> dict[str, torch.Tensor]:
    """The gradient that the loop hands to its optimiser."""
    with Training(model, plan, build_settings(**changes), active=active) as training:
        training._accumulate(step)
        return {name: p.grad.clone() for name, p in model.named_parameters()}
