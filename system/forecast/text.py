"""Words a forecast as text: the lines that `instructmix check` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from system.forecast.forecast import Forecast
from system.forecast.hours import LEFT_OUT, Rate
from system.forecast.workload import Workload, num_passes
from system.influence.design.cost import most_replications
from system.influence.design.doses import in_words
from system.influence.design.estimators import ESTIMATORS, FIRST_ORDER

if TYPE_CHECKING:
    from system.config import InfluenceConfig

_BASIS = {
    "exact": "tokens of influence and of test rows are exact",
    "means": "the corpus is large: tokens are rows times the exact mean of their category",
    "sample": "tokens are estimated from a sample of the rows",
}
"""How the tokens were obtained, by `CorpusStats.basis`."""


def describe(forecast: Forecast) -> list[str]:
    """The lines of a forecast: work, time and disk space."""
    parts = [[*_plan(forecast), *_work(forecast)], [*_time(forecast)], [*_disk(forecast)]]
    return [line for part in parts if part for line in (*part, "")]


def _plan(forecast: Forecast) -> Iterator[str]:
    config = forecast.config
    influence, evaluate, solve = config.influence, config.evaluate, config.solve
    count = f"{influence.replications}"
    if influence.estimator == "auto":
        most = most_replications(influence) if forecast.cost is None else forecast.cost.replications
        count = f"{influence.replications} to {most}"
    doses = in_words(influence.doses)
    yield (
        f"influence: {influence.estimator}, {count} replications of "
        f"{_in_words(influence)} ({' and '.join(influence.directions)})"
        f"{f', at {doses}' if doses else ''}"
    )
    if influence.estimator == "gradient":
        yield f"  {FIRST_ORDER}"
    if forecast.appending:
        yield f"  {forecast.appending}"
    elif influence.append and (forecast.stats is None or forecast.stats.basis == "sample"):
        yield (
            "  append: which part of the earlier result can be reused is known after the stage "
            "tag; until then everything is counted"
        )
    yield f"train: {num_passes(config)} x {solve.budget:,} {solve.unit}"
    yield f"evaluate: {len(evaluate.arms)} arms x {evaluate.seeds} seeds, the same budget each"
    if forecast.why_unknown:
        yield f"  {forecast.why_unknown}"


def _in_words(influence: InfluenceConfig) -> str:
    if influence.estimator != "auto":
        return ESTIMATORS[influence.design].in_words
    designs = influence.auto.designs
    if len(designs) == 1:
        return f"{ESTIMATORS[influence.design].in_words}, until auto.regret is reached"
    return (
        f"the cheapest of {', '.join(designs)} (each makes the first {influence.replications}), "
        "until auto.regret is reached"
    )


def _work(forecast: Forecast) -> Iterator[str]:
    stats = forecast.stats
    if stats is None:
        return
    is_exact = forecast.is_exact
    yield ""
    for item in forecast.work:
        about = "" if is_exact and item.stage == "influence" else "about "
        if item.stage == "influence" and forecast.config.influence.estimator == "auto":
            about = f"at most {about}"
        yield from _stage(item, about, is_done=item.stage in forecast.done)
    left = forecast.left
    if left:
        which = "total" if len(left) == len(forecast.work) else "remaining"
        trained = sum(item.trained_tokens for item in left)
        others = sum(item.scored_tokens + item.generated_tokens for item in left)
        total = sum(item.token_equivalents for item in left)
        yield (
            f"  {which}: {trained:,} tokens trained, {others:,} scored or generated: "
            f"{total:,.0f} token equivalents (scored and generated tokens count a third)"
        )
    basis = _BASIS[stats.basis]
    if stats.relative_error:
        basis += f", +- {1.96 * stats.relative_error:.0%}"
    if stats.left_out:
        basis += f"; {stats.left_out}"
    mix = "" if "solve" in forecast.done else "; for train and arms the base mix is assumed"
    yield f"  {len(stats.categories)} categories; {basis}{mix}"


def _stage(item: Workload, about: str, *, is_done: bool) -> Iterator[str]:
    done = " (done)" if is_done else ""
    yield (
        f"  {item.stage:<10} {_trainings(item.trainings)} on up to {item.trained_rows:,} rows: "
        f"{about}{item.trained_tokens:,} tokens trained{done}"
    )
    if item.models_scored:
        yield (
            f"  {'':<10} {item.models_scored:,} models scored on {item.scored_rows:,} held-out "
            f"rows: {about}{item.scored_tokens:,} tokens scored"
        )
    if item.generated_tokens:
        yield (
            f"  {'':<10} answers for accuracy: at most {item.generated_tokens:,} tokens generated"
        )


def _trainings(count: int) -> str:
    return "1 training" if count == 1 else f"{count:,} trainings"


def _time(forecast: Forecast) -> Iterator[str]:
    rates = forecast.rates
    if rates is None:
        if forecast.work and not forecast.left:
            yield "time: none, all of these stages are done"
        elif not forecast.why_unknown:
            yield f"time: no estimate: {forecast.why_no_rates}"
        return
    yield f"time, estimated from {rates.source}"
    yield (
        f"  one tuner {_rate(rates.train)}, one scorer {_rate(rates.score)} "
        "(mean, and quartiles of single measurements)"
    )
    for item in forecast.seconds:
        yield (
            f"  {item.stage:<10} {duration(item.middle)} "
            f"({duration(item.low)} to {duration(item.high)})"
        )
    total = sum(item.middle for item in forecast.seconds)
    yield f"  {'total':<10} {duration(total)}"
    if rates.is_probe:
        yield (
            "  scoring was timed as a forward pass, not through vLLM; a generated token counts as "
            "a scored one, although it takes at least as long"
        )
    if forecast.why_untimed:
        yield f"  no time for some stages: {forecast.why_untimed}"
    yield f"  {LEFT_OUT}"


def _disk(forecast: Forecast) -> Iterator[str]:
    if not forecast.disk:
        yield "disk: known after the stage model"
        return
    peak = forecast.peak_bytes
    yield f"disk: at most {size(peak)} more at one time" if peak else "disk: nothing left to write"
    for part in forecast.disk:
        if part.stage not in forecast.done:
            yield f"  {part.stage:<10} {size(part.size_bytes):>10}  {part.name}"
    if forecast.corpus_bytes is not None:
        yield f"  (the corpus already takes {size(forecast.corpus_bytes)})"
    free = forecast.free_bytes
    if free is not None:
        yield f"  {size(free)} are free on the disk of the run directory"
        if peak > free:
            yield (
                "note: the disk is too small: free some space, use another run_dir, or lower "
                "evaluate.arms, evaluate.seeds, train.keep_checkpoints or cluster.num_scorers"
            )


def _rate(rate: Rate) -> str:
    return f"{rate.mean:,.0f} tokens/s ({rate.low:,.0f} to {rate.high:,.0f})"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
