"""Checkpoints of a training: writing, finding, and loading them.  Used by `job.run_job`.

    ROOT/attempt.json               names the attempt that may commit
    ROOT/step-00000050-3f9c2a/      one attempt to save the state before step 50
        __0_0.distcp  .metadata     written by all ranks (torch.distributed.checkpoint)
        COMMIT.json                 written last, by rank 0: step, identity, size of every file

A failure at any moment leaves the last committed checkpoint usable.  A directory is a checkpoint
only if its COMMIT.json exists and all files have the sizes that it lists.  Directory names have a
random part, so a retry never mixes its files with those of a dead attempt.  Workers that outlive
their driver or controller find the name of another attempt in `attempt.json` and stop.

The identity (hashes of plan, settings, model, tokenizer) tells trainings apart: a checkpoint of
another training is refused.  Random generators are not saved, because every step is seeded by
(seed, step, rank).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import pickle
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from system import storage
from system.errors import DataError, StageError
from system.training.train import Training

FORMAT = 1
COMMIT = "COMMIT.json"
"""Written last; only a directory with this file is a checkpoint."""
_ATTEMPT = "attempt.json"
_METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip
"""Module -> all that `.metadata` of a checkpoint may name; dtypes of torch besides."""
WRITTEN_WITH = ("instructmix", "peft", "torch", "transformers")
"""Packages whose versions COMMIT.json records: the names of tensors depend on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint with all of its files."""

    uri: str
    step: int
    """Number of steps done, which is also the number of the next step."""
    counters: dict[str, Any]
    """JSON values that the training saved with it (`TrainTotals.state`)."""
    best_step: int | None = None
    """Step of the best checkpoint so far (possibly this one); None if best ones are not tracked."""


def resumable(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints from which a training can resume: their best checkpoint exists, too.

    If a training resumed without it, it could export another best checkpoint than an undisturbed
    training.
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
    checkpoints = []
    for name in storage.list_names(root):
        uri = storage.join(root, name)
        commit_uri = storage.join(uri, COMMIT)
        if not name.startswith("step-") or not storage.exists(commit_uri):
            continue
        try:
            commit = storage.read_json(commit_uri)
        except DataError:  # a torn COMMIT counts as not committed
            continue
        if not _is_commit(commit):
            continue
        if commit["format"] != FORMAT or commit["identity"] != dict(identity):
            raise DataError(_refusal(uri, commit, identity))
        sizes = file_sizes(uri)
        if all(sizes.get(file) == size for file, size in commit["files"].items()):
            checkpoints.append(
                Checkpoint(
                    uri=uri,
                    step=commit["step"],
                    counters=commit["counters"],
                    best_step=commit["best_step"],
                )
            )
    return sorted(checkpoints, key=lambda checkpoint: (-checkpoint.step, checkpoint.uri))


def _is_commit(value: Any) -> bool:
    """Whether the content of a COMMIT.json has all of its parts."""
    return (
        isinstance(value, dict)
        and {"format", "counters", "best_step", "versions"} <= value.keys()
        and type(value.get("step")) is int
        and isinstance(value.get("identity"), dict)
        and isinstance(value.get("files"), dict)
    )


def load_checkpoint(
    checkpoint: Checkpoint, training: Training, group: dist.ProcessGroup | None = None
) -> None:
    """Loads weights and optimiser state of a checkpoint into a training, at any world size.

    Args:
        checkpoint: one of `find_checkpoints`, the same on all ranks.
        training: entered (`with training:`), no step made.
        group: process group of all ranks, on CPU.

    Raises:
        StageError: its files are damaged.  Its COMMIT is deleted, so that the next attempt resumes
            from the checkpoint before.
        DataError: it holds other tensors than this training has.
        OSError, MemoryError, RuntimeError: the storage cannot be reached, or there is not enough
            memory.  The checkpoint may be good and stays.
    """
    state = training.state()
    reader = _Reader(checkpoint.uri)
    try:
        _check_tensors(checkpoint.uri, reader.read_metadata(), state)
        state_dict_loader.load(
            state, storage_reader=reader, process_group=group, no_dist=group is None
        )
    except DataError:
        raise
    except (Exception, CheckpointException) as error:  # a damaged file can raise any type
        if (cause := _environment_failure(error, checkpoint.uri)) is not None:
            raise cause from error
        if group is None or dist.get_rank(group) == 0:
            storage.delete(storage.join(checkpoint.uri, COMMIT))
        raise StageError(
            f"{checkpoint.uri}: the checkpoint cannot be read ({error}). It was marked as "
            "unusable; run again to resume from the checkpoint before it."
        ) from error
    training.set_steps_made(checkpoint.step)


def _check_tensors(uri: str, metadata: Metadata, state: Mapping[str, torch.Tensor]) -> None:
    """Refuses a checkpoint with other tensors than the training, due to other library versions."""
    theirs = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if differing:
        name = differing[0]
        wrote = storage.read_json(storage.join(uri, COMMIT))["versions"]
        versions = ", ".join(f"{package} {number}" for package, number in wrote.items())
        raise DataError(
            f"{uri}: the checkpoint does not hold the tensors of this training; {len(differing)} "
            f"differ, the first is {name!r}: shape {theirs.get(name, 'none')} in the checkpoint, "
            f"{ours.get(name, 'none')} in this training. The usual cause is another version of "
            f"transformers, peft or torch: use the versions that wrote it ({versions}), or delete "
            "it to start over."
        )


def _environment_failure(error: BaseException, uri: str) -> BaseException | None:
    """The cause of a failed load if it is memory or storage; None if the files are damaged."""
    failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
    for cause, _ in failures.values():
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return cause
        if isinstance(cause, RuntimeError) and "can't allocate memory" in str(cause):
            return cause
        # A missing file or a bad sector (EIO) is damage.  Object stores report all errors that they
        # cannot classify as EIO, so EIO counts as damage only on a local disk.
        is_damage = isinstance(cause, FileNotFoundError) or (
            isinstance(cause, OSError)
            and cause.errno == errno.EIO
            and storage.local_path(uri) is not None
        )
        if isinstance(cause, OSError) and not is_damage:
            return cause
    return None


def _refusal(uri: str, commit: Mapping[str, Any], identity: Mapping[str, str]) -> str:
    theirs = {"format": str(commit["format"]), **commit["identity"]}
    ours = {"format": str(FORMAT), **identity}
    differences = "; ".join(
        f"{name}: {theirs.get(name, 'none')[:16]} in the checkpoint, "
        f"{ours.get(name, 'none')[:16]} in this training"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    )
    return (
        f"{uri} is a checkpoint of another training, so it cannot be resumed here ({differences}). "
        "Train into another directory, or delete this one if it is no longer needed."
    )


def file_sizes(uri: str) -> dict[str, int]:
    """Size in bytes of every file of a checkpoint, except its COMMIT."""
    filesystem, key = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()
    entries = filesystem.ls(key, detail=True)
    sizes = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries}
    return {name: size for name, size in sizes.items() if name != COMMIT}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the `.metadata` of a checkpoint, and runs no code that the file brings along.

    Torch unpickles it without a limit: whoever can write to a run directory could run programs as
    the user who resumes from it.
    """

    def find_class(self, module: str, name: str) -> Any:
        """As pickle, but refuses what the metadata of a checkpoint does not need."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint needs")


class _Reader(FsspecReader):
    """Reads a checkpoint, local or not, without running code from its files."""

    def read_metadata(self, *_: Any, **options: Any) -> Metadata:
        """As FileSystemReader, with a limited unpickler."""
        path = self._get_metadata_path(options.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if any("/" in entry.relative_path for entry in metadata.storage_data.values()):
            raise pickle.UnpicklingError(".metadata names a file outside of the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointWriter:
    """Writes the checkpoints of one training.  Every rank has one and calls it at the same steps.

    Args:
        root: URI of the directory.
        identity: plan, settings, model, ... of this training.
        keep: number of newest committed checkpoints to keep.
        group: CPU process group; None in a single process.  It must not be the group that sums
            gradients, because an asynchronous save communicates while training continues.
        is_async: whether `save` copies the state and writes it in the background.

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
        """Random name of this attempt, the same on all ranks."""
        self._pending: tuple[Future[Any] | None, str, dict[str, Any]] | None = None
        self._is_unsettled = False
        """A save was started, and the ranks have not yet exchanged its result."""
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
        """Saves the state before step `step`; all ranks must call it.

        It first waits for the previous save.  When it returns, the checkpoint is committed, or
        (asynchronous) the state is copied and training may continue.

        Args:
            training: its state is saved.
            step: number of steps done.
            counters: JSON values to save with it.
            best_step: step of the best checkpoint (possibly this one), which is never deleted.

        Raises:
            StageError: the storage is full (in this save or in the previous asynchronous one), or
                another attempt has taken over.
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
        self._try(
            lambda: state_dict_saver.save(training.state(), **options), _description(commit), uri
        )
        self.finish()

    def poll(self) -> None:
        """Commits an asynchronous save if it is done; returns at once otherwise."""
        if self._pending is not None and self._pending[0] is not None and self._pending[0].done():
            self._settle()

    def finish(self) -> None:
        """Waits for the current save and commits it; all ranks must call it.

        Raises:
            StageError: as `save`.
        """
        self._settle()
        if self._is_unsettled:
            self._is_unsettled = False
            self._raise_together()

    def _settle(self) -> None:
        """Commits the current save, or stores its error, which `finish` raises on all ranks.

        Ranks poll at different times, so raising here would leave the others waiting.
        """
        if self._pending is None:
            return
        future, uri, commit = self._pending
        self._pending = None
        if future is not None:
            self._try(future.result, _description(commit), uri)
        if (
            self._is_first and self._error is None
        ):  # a save returns on rank 0 after all ranks have written
            self._try(lambda: self._commit(uri, commit), _description(commit), uri)

    def check_current(self) -> None:
        """Checks, before final outputs are written, that no other attempt has taken over.

        All ranks must call it.

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
        storage.flush_directory(uri)
        storage.write_json(storage.join(uri, COMMIT), {**commit, "files": file_sizes(uri)})
        self._prune(uri, commit["best_step"])

    def _take_over(self) -> None:
        if self._is_first:
            storage.write_json(storage.join(self._root, _ATTEMPT), {"attempt": self.attempt})

    def _try(self, action: Callable[[], object], what: str, uri: str | None = None) -> None:
        """Runs an action; stores its error and removes its partial output (`uri`)."""
        try:
            with storage.room_for(what, self._root):
                action()
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
            self._error = error
            if self._is_first and uri is not None:
                with contextlib.suppress(OSError):
                    storage.delete(uri)

    def _raise_together(self) -> None:
        """Raises the error of rank 0 on every rank, so that no rank waits for one that stopped."""
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
        """Deletes all checkpoints except the newest `keep`, the best one, and `newest`."""
        usable = find_checkpoints(self._root, self._identity)
        kept = {newest, *(c.uri for c in usable[: self._keep])}
        kept |= {c.uri for c in usable if c.step == best_step}
        for name in storage.list_names(self._root):
            uri = storage.join(self._root, name)
            if name.startswith("step-") and uri not in kept:
                storage.delete(uri)


def _description(commit: Mapping[str, Any]) -> str:
    return f"the checkpoint before step {commit['step']}"


class _LocalWriter(FileSystemWriter):
    """Raises the error of a full disk itself, on every rank.

    Torch raises its own error after that of the disk and hides it; the cause of an error is lost
    when it is sent to another rank.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As FileSystemWriter, but raises OSError if the disk is full."""
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
    return FsspecWriter(uri, sync_files=False)
