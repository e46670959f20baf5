"""The sections of the configuration that say what the corpus is: sources, ingest, tag."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from system.functions import FUNCTION_NAME

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
FunctionName = Annotated[str, Field(pattern=rf"^{FUNCTION_NAME.pattern}$")]


class Section(BaseModel):
    """A part of the tree: frozen, no unknown keys, docstrings are help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


RowFormat = Literal[
    "auto", "alpaca", "prompt-completion", "question-answer", "sharegpt", "messages", "threads",
    "preference", "columns",
]  # fmt: skip


class SourceConfig(Section):
    """One source of instruction rows: a file, a glob, a directory, a URI or a hub data set."""

    path: str
    """Relative to `data_dir`, absolute, `s3://...`, `gs://...`, or `hf://owner/name`."""
    name: str = ""
    """How reports call it; empty: the file's name without its endings."""
    format: RowFormat = "auto"
    """Shape of a row; `auto` decides from the first rows' keys."""
    columns: dict[str, str] = {}
    """For `format: columns`: which column is `system`, `prompt`, `response`."""
    category: str | None = None
    """One category for the whole source."""
    category_column: str | None = None
    """Column that holds the category."""
    category_pattern: str | None = None
    """Regular expression with a group `category`, matched against the file's path."""
    category_map: dict[str, str] | str = {}
    """Renames found categories (merges where two map to one), or tells what ids mean: a mapping, or
    a file with one (CSV, JSONL, Parquet: `category` and one other column; JSON, YAML)."""
    category_unmapped: Literal["keep", "untagged", "reject"] = "keep"
    """A category that `category_map` does not have keeps its name, or its rows are tagged as if
    they had none, or rejected (`unknown-category`). A map in a file needs it said."""
    answer_column: str | None = None
    """Column that holds a verifiable final answer."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the final answer inside a response."""
    score_column: str | None = None
    """Column with a quality score, for `select.score: column`; rows without one come last."""
    embedding_column: str | None = None
    """Column with a vector of numbers, for `select.embedding: column`; one length everywhere."""
    max_rows: Positive | None = None
    """Read at most this many rows, in file order; null reads all."""

    @model_validator(mode="after")
    def _one_origin_of_category(self) -> SourceConfig:
        given = [
            name
            for name in ("category", "category_column", "category_pattern")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"give one of {given}, not several")
        is_said = "category_unmapped" in self.model_fields_set
        if isinstance(self.category_map, str) and not is_said:
            raise ValueError(
                f"category_map is the file {self.category_map!r}: say with category_unmapped what "
                "becomes of values that it does not have (keep, untagged or reject)"
            )
        for name in ("category_pattern", "answer_pattern"):
            pattern = getattr(self, name)
            if pattern is None:
                continue
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} {pattern!r} does not compile: {error}") from error
            if name == "category_pattern" and "category" not in compiled.groupindex:
                raise ValueError(f"{name} {pattern!r} needs a group (?P<category>...)")
            if name == "answer_pattern" and compiled.groups != 1:
                raise ValueError(f"{name} {pattern!r} needs exactly one group")
        if self.format == "columns" and not {"prompt", "response"} <= set(self.columns):
            raise ValueError("format 'columns' needs columns.prompt and columns.response")
        return self


class IngestConfig(Section):
    """Stage `ingest`: raw files to Arrow shards by category. Details: `docs/data.md`."""

    estimate_share: Share = 0.1
    """Share of rows, by content hash, on which the effect matrix is measured."""
    test_share: Share = 0.1
    """Share of rows, by content hash, on which everything is judged."""
    max_rejected_share: Share = 0.05
    """The stage fails when more than this share of the rows read is rejected."""
    unusable_files: Literal["error", "count"] = "error"
    """A file that has rows but not one usable: the stage fails, or its rows count as rejected."""
    min_train_rows: Positive = 32
    """Smallest number of train rows of a category."""
    min_heldout_rows: Positive = 8
    """Smallest number of estimate rows, and of test rows, of a category."""
    max_chars: Positive = 200_000
    """Rows whose messages are longer together are rejected (`too-long`)."""
    deduplicate: Literal["none", "exact", "near"] = "exact"
    """`exact`: normalised content; `near`: also MinHash neighbours."""
    near_threshold: Share = 0.8
    """Jaccard similarity of word 5-grams above which two rows are near-duplicates."""
    benchmarks: tuple[str, ...] = ()
    """Files (relative to data_dir) whose text no train row may contain."""
    benchmark_ngram: Positive = 13
    """A train row that shares a run of this many words with a benchmark is rejected."""
    filters: tuple[FunctionName, ...] = ()
    """Your own functions `module:function` that reject rows (personal data, safety): each gets rows
    as an Arrow table and returns None or a reason for every row (`docs/data.md`)."""
    chunk_bytes: Positive = 64 * 2**20
    """Size of the byte ranges into which splittable files are cut."""
    shard_rows: Positive = 50_000
    """Rows per Arrow shard."""

    @model_validator(mode="after")
    def _something_left_to_train_on(self) -> IngestConfig:
        if self.estimate_share + self.test_share >= 1.0:
            raise ValueError(
                f"estimate_share {self.estimate_share} + test_share {self.test_share} "
                "must stay below 1, or nothing is left to train on"
            )
        return self


class TagConfig(Section):
    """Stage `tag`: a category for every row that has none."""

    categories: tuple[str, ...] = ()
    """Names to choose among; empty: the categories that the corpus already has."""
    aliases: dict[str, str] = {}
    """Free tags that mean a category: `{"maths": "math"}`; applied after normalisation."""
    max_instruction_tokens: Positive = 96
    """Tokens of the instruction that the choice sees."""
    prior_correction: bool = True
    """Subtract each name's log-likelihood after an empty instruction (contextual calibration)."""
    accuracy_rows: int = Field(default=2000, ge=0)
    """Rows with known labels, stratified, on which the accuracy of tagging is reported."""
