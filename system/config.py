"""The configuration of a run: one frozen tree, one YAML file, unknown keys are errors.

Every section belongs to the stage of the same name; a stage's record keeps the sections it read,
so a change anywhere else never makes it run again.  The string under a field is its help text.
Loading, overriding and error messages live in `system.load`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from system.config_data import IngestConfig, Positive, Section, Share, SourceConfig, TagConfig

__all__ = [
    "ClusterConfig", "CurriculumConfig", "EvaluateConfig", "GroupLimit", "InfluenceConfig",
    "IngestConfig", "LoraConfig", "ModelConfig", "RunConfig", "Section", "SelectConfig",
    "SolveConfig", "SourceConfig", "TagConfig", "TinyModelConfig", "TrainConfig",
]  # fmt: skip


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021); the language-model head is never adapted."""

    rank: Positive = 16
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class TinyModelConfig(Section):
    """The Llama that `model.path: builtin:tiny` builds and warms up on the corpus."""

    vocab_size: Positive = 4096
    hidden_size: Positive = 128
    num_layers: Positive = 4
    num_heads: Positive = 4
    warmup_tokens: int = Field(default=1_000_000, ge=0)
    """Tokens of plain language modelling on train rows before the run proper."""
    learning_rate: float = Field(default=3e-3, gt=0)
    batch_tokens: Positive = 4096

    @model_validator(mode="after")
    def _heads_fit_the_engine(self) -> TinyModelConfig:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 32 x num_heads "
                f"{self.num_heads}: vLLM's CPU attention knows no other head sizes"
            )
        return self


class ModelConfig(Section):
    """The base model."""

    path: str
    """A Hugging Face id, a local directory, a `.gguf` file, or `builtin:tiny`."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights for scoring, and of the forward pass for training."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you read it."""
    chat_template: str | None = None
    """File with a Jinja chat template; null: the tokenizer's own, else ChatML."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens per sequence, prompt and response together; longer ones are truncated at the end."""
    tiny: TinyModelConfig = TinyModelConfig()


class InfluenceConfig(Section):
    """Stage 3: interventions, scores, effect matrix."""

    estimator: Literal["retrain", "branch", "random-design", "gradient"] = "retrain"
    """`retrain`: one dose at a time, from the base model; `branch`: the same from one checkpoint
    warmed up on the base mix; `random-design`: half of all doses in every run, taken apart by
    regression, so that every run speaks about every effect; `gradient`: first order, from
    gradients at checkpoints of a short warm-up, no run per dose."""
    directions: tuple[Literal["add", "remove"], ...] = ("remove",)
    """Which way a category's dose moves; both are kept apart in the matrix."""
    rows_per_category: Positive = 192
    """Rows of each category in the base schedule of every run."""
    dose_rows: Positive = 128
    """Rows added or masked in an intervention; at most rows_per_category."""
    heldout_rows: Positive = 96
    """Rows of each category's estimate split on which every run is scored."""
    replications: Positive = 2
    """Independent common schedules. With one, errors are held-out only."""
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
    targets: dict[str, str] = Field(default_factory=dict)
    """Further targets that no source owns: name -> instruction file relative to data_dir."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of all intervals."""
    gamma_floor: float = Field(default=1e-6, ge=0)
    """Own effect, nats per token per row, above which a target's gamma can be identifiable."""
    gamma_max_width: float = Field(default=2.0, gt=0)
    """Widest gamma interval that still counts as identifiable."""
    min_agreement: float = Field(default=0.0, ge=-1.0, le=1.0)
    """Split-half rank correlation of the categories' worth (mean effect on all targets) below which
    the mix stays at the base, and says so."""
    keep_checkpoints: bool = False
    """Keep intervention checkpoints after they are scored."""

    @model_validator(mode="after")
    def _dose_fits(self) -> InfluenceConfig:
        if self.dose_rows > self.rows_per_category:
            raise ValueError(
                f"dose_rows {self.dose_rows} is more than rows_per_category "
                f"{self.rows_per_category}: a dose cannot be removed that is not there"
            )
        if len(set(self.directions)) != len(self.directions) or not self.directions:
            raise ValueError(f"directions {self.directions}: give add, remove or both, once each")
        return self


class GroupLimit(Section):
    """Limits on the sum over some categories, in the budget's unit."""

    categories: tuple[str, ...] = Field(min_length=1)
    lower: float = Field(default=0.0, ge=0)
    upper: float | None = Field(default=None, ge=0)


