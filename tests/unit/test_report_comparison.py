"""Other runs' effects beside those of a run, on its page and in its JSON file."""

import json
import re
from pathlib import Path

import pytest
from report_builder import RunBuilder

from system.cli import main
from system.errors import ConfigError
from system.report import RunView, render_report, report_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("comparison")
    both = ("add", "remove")
    made = {
        "this": RunBuilder(directions=both),
        "other": RunBuilder(replications=2, until="influence"),
        "unmeasured": RunBuilder(until="ingest"),
    }
    return {name: builder.write(str(root / name)).uri for name, builder in made.items()}


def test_the_page_has_a_row_and_a_picture_for_every_direction_in_common(runs):
    page = render_report(RunView.open(runs["this"], [runs["this"], runs["other"]]))
    found = set(re.findall(r'"(compare-[0-9]-[a-z]+)"', page))
    assert found == {"compare-1-add", "compare-1-remove", "compare-2-remove"}
    assert "Comparison with other measurements" in page and "measured by removing: each dot" in page
    assert "Comparison with other measurements" not in render_report(RunView.open(runs["this"]))


def test_the_numbers_are_those_of_the_comparison(runs):
    numbers = report_json(RunView.open(runs["this"], [runs["this"], runs["other"]]))
    itself, other = numbers["comparisons"]
    assert set(itself["directions"]) == {"add", "remove"} and itself["cost_ratio"] == 1
    for part in itself["directions"].values():
        assert part["rank"]["value"] == pytest.approx(1) and part["scale"] == pytest.approx(1)
        assert part["sign"] == 1 and part["worth"] == pytest.approx(1)
    assert set(other["directions"]) == {"remove"}
    assert other["directions"]["remove"]["rank"]["value"] < 1
    json.dumps(numbers, allow_nan=False)
    assert report_json(RunView.open(runs["this"]))["comparisons"] == []


def test_the_command_writes_them_and_refuses_a_run_without_effects(runs, capsys):
    path = Path(runs["this"]) / "report.html"
    assert main(["report", runs["this"], "--compare", runs["other"]]) == 0
    before = path.read_bytes()
    assert b"Agreement with other measurements" in before
    assert main(["report", runs["this"], "--compare", runs["unmeasured"]]) == 2
    assert "--until influence" in capsys.readouterr().err
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="influence"):
        RunView.open(runs["unmeasured"], [runs["other"]])
