"""Prices and ranges: what is said about the optimum is true of it."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from case_counts import CaseCount
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_reference import (
    feasible_questions,
    is_feasible,
    problem,
    question_where,
    reference_gain,
)

from system.errors import ConfigError, DataError, InfeasibleMixError
from system.solve import GroupLimit, Mix, MixOptions, MixSession, solve_mix
from system.solve.model import build_model

EFFECT = [[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [-0.3, 0.1, 1.0]]


def test_a_move_that_is_tiny_in_its_box_is_found():
    """A budget a millionth smaller, with no other move allowed: 0.00024 examples in a box of 14."""
    effect = [
        [0.74644426, -2.21893385, 0.1393477, 0.32367549],
        [0.65728444, 0.17467477, -0.1823678, 0.02262761],
        [-0.15013527, -1.16723187, -0.51570505, 0.51905521],
        [0.57635879, -1.49960485, -0.54004016, -1.73079742],
        [1.0138275, -1.43690464, -0.45360984, -0.55907959],
    ]
    lower = np.array([11.53460499, 48.49661967, 4.56637819, 21.38383985])
    half = GroupLimit(name="half", members=("c0", "c1"), lower=162.85434269, upper=196.0426121)
    options = MixOptions(
        objective="max-min", move=0.0, cap=0.05704699318663667, guard=0.0, groups=(half,)
    )
    p = problem(effect, np.array([47.0, 126.0, 40.0, 27.0]), lower_S=lower)
    session = MixSession(p, options)
    less = session.what_if(budget=240.0 - 2.4e-4)
    moves = np.array([c.count - c.base for c in less.categories])
    assert moves.sum() == pytest.approx(-2.4e-4, rel=1e-6)
    assert np.abs(moves).max() < 1e-3


def gain_if(session: MixSession, **change) -> float | None:
    try:
        return session.what_if(**change).gain
    except (InfeasibleMixError, ConfigError):
        return None


def solved_gain(p, options: MixOptions) -> float | None:
    try:
        return solve_mix(p, options).gain
    except (InfeasibleMixError, DataError, ConfigError):
        return None


def effect_size(p) -> float:
    remove = p.effect_add_TS if p.effect_remove_TS is None else p.effect_remove_TS
    return max(np.abs(p.effect_add_TS).max(), np.abs(remove).max(), 1e-300)


class Squeeze:
    """Squeezes prices between finite differences and counts the answers to every kind of price."""

    def __init__(self) -> None:
        self.cases: dict[str, CaseCount] = defaultdict(CaseCount)

    def check(self, kind: str, price: float, mix: Mix, ask, step: float, size: float) -> None:
        """The gain of one more <= price <= the loss of one less."""
        more, less = ask(step), ask(-step)
        if self.cases[kind].add(more is not None):
            assert price >= (more - mix.gain) / step - 1e-5 * size
        if self.cases[kind].add(less is not None):
            assert price <= (mix.gain - less) / step + 1e-5 * size

    def supply_prices(self, p, session: MixSession, mix: Mix, supply: dict[str, float]) -> None:
        step = 1e-6 * mix.budget
        for c in mix.categories:
            stock = supply[c.category]
            if stock > step:

                def ask(e, name=c.category, stock=stock):
                    return gain_if(session, supply=supply | {name: stock + e})

                self.check("supply", c.supply_price, mix, ask, step, effect_size(p))

    def require(self, **at_least: int) -> None:
        """Every kind that is named was asked about, and most of the questions had an answer."""
        assert set(self.cases) == set(at_least)
        for kind, number in at_least.items():
            # At a limit, or without any room to move, only one side has an answer.
            self.cases[kind].require(0.5, at_least=number)


def test_every_price_lies_between_the_gain_of_one_more_and_the_loss_of_one_less():
    """The optimum is concave in every limit, so a right price is squeezed by finite differences."""
    squeeze = Squeeze()

    @settings(max_examples=120, deadline=None)
    @given(feasible_questions())
    def check(question):
        p, options = question
        session = MixSession(p, options)
        mix = session.mix
        step, size = 1e-6 * mix.budget, effect_size(p)

        def more_budget(e):
            return gain_if(session, budget=mix.budget + e)

        squeeze.check("budget", mix.budget_price, mix, more_budget, step, size)
        if options.move > 0:
            width = options.move * mix.budget

            def more_move(e):
                return gain_if(session, move_budget=width + e)

            squeeze.check("move", mix.move_price, mix, more_move, step, size)
        if p.supply_S is not None:
            supply = dict(zip(p.categories, p.supply_S, strict=True))
            squeeze.supply_prices(p, session, mix, supply)
        for t in mix.targets:
            if t.guard is not None and np.isfinite(t.guard):

                def looser(e, t=t):
                    loss = t.guard + e
                    return gain_if(session, guard={t.target: loss}) if loss >= 0 else None

                squeeze.check("guard", t.guard_price, mix, looser, step, size)

    check()
    squeeze.require(budget=120, move=120, supply=120, guard=120)


def test_supply_prices_hold_where_a_supply_is_at_or_below_the_base():
    squeeze = Squeeze()

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        rng = np.random.default_rng(seed)
        p, options = question_where(
            rng,
            str(rng.choice(["linear", "max-min", "concave", "robust"])),
            is_feasible,
            lambda p, options: (replace(p, supply_S=p.base_S * 1.3, upper_S=None), options),
        )
        model = build_model(p, options)
        shares = (rng.choice([0.9, 0.97, 1.0, 1.0, 1.05], model.num_sources) for _ in range(1000))
        supply_S = next(
            stock_S
            for stock_S in (model.base_S * share_S for share_S in shares)
            if reference_gain(replace(model, ceiling_S=stock_S)) is not None
        )
        supply = dict(zip(p.categories, supply_S.tolist(), strict=True))
        session = MixSession(p, options)
        squeeze.supply_prices(p, session, session.what_if(supply=supply), supply)

    check()
    squeeze.require(supply=200)


def test_prices_of_groups_and_of_the_limits_of_categories_are_squeezed_as_well():
    """All but the base stays: a group, a cap or a limit away from the base does not change w0."""
    squeeze = Squeeze()

    @settings(max_examples=120, deadline=None)
    @given(feasible_questions())
    def check(question):
        p, options = question
        mix = solve_mix(p, options)
        length_S = np.ones(len(p.categories)) if options.unit == "examples" else p.tokens_S
        step = 1e-6 * mix.budget / length_S.max()
        squeeze_groups(squeeze, p, options, mix, step)
        squeeze_limits(squeeze, p, options, mix, step, length_S)

    check()
    squeeze.require(group=12, lower=20, upper=20, cap=20)


def squeeze_groups(squeeze: Squeeze, p, options: MixOptions, mix: Mix, step: float) -> None:
    for group in mix.groups:
        (limit,) = (g for g in options.groups if g.name == group.group)
        ends = {
            "lower": lambda e, g=limit: replace(g, lower=g.lower - e),
            "upper": lambda e, g=limit: replace(g, upper=g.upper + e),
        }
        for name, loosened in ends.items():
            if abs(group.count - getattr(limit, name)) < 10 * step:

                def ask(e, loosened=loosened):
                    return solved_gain(p, replace(options, groups=(loosened(e),)))

                squeeze.check("group", group.price, mix, ask, step, effect_size(p))


def squeeze_limits(
    squeeze: Squeeze, p, options: MixOptions, mix: Mix, step: float, length_S: np.ndarray
) -> None:
    ceilings = {"lower": ("lower_S", -1.0), "upper": ("upper_S", 1.0), "cap": ("cap_S", 1.0)}
    for j, c in enumerate(mix.categories):
        if c.at in ("free", "base"):
            assert c.limit_price == 0
        elif c.at in ceilings and abs(c.count - c.base) > 10 * step:
            field, sign = ceilings[c.at]
            now_S = getattr(p, field)
            if now_S is None and c.at == "lower":
                continue  # less than nothing
            if c.at == "cap":
                now_S = np.full(len(p.categories), options.cap * mix.budget) / length_S

            def ask(e, j=j, field=field, sign=sign, now_S=now_S):
                limit_S = now_S.copy()
                limit_S[j] += sign * e
                shared = replace(options, cap=None) if field == "cap_S" else options
                return solved_gain(replace(p, **{field: limit_S}), shared)

            squeeze.check(c.at, c.limit_price, mix, ask, step, effect_size(p))


def test_a_reduced_cost_is_what_pushing_a_count_brings_or_costs():
    """Pinned by a group of its own, a count moves within its limits, all else re-optimised."""
    squeeze = Squeeze()

    @settings(max_examples=60, deadline=None)
    @given(feasible_questions())
    def check(question):
        p, options = question
        mix = solve_mix(p, options)
        step = 1e-6 * mix.budget
        if p.tokens_S is not None:
            step /= p.tokens_S.max()
        for c in mix.categories:
            if c.count <= step:
                continue

            def ask(e, c=c):
                pin = GroupLimit(
                    name="pin", members=(c.category,), lower=c.count + e, upper=c.count + e
                )
                return solved_gain(p, replace(options, groups=(*options.groups, pin)))

            squeeze.check("count", c.reduced_cost, mix, ask, step, effect_size(p))

    check()
    squeeze.require(count=120)


def test_prices_equal_the_difference_quotient_where_the_optimum_is_not_degenerate():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    session = MixSession(p, MixOptions(guard_nats=20.0))
    mix = session.mix
    assert mix.targets[0].guard_price > 0, "the guard of c0 is meant to bind"
    for price, change in [
        (mix.budget_price, {"budget": 301.0}),
        (mix.move_price, {"move_budget": 31.0}),
        (mix.categories[1].supply_price, {"supply": {"c1": 111.0}}),
        (mix.targets[0].guard_price, {"guard": {"c0": 21.0}}),
    ]:
        assert session.what_if(**change).gain - mix.gain == pytest.approx(price, abs=1e-9)


def test_supply_price_counts_every_epoch():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 55, 300])
    session = MixSession(p, MixOptions(max_epochs=2))
    price = session.mix.categories[1].supply_price
    assert session.mix.counts()["c1"] == 110
    assert price == pytest.approx(2 * (1.6 / 3 - 1.1 / 3))
    more = session.what_if(supply={"c1": 56}).gain
    assert more - session.mix.gain == pytest.approx(price)


@pytest.mark.parametrize("seed", range(60))
def test_mix_stays_the_same_inside_the_range_of_a_score(seed):
    rng = np.random.default_rng(seed)
    p, options = question_where(
        rng,
        ["linear", "concave"][seed % 2],
        is_feasible,
        lambda p, options: (
            replace(p, identifiable_TS=None, tokens_S=None),
            replace(options, guard=None, guard_nats=None, unit="examples"),
        ),
    )
    mix = solve_mix(p, options)
    i = int(np.argmax(p.importance_T))
    for j, c in enumerate(mix.categories):
        for end in (c.score_low, c.score_high):
            far = 1e3 * np.abs(p.effect_add_TS).max()
            room = (end - c.score) * 0.999 if end is not None else far
            effect = p.effect_add_TS.copy()
            effect[i, j] += room / p.importance_T[i]
            removed = p.effect_remove_TS
            if removed is not None:
                removed = removed.copy()
                removed[i, j] += room / p.importance_T[i]
            if end is None and c.score_low is None and c.score_high is not None:
                effect[i, j] -= 2 * room / p.importance_T[i]
                if removed is not None:
                    removed[i, j] -= 2 * room / p.importance_T[i]
            other = solve_mix(replace(p, effect_add_TS=effect, effect_remove_TS=removed), options)
            for a, b in zip(mix.categories, other.categories, strict=True):
                assert b.count == pytest.approx(a.count, abs=1e-6 * mix.budget)


def test_mix_changes_just_outside_the_range_of_a_score():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    mix = solve_mix(p, MixOptions())
    c = mix.categories[2]
    for end, beyond in ((c.score_low, -1e-6), (c.score_high, 1e-6)):
        effect = p.effect_add_TS.copy()
        effect[0, 2] += 3 * (end + beyond - c.score)
        assert solve_mix(replace(p, effect_add_TS=effect), MixOptions()).counts() != mix.counts()


def test_supply_range_is_where_its_price_holds():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    session = MixSession(p, MixOptions())
    c = session.mix.categories[1]
    assert (c.supply_low, c.supply_high) == pytest.approx((100, 130))
    inside = session.what_if(supply={"c1": 129.9}).categories[1].supply_price
    outside = session.what_if(supply={"c1": 131}).categories[1].supply_price
    assert inside == pytest.approx(c.supply_price)
    assert outside == 0


def test_supply_range_of_a_category_that_is_at_its_supply_in_the_base():
    """The docs' example with all 1,000 of code in the base: it takes math's place in the move."""
    effect = [[0.004, 0.002, -0.001], [0.001, 0.003, 0.0], [-0.001, 0.0, 0.001]]
    p = problem(effect, [1000, 1000, 2000], supply_S=[4000, 1000, 8000])
    session = MixSession(p, MixOptions())
    code = session.mix.categories[1]
    assert code.supply_price == pytest.approx(0.0005)
    assert (code.supply_low, code.supply_high) == pytest.approx((1000, 1400))
    assert session.what_if(supply={"c1": 1399}).categories[1].supply_price == pytest.approx(0.0005)
    assert session.what_if(supply={"c1": 1401}).categories[1].supply_price == 0
    fewer = session.what_if(supply={"c1": 900}).categories[1]
    assert fewer.supply_price == pytest.approx(0.001), "code stays, chat is what is removed"
    assert (fewer.supply_low, fewer.supply_high) == pytest.approx((600, 1000))
    capped = solve_mix(replace(p, supply_S=[4000, 1100, 8000], cap_S=[500, 250, 500]), MixOptions())
    assert capped.categories[1].supply_high == pytest.approx(1250), "from there on the cap holds"


def test_whole_mix_carries_the_prices_of_the_fractional_one():
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300])
    whole = solve_mix(p, MixOptions(integer=True))
    assert whole.move_price is None
    assert whole.relaxation is not None
    assert whole.relaxation.move_price == pytest.approx(1.1 / 3 - 0.3)
    assert whole.relaxation.supply_prices["c1"] == pytest.approx(1.6 / 3 - 1.1 / 3)
    assert whole.relaxation.gain >= whole.gain - 1e-9


@pytest.mark.parametrize("integer", [False, True])
def test_a_limited_number_of_categories_has_the_prices_of_the_chosen_ones(integer):
    """c2 is closed; c0 has to take 40, c1 the 10 of its supply at 110, 50 spare in the move."""
    p = problem(EFFECT, [100, 100, 50], supply_S=[300, 110, 300])
    mix = solve_mix(p, MixOptions(move=0.4, max_categories=2, integer=integer))
    prices = mix.relaxation
    assert mix.counts() == pytest.approx({"c0": 140, "c1": 110, "c2": 0})
    assert mix.move_price is None and prices is not None
    assert prices.gain == pytest.approx(mix.gain) and prices.move_price == 0
    more = solve_mix(replace(p, supply_S=[300, 111, 300]), MixOptions(move=0.4, max_categories=2))
    assert prices.supply_prices["c1"] == pytest.approx(more.gain - mix.gain)
    assert prices.supply_prices["c2"] == prices.limit_prices["c2"] == 0
    assert Mix.from_json(mix.to_json()) == mix


def test_cap_that_stops_a_category_before_its_supply_is_not_priced_as_supply():
    """c1 may rise by 5 although 10 more are there: more supply is worth nothing, more cap is."""
    p = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300], cap_S=[100, 5, 100])
    whole = solve_mix(p, MixOptions(integer=True)).relaxation
    assert whole is not None
    assert whole.supply_prices["c1"] == 0.0
    wider = problem(EFFECT, [100, 100, 100], supply_S=[150, 110, 300], cap_S=[100, 6, 100])
    more = solve_mix(wider, MixOptions(integer=True)).relaxation
    assert more is not None
    assert whole.limit_prices["c1"] > 0
    assert whole.limit_prices["c1"] == pytest.approx(more.gain - whole.gain)
    stocked = problem(EFFECT, [100, 100, 100], supply_S=[150, 111, 300], cap_S=[100, 5, 100])
    same = solve_mix(stocked, MixOptions(integer=True)).relaxation
    assert same is not None and same.gain == pytest.approx(whole.gain)
