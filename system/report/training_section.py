"""The sections on dependencies, curriculum, and training of the report page."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from system.curriculum.records import Curriculum
from system.report.blocks import (
    Block,
    Cell,
    Column,
    Drawing,
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
    duration,
    figure_text,
    fixed,
    names,
    percent,
    plural,
)
from system.report.graph import MOST_EDGES, graph_svg
from system.report.theme import MAIN, MUTED, Figure, axis, category_axis, layout
from system.report.view import RunView
from system.taxonomy.records import Edge, Taxonomy

GRAPH, CURRICULUM, TRAINING = "What depends on what", "The curriculum", "The training"
_LEVELS = ("#08306b", "#2171b5", "#6baed6", "#c6dbef", "#fdd0a2", "#fd8d3c", "#c23e00")
"""Colours from the base level to the most dependent level; levels between them are mixed."""
_UNPLACED = "#c9ced4"
_MOST_LEVELS = 12


def graph_section(view: RunView) -> Section:
    """The dependency graph and its edges."""
    taxonomy = view.taxonomy
    if taxonomy is None:
        return waiting("dependencies", GRAPH, "Dependencies", "curriculum")
    blocks: list[Block] = [Prose(text=taxonomy.summary, tone="lead")]
    if taxonomy.edges:
        stability = (
            ""
            if taxonomy.num_bootstrap == 0
            else f" Paler arrows occur in fewer of the {taxonomy.num_bootstrap} bootstrap draws."
        )
        blocks += [
            Drawing(
                svg=graph_svg(taxonomy),
                caption="An arrow points from a category to one that depends on it: data of the "
                "first helps the second more than the reverse. Wider arrows are stronger."
                f"{stability} Arrows that a longer path implies are not drawn."
                f"{_left_out(taxonomy)}",
            ),
            _edge_table(taxonomy),
        ]
    if taxonomy.isolated and taxonomy.edges:
        blocks.append(
            Prose(
                text=f"Categories without dependencies: {names(taxonomy.isolated, most=40)}.",
                tone="note",
            )
        )
    return Section(name="dependencies", title=GRAPH, short="Dependencies", blocks=blocks)


def _left_out(taxonomy: Taxonomy) -> str:
    reduced = sum(edge.is_reduced for edge in taxonomy.edges)
    if reduced <= MOST_EDGES:
        return ""
    return f" Of {reduced:,} arrows, the {MOST_EDGES} strongest are drawn."


def _edge_table(taxonomy: Taxonomy) -> Table:
    level = taxonomy.level_by_category
    digits = decimals([edge.weight for edge in taxonomy.edges], least=3)

    def row(edge: Edge, state: str) -> tuple[str | Cell, ...]:
        return (
            edge.target, edge.source, fixed(edge.weight, digits), fixed(edge.z, 1),
            f"{edge.p:.1e}", percent(edge.stability, 0), str(level[edge.target]), state,
        )  # fmt: skip

    edges = sorted(taxonomy.edges, key=lambda edge: -edge.weight)
    rows = [row(edge, "yes" if edge.is_reduced else "no: implied by a path") for edge in edges]
    rows += [row(edge, "no: closes a cycle") for edge in taxonomy.dropped]
    return Table(
        caption="All dependencies",
        columns=(
            text_column("category"),
            text_column("depends on"),
            Column(
                label=f"weight ({taxonomy.asymmetry_unit})",
                title="shrunk asymmetry",
            ),
            Column(label="z"),
            Column(label="p"),
            Column(label="stability", title="share of bootstrap draws with this edge"),
            Column(label="level"),
            text_column("in the drawing"),
        ),
        rows=rows,
        folded=len(rows) > 12,
        note=f"Edges are tested at a false discovery rate of "
        f"{percent(taxonomy.false_discovery_rate, 0)}; cycles are broken by {taxonomy.method}.",
    )


def curriculum_section(view: RunView) -> Section:
    """The stages of the curriculum and their categories, by dependency level."""
    curriculum = view.curriculum
    if curriculum is None:
        return waiting("curriculum", CURRICULUM, "Curriculum", "curriculum")
    total = sum(stage.size for stage in curriculum.stages)
    blocks: list[Block] = [
        Prose(
            text=f"Preset {curriculum.preset}: {plural(len(curriculum.stages), 'stage')}, "
            f"{count(total)} examples in total, {plural(curriculum.epochs, 'pass', 'passes')} over "
            f"the mix, tilt {curriculum.tilt:g}, rehearsal {percent(curriculum.rehearsal, 0)}. "
            "Categories without dependencies keep their share in every stage.",
            tone="lead",
        )
    ]
    if curriculum.note:
        blocks.append(Prose(text=curriculum.note, tone="note"))
    blocks += [
        Picture(
            figures=[_curriculum_figure(curriculum)],
            captions=["Examples of each stage by category, coloured by dependency level."],
        ),
        _curriculum_table(curriculum),
    ]
    return Section(name="curriculum", title=CURRICULUM, short="Curriculum", blocks=blocks)


def _by_level(curriculum: Curriculum) -> list[str]:
    """Categories by level; those without a level come last."""
    return sorted(
        curriculum.levels,
        key=lambda name: (
            curriculum.levels[name] is None,
            curriculum.levels[name] or 0,
            name,
        ),
    )


def _level_name(level: int | None) -> str:
    return "no level" if level is None else "base" if level == 0 else f"level {level}"


def _level_color(level: int | None, top: int) -> str:
    if level is None:
        return _UNPLACED
    place = level / max(1, top) * (len(_LEVELS) - 1)
    first = min(int(place), len(_LEVELS) - 2)
    mixed = [
        round(int(a, 16) + (place - first) * (int(b, 16) - int(a, 16)))
        for a, b in ((_LEVELS[first][k : k + 2], _LEVELS[first + 1][k : k + 2]) for k in (1, 3, 5))
    ]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _curriculum_figure(curriculum: Curriculum) -> Figure:
    top = max((level for level in curriculum.levels.values() if level is not None), default=0)
    stages = curriculum.stages
    data: list[dict[str, Any]] = []
    shown: set[int | None] = set()
    # Of many levels the legend names the ends and the middle of the scale.
    named = {None, *(range(top + 1) if top < _MOST_LEVELS else (0, top // 2, top))}
    for name in _by_level(curriculum):
        level = curriculum.levels[name]
        data.append(
            {
                "type": "bar", "orientation": "h", "y": list(range(len(stages))),
                "x": [stage.counts[name] for stage in stages], "name": _level_name(level),
                "legendgroup": _level_name(level),
                "showlegend": level not in shown and level in named,
                "marker": {
                    "color": _level_color(level, top),
                    "line": {"color": "#ffffff", "width": 1},
                },
                "customdata": [
                    [figure_text(name), stage.counts[name] / max(1, stage.size)]
                    for stage in stages
                ],
                "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:,} examples, "
                "%{customdata[1]:.1%} of the stage<extra></extra>",
            }
        )  # fmt: skip
        shown.add(level)
    return Figure(
        name="curriculum",
        label="Stacked bars: examples of every category in each stage of the training.",
        data=data,
        layout=layout(
            barmode="stack",
            barcornerradius=0,
            bargap=0.28,
            xaxis=axis("examples", rangemode="tozero"),
            yaxis=category_axis([figure_text(stage.name) for stage in stages]),
            legend=layout()["legend"] | {"traceorder": "normal"},
        ),
        height=100 + 52 * len(stages),
    )


def _curriculum_table(curriculum: Curriculum) -> Table:
    stages = curriculum.stages
    totals = {name: sum(stage.counts[name] for stage in stages) for name in curriculum.levels}
    rows: list[list[str | Cell]] = [
        [
            name,
            _level_name(curriculum.levels[name]),
            *[count(stage.counts[name]) for stage in stages],
            count(totals[name]),
        ]
        for name in _by_level(curriculum)
    ]
    rows.append(["all", "", *[count(stage.size) for stage in stages], count(sum(totals.values()))])
    return Table(
        caption="Examples per stage",
        columns=(
            text_column("category"),
            text_column("level"),
            *[Column(label=stage.name) for stage in stages],
            Column(label="all"),
        ),
        rows=rows,
        folded=True,
    )


def training_section(view: RunView) -> Section:
    """The loss over the steps, and a table of the stages."""
    steps = view.training
    if steps is None:
        return waiting("training", TRAINING, "Training", "train")
    stages = stage_spans(steps)
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    return Section(
        name="training",
        title=TRAINING,
        short="Training",
        blocks=[
            Prose(
                text=f"{plural(len(steps), 'optimiser step')} on {tokens:,} tokens "
                f"({sum(step['response_tokens'] for step in steps):,} of them response tokens, "
                f"which the loss uses) with {plural(steps[-1]['world_size'], 'worker')}: "
                f"{duration(seconds)} in steps, {tokens / seconds:,.0f} tokens per second, "
                f"at most {steps[-1]['memory_bytes'] / 2**30:.1f} GiB of memory per worker"
                f"{_utilisation(steps)}.",
                tone="lead",
            ),
            Picture(
                figures=[_loss_figure(steps, stages)],
                captions=[
                    "Training loss in nats per response token: single steps (dots) and a running "
                    "mean weighted by tokens (line). Shaded bands are the stages of the "
                    "curriculum. A jump between stages comes from the change of the mix, not from "
                    "the model."
                ],
            ),
            _stage_table(steps, stages),
        ],
    )


def stage_spans(steps: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Consecutive steps of the same stage: (name, first index, last index)."""
    spans: list[tuple[str, int, int]] = []
    for index, step in enumerate(steps):
        if spans and spans[-1][0] == step["stage"]:
            spans[-1] = (spans[-1][0], spans[-1][1], index)
        else:
            spans.append((step["stage"], index, index))
    return spans


