"""A category for every instruction: constrained choice among names, never free text.

For an instruction x and a name c the score is log p(c | x) - log p(c | empty instruction), summed
over the tokens of the name and the line break that ends it (so that no name is a prefix of
another).  The second term takes out what the model thinks of the name itself.  Source: contextual
calibration, Zhao et al. 2021 (arXiv 2102.09690); as a ratio of likelihoods it is the domain-
conditional PMI of Holtzman et al. 2021 (arXiv 2104.08315).

B = rows, K = names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from system.errors import ConfigError
from system.intervals import Interval, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUE = "\n\nCategory:"
"""Stands between the instruction and the name."""

_TIE_DECIMALS = 4
"""Scores that agree to this many decimals are a tie; it goes to the first name in order.
Batch composition moves log-likelihoods in the sixth decimal."""

TAGS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("known", pa.string()),  # category the row came with
        pa.field("category", pa.string()),  # chosen; null where the engine failed on the row
        pa.field("score", pa.float64()),  # nats, calibrated, of the chosen name
        pa.field("margin", pa.float64()),  # nats, over the second-best name
    ]
)
"""What the choice made of each row."""


def normal_form(tag: str) -> str:
    """A tag without case, accents of width, punctuation and kind of separator."""
    text = unicodedata.normalize("NFKC", tag).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def rename_categories(
    found: Mapping[str, int], names: Sequence[str], aliases: Mapping[str, str]
) -> dict[str, str | None]:
    """What each category that the corpus came with is called from now on.

    Args:
        found: category -> rows.
        names: the categories to use; empty: those found, spellings of one normal form merged into
            the most frequent (ties: the first in alphabetical order).
        aliases: free tag -> name.

    Returns:
        Category -> name, or None where it is no spelling of any name and its rows need a choice.

    Raises:
        ConfigError: an alias points to something that is no name, two names have one normal form,
            or there are no names at all.
    """
    if not names:
        by_form: dict[str, str] = {}
        for category in sorted(found, key=lambda name: (-found[name], name)):
            by_form.setdefault(normal_form(category), category)
        renamed_away = {normal_form(tag) for tag in aliases}
        names = sorted(
            name
            for form, name in by_form.items()
            if form not in renamed_away or name in aliases.values()
        )
    if not names:
        raise ConfigError(
            "no row of the corpus has a category and tag.categories names none: there is nothing "
            "to choose among. List the categories in tag.categories, or give sources a category."
        )
    lookup = _lookup(names, aliases)
    return {category: lookup.get(normal_form(category)) for category in found}


def _lookup(names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    forms: dict[str, str] = {}
    for name in names:
        form = normal_form(name)
        if forms.setdefault(form, name) != name:
            raise ConfigError(
                f"tag.categories: {forms[form]!r} and {name!r} are two spellings of one name; "
                "keep one of them"
            )
    for tag, name in aliases.items():
        if name not in names:
            raise ConfigError(
                f"tag.aliases: {tag!r} stands for {name!r}, which is none of the categories "
                f"{sorted(names)}"
            )
        forms[normal_form(tag)] = name
    return forms


def instruction_of(messages: Sequence[Mapping[str, str]]) -> str:
    """The text that the choice sees: the first user turn, else the first turn of anyone else."""
    for role in ("user", "system", "tool"):
        for message in messages:
            if message["role"] == role:
                return message["content"] or ""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicePrompts:
    """Token ids of the prompts and of the names, for `Engine.choose`."""

    prompts: list[list[int]]
    names: list[list[int]]


def encode_choice(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    names: Sequence[str],
    max_instruction_tokens: int,
) -> ChoicePrompts:
    """Instruction (its first tokens), cue, names.

    Names are shown as words: separators become blanks.
    """
    encoded: Any = tokenizer(
        list(instructions),
        add_special_tokens=False,
        truncation=True,
        max_length=max_instruction_tokens,
    )
    cue: Any = tokenizer(CUE, add_special_tokens=False)["input_ids"]
    bos: Any = tokenizer.bos_token_id
    start = [] if bos is None else [int(bos)]
    shown = [f" {normal_form(name) or name}\n" for name in names]
    candidates: Any = tokenizer(shown, add_special_tokens=False)["input_ids"]
    return ChoicePrompts(
        prompts=[[*start, *ids, *cue] for ids in encoded["input_ids"]], names=list(candidates)
    )


def pick(
    ids: Sequence[str],
    known: Sequence[str | None],
    log_likelihood_BK: np.ndarray,
    names: Sequence[str],
    prior_K: np.ndarray | None,
) -> pa.Table:
    """The TAGS table: for each row the name with the highest score.

    Args:
        ids: B ids.
        known: B categories that the rows came with, None where they had none.
        log_likelihood_BK: nats; a row of NaN gives no category.
        names: K names in an order that is the same everywhere: it breaks ties.
        prior_K: nats, log-likelihood of the names after an empty instruction; None: no correction.
    """
    score_BK = log_likelihood_BK if prior_K is None else log_likelihood_BK - prior_K
    best = np.round(np.nan_to_num(score_BK, nan=-np.inf), _TIE_DECIMALS).argmax(axis=1)
    failed_B = np.asarray(np.isnan(score_BK).any(axis=1))
    rows = np.arange(len(score_BK))
    top = score_BK[rows, best]
    others = score_BK.copy()
    others[rows, best] = -np.inf
    margin = top - others.max(axis=1) if len(names) > 1 else np.full(len(rows), np.nan)
    return pa.table(
        {
            "id": list(ids),
            "known": list(known),
            "category": [None if bad else names[k] for bad, k in zip(failed_B, best, strict=True)],
            "score": pa.array(top, mask=np.isnan(top)),
            "margin": pa.array(margin, mask=np.isnan(margin)),
        },
        schema=TAGS,
    )


def stratified_sizes(rows: Mapping[str, int], total: int) -> dict[str, int]:
    """How many rows of each category a sample of `total` takes: as equal as supply allows."""
    left = min(total, sum(rows.values()))
    sizes = dict.fromkeys(sorted(rows), 0)
    for place, name in enumerate(sorted(rows, key=lambda name: (rows[name], name))):
        sizes[name] = min(rows[name], left // (len(rows) - place))
        left -= sizes[name]
    # Every category that is not exhausted now has the same size, but for rounding at the end.
    for name in sizes:
        step = min(left, 1, rows[name] - sizes[name])
        sizes[name] += step
        left -= step
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class TagAccuracy:
    """How often the choice names the category that a row came with."""

    rows: int
    correct: int
    failed: int
    """Rows without an answer; they count as wrong."""
    interval: Interval
    """Wilson interval of the share correct in the stratified sample."""
    chance: float
    """What guessing one name for every row would reach on this sample."""
    corpus_share: float
    """Recalls weighted by the categories' share of the corpus."""
    recall: dict[str, Interval]
    confusion: dict[str, dict[str, int]]
    """Known category -> chosen category -> rows."""

    def to_json(self) -> dict[str, Any]:
        """The content of `accuracy.json`."""
        return {
            "rows": self.rows,
            "correct": self.correct,
            "failed": self.failed,
            "accuracy": self.interval.to_json(),
            "chance": self.chance,
            "corpus_weighted_accuracy": self.corpus_share,
            "recall": {name: value.to_json() for name, value in self.recall.items()},
            "confusion": self.confusion,
        }


