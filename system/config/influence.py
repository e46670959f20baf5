"""The section of the configuration about the influence stage."""

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
    "gradient": "is the same per row at every dose, being first order: give one number, or measure "
    "several doses with estimator retrain or branch",
    "random-design": "takes one dose per category, half of all in every run: give one number, or "
    "measure several doses with estimator retrain or branch",
    "auto": "asks how well one dose is known: give one number, or measure several doses with "
    "estimator retrain or branch",
}
"""Estimators that know one dose, and what to do instead."""


class AutoConfig(Section):
    """`influence.estimator: auto`: when enough has been measured. One round is one replication."""

    designs: tuple[Literal["retrain", "branch", "random-design"], ...] = ("branch", "random-design")
    """Estimators that it chooses from. Each makes the first round (`replications`); the one whose
    error costs least goes on from there. One alone: no choice, and no round beside its own."""
    regret: float = Field(default=0.005, ge=0)
    """Enough: not knowing the effects better costs the mix less than this, in nats per response
    token (its expected regret)."""
    precision: float | None = Field(default=None, gt=0)
    """Asked beside that: the typical standard error of the effect of a dose, in nats per token."""
    max_replications: Positive = 8
    """Give up here."""
    max_tokens: Positive | None = None
    """No round begins that would train on more tokens than this, all rounds of all designs
    together."""
    max_tuner_hours: float | None = Field(default=None, gt=0)
    """The same in measured hours of training, summed over tuners (GPU hours where each has one)."""

    @field_validator("designs")
    @classmethod
    def _designs_differ(cls, designs: tuple[str, ...]) -> tuple[str, ...]:
        if not designs or len(set(designs)) != len(designs):
            raise ValueError(f"expected one design or different ones, found {list(designs)}")
        return designs


