"""The design of an influence stage as records: its runs, replications, rows and targets.

`interventions.assemble_design` builds it, `design.json` stores it, and everything that trains,
scores or estimates reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from system.errors import DataError
from system.influence.design.doses import at_every_dose
from system.influence.design.estimators import APPEND, ESTIMATORS, Run

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryRows:
    """Training rows of one category in one replication."""

    available: int
    """Usable rows that were drawn; fewer than requested only if the category has no more."""
    base: int
    dose: int
    """Base rows that `remove` masks; with several doses, those of the largest dose."""
    extra: int
    """Rows that only `add` trains on, of the largest dose; 0 if `add` is not measured."""
    warm: int
    """Rows of the shared warm-up (`branch`)."""
    warm_reused: int
    """Warm-up rows that are also base rows, because the category has too few rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionRun:
    """One short training and its scoring, on the schedule of a replication."""

    replication: int
    kind: str
    """`warm`, `reference`, `add`, `remove`, `append`, `mix-add`, `mix-remove` or `gradient`."""
    source: int
    """Index of the source category; for `mix-*`, of the dose pattern; for `gradient`, of the
    warm-up checkpoint.  -1 if the run has none."""
    dose: int = 0
    """Requested rows of the dose if several doses are measured, else 0."""

    @property
    def name(self) -> str:
        """The name of its files, without the ending."""
        suffix = f"-{self.source:03d}" if self.source >= 0 else ""
        suffix += f"-dose{self.dose}" if self.dose else ""
        return f"r{self.replication:02d}-{self.kind}{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """One common schedule and the rows in it."""

    index: int
    seed: int
    plan_sha256: str
    """Hash of the schedule; it does not depend on the dose labels of the rows."""
    warm_sha256: str | None
    num_steps: int
    rows: dict[str, CategoryRows]
    dose_tokens: dict[str, dict[str, int]]
    """Direction -> source -> response tokens of the dose."""
    patterns: dict[str, list[list[bool]]] = field(default_factory=dict)
    """`random-design`: direction -> run -> source -> whether its dose is in the run."""
    smaller_tokens: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """With several doses: direction -> source -> response tokens of all doses but the largest,
    ascending."""
    append_sha256: str | None = None
    """Hash of the schedule with the rows of appended categories."""
    foreign_rows: int = 0
    """Base rows of categories whose measurements are no longer valid."""

    def plan_of(self, kind: str) -> str | None:
        """Hash of the schedule that a run of this kind trains on."""
        return {"warm": self.warm_sha256, "append": self.append_sha256}.get(kind, self.plan_sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One held-out set on which effects are measured."""

    name: str
    num_rows: int
    num_tokens: int
    """Response tokens."""
    is_external: bool
    """From `influence.targets`: it is not a category of the corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """What this design adds to an earlier, finished design."""

    earlier: str
    """Attempt name of the earlier design."""
    sources: tuple[str, ...]
    """All appended categories (the base has no rows of them), earlier appends included."""
    new: tuple[str, ...]
    """The appended categories that this design adds."""
    stale: dict[str, str]
    """Category of the earlier design whose measurements are no longer valid -> reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """All runs of an influence stage, and the targets on which they are measured."""

    estimator: str
    seed: int
    directions: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[Target, ...]
    replications: tuple[Replication, ...]
    asked: dict[str, int]
    """Rows per category that the configuration requests: base, dose, extra, warm, heldout."""
    dropped: dict[str, int]
    """Counts of drawn rows that cannot be trained or scored on, by reason."""
    gradient_checkpoints: int = 0
    """Checkpoints of each replication's warm-up (`gradient`)."""
    doses: tuple[int, ...] = ()
    """Requested rows of each dose, ascending; empty if there is only one dose."""
    append: Append | None = None

    @property
    def all_runs(self) -> tuple[InterventionRun, ...]:
        """All runs, warm-ups and gradients included, in starting order: replication by replication.

        `design.json` lists their names under the key `units`.
        """
        runs = ESTIMATORS[self.estimator].all_runs(
            len(self.sources), self.directions, self.gradient_checkpoints
        )
        return self._expanded(runs)

    @property
    def runs(self) -> tuple[InterventionRun, ...]:
        """The runs with held-out losses: trained and scored, or predicted (`gradient`)."""
        runs = ESTIMATORS[self.estimator].runs(len(self.sources), self.directions)
        return self._expanded(runs)

    def _expanded(self, runs: Sequence[Run]) -> tuple[InterventionRun, ...]:
        """The runs of one replication, repeated for every replication and every distinct dose.

        An appended category has a single run, which serves both directions.
        """
        names = () if self.append is None else self.append.sources
        places = [place for place, name in enumerate(self.sources) if name in names]
        single = [run for run in runs if run[1] not in places]
        return tuple(
            InterventionRun(replication=replication, kind=kind, source=source, dose=dose)
            for replication in range(len(self.replications))
            for kind, source, dose in (
                *at_every_dose(single, self.doses, partial(self.largest_dose_rows, replication)),
                *((APPEND, place, 0) for place in places),
            )
        )

    def largest_dose_rows(self, replication: int, direction: str, source: int) -> int:
        """The rows of a source's largest dose in one replication."""
        rows = self.replications[replication].rows[self.sources[source]]
        return rows.extra if direction == "add" else rows.dose

    def is_appended(self, name: str) -> bool:
        """Whether the base has no rows of the category."""
        return self.append is not None and name in self.append.sources

    def first(self, replications: int) -> Design:
        """The same design with its first replications alone."""
        return replace(self, replications=self.replications[:replications])

    def dose_rows(self, direction: str) -> np.ndarray:
        """[R, S] rows of the dose; with several doses, of the largest."""
        name = "extra" if direction == "add" else "dose"
        return np.array(
            [[getattr(rep.rows[s], name) for s in self.sources] for rep in self.replications],
            dtype=float,
        )

    def dose_tokens(self, direction: str) -> np.ndarray:
        """[R, S] response tokens of the dose; with several doses, of the largest."""
        return np.array(
            [[rep.dose_tokens[direction][s] for s in self.sources] for rep in self.replications],
            dtype=float,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `design.json`."""
        value = asdict(self)
        # A design with one dose has no keys about several doses.
        if not self.doses:
            del value["doses"]
            for replication in value["replications"]:
                del replication["smaller_tokens"]
        return {"format": FORMAT, **value, "units": [run.name for run in self.all_runs]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Design:
        """The design that `to_json` wrote.

        Raises:
            DataError: another format.
        """
        if value.get("format") != FORMAT:
            raise DataError(
                f"{where}: expected an influence design of format {FORMAT}, found "
                f"{value.get('format')!r}; run the stage again with --redo influence"
            )
        replications = tuple(
            Replication(
                **{
                    **item,
                    "rows": {name: CategoryRows(**rows) for name, rows in item["rows"].items()},
                }
            )
            for item in value["replications"]
        )
        return cls(
            estimator=value["estimator"],
            seed=value["seed"],
            directions=tuple(value["directions"]),
            sources=tuple(value["sources"]),
            targets=tuple(Target(**item) for item in value["targets"]),
            replications=replications,
            asked=dict(value["asked"]),
            dropped=dict(value["dropped"]),
            gradient_checkpoints=value.get("gradient_checkpoints", 0),
            doses=tuple(value.get("doses", ())),
            append=_append_from(value.get("append")),
        )


def _append_from(value: Mapping[str, Any] | None) -> Append | None:
    if value is None:
        return None
    names = {name: tuple(value[name]) for name in ("sources", "new")}
    return Append(earlier=value["earlier"], stale=dict(value["stale"]), **names)
