"""Reuse of finished runs by later attempts of the stage.

    attempt A ── scores of a run ──> influence/shared/<key>.parquet ──> attempt B, no training

The scores of a run depend on its schedule, its mask, the training settings, the model and the
held-out rows, and on nothing else.  `run_key` hashes exactly these.  So after a change of the
analysis (confidence, thresholds of gamma), or with one more replication, only new runs are
measured.  A change that affects scores changes the key.  A warm-up leaves only its cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from system import storage
from system.influence.design.design import Design, InterventionRun
from system.training.settings import TrainSettings

FORMAT = 1
"""Increase it whenever a change of the code changes the result of a training or a scoring."""


def heldout_digest(heldout: pa.Table) -> str:
    """SHA-256 over the content of the held-out rows (not over the bytes of their file)."""
    digest = hashlib.sha256(f"heldout {heldout.num_rows}\n".encode())
    for name in sorted(heldout.column_names):
        text = json.dumps(heldout.column(name).to_pylist(), separators=(",", ":"))
        digest.update(f"{name} {len(text)}\n{text}".encode())
    return digest.hexdigest()


def run_key(
    design: Design,
    run: InterventionRun,
    active: np.ndarray,
    settings: TrainSettings,
    *,
    how: Mapping[str, Any],
    model: Mapping[str, Any],
    heldout: str,
) -> str:
    """Hash (32 hex digits) over everything that decides the scores of a run.

    Args:
        design: the design of the run.
        run: the run.
        active: [plan rows] bool, its mask.
        settings: of its training.
        how: further settings: the metric, settings of the estimator.
        model: identity of the model's weights and of the scorer's precision.
        heldout: digest of the held-out rows.
    """
    replication = design.replications[run.replication]
    value = {
        "format": FORMAT,
        "kind": run.kind,
        "plan": replication.plan_of(run.kind),
        "start": replication.warm_sha256,
        "active": hashlib.sha256(np.packbits(active).tobytes()).hexdigest(),
        "settings": settings.sha256(),
        "how": dict(how),
        "model": dict(model),
        "heldout": heldout,
    }
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class SharedRuns:
    """The finished runs below one directory, by key."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._known = set(storage.whole_names(uri))

    def find(self, key: str) -> tuple[pa.Table | None, dict[str, Any]] | None:
        """(scores, training statistics) of a finished run, or None; a warm-up has no scores."""
        if f"{key}.json" not in self._known:
            return None
        stats = storage.read_json(storage.join(self._uri, f"{key}.json"))
        name = f"{key}.parquet"
        if not stats["is_scored"]:
            return None, stats["training"]
        if name not in self._known:
            return None
        return storage.read_table(storage.join(self._uri, name)), stats["training"]

    def keep(self, key: str, scores: pa.Table | None, training: Mapping[str, Any]) -> None:
        """Stores a finished run.  The JSON file is written last and commits it."""
        if scores is not None:
            storage.write_table(storage.join(self._uri, f"{key}.parquet"), scores)
        value = {"is_scored": scores is not None, "training": dict(training)}
        storage.write_json(storage.join(self._uri, f"{key}.json"), value)
        self._known |= {f"{key}.json", f"{key}.parquet"}
