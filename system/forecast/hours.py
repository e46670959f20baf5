"""Token rates of one actor, and from them the wall time of each stage.

Rates come from the work units that an influence stage has finished, or else from a probe
(`system.forecast.probe`).  Finished units are better evidence than a probe: they ran where the
remaining ones will run, beside the same other actors.

A stage takes the time to start its actors plus the longest of: its trainings on the tuners; its
scorings on the scorers; and, if all actors share this machine's CPUs and a probe measured each
alone, all of this work on those CPUs.  The final training and the arms are assumed to be as fast
per worker as a tuner.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from system import storage
from system.config import ClusterConfig, RunConfig
from system.forecast.workload import Workload

ACTORS_START_SECONDS = 22.0
"""Time to start Ray, a tuner and a vLLM engine: stage seconds minus half the seconds of the
trainings (two tuners) in a run of `configs/real_cpu.yaml` on 2 cores at commit 835d6a9:
1,439.7 - 2,834.3 / 2 = 22.6."""
TRAIN_START_SECONDS = 37.0
"""Time to start a group of Ray Train workers and to export: stage seconds minus those of the steps,
in runs of `configs/real_cpu.yaml` and `configs/quickstart.yaml` on 2 cores: 64.7 - 28.0 and
41.0 - 4.1."""

LEFT_OUT = (
    "workers of train and of the arms are assumed to be as fast as a tuner; finished parts of an "
    "unfinished stage, and runs of earlier attempts that can be reused, are not subtracted. Not "
    "included: ingest, model, tag, solve, curriculum, select and report; waiting for machines and "
    "storage; repeated work after failures; slowdown of actors that share a machine, beyond CPUs"
)
"""The assumptions behind the times, for the reader of `check`."""
_LATEST = 200
"""Largest number of finished work units that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second of one actor."""

    mean: float
    """All tokens divided by all seconds: the rate of a sum of many samples."""
    low: float
    high: float
    """Quartiles of single samples, extended to the mean if it lies outside them."""
    num_samples: int

    @classmethod
    def of(cls, samples: Sequence[tuple[float, float]]) -> Rate:
        """The rate of timed samples, each (tokens, seconds)."""
        tokens, seconds = np.asarray(samples, dtype=np.float64).T
        mean = float(tokens.sum() / seconds.sum())
        low, high = (float(value) for value in np.percentile(tokens / seconds, [25, 75]))
        return cls(mean=mean, low=min(low, mean), high=max(high, mean), num_samples=len(samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The measured speeds from which wall time is computed."""

    train: Rate
    """Training, of one tuner."""
    score: Rate
    """Scoring, of one scorer."""
    source: str
    """What was measured and where, for the reader of `check`."""
    is_probe: bool
    """Whether each rate was measured alone on this machine, without the other actors of a run."""
    run_seconds: float
    """Time of one training that does not depend on its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Wall time of a stage, from the mean and from the quartiles of the rates."""

    stage: str
    middle: float
    low: float
    high: float


def finished_units(attempt_uri: str, answer_tokens: int = 0) -> Rates | None:
    """The rates of the finished work units of an influence attempt; None if there are none.

    Args:
        attempt_uri: attempt of stage `influence`.
        answer_tokens: tokens that count for the answer of every held-out row (`accuracy`).
    """
    heldout_uri = storage.join(attempt_uri, "heldout.arrow")
    if not storage.is_whole(heldout_uri):
        return None
    rows = storage.read_table(heldout_uri).column("input_ids")
    scored_tokens = pc.sum(pc.list_value_length(rows)).as_py() + answer_tokens * len(rows)
    train: list[tuple[float, float]] = []
    score: list[tuple[float, float]] = []
    for name in storage.whole_names(storage.join(attempt_uri, "units"))[-_LATEST:]:
        stats = storage.read_json(storage.join(attempt_uri, "units", name))
        if stats["seconds"] > 0 and stats["trained_tokens"]:
            train.append((stats["trained_tokens"], stats["seconds"]))
    for name in storage.whole_names(storage.join(attempt_uri, "scores"))[-_LATEST:]:
        with storage.open_input(storage.join(attempt_uri, "scores", name)) as file:
            metadata = pq.read_schema(file).metadata or {}
        seconds = float(metadata.get(b"instructmix.seconds", b"0"))
        if seconds > 0:
            score.append((scored_tokens, seconds))
    if not train or not score:
        return None
    return Rates(
        train=Rate.of(train),
        score=Rate.of(score),
        source=f"{len(train)} trainings and {len(score)} scorings of this run directory",
        is_probe=False,
        run_seconds=0.0,
    )


def stage_seconds(
    config: RunConfig, work: Sequence[Workload], rates: Rates, shared_cpus: int | None
) -> list[StageSeconds]:
    """Computes the wall time of each stage.

    Args:
        config: configuration of the run.
        work: workloads of the stages.
        rates: rates of one tuner and one scorer.
        shared_cpus: CPUs of the machine that all actors share; None if they do not share one.
    """
    times = []
    for item in work:
        # A machine is fast or slow as a whole, so the fast quartiles belong together.
        middle, low, high = (
            _seconds(config, item, rates, train, score, shared_cpus)
            for train, score in zip(_values(rates.train), _values(rates.score), strict=True)
        )
        times.append(StageSeconds(stage=item.stage, middle=middle, low=low, high=high))
    return times


def _values(rate: Rate) -> tuple[float, float, float]:
    """Mean, fast and slow rate, in the order of StageSeconds."""
    return rate.mean, rate.high, rate.low


def _seconds(
    config: RunConfig,
    work: Workload,
    rates: Rates,
    train_rate: float,
    score_rate: float,
    shared_cpus: int | None,
) -> float:
    cluster = config.cluster
    training = work.trained_tokens / train_rate + work.trainings * rates.run_seconds
    # A generated token costs at least what a scored one does: one pass through the model.
    scoring = (work.scored_tokens + work.generated_tokens) / score_rate
    if work.stage == "influence":
        train_seconds = _on(cluster.num_tuners, training, work.trainings)
        score_seconds = _on(cluster.num_scorers, scoring, work.models_scored)
        seconds = ACTORS_START_SECONDS + max(train_seconds, score_seconds)
        # Finished units were timed beside other actors, so their rates contain the sharing.
        if shared_cpus is not None and rates.is_probe:
            on_cpus = (training + scoring) * _threads(cluster) / shared_cpus
            seconds = max(seconds, ACTORS_START_SECONDS + on_cpus)
        return seconds
    workers = _most(config.train.num_workers)
    if shared_cpus is not None:
        workers = min(workers, max(1.0, shared_cpus / _threads(cluster)))
    seconds = TRAIN_START_SECONDS + training / workers
    if work.models_scored:
        scorers = _on(cluster.num_scorers, scoring, work.models_scored)
        seconds += ACTORS_START_SECONDS + scorers
    return seconds


def _on(actors: int, seconds: float, units: int) -> float:
    """Seconds of equal work units on some actors; in the last round some actors may be idle."""
    return seconds * math.ceil(units / actors) / units if units else 0.0


def _threads(cluster: ClusterConfig) -> int:
    return max(1, int(cluster.actor_cpus))


def _most(num_workers: int | tuple[int, int]) -> float:
    return float(num_workers if isinstance(num_workers, int) else num_workers[1])
