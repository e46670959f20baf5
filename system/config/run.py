"""The configuration of a run: one frozen tree, one YAML file, unknown keys are errors.

Every section belongs to the stage of the same name; a stage's record keeps the sections it read,
so a change anywhere else never makes it run again.  The string under a field is its help text:
`docs/config.md` and `instructmix config` show it.
Loading, overriding and error messages live in `system.config.load`.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from system.config.data import IngestConfig, Positive, Section, Share, SourceConfig, TagConfig
from system.config.influence import InfluenceConfig
from system.config.model import ModelConfig
from system.config.training import EvaluateConfig, TrainConfig
from system.functions import FUNCTION_NAME


class GroupLimit(Section):
    """Limits on several categories together."""

    categories: tuple[str, ...] = Field(min_length=1)
    """Whose examples are added up."""
    lower: float = Field(default=0.0, ge=0)
    """Fewest examples of them together."""
    upper: float | None = Field(default=None, ge=0)
    """Most examples of them together; null: no limit."""


class SolveConfig(Section):
    """Stage `solve`: the mix. Meaning of every limit: `docs/optimiser.md`."""

    budget: Positive
    """N: examples (or response tokens) of one pass over the mix."""
    unit: Literal["examples", "tokens"] = "examples"
    """What budget, trust region and moves are counted in; `tokens`: of the responses."""
    objective: Literal["linear", "max-min", "concave", "robust"] = "linear"
    """What is largest. `linear`: the predicted gain, weighted by importance; `max-min`: the gain of
    the worst-off target; `concave`: as `linear`, but returns diminish where they were measured to
    (both directions, or several doses); `robust`: the gain that is left when effects err against
    the mix."""
    base: Literal["natural", "uniform"] | dict[str, Annotated[float, Field(ge=0)]] = "natural"
    """w0, the mix that moves and gains are counted from, scaled to the budget. `natural`: the
    shares of the train split; `uniform`: equal shares, which is where the influence stage measures
    its effects; or weights by name (categories left out have none)."""
    matrix: Literal["effect", "gamma"] = "effect"
    """Optimise effects in nats, or the paper's own formula in gamma."""
    move: Share = 0.1
    """Trust region: largest share of the budget that may move away from the base mix."""
    category_cap: float = Field(default=1.0, gt=0)
    """Largest move of one category, as a share of its base count."""
    max_epochs: float = Field(default=1.0, gt=0)
    """How often one example may be used within a pass."""
    guard: float | None = Field(default=None, ge=0)
    """No target may lose more than this share of its base effect."""
    guard_nats: float | None = Field(default=None, ge=0)
    """The same limit in nats; give one of the two."""
    importance: Literal["base", "uniform"] | dict[str, float] = "base"
    """Weight of each target: its base share, equal, or given by name (scaled to sum to one; targets
    left out have none)."""
    lower: dict[str, float] = Field(default_factory=dict)
    """Category -> fewest examples of it in the mix."""
    upper: dict[str, float] = Field(default_factory=dict)
    """Category -> most examples of it in the mix."""
    groups: dict[str, GroupLimit] = Field(default_factory=dict)
    """Name -> limits on several categories together."""
    max_categories: Positive | None = None
    """At most this many categories in the mix (MILP)."""
    mip_max_nodes: Positive | None = None
    """Nodes after which the search for whole counts takes the best mix it has found; null: 2,000,
    fewer for large problems. A count, not a time: the answer is the same on every machine."""
    robust_radius: float = Field(default=1.0, ge=0)
    """`robust`: how many standard errors an effect may be off."""
    robust_sources: float | None = Field(default=None, gt=0)
    """`robust`: how many sources may be off at once; null: all of them (a box)."""
    shrinkage: bool | Literal["auto"] = True
    """Solve with empirical-Bayes shrunken effects instead of the raw ones. `auto`: with those that
    predict a replication better that was left out (`prediction` in the influence stage's
    summary.json, all directions together); shrunken where one replication cannot tell."""
    dose: Literal["nearest", "largest", "smallest"] | Positive = "nearest"
    """Several `influence.dose_rows`: whose effects decide the mix. `nearest`: for each category
    the dose nearest to the largest move that the limits let it make; a number: the dose nearest to
    so many rows. With one dose it is not read."""

    @model_validator(mode="after")
    def _one_guard(self) -> SolveConfig:
        if self.guard is not None and self.guard_nats is not None:
            raise ValueError("give guard or guard_nats, not both")
        return self