def measure_accuracy(
    tags: pa.Table, corpus_rows: Mapping[str, int], confidence: float = 0.95
) -> TagAccuracy:
    """Compares `known` with `category` on rows that have the former.

    Args:
        tags: TAGS, `known` never null.
        corpus_rows: rows of each category in the corpus, for the corpus-weighted accuracy.
        confidence: level of the intervals.
    """
    known, chosen = tags.column("known").to_pylist(), tags.column("category").to_pylist()
    confusion: dict[str, dict[str, int]] = {}
    for right, answer in zip(known, chosen, strict=True):
        row = confusion.setdefault(right, {})
        if answer is not None:
            row[answer] = row.get(answer, 0) + 1
    totals = {name: known.count(name) for name in confusion}
    hits = {name: confusion[name].get(name, 0) for name in confusion}
    recall = {
        name: wilson_interval(hits[name], totals[name], confidence) for name in sorted(confusion)
    }
    weight = sum(corpus_rows[name] for name in confusion)
    correct = sum(hits.values())
    return TagAccuracy(
        rows=len(known),
        correct=correct,
        failed=chosen.count(None),
        interval=wilson_interval(correct, len(known), confidence),
        chance=max(totals.values()) / len(known),
        corpus_share=sum(corpus_rows[n] / weight * hits[n] / totals[n] for n in confusion),
        recall=recall,
        confusion={name: dict(sorted(confusion[name].items())) for name in sorted(confusion)},
    )
