"""Self-test of the engine before its first use: it must compute the same as transformers.

One test row is longer than a block of the prefix cache, one is short.  A constrained choice, whose
candidates share their prompt through the cache, must equal the same choice without the cache.

L = tokens of a row.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from system.errors import ModelError
from system.scoring.llm import BLOCK_TOKENS

PARITY_NATS = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest accepted mean difference from transformers, nats per token, by precision."""


class TestedEngine(Protocol):
    """The part of `system.scoring.engine.Engine` that this test uses."""

    @property
    def path(self) -> str:
        """The way in which the engine gets log-probabilities."""
        ...

    @property
    def max_length(self) -> int:
        """Longest row, in tokens."""
        ...

    def log_probs(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], names: Sequence[str]
    ) -> Any:
        """Log-probabilities of the tokens of each row from its start on."""

    def choose(self, prompts: Sequence[list[int]], candidates: Sequence[list[int]]) -> Any:
        """Log-probabilities of each candidate after each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityTest:
    """Test rows, and their log-probabilities by transformers under one set of weights."""

    model_dir: str
    rows: list[list[int]]
    expected: list[np.ndarray]
    """[L - 1] float64 each: log-probabilities of tokens 1.. of a row."""
    limit: float

    @classmethod
    def of(
        cls,
        model_dir: str,
        *,
        vocab_size: int,
        max_length: int,
        dtype: str,
        trust_remote_code: bool,
        seed: int,
    ) -> ParityTest:
        """Runs transformers on seeded rows of token ids and frees its memory again.

        Raises:
            ModelError: transformers cannot load the directory.
        """
        from system.models.base import load_model

        rng = np.random.default_rng(seed)
        lengths = [min(length, max_length) for length in (3 * BLOCK_TOKENS + 5, 13)]
        rows = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
        model = load_model(model_dir, dtype=dtype, trust_remote_code=trust_remote_code)
        expected = [token_log_probs(model, row) for row in rows]
        del model
        gc.collect()
        return cls(model_dir=model_dir, rows=rows, expected=expected, limit=PARITY_NATS[dtype])

    def check(self, engine: TestedEngine) -> None:
        """Compares the engine with transformers.

        Raises:
            ModelError: they differ by more than the limit.
        """
        names = [f"self-test row {number}" for number in range(len(self.rows))]
        scored = engine.log_probs(self.rows, [1] * len(self.rows), names)
        for name, values, expected in zip(names, scored.rows, self.expected, strict=True):
            self._compare(engine, name, values, expected)
        prompt = self.rows[0][: engine.max_length - 2]
        candidates = [self.rows[1][-1:], self.rows[1][-2:]]
        apart = engine.log_probs(
            [prompt + candidate for candidate in candidates], [len(prompt)] * 2, ["choice"] * 2
        )
        shared = engine.choose([prompt], candidates)[0]
        for k, values in enumerate(apart.rows):
            total = None if values is None else values.sum(keepdims=True)
            self._compare(engine, f"self-test choice {k}", total, shared[k : k + 1])

    def _compare(
        self, engine: TestedEngine, name: str, values: np.ndarray | None, expected: np.ndarray
    ) -> None:
        gap = np.inf if values is None else abs(float(np.mean(values - expected)))
        if not gap <= self.limit:
            raise ModelError(
                f"{self.model_dir}: the scoring engine ({engine.path} path) and transformers "
                f"differ by {gap:.2g} nats per token on {name}; at most {self.limit:g} is "
                "accepted. The engine does not compute this model faithfully on this machine: "
                "use another model or another vLLM version."
            )


def token_log_probs(model: Any, row: list[int]) -> np.ndarray:
    """[L - 1] float64, nats: log-probability of tokens 1.. of a row by a transformers model."""
    import torch

    ids = torch.tensor([row], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1].float()
    picked = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
    return picked[:, 0].double().cpu().numpy()
