"""The corpus, the cost, and what it takes to make this run again, on the page."""

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
    """Where every row went."""
    manifest = view.corpus
    if manifest is None:
        return waiting("corpus", CORPUS, "Corpus", "ingest")
    untagged = sum(manifest.untagged.values())
    rejected = sum(manifest.rejected.values())
    blocks: list[Block] = [
        Prose(
            text=f"{manifest.read:,} rows read: {manifest.kept:,} kept, "
            f"{manifest.duplicates_in_words}, {rejected:,} rejected. "
            f"{plural(len(manifest.categories), 'category', 'categories')}; splits by content "
            "hash: the matrix is measured on the estimate split, everything is judged on the test "
            "split." + (f" {untagged:,} rows have no category yet." if untagged else ""),
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
            text=f"On {accuracy['rows']:,} rows with known categories, drawn in equal numbers, the "
            f"model's choice is right for {percent(share['value'])} ({percent(share['low'])} to "
            f"{percent(share['high'])}); naming one category for every row would be right for "
            f"{percent(accuracy['chance'])}. Weighted as in the corpus: "
            f"{percent(accuracy['corpus_weighted_accuracy'])}."
        )
    )
    blocks.append(
        Table(
            caption="Tagging by category",
            columns=(
                text_column("category"),
                Column(label="chosen rightly"),
                Column(label="interval"),
                text_column("taken for, most often"),
            ),
            rows=[
                (
                    name,
                    percent(value["value"], 0),
                    f"{percent(value['low'], 0)} to {percent(value['high'], 0)}",
                    _mistaken(accuracy["confusion"][name], name),
                )
                for name, value in accuracy["recall"].items()
            ],
            folded=True,
        )
    )
    return blocks


def _mistaken(chosen: dict[str, int], name: str) -> str:
    wrong = {other: number for other, number in chosen.items() if other != name}
    if not wrong:
        return NOTHING
    other = max(wrong, key=lambda key: (wrong[key], key))
    return f"{other} ({wrong[other]})"


def cost_section(view: RunView) -> Section:
    """Seconds, fingerprints, versions, configuration, commands."""
    blocks: list[Block] = [
        _cost_table(view),
        *_what_stages_said(view),
        Heading(text="How to make it again"),
        Prose(
            text="The resolved configuration below is all that the run depends on, with the files "
            "that its sources name. A finished stage is taken over as long as its fingerprint "
            "fits."
        ),
        Code(
            text="# save the configuration below as config.json, then\n"
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
    """Seconds of all finished stages."""
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
        note="Wall time of all sessions that worked on a stage. The fingerprint is the hash of "
        "everything the stage's result depends on.",
    )


def _what_stages_said(view: RunView) -> list[Block]:
    rows: list[tuple[str | Cell, ...]] = [
        (stage, "; ".join(record.lines) or NOTHING, _flat(record.counts))
        for stage, record in view.records.items()
    ]
    if not rows:
        return []
    return [
        Table(
            caption="What each stage said and counted",
            columns=(text_column("stage"), text_column("said"), text_column("counted")),
            rows=rows,
            folded=True,
        )
    ]


def _flat(value: Any) -> str:
    """`train_rows 12,000; dropped (too long 3)`: counts of any depth on one line."""
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
        note="Several versions: stages ran with different ones.",
    )


def _versions(name: str, records: list[StageRecord]) -> str:
    found = dict.fromkeys(r.versions[name] for r in records if name in r.versions)
    return ", ".join(found)
