"""The run directory: which stages are finished, what they were made from, and who writes to it.

    RUN_DIR/
      lease.json                 the driver that may write now
      config.json                the resolved configuration of the last `run`
      <stage>/record.json        the commit: which attempt is the stage's result
      <stage>/<fingerprint>/...  an attempt; its own record.json is written last
      <stage>/shared/...         finished work that several attempts can use
      <stage>/matrix.parquet     links to the outputs of the committed attempt (local disks only)

The fingerprint of a stage is a hash of everything that its result depends on: its revision, the
parts of the configuration that it reads, and the stages before it (their fingerprints, or a digest
of their results).  It is also the name of the attempt's directory.  So a killed attempt is found
and continued, and a return to an earlier configuration finds its finished result.  Readers follow
records and never list directories.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from system import storage
from system.errors import DataError, RunBusyError

FORMAT = 1
HEARTBEAT_SECONDS = 5.0
"""Time between two renewals of the lease."""
LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """The commit of a finished stage: what it was made from, and where its outputs lie."""

    stage: str
    fingerprint: str
    """Hash of `inputs`, 16 hex digits; also the name of the attempt's directory."""
    inputs: dict[str, Any]
    """Dotted name -> value; the fingerprint is computed from it."""
    outputs: dict[str, str]
    """Name -> path relative to the run directory."""
    counts: dict[str, Any]
    """Numbers that the stage counted: rows in, out and dropped by reason, tokens, ..."""
    lines: tuple[str, ...]
    """The lines that the stage printed when it was finished."""
    seconds: float
    """Wall time of all sessions that worked on this attempt."""
    finished: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Package -> version."""
    result: str = ""
    """Digest of what later stages read; empty if the stage computes none.  With it, another way to
    the same result (input files copied, or split in two) does not repeat the later stages."""
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """What the fingerprints of later stages contain of this one."""
        return self.result or self.fingerprint


def shared_uri(attempt: str) -> str:
    """The directory that all attempts of a stage share; it lies beside their directories."""
    return storage.join(attempt.rsplit("/", 1)[0], "shared")


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 over the canonical JSON of the inputs."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Flattens nested mappings to dotted names; sequences stay values."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat |= flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        return flat or {prefix: {}}
    return {prefix: value}


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The inputs that differ, for messages: `influence.learning_rate 0.001 -> 0.0003`."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
        if before != after:
            changes.append(f"{name} {_short(before)} -> {_short(after)}")
    shown = ", ".join(changes[:3])
    return shown + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


class RunDir:
    """One run directory, local or on an object store."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    def stage_uri(self, folder: str) -> str:
        """Directory of a stage."""
        return storage.join(self.uri, folder)

    def attempt_uri(self, folder: str, attempt: str) -> str:
        """Directory of one attempt at a stage."""
        return storage.join(self.uri, folder, attempt)

    def read_record(self, folder: str) -> StageRecord | None:
        """The committed record of a stage, or None if the stage is not finished.

        Raises:
            DataError: the record has another format version.
        """
        return _read_record(storage.join(self.stage_uri(folder), "record.json"))

    def read_attempt_record(self, folder: str, attempt: str) -> StageRecord | None:
        """The record of a finished attempt, which need not be the committed one."""
        return _read_record(storage.join(self.attempt_uri(folder, attempt), "record.json"))

    def output_uri(self, record: StageRecord, name: str) -> str:
        """Absolute URI of an output.

        Raises:
            KeyError: the stage has no output of that name.
        """
        return storage.join(self.uri, record.outputs[name])

    def commit(self, folder: str, record: StageRecord) -> None:
        """Makes a finished attempt the result of its stage, with one atomic write."""
        value = asdict(record)
        storage.write_json(
            storage.join(self.attempt_uri(folder, record.fingerprint), "record.json"), value
        )
        storage.write_json(storage.join(self.stage_uri(folder), "record.json"), value)
        self._link_outputs(folder, record)

    def invalidate(self, folder: str, attempt: str) -> None:
        """Deletes a stage's record, the attempt and what attempts share, for `--redo`."""
        storage.delete(storage.join(self.stage_uri(folder), "record.json"))
        storage.delete(self.attempt_uri(folder, attempt))
        storage.delete(shared_uri(self.attempt_uri(folder, attempt)))

    def _link_outputs(self, folder: str, record: StageRecord) -> None:
        """Links outputs to stable names beside the record, for people; programs read the record."""
        stage = storage.local_path(self.stage_uri(folder))
        if stage is None:
            return
        for output in record.outputs.values():
            target = Path(self.uri, output)
            link = stage / target.name
            temporary = stage / f".{target.name}.{uuid.uuid4().hex}"
            temporary.symlink_to(os.path.relpath(target, stage))
            os.replace(temporary, link)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Reserves the run directory for this process; a heartbeat renews the lease.

        Raises:
            RunBusyError: another living driver has the lease.
        """
        uri = storage.join(self.uri, "lease.json")
        holder = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        _refuse_living_holder(uri, self.uri)
        _write_lease(uri, holder)
        # Two drivers may pass the check at the same time.  The later write wins; the wait lets the
        # other driver see that its token is gone.
        time.sleep(0.2)
        if storage.read_json(uri)["token"] != holder["token"]:
            _refuse_living_holder(uri, self.uri)
        # Without the heartbeat another driver would take the lease of a long run.
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                _write_lease(uri, holder)

        thread = threading.Thread(target=beat, daemon=True, name="lease")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            storage.delete(uri)


def _read_record(uri: str) -> StageRecord | None:
    if not storage.exists(uri):
        return None
    value = storage.read_json(uri)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(
            f"{uri}: expected a stage record of format {FORMAT}, found "
            f"{value.get('format') if isinstance(value, dict) else type(value).__name__}; the run "
            "directory was written by another version: use a new run_dir, or run the stage again "
            "with --redo."
        )
    return StageRecord(**{**value, "lines": tuple(value["lines"])})


def _write_lease(uri: str, holder: Mapping[str, Any]) -> None:
    storage.write_json(uri, {**holder, "time": time.time()})


def _refuse_living_holder(uri: str, run_dir: str) -> None:
    if not storage.exists(uri):
        return
    holder = storage.read_json(uri)
    age = time.time() - holder["time"]
    if age > LEASE_SECONDS:
        return
    if holder["host"] == socket.gethostname() and not _is_alive(holder["pid"]):
        return
    raise RunBusyError(
        f"{run_dir} is in use: expected a free run directory, found a driver on "
        f"{holder['host']}, process {holder['pid']}, last seen {age:.0f} s ago. Wait for it, stop "
        f"it, or use another run_dir; a dead driver's lease ends after {LEASE_SECONDS:.0f} s."
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
