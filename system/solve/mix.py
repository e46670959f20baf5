"""The result of the solver: a mix with its explanation, and its JSON form (``mix.json``)."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from system.errors import DataError

At = Literal["lower", "upper", "supply", "cap", "free", "base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryMix:
    """One category of the mix: its count, and the limits and prices that explain it."""

    category: str
    base: float
    """Examples in the base mix w0."""
    count: float
    """Examples in the mix."""
    share: float
    """Share of the mix: of its examples, or of its tokens when the budget is in tokens."""
    reduced_cost: float | None
    """Change of the objective if the count is raised by one example and everything else is
    optimised again. 0 if no limit binds (<= 0 at a measured dose, where a curve has a kink), >= 0
    at an upper limit, <= 0 at a lower limit."""
    supply_price: float | None
    """Gain from one more example in the supply, >= 0."""
    at: At
    """The limit that determines the count; ``free`` if none does."""
    limit_price: float | None = None
    """Gain from loosening the limit in ``at`` by one example, >= 0."""
    score: float = 0.0
    """Importance-weighted gain from one more example, without any limit."""
    score_low: float | None = None
    """The mix stays the same while the score is in ``[score_low, score_high]``; null: unbounded.
    One entry gamma[i, j] may therefore change by ``(score_high - score) / importance_i``, as long
    as the guard of target i does not bind."""
    score_high: float | None = None
    supply_low: float | None = None
    """The explanation (binding limits and prices) stays valid while the supply is in
    ``[supply_low, supply_high]``; null: unbounded, or no supply limit."""
    supply_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetMix:
    """The predicted change of one target."""

    target: str
    base_effect: float
    """(E w0)_i."""
    effect: float
    """base_effect + change."""
    guard_price: float | None
    """Gain per unit by which the guard of this target is loosened, >= 0."""
    change: float = 0.0
    """Expected change against the base mix."""
    change_se: float | None = None
    """Standard error of ``change``; null if the effects have no standard errors."""
    guard: float | None = None
    """Largest decrease that is allowed; null: no limit."""
    importance: float = 0.0
    """Weight of the target in the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMix:
    """One group limit: the count of the group, and the price of the limit."""

    group: str
    count: float
    lower: float
    upper: float | None
    price: float | None
    """Gain per example by which the binding limit of the group is loosened, >= 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Prices of the same problem with fractional counts; a mix in whole examples has none itself.

    Its gain is an upper bound of the gain of the whole mix. When the two are close, these prices
    are close to the value of loosening a limit there. With ``max_categories`` the problem contains
    only the categories of the mix; the others have the price 0.
    """

    gain: float
    move_price: float
    budget_price: float
    supply_prices: dict[str, float]
    """Category -> gain from one more example in its supply."""
    limit_prices: dict[str, float]
    """Category -> gain per example by which its binding limit (supply, cap, lower or upper limit)
    is loosened."""
    guard_prices: dict[str, float]
    """Target -> gain per unit by which its guard is loosened."""


NATS = "nats per response token"
ANSWERS = "share of right answers"
"""The two units of effects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverInfo:
    """The solver, its effort, and the precision of its answer."""

    name: str
    version: str
    seconds: float
    iterations: int = 0
    rows: int = 0
    """Rows of the final program, without guards that were never violated."""
    gap: float = 0.0
    """Difference between the proven upper bound and the gain, in the unit of the gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A solved mix; ``to_json`` is the content of ``mix.json``."""

    status: Literal["optimal", "feasible"]
    """``feasible``: the node limit stopped the integer search; see ``solver.gap``."""
    kind: str
    """linear, max-min, concave or robust."""
    objective: float
    """Objective of the mix: beta'Ew for linear; base objective plus gain for concave and, in the
    worst case, robust; the smallest change of any target for max-min."""
    base_objective: float
    """Objective of the base mix; 0 for max-min."""
    gain: float
    """objective - base_objective."""
    expected_gain: float
    """Importance-weighted expected change over all targets, for every kind of objective."""
    expected_gain_se: float | None
    budget: float
    unit: str
    move: float
    """Trust region, as a share of the budget."""
    moved: float
    """Share of the budget that moved away from the base mix."""
    categories: tuple[CategoryMix, ...]
    targets: tuple[TargetMix, ...]
    groups: tuple[GroupMix, ...]
    move_price: float | None
    """Gain per budget unit (example or token) by which the trust region is widened, >= 0."""
    budget_price: float | None
    """Gain from one more budget unit, with w0 and the trust region fixed; negative: it harms."""
    solver: SolverInfo
    relaxation: Relaxation | None = None
    """Fractional prices of a mix with ``integer`` or ``max_categories``; null for others."""
    effect_unit: str = NATS
    """Unit of effects, gains and prices: ``NATS`` or ``ANSWERS``."""
    expected_regret: float | None = None
    """Average increase of ``expected_gain`` if the effects were known exactly (``regret.py``); null
    if it was not computed."""
    appended: tuple[str, ...] = ()
    """Categories that `influence.append` added: their effects were measured at a base without rows
    of them."""
    notes: tuple[str, ...] = ()
    """Remarks for the reader, as sentences."""

    def counts(self) -> dict[str, float]:
        """Category -> examples."""
        return {c.category: c.count for c in self.categories}

    @property
    def gap_share(self) -> float | None:
        """``solver.gap`` as a share of the gain; None if there is no gain."""
        return self.solver.gap / self.gain if self.gain > 0 else None

    def to_json(self) -> str:
        """The mix as JSON text; numbers keep full precision."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Mix":
        """Reads the text of a ``mix.json``; unknown keys are ignored.

        Raises:
            DataError: the text is not JSON, or a key is missing.
        """
        try:
            raw = json.loads(text)
            return cls(
                **_fields_of(cls, raw)
                | {
                    "categories": tuple(
                        CategoryMix(**_fields_of(CategoryMix, c)) for c in raw["categories"]
                    ),
                    "targets": tuple(TargetMix(**_fields_of(TargetMix, t)) for t in raw["targets"]),
                    "groups": tuple(GroupMix(**_fields_of(GroupMix, g)) for g in raw["groups"]),
                    "solver": SolverInfo(**_fields_of(SolverInfo, raw["solver"])),
                    "relaxation": _relaxation(raw["relaxation"]),
                    "notes": tuple(raw["notes"]),
                    "appended": tuple(raw["appended"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"expected the text of a mix.json as `instructmix solve` writes it, but it cannot "
                f"be read ({error}); solve again"
            ) from error


def _relaxation(raw: dict[str, Any] | None) -> Relaxation | None:
    return None if raw is None else Relaxation(**_fields_of(Relaxation, raw))


def _fields_of(record: Any, raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(record)}
    return {key: value for key, value in raw.items() if key in names}
