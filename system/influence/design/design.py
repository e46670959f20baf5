"""What an influence stage is going to do: its runs, replications, rows and targets, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from system.errors import DataError
from system.influence.design.doses import with_doses
from system.influence.design.estimators import APPEND, ESTIMATORS, Run

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryRows:
    """Training rows of one category in one replication."""

    available: int
    """Usable rows that were drawn; fewer than asked only where the category has no more."""
    base: int
    dose: int
    """Of the base rows, those that `remove` masks; of several doses, those of the largest."""
    extra: int
    """Rows that only `add` trains on, likewise; 0 where that direction is not asked."""
    warm: int
    """Rows of the shared warm-up (`branch`)."""
    warm_reused: int
    """Warm-up rows that are base rows too, for want of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionRun:
    """One run: a training and its scoring."""

    replication: int
    kind: str
    """`warm`, `reference`, `add`, `remove`, `append`, `mix-add`, `mix-remove` or `gradient`."""
    source: int
    """Index of the source category, of the pattern of a mix, or of the warm-up's checkpoint that a
    gradient is taken at; -1 where the run has none."""
    dose: int = 0
    """Rows asked of the source's dose where several are measured; 0: the only dose, or none."""

    @property
    def name(self) -> str:
        """Name of its files."""
        suffix = f"-{self.source:03d}" if self.source >= 0 else ""
        suffix += f"-dose{self.dose}" if self.dose else ""
        return f"r{self.replication:02d}-{self.kind}{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """One common schedule."""

    index: int
    seed: int
    plan_sha256: str
    """Of the schedule, whatever doses its rows are marked with."""
    warm_sha256: str | None
    num_steps: int
    rows: dict[str, CategoryRows]
    dose_tokens: dict[str, dict[str, int]]
    """Direction -> source -> response tokens of the dose."""
    patterns: dict[str, list[list[bool]]] = field(default_factory=dict)
    """`random-design`: direction -> run -> source -> whether its dose is in the run."""
    smaller_tokens: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Several doses: direction -> source -> response tokens of all but the largest, ascending."""
    append_sha256: str | None = None
    """Of the schedule with the rows of appended categories."""
    foreign_rows: int = 0
    """Base rows of categories whose measurements no longer hold."""

    def plan_of(self, kind: str) -> str | None:
        """Hash of the schedule that a run of this kind trains on."""
        return {"warm": self.warm_sha256, "append": self.append_sha256}.get(kind, self.plan_sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One held-out set."""

    name: str
    num_rows: int
    num_tokens: int
    """Response tokens."""
    is_external: bool
    """Given by `influence.targets`, owned by no source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """What was added to an earlier, finished design."""

    earlier: str
    """Name of its attempt."""
    sources: tuple[str, ...]
    """Categories that the base has no rows of, those of earlier appends included."""
    new: tuple[str, ...]
    """Those of them that this design adds."""
    stale: dict[str, str]
    """Categories of the earlier design whose measurements no longer hold -> why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """All runs of an influence stage, and what they are measured on."""

    estimator: str
    seed: int
    directions: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[Target, ...]
    replications: tuple[Replication, ...]
    asked: dict[str, int]
    """Rows a category that the configuration asked for: base, dose, extra, warm, heldout."""
    dropped: dict[str, int]
    """Rows drawn that cannot be trained or scored on, by reason."""
    gradient_checkpoints: int = 0
    """Checkpoints of each replication's warm-up (`gradient`)."""
    doses: tuple[int, ...] = ()
    """Rows asked of each dose, ascending, where several are measured; empty with one."""
    append: Append | None = None

    @property
    def all_runs(self) -> tuple[InterventionRun, ...]:
        """All work, in the order in which it is best started: a replication at a time."""
        runs = ESTIMATORS[self.estimator].all_runs(
            len(self.sources), self.directions, self.gradient_checkpoints
        )
        return self._expanded(runs)

    @property
    def runs(self) -> tuple[InterventionRun, ...]:
        """All runs that have held-out losses: trained and scored, or (`gradient`) predicted."""
        runs = ESTIMATORS[self.estimator].runs(len(self.sources), self.directions)
        return self._expanded(runs)

    def _expanded(self, runs: Sequence[Run]) -> tuple[InterventionRun, ...]:
        """The given runs of every replication, at every dose that differs there.

        An appended category has one run, in any direction.
        """
        names = () if self.append is None else self.append.sources
        places = [place for place, name in enumerate(self.sources) if name in names]
        single = [run for run in runs if run[1] not in places]
        return tuple(
            InterventionRun(replication=replication, kind=kind, source=source, dose=dose)
            for replication in range(len(self.replications))
            for kind, source, dose in (
                *with_doses(single, self.doses, partial(self.held, replication)),
                *((APPEND, place, 0) for place in places),
            )
        )

    def held(self, replication: int, direction: str, source: int) -> int:
        """Rows of a source's largest dose in a replication."""
        rows = self.replications[replication].rows[self.sources[source]]
        return rows.extra if direction == "add" else rows.dose

    def is_appended(self, name: str) -> bool:
        """Whether the base has no rows of the category."""
        return self.append is not None and name in self.append.sources

    def first(self, replications: int) -> Design:
        """The same design with its first replications only."""
        return replace(self, replications=self.replications[:replications])

    def dose_rows(self, direction: str) -> np.ndarray:
        """[R, S] rows of the dose; of several, of the largest."""
        name = "extra" if direction == "add" else "dose"
        return np.array(
            [[getattr(rep.rows[s], name) for s in self.sources] for rep in self.replications],
            dtype=float,
        )

    def dose_tokens(self, direction: str) -> np.ndarray:
        """[R, S] response tokens of the dose; of several, of the largest."""
        return np.array(
            [[rep.dose_tokens[direction][s] for s in self.sources] for rep in self.replications],
            dtype=float,
        )

    def to_json(self) -> dict[str, Any]:
        """What `design.json` holds."""
        value = asdict(self)
        if not self.doses:  # the file of a design with one dose says nothing of several
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
