"""What a taxonomy is, and what is written to taxonomy.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

AsymmetryUnit = Literal["nats", "gamma"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """`target` depends on `source`: the source's data helps it, more than the other way round."""

    target: str
    source: str
    weight: float
    """Shrunken asymmetry, > 0, in the taxonomy's `asymmetry_unit`."""
    z: float
    """The smaller of the two test statistics (help, asymmetry), in standard errors."""
    p: float
    """One-sided p-value of "helps, and more than the other way round": the larger of the two."""
    stability: float | None
    """Share of bootstrap draws whose acyclic graph has this edge; None without a bootstrap."""
    is_reduced: bool
    """True where the edge is part of the transitive reduction: no longer path implies it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taxonomy:
    """An acyclic graph of dependencies between categories, with the levels it implies."""

    categories: tuple[str, ...]
    edges: tuple[Edge, ...]
    """Edges of the acyclic graph, in category order of target, then source."""
    dropped: tuple[Edge, ...]
    """Significant edges left out because they would close a cycle, same order."""
    levels: tuple[int, ...]
    """Per category, edges on the longest path down to a base category; 0 = base."""
    level_stability: tuple[float, ...] | None
    """Per category, share of bootstrap draws that give it this level; None without a bootstrap."""
    order: tuple[str, ...]
    """All categories by level, then category order: every source before its dependents."""
    objective: float
    """Weight kept: the sum over `edges`."""
    gap: float
    """(upper bound - objective) / upper bound; 0 where the graph is proved to be the best."""
    method: str
    """How cycles were broken: `no cycle`, `dynamic programming`, `MILP`, `local search`."""
    num_tested: int
    """Ordered pairs with usable numbers in both directions."""
    false_discovery_rate: float
    asymmetry_unit: AsymmetryUnit
    num_bootstrap: int
    seed: int

    @property
    def isolated(self) -> tuple[str, ...]:
        """Categories without any edge: they are on level 0, but nothing says they are a base."""
        linked = {name for edge in self.edges for name in (edge.target, edge.source)}
        return tuple(name for name in self.categories if name not in linked)

    @property
    def level_by_category(self) -> dict[str, int]:
        """Level of each category, 0 = base; isolated categories are on level 0."""
        return dict(zip(self.categories, self.levels, strict=True))

    @property
    def curriculum_levels(self) -> dict[str, int | None]:
        """As `level_by_category`, but None for isolated categories: no evidence, no place."""
        isolated = set(self.isolated)
        return {n: None if n in isolated else v for n, v in self.level_by_category.items()}

    @property
    def summary(self) -> str:
        """One or two sentences for people."""
        if self.num_tested == 0:
            return (
                "No pair of categories could be tested: no pair has usable effects and errors in "
                "both directions (two replications are the least). All categories are on level 0."
            )
        if not self.edges:
            return (
                f"No dependency is significant among {self.num_tested} ordered pairs at a false "
                f"discovery rate of {self.false_discovery_rate:g}: all categories are on level 0."
            )
        text = (
            f"{len(self.edges)} dependencies among {self.num_tested} ordered pairs tested, "
            f"{max(self.levels) + 1} levels, {len(self.isolated)} categories without a dependency."
        )
        if self.dropped:
            text += (
                f" {len(self.dropped)} more would close a cycle and were left out "
                f"({self.method}, gap {self.gap:.2%})."
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """The content of taxonomy.json, ready for `json.dump`."""
        content = asdict(self)
        for edge in (*content["edges"], *content["dropped"]):
            # JSON has no infinity: errors of exactly zero give an unbounded statistic.
            edge["z"] = max(-1e300, min(1e300, edge["z"]))
        return content | {"isolated": list(self.isolated), "summary": self.summary}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Taxonomy:
        """The taxonomy that `to_json` wrote."""
        fields = {name: content[name] for name in cls.__dataclass_fields__}
        for name in ("edges", "dropped"):
            fields[name] = tuple(Edge(**edge) for edge in fields[name])
        for name in ("categories", "levels", "order", "level_stability"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)
