"""The configuration of a run: the top level, and the sections that have no file of their own.

Every section belongs to the stage of the same name.  The record of a stage keeps the sections that
the stage read, so a change in another section never makes it run again.  The string under a field
is its help text: `docs/config.md` and `instructmix config` show it.  `system.config.load` reads the
YAML file and words the errors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from system.config.data import IngestConfig, Positive, Section, Share, SourceConfig, TagConfig
from system.config.influence import InfluenceConfig
from system.config.model import ModelConfig
from system.config.training import EvaluateConfig, TrainConfig
from system.functions import FUNCTION_NAME
from system.redact import without_secrets


class GroupLimit(Section):
    """Limits on the sum over several categories."""

    categories: tuple[str, ...] = Field(min_length=1)
    """The categories of the group."""
    lower: float = Field(default=0.0, ge=0)
    """Smallest number of examples of the group."""
    upper: float | None = Field(default=None, ge=0)
    """Largest number of examples of the group. Null: no limit."""


class SolveConfig(Section):
    """Stage `solve`: the optimal mix under limits. Every limit is explained in
    `docs/optimiser.md`.
    """

    budget: Positive
    """Size of the mix: number of examples (or response tokens) of one pass over it."""
    unit: Literal["examples", "tokens"] = "examples"
    """Unit of the budget, the trust region and the moves. `tokens` are response tokens."""
    objective: Literal["linear", "max-min", "concave", "robust"] = "linear"
    """What the solver maximises. `linear`: the predicted gain, weighted by `importance`; `max-min`:
    the smallest gain of any target; `concave`: as `linear`, but with diminishing returns where they
    were measured (both directions, or several doses); `robust`: the gain in the worst case, in
    which effects are off by up to `robust_radius` standard errors."""
    base: Literal["natural", "uniform"] | dict[str, Annotated[float, Field(ge=0)]] = "natural"
    """Base mix: moves and gains are counted from it. It is scaled to the budget. `natural`: the
    shares of the train split; `uniform`: equal shares, as in the influence stage; or weights by
    category (a category that is left out has weight 0)."""
    matrix: Literal["effect", "gamma"] = "effect"
    """Matrix of the objective: effects in nats, or gamma as in the paper."""
    move: Share = 0.1
    """Trust region: largest share of the budget that may move away from the base mix."""
    category_cap: float = Field(default=1.0, gt=0)
    """Largest move of one category, as a share of its count in the base mix."""
    max_epochs: float = Field(default=1.0, gt=0)
    """Largest number of times that one example is used in one pass over the mix."""
    guard: float | None = Field(default=None, ge=0)
    """Guard: largest decrease that is allowed for any target, as a share of its effect at the
    base mix. Null: no such limit."""
    guard_nats: float | None = Field(default=None, ge=0)
    """The same limit in nats. Set `guard` or `guard_nats`, not both."""
    importance: Literal["base", "uniform"] | dict[str, float] = "base"
    """Weight of each target. `base`: its share of the base mix; `uniform`: equal; or weights by
    target, which are scaled to sum to one (a target that is left out has weight 0)."""
    lower: dict[str, float] = Field(default_factory=dict)
    """Category -> smallest number of its examples in the mix."""
    upper: dict[str, float] = Field(default_factory=dict)
    """Category -> largest number of its examples in the mix."""
    groups: dict[str, GroupLimit] = Field(default_factory=dict)
    """Name of a group -> limits on the sum over its categories."""
    max_categories: Positive | None = None
    """Largest number of categories in the mix (solved as a MILP). Null: no limit."""
    mip_max_nodes: Positive | None = None
    """Largest number of branch-and-bound nodes in the search for whole counts; then the best mix so
    far is the answer. It is a count and not a time, so the answer is the same on every machine.
    Null: 2,000, fewer for large problems."""
    robust_radius: float = Field(default=1.0, ge=0)
    """`robust`: number of standard errors by which an effect may be off."""
    robust_sources: float | None = Field(default=None, gt=0)
    """`robust`: number of source categories whose effects may be off at the same time. Null: all
    of them (a box)."""
    shrinkage: bool | Literal["auto"] = True
    """Solve with effects that are shrunk by empirical Bayes, instead of the raw ones. `auto`: with
    those that predict better a replication that was left out (`prediction` in the influence
    stage's `summary.json`, all directions together); shrunk effects when there is only one
    replication."""
    dose: Literal["nearest", "largest", "smallest"] | Positive = "nearest"
    """With several `influence.dose_rows`: the dose whose effects decide the mix. `nearest`: for
    each category, the dose nearest to the largest move that its limits allow; a number: the dose
    nearest to this number of rows. With one dose it has no effect."""

    @model_validator(mode="after")
    def _one_guard(self) -> SolveConfig:
        if self.guard is not None and self.guard_nats is not None:
            raise ValueError(
                f"expected guard or guard_nats, found both ({self.guard} and {self.guard_nats}): "
                "remove one"
            )
        return self


class CurriculumConfig(Section):
    """Stage `curriculum`: dependency graph and order of training. Formulas:
    `docs/curriculum.md`.
    """

    preset: Literal["tilted", "paper", "sequential", "natural", "reversed"] = "tilted"
    """Kind of curriculum. `tilted`: early stages contain more of the base levels of the dependency
    graph; `sequential`: one level after the other; `paper`: the three passes of the paper;
    `natural`: every stage has the shares of the mix; `reversed`: `tilted` in reverse order. The
    last two are controls."""
    num_stages: Positive = 3
    """Number of curriculum stages. `paper` always has three."""
    epochs: Positive = 1
    """Number of passes over the mix in all stages together. `paper` always makes three."""
    tilt: Share = 0.5
    """How much the early stages prefer the base levels: 0 not at all, 1 as far as `rehearsal`
    allows."""
    rehearsal: Share = 0.2
    """Smallest count of a category in a stage, as a share of its proportional count there."""
    false_discovery_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """False discovery rate of the dependency edges (Benjamini-Hochberg)."""
    bootstrap: Positive = 200
    """Number of bootstrap resamples for the stability of each edge."""


class SelectConfig(Section):
    """Stage `select`: which rows are trained on. The guarantees of each method are in
    `docs/selection.md`.
    """

    method: Literal["random", "quality", "quality+diversity", "facility-location"] = "random"
    """How rows are chosen. `random`: by a seeded hash of their content id; `quality`: best score
    first; `quality+diversity`: best score first, without rows that are too similar to a better one;
    `facility-location`: the rows that together represent all rows of the category best."""
    score: str = "column"
    """Score of `quality` and `quality+diversity`. `column`: the `score_column` of the sources;
    `loss`: mean loss of the base model on the response; `ifd`: instruction-following difficulty
    (this loss divided by the loss without the instruction); or your own function
    `module:function`."""
    order: Literal["highest", "lowest"] = "highest"
    """Whether the highest or the lowest scores come first."""
    embedding: Literal["tf-idf", "model", "column"] = "tf-idf"
    """Vectors for the similarity of rows. `tf-idf`: hashed word n-grams; `model`: mean hidden
    states of the base model; `column`: the `embedding_column` of the sources."""
    max_similarity: float = Field(default=0.9, gt=0, le=1)
    """`quality+diversity`: cosine similarity above which a row is too similar to a better one."""
    block_rows: Annotated[int, Field(ge=16, le=32768)] = 4096
    """`facility-location`: number of rows of a category that are compared with each other at a
    time. Memory grows with its square."""
    repeats: bool = True
    """Use rows more than once when a quota is larger than the number of usable rows. `false`: this
    is an error."""
    max_quarantined_share: Share = 0.05
    """Largest share of the rows that may lack a usable score or vector. Above it the stage
    fails."""

    @field_validator("score")
    @classmethod
    def _score_is_known(cls, score: str) -> str:
        if score not in ("column", "loss", "ifd") and not FUNCTION_NAME.fullmatch(score):
            raise ValueError("expected column, loss, ifd, or a function written module:function")
        return score

    @property
    def uses_score(self) -> bool:
        """Whether the method reads scores."""
        return self.method in ("quality", "quality+diversity")

    @property
    def uses_embedding(self) -> bool:
        """Whether the method reads vectors, to compare rows."""
        return self.method in ("quality+diversity", "facility-location")

    @property
    def unread_fields(self) -> frozenset[str]:
        """Fields that the method does not read; changing them makes no stage run again."""
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
    """Where the run executes. Results do not depend on it, so changing it repeats no stage."""

    address: str = "auto"
    """Ray cluster. `local`: start Ray on this machine; `auto`: join the cluster of the Ray job
    (RAY_ADDRESS) if there is one, otherwise start Ray here; anything else: the address of the
    cluster to join."""
    start_seconds: float = Field(default=120.0, ge=1, le=86400)
    """Longest time in seconds that the processes of a Ray that is started here may take to come up.
    It is started up to three times. Raise it on an overloaded machine."""
    num_cpus: Positive | None = None
    """CPUs of a Ray that is started here. Null: all CPUs of this machine."""
    num_tuners: Positive = 1
    """Number of intervention runs that train at the same time."""
    num_scorers: Positive = 1
    """Number of vLLM engines that run at the same time."""
    num_ingestors: Positive = 2
    """Number of actors that read files, or count tokens, at the same time. Each takes half a
    CPU."""
    actor_cpus: float = Field(default=1.0, gt=0)
    """CPUs, and threads, of one tuner, scorer or train worker."""
    tuner_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one tuner. 0: intervention runs train on the CPU."""
    scorer_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one scorer. 0: tagging, scoring and generation run on the CPU."""
    train_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one train worker. 0: stage `train` and the arms of stage `evaluate` train on the
    CPU."""
    max_attempts: Positive = 3
    """Largest number of attempts at one work unit, the first one included. A unit is tried again
    when its actor dies, not when its code fails. The run also ends when this many actors of one
    kind, one after another, die while they start."""
    engine_memory_gib: float = Field(default=1.0, gt=0)
    """Memory for the KV cache of one scorer on a CPU, in GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Largest share of a GPU's memory that one scorer uses."""

    @property
    def ray_address(self) -> str:
        """The address with `auto` resolved: the value of RAY_ADDRESS, or `local`."""
        if self.address != "auto":
            return self.address
        return os.environ.get("RAY_ADDRESS") or "local"


Place = tuple[str, ...]
"""Keys and indices that lead to a value of the configuration."""
_PATHS = {"run_dir", "data_dir", "path", "category_map", "chat_template", "address", "benchmarks"}
"""Keys whose values are paths or addresses."""
_OF_THIS_MACHINE = {"HOME", "HOSTNAME", "LOGNAME", "PATH", "PWD", "SHELL", "TMPDIR", "USER"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unexpanded:
    """What a configuration said before its variables `${NAME}` were expanded."""

    texts: Mapping[Place, tuple[str, str]] = field(default_factory=dict)
    """Place of each text with variables -> the text as it was written, and expanded."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Name and value of each of the variables."""

    def in_paths(self) -> dict[str, str]:
        """The variables in paths and addresses, whose values may occur in messages."""
        written = [
            text
            for place, (text, expanded) in self.texts.items()
            if _PATHS & set(place) or "/" in expanded
        ]
        return {
            name: value
            for name, value in self.variables.items()
            if any(f"${name}" in text or f"${{{name}}}" in text for text in written)
        }


class RunConfig(Section):
    """The configuration of a run."""

    _unexpanded: Unexpanded = PrivateAttr(default_factory=Unexpanded)

    run_dir: str
    """Directory for everything that the run writes: local, `s3://...` or `gs://...`."""
    data_dir: str = "."
    """Directory from which relative source paths start."""
    seed: int = Field(default=0, ge=0)
    """Seed of all random choices: rows, runs and orders."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Files with instruction rows."""
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
            raise ValueError("run_dir is empty: expected the directory for the results")
        return run_dir

    @model_validator(mode="after")
    def _selection_has_its_columns(self) -> RunConfig:
        select = self.select
        for is_needed, key, column in (
            (select.uses_score and select.score == "column", "select.score", "score_column"),
            (select.uses_embedding and select.embedding == "column", "select.embedding",
             "embedding_column"),
        ):  # fmt: skip
            if is_needed and not any(getattr(source, column) for source in self.sources):
                raise ValueError(
                    f"{key} is `column`, but no source sets {column}: set it, or choose another "
                    f"{key}"
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
            raise ValueError(f"expected a different name for each source, found twice: {twice}")
        return self

    def with_unexpanded(self, unexpanded: Unexpanded) -> RunConfig:
        """The same configuration, which knows what was written before variables were expanded."""
        config = self.model_copy()
        config._unexpanded = unexpanded
        return config

    def to_write(self) -> dict[str, Any]:
        """The configuration as JSON values for `config.json`: it can be run again.

        Variables are not expanded.  User and password in URLs, and signed queries, are `***`.
        """

        def written(place: Place, value: Any) -> Any:
            text, expanded = self._unexpanded.texts.get(place, (None, None))
            if text is not None and str(value) == expanded:
                return without_secrets(text)
            return without_secrets(value) if isinstance(value, str) else value

        return _each(written, (), self.model_dump(mode="json"))

    def to_send(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The configuration as JSON values for a job elsewhere, and the variables that it needs.

        What the job writes then shows no more than `to_write` here.  Variables that belong to this
        machine, such as HOME, are expanded.
        """
        needed: dict[str, str] = {}

        def sent(place: Place, value: Any) -> Any:
            text, expanded = self._unexpanded.texts.get(place, (None, None))
            if text is None or str(value) != expanded:
                return value
            names = {
                name
                for name in self._unexpanded.variables
                if f"${name}" in text or f"${{{name}}}" in text
            }
            if names & _OF_THIS_MACHINE:
                return value
            needed.update({name: self._unexpanded.variables[name] for name in names})
            return text

        return _each(sent, (), self.model_dump(mode="json")), needed

    def to_hash(self) -> dict[str, Any]:
        """The configuration as JSON values for fingerprints: it differs where results may.

        As `to_write`, but numbers are those of the expanded variables, and a text with variables
        ends with a hash of what it means, without user, password and signed query.
        """

        def hashed(place: Place, value: Any) -> Any:
            if not isinstance(value, str):
                return value
            text, expanded = self._unexpanded.texts.get(place, (None, None))
            if text is None or value != expanded:
                return without_secrets(value)
            digest = hashlib.sha256(without_secrets(value).encode()).hexdigest()[:8]
            return f"{without_secrets(text)} #{digest}"

        return _each(hashed, (), self.model_dump(mode="json"))

    def without_secrets(self, text: str) -> str:
        """A text for files and messages, with `${NAME}` and `***` instead of their values."""
        return without_secrets(text, self._unexpanded.in_paths())


def _each(change: Callable[[Place, Any], Any], place: Place, value: Any) -> Any:
    """The same JSON value with each leaf changed."""
    if isinstance(value, dict):
        return {key: _each(change, (*place, str(key)), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each(change, (*place, str(k)), inner) for k, inner in enumerate(value)]
    return change(place, value)
