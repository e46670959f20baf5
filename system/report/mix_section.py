"""The section "The mix" of the report page.

It shows how the solved mix differs from the base mix, which limits bind, what they cost (shadow
prices), which data to collect next, and what a larger move would bring.
"""

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
    LONGEST,
    count,
    decimals,
    ends_note,
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
_BINDING_LIMITS = {
    "lower": "lower limit",
    "upper": "upper limit",
    "supply": "supply",
    "cap": "limit on the move of one category",
    "free": "no limit (free)",
    "base": "none, it stays at the base count",
}
_OBJECTIVES = {
    "linear": "the importance-weighted effect on all targets",
    "max-min": "the smallest change among the targets",
    "concave": "the importance-weighted effect, with separate slopes for adding and removing",
    "robust": "the importance-weighted effect minus a penalty for its uncertainty",
}


def mix_section(view: RunView) -> Section:
    """The mix before and after, limits, prices, and the sweep of the trust region."""
    mix = view.mix
    if mix is None or view.sweep is None:
        return waiting("mix", TITLE, "Mix", "solve")
    blocks: list[Block] = [
        Prose(text=_lead(mix), tone="lead"),
        *[Prose(text=sentence(note), tone="note") for note in mix.notes],
        Picture(
            figures=[mix_figure(mix)],
            captions=[
                "Examples per pass in the base mix and in the solved mix, sorted by change. The "
                "number beside a bar is the change in examples."
                f"{ends_note(len(mix.categories))}"
            ],
        ),
        _mix_table(mix),
        Heading(text="Which limits bind"),
        Bullets(items=_limits(mix)),
        *_prices(mix),
        Heading(text="Which data to collect next"),
        *_collect(mix),
        Heading(text="What a larger or smaller move would bring"),
        *_sweep(view.sweep, mix),
        _target_table(mix),
    ]
    return Section(name="mix", title=TITLE, short="Mix", blocks=blocks)


def _lead(mix: Mix) -> str:
    if mix.moved == 0:
        return (
            f"The solved mix equals the base mix: at most {percent(mix.move)} of the budget of "
            f"{count(mix.budget)} {mix.unit} was allowed to move, and nothing moved."
        )
    gain = signed(mix.expected_gain, decimals([mix.expected_gain], least=4))
    if mix.expected_gain_se is not None:
        error = fixed(mix.expected_gain_se, decimals([mix.expected_gain_se], least=4))
        gain += f" ± {error} (standard error)"
    regret = ""
    if mix.expected_regret is not None:
        value = fixed(mix.expected_regret, decimals([mix.expected_regret], least=4))
        regret = (
            f" If the effects were known exactly, the best mix would gain {value} "
            f"{short_unit(mix.effect_unit)} more on average (expected regret). This is the most "
            "that further measurements can bring."
        )
    proven = "proven optimal"
    if mix.status != "optimal":
        gap = fixed(mix.solver.gap, decimals([mix.solver.gap], least=4))
        share = "" if mix.gap_share is None else f", {percent(mix.gap_share, 2)} of its gain"
        proven = (
            f"the best mix found, within {gap} {short_unit(mix.effect_unit)} of the proven "
            f"bound{share}"
        )
    return (
        f"The solved mix moves {percent(mix.moved)} of a budget of {count(mix.budget)} {mix.unit} "
        f"(at most {percent(mix.move)} may move). It maximises {_OBJECTIVES[mix.kind]}; the result "
        f"is {proven}. Predicted gain over the base mix: {gain} {mix.effect_unit}.{regret}"
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
            percent(row.share), _BINDING_LIMITS[row.at], _price(row.score, score_digits),
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
        text_column("binding limit"),
        Column(label="value", title="importance-weighted value of more examples, without limits"),
    ]
    note = f"Value: {mix.effect_unit} for {PER} more examples, without any limit."
    if relaxed is not None:
        columns.append(
            Column(label="price of its limit", title="gain if the limit is relaxed, >= 0")
        )
        note += (
            f" Prices: {short} for {PER} examples. They belong to the same problem solved with "
            f"fractional counts; its gain is {signed(relaxed.gain, 6)}, that of the mix in whole "
            f"examples is {signed(mix.gain, 6)}."
        )
    elif prices:
        columns += [
            Column(label="price of that limit", title="gain if the limit is relaxed, >= 0"),
            Column(label="reduced cost", title="change of the objective for more examples"),
        ]
        note += (
            f" Prices and reduced costs: {short} for {PER} examples. They belong to the first "
            "solve, before ties are broken and counts are rounded."
        )
    else:
        note += " This kind of problem has no shadow prices."
    return Table(caption="The mix, category by category", columns=columns, rows=body, note=note)


def _price(value: float | None, digits: int) -> str:
    return signed(None if value is None else value * PER, digits)