class CurriculumConfig(Section):
    """Stage `curriculum`: dependency taxonomy and order. Formulas: `docs/curriculum.md`."""

    preset: Literal["tilted", "paper", "sequential", "natural", "reversed"] = "tilted"
    """`tilted`: early stages lean on base levels; `sequential`: level after level; `paper`: the
    published three passes; `natural`: every stage the mix in small; `reversed`: `tilted` backwards.
    The last two are controls."""
    num_stages: Positive = 3
    """Stages of every preset but `paper`, which has three."""
    epochs: Positive = 1
    """Passes over the mix, all stages together; `paper` makes three."""
    tilt: Share = 0.5
    """How strongly early stages lean on base levels: 0 not at all, 1 as far as rehearsal lets."""
    rehearsal: Share = 0.2
    """Share of its proportional count that every category keeps in every stage."""
    false_discovery_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Benjamini-Hochberg level of the dependency edges."""
    bootstrap: Positive = 200
    """Resamples behind each edge's stability."""


class SelectConfig(Section):
    """Stage `select`: which examples. What each method guarantees: `docs/selection.md`."""

    method: Literal["random", "quality", "quality+diversity", "facility-location"] = "random"
    """`random`: seeded by content id; `quality`: best score first; `quality+diversity`: best score
    first, leaving out what is too similar to a better row; `facility-location`: rows that together
    stand for all others."""
    score: str = "column"
    """What `quality` goes by. `column`: the sources' `score_column`; `loss`: the base model's mean
    loss on the response; `ifd`: instruction-following difficulty (that loss over the loss without
    the instruction); or your own `module:function`."""
    order: Literal["highest", "lowest"] = "highest"
    """Which scores come first."""
    embedding: Literal["tf-idf", "model", "column"] = "tf-idf"
    """What similarity is measured on. `tf-idf`: hashed word n-grams; `model`: mean hidden states of
    the base model; `column`: the vectors of the sources' `embedding_column`."""
    max_similarity: float = Field(default=0.9, gt=0, le=1)
    """`quality+diversity`: cosine above which a row is too similar to a better one."""
    block_rows: Annotated[int, Field(ge=16, le=32768)] = 4096
    """`facility-location`: rows of a category that are compared with each other; memory grows with
    its square."""
    repeats: bool = True
    """Use rows again where a quota is above what can be chosen; false: that is an error."""
    max_quarantined_share: Share = 0.05
    """The stage fails when more than this share of the rows looked at has no usable score or
    vector."""

    @field_validator("score")
    @classmethod
    def _score_is_known(cls, score: str) -> str:
        if score not in ("column", "loss", "ifd") and not FUNCTION_NAME.fullmatch(score):
            raise ValueError("expected column, loss, ifd, or a function as module:function")
        return score

    @property
    def uses_score(self) -> bool:
        """Whether the method goes by scores."""
        return self.method in ("quality", "quality+diversity")

    @property
    def uses_embedding(self) -> bool:
        """Whether the method goes by similarity."""
        return self.method in ("quality+diversity", "facility-location")

    @property
    def unread_fields(self) -> frozenset[str]:
        """Fields that the method never looks at, so that changing them runs nothing again."""
        unread: set[str] = set()
        if not self.uses_score:
            unread |= {"score", "order"}
        if not self.uses_embedding:
            unread |= {"embedding"}
        if self.method != "quality+diversity":
            unread |= {"max_similarity"}
        if self.method != "facility-location":
            unread |= {"block_rows"}
        if self.method == "random":
            unread |= {"max_quarantined_share"}
        return frozenset(f"select.{name}" for name in unread)


