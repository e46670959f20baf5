"""The sections on the corpus, and on cost, versions, and reproduction, of the report page."""

from __future__ import annotations

import json
from typing import Any

from system.data.corpus import Manifest
from system.data.rows.conversation import SPLITS
from system.report.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Heading,
    Prose,
    Section,
    Table,
    text_column,
    waiting,
)
from system.report.formatting import NOTHING, duration, moment, percent, plural
from system.report.view import RunView
from system.rundir import StageRecord
from system.stages import STAGE_FOLDERS, STAGE_NAMES

CORPUS, COST = "The corpus", "Cost, versions, and how to reproduce"


def corpus_section(view: RunView) -> Section:
    """Rows read, kept, and rejected; rows by category and source; accuracy of tagging."""
    manifest = view.corpus
    if manifest is None:
        return waiting("corpus", CORPUS, "Corpus", "ingest")
    untagged = sum(manifest.untagged.values())
    rejected = sum(manifest.rejected.values())
    blocks: list[Block] = [
        Prose(
            text=f"{manifest.read:,} rows read: {manifest.kept:,} kept, "
            f"{manifest.duplicates_in_words}, {rejected:,} rejected. "
            f"{plural(len(manifest.categories), 'category', 'categories')}. Rows are assigned to "
            "splits by a hash of their content: models are trained on the train split, the effect "
            "matrix is measured on the estimate split, and the evaluation uses the test split."
            + (f" {untagged:,} rows have no category yet." if untagged else ""),
            tone="lead",
        ),
        _category_table(manifest),
        _source_table(manifest),
    ]
    if rejected:
        blocks.append(
            Table(
                caption="Rejected rows by reason",
                columns=(text_column("reason"), Column(label="rows"), Column(label="of rows read")),
                rows=[
                    (reason, f"{number:,}", percent(number / manifest.read, 2))
                    for reason, number in sorted(
                        manifest.rejected.items(), key=lambda item: (-item[1], item[0])
                    )
                ],
            )
        )
    blocks += _tagging(view)
    return Section(name="corpus", title=CORPUS, short="Corpus", blocks=blocks)


def _category_table(manifest: Manifest) -> Table:
    totals = {
        name: sum(manifest.counts[split][name] for split in SPLITS) for name in manifest.categories
    }
    everything = sum(totals.values())
    rows: list[tuple[str | Cell, ...]] = [
        (
            name,
            *[f"{manifest.counts[split][name]:,}" for split in SPLITS],
            f"{totals[name]:,}",
            percent(totals[name] / everything if everything else None),
        )
        for name in sorted(totals, key=lambda name: (-totals[name], name))
    ]
    rows.append(
        (
            "all",
            *[f"{sum(manifest.counts[split].values()):,}" for split in SPLITS],
            f"{everything:,}",
            percent(1.0),
        )
    )
    return Table(
        caption="Rows by category",
        columns=(
            text_column("category"),
            *[Column(label=split) for split in SPLITS],
            Column(label="all"),
            Column(label="share"),
        ),
        rows=rows,
    )


def _source_table(manifest: Manifest) -> Table:
    return Table(
        caption="Sources",
        columns=(
            text_column("source"),
            Column(label="files"),
            Column(label="rows read"),
            Column(label="rejected"),
        ),
        rows=[
            (
                source["name"],
                str(len(source["files"])),
                f"{source['read']:,}",
                f"{sum(source['rejected'].values()):,}",
            )
            for source in manifest.sources
        ],
        folded=len(manifest.sources) > 8,
    )


def _tagging(view: RunView) -> list[Block]:
    if "tag" not in view.records:
        return []
    blocks: list[Block] = [Heading(text="Tagging")]
    accuracy = view.tagging
    if accuracy is None:
        return [*blocks, Prose(text="The accuracy of tagging was not measured in this run.")]
    share = accuracy["accuracy"]
    blocks.append(
        Prose(
            text=f"Accuracy on {accuracy['rows']:,} rows with known categories, the same number of "
            f"each: {percent(share['value'])} ({percent(share['low'])} to "
            f"{percent(share['high'])}). One constant category for all rows would reach "
            f"{percent(accuracy['chance'])}. With the categories weighted as in the corpus, the "
            f"accuracy is {percent(accuracy['corpus_weighted_accuracy'])}."
        )
    )
    blocks.append(
        Table(
            caption="Tagging by category",
            columns=(
                text_column("category"),
                Column(label="recall"),
                Column(label="interval"),
                text_column("most frequent mistake"),
            ),
            rows=[
                (
                    name,
                    percent(value["value"], 0),
                    f"{percent(value['low'], 0)} to {percent(value['high'], 0)}",
                    _most_frequent_mistake(accuracy["confusion"][name], name),
                )
                for name, value in accuracy["recall"].items()
            ],
            folded=True,
        )
    )
    return blocks


