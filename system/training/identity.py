"""The identity of a training: hashes of its inputs.

A training resumes from a checkpoint only if all hashes are equal.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from system import disk, storage
from system.errors import ModelError
from system.training.kernels import resolve_kernels
from system.training.plan import TrainPlan
from system.training.records import TrainJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SAMPLE_BYTES = 2**20
_SAMPLES = 16
"""Samples of one mebibyte that are hashed per file, evenly spread.  They are enough, because
training changes weights everywhere; hashing a whole large model takes minutes on every worker."""
_MODEL_FILES = ("config.json", "generation_config.json")


def training_identity(
    job: TrainJob,
    plan: TrainPlan,
    heldout: TrainPlan | None,
    base_dir: Path,
    model: PreTrainedModel,
    device: torch.device,
) -> dict[str, str]:
    """Hashes that a checkpoint must have for this training to resume from it.

    Raises:
        ConfigError: the requested kernels cannot be used on this worker.
    """
    identity = {
        "plan": plan.sha256,
        "settings": job.settings.sha256(),
        "model": model_fingerprint(base_dir),
        "tokenizer": tokenizer_fingerprint(base_dir),
        "kernels": resolve_kernels(job.settings.kernels, model.config.model_type, device),
    }
    if heldout is not None:
        identity["held-out rows"] = heldout.sha256
    return identity


def file_hash(uri: str) -> str:
    """SHA-256 of a file, as printed by `sha256sum`."""
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def model_fingerprint(folder: Path) -> str:
    """Hash of the weights and the configuration of a model; see `_files_hash`."""
    return _files_hash(
        path
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or path.name in _MODEL_FILES
    )


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the files of a tokenizer, with the chat template; see `_files_hash`."""
    return _files_hash(
        path
        for path in folder.iterdir()
        if path.suffix in (".json", ".model", ".jinja", ".txt")
        and path.name not in _MODEL_FILES
        and not path.name.endswith(".safetensors.index.json")
    )


def _files_hash(paths: Iterable[Path]) -> str:
    """Hash of names, sizes, and sixteen mebibytes of each file, with the first and the last one.

    Smaller files are hashed completely.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            last = max(0, size - _SAMPLE_BYTES)
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(last * sample // (_SAMPLES - 1), os.SEEK_SET)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def local_model(uri: str) -> Path:
    """The model directory on this machine; a remote one is downloaded once per machine."""
    folder = storage.local_path(uri)
    if folder is None:
        cache = Path(tempfile.gettempdir()) / f"instructmix-models-{os.getuid()}"
        key = hashlib.sha256(uri.encode()).hexdigest()[:16]
        folder = storage.download_directory(uri, disk.own_directory(cache) / key)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{uri}: expected a model directory, found no config.json in it; check model.path"
        )
    return folder
