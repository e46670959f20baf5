"""Several doses on the page of a run."""

import dataclasses

from report_builder import RunBuilder

from system import storage
from system.influence.estimate.dose_summary import summarise_doses
from system.report import RunView, render_report


def test_the_page_has_the_doses_of_a_run_that_measured_several(tmp_path):
    builder = RunBuilder(until="influence")
    run_dir = builder.write(str(tmp_path / "run"))
    view = RunView.open(run_dir.uri)
    assert "How returns change with the dose" not in render_report(view)

    record = view.records["influence"]
    uri = run_dir.output_uri(record, "summary")
    measured = {name: builder.measure(name) for name in builder.directions}
    smaller = {
        name: dataclasses.replace(
            item,
            dose_S=item.dose_S / 4,
            dose_tokens_S=item.dose_tokens_S / 4,
            differences=tuple(row / 3 for row in item.differences),
        )
        for name, item in measured.items()
    }
    doses = summarise_doses((32, 128), [smaller, measured], 0.95)
    storage.write_json(uri, storage.read_json(uri) | {"doses": doses})
    page = render_report(RunView.open(run_dir.uri))
    assert "How returns change with the dose" in page
    for direction in ("adding", "removing"):
        found = f"Effect on itself by dose, measured by {direction}" in page
        assert found == (("add" if direction == "adding" else "remove") in builder.directions)
    assert "Measured at doses of 32 and 128 rows: maps and tables show the largest" in page
