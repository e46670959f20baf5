"""A report of many categories stays small, and names what matters."""

import base64
import json
import re

import numpy as np
import pytest
from report_builder import RunBuilder

from system.report import write_report
from system.report.formatting import ends, ends_note

LIMIT = 8 * 2**20


def categories(number: int) -> tuple[str, ...]:
    return tuple(f"category {k:03d} <{'b' * (k % 30)}>" for k in range(number))


def figures_of(page: str) -> dict:
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert text is not None
    return json.loads(text.group(1))


def heights(page: str) -> list[int]:
    return [int(height) for height in re.findall(r"style=\"height:(\d+)px", page)]


def check_page(folder: str, number: int, **settings) -> tuple[str, dict]:
    builder = RunBuilder(categories=categories(number), replications=2, seeds=2, **settings)
    path = write_report(builder.write(folder).uri)
    with open(path, encoding="utf-8") as file:
        page = file.read()
    assert len(page.encode()) < LIMIT
    # A figure fits on a few screens; longer ones nobody reads.
    assert max(heights(page)) < 5000
    assert max(int(width) for width in re.findall(r"min-width:(\d+)px", page)) < 2000
    return page, figures_of(page)


def test_a_page_of_80_categories_is_small_and_readable(tmp_path):
    page, figures = check_page(str(tmp_path / "run"), 80, until="solve")
    (cells,) = figures["effect-remove"]["data"]
    z = np.frombuffer(base64.b64decode(cells["z"]["bdata"]), "<f4").reshape(81, 80)
    assert np.isfinite(z).all()
    names, targets = cells["x"], cells["y"]
    assert len(set(names)) == 80 and len(set(targets)) == 81
    own = [z[targets.index(name), column] for column, name in enumerate(names)]
    assert min(own) > 0.08, "a cell lies where its names say"
    assert "What helps and what harms each target most" in page
    assert "the first 20 and the last 20 of 80" in page
    assert len(figures["mix"]["data"][0]["y"]) == 40


@pytest.mark.long  # three minutes; 80 categories show the same figures
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_page_of_300_categories_stays_below_its_limit(tmp_path):
    check_page(
        str(tmp_path / "run"), 300, directions=("add", "remove"),
        arms=("natural", "natural-curriculum", "solved", "solved-curriculum", "uniform", "random"),
    )  # fmt: skip


def test_a_long_list_is_shown_by_its_ends():
    assert ends(range(60)) == list(range(60))
    assert ends(range(300)) == [*range(20), *range(280, 300)]
    assert ends_note(60) == ""
    assert "of 300" in ends_note(300)
