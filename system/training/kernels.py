"""Optional speed: Liger kernels in the layers, and torch.compile of every decoder block.

Neither is taken on trust.  After Liger's kernels are in, the model must give the losses that it
gave before, on the rows of the layout's own probe; what cannot be used is an error that says what
is missing, never a quiet way around.  The loss stays ours: it holds no logits (`loss.py`).

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
"""Nats per token, float32; wrong positions or wrong weights are orders of magnitude larger."""


def resolve_kernels(
    wanted: Kernels, model_type: str, device: torch.device
) -> Literal["torch", "liger"]:
    """Which kernels a training uses; a pure function of the wish, the model and the worker.

    Args:
        wanted: `auto` takes Liger's wherever they can be used.
        model_type: of the model's configuration.
        device: of the worker.

    Raises:
        ConfigError: `liger` is wanted and cannot be had; names what is missing.
    """
    if wanted == "torch":
        return "torch"
    lacking = _lacking(model_type, device)
    if lacking is None:
        return "liger"
    if wanted == "auto":
        return "torch"
    raise ConfigError(
        f"train.kernels is 'liger', but {lacking}. Use `train.kernels: torch` (or `auto`, which "
        "takes Liger's kernels wherever they can be used), or set up what is missing."
    )


def _lacking(model_type: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels need a GPU and this worker trains on {device} (cluster.train_gpus)"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'instructmix[gpu]')"
    if model_type not in _patches():
        return f"it has none for models of type {model_type!r}; it knows {sorted(_patches())}"
    return None


def _patches() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def use_kernels(objective: Objective, wanted: Kernels) -> Literal["torch", "liger"]:
    """Puts the kernels into the objective's model, in place; says which.

    Raises:
        ConfigError: as `resolve_kernels`.
        ModelError: with the kernels the model does not compute what it computed before.
    """
    model = objective.model
    device = next(model.parameters()).device
    found = resolve_kernels(wanted, model.config.model_type, device)
    if found == "torch":
        return found
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
    return found


def check_compiler(device: torch.device) -> None:
    """Looks whether torch.compile can work here, before a training starts.

    Raises:
        ConfigError: there is no compiler for the device.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        lacking = None if has_triton() else "a working triton package for this GPU"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
            lacking = None
        except InvalidCxxCompiler:
            lacking = "a C++ compiler (g++ or clang++) on this machine"
    if lacking is not None:
        raise ConfigError(
            f"train.compile is on, but torch.compile needs {lacking}, and there is none. Install "
            "it where the workers run, or set `train.compile: false`."
        )


@contextmanager
def compiled_layers(model: torch.nn.Module) -> Iterator[None]:
    """Within the block every decoder layer runs compiled, names and weights as before.

    Layer by layer: equal layers share what is compiled, and sharding still sees the blocks.  The
    number of tokens of a pass is left open, so that a new length compiles nothing.
    """
    check_compiler(next(model.parameters()).device)
    layers = decoder_layers(model)
    # Its buckets differ from pass to pass: traced, they would be compiled anew each time.
    attention.register(torch.compiler.disable(attention.segment_attention))
    try:
        # An eager vLLM engine switches dynamo off for its whole process; layers would then be
        # "compiled" to themselves, without a word.
        with torch._dynamo.config.patch(disable=False):
            for layer in layers:
                layer.compile(dynamic=True)
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        attention.register()
