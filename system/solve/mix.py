"""The answer: a mix with its explanation, and its JSON form (``mix.json``)."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from system.errors import DataError

At = Literal["lower", "upper", "supply", "cap", "free", "base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryMix:
    """One category's place in the mix and why it is there."""

    category: str
    base: float
    """Examples in the base mix w0."""
    count: float
    """Examples in the mix."""
    share: float
    """Of the mix: of its examples, or of its tokens when the budget is in tokens."""
    reduced_cost: float | None
    """Objective per example if the count were pushed up by one from where it is (all else
    re-optimised); 0 where it is free (<= 0 at a measured dose, where a curve bends), >= 0 at an
    upper limit, <= 0 at a lower one."""
    supply_price: float | None
    """Gain of one more example in the supply, >= 0."""
    at: At
    """What holds the count where it is."""
    limit_price: float | None = None
    """Gain from one example of loosening the limit named by ``at``, >= 0."""
    score: float = 0.0
    """Importance-weighted value of one more example, before any limit."""
    score_low: float | None = None
    """The mix stays the same while the score stays in ``[score_low, score_high]``; null: no end.
    One entry gamma[i, j] may therefore move by ``(score_high - score) / importance_i``, as long as
    the guard of target i does not bind."""
    score_high: float | None = None
    supply_low: float | None = None
    """The explanation (which limits bind, all prices) holds while the supply stays in
    ``[supply_low, supply_high]``; null: no end, or no supply limit."""
    supply_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetMix:
    """What the mix does to one target."""

    target: str
    base_effect: float
    """(E w0)_i."""
    effect: float
    """base_effect + change."""
    guard_price: float | None
    """Gain per unit that the guard of this target is loosened, >= 0."""
    change: float = 0.0
    """Expected change against the base."""
    change_se: float | None = None
    """Standard error of ``change``; null without standard errors."""
    guard: float | None = None
    """What the target may lose at most; null: unguarded."""
    importance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMix:
    """What a group limit does."""

    group: str
    count: float
    lower: float
    upper: float | None
    price: float | None
    """Gain per example that the binding end is loosened, >= 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Prices of the same problem with fractional counts: what a mix in whole examples has none of.

    Its gain bounds that of the whole mix from above; where the two are close, so are the values.
    With ``max_categories`` it is the problem on the categories that the mix has; the others have
    the price 0.
    """

    gain: float
    move_price: float
    budget_price: float
    supply_prices: dict[str, float]
    """Category to gain per example more in its supply."""
    limit_prices: dict[str, float]
    """Category to gain per example by which the limit that holds it (supply, cap, lower or upper
    limit) is loosened."""
    guard_prices: dict[str, float]
    """Target to gain per unit by which its guard is loosened."""


NATS = "nats per response token"
ANSWERS = "share of right answers"
"""What effects may be in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverInfo:
    """Who solved it, and how hard it was."""

    name: str
    version: str
    seconds: float
    iterations: int = 0
    rows: int = 0
    """Rows in the final program; guards that never mattered are not among them."""
    gap: float = 0.0
    """Distance of the gain from its proven bound, in the unit of the gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A solved mix; ``to_json`` is the content of ``mix.json``."""

    status: Literal["optimal", "feasible"]
    """``feasible``: the node limit stopped the integer search; ``solver.gap`` says how far."""
    kind: str
    """linear, max-min, concave or robust."""
    objective: float
    """Value of the mix: beta'Ew for linear; base value plus gain for concave and (worst case)
    robust; the change of the worst-off target for max-min."""
    base_objective: float
    """The same for the base mix; 0 for max-min."""
    gain: float
    """objective - base_objective."""
    expected_gain: float
    """Importance-weighted expected change over all targets, whatever the objective."""
    expected_gain_se: float | None
    budget: float
    unit: str
    move: float
    """Trust region, share of the budget."""
    moved: float
    """Share of the budget that moved."""
    categories: tuple[CategoryMix, ...]
    targets: tuple[TargetMix, ...]
    groups: tuple[GroupMix, ...]
    move_price: float | None
    """Gain per budget unit (example or token) by which the trust region is widened, >= 0."""
    budget_price: float | None
    """Gain of one more budget unit with w0 and trust region held; negative: more harms."""
    solver: SolverInfo
    relaxation: Relaxation | None = None
    """Fractional prices of a mix with ``integer`` or ``max_categories``; null for others."""
    effect_unit: str = NATS
    """Of effects, gains and prices; ``share of right answers`` where answers were measured."""
    expected_regret: float | None = None
    """What knowing the effects exactly would add to ``expected_gain``, on average (``regret.py``);
    null where it was not asked for."""
    appended: tuple[str, ...] = ()
    """Categories whose effects were measured at an earlier base without rows of them."""
    notes: tuple[str, ...] = ()
    """What a reader should know, in plain sentences."""

    def counts(self) -> dict[str, float]:
        """Category to examples."""
        return {c.category: c.count for c in self.categories}

    @property
    def gap_share(self) -> float | None:
        """``solver.gap`` as a share of the gain; None where nothing is gained."""
        return self.solver.gap / self.gain if self.gain > 0 else None

    def to_json(self) -> str:
        """JSON text; numbers keep full precision."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Mix":
        """The mix of a ``mix.json`` text; unknown keys are ignored, since keys may be added.

        Raises:
            DataError: not JSON, or a key is missing.
        """
        try:
            raw = json.loads(text)
            return cls(
                **_known(cls, raw)
                | {
                    "categories": tuple(
                        CategoryMix(**_known(CategoryMix, c)) for c in raw["categories"]
                    ),
                    "targets": tuple(TargetMix(**_known(TargetMix, t)) for t in raw["targets"]),
                    "groups": tuple(GroupMix(**_known(GroupMix, g)) for g in raw["groups"]),
                    "solver": SolverInfo(**_known(SolverInfo, raw["solver"])),
                    "relaxation": _relaxation(raw.get("relaxation")),
                    "notes": tuple(raw["notes"]),
                    "appended": tuple(raw.get("appended", ())),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"expected the text of a mix.json as `instructmix solve` writes it, but it cannot "
                f"be read ({error}); solve again"
            ) from error


def _relaxation(raw: dict[str, Any] | None) -> Relaxation | None:
    return None if raw is None else Relaxation(**_known(Relaxation, raw))


def _known(record: Any, raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(record)}
    return {key: value for key, value in raw.items() if key in names}
