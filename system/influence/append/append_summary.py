"""The results of an append as `summary.json` and text: what was added, what is stale, the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system.influence.design.design import Design


def append_summary(
    design: Design, trainings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The entry `append` of `summary.json`; None if the design is not an appended one.

    Args:
        design: of the attempt.
        trainings: run name -> statistics of its training (`units/*.json`).
    """
    if design.append is None:
        return None
    own = [trainings[run.name] for run in design.all_runs]
    own = [item for item in own if "taken_over" not in item]
    repeated = [item["repeated"] for item in own if "repeated" in item]
    return {
        "earlier": design.append.earlier,
        "categories": list(design.append.sources),
        "new": list(design.append.new),
        "stale": dict(design.append.stale),
        "trainings": len(own),
        "repeated": len(repeated),
        "repeated_otherwise": sum(not item["is_same"] for item in repeated),
        "trained_tokens": sum(item["trained_tokens"] for item in own),
    }


def append_lines(summary: Mapping[str, Any]) -> list[str]:
    """Lines of text about an append; none if there was no append."""
    append = summary.get("append")
    if append is None:
        return []
    lines = []
    if append["new"]:
        repeats = ""
        if append["repeated"]:
            repeats = (
                f", {append['repeated']} of them repeat earlier runs for the new held-out rows "
                "(influence.keep_checkpoints avoids these)"
            )
        count = append["trainings"]
        lines.append(
            f"appended to influence/{append['earlier']}: {', '.join(append['new'])}; {count} "
            f"training{'' if count == 1 else 's'}{repeats}, {append['trained_tokens']:,} tokens"
        )
    else:
        lines.append(f"nothing to add to influence/{append['earlier']}: its numbers are kept")
    if append["categories"]:
        lines.append(appended_text(append))
    lines += [f"stale, left out: {text}" for text in stale_texts(append)]
    if append["repeated_otherwise"]:
        lines.append(
            f"{append['repeated_otherwise']} of {append['repeated']} repeated trainings did not "
            "give the same result as before, so this machine or its packages differ from those of "
            "the earlier result: the difference adds noise to appended effects"
        )
    return lines


def appended_text(append: Mapping[str, Any]) -> str:
    """One sentence: the meaning of the appended flag."""
    return (
        f"appended entries ({', '.join(append['categories'])} as source or target) are measured "
        "at the earlier base, which has no rows of these categories, by adding a dose"
    )


def stale_texts(append: Mapping[str, Any]) -> list[str]:
    """One text per stale category: the reason, and whether it was measured again."""
    return [
        f"{name}: {reason}" + (", so it was measured as a new one" if name in append["new"] else "")
        for name, reason in sorted(append["stale"].items())
    ]
