"""Renders the report page: one HTML file with all sections and figures, which works offline."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from system.report.blocks import Picture, Section, Table
from system.report.evaluation_section import evaluation_section
from system.report.formatting import moment
from system.report.influence_section import influence_section
from system.report.mix_section import mix_section
from system.report.run_section import corpus_section, cost_section
from system.report.training_section import curriculum_section, graph_section, training_section
from system.report.verdict import give_verdict
from system.report.view import RunView

_MOST_ROWS = 400
"""Largest number of rows of a table."""
SECTIONS = (
    mix_section,
    influence_section,
    graph_section,
    curriculum_section,
    training_section,
    evaluation_section,
    corpus_section,
    cost_section,
)


def render_report(view: RunView) -> str:
    """The report as one HTML page.

    The page works offline: style, script, and plotting library are in the file, and a content
    security policy forbids every request.  The policy allows the two scripts of this package by
    their hashes and no others, so text from the data can never run as a script.
    """
    from plotly.offline import get_plotlyjs

    sections = [_trimmed(build(view)) for build in SECTIONS]
    scripts = [get_plotlyjs(), _resource("report.js")]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_resource("report.html"))
    return template.render(
        heading=_heading(view),
        verdict=give_verdict(view),
        sections=sections,
        style=_resource("report.css"),
        plotly=scripts[0],
        script=scripts[1],
        figures=_script_json(_figures(sections)),
        policy=_policy(scripts),
    )


def _trimmed(section: Section) -> Section:
    """The section with the first rows only of its longest tables, so that the page stays small."""
    return dataclasses.replace(
        section,
        blocks=[
            dataclasses.replace(
                block,
                rows=block.rows[:_MOST_ROWS],
                note=f"{len(block.rows) - _MOST_ROWS:,} more rows are left out here; report.json "
                f"has all numbers. {block.note}".rstrip(),
            )
            if isinstance(block, Table) and len(block.rows) > _MOST_ROWS
            else block
            for block in section.blocks
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heading:
    title: str
    model: str
    seed: int
    finished: str
    folder: str


def _heading(view: RunView) -> _Heading:
    finished = max((record.finished for record in view.records.values()), default="")
    return _Heading(
        title=view.run_dir.rstrip("/").rsplit("/", 1)[-1],
        model=view.config["model"]["path"],
        seed=view.config["seed"],
        finished=moment(finished),
        folder=view.run_dir,
    )


def _figures(sections: list[Section]) -> dict[str, Any]:
    return {
        figure.name: figure.to_json()
        for section in sections
        for block in section.blocks
        if isinstance(block, Picture)
        for figure in block.figures
    }


def _script_json(value: Any) -> str:
    """JSON that cannot close the script element that contains it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: list[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return resources.files("system.report").joinpath(name).read_text(encoding="utf-8")
