"""Sharded checkpoints that a failure at any moment leaves usable.

    ROOT/step-00000050-3f9c2a/      one attempt to save before step 50
        __0_0.distcp  .metadata     written by all ranks (torch.distributed.checkpoint)
        COMMIT.json                 written last, by rank 0: step, identity, size of every file

A directory without its COMMIT, or with a file that is not as long as the COMMIT says, is not a
checkpoint.  Names carry a random part, so a retry never mixes its files with those of a dead
attempt.  Trainings are told apart by their identity (plan, settings, model, tokenizer): a
checkpoint of another training is refused, not loaded.

`attempt.json` beside them names the attempt that may commit.  Workers that outlive the driver or
the controller that started them find another name there and stop.

Randomness needs no state here: every step is seeded by (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from system import storage
from system.errors import DataError, StageError
from system.training.train import Training

FORMAT = 1
_COMMIT = "COMMIT.json"
_ATTEMPT = "attempt.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint whose files are all there."""

    uri: str
    step: int
    """Steps made; training goes on with this one."""
    counters: dict[str, Any]
    """What the writer wanted to keep."""
    best_step: int | None = None
    """Step of the best checkpoint up to this one (perhaps itself); null where none is kept."""


def resumable(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that a training can go on from: the best one that they remember is there too.

    Going on without it would end with another best one than the undisturbed training has.
    """
    steps = {checkpoint.step for checkpoint in checkpoints}
    return [c for c in checkpoints if c.best_step is None or c.best_step in steps]


def find_checkpoints(root: str, identity: Mapping[str, str]) -> list[Checkpoint]:
    """Usable checkpoints below a directory, newest first.

    Args:
        root: URI.
        identity: plan, settings, model, ... of this training.

    Raises:
        DataError: a committed checkpoint belongs to another training; names what differs.
    """
    found = []
    for name in storage.list_names(root):
        uri = storage.join(root, name)
        commit_uri = storage.join(uri, _COMMIT)
        if not name.startswith("step-") or not storage.exists(commit_uri):
            continue
        commit = storage.read_json(commit_uri)
        if commit["format"] != FORMAT or commit["identity"] != dict(identity):
            raise DataError(_refusal(uri, commit, identity))
        sizes = _sizes(uri)
        if all(sizes.get(file) == size for file, size in commit["files"].items()):
            found.append(
                Checkpoint(
                    uri=uri,
                    step=commit["step"],
                    counters=commit["counters"],
                    best_step=commit["best_step"],
                )
            )
    return sorted(found, key=lambda checkpoint: (-checkpoint.step, checkpoint.uri))


def load_checkpoint(
    checkpoint: Checkpoint, training: Training, group: dist.ProcessGroup | None = None
) -> None:
    """Puts a checkpoint's weights and optimiser state into a training, at any world size.

    Args:
        checkpoint: one of `find_checkpoints`, the same on all ranks.
        training: entered, not yet trained.
        group: process group of all ranks, on CPU.

    Raises:
        StageError: its files are damaged; it is taken out of the way, so that the next attempt
            resumes from the one before.
        DataError: it holds other tensors than this training has.
        OSError, MemoryError, RuntimeError: the storage cannot be reached, or memory is short: that
            says nothing about the checkpoint, which stays.
    """
    state = training.state()
    reader = _reader(checkpoint.uri)
    try:
        _check_tensors(checkpoint.uri, reader.read_metadata(), state)
        state_dict_loader.load(
            state, storage_reader=reader, process_group=group, no_dist=group is None
        )
    except DataError:
        raise
    except (Exception, CheckpointException) as error:  # whatever a damaged file may raise
        if (cause := _elsewhere(error, checkpoint.uri)) is not None:
            raise cause from error
        if group is None or dist.get_rank(group) == 0:
            storage.delete(storage.join(checkpoint.uri, _COMMIT))
        raise StageError(
            f"{checkpoint.uri}: the checkpoint cannot be read ({error}). It was taken out of the "
            "way; run again to resume from the one before."
        ) from error
    training.set_steps_made(checkpoint.step)


def _check_tensors(uri: str, metadata: Metadata, state: Mapping[str, torch.Tensor]) -> None:
    """What a checkpoint of the same plan, settings and model holds depends on library versions."""
    theirs = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if differing:
        name = differing[0]
        raise DataError(
            f"{uri}: the checkpoint does not hold the tensors of this training; {len(differing)} "
            f"differ, the first is {name!r}: {theirs.get(name, 'none')} there, "
            f"{ours.get(name, 'none')} here. The usual cause is another version of transformers, "
            "peft or torch: go on with the versions that wrote it, or delete it to start over."
        )


def _elsewhere(error: BaseException, uri: str) -> BaseException | None:
    """The cause of a failed load where it lies with memory or storage, not with the files."""
    failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
    for cause, _ in failures.values():
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return cause
        if isinstance(cause, RuntimeError) and "can't allocate memory" in str(cause):
            return cause
        # A missing file or a bad sector is damage; object stores give whatever they do not know
        # the number of the latter.
        is_damage = isinstance(cause, FileNotFoundError) or (
            isinstance(cause, OSError)
            and cause.errno == errno.EIO
            and storage.local_path(uri) is not None
        )
        if isinstance(cause, OSError) and not is_damage:
            return cause
    return None


class CheckpointWriter:
    """Writes checkpoints of one training; one object on every rank, used at the same steps.

    Args:
        root: URI of the directory.
        identity: plan, settings, model, ... of this training.
        keep: how many of the newest committed checkpoints stay.
        group: CPU process group of its own (not the one that trains: an asynchronous save talks
            over it while training goes on); none in a single process.
        is_async: copy the state, then write in the background.

    Raises:
        StageError: the storage is full.
    """

    def __init__(
        self,
        root: str,
        identity: Mapping[str, str],
        *,
        keep: int,
        group: dist.ProcessGroup | None = None,
        is_async: bool = False,
    ) -> None:
        self._root = root
        self._identity = dict(identity)
        self._keep = keep
        self._group = group
        self._is_async = is_async
        self._is_first = group is None or dist.get_rank(group) == 0
        self.attempt: str = self._from_first(secrets.token_hex(3))
        """Names this attempt at the training, the same on all ranks."""
        self._pending: tuple[Future[Any] | None, str, dict[str, Any]] | None = None
        self._is_unsettled = False
        """A save was begun whose outcome the ranks have not told one another."""
        self._error: BaseException | None = None
        self._try(self._take_over, "the checkpoints")
        self._raise_together()

    def save(
        self,
        training: Training,
        step: int,
        counters: Mapping[str, Any],
        best_step: int | None = None,
    ) -> None:
        """Saves the state before step `step`; all ranks call it.

        Waits for a save that is still under way.  When it returns the checkpoint is committed,
        or (asynchronous) the state is copied and training may go on.

        Args:
            training: whose state it is.
            step: steps made.
            counters: JSON values to keep with it.
            best_step: step of the checkpoint that stays however old it gets, this one perhaps.

        Raises:
            StageError: the storage is full (this save, or the one before where it is
                asynchronous), or another attempt has taken over.
        """
        self.finish()
        uri = storage.join(self._root, f"step-{step:08d}-{self.attempt}")
        commit = {
            "format": FORMAT,
            "step": step,
            "best_step": best_step,
            "identity": self._identity,
            "world_size": training.world_size,
            "versions": {"torch": torch.__version__},
            "counters": dict(counters),
        }
        options: dict[str, Any] = {
            "storage_writer": _writer(uri),
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        self._is_unsettled = True
        if self._is_async:
            future: Any = state_dict_saver.async_save(training.state(), **options)
            self._pending = (future, uri, commit)
            return
        self._pending = (None, uri, commit)
        self._try(lambda: state_dict_saver.save(training.state(), **options), _named(commit), uri)
        self.finish()

    def poll(self) -> None:
        """Commits an asynchronous save that is done; costs nothing otherwise."""
        if self._pending is not None and self._pending[0] is not None and self._pending[0].done():
            self._settle()

    def finish(self) -> None:
        """Waits for the save under way and commits it; all ranks call it.

        Raises:
            StageError: as `save`.
        """
        self._settle()
        if self._is_unsettled:
            self._is_unsettled = False
            self._raise_together()

    def _settle(self) -> None:
        """Commits the save under way, or keeps its error: ranks poll at moments of their own."""
        if self._pending is None:
            return
        future, uri, commit = self._pending
        self._pending = None
        if future is not None:
            self._try(future.result, _named(commit), uri)
        if self._is_first and self._error is None:  # its save returns after all ranks have written
            self._try(lambda: self._commit(uri, commit), _named(commit), uri)

    def check_current(self) -> None:
        """Makes sure, before anything final is written, that no other attempt goes on in its place.

        All ranks call it.

        Raises:
            StageError: another attempt has taken over.
        """
        if self._is_first:
            self._try(self._check_attempt, "the checkpoints")
        self._raise_together()

    def _check_attempt(self) -> None:
        attempt = storage.read_json(storage.join(self._root, _ATTEMPT))
        if attempt != {"attempt": self.attempt}:
            raise StageError(
                f"{self._root}: another attempt at this training has taken over "
                f"({attempt}, this is {self.attempt}); this one stops without committing"
            )

    def _commit(self, uri: str, commit: Mapping[str, Any]) -> None:
        self._check_attempt()
        storage.write_json(storage.join(uri, _COMMIT), {**commit, "files": _sizes(uri)})
        self._prune(uri, commit["best_step"])

    def _take_over(self) -> None:
        if self._is_first:
            storage.write_json(storage.join(self._root, _ATTEMPT), {"attempt": self.attempt})

    def _try(self, action: Callable[[], object], what: str, uri: str | None = None) -> None:
        """Does something; an error is kept, and what it had half written is removed."""
        try:
            with storage.room_for(what, self._root):
                action()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            self._error = error
            if self._is_first and uri is not None:
                with contextlib.suppress(OSError):
                    storage.delete(uri)

    def _raise_together(self) -> None:
        """Raises rank 0's error on every rank, so that none waits for one that has given up."""
        mine, self._error = self._error, None
        error = self._from_first(mine) or mine
        if error is not None:
            raise error

    def _from_first(self, value: Any) -> Any:
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]

    def _prune(self, newest: str, best_step: int | None) -> None:
        """Deletes what is neither among the newest `keep`, nor the best, nor could be needed."""
        usable = find_checkpoints(self._root, self._identity)
        kept = {newest, *(c.uri for c in usable[: self._keep])}
        kept |= {c.uri for c in usable if c.step == best_step}
        for name in storage.list_names(self._root):
            uri = storage.join(self._root, name)
            if name.startswith("step-") and uri not in kept:
                storage.delete(uri)


