"""Writing checkpoints: in the background where asked, committed once, by one attempt at a time.

`attempt.json` beside the checkpoints names the attempt that may commit.  Workers that outlive the
driver or the controller that started them find another name there and stop.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from system import storage
from system.errors import StageError
from system.training.checkpoint import COMMIT, FORMAT, file_sizes, find_checkpoints
from system.training.train import Training

_ATTEMPT = "attempt.json"
WRITTEN_WITH = ("instructmix", "peft", "torch", "transformers")
"""Packages whose versions a checkpoint names: they decide what its tensors are called."""


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
            "versions": {name: importlib.metadata.version(name) for name in WRITTEN_WITH},
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
        storage.write_json(storage.join(uri, COMMIT), {**commit, "files": file_sizes(uri)})
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
