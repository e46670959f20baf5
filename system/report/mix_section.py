"""The mix on the page: what changed, what holds it, which data to collect next."""

from __future__ import annotations

from typing import Any

from system.influence.estimate.summary import short_unit
from system.report.blocks import (
    Block,
    Bullets,
    Cell,
    Column,
    Heading,
    Picture,
    Prose,
    Section,
    Table,
    text_column,
    waiting,
)
from system.report.formatting import (
    count,
    decimals,
    fixed,
    interval,
    names,
    percent,
    plural,
    quote,
    sentence,
    signed,
)
from system.report.mix_figures import PER, by_change, mix_figure, price_figures, sweep_figure
from system.report.view import RunView
from system.solve.mix import Mix

TITLE = "The mix"
_HELD_BY = {
    "lower": "lower limit",
    "upper": "upper limit",
    "supply": "supply",
    "cap": "cap on one category's move",
    "free": "no limit, it balances the rest",
    "base": "stays at the base",
}
_OBJECTIVES = {
    "linear": "the importance-weighted effect on all targets",
    "max-min": "the change of the worst-off target",
    "concave": "the importance-weighted effect, with separate slopes for adding and removing",
    "robust": "the importance-weighted effect after paying for its uncertainty",
}


def mix_section(view: RunView) -> Section:
    """Before and after, prices, the sweep of the trust region."""
    mix = view.mix
    if mix is None or view.sweep is None:
        return waiting("mix", TITLE, "Mix", "solve")
    blocks: list[Block] = [
        Prose(text=_lead(mix), tone="lead"),
        *[Prose(text=sentence(note), tone="note") for note in mix.notes],
        Picture(
            figures=[mix_figure(mix)],
            captions=[
                "Examples of one pass in the base mix and in the solved mix, sorted by change. "
                "The number is the change in examples."
            ],
        ),
        _mix_table(mix),
        Heading(text="What holds it where it is"),
        Bullets(items=_limits(mix)),
        *_prices(mix),
        Heading(text="Which data to collect next"),
        *_collect(mix),
        Heading(text="What moving more would bring"),
        *_sweep(view.sweep, mix),
        _target_table(mix),
    ]
    return Section(name="mix", title=TITLE, short="Mix", blocks=blocks)


def _lead(mix: Mix) -> str:
    if mix.moved == 0:
        return (
            f"The mix is the base mix: of a budget of {count(mix.budget)} {mix.unit}, at most "
            f"{percent(mix.move)} might have moved, and nothing did."
        )
    gain = signed(mix.expected_gain, decimals([mix.expected_gain], least=4))
    if mix.expected_gain_se is not None:
        error = fixed(mix.expected_gain_se, decimals([mix.expected_gain_se], least=4))
        gain += f" ± {error} (standard error)"
    regret = ""
    if mix.expected_regret is not None:
        value = fixed(mix.expected_regret, decimals([mix.expected_regret], least=4))
        regret = (
            f" Knowing the effects exactly would add {value} {short_unit(mix.effect_unit)} on "
            "average (expected regret): more measuring cannot be worth more."
        )
    proven = "proven optimal"
    if mix.status != "optimal":
        gap = fixed(mix.solver.gap, decimals([mix.solver.gap], least=4))
        share = "" if mix.gap_share is None else f", {percent(mix.gap_share, 2)} of its gain"
        proven = (
            f"the best found, within {gap} {short_unit(mix.effect_unit)} of the proven bound{share}"
        )
    return (
        f"The solved mix moves {percent(mix.moved)} of a budget of {count(mix.budget)} {mix.unit} "
        f"(at most {percent(mix.move)} may move). It maximises {_OBJECTIVES[mix.kind]} and is "
        f"{proven}. Predicted gain over the base mix: {gain} {mix.effect_unit}.{regret}"
    )


