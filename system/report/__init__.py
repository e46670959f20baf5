"""The report of a run: one HTML page for people, one JSON file for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from system import storage
from system.report.machine import report_json
from system.report.page import render_report
from system.report.view import RunView

__all__ = ["RunView", "render_report", "report_files", "report_json", "write_report"]


def report_files(run_dir_uri: str, compare: Sequence[str] = ()) -> tuple[bytes, bytes]:
    """Content of report.html and report.json for a run directory, finished or not.

    Args:
        run_dir_uri: the run.
        compare: run directories whose effects are compared with those of this run.

    Raises:
        ConfigError: there is no run directory, or a compared run has no measured effects.
        DataError: an output that the record of a stage names cannot be read, or compared runs have
            too few categories in common.
    """
    view = RunView.open(run_dir_uri, compare)
    numbers = json.dumps(report_json(view), indent=1, ensure_ascii=False, allow_nan=False)
    return render_report(view).encode(), (numbers + "\n").encode()


def write_report(run_dir_uri: str, compare: Sequence[str] = ()) -> str:
    """Writes report.html and report.json into the run directory; returns the page's URI.

    Arguments and errors are those of `report_files`.
    """
    page, numbers = report_files(run_dir_uri, compare)
    page_uri = storage.join(storage.absolute(run_dir_uri), "report.html")
    storage.write_bytes(page_uri, page)
    storage.write_bytes(storage.join(storage.absolute(run_dir_uri), "report.json"), numbers)
    return page_uri
