"""Chooses a category for each instruction among fixed names; the model writes no free text.

For an instruction x and a name c the score is log p(c | x) - log p(c | empty instruction), summed
over the tokens of the name and of the line break after it.  The line break makes sure that no name
is a prefix of another one.  The second term removes the model's general preference for the name.
Source: contextual calibration, Zhao et al. 2021 (arXiv 2102.09690); as a ratio of likelihoods it is
the domain-conditional PMI of Holtzman et al. 2021 (arXiv 2104.08315).

All functions here are pure; `actors.tagger` runs stage `tag` with them.

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

_SEPARATORS = re.compile("[\\s_\u2010\u2011-]+")  # the hyphens of Unicode, too
_TIE_DECIMALS = 4
"""Scores that agree to so many decimals are a tie; the first name in order wins.  Log-likelihoods
change in the sixth decimal with the rows of the batch, so they must not break ties."""

TAGS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("known", pa.string()),  # category from the source
        pa.field("category", pa.string()),  # chosen; null if the engine failed
        pa.field("score", pa.float64()),  # of the chosen name, calibrated, in nats
        pa.field("margin", pa.float64()),  # over the second-best name, in nats
    ]
)
"""The choice for each row."""


def normal_form(tag: str) -> str:
    """A tag without differences of case, character width, spaces, underscores and hyphens.

    All other characters make a difference: C, C++ and C# are three names.
    """
    wide = "".join(map(_usual_width, tag))
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", wide).casefold())
    return " ".join(_SEPARATORS.sub(" ", text).split())


def _usual_width(character: str) -> str:
    is_other_width = unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))
    return unicodedata.normalize("NFKC", character) if is_other_width else character


def rename_categories(
    rows: Mapping[str, int], names: Sequence[str], aliases: Mapping[str, str]
) -> dict[str, str | None]:
    """Maps each category of the corpus to the name that the run uses for it.

    Args:
        rows: category -> number of rows.
        names: the names to use.  If empty, the categories themselves; spellings with the same
            normal form are merged into the most frequent one (ties: the first in the alphabet).
        aliases: other tag -> name.

    Returns:
        Category -> name, or None if it is no spelling of any name; its rows then need a choice.

    Raises:
        ConfigError: an alias points to an unknown name, two names have the same normal form, or
            there are no names.
    """
    if not names:
        by_form: dict[str, str] = {}
        for category in sorted(rows, key=lambda name: (-rows[name], name)):
            by_form.setdefault(normal_form(category), category)
        # A category with an alias is replaced by another name, unless it is itself such a name.
        renamed_away = {normal_form(tag) for tag in aliases}
        names = sorted(
            name
            for form, name in by_form.items()
            if form not in renamed_away or name in aliases.values()
        )
    if not names:
        raise ConfigError(
            "expected categories to choose among, found none: no row of the corpus has one, and "
            "tag.categories is empty. List the categories in tag.categories, or give "
            "sources a category."
        )
    lookup = _lookup(names, aliases)
    return {category: lookup.get(normal_form(category)) for category in rows}


def _lookup(names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Normal form -> name, for all names and aliases."""
    forms: dict[str, str] = {}
    for name in names:
        form = normal_form(name)
        if forms.setdefault(form, name) != name:
            raise ConfigError(
                f"tag.categories: {forms[form]!r} and {name!r} are two spellings of one name; "
                "expected different names. Keep one of them."
            )
    for tag, name in aliases.items():
        if name not in names:
            raise ConfigError(
                f"tag.aliases: {tag!r} stands for {name!r}; expected one of the categories "
                f"{sorted(names)}"
            )
        forms[normal_form(tag)] = name
    return forms


def instruction_of(messages: Sequence[Mapping[str, str]]) -> str:
    """The text to choose a category for: the first user turn, else the first other turn."""
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
    """Encodes the prompts (first tokens of the instruction, then the cue) and the names.

    Separators in a name become blanks, so that the model reads words.
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
    candidate_texts = [f" {normal_form(name) or name}\n" for name in names]
    candidates: Any = tokenizer(candidate_texts, add_special_tokens=False)["input_ids"]
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
    """Picks the name with the highest score for each row; returns the TAGS table.

    Args:
        ids: B ids.
        known: B categories from the source, None if a row has none.
        log_likelihood_BK: nats; a row of NaN gives no category.
        names: K names, in an order that must be fixed because it breaks ties.
        prior_K: nats, log-likelihood of each name after an empty instruction; None: no correction.
    """
    score_BK = log_likelihood_BK if prior_K is None else log_likelihood_BK - prior_K
    # A failed row gets -inf here so that argmax works; its category becomes null below.
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
    """Rows of each category in a sample of `total` rows: as equal as the supply allows."""
    num_left = min(total, sum(rows.values()))
    sizes = dict.fromkeys(sorted(rows), 0)
    # The smallest category first: what it cannot fill is shared by the larger ones.
    for place, name in enumerate(sorted(rows, key=lambda name: (rows[name], name))):
        sizes[name] = min(rows[name], num_left // (len(rows) - place))
        num_left -= sizes[name]
    # The division rounds down: hand out the remaining rows, one to each category with supply.
    for name in sizes:
        step = min(num_left, 1, rows[name] - sizes[name])
        sizes[name] += step
        num_left -= step
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class TagAccuracy:
    """How often the choice agrees with the category from the source."""

    rows: int
    correct: int
    failed: int
    """Rows without an answer; they count as wrong."""
    interval: Interval
    """Share of correct rows in the stratified sample, with its Wilson interval."""
    chance: float
    """Accuracy on this sample of always choosing the same, most frequent name."""
    corpus_share: float
    """Mean of the recalls, weighted by the share of each category in the corpus."""
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
    """Compares `category` with `known`.

    Args:
        tags: TAGS; `known` must not be null.
        corpus_rows: number of rows of each category in the corpus.
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
    # The sample has equally many rows of each category, the corpus has not: weight the recalls.
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
