"""Configuration sections for the corpus: `sources`, `ingest` and `tag`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from system.functions import FUNCTION_NAME
from system.patterns import compile_pattern

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
FunctionName = Annotated[str, Field(pattern=rf"^{FUNCTION_NAME.pattern}$")]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys are errors, field docstrings are help texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def name_of(value: str | int | float) -> str:
    """A value of a category column as the name of a category: 3 and 3.0 are the same name."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value)) if is_whole else str(value).strip()


RowFormat = Literal[
    "auto", "alpaca", "prompt-completion", "question-answer", "sharegpt", "messages", "threads",
    "preference", "columns",
]  # fmt: skip


class SourceConfig(Section):
    """One source of instruction rows: a file, a glob, a directory, a URI or a hub data set."""

    path: str
    """Path of the files: relative to `data_dir`, absolute, `s3://...`, `gs://...`, or
    `hf://owner/name`."""
    name: str = ""
    """Name of the source in reports. Empty: the file name without its extensions."""
    format: RowFormat = "auto"
    """Layout of a row. `auto` detects it from the keys of the first rows."""
    columns: dict[str, str] = {}
    """For `format: columns`: the columns that hold `system`, `prompt` and `response`."""
    category: str | None = None
    """One category for all rows of the source."""
    category_column: str | None = None
    """Column that holds the category."""
    category_pattern: str | None = None
    """Regular expression (RE2 syntax) with a group `category`, matched against the file's path."""
    category_map: dict[str, str] | str = {}
    """Renames categories; two that map to the same name are merged. A mapping, or the path of a
    file that holds one: CSV, JSONL or Parquet with the column `category` and one other column, or
    JSON, or YAML."""
    category_unmapped: Literal["keep", "untagged", "reject"] = "keep"
    """What happens to a category that is missing from `category_map`. `keep`: it keeps its name;
    `untagged`: its rows count as rows without a category and are tagged; `reject`: its rows are
    rejected (`unknown-category`). Required when `category_map` is a file."""
    answer_column: str | None = None
    """Column that holds the final answer, so that generated answers can be checked against it."""
    answer_pattern: str | None = None
    """Regular expression (RE2 syntax) with one group that finds the final answer inside a response.
    The last match counts; `^` and `$` match at every line."""
    score_column: str | None = None
    """Column with a quality score, for `select.score: column`. Rows without a score come last."""
    embedding_column: str | None = None
    """Column with a vector of numbers, for `select.embedding: column`. All vectors must have the
    same length."""
    max_rows: Positive | None = None
    """Largest number of rows that are read, in file order. Null: all rows."""

    @field_validator("category", mode="before")
    @classmethod
    def _category_is_a_name(cls, value: Any) -> Any:
        return _name_in_yaml(value)

    @field_validator("category_map", mode="before")
    @classmethod
    def _map_of_names(cls, value: Any) -> Any:
        """YAML reads `0: zero` as a number and `no: Norwegian` as false."""
        if not isinstance(value, Mapping):
            return value
        names: dict[Any, Any] = {}
        for key, category in value.items():
            name, category = _name_in_yaml(key), _name_in_yaml(category)
            if names.setdefault(name, category) != category:
                raise ValueError(
                    f"expected one category for {name!r}, found {names[name]!r} and {category!r}"
                )
        return names

    @model_validator(mode="after")
    def _one_origin_of_category(self) -> SourceConfig:
        origins = [
            name
            for name in ("category", "category_column", "category_pattern")
            if getattr(self, name) is not None
        ]
        if len(origins) > 1:
            raise ValueError(f"expected one origin of the category, found {origins}: keep one")
        # A map in a file is written by others and may be incomplete; what happens to the missing
        # categories must be a decision, never the default.
        is_explicit = "category_unmapped" in self.model_fields_set
        if isinstance(self.category_map, str) and not is_explicit:
            raise ValueError(
                f"category_map is the file {self.category_map!r}: set category_unmapped (keep, "
                "untagged or reject) for the values that are missing from the file"
            )
        for name in ("category_pattern", "answer_pattern"):
            pattern = getattr(self, name)
            if pattern is None:
                continue
            try:
                compiled = compile_pattern(pattern)
            except ValueError as error:
                raise ValueError(
                    f"{name} {pattern[:200]!r} cannot be used as a pattern: {error}"
                ) from error
            if name == "category_pattern" and "category" not in compiled.groupindex:
                raise ValueError(f"{name} {pattern[:200]!r} needs a group (?P<category>...)")
            if name == "answer_pattern" and compiled.groups != 1:
                raise ValueError(f"{name} {pattern[:200]!r} needs exactly one group")
        if self.format == "columns" and not {"prompt", "response"} <= set(self.columns):
            raise ValueError("format 'columns' needs columns.prompt and columns.response")
        return self


