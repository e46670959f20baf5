"""The names of the stages, in order, and the folder of each in the run directory.

A file of its own without imports: the command line needs the names before it loads anything heavy.
"""

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
