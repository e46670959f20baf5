"""The records of a curriculum: stages with counts, and the content of curriculum.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Preset = Literal["tilted", "paper", "sequential", "natural", "reversed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One curriculum stage: the number of examples of each category."""

    name: str
    size: int
    """Examples in this stage; the sum of `counts`."""
    counts: dict[str, int]
    """Examples per category, every category present, in the order of the curriculum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """Stages whose counts add up, category by category, to exactly the mix times the epochs."""

    stages: tuple[Stage, ...]
    levels: dict[str, int | None]
    """Dependency level of each category, 0 = base; None = no level, it keeps its natural share."""
    preset: Preset
    epochs: int
    tilt: float
    rehearsal: float
    deviation: float
    """Examples by which the counts differ from the preset's fractional table, summed over cells."""
    missed: tuple[tuple[str, str], ...]
    """(stage, category) pairs without an example, although the category has enough examples."""
    note: str
    """A sentence about anything unusual, else empty."""

    @property
    def counts_TS(self) -> np.ndarray:
        """[T, S] int64, examples per stage and category, categories in the order of `levels`."""
        return np.array([list(stage.counts.values()) for stage in self.stages], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """The content of curriculum.json, ready for `json.dump`."""
        return {
            "stages": [
                {"name": stage.name, "size": stage.size, "counts": dict(stage.counts)}
                for stage in self.stages
            ],
            "levels": dict(self.levels),
            "preset": self.preset,
            "epochs": self.epochs,
            "tilt": self.tilt,
            "rehearsal": self.rehearsal,
            "deviation": self.deviation,
            "missed": [list(pair) for pair in self.missed],
            "note": self.note,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Curriculum:
        """The curriculum that `to_json` wrote."""
        return cls(
            stages=tuple(
                Stage(name=s["name"], size=s["size"], counts=dict(s["counts"]))
                for s in content["stages"]
            ),
            levels=dict(content["levels"]),
            preset=content["preset"],
            epochs=content["epochs"],
            tilt=content["tilt"],
            rehearsal=content["rehearsal"],
            deviation=content["deviation"],
            missed=tuple((stage, category) for stage, category in content["missed"]),
            note=content["note"],
        )