class ClusterConfig(Section):
    """Where it runs. Never part of a stage's fingerprint: results do not depend on it."""

    address: str = "auto"
    """`local` starts a Ray of its own; `auto` joins the cluster of a Ray job (RAY_ADDRESS), else
    starts one; anything else is the address of the Ray to join."""
    num_cpus: Positive | None = None
    """CPUs of a local Ray; null: all of this machine."""
    num_tuners: Positive = 1
    """Intervention runs at a time."""
    num_scorers: Positive = 1
    """vLLM engines at a time."""
    num_ingestors: Positive = 2
    """Readers, and measurers of row lengths, at a time; each takes half a CPU."""
    actor_cpus: float = Field(default=1.0, gt=0)
    """CPUs of one tuner, scorer or train worker; it uses as many threads."""
    tuner_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one tuner; 0: intervention runs train on the CPU."""
    scorer_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one scorer; 0: tagging, scoring and generation run on the CPU."""
    train_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one train worker; 0: training and the evaluation's arms run on the CPU."""
    max_attempts: Positive = 3
    """Tries of one unit of work, the first included: it is given out again when its actor dies, not
    when its code fails. The run also ends when so many actors of a kind in a row die as they
    start."""
    engine_memory_gib: float = Field(default=1.0, gt=0)
    """KV cache of one CPU scorer."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Share of a GPU's memory that one scorer may take."""

    @property
    def ray_address(self) -> str:
        """The address, with `auto` decided: `local`, or the cluster that RAY_ADDRESS names."""
        if self.address != "auto":
            return self.address
        return os.environ.get("RAY_ADDRESS") or "local"


class RunConfig(Section):
    """Everything a run needs."""

    run_dir: str
    """Where everything is written: a local directory, `s3://...` or `gs://...`."""
    data_dir: str = "."
    """What relative source paths start from."""
    seed: int = Field(default=0, ge=0)
    """What every random choice is drawn from: another seed draws other rows, runs and orders."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the instruction rows come from."""
    ingest: IngestConfig = IngestConfig()
    model: ModelConfig
    tag: TagConfig = TagConfig()
    influence: InfluenceConfig = InfluenceConfig()
    solve: SolveConfig
    curriculum: CurriculumConfig = CurriculumConfig()
    select: SelectConfig = SelectConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("run_dir")
    @classmethod
    def _run_dir_is_named(cls, run_dir: str) -> str:
        if not run_dir.strip():
            raise ValueError("run_dir is empty: name the directory that takes the results")
        return run_dir

    @model_validator(mode="after")
    def _selection_has_its_columns(self) -> RunConfig:
        select = self.select
        for is_asked, key, column in (
            (select.uses_score and select.score == "column", "select.score", "score_column"),
            (select.uses_embedding and select.embedding == "column", "select.embedding",
             "embedding_column"),
        ):  # fmt: skip
            if is_asked and not any(getattr(source, column) for source in self.sources):
                raise ValueError(
                    f"{key} is `column`, but no source names its {column}: name it, or choose "
                    f"another {key}"
                )
        return self

    @model_validator(mode="after")
    def _kernels_have_their_device(self) -> RunConfig:
        if self.train.kernels == "liger" and self.cluster.train_gpus == 0:
            raise ValueError(
                "train.kernels is 'liger', whose kernels need a GPU, but cluster.train_gpus is 0: "
                "set it to 1, or use `train.kernels: torch`"
            )
        return self

    @model_validator(mode="after")
    def _source_names_differ(self) -> RunConfig:
        names = [source.name for source in self.sources if source.name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ; twice: {twice}")
        return self
