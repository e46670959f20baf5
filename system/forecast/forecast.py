"""Combines the parts of a forecast, and checks it against the limits that the user gave.

`actors.overview` calls `make_forecast` for `instructmix check`; `system.forecast.text` words the
result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from system.config import RunConfig
from system.data.corpus import Corpus
from system.errors import ConfigError
from system.forecast.corpus_stats import (
    CorpusStats,
    from_ingested,
    from_tagged,
    probe_rows,
    stage_tokenizer,
)
from system.forecast.disk import DiskPart, corpus_bytes, disk_parts, free_bytes, model_size
from system.forecast.disk import peak_bytes as most_bytes
from system.forecast.hours import Rates, StageSeconds, finished_units, stage_seconds
from system.forecast.workload import Workload, workloads
from system.influence.design.accuracy_targets import answer_tokens
from system.influence.design.cost import InfluenceCost, check_token_limit, influence_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The files of a run directory from which a forecast is computed."""

    tagged_uri: str | None
    """Manifest of stage `tag`."""
    ingested_uri: str | None
    """Manifest of stage `ingest`."""
    model_dir: Path | None
    """Output of stage `model`, or the directory that `model.path` names."""
    mix: Mapping[str, float] | None
    """Examples of each category; None until stage `solve` is finished."""
    done: frozenset[str]
    """Stages that `run` would skip."""
    attempts: tuple[str, ...]
    """Influence attempts with the same model and batches, the current one first."""
    earlier_uri: str | None = None
    """The influence attempt that the current one appends to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The expected cost of a run, as far as it can be computed."""

    config: RunConfig
    done: frozenset[str]
    stats: CorpusStats | None
    cost: InfluenceCost | None
    work: tuple[Workload, ...]
    """Workloads of all stages of `STAGES`; empty if they cannot be computed yet."""
    rates: Rates | None
    why_no_rates: str
    """The reason why there are no rates; empty if there are."""
    seconds: tuple[StageSeconds, ...]
    """Times of the stages that are not done and whose speed is known."""
    why_untimed: str
    """The reason why some of these stages have no time; empty if all have one."""
    disk: tuple[DiskPart, ...]
    corpus_bytes: int | None
    free_bytes: int | None
    why_unknown: str
    """The reason why `work` is empty; empty if it is not."""
    appending: str = ""
    """What the influence stage appends to an earlier result; empty: it measures everything."""

    @property
    def left(self) -> tuple[Workload, ...]:
        """The workloads of the stages that are not done."""
        return tuple(item for item in self.work if item.stage not in self.done)

    @property
    def peak_bytes(self) -> int:
        """Largest disk space in use at one time by the stages that are not done."""
        return most_bytes(self.disk, self.done)

    def refuse(self, *, max_hours: float | None = None, max_tokens: float | None = None) -> None:
        """Raises an error if the stages that are not done exceed a limit.

        Args:
            max_hours: limit of their wall time.
            max_tokens: limit of their token equivalents: trained tokens, and a third of the others.

        Raises:
            ConfigError: a limit is exceeded, or there is no forecast to compare it with.
        """
        if self.cost is not None and "influence" not in self.done:
            check_token_limit(self.config.influence, self.cost, is_exact=self.is_exact)
        if max_tokens is not None:
            self._require_forecast("--max-tokens", self.why_unknown)
            sizes = {item.stage: item.token_equivalents for item in self.left}
            self._refuse("--max-tokens", max_tokens, sizes, "token equivalents", ",.0f")
        if max_hours is not None:
            why = self.why_unknown or self.why_no_rates or self.why_untimed
            self._require_forecast("--max-hours", why)
            hours = {item.stage: item.middle / 3600 for item in self.seconds}
            self._refuse("--max-hours", max_hours, hours, "hours", ",.2f")

    @property
    def is_exact(self) -> bool:
        """Whether the tokens of stage `influence` are exact."""
        return self.stats is not None and self.stats.basis == "exact" and not self.stats.left_out

    def _require_forecast(self, flag: str, why: str) -> None:
        if why:
            raise ConfigError(
                f"{flag} cannot be checked, because there is no forecast yet: {why}. Run these "
                "stages and check again, or leave the flag out."
            )

    def _refuse(
        self, flag: str, limit: float, sizes: Mapping[str, float], unit: str, form: str
    ) -> None:
        total = sum(sizes.values())
        if total <= limit:
            return
        largest = sorted(sizes, key=lambda stage: -sizes[stage])[:2]
        lowered = {item.stage: item.lowered_by for item in self.work}
        parts = "; ".join(
            f"{stage} takes {sizes[stage]:{form}} ({lowered[stage]})" for stage in largest
        )
        raise ConfigError(
            f"{flag} allows {limit:{form}} {unit}, but the remaining stages take about "
            f"{total:{form}}. The largest parts: {parts}. Nothing was started."
        )


