"""Stages `solve` and `curriculum`: pure computations of milliseconds, made in the driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.appender import earlier_of
from actors.stage import StageContext, StageResult
from system import storage
from system.config import SolveConfig
from system.curriculum import plan_curriculum
from system.data.corpus import Corpus
from system.data.lengths import SeededLengths, mean_response_tokens
from system.influence.append_cost import append_cost
from system.influence.cost import check_token_limit, influence_cost
from system.influence.deciding_dose import choose_doses, deciding_note
from system.influence.dose_views import read_levels
from system.influence.heldout_cost import stage_heldout
from system.influence.matrix import EffectMatrix
from system.mix_notes import (
    appended_notes,
    base_notes,
    choose_shrinkage,
    evidence_notes,
    extrapolation_notes,
    why_not_believed,
)
from system.models.base import load_tokenizer
from system.planning import (
    SWEEP_MOVES,
    check_limits,
    dependency_effects,
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
from system.taxonomy import estimate_taxonomy


def check_before_influence(context: StageContext) -> None:
    """What would make the money of the expensive stage ill spent is found before it starts.

    Raises:
        InfeasibleMixError, ConfigError: see `system.planning.check_limits`.
        ConfigError: the design takes more than `influence.max_token_equivalents`.
        DataError: a category has too few rows for a dose.
    """
    config = context.config
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokens = mean_response_tokens(corpus) if config.solve.unit == "tokens" else None
    check_limits(config.solve, corpus.counts("train"), tokens)
    if config.influence.max_token_equivalents is not None:
        lengths = SeededLengths(corpus)
        if context.appends_to is not None:
            cost = append_cost(
                config, earlier_of(context), corpus, lengths, lambda: _tokenizer(context)
            )
        else:
            cost = influence_cost(
                config.influence,
                run_seed=config.seed,
                sources=corpus.categories,
                lengths=lengths,
                heldout=stage_heldout(config, corpus, lengths, lambda: _tokenizer(context)),
            )
        check_token_limit(config.influence, cost)


def _tokenizer(context: StageContext) -> Any:
    return load_tokenizer(
        context.input("model", "model"),
        trust_remote_code=context.config.model.trust_remote_code,
    )


def run_solve(context: StageContext) -> StageResult:
    """The mix: mix.json, and the sweep of the trust region."""
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
        draws = 100 if len(mix.categories) <= 64 else 20  # each costs as much as a mix
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
    """The optimiser's question from what the influence stage left, and which doses decide."""
    corpus = Corpus.open(context.input("tag", "manifest"))
    tokens = mean_response_tokens(corpus) if solve.unit == "tokens" else None
    counts = corpus.counts("train")
    levels = _levels(context)
    matrices, deciding = _deciding_matrices(solve, levels, counts, tokens)
    problem = mix_problem(solve, matrices, counts, tokens, levels)
    if problem.curve_add is not None and solve.max_categories is None:
        return problem, ()  # all doses do, and the mix says so
    return problem, deciding


def run_curriculum(context: StageContext) -> StageResult:
    """Dependency taxonomy and stages."""
    config = context.config
    matrices = _matrices(context)
    categories, effects, errors, freedom = dependency_effects(matrices)
    taxonomy = estimate_taxonomy(
        categories,
        effects,
        errors,
        degrees_of_freedom=freedom,
        false_discovery_rate=config.curriculum.false_discovery_rate,
        num_bootstrap=config.curriculum.bootstrap,
        seed=config.seed,
    )
    mix = Mix.from_json(storage.read_bytes(context.input("solve", "mix")).decode())
    curriculum = plan_curriculum(
        {name: round(count) for name, count in mix.counts().items()},
        # Without a target of its own a category has no dependency: None keeps its share.
        {name: taxonomy.curriculum_levels.get(name) for name in mix.counts()},
        preset=config.curriculum.preset,
        num_stages=config.curriculum.num_stages,
        epochs=config.curriculum.epochs,
        tilt=config.curriculum.tilt,
        rehearsal=config.curriculum.rehearsal,
    )
    storage.write_json(storage.join(context.attempt, "taxonomy.json"), taxonomy.to_json())
    storage.write_json(storage.join(context.attempt, "curriculum.json"), curriculum.to_json())
    sizes = ", ".join(f"{stage.name} {stage.size:,}" for stage in curriculum.stages)
    lines = [taxonomy.summary, f"stages: {sizes}"]
    if curriculum.note:
        lines.append(curriculum.note)
    return StageResult(
        outputs={"taxonomy": "taxonomy.json", "curriculum": "curriculum.json"},
        counts={
            "edges": len(taxonomy.edges),
            "levels": max(taxonomy.levels) + 1,
            "stages": len(curriculum.stages),
            "examples": sum(stage.size for stage in curriculum.stages),
        },
        lines=tuple(lines),
    )


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
    """The effects that decide the mix, by direction, and where there are several doses, which."""
    if all(len(found) == 1 for found in levels.values()):
        return {direction: found[0] for direction, found in levels.items()}, ()
    moves = largest_moves(solve, counts, tokens)
    if len(levels) == 1:  # one matrix serves both ways
        moves = dict.fromkeys(moves, np.maximum(moves["add"], moves["remove"]))
    place_S = [list(counts).index(name) for name in next(iter(levels.values()))[0].sources]
    chosen = {
        direction: choose_doses(found, solve.dose, moves[direction][place_S])
        for direction, found in levels.items()
    }
    return chosen, (deciding_note(chosen, solve.dose),)


def _matrices(context: StageContext) -> dict[str, EffectMatrix]:
    """By direction, of the largest dose: dependencies are judged by significance."""
    uri = context.input("influence", "matrix")
    table = storage.read_table(uri)
    return {
        direction: EffectMatrix.from_table(table, direction=direction, where=uri)
        for direction in context.config.influence.directions
    }


def _start(context: StageContext, mix: Mix, summary: dict[str, Any]) -> tuple[str, ...]:
    asked = context.config.influence.rows_per_category
    rows = dict.fromkeys(summary["sources"], float(asked))
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


def mix_lines(mix: Mix) -> tuple[str, ...]:
    """What a mix does, for the log of the run."""
    error = "" if mix.expected_gain_se is None else f" +- {mix.expected_gain_se:.4f}"
    lines = [
        f"moved {mix.moved:.1%} of {mix.budget:,.0f} {mix.unit}; predicted gain "
        f"{mix.expected_gain:+.4f}{error} {mix.effect_unit}"
    ]
    if mix.expected_regret is not None:
        lines[0] += f"; knowing the effects exactly would add {mix.expected_regret:.4f} on average"
    if mix.status != "optimal":
        share = "" if mix.gap_share is None else f", {mix.gap_share:.2%} of its gain"
        lines.append(
            "the search for whole counts stopped at its limit: this is the best mix found, within "
            f"{mix.solver.gap:.2g} {mix.effect_unit} of the proven bound{share}; "
            "solve.mip_max_nodes raises the limit"
        )
    changes = sorted(mix.categories, key=lambda item: item.count - item.base)
    up = [item for item in reversed(changes) if item.count - item.base >= 1][:3]
    down = [item for item in changes if item.base - item.count >= 1][:3]
    for word, items in (("more", up), ("less", down)):
        if items:
            parts = [f"{i.category} {i.base:,.0f} -> {i.count:,.0f}" for i in items]
            lines.append(f"{word}: {', '.join(parts)}")
    return (*lines, *mix.notes)
