"""Stage `report`: writes the report page and report.json.  It runs in the driver."""

from __future__ import annotations

from actors.stage import StageContext, StageResult
from system import storage
from system.report import report_files


def run(context: StageContext) -> StageResult:
    """Writes report.html and report.json to the attempt and to the top of the run directory."""
    page, numbers = report_files(context.run_dir.uri)
    context.run_dir.check_lease()
    for name, content in (("report.html", page), ("report.json", numbers)):
        storage.write_bytes(storage.join(context.attempt, name), content)
        storage.write_bytes(storage.join(context.run_dir.uri, name), content)
    return StageResult(
        outputs={"page": "report.html", "numbers": "report.json"},
        counts={"bytes": len(page)},
        lines=(f"open {storage.join(context.run_dir.uri, 'report.html')}",),
    )
