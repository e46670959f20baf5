"""Optional speed: Liger kernels in the layers, and torch.compile for every decoder layer.

Both are checked.  With Liger's kernels, the model must give the same losses as before on the probe
rows of `layout.py`.  If something cannot be used, an error says what is missing; there is no silent
fallback.  The loss is always the one of `loss.py`, which does not store logits.

Source: Liger Kernel, arXiv 2410.10989; `torch.compile`, PyTorch 2 (ASPLOS 2024).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from system.errors import ConfigError, ModelError
from system.training import attention
from system.training.layout import probe_losses
from system.training.objective import Objective
from system.training.parallel import decoder_layers

Kernels = Literal["auto", "torch", "liger"]
_TOLERANCE = 1e-3
"""Allowed difference of losses, in nats per token, float32.  Wrong positions or wrong weights cause
differences that are orders of magnitude larger."""


def resolve_kernels(
    requested: Kernels, model_type: str, device: torch.device
) -> Literal["torch", "liger"]:
    """Which kernels a training uses; a pure function of the configuration, model, and device.

    Args:
        requested: `train.kernels`; `auto` uses Liger's kernels wherever they work.
        model_type: of the model's configuration.
        device: of the worker.

    Raises:
        ConfigError: `liger` is requested but cannot be used; the message names what is missing.
    """
    if requested == "torch":
        return "torch"
    missing = _missing_requirement(model_type, device)
    if missing is None:
        return "liger"
    if requested == "auto":
        return "torch"
    raise ConfigError(
        f"train.kernels is 'liger', but {missing}. Use `train.kernels: torch` (or `auto`, which "
        "uses Liger's kernels wherever they work), or install what is missing."
    )


def _missing_requirement(model_type: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"Liger's kernels need a GPU and this worker trains on {device} (cluster.train_gpus)"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'instructmix[gpu]')"
    if model_type not in _patches():
        return (
            f"Liger has no kernels for models of type {model_type!r}, only for {sorted(_patches())}"
        )
    return None


def _patches() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def use_kernels(objective: Objective, requested: Kernels) -> Literal["torch", "liger"]:
    """Installs the kernels in the model of the objective, in place; returns their name.

    Raises:
        ConfigError: as `resolve_kernels`.
        ModelError: the losses of the model change with the kernels.
    """
    model = objective.model
    device = next(model.parameters()).device
    kernels = resolve_kernels(requested, model.config.model_type, device)
    if kernels == "torch":
        return kernels
    before = probe_losses(objective)
    patch = _patches()[model.config.model_type]
    patch(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    gap = float((probe_losses(objective) - before).abs().max())
    if not gap <= _TOLERANCE:
        raise ModelError(
            f"with Liger's kernels this model's losses change by {gap:.2g} nats per token on a "
            f"probe, where at most {_TOLERANCE:g} is accepted: this version of liger-kernel does "
            "not compute this model faithfully. Use `train.kernels: torch`."
        )
    return kernels


def check_compiler(device: torch.device) -> None:
    """Checks, before a training starts, that torch.compile can work here.

    Raises:
        ConfigError: there is no compiler for the device.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        missing = None if has_triton() else "a working triton package for this GPU"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
            missing = None
        except InvalidCxxCompiler:
            missing = "a C++ compiler (g++ or clang++) on this machine"
    if missing is not None:
        raise ConfigError(
            f"train.compile is on, but torch.compile needs {missing}, which was not found. Install "
            "it on the nodes that train, or set `train.compile: false`."
        )


@contextmanager
def compiled_layers(model: torch.nn.Module) -> Iterator[None]:
    """Within the block every decoder layer runs compiled; names and weights do not change.

    Layers are compiled one by one: equal layers share their compiled code, and sharding still finds
    them.  The number of tokens is dynamic, so a new length does not cause a new compilation.
    """
    check_compiler(next(model.parameters()).device)
    layers = decoder_layers(model)
    # Attention is not compiled: its buckets differ from pass to pass, which would cause a new
    # compilation each time.
    attention.register(torch.compiler.disable(attention.segment_attention))
    try:
        # A vLLM engine in eager mode switches dynamo off for its whole process; without this patch
        # the layers would silently not be compiled.
        with torch._dynamo.config.patch(disable=False):
            for layer in layers:
                layer.compile(dynamic=True)
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        attention.register()
