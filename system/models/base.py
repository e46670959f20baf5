"""The base model: turns `model.path` (hub id, directory, GGUF) into a Hugging Face directory.

Stage `model` writes the directory; all other stages load the model and tokenizer from it.  Weights
are read from safetensors or GGUF only.  Nothing is unpickled, and code that comes with a model runs
only if `model.trust_remote_code` is set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from system import storage
from system.config import ModelConfig
from system.errors import ModelError
from system.models.gguf_header import check_gguf
from system.models.weights import (
    check_files,
    check_loads,
    check_report,
    count_parameters,
    loading,
    read_object,
    read_tensors,
    refuse_pointer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["builtin", "gguf", "directory", "hub"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat template for models that have none."""


def kind_of(path: str) -> Kind:
    """The kind of model that `model.path` names.

    Raises:
        ModelError: the path does not exist and does not look like a hub id.
    """
    if path == "builtin:tiny":
        return "builtin"
    if path.endswith(".gguf") and Path(path).is_file():
        return "gguf"
    if Path(path).is_dir():
        return "directory"
    if path.endswith(".gguf") or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        raise ModelError(
            f"model.path {path!r}: expected a Hugging Face id, a directory, a .gguf file or "
            "builtin:tiny, found nothing there. Check the path; relative ones start from the "
            "directory in which the command runs."
        )
    return "hub"


def model_identity(config: ModelConfig) -> dict[str, str]:
    """The files of the model, for the fingerprint of stage `model`.

    Weights count by size and time, a chat template by its content.

    Raises:
        ModelError: the path does not exist, the directory has no model, or the chat template is
            missing or not text.
    """
    files = _model_files(config)
    template = _read_template(config)
    if template is not None:
        from system.models.template import check_template

        check_template(template, f"model.chat_template {config.chat_template!r}")
        files["model.chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return files


def _model_files(config: ModelConfig) -> dict[str, str]:
    path = Path(config.path)
    match kind_of(config.path):
        case "builtin" | "hub":
            return {}
        case "gguf":
            refuse_pointer(path)
            check_gguf(path)
            return {path.name: storage.stat(str(path))[1]}
        case "directory":
            check_files(path)
            return {
                file.name: storage.stat(str(file))[1]
                for file in sorted(path.iterdir())
                if file.is_file()
            }


def check_model(config: ModelConfig) -> None:
    """Checks that the model loads and that its chat template can be trained on; reads no weights.

    Only files on this machine are checked; stage `model` checks those of the hub.

    Raises:
        ModelError: files are damaged or do not fit each other, or the template gives no exact mask.
        ConfigError: the chat template does not end.
    """
    if kind_of(config.path) != "directory":
        return
    from system.models.template import template_profile

    trust = config.trust_remote_code
    _quiet()
    check_loads(Path(config.path), trust_remote_code=trust)
    tokenizer = load_tokenizer(config.path, trust_remote_code=trust)
    tokenizer.chat_template = template_of(config, tokenizer)
    template_profile(tokenizer, str(tokenizer.chat_template))


def materialise(config: ModelConfig, target: Path) -> None:
    """Writes the model (hub, directory, GGUF) to a local directory, chat template included.

    A directory's weight files are linked, not copied.

    Raises:
        ModelError: the hub has no such model or cannot be reached, or the files are not a model.
    """
    target.mkdir(parents=True, exist_ok=True)
    source = Path(config.path)
    match kind_of(config.path):
        case "directory":
            for file in sorted(source.iterdir()):
                _link_or_copy(file, target / file.name)
        case "gguf":
            _convert_gguf(source, target)
        case "hub":
            _download(config, target)
        case "builtin":
            raise AssertionError("system.examples.tiny_model builds the built-in model")
    check_loads(target, trust_remote_code=config.trust_remote_code)
    _check_template(config, target)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with its chat template, from the directory of stage `model`.

    Raises:
        ModelError: the files are not a tokenizer.
    """
    _quiet()
    from transformers import AutoTokenizer

    copy = storage.LocalCopy(str(path), without=".safetensors")
    with loading(f"{path}: the tokenizer"):
        return AutoTokenizer.from_pretrained(copy.path, trust_remote_code=trust_remote_code)


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode, without a generation cache.

    Args:
        path: local Hugging Face directory.
        dtype: `float32` or `bfloat16`.
        device: for the weights.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ModelError: the files are not a causal language model.
    """
    _quiet()
    import torch
    from transformers import AutoModelForCausalLM

    with loading(f"{path}: the model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported by name, and refused
            output_loading_info=True,
        )
    model, report = loaded
    check_report(path, report)
    # Training and scoring read whole sequences, so a cache would only cost memory.
    model.config.use_cache = False
    return model.to(device).eval()


def describe_model(path: str | Path) -> dict[str, int | str]:
    """Architecture, parameters and vocabulary of a model, read from its file headers only."""
    config = read_object(Path(path) / "config.json")
    return {
        "architecture": str((config.get("architectures") or ["unknown"])[0]),
        "parameters": count_parameters(read_tensors(Path(path))),
        "vocabulary": int(config.get("vocab_size", 0)),
    }


def _link_or_copy(source: Path, target: Path) -> None:
    if target.exists() or target.is_symlink():
        target.unlink()
    if source.suffix == ".safetensors":
        target.symlink_to(source.absolute())
    elif source.is_file():
        shutil.copyfile(source, target)


def _convert_gguf(source: Path, target: Path) -> None:
    _quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(source.parent), source.name
    with loading(f"{source}: the model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # reported by name, and refused
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model, report = loaded
    check_report(source, report)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _download(config: ModelConfig, target: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [p for p in _HUB_PATTERNS if p != "*.py" or config.trust_remote_code]
    try:
        snapshot_download(
            config.path, revision=config.revision, local_dir=target, allow_patterns=patterns
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model.path {config.path!r}: expected a local directory or a model of the hub, found "
            f"neither ({type(error).__name__}: {error}). Check the id and the network, log in "
            "for a gated model, or name a local directory or .gguf file."
        ) from error
    check_files(target)


def _check_template(config: ModelConfig, target: Path) -> None:
    tokenizer = load_tokenizer(target, trust_remote_code=config.trust_remote_code)
    template = template_of(config, tokenizer)
    if template != tokenizer.chat_template:
        tokenizer.chat_template = template
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in Path(folder).iterdir():
                storage.write_bytes(str(target / file.name), file.read_bytes())


def template_of(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template of the run: `model.chat_template`, else the tokenizer's own, else ChatML.

    Raises:
        ModelError: the configured file is missing or not text.
    """
    template = _read_template(config)
    return (tokenizer.chat_template if template is None else template) or CHATML


def _read_template(config: ModelConfig) -> str | None:
    """The text of the file `model.chat_template`; None if it is not set."""
    if config.chat_template is None:
        return None
    file = Path(config.chat_template)
    if not file.is_file():
        raise ModelError(
            f"model.chat_template {config.chat_template!r}: expected a local file with a Jinja "
            f"template, found {'a directory' if file.is_dir() else 'nothing'} there. Relative "
            "paths start from the directory in which the command runs."
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"model.chat_template {config.chat_template!r}: expected UTF-8 text, but {error}"
        ) from error


def _quiet() -> None:
    """Turns off the progress bars and advice of transformers, which are for interactive use."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
