"""The page in a real browser, where one is installed."""

import re
import shutil
import subprocess

import pytest
from report_builder import RunBuilder

from system.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_every_figure_under_the_page_policy(tmp_path):
    page = write_report(RunBuilder(seeds=2, replications=2).write(str(tmp_path / "run")).uri)
    result = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-extensions", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    dom = result.stdout
    figures = re.findall(r'data-figure="([^"]+)"', dom)
    assert 'data-drawn="yes"' in dom
    assert dom.count('class="main-svg"') >= len(figures) >= 9
    assert "CONSOLE" not in result.stderr, result.stderr