class SolveConfig(Section):
    """Stage 4: the mix. Meaning of every limit: DESIGN section 2, `docs/optimiser.md`."""

    budget: Positive
    """N: examples (or response tokens) of one pass over the mix."""
    unit: Literal["examples", "tokens"] = "examples"
    objective: Literal["linear", "max-min", "concave", "robust"] = "linear"
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
    """Weight of each target: its base share, equal, or given by name."""
    lower: dict[str, float] = Field(default_factory=dict)
    upper: dict[str, float] = Field(default_factory=dict)
    groups: dict[str, GroupLimit] = Field(default_factory=dict)
    max_categories: Positive | None = None
    """At most this many categories in the mix (MILP)."""
    robust_radius: float = Field(default=1.0, ge=0)
    """`robust`: how many standard errors an effect may be off."""
    robust_sources: float | None = Field(default=None, gt=0)
    """`robust`: how many sources may be off at once; null: all of them (a box)."""
    shrinkage: bool = True
    """Solve with empirical-Bayes shrunken effects instead of the raw ones."""

    @model_validator(mode="after")
    def _one_guard(self) -> SolveConfig:
        if self.guard is not None and self.guard_nats is not None:
            raise ValueError("give guard or guard_nats, not both")
        return self


class CurriculumConfig(Section):
    """Stage 5: dependency taxonomy and curriculum."""

    preset: Literal["tilted", "paper", "sequential", "natural", "reversed"] = "tilted"
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
    """Stage 6: which examples."""

    method: Literal["random", "quality"] = "random"
    """`random`: seeded by content id, independent of shards; `quality`: highest score first."""


class TrainConfig(Section):
    """Stage 7: curriculum SFT under Ray Train."""

    num_workers: Positive | tuple[Positive, Positive] = 2
    """Workers, or [fewest, most] for an elastic group."""
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_schedule: Literal["cosine", "linear", "warmup-stable-decay"] = "cosine"
    """One schedule through all stages."""
    warmup_share: Share = 0.03
    decay_share: Share = 0.2
    """Share of the steps in which warmup-stable-decay decays."""
    min_lr_share: Share = 0.0
    """Last learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_size: Positive = 16
    """Examples per optimiser step, over all workers."""
    micro_batch_tokens: Positive = 4096
    """Padded tokens of one forward pass of one worker; memory follows this number."""
    packing: bool = True
    """Best-fit packing with block-diagonal attention (equal to unpacked training)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    lora: LoraConfig | None = None
    checkpoint_every: Positive = 50
    """Optimiser steps between checkpoints: what a failure repeats at most."""
    keep_checkpoints: Positive = 2
    max_failures: int = Field(default=3, ge=0)
    """Times the worker group is started again after a failure."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers besides train/metrics.jsonl."""


Arm = Literal[
    "natural", "uniform", "solved", "natural-curriculum", "natural-reversed", "solved-curriculum",
    "solved-reversed",
]  # fmt: skip


class EvaluateConfig(Section):
    """Stage 8: held-out loss and verifiable accuracy against honest baselines."""

    arms: tuple[Arm, ...] = ("natural", "solved", "solved-curriculum")
    """Trained at equal budget; names without `-curriculum` or `-reversed` are shuffled."""
    seeds: Positive = 3
    """Trainings per arm; every seed draws other examples and another order for all arms alike."""
    test_rows: Positive = 200
    """Rows of each category's test split that are scored."""
    accuracy_rows: int = Field(default=50, ge=0)
    """Verifiable rows of each category whose answers are generated and checked."""
    max_new_tokens: Positive = 128
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95


class ClusterConfig(Section):
    """Where it runs. Never part of a stage's fingerprint: results do not depend on it."""

    address: str = "auto"
    """`local` starts a Ray of its own; `auto` joins the cluster of a Ray job, else starts one."""
    num_cpus: Positive | None = None
    """CPUs of a local Ray; null: all of this machine."""
    num_tuners: Positive = 1
    """Intervention runs at a time."""
    num_scorers: Positive = 1
    """vLLM engines at a time."""
    num_ingestors: Positive = 2
    actor_cpus: float = Field(default=1.0, gt=0)
    """CPUs of one tuner, scorer or train worker; it uses as many threads."""
    tuner_gpus: float = Field(default=0.0, ge=0)
    scorer_gpus: float = Field(default=0.0, ge=0)
    train_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one actor of each kind; 0 runs on CPU."""
    max_attempts: Positive = 3
    """Times one unit of work is given out again when its actor dies."""
    engine_memory_gib: float = Field(default=1.0, gt=0)
    """KV cache of one CPU scorer."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Share of a GPU's memory that one scorer may take."""


class RunConfig(Section):
    """Everything a run needs."""

    run_dir: str
    """Where everything is written: a local directory, `s3://...` or `gs://...`."""
    data_dir: str = "."
    """What relative source paths start from."""
    seed: int = Field(default=0, ge=0)
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
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
    def _source_names_differ(self) -> RunConfig:
        names = [source.name for source in self.sources if source.name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ; twice: {twice}")
        return self