def make_forecast(config: RunConfig, state: RunState, *, probe: bool) -> Forecast:
    """Computes the forecast of a run, as far as the finished stages allow.

    Args:
        config: configuration of the run.
        state: files of the run directory.
        probe: measure the speed for some seconds, unless finished work units show it.

    Raises:
        DataError: a category has too few rows for a dose.
        ConfigError, ModelError: errors that `run` would raise too.
    """
    uri = state.tagged_uri or state.ingested_uri
    corpus = None if uri is None else Corpus.open(uri)
    stats, why_unknown = _corpus_stats(config, state, corpus)
    cost, work, appending = None, (), ""
    if stats is not None:
        cost, appending = _influence_cost(config, state, corpus, stats)
        work = tuple(workloads(config, stats, cost, state.mix))
    left = [item for item in work if item.stage not in state.done]
    rates, why_no_rates = None, ""
    if left and corpus is not None:
        rates, why_no_rates = _rates(config, state, corpus, probe=probe)
    why_untimed = ""
    cluster = config.cluster
    # Rates are measured on the device of the tuners and say nothing about another kind.
    if left and bool(cluster.train_gpus) != bool(cluster.tuner_gpus):
        left = [item for item in left if item.stage == "influence"]
        why_untimed = (
            "stages train and evaluate use another kind of device than the tuners "
            "(cluster.train_gpus, cluster.tuner_gpus), and its speed was not measured"
        )
    seconds = () if rates is None else stage_seconds(config, left, rates, _shared_cpus(config))
    return Forecast(
        config=config,
        done=state.done,
        stats=stats,
        cost=cost,
        work=work,
        rates=rates,
        why_no_rates=why_no_rates if rates is None else "",
        seconds=tuple(seconds),
        why_untimed=why_untimed,
        disk=() if state.model_dir is None else tuple(_disk(config, state, corpus, stats, work)),
        corpus_bytes=None if corpus is None else corpus_bytes(corpus),
        free_bytes=free_bytes(config.run_dir),
        why_unknown=why_unknown,
        appending=appending,
    )


def _influence_cost(
    config: RunConfig, state: RunState, corpus: Corpus | None, stats: CorpusStats
) -> tuple[InfluenceCost, str]:
    """The cost of stage `influence` and, if it appends to an earlier result, what it appends."""
    if state.earlier_uri is not None and state.tagged_uri is not None and corpus is not None:
        from system.influence.append.append_cost import append_cost, append_text
        from system.influence.append.earlier import EarlierResult

        attempts, _, name = state.earlier_uri.rpartition("/")
        earlier = EarlierResult(attempts, name)
        model_dir = state.model_dir or Path(config.model.path)
        cost = append_cost(
            config, earlier, corpus, stats.lengths, lambda: stage_tokenizer(config, model_dir)
        )
        return cost, append_text(earlier, earlier.category_status(corpus))
    cost = influence_cost(
        config.influence,
        run_seed=config.seed,
        sources=stats.categories,
        lengths=stats.lengths,
        heldout=stats.heldout,
    )
    return cost, ""


def _corpus_stats(
    config: RunConfig, state: RunState, corpus: Corpus | None
) -> tuple[CorpusStats | None, str]:
    if corpus is None:
        return None, "rows and tokens are known after stage ingest (`run CONFIG --until tag`)"
    if state.tagged_uri is not None:
        return from_tagged(corpus, config, state.model_dir), ""
    if state.model_dir is None:
        return None, "tokens are known after stage model (`run CONFIG --until tag`)"
    return from_ingested(corpus, config, state.model_dir), ""


def _rates(
    config: RunConfig, state: RunState, corpus: Corpus, *, probe: bool
) -> tuple[Rates | None, str]:
    """Rates of finished work units, or else of a probe, or else the reason why there are none."""
    for attempt in state.attempts:
        answers = answer_tokens(config) if config.influence.metric == "accuracy" else 0
        rates = finished_units(attempt, answers)
        if rates is not None:
            return rates, ""
    if not probe:
        return None, "--no-probe was given, and this run directory has no finished intervention run"
    if state.model_dir is None:
        return None, "there is no model on this machine yet (stage model makes it)"
    from system.forecast.probe import ProbeSettings, run_probe, why_no_probe
    from system.training.settings import TrainSettings

    training = TrainSettings.from_influence(config.influence, config.model, config.seed)
    settings = ProbeSettings(
        num_threads=max(1, int(config.cluster.actor_cpus)),
        trains_on_gpu=config.cluster.tuner_gpus > 0,
        scores_on_gpu=config.cluster.scorer_gpus > 0,
        batch_size=config.influence.batch_size,
        max_length=config.model.max_length,
        trust_remote_code=config.model.trust_remote_code,
    )
    rows = probe_rows(corpus, config, state.model_dir)
    why = why_no_probe(state.model_dir, rows.num_rows, training, settings)
    if why:
        return None, why
    return run_probe(state.model_dir, rows, training, settings), ""


def _disk(
    config: RunConfig,
    state: RunState,
    corpus: Corpus | None,
    stats: CorpusStats | None,
    work: tuple[Workload, ...],
) -> list[DiskPart]:
    assert state.model_dir is not None
    rows = {item.stage: item.trained_rows for item in work}
    return disk_parts(
        config,
        model_size(state.model_dir, config.train.lora),
        corpus,
        num_categories=None if stats is None else len(stats.categories),
        train_rows=rows.get("train"),
    )


def _shared_cpus(config: RunConfig) -> int | None:
    """CPUs that all actors share, if all run on this machine without GPUs."""
    cluster = config.cluster
    if cluster.ray_address != "local" or cluster.tuner_gpus or cluster.scorer_gpus:
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
