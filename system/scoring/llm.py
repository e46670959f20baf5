"""Starts vLLM in this process, on CPU or GPU, within a memory limit and without log output."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from system.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 32
"""Tokens per block of the prefix cache; the CPU attention kernels need multiples of 32."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # A row may fill the whole context of the model.  vLLM always samples one more token, but this
    # token is never fed back, so its position is not needed.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine is built."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: int = 1024
    """Tokens of the longest row, generated tokens included."""
    memory_gib: float = 1.0
    """Size of the KV cache on CPU."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU's memory; used only with `use_gpu`."""
    use_gpu: bool = False
    logits_memory_mib: int = 512
    """Memory limit for the log-probabilities of one engine step (tokens x vocabulary, twice,
    float32)."""
    trust_remote_code: bool = False
    seed: int = 0
    self_test: bool = True
    """Compare with transformers before the first answer."""


def read_config(model_dir: str, settings: EngineSettings) -> Any:
    """The model's transformers configuration.

    Raises:
        ModelError: the directory has none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            model_dir, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model_dir}: expected a Hugging Face model directory with config.json ({error})"
        ) from error


def start_llm(model_dir: str, settings: EngineSettings, max_length: int, vocab_size: int) -> Any:
    """A `vllm.LLM` without tokenizer, with prefix cache, one process, no compilation on CPU.

    Raises:
        ConfigError: the memory limit is too small for one row of `max_length` tokens.
        ModelError: vLLM cannot serve the model.
    """
    os.environ.update(_ENVIRONMENT)
    if not settings.use_gpu:
        os.environ.update(_CPU_ENVIRONMENT)
        # vLLM would compile one reduction (token ranks, not used here), which needs a C++ compiler
        # and is slower than plain execution.
        import torch._dynamo.config as dynamo

        dynamo.disable = True
    from vllm import LLM

    per_token = 2 * 4 * vocab_size
    step_tokens = max(64, min(4096, settings.logits_memory_mib * 2**20 // per_token // 64 * 64))
    memory: dict[str, Any] = (
        {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if settings.use_gpu
        else {"kv_cache_memory_bytes": int(settings.memory_gib * 2**30), "enforce_eager": True}
    )
    try:
        return LLM(
            model_dir,
            skip_tokenizer_init=True,
            trust_remote_code=settings.trust_remote_code,
            dtype=settings.dtype,
            max_model_len=max_length + 1,
            max_num_batched_tokens=step_tokens,
            max_num_seqs=min(256, step_tokens),
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            seed=settings.seed,
            **memory,
        )
    except ValueError as error:
        if "KV cache" in str(error) or "memory" in str(error).lower():
            raise ConfigError(
                f"the scoring engine cannot start with the memory it may use: {error}. Raise "
                "cluster.engine_memory_gib (CPU) or cluster.gpu_memory_utilization, or lower "
                "model.max_length."
            ) from error
        raise ModelError(f"{model_dir}: vLLM cannot serve this model: {error}") from error


def repack_tied_weights(model: torch.nn.Module) -> None:
    """Repacks, on CPU, the layers that share their weights with another layer.

    vLLM's in-place reload repacks a layer if the checkpoint names its weights.  A head that is tied
    to the embedding has no weights there, so it would keep its old packed copy.
    """
    owners: set[int] = set()
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not hasattr(layer, "cpu_linear") or weight is None or weight.numel() == 0:
            continue
        if weight.data_ptr() in owners:
            layer.quant_method.process_weights_after_loading(layer)  # pyright: ignore
        owners.add(weight.data_ptr())
