"""AppendRunner to a finished influence result: what is drawn, what is taken over, what is measured.

    earlier attempt ── plans, heldout, design ──> draw_appended ──> plans/*-append, heldout, design
           │                                                           │
           └── scores, checkpoints ──> AppendRunner (InterventionRunner) <─────────┘
                 earlier runs: new held-out rows alone, from kept checkpoints or trained once more
                 new runs:     all held-out rows

Every attempt ends with complete scores of all its runs.  So it can be analysed, and appended to,
like any other attempt.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from actors.influence.designer import check_target_names, plan_uri
from actors.influence.intervention_runner import InterventionRunner
from actors.stage import StageContext
from system import storage
from system.data.corpus import Corpus
from system.influence.append.append import (
    CategoryStatus,
    append_design,
    append_replication,
    appended_plan,
    dose_size,
    earlier_run,
    first_unused_rows,
    trained_ids,
)
from system.influence.append.append_cost import append_text
from system.influence.append.earlier import EarlierResult
from system.influence.design.accuracy_targets import answer_tokens, draw_accuracy_targets
from system.influence.design.design import (
    CategoryRows,
    Design,
    InterventionRun,
    Replication,
    Target,
)
from system.influence.design.heldout import draw_targets, seeded_draw
from system.influence.design.interventions import Draw
from system.models.base import load_tokenizer
from system.training.plan import TrainPlan, write_plan


def earlier_of(context: StageContext) -> EarlierResult:
    """The result that this attempt appends to."""
    assert context.appends_to is not None, "the pipeline knows what is appended to"
    return EarlierResult(context.attempt.rsplit("/", 1)[0], context.appends_to)


def draw_appended(context: StageContext) -> Design:
    """The design of this attempt: the earlier design plus the new categories.

    Its rows are drawn once; after a restart the design is read from its file.

    Raises:
        DataError: no category of the earlier design is valid, or a new one has too few rows.
        ConfigError: a category has the name of an external target.
    """
    uri = storage.join(context.attempt, "design.json")
    if storage.is_whole(uri):
        return Design.from_json(storage.read_json(uri), uri)
    config, earlier = context.config, earlier_of(context)
    corpus = Corpus.open(context.input("tag", "manifest"))
    check_target_names(config, corpus.categories)
    tokenizer = load_tokenizer(
        context.input("model", "model"), trust_remote_code=config.model.trust_remote_code
    )
    draw = seeded_draw(corpus, tokenizer, config.model.max_length)
    before = earlier.heldout()
    status = earlier.category_status(corpus)
    context.progress.say(f"  {append_text(earlier, status)}")
    heldout, targets, dropped = _new_targets(context, status, corpus, draw, tokenizer)
    heldout_ids = set(before.column("id").to_pylist())
    replications = []
    for old in earlier.design.replications:
        plans = earlier.plans(old.index)
        replication, lost = _extend(context, earlier.design, old, plans, status, heldout_ids, draw)
        replications.append(replication)
        dropped = {key: dropped.get(key, 0) + lost.get(key, 0) for key in {*dropped, *lost}}
    design = append_design(
        earlier.design,
        context.appends_to or "",
        status=status,
        replications=replications,
        targets=targets,
        dropped=dropped,
    )
    names = [target.name for target in design.targets if target.name not in status.new]
    kept = before.filter(_is_in(before, names))
    storage.write_table(
        storage.join(context.attempt, "heldout.arrow"), pa.concat_tables([kept, heldout])
    )
    storage.write_json(uri, design.to_json())
    return design


def _new_targets(
    context: StageContext, status: CategoryStatus, corpus: Corpus, draw: Draw, tokenizer: Any
) -> tuple[pa.Table, tuple[Target, ...], dict[str, int]]:
    """Draws the held-out rows of the new categories; empty if there are none."""
    config = context.config
    if not status.new:
        return earlier_of(context).heldout().slice(0, 0), (), {}
    if config.influence.metric == "accuracy":
        return draw_accuracy_targets(
            run_seed=config.seed,
            corpus=corpus,
            num_rows=config.influence.heldout_rows,
            max_prompt_tokens=config.model.max_length - answer_tokens(config),
            external={},
            tokenizer=tokenizer,
            only=status.new,
        )
    return draw_targets(
        run_seed=config.seed,
        sources=status.new,
        num_rows=config.influence.heldout_rows,
        draw=draw,
        external={},
        tokenizer=tokenizer,
        max_length=config.model.max_length,
    )


def _extend(
    context: StageContext,
    earlier: Design,
    found: Replication,
    plans: dict[str, TrainPlan],
    status: CategoryStatus,
    seen: set[str],
    draw: Draw,
) -> tuple[Replication, dict[str, int]]:
    """Extends a replication by the new doses and writes its schedules.

    Returns:
        The extended replication, and counts of dropped rows by reason.
    """
    taken = trained_ids(plans, status.kept) | seen
    rows: dict[str, CategoryRows] = {}
    doses: dict[str, pa.Table] = {}
    dropped: dict[str, int] = {}
    for category in status.new:

        def drawn(num_rows: int, category: str = category) -> tuple[pa.Table, dict[str, int]]:
            return draw("train", category, num_rows, found.seed)

        dose = earlier.asked["dose"]
        places = first_unused_rows(lambda n: drawn(n)[0].column("id").to_pylist(), dose, taken)
        tokens, lost = drawn(places[-1] + 1 if places else 0)
        rows[category] = dose_size(category, len(places), earlier.asked)
        doses[category] = tokens.take(pa.array(places, type=pa.int64()))
        dropped = {key: dropped.get(key, 0) + lost.get(key, 0) for key in {*dropped, *lost}}
    kept = {kind: plan for kind, plan in plans.items() if kind != "append"}
    for kind, plan in kept.items():
        write_plan(plan_uri(context, found.index, kind), plan)
    extended = appended_plan(plans, status.kept, doses, found.seed)
    if extended is not None:
        write_plan(plan_uri(context, found.index, "append"), extended)
    replication = append_replication(
        found,
        status=status,
        directions=earlier.directions,
        rows=rows,
        doses=doses,
        append_sha256=None if extended is None else extended.sha256,
    )
    return replication, dropped


def _is_in(table: pa.Table, names: list[str]) -> pa.Array:
    chosen = set(names)
    return pa.array([name in chosen for name in table.column("category").to_pylist()])


class AppendRunner(InterventionRunner):
    """Runs an appended design: earlier runs score new rows alone, new runs score all rows."""

    def __init__(self, context: StageContext, design: Design) -> None:
        super().__init__(context, design)
        self.earlier = earlier_of(context)
        assert design.append is not None, "drawn by draw_appended"
        self.new_heldout = self.heldout.filter(_is_in(self.heldout, list(design.append.new)))
        self.kept_targets = [
            target.name for target in design.targets if target.name not in design.append.new
        ]
        self.kept = {
            run: uri
            for run in design.all_runs
            if (before := self._before(run)) is not None
            and (uri := self.earlier.checkpoint(before)) is not None
        }

    def run(self) -> None:
        """Takes over what is still valid, then trains and scores the rest."""
        for run in self.design.all_runs:
            if run.kind == "warm" or (before := self._before(run)) is None:
                continue
            # Without new held-out rows the earlier scores are complete, and nothing is trained.
            done = not self.new_heldout.num_rows
            if (done or run in self.kept) and not self._is_there("units", run):
                storage.write_json(self._file("units", run, ".json"), self._taken_over(run))
            if done and not self._is_there("scores", run):
                nothing = self.earlier.scores(before).slice(0, 0)
                table = self._complete(run, nothing.replace_schema_metadata(_NOTHING))
                storage.write_table(self._file("scores", run, ".parquet"), table)
        super().run()
        for run in self.design.all_runs:  # warm-ups that no run had to start from
            if not self._is_there("units", run):
                storage.write_json(self._file("units", run, ".json"), self._taken_over(run))

    def _before(self, run: InterventionRun) -> InterventionRun | None:
        return earlier_run(self.design, self.earlier.design, run)

    def _is_there(self, folder: str, run: InterventionRun) -> bool:
        ending = ".json" if folder == "units" else ".parquet"
        return storage.is_whole(self._file(folder, run, ending))

    def _taken_over(self, run: InterventionRun) -> dict[str, Any]:
        before = self._before(run)
        assert before is not None, "new runs are measured here"
        training = self.earlier.training(before)
        return {key: value for key, value in training.items() if key != "repeated"} | {
            "taken_over": True
        }

    def _trained(self) -> set[str]:
        return super()._trained() | {run.name for run in self.kept}

    def _checkpoint(self, run: InterventionRun) -> str:
        return self.kept.get(run) or super()._checkpoint(run)

    def _scored_on(self, run: InterventionRun) -> pa.Table:
        return self.heldout if self._before(run) is None else self.new_heldout

    def _training_stats(self, run: InterventionRun, stats: dict[str, Any]) -> dict[str, Any]:
        """Adds, for a repeated training, whether it gave the same result as before."""
        before = self._before(run)
        if before is None:
            return stats
        first = self.earlier.training(before)
        is_same = all(stats[key] == first[key] for key in _BITS)
        return {**stats, "repeated": {"is_same": is_same}}

    def _complete(self, run: InterventionRun, table: pa.Table) -> pa.Table:
        """Joins the scores of earlier held-out rows and those of new ones, in this order."""
        before = self._before(run)
        if before is None:
            return table
        first = self.earlier.scores(before)
        kept = first.filter(_is_in(first, self.kept_targets))
        parts = [_metadata(part) for part in (first, table)]
        ids = set(self.heldout.column("id").to_pylist())
        rejected = {**json.loads(parts[0][_REJECTED]), **json.loads(parts[1][_REJECTED])}
        metadata = {
            _SECONDS: f"{float(parts[0][_SECONDS]) + float(parts[1][_SECONDS]):.3f}",
            _REJECTED: json.dumps({key: why for key, why in rejected.items() if key in ids}),
        }
        tables = [part.replace_schema_metadata(None) for part in (kept, table)]
        return pa.concat_tables(tables).replace_schema_metadata(metadata)


_BITS = ("trained_tokens", "first_loss", "last_loss")
"""Statistics that must be equal if a training was repeated exactly."""
_SECONDS, _REJECTED = "instructmix.seconds", "instructmix.rejected"
_NOTHING = {_SECONDS: "0", _REJECTED: "{}"}


def _metadata(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
