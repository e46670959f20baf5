import os
from pathlib import Path

import pytest
import torch
from forecast_corpus import build_varied_inputs
from influence_corpus import influence_config
from transformers import AutoModelForCausalLM

from system.config import ModelConfig, TinyModelConfig
from system.data.corpus import Corpus
from system.data.ingest.ingest import ingest_local
from system.errors import ModelError
from system.examples.tiny_model import build_tiny_model, new_model, train_tokenizer
from system.models.base import (
    CHATML,
    describe_model,
    kind_of,
    load_model,
    load_tokenizer,
    materialise,
    model_identity,
)

TINY = TinyModelConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=1, warmup_tokens=0)
MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(iter(["one two three"] * 10), TINY.vocab_size, 64)
    torch.manual_seed(0)
    model = new_model(TINY, len(tokenizer), 64)
    folder = tmp_path / "given"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_directory_is_linked_and_loads_to_the_same_weights(
    directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    materialise(ModelConfig(path=str(directory)), target)
    assert (target / "model.safetensors").is_symlink(), "large files must not be copied"
    ours = load_model(target).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_configured_template_replaces_the_models_own(directory: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    target = tmp_path / "target"
    materialise(ModelConfig(path=str(directory), chat_template=str(template)), target)
    rendered = load_tokenizer(target).apply_chat_template(MESSAGES, tokenize=False)
    assert rendered == "[one][two]"
    given = load_tokenizer(directory).apply_chat_template(MESSAGES, tokenize=False)
    assert "<|im_start|>" in given, "the user's own directory stays as it is"


def test_a_model_without_template_gets_chatml(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = None
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    target = tmp_path / "target"
    materialise(ModelConfig(path=str(directory)), target)
    assert load_tokenizer(target).chat_template == CHATML


def test_identity_follows_the_files(directory: Path) -> None:
    config = ModelConfig(path=str(directory))
    before = model_identity(config)
    (directory / "model.safetensors").touch()
    assert model_identity(config) != before


def test_identity_follows_the_text_of_the_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    config = ModelConfig(path="org/name", chat_template=str(file))
    before = model_identity(config)
    assert before != model_identity(ModelConfig(path="org/name"))
    os.utime(file, (1, 1))
    assert model_identity(config) == before, "the same text at another time is the same template"
    file.write_text("{{ messages }}!")
    assert model_identity(config) != before


def test_the_template_that_comes_with_a_hub_model_is_the_hubs_affair() -> None:
    assert model_identity(ModelConfig(path="org/name")) == {}


@pytest.mark.parametrize("path", ["org/name", "builtin:tiny"])
def test_a_missing_template_is_found_before_anything_starts(path: str, tmp_path: Path) -> None:
    for name, words in (("none.jinja", "nothing there"), (str(tmp_path), "a directory there")):
        with pytest.raises(ModelError, match=rf"model\.chat_template .*{words}"):
            model_identity(ModelConfig(path=path, chat_template=name))


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"template\.jinja.*UTF-8"):
        model_identity(ModelConfig(path="org/name", chat_template=str(file)))


def test_the_built_in_model_takes_a_configured_template(tmp_path: Path) -> None:
    build_varied_inputs(tmp_path)
    corpus = tmp_path / "corpus"
    ingest_local(influence_config(tmp_path), str(corpus))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = ModelConfig(path="builtin:tiny", chat_template=str(template), max_length=64, tiny=TINY)
    target = tmp_path / "built"
    build_tiny_model(Corpus.open(str(corpus / "manifest.json")), config, 0, target)
    rendered = load_tokenizer(target).apply_chat_template(MESSAGES, tokenize=False)
    assert rendered == "[one][two]"


def test_description_counts_parameters(directory: Path) -> None:
    model = load_model(directory)
    description = describe_model(directory)
    assert description["parameters"] == sum(p.numel() for p in model.parameters())
    assert description["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("builtin:tiny", "builtin"), ("org/name", "hub"), ("gpt2", "hub"), ("Org/Na.me-1_b", "hub")],
)
def test_paths_are_told_apart(path: str, kind: str) -> None:
    assert kind_of(path) == kind


@pytest.mark.parametrize("path", ["/no/such/model", "./no", "no/such/deep/path", "no.gguf", "a b"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(ModelError, match="nothing there"):
        kind_of(path)


def test_a_directory_without_model_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"safetensors.*tokenizer"):
        model_identity(ModelConfig(path=str(tmp_path)))


def test_a_damaged_model_is_refused_by_name(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="given"):
        load_model(directory)


def test_a_missing_template_file_is_named(directory: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(directory), chat_template="none.jinja")
    with pytest.raises(ModelError, match=r"none\.jinja"):
        materialise(config, tmp_path / "target")