class TargetConfig(Section):
    """Files of a target that no source owns."""

    path: str
    """Relative to `data_dir`, absolute, `s3://...`, `gs://...`, or `hf://owner/name`."""
    format: RowFormat = "auto"
    """Shape of a row; `auto` decides from the first rows' keys."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For `format: columns`: which column is `system`, `prompt`, `response`."""
    answer_column: str | None = None
    """Column that holds a verifiable final answer."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the final answer inside a response."""
    test_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of the rows, by the hash of the question, that the matrix never sees: stage `evaluate`
    judges the trained models on them (at most evaluate.test_rows). 0: all rows for the matrix."""

    @model_validator(mode="after")
    def _is_a_source(self) -> TargetConfig:
        self.as_source("target")
        return self

    def as_source(self, name: str) -> SourceConfig:
        """What the readers of rows understand."""
        return SourceConfig(name=name, **self.model_dump(exclude={"test_share"}))


def _as_target(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


_Target = Annotated[TargetConfig, BeforeValidator(_as_target)]
"""A path alone will do."""


class InfluenceConfig(Section):
    """Stage `influence`: interventions, scores, effect matrix. Details: `docs/influence.md`."""

    estimator: Literal["retrain", "branch", "random-design", "gradient", "auto"] = "retrain"
    """`retrain`: one dose at a time, from the base model; `branch`: the same from one checkpoint
    warmed up on the base mix; `random-design`: half of all doses in every run, taken apart by
    regression, so that every run speaks about every effect; `gradient`: first order, from
    gradients at checkpoints of a short warm-up, no run per dose; `auto`: rounds of the cheapest of
    `auto.designs`, until the mix would not change."""
    auto: AutoConfig = AutoConfig()
    directions: tuple[Literal["add", "remove"], ...] = ("remove",)
    """Which way a category's dose moves; both are kept apart in the matrix."""
    rows_per_category: Positive = 192
    """Rows of each category in the base schedule of every run."""
    dose_rows: Positive | tuple[Positive, ...] = 128
    """Rows added or masked in an intervention; at most rows_per_category. A list, such as
    [16, 32, 64], measures every one of these doses (`retrain` and `branch`), the smaller ones as
    parts of the larger, so that the matrix says how returns change with the dose."""
    dose_tokens: Positive | None = None
    """Response tokens of a dose: of every category its first rows that have together at most so
    many, at least 8 rows and at most dose_rows. Doses of categories with long and with short
    answers are then of one size. Null: dose_rows of each, however long they are."""
    heldout_rows: Positive = 96
    """Rows of each category's estimate split on which every run is scored."""
    replications: Positive = 2
    """Independent common schedules. With one, errors are held-out only. `auto`: in the first round
    (at least 2)."""
    batch_size: Positive = 16
    """Rows per optimiser step."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak; annealed linearly to zero, which halves the noise of training order."""
    warmup_share: Share = 0.05
    """Share of the steps with rising learning rate."""
    warm_rows_per_category: Positive = 192
    """`branch` and `gradient`: rows of each category in the shared warm-up."""
    gradient_checkpoints: Positive = 2
    """`gradient`: checkpoints of the warm-up's second half at which gradients are taken."""
    projection_dim: Positive = 1 << 22
    """`gradient`: gradients with more numbers than this are projected to so many (seeded count
    sketch); below, inner products are exact. Memory: 4 bytes x this x categories x directions."""
    lora: LoraConfig | None = None
    """Train adapters (merged before scoring) instead of all weights."""
    targets: dict[str, _Target] = Field(default_factory=dict)
    """Further targets that no source owns: name -> instruction file relative to data_dir, or
    `{path, format, columns, answer_column, answer_pattern, test_share}`, as sources have them;
    `metric: accuracy` needs one of the two about answers."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What is measured on held-out rows: mean token loss (nats per response token), or the share of
    right answers, on categories with verifiable rows."""
    max_new_tokens: Positive = 64
    """`accuracy` only: longest answer, at most half of model.max_length."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of all intervals."""
    gamma_floor: float = Field(default=1e-6, ge=0)
    """Own effect, nats per token per row, above which a target's gamma can be identifiable."""
    gamma_max_width: float = Field(default=2.0, gt=0)
    """Widest gamma interval that still counts as identifiable."""
    min_agreement: float = Field(default=0.2, ge=-1.0, le=1.0)
    """Rank correlation of the categories' worth (mean effect on all targets, weighted by
    solve.importance) between halves of the replications, scored on different held-out rows, below
    which the mix stays at the base, and says so. Pure noise agrees by more than 0 half of the time,
    by more than 0.2 in 15 to 24 % of simulated measurements of a dozen categories; effects as large
    as their noise agree by 0.45 on average with two replications, by 0.6 with four."""
    keep_checkpoints: bool = False
    """Keep intervention checkpoints after they are scored; `append` then need not repeat runs."""
    append: bool = False
    """Where this run directory has a finished influence result: keep its base, schedules and
    numbers, and measure only the categories that the corpus has beyond it (`retrain`, `branch`)."""
    max_token_equivalents: Positive | None = None
    """Most token equivalents (trained tokens plus a third of the scored ones) that the design may
    take; a larger one is refused before anything is trained, by `run` and by `check`. Null: no
    limit. It changes no result, so it may be changed at any time."""

    @property
    def doses(self) -> tuple[int, ...]:
        """The doses in rows, ascending."""
        return self.dose_rows if isinstance(self.dose_rows, tuple) else (self.dose_rows,)

    @property
    def design(self) -> str:
        """Estimator whose runs are made; of `auto`, the first of its designs."""
        return self.auto.designs[0] if self.estimator == "auto" else self.estimator

    def with_design(self, name: str) -> InfluenceConfig:
        """`auto` without a choice of designs."""
        auto = self.auto.model_copy(update={"designs": (name,)})
        return self.model_copy(update={"auto": auto})

    @property
    def target_sources(self) -> dict[str, SourceConfig]:
        """The files of `targets`, each as a source that has the target's name."""
        return {name: target.as_source(name) for name, target in self.targets.items()}

    @property
    def largest_dose(self) -> int:
        """Rows of the largest dose."""
        return self.doses[-1]

    @field_validator("dose_rows", mode="before")
    @classmethod
    def _doses_ascend(cls, doses: Any) -> int | tuple[int, ...]:
        """Ascending, so that their order changes no fingerprint; one alone is that number."""
        given = doses if isinstance(doses, list | tuple) else [doses]
        try:
            rows = sorted(_ROWS.validate_python(dose) for dose in given)
        except ValidationError as error:
            raise ValueError(
                "expected a whole number of rows above 0, or a list of them"
            ) from error
        if not rows or len(set(rows)) != len(rows):
            raise ValueError(f"expected one number of rows or different ones, found {list(given)}")
        return tuple(rows) if len(rows) > 1 else rows[0]

    @model_validator(mode="after")
    def _dose_fits(self) -> InfluenceConfig:
        if self.largest_dose > self.rows_per_category:
            raise ValueError(
                f"dose_rows {self.largest_dose} is more than rows_per_category "
                f"{self.rows_per_category}: a dose cannot be removed that is not there"
            )
        if len(self.doses) > 1 and self.estimator in _ONE_DOSE:
            why = _ONE_DOSE[self.estimator]
            raise ValueError(f"dose_rows {list(self.doses)}: estimator {self.estimator} {why}")
        if self.dose_tokens is not None and (len(self.doses) > 1 or self.append):
            what = "several doses in rows" if len(self.doses) > 1 else "append, which adds rows"
            raise ValueError(
                f"dose_tokens {self.dose_tokens} sets one dose by its tokens and does not go with "
                f"{what}: give dose_rows one number and set append to false, or leave it out"
            )
        if self.estimator == "gradient" and self.metric == "accuracy":
            raise ValueError(
                "estimator gradient differentiates losses, and answers have no derivative: use "
                "another estimator with metric accuracy"
            )
        if self.append and self.estimator not in ("retrain", "branch"):
            raise ValueError(
                f"append adds single runs to the base of an earlier result, which the runs of "
                f"estimator {self.estimator} do not have: expected retrain or branch. Set append "
                "to false to measure all categories anew"
            )
        if self.append and len(self.doses) > 1:
            raise ValueError(
                f"append measures a new category at one dose, found dose_rows {list(self.doses)}: "
                "give one number, or set append to false to measure all categories anew"
            )
        if self.estimator == "auto" and not 2 <= self.replications <= self.auto.max_replications:
            raise ValueError(
                f"replications {self.replications}: `auto` begins with 2 or more, since one has no "
                f"errors to judge by, and at most auto.max_replications "
                f"{self.auto.max_replications}"
            )
        if len(set(self.directions)) != len(self.directions) or not self.directions:
            raise ValueError(f"directions {self.directions}: give add, remove or both, once each")
        return self
