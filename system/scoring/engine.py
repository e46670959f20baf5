"""One vLLM engine in this process: exact log-likelihoods, constrained choice, generation.

The engine is built once; new weights of the same architecture are loaded in place.  Before its
first use, its results are compared with those of transformers.

There are two ways to get the log-probabilities of a prompt.  The engine's model runner decides
which one is used:

* `fixed-ids`: the runner scores given token ids from a given position on.  It computes no top-k and
  no ranks, and the language-model head runs only from the first response token on.
* `flat`: the runner returns the log-probabilities of all prompt tokens in flat lists.

The candidates of a constrained choice share their prompt through the prefix cache.  Positions from
the cache have no log-probabilities.  So if the cached part of a row reaches beyond the prompt, the
row is scored again without the cache.  The start-up test compares cached with uncached results.

B = rows, K = candidates, L = tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from system.errors import DataError, ModelError, StageError
from system.scoring.answers import Generated
from system.scoring.llm import EngineSettings, read_config, repack_tied_weights, start_llm
from system.scoring.parity import ParityTest

MAX_QUARANTINED = 16
"""Largest number of rows per call on which the engine may fail; more are a broken engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that the engine could not score, and the reason."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """Log-probabilities of the requested tokens, row by row."""

    rows: list[np.ndarray | None]
    """B arrays, float64 nats; None if the row was rejected."""
    rejected: tuple[Rejected, ...] = field(default=())


class Engine:
    """A vLLM engine with one set of weights at a time.

    Args:
        model_dir: local Hugging Face directory (config, safetensors, tokenizer).
        settings: memory, precision, lengths.

    Raises:
        ModelError: the directory cannot be loaded, or the engine's log-likelihoods differ from
            those of transformers.
        ConfigError: the engine has too little memory for one row of `max_length` tokens.
    """

    def __init__(self, model_dir: str, settings: EngineSettings) -> None:
        self.settings = settings
        self.model_dir = model_dir
        hf_config = read_config(model_dir, settings)
        self.vocab_size = int(hf_config.get_text_config().vocab_size)
        context = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(settings.max_length, int(context or settings.max_length))
        self._tokenizer: Any = None
        self._must_test_reload = settings.self_test
        parity = self._parity_test(model_dir) if settings.self_test else None
        self._llm = start_llm(model_dir, settings, self.max_length, self.vocab_size)
        vllm_config = self._llm.llm_engine.vllm_config
        self.path: Literal["fixed-ids", "flat"] = (
            "fixed-ids" if vllm_config.use_v2_model_runner else "flat"
        )
        if parity is not None:
            parity.check(self)

    def reload(self, model_dir: str) -> None:
        """Replaces the weights by those of another directory with the same architecture.

        The first reload is compared with transformers, as the start is, because loading in place
        uses different code.

        Raises:
            ModelError: the directory has no weights that fit, or the engine's log-likelihoods with
                the new weights differ from those of transformers.
        """
        if not any(Path(model_dir).glob("*.safetensors")):
            raise ModelError(
                f"{model_dir}: expected safetensors weights to load into the scoring engine, found "
                "none. The checkpoint was deleted or never finished: redo the stage that makes it."
            )
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model_dir})
            self._llm.apply_model(repack_tied_weights)
        except (ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise ModelError(
                f"{model_dir}: expected weights of the same architecture as {self.model_dir}; "
                f"the engine refused them ({error})"
            ) from error
        if not self._llm.reset_prefix_cache():
            raise StageError(
                "the scoring engine still held requests while new weights were loaded, so cached "
                "states of the old weights would leak into new scores; run the stage again"
            )
        if self._must_test_reload:
            self._parity_test(model_dir).check(self)
            self._must_test_reload = False

    def log_probs(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], names: Sequence[str]
    ) -> LogProbs:
        """Log-probability of every token from `starts[b]` to the end of row b, given its prefix.

        The engine takes the longest rows first; results are in the order of the arguments.

        Args:
            rows: B sequences of token ids.
            starts: first token to score, at least 1, because nothing predicts token 0.
            names: B names of rows, for error messages.

        Raises:
            DataError: a row is empty, too long for the engine, or has ids outside the vocabulary.
            StageError: the engine itself fails.
        """
        for row, start, name in zip(rows, starts, names, strict=True):
            self._check_row(row, name)
            if not 1 <= start < len(row):
                raise DataError(
                    f"row {name}: expected a first scored token in 1..{len(row) - 1}, got {start}"
                )
        return self._log_probs(rows, starts, share_prefix=False)

    def choose(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Log-likelihood of every candidate continuation after every prompt.

        Args:
            prompts: B sequences of token ids, not empty.
            candidates: K sequences of token ids, not empty; the same for all prompts.

        Returns:
            [B, K] float64, nats summed over the candidate's tokens; a row of NaN if the engine
            failed on the prompt.

        Raises:
            DataError: a prompt with a candidate does not fit the engine.
        """
        rows, starts = [], []
        for number, prompt in enumerate(prompts):
            for candidate in candidates:
                row = [*prompt, *candidate]
                self._check_row(row, f"prompt {number}")
                rows.append(row)
                starts.append(len(prompt))
        scored = self._log_probs(rows, starts, share_prefix=True)
        totals = np.array([np.nan if row is None else row.sum() for row in scored.rows])
        totals = totals.reshape(len(prompts), len(candidates))
        totals[np.isnan(totals).any(axis=1)] = np.nan
        return totals

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> Generated:
        """Generates greedy continuations as text, without special tokens.

        If a prompt leaves less than `max_new_tokens` of the context, its answer is limited to what
        is left.

        Args:
            prompts: B sequences of token ids.
            max_new_tokens: maximum tokens of an answer.
            stop_token_ids: ids that end an answer, in addition to the model's own end tokens.

        Raises:
            DataError: a prompt fills the whole context.
            StageError: the engine itself fails.
        """
        from vllm import SamplingParams

        tokenizer = self.tokenizer
        stops = sorted({*stop_token_ids, *_end_tokens(tokenizer, self.model_dir)})
        requests = []
        for number, prompt in enumerate(prompts):
            self._check_row(prompt, f"prompt {number}")
            room = min(max_new_tokens, self.max_length - len(prompt))
            if room < 1:
                raise DataError(
                    f"prompt {number} has {len(prompt)} tokens, which leaves none of the "
                    f"{self.max_length} of the context for an answer; shorten it"
                )
            requests.append(
                (
                    prompt,
                    SamplingParams(
                        max_tokens=room, temperature=0.0, detokenize=False, stop_token_ids=stops
                    ),
                )
            )
        # Longest first, so that no long row runs alone at the end.
        order = sorted(range(len(requests)), key=lambda b: -len(requests[b][0]))
        outputs, failures = self._run_all([requests[b] for b in order])
        texts: list[str | None] = [None] * len(requests)
        for b, output in zip(order, outputs, strict=True):
            if output is not None:
                ids = list(output.outputs[0].token_ids)
                texts[b] = tokenizer.decode(ids, skip_special_tokens=True)
        return Generated(
            texts=texts, failures={order[place]: reason for place, reason in failures.items()}
        )

    def _log_probs(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], *, share_prefix: bool
    ) -> LogProbs:
        # Sorting is stable: candidates of one prompt stay neighbours and find it in the cache.
        lengths = starts if share_prefix else [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda b: -lengths[b])
        requests = [
            (rows[b], self._scoring_params(rows[b], starts[b], share_prefix)) for b in order
        ]
        outputs, failures = self._run_all(requests)
        values_of: list[np.ndarray | None] = [None] * len(rows)
        incomplete = []
        for b, output in zip(order, outputs, strict=True):
            if output is None:
                continue
            if share_prefix and (output.num_cached_tokens or 0) > starts[b] - 1:
                # The cache covered tokens that must be scored: they have no log-probabilities.
                incomplete.append(b)
            else:
                values_of[b] = self._values(output, len(rows[b]), starts[b])
        rejected = {order[place]: reason for place, reason in failures.items()}
        if incomplete:
            again = self._log_probs(
                [rows[b] for b in incomplete], [starts[b] for b in incomplete], share_prefix=False
            )
            for b, values in zip(incomplete, again.rows, strict=True):
                values_of[b] = values
            rejected |= {incomplete[item.index]: item.reason for item in again.rejected}
        return LogProbs(
            rows=values_of,
            rejected=tuple(Rejected(index=b, reason=rejected[b]) for b in sorted(rejected)),
        )

    def _scoring_params(self, row: Sequence[int], start: int, share_prefix: bool) -> Any:
        from vllm import SamplingParams

        common = {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "skip_reading_prefix_cache": not share_prefix,
        }
        if self.path == "fixed-ids":
            targets = np.asarray(row[start:], dtype=np.int64)[:, None]
            return SamplingParams(
                prompt_logprob_token_ids=targets, prompt_logprob_start=start - 1, **common
            )
        return SamplingParams(prompt_logprobs=0, flat_logprobs=True, **common)

    def _values(self, output: Any, length: int, start: int) -> np.ndarray:
        if self.path == "fixed-ids":
            values = np.asarray(output.prompt_token_id_logprobs, dtype=np.float64).reshape(-1)
        else:
            flat = output.prompt_logprobs.logprobs
            assert len(flat) == length - 1, (len(flat), length)
            values = np.asarray(flat[start - 1 :], dtype=np.float64)
        assert len(values) == length - start, (len(values), length, start)
        return values

    def _run_all(
        self, requests: Sequence[tuple[Sequence[int], Any]]
    ) -> tuple[list[Any | None], dict[int, str]]:
        """Runs all requests; finds those on which the engine fails by bisection and skips them.

        A failure aborts all requests in flight, so each half is run again.

        Returns:
            Outputs in order, None for a failed request; position of a failed request -> reason.
        """
        outputs: list[Any | None] = [None] * len(requests)
        failures: dict[int, str] = {}
        spans = [(0, len(requests))]
        while spans:
            low, high = spans.pop()
            if low == high:
                continue
            try:
                outputs[low:high] = self._run(requests[low:high])
            except Exception as error:
                self._abort_all()
                if high - low > 1:
                    middle = (low + high) // 2
                    spans += [(middle, high), (low, middle)]
                    continue
                failures[low] = f"the engine failed: {type(error).__name__}: {error}"
                if len(failures) > MAX_QUARANTINED or len(failures) == len(requests):
                    raise StageError(
                        f"the scoring engine failed on {len(failures)} of {len(requests)} rows, "
                        f"last with {type(error).__name__}: {error}. So many failures mean that "
                        "the engine is broken, not the rows; the usual cause is memory "
                        "(cluster.engine_memory_gib, cluster.gpu_memory_utilization)."
                    ) from error
        return outputs, failures

    def _run(self, requests: Sequence[tuple[Sequence[int], Any]]) -> list[Any]:
        prompts = [{"prompt_token_ids": [int(token) for token in row]} for row, _ in requests]
        params = [settings for _, settings in requests]
        return self._llm.generate(prompts, params, use_tqdm=False)

    def _abort_all(self) -> None:
        engine = self._llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self._llm.reset_prefix_cache()

    def _check_row(self, row: Sequence[int], name: str) -> None:
        if not 1 <= len(row) <= self.max_length:
            raise DataError(
                f"row {name} has {len(row)} tokens; the scoring engine takes 1 to "
                f"{self.max_length} (model.max_length, and the model's own context). Truncate the "
                "row when it is encoded, or raise model.max_length."
            )
        low, high = min(row), max(row)
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"row {name} has the token {low if low < 0 else high}, but the model has only "
                f"0 to {self.vocab_size - 1}: tokenizer and model do not belong together"
            )

    def _parity_test(self, model_dir: str) -> ParityTest:
        settings = self.settings
        return ParityTest.of(
            model_dir,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            seed=settings.seed,
        )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            from system.models.base import load_tokenizer

            self._tokenizer = load_tokenizer(
                self.model_dir, trust_remote_code=self.settings.trust_remote_code
            )
        return self._tokenizer


def _end_tokens(tokenizer: Any, model_dir: str) -> set[int]:
    """The end-of-sequence ids of the tokenizer and of the model's generation config."""
    from transformers import GenerationConfig

    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if (Path(model_dir) / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids |= set(eos) if isinstance(eos, list) else ({eos} if eos is not None else set())
    return ids
