import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from report_builder import CATEGORIES, RunBuilder

from system import storage
from system.errors import ConfigError, DataError
from system.report import RunView, render_report, report_files, report_json, write_report
from system.report.blocks import Bullets, Table
from system.report.evaluation_section import evaluation_section
from system.report.influence_section import influence_section

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<b>bold</b> <a href='http://elsewhere.example/'>link</a>",
    "${evil} %{x} {{ 7*7 }} &lt;",
    "2024-01-02",
    "a" * 120,
    "日本語の翻訳 🚀",
    'tab\tand "quotes"',
)
STAGE_OF_SECTION = {
    "mix": "solve",
    "effects": "influence",
    "dependencies": "curriculum",
    "curriculum": "curriculum",
    "training": "train",
    "evaluation": "evaluate",
    "corpus": "ingest",
}


class Page(HTMLParser):
    """The elements of a page, the text inside scripts apart from the text that people read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag in ("td", "th"):
            self.cells.append("")
        if tag in ("script", "td", "th"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open:
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return RunBuilder(directions=("add", "remove")).write(
        str(tmp_path_factory.mktemp("report") / "whole")
    )


@pytest.fixture(scope="module")
def view(run_dir):
    return RunView.open(run_dir.uri)


@pytest.fixture(scope="module")
def html(view):
    return render_report(view)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def figures(page):
    return json.loads(page.scripts[0])


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("report") / "hostile")
    run = RunBuilder(categories=HOSTILE, external=("<i>guard</i>",), replications=2, seeds=2)
    return Page(render_report(RunView.open(run.write(uri).uri)))


def test_a_complete_run_fills_every_section(html, page):
    assert {element["id"] for element in page.named("section")} == {
        "verdict", "cost", *STAGE_OF_SECTION,
    }  # fmt: skip
    assert "Nothing to show yet" not in html
    assert "Not known yet" not in html


def test_every_figure_on_the_page_has_data_that_plotly_accepts(page, figures):
    shown = [e["data-figure"] for e in page.named("div") if "data-figure" in e]
    assert sorted(shown) == sorted(figures)
    assert {"mix", "sweep", "effect-add", "effect-remove", "gamma-add", "gamma-remove", "loss",
            "curriculum", "differences", "levels", "prediction"} <= set(shown)  # fmt: skip
    for figure in figures.values():
        go.Figure(data=figure["data"], layout=figure["layout"])


def test_every_mix_has_predicted_beside_realised_gain(tmp_path):
    arms = ("natural", "uniform", "random", "solved")
    run = RunBuilder(arms=arms, categories=CATEGORIES[:6], seeds=2)
    view = RunView.open(run.write(str(tmp_path / "run")).uri)
    tables = {b.caption: b for b in evaluation_section(view).blocks if isinstance(b, Table)}
    predicted = [row[:2] for row in tables["Predicted and realised gain of every arm"].rows]
    assert predicted == [
        ("uniform", "natural"), ("random", "natural"), ("solved", "natural"),
        ("solved", "uniform"), ("solved", "random"),
    ]  # fmt: skip
    gains = tables["Gains of the solved mix over the other mixes"]
    assert [row[0] for row in gains.rows] == ["uniform", "uniform", "random", "random"]


def test_figures_have_names_for_people_who_do_not_see_them(page):
    drawn = [e for e in page.named("div") if "data-figure" in e]
    assert drawn and all(e["role"] == "img" and e["aria-label"] for e in drawn)


@pytest.mark.parametrize("direction", ["add", "remove"])
def test_heat_maps_show_the_matrix_cell_by_cell(view, figures, direction):
    order = report_json(view)["influence"]["order"]
    dose = report_json(view)["influence"]["reference_dose"]
    matrix = view.influence.matrices[direction]
    effect = figures[f"effect-{direction}"]["data"][0]
    gamma = figures[f"gamma-{direction}"]["data"][0]
    assert sorted(order["sources"]) == sorted(matrix.sources)
    assert sorted(order["targets"]) == sorted(matrix.targets)
    for row, target in enumerate(order["targets"]):
        for column, source in enumerate(order["sources"]):
            t, s = matrix.targets.index(target), matrix.sources.index(source)
            assert effect["z"][row][column] == pytest.approx(matrix.effect_TS[t, s] * dose)
            assert effect["customdata"][row][column][:2] == [source, target]
            if np.isfinite(matrix.gamma_TS[t, s]):
                assert gamma["z"][row][column] == pytest.approx(matrix.gamma_TS[t, s])
            else:
                assert gamma["z"][row][column] is None


def test_appended_entries_are_marked_and_explained(view):
    influence = view.influence
    name = next(iter(influence.matrices.values())).sources[0]
    append = {
        "earlier": "a1", "categories": [name], "new": [name], "stale": {"lost": "it is gone"},
        "trainings": 3, "repeated": 0, "repeated_otherwise": 0, "trained_tokens": 7,
    }  # fmt: skip
    matrices = {}
    for direction, matrix in influence.matrices.items():
        flags = np.zeros(matrix.effect_TS.shape, dtype=bool)
        flags[:, 0] = True
        matrices[direction] = replace(matrix, appended_TS=flags)
    summary = {**influence.summary, "append": append}
    changed = replace(view, influence=replace(influence, matrices=matrices, summary=summary))
    blocks = influence_section(changed).blocks
    text = " ".join(item for block in blocks if isinstance(block, Bullets) for item in block.items)
    assert f"({name} as source or target)" in text and "lost: it is gone" in text
    tables = [block for block in blocks if isinstance(block, Table) and block.folded]
    matrix = next(iter(matrices.values()))
    assert len(tables) == len(matrices)
    for table in tables:
        marks = [sum("†" in cell.text for cell in row[1:]) for row in table.rows]
        assert marks == [1] * len(matrix.targets)
    plain = influence_section(view).blocks
    assert not any("†" in str(block) for block in plain)


def test_heat_maps_are_centred_at_zero_and_hatch_what_is_not_identifiable(view, figures):
    matrix = view.influence.matrices["remove"]
    cells, hatching, dots = figures["effect-remove"]["data"]
    assert cells["zmin"] == -cells["zmax"]
    strokes = hatching["x"].count(None)
    assert strokes == 3 * int((~matrix.identifiable_TS).sum()) > 0
    clear_TS = (matrix.effect_low_TS > 0) | (matrix.effect_high_TS < 0)
    assert len(dots["x"]) == int((clear_TS & ~matrix.own_TS).sum()) > 0


def test_related_categories_stand_side_by_side(view):
    order = report_json(view)["influence"]["order"]["sources"]
    group = ["code generation", "code review and repair", "tool use with structured calls"]
    places = sorted(order.index(name) for name in group)
    assert places == list(range(places[0], places[0] + 3))
    assert report_json(view)["influence"]["order"]["targets"][-1] == "general ability"


def test_report_json_holds_the_numbers_of_the_stages(run_dir, view):
    numbers = report_json(view)

    def output(stage, name):
        return run_dir.output_uri(view.records[stage], name)

    mix = storage.read_json(output("solve", "mix"))
    assert json.loads(json.dumps(numbers["mix"])) == mix
    assert numbers["sweep"] == storage.read_json(output("solve", "sweep"))
    assert numbers["evaluation"] == storage.read_json(output("evaluate", "summary"))
    assert numbers["curriculum"] == storage.read_json(output("curriculum", "curriculum"))
    taxonomy = storage.read_json(output("curriculum", "taxonomy"))
    assert json.loads(json.dumps(numbers["taxonomy"])) == taxonomy
    assert numbers["influence"]["summary"] == storage.read_json(output("influence", "summary"))
    for row in pq.read_table(output("influence", "matrix")).to_pylist():
        matrix = numbers["influence"]["matrices"][row["direction"]]
        place = matrix["targets"].index(row["target"]), matrix["sources"].index(row["source"])
        for ours, theirs in (("effect", "effect"), ("effect_se", "effect_se"), ("gamma", "gamma"),
                             ("gamma_low", "gamma_low"), ("effect_shrunk", "effect_shrunk"),
                             ("identifiable", "identifiable")):  # fmt: skip
            assert matrix[ours][place[0]][place[1]] == row[theirs]


def test_the_mix_table_and_its_bars_show_the_solved_counts(view, page, figures):
    base, solved = figures["mix"]["data"]
    named = {entry[0]: k for k, entry in enumerate(solved["customdata"])}
    for category in view.mix.categories:
        assert solved["x"][named[category.category]] == category.count
        assert base["x"][named[category.category]] == category.base
        assert category.category in page.cells
        assert f"{round(category.count):,}" in page.cells


def test_evaluation_dots_and_intervals_are_those_of_the_comparisons(view, figures):
    rows = [
        row
        for row in view.evaluation.summary["comparisons"]
        if row["metric"] == "loss"
        and row["reference"] == "natural"
        and row["weighting"] != "uniform"
    ]
    drawn = {}
    for trace in figures["differences"]["data"]:
        ends = zip(trace["error_x"]["arrayminus"], trace["error_x"]["array"], strict=True)
        for value, (below, above), names in zip(trace["x"], ends, trace["customdata"], strict=True):
            drawn[names[1], names[0]] = (value, value - below, value + above)
    assert len(drawn) == len(rows)
    for row in rows:
        found = drawn[row["arm"], row["category"] or "all categories"]
        assert found == pytest.approx((row["value"], row["low"], row["high"]))


@pytest.mark.parametrize("until", ["none", "ingest", "tag", "influence", "solve", "train"])
def test_a_partial_run_says_what_has_not_run_yet(tmp_path, until):
    run = RunBuilder(categories=CATEGORIES[:6], replications=2, until=until)
    view = RunView.open(run.write(str(tmp_path / "run")).uri)
    html = render_report(view)
    for section, stage in STAGE_OF_SECTION.items():
        part = html.split(f'<section id="{section}"')[1].split("</section>")[0]
        assert (f"<code>{stage}</code> has not run" in part) == (stage not in view.records)
    json.dumps(report_json(view), allow_nan=False)
    assert "No model has been evaluated on held-out data yet" in html


def test_hostile_names_are_shown_and_never_become_markup(hostile_page):
    assert len(hostile_page.named("script")) == 3
    assert hostile_page.named("img") == [] and hostile_page.named("i") == []
    assert all(link["href"].startswith("#") for link in hostile_page.named("a"))
    assert not any(name.startswith("on") for _, e in hostile_page.elements for name in e)
    for name in (*HOSTILE, "<i>guard</i>"):
        assert name in hostile_page.cells


def test_hostile_names_are_no_markup_inside_figures_either(hostile_page):
    def texts(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from texts(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from texts(inner)

    assert "<" not in hostile_page.scripts[0], "nothing in the data can end its script element"
    for name, figure in json.loads(hostile_page.scripts[0]).items():
        for text in texts(figure):
            if "%{" in text and "<extra>" in text:
                continue  # this package's own hover template
            bare = re.sub(r"</?b>|<br>", "", text)
            assert "<" not in bare, (name, text)


def test_the_page_loads_nothing_from_anywhere(html, page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    style = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_only_the_scripts_of_this_package_may_run(page):
    policy = page.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; ")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in page.scripts[1:]
    ]
    assert hashes == allowed
    assert "\r" not in page.scripts[1], "a browser would hash other bytes than we did"
    assert "unsafe-eval" not in policy and "http" not in policy


def test_the_same_run_gives_the_same_bytes(run_dir):
    assert report_files(run_dir.uri) == report_files(run_dir.uri)


def test_write_report_leaves_both_files_and_names_the_page(tmp_path):
    run = RunBuilder(categories=CATEGORIES[:5], until="ingest").write(str(tmp_path / "run"))
    page = write_report(run.uri)
    assert page == f"{run.uri}/report.html"
    assert storage.read_bytes(page).startswith(b"<!DOCTYPE html>")
    assert storage.read_json(f"{run.uri}/report.json")["corpus"]["read"] > 0


def test_a_directory_that_is_no_run_is_an_input_error(tmp_path):
    with pytest.raises(ConfigError, match=r"found no config\.json"):
        RunView.open(str(tmp_path))


def test_damaged_metrics_are_named_with_their_line(tmp_path):
    run = RunBuilder(categories=CATEGORIES[:5], replications=2, until="train").write(str(tmp_path))
    uri = run.output_uri(run.read_record("train"), "metrics")
    lines = storage.read_bytes(uri).splitlines()
    storage.write_bytes(uri, b"\n".join([*lines[:2], b"{half", *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 3: expected JSON"):
        RunView.open(run.uri)


def test_a_key_that_a_stage_did_not_write_is_an_error_not_a_blank(tmp_path):
    run = RunBuilder(categories=CATEGORIES[:5], replications=2, until="influence").write(
        str(tmp_path)
    )
    uri = run.output_uri(run.read_record("influence"), "summary")
    summary = storage.read_json(uri)
    del summary["directions"]["remove"]["noise"]
    storage.write_json(uri, summary)
    with pytest.raises(KeyError, match="noise"):
        render_report(RunView.open(run.uri))


def test_it_says_what_halving_the_errors_takes(view):
    section = str(influence_section(view))
    for part in view.influence.summary["directions"].values():
        tokens = part["halving"]["trained_tokens"]
        expected = "raise `influence.heldout_rows`" if tokens is None else f"{tokens:,} trained"
        assert expected in section
