"""Plans curriculum stages from a mix and dependency levels: the presets and `plan_curriculum`.

Every preset describes its ideal stages as a fractional table: row sums are the stage sizes, column
sums are the totals.  The curriculum is the nearest integer table that satisfies the rehearsal
floors.  Axes: `T` curriculum stage, `S` category.

The ideal table of each preset, with totals `w`, their sum `N` and stage sizes `n_t`:

- `natural`: `w_j n_t / N`; every stage has the shares of the mix.
- `tilted`: `w_j n_t / N * (1 + tilt * place_t * level_j)`.  `place` (of the stage in time) and
  `level` are centred, weighted by examples, and scaled to at most 1 in size.  So the table keeps
  all row and column sums, and no cell differs from its natural value by more than the share `tilt`.
- `reversed`: the mirror image in time of `tilted`, as a control.
- `sequential`: level after level.  With as many stages as levels, each stage is one level, unless
  `stage_sizes` are given.
- `paper`: three passes over the mix; `num_stages` and `epochs` are ignored.  In the first pass, one
  tenth of the mix (one twentieth from 50,000 examples on) moves from dependent to base categories.
  The second pass is the mix itself.  The third mirrors the first.  Base categories have level 0;
  dependent categories are above half the highest level.

Source: DT-CSFT, arXiv 2409.07045.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from system.curriculum.flow import StageTable, nearest_table
from system.curriculum.records import Curriculum, Preset, Stage
from system.curriculum.settings import check_choices, read_counts, read_levels, read_sizes
from system.errors import ConfigError

PAPER_PASSES = 3
PAPER_LARGE_MIX = 50_000


def plan_curriculum(
    counts: Mapping[str, int] | Sequence[int] | np.ndarray,
    levels: Mapping[str, int | None] | Sequence[int | None] | np.ndarray,
    *,
    preset: Preset = "tilted",
    num_stages: int = 3,
    epochs: int = 1,
    tilt: float = 0.5,
    rehearsal: float = 0.2,
    stage_sizes: Sequence[int] | None = None,
    paper_shift: int | None = None,
) -> Curriculum:
    """Divides a mix into stages; totals are exactly `counts * epochs`, stage sizes are exact.

    If all levels are equal there is no order to follow: every preset gives natural stages, and
    `note` says so.

    Args:
        counts: examples per category, integers >= 0; an array has categories "0", "1", ...
        levels: level per category, 0 = base, in the order of `counts` or by name.  A category with
            level None keeps its natural share in every stage.
        preset: see the module docstring.
        num_stages: number of stages, at most the number of examples.
        epochs: passes over the mix, over all stages together.
        tilt: 0 (natural) to 1 (as far as rehearsal allows).
        rehearsal: each stage keeps at least this share, rounded down, of each category's natural
            count.  Above 0, each stage also gets at least one example of every category that has
            enough for all stages, if the stage sizes allow it; exceptions are listed in `missed`.
        stage_sizes: examples per stage, in order; their sum must be the number of examples.
            None: equal sizes.
        paper_shift: number of examples that `paper` moves; None: a tenth or a twentieth.

    Raises:
        ConfigError: a setting cannot be satisfied; the message gives the numbers.

    Example:
        >>> plan = plan_curriculum({"math": 6, "essay": 6}, {"math": 0, "essay": 1}, num_stages=2)
        >>> [stage.counts for stage in plan.stages]
        [{'math': 5, 'essay': 1}, {'math': 1, 'essay': 5}]
    """
    check_choices(preset, num_stages, epochs, tilt, rehearsal)
    names, counts_S = read_counts(counts)
    level_by_name = read_levels(levels, names)
    level_S = np.array([np.nan if v is None else v for v in level_by_name.values()], dtype=float)
    used = counts_S > 0
    if preset == "paper":
        _refuse_sizes(stage_sizes, int(counts_S.sum()))
        epochs, num_stages = PAPER_PASSES, PAPER_PASSES
    totals_S = counts_S * epochs
    sizes_T = read_sizes(stage_sizes, num_stages, totals_S, level_S[used], preset)
    table_TS = np.zeros((len(sizes_T), len(names)), dtype=np.int64)
    problem = StageTable(
        totals_S=totals_S[used], sizes_T=sizes_T, level_S=level_S[used], rehearsal=rehearsal
    )
    if preset == "paper" and not problem.is_flat:
        table_TS[:, used], deviation = _plan_paper(problem, paper_shift)
    else:
        table_TS[:, used], deviation = _plan_by_level(problem, preset, tilt)
    assert (table_TS.sum(axis=1) == sizes_T).all() and (table_TS.sum(axis=0) == totals_S).all()
    stage_names = _stage_names(preset, len(sizes_T))
    missed = problem.missed(table_TS[:, used])
    used_names = [name for name, is_used in zip(names, used, strict=True) if is_used]
    return Curriculum(
        stages=_stages(stage_names, names, table_TS),
        levels=level_by_name,
        preset=preset,
        epochs=epochs,
        tilt=float(tilt),
        rehearsal=float(rehearsal),
        deviation=deviation,
        missed=tuple((stage_names[t], used_names[s]) for t, s in missed),
        note=_note(preset, problem.is_flat, len(missed)),
    )


def _refuse_sizes(stage_sizes: Sequence[int] | None, num_examples: int) -> None:
    if stage_sizes is not None:
        raise ConfigError(
            "stage_sizes cannot be given with the preset 'paper', whose three passes are each as "
            f"long as the mix ({num_examples} examples); leave them out or choose another preset."
        )


def _stages(
    stage_names: Sequence[str], names: Sequence[str], table_TS: np.ndarray
) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            name=stage_name,
            size=int(row_S.sum()),
            counts={name: int(n) for name, n in zip(names, row_S, strict=True)},
        )
        for stage_name, row_S in zip(stage_names, table_TS, strict=True)
    )


def _plan_by_level(problem: StageTable, preset: Preset, tilt: float) -> tuple[np.ndarray, float]:
    if preset == "reversed":
        mirrored = StageTable(
            totals_S=problem.totals_S,
            sizes_T=problem.sizes_T[::-1],
            level_S=problem.level_S,
            rehearsal=problem.rehearsal,
        )
        table_TS, deviation = _plan_by_level(mirrored, "tilted", tilt)
        return table_TS[::-1], deviation
    if preset == "tilted" and not problem.is_flat:
        ideal_TS = _tilted(problem, tilt)
    elif preset == "sequential" and not problem.is_flat:
        ideal_TS = _sequential(problem)
    else:
        ideal_TS = problem.natural_TS
    return nearest_table(problem, ideal_TS, problem.floor_TS)


def _tilted(problem: StageTable, tilt: float) -> np.ndarray:
    """`natural * (1 + tilt * place * level)`; both factors are centred, so all sums stay."""
    has_level = ~np.isnan(problem.level_S)
    level_S = np.where(has_level, problem.level_S, 0.0)
    weight_S = problem.totals_S * has_level
    level_S = np.where(has_level, level_S - (level_S @ weight_S) / weight_S.sum(), 0.0)
    middle_T = (np.cumsum(problem.sizes_T) - problem.sizes_T / 2) / problem.totals_S.sum()
    place_T = middle_T - 0.5  # the size-weighted mean of the middles is exactly one half
    if len(place_T) == 1:
        return problem.natural_TS
    factor_TS = np.outer(place_T / np.abs(place_T).max(), level_S / np.abs(level_S).max())
    return problem.natural_TS * (1 + tilt * factor_TS)


def _sequential(problem: StageTable) -> np.ndarray:
    """Fills the stages level after level; within a level, categories keep their shares."""
    has_level = ~np.isnan(problem.level_S)
    ideal_TS = problem.natural_TS
    level_totals_S = problem.totals_S * has_level
    stage_ends_T = np.cumsum(problem.sizes_T) * (level_totals_S.sum() / problem.totals_S.sum())
    stage_starts_T = np.concatenate([[0.0], stage_ends_T[:-1]])
    start = 0
    for level in np.unique(problem.level_S[has_level]):
        at_level = problem.level_S == level
        size = int(problem.totals_S[at_level].sum())
        overlap_T = np.minimum(stage_ends_T, start + size) - np.maximum(stage_starts_T, start)
        share_S = problem.totals_S[at_level] / size
        ideal_TS[:, at_level] = np.outer(np.maximum(overlap_T, 0.0), share_S)
        start += size
    return ideal_TS


def _plan_paper(problem: StageTable, shift: int | None) -> tuple[np.ndarray, float]:
    """Plans the passes of the paper, group by group, so that exactly `shift` examples move."""
    passes = PAPER_PASSES
    size = int(problem.sizes_T[0])
    if shift is not None and (isinstance(shift, bool) or not isinstance(shift, int | np.integer)):
        raise ConfigError(
            f"paper_shift is a number of examples, a whole number from 0 up; got {shift!r}. For a "
            f"share of the mix of {size} examples, multiply by {size} and round."
        )
    if shift is None:
        shift = size // (20 if size >= PAPER_LARGE_MIX else 10)
    top = np.nanmax(problem.level_S)
    base_S = problem.level_S == 0
    if not base_S.any():
        base_S = problem.level_S == np.nanmin(problem.level_S)
    dependent_S = (problem.level_S > top / 2) & ~base_S
    table_TS = np.zeros((passes, len(problem.totals_S)), dtype=np.int64)
    deviation = 0.0
    for name, in_group_S, sign in (
        ("base", base_S, 1),
        ("dependent", dependent_S, -1),
        ("other", ~base_S & ~dependent_S, 0),
    ):
        if not in_group_S.any():
            continue
        group_size = int(problem.totals_S[in_group_S].sum()) // passes
        kept = 1 - shift / group_size
        if sign and (not 0 <= shift <= group_size or kept < problem.rehearsal - 1e-12):
            raise ConfigError(
                f"The preset 'paper' moves {shift} of {size} examples between base and dependent "
                f"categories, but the {name} categories hold {group_size}, which leaves them "
                f"{max(kept, 0.0):.1%} of their share in one pass, and rehearsal asks for "
                f"{problem.rehearsal:.1%}. Lower rehearsal, give a smaller paper_shift (at most "
                f"{int(group_size * (1 - problem.rehearsal))}), or choose another preset."
            )
        part = problem.part(in_group_S, group_size + sign * shift * np.array([1, 0, -1]))
        floor_TS = np.tile(
            np.floor(problem.rehearsal * part.totals_S / passes + 1e-9), (passes, 1)
        ).astype(np.int64)
        table_TS[:, in_group_S], moved = nearest_table(part, part.natural_TS, floor_TS)
        deviation += moved
    return table_TS, deviation


def _stage_names(preset: Preset, num_stages: int) -> tuple[str, ...]:
    if preset == "paper":
        return ("pass-1-base", "pass-2-natural", "pass-3-dependent")
    return tuple(f"stage-{t + 1}" for t in range(num_stages))


def _note(preset: Preset, is_flat: bool, num_missed: int) -> str:
    notes = []
    if is_flat and preset != "natural":
        notes.append(
            f"All categories are on one level, so there is no order to follow: the preset {preset} "
            "gives natural stages."
        )
    if num_missed:
        notes.append(
            f"The stage sizes leave no room for one example of every category in every stage: "
            f"{num_missed} pairs of stage and category have none."
        )
    return " ".join(notes)
