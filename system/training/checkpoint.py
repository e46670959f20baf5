"""Sharded checkpoints that a failure at any moment leaves usable.

    ROOT/step-00000050-3f9c2a/      one attempt to save before step 50
        __0_0.distcp  .metadata     written by all ranks (torch.distributed.checkpoint)
        COMMIT.json                 written last, by rank 0: step, identity, size of every file

A directory without its COMMIT, or with a file that is not as long as the COMMIT says, is not a
checkpoint.  Names carry a random part, so a retry never mixes its files with those of a dead
attempt.  Trainings are told apart by their identity (plan, settings, model): a checkpoint of
another training is refused, not loaded.

Randomness needs no state here: every step is seeded by (seed, step, rank).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from system import storage
from system.errors import DataError, StageError
from system.training.train import Training

FORMAT = 1
_COMMIT = "COMMIT.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint whose files are all there."""

    uri: str
    step: int
    """Steps made; training goes on with this one."""
    counters: dict[str, Any]
    """What the writer wanted to keep."""


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
            found.append(Checkpoint(uri=uri, step=commit["step"], counters=commit["counters"]))
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
        StageError: its files cannot be read; it is taken out of the way, so that the next attempt
            resumes from the one before.
    """
    state = training.state()
    try:
        state_dict_loader.load(
            state,
            storage_reader=_reader(checkpoint.uri),
            process_group=group,
            no_dist=group is None,
        )
    except (Exception, CheckpointException) as error:  # whatever a damaged file may raise
        if group is None or dist.get_rank(group) == 0:
            storage.delete(storage.join(checkpoint.uri, _COMMIT))
        raise StageError(
            f"{checkpoint.uri}: the checkpoint cannot be read ({error}). It was taken out of the "
            "way; run again to resume from the one before."
        ) from error
    training.set_steps_made(checkpoint.step)


class CheckpointWriter:
    """Writes checkpoints of one training; one object on every rank, used at the same steps.

    Args:
        root: URI of the directory.
        identity: plan, settings, model, ... of this training.
        keep: how many committed checkpoints stay.
        group: CPU process group of its own (not the one that trains: an asynchronous save talks
            over it while training goes on); none in a single process.
        is_async: copy the state, then write in the background.
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
        nonce = [secrets.token_hex(3)]
        if group is not None:
            dist.broadcast_object_list(nonce, src=dist.get_global_rank(group, 0), group=group)
        self._nonce = nonce[0]
        self._pending: tuple[Future[Any] | None, str, dict[str, Any]] | None = None

    def save(self, training: Training, step: int, counters: Mapping[str, Any]) -> None:
        """Saves the state before step `step`; all ranks call it.

        Waits for a save that is still under way.  When it returns the checkpoint is committed,
        or (asynchronous) the state is copied and training may go on.
        """
        self.finish()
        uri = storage.join(self._root, f"step-{step:08d}-{self._nonce}")
        commit = {
            "format": FORMAT,
            "step": step,
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
        if self._is_async:
            future: Any = state_dict_saver.async_save(training.state(), **options)
            self._pending = (future, uri, commit)
        else:
            state_dict_saver.save(training.state(), **options)
            self._pending = (None, uri, commit)
            self.finish()

    def poll(self) -> None:
        """Commits an asynchronous save that is done; costs nothing otherwise."""
        if self._pending is not None and self._pending[0] is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Waits for the save under way and commits it."""
        if self._pending is None:
            return
        future, uri, commit = self._pending
        self._pending = None
        if future is not None:
            future.result()
        if self._is_first:  # its save returns only after all ranks have written
            storage.write_json(storage.join(uri, _COMMIT), commit | {"files": _sizes(uri)})
            self._prune(uri)

    def _prune(self, newest: str) -> None:
        """Deletes what is neither among the newest `keep` nor could still be needed."""
        usable = [c.uri for c in find_checkpoints(self._root, self._identity)]
        kept = {newest, *usable[: self._keep]}
        for name in storage.list_names(self._root):
            uri = storage.join(self._root, name)
            if name.startswith("step-") and uri not in kept:
                storage.delete(uri)


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


def _writer(uri: str) -> FileSystemWriter:
    if storage.local_path(uri) is not None:
        return FileSystemWriter(str(storage.local_path(uri)), sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(uri, sync_files=False)


def _reader(uri: str) -> FileSystemReader:
    if storage.local_path(uri) is not None:
        return FileSystemReader(str(storage.local_path(uri)))
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(uri)