def _name_in_yaml(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(
            f"expected a name, found {str(value).lower()}, which is what YAML makes of yes, no, "
            "on, off, true and false: put the name in quotes"
        )
    return name_of(value) if isinstance(value, int | float) else value


class IngestConfig(Section):
    """Stage `ingest`: converts raw files to Arrow shards by category. Details: `docs/data.md`."""

    estimate_share: Share = 0.1
    """Share of the rows in the `estimate` split, on which the effect matrix is measured. The hash
    of its prompt decides to which split a row belongs."""
    test_share: Share = 0.1
    """Share of the rows in the `test` split, on which the trained models are judged."""
    max_rejected_share: Share = 0.05
    """Largest share of the rows that may be rejected. Above it the stage fails."""
    unusable_files: Literal["error", "count"] = "error"
    """What happens when a file has rows but none is usable. `error`: the stage fails; `count`: its
    rows count as rejected."""
    min_train_rows: Positive = 32
    """Smallest number of train rows that a category may have. With fewer the stage fails."""
    min_heldout_rows: Positive = 8
    """Smallest number of rows that a category may have in the `estimate` split and in the `test`
    split, each. With fewer the stage fails."""
    max_chars: Positive = 200_000
    """Largest number of characters in all messages of a row. Longer rows are rejected
    (`too-long`)."""
    reasoning: Literal["keep", "drop"] = "keep"
    """What happens to the reasoning that a row brings beside an answer (`reasoning_content`,
    `reasoning` or `thinking`). `keep`: it is rendered and trained with the answer, and rows whose
    reasoning the chat template does not render are left out; `drop`: the answer is trained
    without it, and such rows are counted."""
    deduplicate: Literal["none", "exact", "near"] = "exact"
    """Which duplicates are removed. `exact`: rows with equal normalised content; `near`: also rows
    with nearly equal content, found by MinHash."""
    near_threshold: Share = 0.8
    """`deduplicate: near`: Jaccard similarity of word 5-grams above which two rows are
    near-duplicates."""
    benchmarks: tuple[str, ...] = ()
    """Benchmark files, relative to `data_dir`. A train row that contains their text is rejected."""
    benchmark_ngram: Positive = 13
    """Length in words of a shared text. A train row that has so many consecutive words in common
    with a benchmark is rejected."""
    filters: tuple[FunctionName, ...] = ()
    """Your own functions `module:function` that reject rows (personal data, safety). Each gets the
    rows as an Arrow table and returns None or a reject reason for every row (`docs/data.md`)."""
    chunk_bytes: Positive = 64 * 2**20
    """Size in bytes of a chunk, which one worker reads at a time: large files are split into ranges
    of this size, small files are grouped up to it."""
    shard_rows: Positive = 50_000
    """Rows per Arrow shard."""

    @model_validator(mode="after")
    def _something_left_to_train_on(self) -> IngestConfig:
        if self.estimate_share + self.test_share >= 1.0:
            raise ValueError(
                f"estimate_share {self.estimate_share} + test_share {self.test_share} "
                "must be below 1, or no rows are left to train on"
            )
        return self


class TagConfig(Section):
    """Stage `tag`: assigns a category to every row that has none."""

    categories: tuple[str, ...] = ()
    """Categories that the model chooses among. Empty: the categories that the corpus has."""
    aliases: dict[str, str] = {}
    """Other spellings of a category, such as `{"maths": "math"}`. They apply after
    normalisation."""
    max_instruction_tokens: Positive = 96
    """Number of tokens of an instruction that the model reads to choose its category."""
    prior_correction: bool = True
    """Subtract the log-likelihood of each category name after an empty instruction (contextual
    calibration). It removes the model's preference for common names."""
    accuracy_rows: int = Field(default=2000, ge=0)
    """Size of the stratified sample of rows with known categories on which the accuracy of tagging
    is reported."""