def running_mean(values: np.ndarray, weights: np.ndarray, reach: int) -> np.ndarray:
    """Weighted mean over `reach` steps on both sides; over fewer steps at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values * weights)])
    weight = np.concatenate([[0.0], np.cumsum(weights)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (weight[high] - weight[low])


def _loss_figure(steps: list[dict[str, Any]], stages: list[tuple[str, int, int]]) -> Figure:
    x = [step["step"] + 1 for step in steps]
    loss = np.array([step["loss"] for step in steps], dtype=float)
    weights = np.array([step["response_tokens"] for step in steps], dtype=float)
    smooth = running_mean(loss, weights, max(1, len(steps) // 40))
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "markers", "x": x, "y": loss.tolist(), "name": "step",
            "marker": {"size": 3, "color": MUTED, "opacity": 0.45},
            "hovertemplate": "step %{x}<br>loss %{y:.4f}<extra></extra>",
        },
        {
            "type": "scatter", "mode": "lines", "x": x,
            "y": [None if np.isnan(value) else float(value) for value in smooth],
            "name": "running mean", "line": {"color": MAIN, "width": 2}, "hoverinfo": "skip",
        },
    ]  # fmt: skip
    shapes, notes = [], []
    for number, (name, first, last) in enumerate(stages):
        left, right = x[first] - 0.5, x[last] + 0.5
        shapes.append(
            {
                "type": "rect", "x0": left, "x1": right, "yref": "paper", "y0": 0, "y1": 1,
                "fillcolor": "#eef2f6" if number % 2 == 0 else "#ffffff", "line": {"width": 0},
                "layer": "below",
            }
        )  # fmt: skip
        notes.append(
            {
                "x": (left + right) / 2, "y": 1, "yref": "paper", "yanchor": "bottom",
                "showarrow": False, "text": figure_text(name),
                "font": {"size": 11, "color": MUTED},
            }
        )  # fmt: skip
    return Figure(
        name="loss",
        label="Line: training loss against steps, stages shaded.",
        data=data,
        layout=layout(
            xaxis=axis(
                "optimiser step", showgrid=False, zeroline=False, range=[x[0] - 0.5, x[-1] + 0.5]
            ),
            yaxis=axis("loss, nats per token", zeroline=False),
            shapes=shapes,
            annotations=notes,
            showlegend=False,
        ),
        height=340,
    )


def _stage_table(steps: list[dict[str, Any]], stages: list[tuple[str, int, int]]) -> Table:
    rows = []
    for name, first, last in stages:
        part = steps[first : last + 1]
        tenth = max(1, len(part) // 10)
        rows.append(
            (
                name, str(len(part)), f"{sum(step['response_tokens'] for step in part):,}",
                fixed(float(np.mean([step["loss"] for step in part[:tenth]])), 4),
                fixed(float(np.mean([step["loss"] for step in part[-tenth:]])), 4),
                f"{part[0]['learning_rate']:.2e}", f"{part[-1]['learning_rate']:.2e}",
                fixed(float(np.median([step["grad_norm"] for step in part])), 2),
            )
        )  # fmt: skip
    return Table(
        caption="The training by stage",
        columns=(
            text_column("stage"),
            Column(label="steps"),
            Column(label="response tokens"),
            Column(label="loss, first tenth"),
            Column(label="loss, last tenth"),
            Column(label="learning rate, first"),
            Column(label="last"),
            Column(label="gradient norm, median"),
        ),
        rows=rows,
    )


def _utilisation(steps: list[dict[str, Any]]) -> str:
    shares = [step["mfu"] for step in steps if step.get("mfu") is not None]
    if not shares:
        return ""
    return (
        f"; {percent(median(shares), 0)} of the peak matrix-multiply rate of the devices (median)"
    )
