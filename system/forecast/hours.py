"""From tokens and rates to wall time.

A stage takes its actors' start and the longest of: its trainings on the tuners, its scorings on
the scorers, and, where all actors share this machine's CPUs and a probe measured each alone, all of
that on its CPUs.  The final training and the arms are taken to be as fast per worker as a tuner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from system.config import ClusterConfig, RunConfig
from system.forecast.rates import Rate, Rates
from system.forecast.workload import Workload

ACTORS_START_SECONDS = 22.0
"""Ray, a tuner and a vLLM engine.  Stage seconds less half the trainings' seconds (two tuners) of a
run of `configs/real_cpu.yaml` on 2 cores at commit 835d6a9: 1,439.7 - 2,834.3 / 2 = 22.6."""
TRAIN_START_SECONDS = 37.0
"""A group of Ray Train workers, and the export.  Stage seconds less those of its steps, runs of
`configs/real_cpu.yaml` and `configs/quickstart.yaml` on 2 cores: 64.7 - 28.0 and 41.0 - 4.1."""

LEFT_OUT = (
    "a worker of train and of the arms counts as a tuner; what is finished of a stage under way is "
    "not taken off, nor are runs of earlier attempts that still hold. Left out: ingest, model, "
    "tag, solving, selection and report; waiting for machines and storage; repeated work after "
    "failures; what actors that share a machine take from each other beside CPUs"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Wall time of a stage, with the quartiles of the rates carried through."""

    stage: str
    middle: float
    low: float
    high: float


def stage_seconds(
    config: RunConfig, work: Sequence[Workload], rates: Rates, shared_cpus: int | None
) -> list[StageSeconds]:
    """The wall time of each stage.

    Args:
        config: of the run.
        work: of the stages.
        rates: of one tuner and one scorer.
        shared_cpus: CPUs of the one machine that runs all actors; None where they have their own.
    """
    found = []
    for item in work:
        # Fast trainings meet fast scorings: machines are quick or slow as a whole.
        middle, low, high = (
            _seconds(config, item, rates, train, score, shared_cpus)
            for train, score in zip(_values(rates.train), _values(rates.score), strict=True)
        )
        found.append(StageSeconds(stage=item.stage, middle=middle, low=low, high=high))
    return found


def _values(rate: Rate) -> tuple[float, float, float]:
    """Middle, fast, slow."""
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
        # Finished units were timed while others ran beside them: that is in their rates.
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
    """Seconds of equal units on some actors: the last round may leave some of them idle."""
    return seconds * math.ceil(units / actors) / units if units else 0.0


def _threads(cluster: ClusterConfig) -> int:
    return max(1, int(cluster.actor_cpus))


def _most(num_workers: int | tuple[int, int]) -> float:
    return float(num_workers if isinstance(num_workers, int) else num_workers[1])
