"""What people read of an append: what was added, what is stale, what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from system.influence.design.design import Design


def append_summary(
    design: Design, trainings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """`append` in `summary.json`; None where the design stands alone.

    Args:
        design: of the attempt.
        trainings: run name -> what its training took (`units/*.json`).
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
    """The lines of a stage's result about an append; none without one."""
    append = summary.get("append")
    if append is None:
        return []
    lines = []
    if append["new"]:
        repeats = ""
        if append["repeated"]:
            repeats = (
                f", {append['repeated']} of them earlier runs once more for the new rows "
                "(influence.keep_checkpoints spares these)"
            )
        count = append["trainings"]
        lines.append(
            f"appended to influence/{append['earlier']}: {', '.join(append['new'])}; {count} "
            f"training{'' if count == 1 else 's'}{repeats}, {append['trained_tokens']:,} tokens"
        )
    else:
        lines.append(f"nothing new beside influence/{append['earlier']}: its numbers are kept")
    if append["categories"]:
        lines.append(appended_text(append))
    lines += [f"stale, left out: {text}" for text in stale_texts(append)]
    if append["repeated_otherwise"]:
        lines.append(
            f"{append['repeated_otherwise']} of {append['repeated']} repeated trainings did not go "
            "as the first time, so this machine or its packages differ from those of the earlier "
            "result: appended effects carry that difference as further noise"
        )
    return lines


def appended_text(append: Mapping[str, Any]) -> str:
    """What the flag of an entry means, in a sentence."""
    return (
        f"appended entries ({', '.join(append['categories'])} as source or target) are measured "
        "at the earlier base, which has no rows of these categories, by adding a dose"
    )


def stale_texts(append: Mapping[str, Any]) -> list[str]:
    """One text for each stale category: why, and what became of it."""
    return [
        f"{name}: {reason}" + (", so it was measured as a new one" if name in append["new"] else "")
        for name, reason in sorted(append["stale"].items())
    ]
