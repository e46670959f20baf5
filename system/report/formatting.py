"""Formats numbers and names for the report: minus signs, useful digits, escaped text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

MINUS = "−"
NOTHING = "–"
LONGEST = 60
"""Largest number of categories that a figure shows one by one; of more it shows the ends."""
_END = 20
"""Number of categories at each end."""

T = TypeVar("T")


def fixed(value: float | None, digits: int) -> str:
    """The number with this many decimals; a dash for None, infinity, and NaN."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int) -> str:
    """As `fixed`, with a plus sign if the number is positive after rounding."""
    text = fixed(value, digits)
    if value is not None and value > 0 and any(digit in text for digit in "123456789"):
        return f"+{text}"
    return text


def interval(low: float | None, high: float | None, digits: int, *, with_sign: bool = True) -> str:
    """`[low, high]`, with signs by default; a dash if an end is missing."""
    if low is None or high is None:
        return NOTHING
    write = signed if with_sign else fixed
    return f"[{write(low, digits)}, {write(high, digits)}]"


def span(low: float | None, high: float | None, digits: int) -> str:
    """An interval inside a sentence: `−0.01 to +0.03`."""
    return f"{signed(low, digits)} to {signed(high, digits)}"


def decimals(values: Iterable[float | None], *, significant: int = 2, least: int = 2) -> int:
    """Number of decimals (at most 9) that shows the median size with `significant` digits."""
    sizes = sorted(abs(v) for v in values if v is not None and math.isfinite(v) and v != 0)
    if not sizes:
        return least
    typical = sizes[len(sizes) // 2]
    return max(least, min(9, significant - 1 - math.floor(math.log10(typical))))


def count(value: float | None) -> str:
    """A count of examples, tokens, or rows: without decimals if it is whole, else with one."""
    if value is None:
        return NOTHING
    return fixed(value, 0 if abs(value - round(value)) < 1e-6 else 1)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NOTHING if share is None else f"{fixed(100 * share, digits)}\u00a0%"


def duration(seconds: float) -> str:
    """`48 s`, `12 min 05 s`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def names(items: Iterable[str], *, most: int = 6) -> str:
    """`a, b and c`; at most `most` names, then the number of the others."""
    listed = [quote(item) for item in items]
    if not listed:
        return "none"
    if len(listed) > most:
        return f"{', '.join(listed[:most])} and {len(listed) - most} more"
    if len(listed) == 1:
        return listed[0]
    return f"{', '.join(listed[:-1])} and {listed[-1]}"


def ends(items: Sequence[T]) -> list[T]:
    """All items of a short list; of a long one the first and the last, which tell the most."""
    if len(items) <= LONGEST:
        return list(items)
    return [*items[:_END], *items[-_END:]]


def ends_note(number: int) -> str:
    """What `ends` left out, as a sentence behind a caption; empty if nothing."""
    if number <= LONGEST:
        return ""
    return f" Shown: the first {_END} and the last {_END} of {number:,}; the table has more."


def quote(name: str) -> str:
    """The name in quotation marks, for use inside a sentence."""
    return f"“{name}”"


def plural(number: int, noun: str, many: str | None = None) -> str:
    """`1 category`, `3 categories`."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def wrapped(name: str, width: int, *, lines: int = 2) -> list[str]:
    """The name in at most `lines` lines of `width` characters; … marks a cut.

    Lines break at spaces and behind `_`, `-` and `/`; a longer part is broken inside.
    """
    clean = " ".join(name.split()) or "(empty)"
    parts, line = [], ""
    for token in re.findall(r"[^\s_/-]*[_/-]+|[^\s_/-]+|\s", clean):
        if len((line + token).rstrip()) > width:
            parts += [line.rstrip()] if line.strip() else []
            line = token.lstrip()
            while len(line) > width:
                parts.append(line[:width])
                line = line[width:]
        else:
            line += token
    parts.append(line.rstrip())
    if len(parts) <= lines:
        return parts
    kept = parts[:lines]
    kept[-1] = kept[-1][: width - 1].rstrip() + "…"
    return kept


def shortened(name: str, width: int) -> str:
    """The name on one line; … marks a cut."""
    clean = " ".join(name.split()) or "(empty)"
    return clean if len(clean) <= width else clean[: width - 1].rstrip() + "…"


def moment(iso: str) -> str:
    """`2030-01-05 10:00 UTC` from an ISO 8601 time in UTC."""
    return f"{iso[:16].replace('T', ' ')} UTC" if iso else ""


def figure_text(text: str) -> str:
    """Text for Plotly, with HTML escaped, because Plotly interprets some tags.

    Quotes are not escaped: Plotly knows no entity for them, and without angle brackets they are
    harmless.
    """
    return html.escape(text, quote=False)


def figure_label(name: str, width: int) -> str:
    """A tick label of at most two lines for Plotly."""
    return "<br>".join(figure_text(line) for line in wrapped(name, width))
