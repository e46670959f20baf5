"""Checks the files of a Hugging Face model directory before anything is loaded from it.

Transformers gives random values to every weight that it does not find, and only warns.  So a
damaged directory would train and measure another model than the one that was named.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from system.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LIMIT = 5
"""Largest number of names in a message."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> its type, as safetensors writes it (`F32`), and its shape."""


def check_files(directory: Path) -> None:
    """Checks that the directory has a configuration, a tokenizer and whole weights.

    Reads `config.json` and the headers of the weights, no weights.

    Raises:
        ModelError: a file is missing, damaged, cut off, or only a pointer of Git LFS.
    """
    names = {file.name for file in directory.iterdir()}
    missing = []
    if "config.json" not in names:
        missing.append("config.json")
    if not names & {WEIGHTS, INDEX}:
        missing.append(f"{WEIGHTS} (or {INDEX})")
    if not names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}:
        missing.append("a tokenizer")
    if missing:
        raise ModelError(
            f"{directory}: expected a Hugging Face model directory, but {' and '.join(missing)} is "
            f"missing (found {sorted(names)[:12]}). Weights in other formats can be converted with "
            "transformers' save_pretrained."
        )
    for name in sorted(names):
        if (directory / name).is_file():
            refuse_pointer(directory / name)
    for name in names & {"config.json", "generation_config.json"}:
        read_object(directory / name)
    read_tensors(directory)


def refuse_pointer(file: Path) -> None:
    """Raises a ModelError if the file is a Git LFS pointer instead of its content."""
    with _readable(file), file.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ModelError(
            f"{file}: expected the file itself, found a pointer of Git LFS. Run `git lfs pull` in "
            "its repository, or download the file."
        )


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ModelError: the file is missing, is not JSON, or holds something else.
    """
    with _readable(file):
        value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ModelError(
            f"{file}: expected a JSON object ({{...}}), found a {type(value).__name__}. Get the "
            "file again from where the model comes from."
        )
    return value


def read_tensors(directory: Path) -> Tensors:
    """Types and shapes of all tensors of a model, from the headers of its safetensors files.

    Raises:
        ModelError: a file is missing or damaged, or two files hold a tensor of the same name.
    """
    from safetensors import safe_open

    tensors: Tensors = {}
    for file in _weight_files(directory):
        # safetensors compares lengths, offsets and shapes with the file when it opens it.
        with _readable(file), safe_open(str(file), framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if name in tensors:
                    raise ModelError(
                        f"{file}: expected each tensor in one file, found {name!r} in a second "
                        "one. Remove the file that does not belong to the model."
                    )
                view = weights.get_slice(name)
                tensors[name] = (str(view.get_dtype()), tuple(view.get_shape()))
    return tensors


def count_parameters(tensors: Tensors) -> int:
    """Number of parameters of the tensors."""
    return sum(math.prod(shape) for _, shape in tensors.values())


def check_loads(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Checks that model and weights fit each other, without reading any weights.

    The model is built without memory for its weights, and gets tensors without content.

    Raises:
        ModelError: as `check_report`; or transformers cannot build this model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = read_tensors(directory)
    with loading(f"{directory}: the model"):
        config = AutoConfig.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    # Building a billion layers, even without memory for their weights, would never end.
    if isinstance(layers, int) and layers > len(tensors):
        raise ModelError(
            f"{directory}: config.json says {layers:,} layers, but the weights are only "
            f"{len(tensors):,} tensors. Get both files again from where the model comes from."
        )
    # Quantised weights may need a GPU, and code that comes with a model needs its own files.
    if getattr(config, "quantization_config", None) or trust_remote_code:
        return
    with loading(f"{directory}: the model"):
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(config))
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict={
                name: torch.empty(shape, device="meta") for name, (_, shape) in tensors.items()
            },
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_report(directory, report)
    ties = model.all_tied_weights_keys.items()
    _check_ties(directory, [pair for pair in ties if tensors.keys() >= set(pair)])
    odd = [
        f"{name} ({kind})"
        for name, (kind, _) in tensors.items()
        if name in dict(model.named_parameters()) and not kind.startswith(("F", "BF"))
    ]
    if odd:
        raise ModelError(
            f"{directory}: expected weights that are floating-point numbers, found {_some(odd)}. "
            "Get the weights again from where the model comes from."
        )


def _check_ties(directory: Path, ties: Collection[tuple[str, str]]) -> None:
    """Compares weights that config.json ties, where the files hold both.

    Transformers would use both, other engines only one of them.
    """
    from safetensors import safe_open

    named = {name for pair in ties for name in pair}
    values = {}
    for file in _weight_files(directory):
        with safe_open(str(file), framework="pt") as weights:
            values |= {name: weights.get_tensor(name) for name in named & set(weights.keys())}
    for first, second in ties:
        if not values[first].equal(values[second]):
            raise ModelError(
                f"{directory}: config.json ties {first} to {second} (tie_word_embeddings), but the "
                "weights hold both, with different values. Set tie_word_embeddings to false if "
                "both belong to the model; otherwise remove one of them."
            )


def check_report(directory: str | Path, report: Mapping[str, Any]) -> None:
    """Checks the report of transformers on what it loaded (`output_loading_info`).

    Raises:
        ModelError: the weights lack a tensor, or have one too many or one of another shape.
    """
    mismatched = [
        f"{name} (shape {list(found)}, the model has {list(wanted)})"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    problems = [
        f"{what}: {_some(sorted(map(str, names)))}"
        for what, names in (
            ("missing", report["missing_keys"]),
            ("unknown to the model", report["unexpected_keys"]),
            ("of another shape", mismatched),
            ("refused", report["error_msgs"]),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"{directory}: expected the weights that config.json describes, found some "
            f"{'; some '.join(problems)}. Missing weights would be random numbers. Get config.json "
            "and all weight files again from where the model comes from."
        )


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns an error of transformers inside the `with` block into a ModelError.

    Damaged files make transformers fail in every possible way, so every error counts, except that
    of a machine without enough memory.
    """
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which may not be imported here
            raise
        text = " ".join(str(error).split())[:500]
        raise ModelError(
            f"{what} cannot be loaded: {type(error).__name__}: {text}. Check that the files are "
            "whole and belong together, or get them again from where the model comes from."
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    """The weight files, as transformers finds them: one file, or those that an index names."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return [directory / WEIGHTS]
    index = directory / INDEX
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_name, places.values())):
        raise ModelError(
            f"{index}: expected `weight_map` to give a file name for every tensor, found "
            f"{str(places)[:200]}. Get the file again from where the model comes from."
        )
    files = [directory / name for name in sorted(set(places.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{directory}: expected every weight file that {INDEX} names, but "
            f"{_some(absent)} is missing. Download the rest of the model."
        )
    return files


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name and value.endswith(".safetensors")


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns the errors of an unreadable file inside the `with` block into a ModelError."""
    from safetensors import SafetensorError

    try:
        if not file.is_file():
            raise FileNotFoundError("no such file, or a link to one that is gone")
        yield
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(
            f"{file}: expected a file of the model, but it cannot be read; it is damaged or cut "
            f"off: {error}. Get the file again from where the model comes from."
        ) from error


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_LIMIT])
    more = len(names) - _LIMIT
    return f"{shown} and {more} more" if more > 0 else shown
