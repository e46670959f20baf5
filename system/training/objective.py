"""The training objective of a causal language model: token losses at label positions.

The layout (`layout.py`) decides how rows are arranged in a pass and how the language-model head is
applied; the losses are the same with every layout.

M = labels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from system.training.loss import head_loss, logit_form
from system.training.microbatch import Layout, MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(torch.nn.Module):
    """Token losses of a micro-batch.

    It is a module, because FSDP gathers sharded parameters when a module is called.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.layout = Layout(is_flat=False, head="whole")
        self.form = logit_form(model.config.get_text_config())

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the token losses in nats (differentiable), and [M] float32 losses (detached)."""
        with self._precision(batch.input_ids.device):
            if self.layout.head == "blocks":
                head: Any = self.model.get_output_embeddings()
                return head_loss(
                    _at_labels(self._hidden(batch), batch),
                    head.weight,
                    getattr(head, "bias", None),
                    batch.targets,
                    self.compute_dtype,
                    self.form,
                )
            if self.layout.head == "labels":
                logits = self._label_logits(batch)
            else:
                logits = _at_labels(self._logits(batch), batch)
        nll_M = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        return nll_M.sum(), nll_M.detach()

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if batch.segments is None:
            inputs["attention_mask"] = batch.attention_mask
        else:
            inputs["segments"] = batch.segments
        return inputs

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        return self.model.get_decoder()(**self._inputs(batch)).last_hidden_state

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        return self.model(**self._inputs(batch)).logits

    def _label_logits(self, batch: MicroBatch) -> torch.Tensor:
        """[M, V] logits of the model itself; a hook keeps the other tokens away from its head."""
        head: Any = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(
            lambda _, inputs: (_at_labels(inputs[0], batch)[None], *inputs[1:])
        )
        try:
            return self._logits(batch)[0]
        finally:
            hook.remove()


def _at_labels(states: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """[M, ...] of [B, L, ...]: the states at the position before each label."""
    return states.flatten(0, 1).index_select(0, batch.label_positions)