def _mix_table(mix: Mix) -> Table:
    rows = by_change(mix)
    short = short_unit(mix.effect_unit)
    score_digits = decimals([row.score * PER for row in rows], least=4)
    relaxed = mix.relaxation
    prices = [v for row in rows for v in (row.limit_price, row.reduced_cost) if v is not None]
    if relaxed is not None:
        prices = list(relaxed.limit_prices.values())
    price_digits = decimals([price * PER for price in prices], least=4)
    total = sum(row.base for row in rows)
    body: list[list[str | Cell]] = []
    for row in rows:
        change = row.count - row.base
        tone = "quiet" if abs(change) < 0.5 else "good" if change > 0 else "bad"
        cells = [
            row.category, count(round(row.base)), count(row.count),
            Cell(text=signed(change, 0), tone=tone), percent(row.base / total),
            percent(row.share), _HELD_BY[row.at], _price(row.score, score_digits),
        ]  # fmt: skip
        if relaxed is not None:
            cells.append(_price(relaxed.limit_prices[row.category], price_digits))
        elif prices:
            cells += [_price(row.limit_price, price_digits), _price(row.reduced_cost, price_digits)]
        body.append(cells)
    columns = [
        text_column("category"),
        Column(label="base"),
        Column(label="solved"),
        Column(label="change"),
        Column(label="base share"),
        Column(label="share"),
        text_column("held by"),
        Column(label="value", title="importance-weighted value of more of it, before any limit"),
    ]
    note = f"Value: {mix.effect_unit} for {PER} more examples, before any limit."
    if relaxed is not None:
        columns.append(
            Column(label="price of its limit", title="gain if the limit is loosened, >= 0")
        )
        note += (
            f" Prices: {short} for {PER} examples, of the same mix in fractions of examples, whose "
            f"gain is {signed(relaxed.gain, 6)} against {signed(mix.gain, 6)} in whole ones."
        )
    elif prices:
        columns += [
            Column(label="price of that limit", title="gain if the limit is loosened, >= 0"),
            Column(label="reduced cost", title="change of the objective if the count is raised"),
        ]
        note += (
            f" Prices and reduced costs: {short} for {PER} examples, of the first solve, before "
            "ties are broken and counts are made whole."
        )
    else:
        note += " This kind of solution has no shadow prices."
    return Table(caption="The mix, category by category", columns=columns, rows=body, note=note)


def _price(value: float | None, digits: int) -> str:
    return signed(None if value is None else value * PER, digits)


def _limits(mix: Mix) -> list[str]:
    items = []
    for at, words in _HELD_BY.items():
        held = [row.category for row in by_change(mix) if row.at == at]
        if held:
            items.append(
                f"{words[0].upper()}{words[1:]}: {plural(len(held), 'category', 'categories')} "
                f"({names(held, most=8)})."
            )
    prices = mix.relaxation or mix
    if prices.move_price is not None:
        value = prices.move_price * mix.budget / 100
        items.append(
            "Trust region: letting one more percent of the budget move is worth "
            f"{signed(value, decimals([value], least=4))} {short_unit(mix.effect_unit)}."
            if prices.move_price > 0
            else "Trust region: does not bind, something else stops the mix first."
        )
    if prices.budget_price is not None:
        value = prices.budget_price * PER
        items.append(
            f"Budget: {PER} more {mix.unit}, everything else as it is, are worth "
            f"{signed(value, decimals([value], least=4))} {short_unit(mix.effect_unit)}."
        )
    guarded = [target for target in mix.targets if target.guard is not None]
    paid = {target.target: target.guard_price or 0.0 for target in guarded}
    if mix.relaxation is not None:
        paid = mix.relaxation.guard_prices
    binding = [target.target for target in guarded if paid[target.target] > 0]
    if guarded:
        items.append(
            f"Guards: {len(binding)} of {len(guarded)} bind ({names(binding)})."
            if binding
            else f"Guards: none of {len(guarded)} binds."
        )
    for group in mix.groups:
        price = "" if group.price is None else f", price {signed(group.price * PER, 6)} per {PER}"
        items.append(f"Group {group.group}: {count(group.count)} examples{price}.")
    return items


def _prices(mix: Mix) -> list[Block]:
    captions = {
        "prices": f"What each limit costs: the gain if it is loosened by {PER} {_of(mix)}. A "
        "budget below zero means that more of it harms. Limits without a price are left out.",
        "guard-prices": "What the guards that bind cost: the gain for each unit more that the "
        "target may lose.",
    }
    figures = price_figures(mix)
    if not figures:
        return []
    return [Picture(figures=figures, captions=[captions[figure.name] for figure in figures])]


def _of(mix: Mix) -> str:
    if mix.unit == "examples":
        return mix.unit
    return f"examples (trust region and budget: {mix.unit})"


