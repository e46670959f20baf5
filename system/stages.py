"""The stages, in order, and where each one writes in the run directory."""

from __future__ import annotations

STAGE_FOLDERS = {
    "ingest": "corpus",
    "model": "model",
    "tag": "tags",
    "influence": "influence",
    "solve": "mix",
    "curriculum": "curriculum",
    "select": "selection",
    "train": "train",
    "evaluate": "eval",
    "report": "report",
}
"""Stage name -> folder below the run directory."""

STAGE_NAMES = tuple(STAGE_FOLDERS)
