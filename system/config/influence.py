"""Configuration section of the influence stage: `influence`, with `auto` and `targets`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from system.config.data import Positive, RowFormat, Section, Share, SourceConfig
from system.config.model import LoraConfig

_ROWS = TypeAdapter(Positive)
_ONE_DOSE = {
    "gradient": "is a first-order estimate, which is the same per row at every dose: give one "
    "number, or measure several doses with estimator retrain or branch",
    "random-design": "uses one dose per category: give one number, or measure several doses with "
    "estimator retrain or branch",
    "auto": "decides by the precision of a single dose: give one number, or measure several doses "
    "with estimator retrain or branch",
}
"""Estimators that measure one dose only: the reason, and what to do instead."""


class AutoConfig(Section):
    """Stopping rules of `influence.estimator: auto`. After the first round, a round is one
    replication.
    """

    designs: tuple[Literal["retrain", "branch", "random-design"], ...] = ("branch", "random-design")
    """Estimators to choose from. Each of them measures the first round (`replications`). The one
    that reaches a given precision at the lowest cost measures all further rounds. With one
    estimator there is nothing to choose and no extra cost."""
    regret: float = Field(default=0.005, ge=0)
    """Measuring stops when the expected regret of the mix is at most this, in nats per response
    token. The expected regret is what the mix would gain on average if the effects were known
    exactly."""
    precision: float | None = Field(default=None, gt=0)
    """Second condition for stopping: the typical standard error of the effect of a dose is at most
    this, in nats per response token. Null: no such condition."""
    max_replications: Positive = 8
    """Largest number of replications. Measuring stops here even when `regret` is not reached."""
    max_tokens: Positive | None = None
    """Largest number of trained tokens in all rounds of all designs. A round that would exceed it
    is not started. Null: no limit."""
    max_tuner_hours: float | None = Field(default=None, gt=0)
    """Largest number of measured training hours, summed over tuners (GPU hours if every tuner has
    one GPU). A round that would exceed it is not started. Null: no limit."""

    @field_validator("designs")
    @classmethod
    def _designs_differ(cls, designs: tuple[str, ...]) -> tuple[str, ...]:
        if not designs or len(set(designs)) != len(designs):
            raise ValueError(
                f"expected one or more different designs, each once, found {list(designs)}"
            )
        return designs


class TargetConfig(Section):
    """An evaluation set of your own that is a target but no source."""

    path: str
    """Path of the files: relative to `data_dir`, absolute, `s3://...`, `gs://...`, or
    `hf://owner/name`."""
    format: RowFormat = "auto"
    """Layout of a row. `auto` detects it from the keys of the first rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For `format: columns`: the columns that hold `system`, `prompt` and `response`."""
    answer_column: str | None = None
    """Column that holds the final answer, so that generated answers can be checked against it."""
    answer_pattern: str | None = None
    """Regular expression (RE2 syntax) with one group that finds the final answer inside a response.
    The last match counts; `^` and `$` match at every line."""
    test_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of the rows that is kept away from the effect matrix. Stage `evaluate` judges the
    trained models on these rows (at most `evaluate.test_rows`). The hash of the question decides.
    0: the matrix uses all rows."""

    @model_validator(mode="after")
    def _is_a_source(self) -> TargetConfig:
        self.as_source("target")
        return self

    def as_source(self, name: str) -> SourceConfig:
        """The same files as a SourceConfig, which is what the readers expect."""
        return SourceConfig(name=name, **self.model_dump(exclude={"test_share"}))


