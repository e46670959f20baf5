"""The run directory: which stages are finished, what they were made from, and who writes to it.

    RUN_DIR/
      lease.json                 the driver that may write now, and when it was last seen
      epochs/00000007.json       the seventh driver that took the lease, and the commits it found
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

A driver can be paused for longer than its lease lasts, and then come back.  So each driver that
takes the lease has an epoch, one more than the last, and every record carries the epoch of its
driver.  A record of an older epoch counts only if the newest driver found it when it started: what
a driver commits after it lost the lease is not a result, wherever it writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from system import storage
from system.errors import DataError, RunBusyError
from system.stages import STAGE_FOLDERS

FORMAT = 1
_EPOCH_NAME = re.compile(r"\d{8}\.json")
HEARTBEAT_SECONDS = 5.0
"""Time between two renewals of the lease."""
LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long is free."""
_WATCHED_BEATS = 4
"""A lease from the future is free if it is not renewed within so many heartbeats."""
_SETTLE_SECONDS = 0.2
"""After this wait, two drivers that storage without an exclusive create let in see each other."""


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
    epoch: int = 0
    """Epoch of the driver that committed it."""

    @property
    def identity(self) -> str:
        """What the fingerprints of later stages contain of this one."""
        return self.result or self.fingerprint


Content = TypeVar("Content")
_Pid = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
_Count = Annotated[int, Field(strict=True, ge=0)]
_Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Content of `lease.json`: the driver that has the lease."""

    token: str
    """Random, another one for every driver."""
    host: str
    pid: _Pid
    time: _Seconds
    """Unix time at which it was last seen, by the clock of its host."""
    epoch: _Count = 0
    """0: the driver is of a version without epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """Content of `epochs/NUMBER.json`; only the driver of that epoch writes it."""

    holder: Holder
    """The driver when it took the lease."""
    commits: dict[str, str]
    """Path of each valid record that it found -> SHA-256 of the file."""
    is_released: bool = False
    """Whether the driver has ended and given the lease back."""

    @property
    def epoch(self) -> int:
        return self.holder.epoch


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
        self._held: _Epoch | None = None
        """The epoch of this process while it has the lease."""

    def stage_uri(self, folder: str) -> str:
        """Directory of a stage."""
        return storage.join(self.uri, folder)

    def attempt_uri(self, folder: str, attempt: str) -> str:
        """Directory of one attempt at a stage."""
        return storage.join(self.uri, folder, attempt)

    def read_record(self, folder: str) -> StageRecord | None:
        """The committed record of a stage, or None if the stage is not finished.

        Raises:
            DataError: the record has another format version, or is damaged.
        """
        return self._read_valid(f"{folder}/record.json", self._held or self._newest_epoch())

    def read_attempt_record(self, folder: str, attempt: str) -> StageRecord | None:
        """The record of a finished attempt, which need not be the committed one."""
        path = f"{folder}/{attempt}/record.json"
        return self._read_valid(path, self._held or self._newest_epoch())

    def output_uri(self, record: StageRecord, name: str) -> str:
        """Absolute URI of an output.

        Raises:
            KeyError: the stage has no output of that name.
        """
        return storage.join(self.uri, record.outputs[name])

    def commit(self, folder: str, record: StageRecord) -> None:
        """Makes a finished attempt the result of its stage, with one atomic write.

        Raises:
            RunBusyError: another driver has taken the lease; nothing is written.
        """
        self.check_lease()
        newest = self._held or self._newest_epoch()
        value = asdict(replace(record, epoch=0 if newest is None else newest.epoch))
        storage.write_json(
            storage.join(self.attempt_uri(folder, record.fingerprint), "record.json"), value
        )
        storage.write_json(storage.join(self.stage_uri(folder), "record.json"), value)
        self._link_outputs(folder, record)

    def invalidate(self, folder: str, attempt: str) -> None:
        """Deletes a stage's record, the attempt and what attempts share, for `--redo`.

        Raises:
            RunBusyError: another driver has taken the lease; nothing is deleted.
        """
        self.check_lease()
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
            RunBusyError: another living driver has the lease, or takes it within the block.
            DataError: `lease.json` or the newest epoch is damaged.
        """
        mine = self._take()
        stop, is_lost = threading.Event(), threading.Event()
        caller = threading.get_ident()
        is_main = caller == threading.main_thread().ident

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                # Storage that fails for a while must not end the heartbeat; the next one may work.
                with contextlib.suppress(Exception):
                    if not self._has_lease(mine):
                        is_lost.set()
                        if is_main:  # else the next commit finds out
                            signal.pthread_kill(caller, signal.SIGINT)
                        return
                    self._write_lease(mine)

        # Without the heartbeat another driver would take the lease of a long run.
        thread = threading.Thread(target=beat, daemon=True, name="lease")
        thread.start()
        try:
            self._held = mine
            yield
        except KeyboardInterrupt as error:
            if is_lost.is_set():
                raise self._lost(mine) from error
            raise
        finally:
            stop.set()
            thread.join()
            self._held = None
            self._release(mine)

    def check_lease(self) -> None:
        """Reads the lease again, before something is committed; without a lease it does nothing.

        Raises:
            RunBusyError: another driver has taken the lease.
        """
        if self._held is not None and not self._has_lease(self._held):
            raise self._lost(self._held)

    def read_lease(self) -> Holder | None:
        """The driver that wrote `lease.json`, alive or not; None if there is no such file.

        Raises:
            DataError: the file is damaged.
        """
        uri = storage.join(self.uri, "lease.json")
        return _read(Holder, uri, "the lease of a driver", "If no driver runs, delete the file.")

    def _take(self) -> _Epoch:
        newest, lease = self._newest_epoch(), self.read_lease()
        holder = _current_holder(newest, lease)
        if holder is not None and self._is_living(holder):
            raise RunBusyError(
                f"{self.uri} is in use: expected a free run directory, found a driver on "
                f"{holder.host}, process {holder.pid}, last seen {time.time() - holder.time:.0f} s "
                "ago. Wait for it, stop it, or use another run_dir; a dead driver's lease ends "
                f"after {LEASE_SECONDS:.0f} s."
            )
        known = (0 if item is None else item.epoch for item in (newest, lease))
        mine = _Epoch(
            holder=Holder(
                token=uuid.uuid4().hex,
                host=socket.gethostname(),
                pid=os.getpid(),
                time=time.time(),
                epoch=1 + max(known),
            ),
            commits=self._find_commits(newest),
        )
        data = json.dumps(asdict(mine), indent=2).encode()
        # Of several drivers that got so far together, one creates the file.
        if not storage.create(self._epoch_uri(mine), data):
            raise self._lost(mine)
        try:
            self._write_lease(mine)
            time.sleep(_SETTLE_SECONDS)
            if not self._has_lease(mine):
                raise self._lost(mine)
        except BaseException:
            self._release(mine)
            raise
        return mine

    def _is_living(self, holder: Holder) -> bool:
        age = time.time() - holder.time
        if age > LEASE_SECONDS:
            return False
        if holder.host == socket.gethostname() and not _is_alive(holder.pid):
            return False
        if age >= -LEASE_SECONDS:
            return True
        # The clocks differ by more than a lease lasts, or one was set back.  Only a renewal shows
        # that the driver lives.
        for _ in range(_WATCHED_BEATS):
            time.sleep(HEARTBEAT_SECONDS)
            now = self.read_lease()
            if now is not None and now.time != holder.time:
                return True
        return False

    def _has_lease(self, mine: _Epoch) -> bool:
        newest = self._newest_epoch()
        if newest is None or newest.holder.token != mine.holder.token:
            return False
        try:
            holder = self.read_lease()
        except DataError:  # the next heartbeat writes it again
            return True
        # A driver that lost the lease may write it once more, with its older epoch.
        return holder is None or holder.token == mine.holder.token or 0 < holder.epoch < mine.epoch

    def _lost(self, mine: _Epoch) -> RunBusyError:
        newest = self._newest_epoch()
        if newest is None or newest.holder.token == mine.holder.token:
            holder = self.read_lease()
        else:
            holder = newest.holder
        found = "none" if holder is None else f"that of process {holder.pid} on {holder.host}"
        return RunBusyError(
            f"{self.uri}: another driver has taken over: expected the lease of this one (epoch "
            f"{mine.epoch}), found {found}. Either both started together, or this one was not seen "
            f"for {LEASE_SECONDS:.0f} s. It stops and commits nothing more; finished work is kept. "
            "Wait for the other driver, or stop it and run this command again."
        )

    def _release(self, mine: _Epoch) -> None:
        with contextlib.suppress(OSError, DataError):  # an unreleased lease ends by itself
            newest, holder = self._newest_epoch(), self.read_lease()
            if newest is not None and newest.holder.token == mine.holder.token:
                value = asdict(replace(mine, is_released=True))
                storage.write_json(self._epoch_uri(mine), value)
            if holder is not None and holder.token == mine.holder.token:
                storage.delete(storage.join(self.uri, "lease.json"))

    def _write_lease(self, mine: _Epoch) -> None:
        holder = replace(mine.holder, time=time.time())
        storage.write_json(storage.join(self.uri, "lease.json"), asdict(holder))

    def _epoch_uri(self, mine: _Epoch) -> str:
        return storage.join(self.uri, "epochs", f"{mine.epoch:08d}.json")

    def _newest_epoch(self) -> _Epoch | None:
        folder = storage.join(self.uri, "epochs")
        names = [name for name in storage.list_names(folder) if _EPOCH_NAME.fullmatch(name)]
        if not names:
            return None
        uri = storage.join(folder, names[-1])
        return _read(_Epoch, uri, "the epoch of a driver", "Delete the directory `epochs`.")

    def _find_commits(self, newest: _Epoch | None) -> dict[str, str]:
        """Paths and digests of all records that count, those of attempts included."""
        paths = []
        for folder in STAGE_FOLDERS.values():
            names = storage.list_names(self.stage_uri(folder))
            paths += [f"{folder}/record.json"] if "record.json" in names else []
            # The names of attempts are hashes; links and files of the stage have other names.
            paths += [f"{folder}/{name}/record.json" for name in names if "." not in name]
        found = {}
        for path in paths:
            with contextlib.suppress(DataError):  # who needs the record gets the error
                if self._read_valid(path, newest) is not None:
                    found[path] = self._digest(path)
        return found

    def _read_valid(self, path: str, newest: _Epoch | None) -> StageRecord | None:
        """The record at a path below the run directory, if there is one that counts."""
        record = _read_record(storage.join(self.uri, path))
        if record is None or newest is None or record.epoch >= newest.epoch:
            return record
        return record if newest.commits.get(path) == self._digest(path) else None

    def _digest(self, path: str) -> str:
        return hashlib.sha256(storage.read_bytes(storage.join(self.uri, path))).hexdigest()


def _current_holder(newest: _Epoch | None, lease: Holder | None) -> Holder | None:
    """The driver that took the lease last and has not given it back; it may be dead."""
    if newest is None or (lease is not None and not 0 < lease.epoch <= newest.epoch):
        return lease
    if newest.is_released:
        return None
    # A driver creates its epoch before it writes the lease, and one that lost the lease may write
    # it once more.
    return lease if lease is not None and lease.epoch == newest.epoch else newest.holder


def _read(kind: type[Content], uri: str, what: str, remedy: str) -> Content | None:
    """A checked JSON file; None if there is none."""
    try:
        return TypeAdapter(kind).validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise DataError(f"{uri}: expected {what}, found {_problem(error)}. {remedy}") from error


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return f"{name}: {first['msg']}" if name else first["msg"]


def _read_record(uri: str) -> StageRecord | None:
    remedy = "Use a new run_dir, or run the stage again with --redo."
    value = _read(dict, uri, "a stage record", remedy)
    if value is None:
        return None
    if value.get("format") != FORMAT:
        raise DataError(
            f"{uri}: expected a stage record of format {FORMAT}, found {value.get('format')!r}; "
            f"the run directory was written by another version. {remedy}"
        )
    try:
        return TypeAdapter(StageRecord).validate_python(value)
    except ValidationError as error:
        raise DataError(
            f"{uri}: expected a stage record, found {_problem(error)}. {remedy}"
        ) from error


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