def _limits(mix: Mix) -> list[str]:
    items = []
    for limit, words in _BINDING_LIMITS.items():
        bound = [row.category for row in by_change(mix) if row.at == limit]
        if bound:
            items.append(
                f"{words[0].upper()}{words[1:]}: {plural(len(bound), 'category', 'categories')} "
                f"({names(bound, most=8)})."
            )
    prices = mix.relaxation or mix
    if prices.move_price is not None:
        value = prices.move_price * mix.budget / 100
        items.append(
            "Trust region: one more percent of the budget to move is worth "
            f"{signed(value, decimals([value], least=4))} {short_unit(mix.effect_unit)}."
            if prices.move_price > 0
            else "Trust region: does not bind; other limits stop the mix first."
        )
    if prices.budget_price is not None:
        value = prices.budget_price * PER
        items.append(
            f"Budget: {PER} more {mix.unit}, with all other limits unchanged, are worth "
            f"{signed(value, decimals([value], least=4))} {short_unit(mix.effect_unit)}."
        )
    guarded = [target for target in mix.targets if target.guard is not None]
    guard_prices = {target.target: target.guard_price or 0.0 for target in guarded}
    if mix.relaxation is not None:
        guard_prices = mix.relaxation.guard_prices
    binding = [target.target for target in guarded if guard_prices[target.target] > 0]
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
        "prices": f"What each limit costs: the gain if it is relaxed by {PER} {_price_unit(mix)}. "
        "A negative price of the budget means that a larger budget harms. Limits without a price "
        "are left out.",
        "guard-prices": "What each binding guard costs: the gain for each additional unit that "
        "the target may lose.",
    }
    figures = price_figures(mix)
    if not figures:
        return []
    sampled = " Of many, the first and the last are shown." if len(mix.categories) > LONGEST else ""
    shown = [captions[figure.name] + sampled for figure in figures]
    return [Picture(figures=figures, captions=shown)]


def _price_unit(mix: Mix) -> str:
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
        has_prices = any(price is not None for price in priced.values())
        text = (
            "No category is limited by its supply: more data of the same categories would not "
            "change this mix."
            if has_prices
            else _without_prices(mix)
        )
        return [Prose(text=text)]
    ranked = sorted(value, key=lambda name: (-value[name], name))
    digits = decimals([price * PER for price in value.values()], least=4)
    columns = [
        text_column("category"),
        Column(label="supply used"),
        Column(label=f"value of {PER} more", title=mix.effect_unit),
    ]
    body = [[name, count(rows[name].count), _price(value[name], digits)] for name in ranked]
    note = "The price holds for small changes of the supply."
    if relaxed is None:
        columns += [Column(label="holds from"), Column(label="to")]
        for line, name in zip(body, ranked, strict=True):
            line += [count(rows[name].supply_low), count(rows[name].supply_high)]
        note = "The price holds while the supply stays within the range in the last two columns."
    return [
        Prose(
            text="The mix uses all available examples of these categories. "
            f"{PER} more examples of the first, {names([ranked[0]])}, would be worth "
            f"{_price(value[ranked[0]], digits)} {mix.effect_unit}."
        ),
        Table(caption="Shadow prices of supply", columns=tuple(columns), rows=body, note=note),
    ]


def _without_prices(mix: Mix) -> str:
    best = sorted(mix.categories, key=lambda row: (-row.score, row.category))[:3]
    digits = decimals([row.score * PER for row in best], least=4)
    listed = ", ".join(f"{quote(row.category)} ({_price(row.score, digits)})" for row in best)
    return (
        "This kind of problem has no shadow prices. Without any limit, more examples of these "
        f"categories are worth most ({short_unit(mix.effect_unit)} for {PER} examples): {listed}."
    )


def _sweep(sweep: list[dict[str, Any]], mix: Mix) -> list[Block]:
    if not sweep:
        return [Prose(text="At none of the shares, a fractional mix within the limits was found.")]
    digits = decimals([row["gain"] for row in sweep], least=4)
    best = max(sweep, key=lambda row: row["gain"])
    table = _sweep_table(sweep, digits)
    if best["gain"] <= 0:
        return [Prose(text="At no share of the budget is a move predicted to bring a gain."), table]
    text = (
        f"The predicted gain is highest if {percent(best['move'], 0)} of the budget may move "
        f"({signed(best['gain'], digits)} {short_unit(mix.effect_unit)})"
    )
    if all(row["gain_low"] is not None for row in sweep):
        safest = max(sweep, key=lambda row: row["gain_low"])
        text += f"; the lower end of its error band is highest at {percent(safest['move'], 0)}"
    return [
        Prose(
            text=f"{text}. Predictions are usually larger than the realised gain, and more so for "
            "larger moves: compare predicted and realised gain in the evaluation."
        ),
        Picture(
            figures=[sweep_figure(sweep, mix.move)],
            captions=[
                "Predicted gain over the base mix with its error band (1.96 standard errors). The "
                "mix is solved again at each share."
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
            Column(label="error band"),
            Column(label="worst target", title="smallest change among the targets"),
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