def _as_target(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


_Target = Annotated[TargetConfig, BeforeValidator(_as_target)]
"""A target section; a plain string is short for `{path: ...}`."""


class InfluenceConfig(Section):
    """Stage `influence`: intervention runs, scores and the effect matrix. Details:
    `docs/influence.md`.
    """

    estimator: Literal["retrain", "branch", "random-design", "gradient", "auto"] = "retrain"
    """How effects are estimated. `retrain`: every run changes the dose of one category and starts
    from the base model; `branch`: the same, but all runs start from one checkpoint that was trained
    on the base mix; `random-design`: every run changes about half of all doses, and a regression
    separates the effects; `gradient`: a first-order estimate from gradients at checkpoints of one
    short training, without a run per dose; `auto`: measures round by round with the cheapest of
    `auto.designs`, and stops when better effects would hardly improve the mix."""
    auto: AutoConfig = AutoConfig()
    directions: tuple[Literal["add", "remove"], ...] = ("remove",)
    """Whether interventions add rows of a category, remove them, or both. The matrix keeps the two
    directions apart."""
    rows_per_category: Positive = 192
    """Number of rows of each category in the schedule that all runs share."""
    dose_rows: Positive | tuple[Positive, ...] = 128
    """Dose: number of rows that an intervention adds or removes. At most `rows_per_category`. A
    list such as [16, 32, 64] measures each of these doses (`retrain` and `branch` only), and shows
    how returns change with the dose. A smaller dose is a subset of the larger ones."""
    dose_tokens: Positive | None = None
    """Dose in response tokens. Each category's dose is as many of its first rows as fit into this
    number of tokens, at least 8 and at most `dose_rows`. Categories with long answers and with
    short answers then have doses of about equal size. Null: `dose_rows` rows of each category."""
    heldout_rows: Positive = 96
    """Number of rows of each category's `estimate` split on which every run is scored."""
    replications: Positive = 2
    """Number of independent schedules, each with all its runs. With one, the errors contain only
    the sampling of held-out rows, not the noise of training. `auto`: the replications of the first
    round, at least 2."""
    batch_size: Positive = 16
    """Rows per optimiser step."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate. It decays linearly to zero, which halves the noise of training order."""
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    warm_rows_per_category: Positive = 192
    """`branch` and `gradient`: number of rows of each category in the training that makes the
    shared checkpoint."""
    gradient_checkpoints: Positive = 2
    """`gradient`: number of checkpoints at which gradients are taken. They lie in the second half
    of the shared training."""
    projection_dim: Positive = 1 << 22
    """`gradient`: dimension to which larger gradients are projected (seeded count sketch). Up to
    this size inner products are exact. Memory: 4 bytes x this x categories x directions."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights. They are merged into the weights before scoring."""
    targets: dict[str, _Target] = Field(default_factory=dict)
    """Evaluation sets of your own that are targets but no sources: name -> instruction file
    relative to `data_dir`, or `{path, format, columns, answer_column, answer_pattern,
    test_share}`, which mean the same as for sources. `metric: accuracy` needs `answer_column` or
    `answer_pattern`."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What is measured on held-out rows. `loss`: mean token loss, in nats per response token;
    `accuracy`: share of correct answers, for categories whose answers can be checked."""
    max_new_tokens: Positive = 64
    """`metric: accuracy`: largest number of generated tokens of an answer, at most half of
    `model.max_length`."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Confidence level of all intervals."""
    gamma_floor: float = Field(default=1e-6, ge=0)
    """Smallest effect of a category on itself, in nats per response token per row, at which its
    gamma can be identifiable. Below it, gamma would divide by almost zero."""
    gamma_max_width: float = Field(default=2.0, gt=0)
    """Largest width of a gamma's interval at which it counts as identifiable."""
    min_agreement: float = Field(default=0.2, ge=-1.0, le=1.0)
    """Smallest agreement of independent measurements at which the mix may leave the base; below
    it, the mix stays at the base and the report says so. Agreement is the rank correlation between
    two halves of the replications, scored on different held-out rows, of the worth of the
    categories (mean effect on all targets, weighted by `solve.importance`). Pure noise exceeds 0
    in half of all cases, and 0.2 in 15 to 24 % of simulated measurements of a dozen categories.
    Effects as large as their noise reach 0.45 on average with two replications, 0.6 with four."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of the intervention runs after scoring, so that `append` need not repeat
    runs."""
    append: bool = False
    """Extend the finished influence result of this run directory: keep its base, schedules and
    numbers, and measure only the new categories of the corpus (`retrain` and `branch` only)."""
    max_token_equivalents: Positive | None = None
    """Largest cost of the stage in token equivalents (trained tokens plus a third of the scored
    tokens). `run` and `check` refuse a larger one before anything is trained. Null: no limit. It
    changes no result, so it may be changed at any time."""

    @property
    def doses(self) -> tuple[int, ...]:
        """All doses in rows, in ascending order."""
        return self.dose_rows if isinstance(self.dose_rows, tuple) else (self.dose_rows,)

    @property
    def design(self) -> str:
        """The estimator that makes the runs; for `auto`, the first of its designs."""
        return self.auto.designs[0] if self.estimator == "auto" else self.estimator

    def with_design(self, name: str) -> InfluenceConfig:
        """The same section in which `auto` has this design only."""
        auto = self.auto.model_copy(update={"designs": (name,)})
        return self.model_copy(update={"auto": auto})

    @property
    def target_sources(self) -> dict[str, SourceConfig]:
        """The files of `targets`, each as a SourceConfig with the target's name."""
        return {name: target.as_source(name) for name, target in self.targets.items()}

    @property
    def largest_dose(self) -> int:
        """Rows of the largest dose."""
        return self.doses[-1]

    @field_validator("dose_rows", mode="before")
    @classmethod
    def _doses_ascend(cls, doses: Any) -> int | tuple[int, ...]:
        """Sorts a list, so that its order changes no fingerprint; a list of one is that number."""
        listed = doses if isinstance(doses, list | tuple) else [doses]
        try:
            rows = sorted(_ROWS.validate_python(dose) for dose in listed)
        except ValidationError as error:
            raise ValueError(
                "expected a whole number of rows above 0, or a list of them"
            ) from error
        if not rows or len(set(rows)) != len(rows):
            raise ValueError(
                f"expected one or more different numbers of rows, each once, found {list(listed)}"
            )
        return tuple(rows) if len(rows) > 1 else rows[0]

    @model_validator(mode="after")
    def _dose_fits(self) -> InfluenceConfig:
        # Combinations that make no sense must fail here, before anything is trained.
        if self.largest_dose > self.rows_per_category:
            raise ValueError(
                f"dose_rows {self.largest_dose} is more than rows_per_category "
                f"{self.rows_per_category}: a run cannot remove more rows than its schedule has"
            )
        if len(self.doses) > 1 and self.estimator in _ONE_DOSE:
            why = _ONE_DOSE[self.estimator]
            raise ValueError(f"dose_rows {list(self.doses)}: estimator {self.estimator} {why}")
        if self.dose_tokens is not None and (len(self.doses) > 1 or self.append):
            what = "several doses in rows" if len(self.doses) > 1 else "append, which adds rows"
            raise ValueError(
                f"dose_tokens {self.dose_tokens} sets one dose by its tokens and does not go "
                f"together with {what}: set dose_rows to one number and append to false, or leave "
                "dose_tokens out"
            )
        if self.estimator == "gradient" and self.metric == "accuracy":
            raise ValueError(
                "estimator gradient cannot be combined with metric accuracy, because right and "
                "wrong answers have no derivative: use another estimator or metric loss"
            )
        if self.append and self.estimator not in ("retrain", "branch"):
            raise ValueError(
                f"append needs estimator retrain or branch, found {self.estimator}, whose result "
                "cannot be extended by single runs. Set append to false to measure all categories "
                "again"
            )
        if self.append and len(self.doses) > 1:
            raise ValueError(
                f"append measures a new category at one dose, found dose_rows {list(self.doses)}: "
                "give one number, or set append to false to measure all categories again"
            )
        if self.estimator == "auto" and not 2 <= self.replications <= self.auto.max_replications:
            raise ValueError(
                f"replications {self.replications}: estimator auto needs at least 2, since one "
                f"replication has no errors to judge by, and at most auto.max_replications "
                f"{self.auto.max_replications}"
            )
        if len(set(self.directions)) != len(self.directions) or not self.directions:
            raise ValueError(f"directions {self.directions}: give add, remove or both, once each")
        return self