def _most_frequent_mistake(chosen: dict[str, int], name: str) -> str:
    wrong = {other: number for other, number in chosen.items() if other != name}
    if not wrong:
        return NOTHING
    other = max(wrong, key=lambda key: (wrong[key], key))
    return f"{other} ({wrong[other]})"


def cost_section(view: RunView) -> Section:
    """Time and fingerprint of each stage, configuration, versions, and commands."""
    blocks: list[Block] = [
        _cost_table(view),
        *_stage_summaries(view),
        Heading(text="How to reproduce this run"),
        Prose(
            text="A run depends on the resolved configuration below and on the files that its "
            "sources name, on nothing else. A finished stage is not repeated if its fingerprint "
            "is unchanged."
        ),
        Code(
            text="# save the configuration below as config.json, then run\n"
            "instructmix check config.json\n"
            "instructmix run config.json --set run_dir=runs/again"
        ),
        Code(
            text=json.dumps(view.config, indent=2, ensure_ascii=False),
            caption="The resolved configuration",
            folded=True,
        ),
        _version_table(view),
    ]
    return Section(name="cost", title=COST, short="Cost", blocks=blocks)


def total_seconds(view: RunView) -> float:
    """Total time of all finished stages, in seconds."""
    return sum(record.seconds for record in view.records.values())


def _cost_table(view: RunView) -> Table:
    total = total_seconds(view)
    rows: list[tuple[str | Cell, ...]] = []
    for stage in STAGE_NAMES[:-1]:
        record = view.records.get(stage)
        if record is None:
            rows.append((stage, Cell(text="not run yet", tone="quiet"), *[NOTHING] * 4))
            continue
        rows.append(
            (
                stage, duration(record.seconds),
                percent(record.seconds / total if total else None, 0), moment(record.finished),
                record.fingerprint, STAGE_FOLDERS[stage] + "/",
            )
        )  # fmt: skip
    rows.append(("all", duration(total), "", "", "", ""))
    return Table(
        caption="Time of each stage",
        columns=(
            text_column("stage"),
            Column(label="time"),
            Column(label="share"),
            text_column("finished"),
            text_column("fingerprint"),
            text_column("folder"),
        ),
        rows=rows,
        note="Wall-clock time of all sessions that worked on a stage. The fingerprint is a hash of "
        "everything that the result of the stage depends on.",
    )


def _stage_summaries(view: RunView) -> list[Block]:
    rows: list[tuple[str | Cell, ...]] = [
        (stage, "; ".join(record.lines) or NOTHING, _flat(record.counts))
        for stage, record in view.records.items()
    ]
    if not rows:
        return []
    return [
        Table(
            caption="Summary and counts of each stage",
            columns=(text_column("stage"), text_column("summary"), text_column("counts")),
            rows=rows,
            folded=True,
        )
    ]


def _flat(value: Any) -> str:
    """Nested counts on one line, such as `train_rows 12,000; dropped (too long 3)`."""
    if isinstance(value, dict):
        parts = []
        for key, inner in value.items():
            if isinstance(inner, dict):
                parts.append(f"{key} ({_flat(inner) or 'none'})")
            else:
                parts.append(f"{key} {_flat(inner)}")
        return "; ".join(parts)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NOTHING}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_flat(item) for item in value)
    return str(value)


def _version_table(view: RunView) -> Table:
    packages = sorted({name for record in view.records.values() for name in record.versions})
    return Table(
        caption="Versions",
        columns=(text_column("package"), text_column("version")),
        rows=[(name, _versions(name, list(view.records.values()))) for name in packages],
        folded=True,
        note="Several versions in one row: the stages ran with different versions.",
    )


def _versions(name: str, records: list[StageRecord]) -> str:
    versions = dict.fromkeys(r.versions[name] for r in records if name in r.versions)
    return ", ".join(versions)
