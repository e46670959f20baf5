"""Stage `solve`: computes the mix in the driver, in milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.stage import StageContext, StageResult
from system import storage
from system.config import SolveConfig
from system.data.corpus import Corpus
from system.data.lengths import mean_response_tokens
from system.influence.estimate.dose_views import read_levels
from system.influence.estimate.matrix import EffectMatrix
from system.mix.deciding_dose import choose_doses, deciding_note
from system.mix.notes import (
    appended_notes,
    base_notes,
    choose_shrinkage,
    evidence_notes,
    extrapolation_notes,
    mix_lines,
    why_not_believed,
)
from system.mix.question import (
    SWEEP_MOVES,
    largest_moves,
    mix_options,
    mix_problem,
)
from system.solve import (
    Mix,
    MixProblem,
    expected_regret,
    nearest_mix,
    solve_mix,
    sweep_move,
)


def run(context: StageContext) -> StageResult:
    """Solves the mix and writes mix.json and the sweep of the trust region."""
    summary = storage.read_json(context.input("influence", "summary"))
    solve, chosen = choose_shrinkage(context.config.solve, summary)
    problem, deciding = measured_problem(context, solve)
    doubt = why_not_believed(summary)
    options = mix_options(solve, is_believed=not doubt)
    if doubt:
        mix = nearest_mix(problem, options)
        mix = dataclasses.replace(mix, notes=(doubt, *mix.notes))
    else:
        mix = solve_mix(problem, options)
        draws = 100 if len(mix.categories) <= 64 else 20  # each draw solves a whole mix
        regret = expected_regret(problem, options, num_draws=draws, seed=context.config.seed)
        mix = dataclasses.replace(mix, expected_regret=regret.known_value)
    mix = dataclasses.replace(
        mix,
        effect_unit=summary["unit"],
        appended=tuple(append["categories"]) if (append := summary.get("append")) else (),
        notes=(
            *evidence_notes(mix, summary),
            *chosen,
            *mix.notes,
            *deciding,
            *_start(context, mix, summary),
            *_extrapolation(mix, summary),
            *appended_notes(mix, summary),
        ),
    )
    storage.write_bytes(storage.join(context.attempt, "mix.json"), mix.to_json().encode())
    moves = sorted({*SWEEP_MOVES, solve.move})
    sweep = sweep_move(problem, options, moves)
    storage.write_json(
        storage.join(context.attempt, "sweep.json"), [dataclasses.asdict(p) for p in sweep]
    )
    return StageResult(
        outputs={"mix": "mix.json", "sweep": "sweep.json"},
        counts={"categories": len(mix.categories), "examples": sum(mix.counts().values())},
        lines=mix_lines(mix),
    )


def measured_problem(
    context: StageContext, solve: SolveConfig
) -> tuple[MixProblem, tuple[str, ...]]:
    """The optimisation problem from the effects of the influence stage; a note on the doses."""
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokens = mean_response_tokens(corpus) if solve.unit == "tokens" else None
    counts = corpus.counts("train")
    levels = _levels(context)
    matrices, deciding = _deciding_matrices(solve, levels, counts, tokens)
    problem = mix_problem(solve, matrices, counts, tokens, levels)
    if problem.curve_add is not None and solve.max_categories is None:
        return problem, ()  # all doses are used, and the mix has its own note
    return problem, deciding


def _levels(context: StageContext) -> dict[str, list[EffectMatrix]]:
    """Direction -> effects at each measured dose, ascending."""
    uri = context.input("influence", "matrix")
    table = storage.read_table(uri)
    return {
        direction: read_levels(table, direction=direction, where=uri)
        for direction in context.config.influence.directions
    }


def _deciding_matrices(
    solve: SolveConfig,
    levels: Mapping[str, Sequence[EffectMatrix]],
    counts: Mapping[str, int],
    tokens: Mapping[str, float] | None,
) -> tuple[dict[str, EffectMatrix], tuple[str, ...]]:
    """The effects that decide the mix, by direction; with several doses, also a note on them."""
    if all(len(matrices) == 1 for matrices in levels.values()):
        return {direction: matrices[0] for direction, matrices in levels.items()}, ()
    moves = largest_moves(solve, counts, tokens)
    if len(levels) == 1:  # one matrix serves both ways
        moves = dict.fromkeys(moves, np.maximum(moves["add"], moves["remove"]))
    place_S = [list(counts).index(name) for name in next(iter(levels.values()))[0].sources]
    chosen = {
        direction: choose_doses(matrices, solve.dose, moves[direction][place_S])
        for direction, matrices in levels.items()
    }
    return chosen, (deciding_note(chosen, solve.dose),)


def _start(context: StageContext, mix: Mix, summary: dict[str, Any]) -> tuple[str, ...]:
    requested = context.config.influence.rows_per_category
    rows = dict.fromkeys(summary["sources"], float(requested))
    rows |= {
        name: sum(part["base"] for part in parts) / len(parts)
        for name, parts in summary["adapted"].items()
    }
    rows |= dict.fromkeys(append["categories"] if (append := summary.get("append")) else (), 0.0)
    supply = Corpus.open(context.input("tag", "manifest")).counts("train")
    return base_notes(context.config.solve, mix, rows, supply)


def _extrapolation(mix: Mix, summary: dict[str, Any]) -> tuple[str, ...]:
    doses = {
        name: max(part["dose"] for part in directions.values())
        for name, directions in summary["sources"].items()
    }
    return extrapolation_notes(mix, doses, summary["reference_rows"])