def _named(commit: Mapping[str, Any]) -> str:
    return f"the checkpoint before step {commit['step']}"


def _refusal(uri: str, commit: Mapping[str, Any], identity: Mapping[str, str]) -> str:
    theirs = {"format": str(commit["format"]), **commit["identity"]}
    ours = {"format": str(FORMAT), **identity}
    differences = "; ".join(
        f"{name}: {theirs.get(name, 'none')[:16]} there, {ours.get(name, 'none')[:16]} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    )
    return (
        f"{uri} is a checkpoint of another training, so it cannot be resumed here ({differences}). "
        "Train into another directory, or delete this one if it is no longer needed."
    )


def _sizes(uri: str) -> dict[str, int]:
    filesystem, key = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()
    found = filesystem.ls(key, detail=True)
    sizes = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in found}
    return {name: size for name, size in sizes.items() if name != _COMMIT}


class _LocalWriter(FileSystemWriter):
    """Says what the disk said, on every rank.

    Torch's own error comes after that of the disk and hides it, and an error that crosses to
    another rank loses what came before it.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As FileSystemWriter; a full disk is an OSError."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            full = storage.full_disk(error)
            if full is None:
                raise
            raise full from error


def _writer(uri: str) -> FileSystemWriter:
    if storage.local_path(uri) is not None:
        return _LocalWriter(str(storage.local_path(uri)), sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(uri, sync_files=False)


def _reader(uri: str) -> FileSystemReader:
    if storage.local_path(uri) is not None:
        return FileSystemReader(str(storage.local_path(uri)))
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(uri)
