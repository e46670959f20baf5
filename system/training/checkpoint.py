"""Sharded checkpoints that a failure at any moment leaves usable.

    ROOT/step-00000050-3f9c2a/      one attempt to save before step 50
        __0_0.distcp  .metadata     written by all ranks (torch.distributed.checkpoint)
        COMMIT.json                 written last, by rank 0: step, identity, size of every file

A directory without its COMMIT, or with a file that is not as long as the COMMIT says, is not a
checkpoint.  Names carry a random part, so a retry never mixes its files with those of a dead
attempt.  Trainings are told apart by their identity (plan, settings, model, tokenizer): a
checkpoint of another training is refused, not loaded.

They are written by `checkpoint_writer`.  Randomness needs no state here: every step is seeded by
(seed, step, rank).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from system import storage
from system.errors import DataError, StageError
from system.training.train import Training

FORMAT = 1
COMMIT = "COMMIT.json"
"""Written last: what makes a directory a checkpoint."""


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
        commit_uri = storage.join(uri, COMMIT)
        if not name.startswith("step-") or not storage.exists(commit_uri):
            continue
        try:
            commit = storage.read_json(commit_uri)
        except DataError:  # torn: as if it had not been committed
            continue
        if commit["format"] != FORMAT or commit["identity"] != dict(identity):
            raise DataError(_refusal(uri, commit, identity))
        sizes = file_sizes(uri)
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
            storage.delete(storage.join(checkpoint.uri, COMMIT))
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
        wrote = storage.read_json(storage.join(uri, COMMIT))["versions"]
        versions = ", ".join(f"{package} {number}" for package, number in wrote.items())
        raise DataError(
            f"{uri}: the checkpoint does not hold the tensors of this training; {len(differing)} "
            f"differ, the first is {name!r}: {theirs.get(name, 'none')} there, "
            f"{ours.get(name, 'none')} here. The usual cause is another version of transformers, "
            f"peft or torch: go on with the versions that wrote it ({versions}), or delete it to "
            "start over."
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


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of every file of a checkpoint, without its COMMIT."""
    filesystem, key = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()
    found = filesystem.ls(key, detail=True)
    sizes = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in found}
    return {name: size for name, size in sizes.items() if name != COMMIT}


def _reader(uri: str) -> FileSystemReader:
    if storage.local_path(uri) is not None:
        return FileSystemReader(str(storage.local_path(uri)))
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(uri)