def _collect(mix: Mix) -> list[Block]:
    relaxed = mix.relaxation
    priced = {
        row.category: row.supply_price if relaxed is None else relaxed.supply_prices[row.category]
        for row in mix.categories
    }
    value = {name: price for name, price in priced.items() if price is not None and price > 0}
    rows = {row.category: row for row in mix.categories}
    if not value:
        known = any(price is not None for price in priced.values())
        text = (
            "No category is held back by its supply: more of the same data would not change this "
            "mix."
            if known
            else _without_prices(mix)
        )
        return [Prose(text=text)]
    wanted = sorted(value, key=lambda name: (-value[name], name))
    digits = decimals([price * PER for price in value.values()], least=4)
    columns = [
        text_column("category"),
        Column(label="supply used"),
        Column(label=f"worth of {PER} more", title=mix.effect_unit),
    ]
    body = [[name, count(rows[name].count), _price(value[name], digits)] for name in wanted]
    note = "The price holds for small changes of the supply."
    if relaxed is None:
        columns += [Column(label="holds from"), Column(label="to")]
        for line, name in zip(body, wanted, strict=True):
            line += [count(rows[name].supply_low), count(rows[name].supply_high)]
        note = "The price holds while the supply stays in the range given."
    return [
        Prose(
            text=f"These categories are used up. {PER} more examples of the first, "
            f"{names([wanted[0]])}, would be worth "
            f"{_price(value[wanted[0]], digits)} {mix.effect_unit}."
        ),
        Table(caption="Shadow prices of supply", columns=tuple(columns), rows=body, note=note),
    ]


def _without_prices(mix: Mix) -> str:
    best = sorted(mix.categories, key=lambda row: (-row.score, row.category))[:3]
    digits = decimals([row.score * PER for row in best], least=4)
    listed = ", ".join(f"{quote(row.category)} ({_price(row.score, digits)})" for row in best)
    return (
        "This kind of solution has no shadow prices. Before any limit, more of these is worth "
        f"most, in {short_unit(mix.effect_unit)} for {PER} examples: {listed}."
    )


def _sweep(sweep: list[dict[str, Any]], mix: Mix) -> list[Block]:
    if not sweep:
        return [Prose(text="No fractional mix within the limits was found at any of the shares.")]
    digits = decimals([row["gain"] for row in sweep], least=4)
    best = max(sweep, key=lambda row: row["gain"])
    table = _sweep_table(sweep, digits)
    if best["gain"] <= 0:
        return [Prose(text="At no share of the budget is any move predicted to pay."), table]
    text = (
        f"The prediction is highest with {percent(best['move'], 0)} of the budget free to move "
        f"({signed(best['gain'], digits)} {short_unit(mix.effect_unit)})"
    )
    if all(row["gain_low"] is not None for row in sweep):
        sure = max(sweep, key=lambda row: row["gain_low"])
        text += f"; the lower end of its band is highest at {percent(sure['move'], 0)}"
    return [
        Prose(
            text=f"{text}. Predictions promise more than trainings keep, the more so the farther "
            "a mix moves: compare promise and outcome in the evaluation."
        ),
        Picture(
            figures=[sweep_figure(sweep, mix.move)],
            captions=[
                "Predicted gain over the base mix with its band (1.96 standard errors), the mix "
                "solved anew at each share."
            ],
        ),
        table,
    ]


def _sweep_table(sweep: list[dict[str, Any]], digits: int) -> Table:
    return Table(
        caption="The sweep in numbers",
        columns=(
            text_column("share that may move"),
            Column(label="moved"),
            Column(label="predicted gain"),
            Column(label="band"),
            Column(label="worst target", title="change of the target that does worst"),
        ),
        rows=[
            (
                percent(row["move"]), percent(row["moved"]), signed(row["gain"], digits),
                interval(row["gain_low"], row["gain_high"], digits),
                signed(row["worst_change"], digits),
            )
            for row in sweep
        ],
        folded=True,
    )  # fmt: skip


def _target_table(mix: Mix) -> Table:
    digits = decimals([target.change for target in mix.targets], least=4)
    rows = sorted(mix.targets, key=lambda target: (-target.change, target.target))
    return Table(
        caption="Predicted change of every target",
        columns=(
            text_column("target"),
            Column(label="importance"),
            Column(label="predicted change", title=f"{mix.effect_unit}; positive is better"),
            Column(label="standard error"),
            Column(label="may lose at most"),
            Column(label="guard price"),
        ),
        rows=[
            (
                row.target, fixed(row.importance, 3), signed(row.change, digits),
                fixed(row.change_se, digits), fixed(row.guard, digits), fixed(row.guard_price, 3),
            )
            for row in rows
        ],
        folded=True,
    )  # fmt: skip
