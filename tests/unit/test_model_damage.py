"""Damaged model files: one paragraph that names the file or tensor, before anything loads them."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from system.config import ModelConfig, TinyModelConfig
from system.errors import InstructMixError, ModelError
from system.examples.tiny_model import new_model, train_tokenizer
from system.models.base import check_model, load_model, materialise, model_identity

TINY = TinyModelConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=1, warmup_tokens=0)
WEIGHTS = "model.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(iter(["one two three"] * 10), TINY.vocab_size, 64)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    new_model(TINY, len(tokenizer), 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "given"))


def with_header(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return changed


def put(name: str, key: str, value: object) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header[name].update({key: value}))


FILES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": (WEIGHTS, lambda _: b""),
    "cut": (WEIGHTS, lambda data: data[: len(data) // 2]),
    "cut in the header": (WEIGHTS, lambda data: data[:100]),
    "header of 2^62 bytes": (WEIGHTS, lambda data: struct.pack("<Q", 2**62) + data[8:]),
    "header of 2^64 - 1 bytes": (WEIGHTS, lambda data: b"\xff" * 8 + data[8:]),
    "header is a list": (WEIGHTS, lambda _: struct.pack("<Q", 2) + b"[]"),
    "a web page": (WEIGHTS, lambda _: b"<!doctype html><title>Not found</title>"),
    "a pickle": (WEIGHTS, lambda _: b"\x80\x02}q\x00."),
    "a pointer": (WEIGHTS, lambda _: POINTER),
    "offsets outside": (WEIGHTS, put(DOWN, "data_offsets", [0, 2**40])),
    "offsets reversed": (WEIGHTS, put(DOWN, "data_offsets", [64, 0])),
    "shape beyond its bytes": (WEIGHTS, put(DOWN, "shape", [32, 65])),
    "shape too large to multiply": (WEIGHTS, put(DOWN, "shape", [2**40, 2**40])),
    "negative shape": (WEIGHTS, put(DOWN, "shape", [-32, -64])),
    "unknown type": (WEIGHTS, put(DOWN, "dtype", "F33")),
    "bytes after the end": (WEIGHTS, lambda data: data + b"more"),
    "configuration is a list": ("config.json", lambda _: b"[]"),
    "configuration is null": ("config.json", lambda _: b"null"),
    "configuration is cut": ("config.json", lambda data: data[:40]),
    "configuration is empty": ("config.json", lambda _: b""),
    "configuration is no text": ("config.json", lambda _: b"\xff\xfe\x00"),
    "configuration is nested": ("config.json", lambda _: b"[" * 100_000),
    "configuration has 5,000 digits": ("config.json", lambda _: b'{"a": %s}' % (b"9" * 5000)),
    "configuration is a pointer": ("config.json", lambda _: POINTER),
    "generation settings are a list": ("generation_config.json", lambda _: b"[]"),
    "tokenizer is a pointer": ("tokenizer.json", lambda _: POINTER),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_before_anything_starts(name: str, directory: Path) -> None:
    file, change = FILES[name]
    (directory / file).write_bytes(change((directory / file).read_bytes()))
    with pytest.raises(ModelError, match=file.replace(".", r"\.")) as caught:
        model_identity(ModelConfig(path=str(directory)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_weights_that_are_no_file_are_named(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(directory / "gone")
    with pytest.raises(ModelError, match=r"model\.safetensors.*link"):
        model_identity(ModelConfig(path=str(directory)))
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        model_identity(ModelConfig(path=str(directory)))


def split(directory: Path, weight_map: object = None) -> dict[str, str]:
    """Puts the weights into two files with an index."""
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    places = {name: f"model-{len(name) % 2}.safetensors" for name in weights}
    for file in set(places.values()):
        part = {name: value for name, value in weights.items() if places[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places if weight_map is None else weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return places


def test_weights_in_several_files_load(directory: Path) -> None:
    split(directory)
    check_model(ModelConfig(path=str(directory)))


def test_a_weight_file_that_only_the_index_names_is_named(directory: Path) -> None:
    split(directory)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors is missing"):
        model_identity(ModelConfig(path=str(directory)))


@pytest.mark.parametrize(
    "weight_map", [[], {}, "all", {"a": 1}, {"a": "../b.safetensors"}, {"a": "/b.safetensors"}]
)
def test_a_damaged_index_is_named(weight_map: object, directory: Path) -> None:
    split(directory, weight_map)
    with pytest.raises(ModelError, match=r"index\.json"):
        model_identity(ModelConfig(path=str(directory)))


def test_a_tensor_in_two_files_is_named(directory: Path) -> None:
    places = split(directory)
    other = next(file for file in places.values() if file != places[DOWN])
    weights = load_file(directory / other) | {DOWN: torch.zeros(32, 64)}
    save_file(weights, directory / other)
    with pytest.raises(ModelError, match=DOWN):
        model_identity(ModelConfig(path=str(directory)))


WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda w: w.pop(DOWN), f"missing: {DOWN}"),
    "unknown": (lambda w: w.update(other=torch.zeros(2)), "unknown to the model: other"),
    "of another shape": (
        lambda w: w.update({DOWN: torch.zeros(64, 32)}),
        rf"{DOWN} \(shape \[64, 32\], the model has \[32, 64\]\)",
    ),
    "neither end": (lambda w: w.pop(EMBEDDING), EMBEDDING),
    "no weights at all": (lambda w: w.clear(), "layers"),
    "whole numbers": (lambda w: w.update({DOWN: w[DOWN].int()}), rf"{DOWN} \(I32\)"),
    "ends that differ": (
        lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}), "tie_word_embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_refused_by_name(
    name: str, directory: Path, tmp_path: Path
) -> None:
    change, words = WRONG[name]
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    config = ModelConfig(path=str(directory))
    with pytest.raises(ModelError, match=words):
        check_model(config)
    with pytest.raises(ModelError, match=words):
        materialise(config, tmp_path / "target")
    if name in ("missing", "unknown", "of another shape", "neither end"):
        with pytest.raises(ModelError, match=words):
            load_model(directory)


@pytest.mark.parametrize("head", ["absent", "equal"])
def test_a_tied_head_may_be_absent_or_equal(head: str, directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    assert "lm_head.weight" not in weights
    if head == "equal":
        weights["lm_head.weight"] = weights[EMBEDDING].clone()
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    check_model(ModelConfig(path=str(directory)))
    model = load_model(directory)
    assert torch.equal(model.get_output_embeddings().weight, weights[EMBEDDING])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": "many"}, {"num_attention_heads": 0},
        {"hidden_size": -1}, {"vocab_size": 2**40}, {"vocab_size": "x"}, {"model_type": "nonsense"},
        {"model_type": None}, {"model_type": []}, {"hidden_act": "none"}, {"rope_parameters": 3},
        {"dtype": "float33"},
        {"tie_word_embeddings": False}, {"architectures": 3, "hidden_size": 64},
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(changes: dict, directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match="given"):
        check_model(ModelConfig(path=str(directory)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": 3}', "[" * 100_000])
def test_a_damaged_tokenizer_is_refused(name: str, content: str, directory: Path) -> None:
    if name == "tokenizer_config.json" and content == '{"model": 3}':
        pytest.skip("a setting that nobody reads")
    (directory / name).write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        check_model(ModelConfig(path=str(directory)))


def gguf_bytes(folder: Path) -> bytes:
    writer = gguf.GGUFWriter(folder / "good.gguf", "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bb", "ccc"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_string("general.name", "tiny")
    for number in range(3):
        writer.add_tensor(f"tensor.{number}", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "good.gguf").read_bytes()


def test_a_whole_gguf_file_passes(tmp_path: Path) -> None:
    gguf_bytes(tmp_path)
    assert model_identity(ModelConfig(path=str(tmp_path / "good.gguf")))


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return changed


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
GGUF: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "four bytes": lambda data: data[:4],
    "a pointer": lambda _: POINTER,
    "other mark": lambda data: b"GGML" + data[4:],
    "version 99": lambda data: data[:4] + U32(99) + data[8:],
    "2^62 tensors": lambda data: data[:8] + U64(2**62) + data[16:],
    "2^62 values": lambda data: data[:16] + U64(2**62) + data[24:],
    "a text of 2^62 bytes": replaced(U64(4) + b"tiny", U64(2**62) + b"tiny"),
    "a list of 2^62 texts": replaced(U32(8) + U64(3) + U64(1), U32(8) + U64(2**62) + U64(1)),
    "a list of 2^62 numbers": replaced(U32(6) + U64(3), U32(6) + U64(2**62)),
    "lists in lists": replaced(U32(6) + U64(3), U32(9) + U64(3)),
    "unknown type of value": replaced(U32(6) + U64(3), U32(77) + U64(3)),
    "no UTF-8": replaced(b"tensor.1", b"tensor.\xff"),
    "a name of 2^62 bytes": replaced(U64(8) + b"tensor.1", U64(2**62) + b"tensor.1"),
    "2^31 dimensions": replaced(b"tensor.1" + U32(2), b"tensor.1" + U32(2**31)),
    "shape beyond the file": replaced(
        b"tensor.1" + U32(2) + U64(32), b"tensor.1" + U32(2) + U64(2**40)
    ),
    "2^31 blocks": replaced(b"block_count" + U32(4) + U32(1), b"block_count" + U32(4) + U32(2**31)),
    "cut in the header": lambda data: data[:200],
    "cut in the data": lambda data: data[:-700],
}


@pytest.mark.parametrize("name", GGUF)
def test_a_damaged_gguf_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(GGUF[name](gguf_bytes(tmp_path)))
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        model_identity(ModelConfig(path=str(tmp_path / "bad.gguf")))


def test_a_gguf_file_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    gguf_bytes(tmp_path)
    with pytest.raises(ModelError, match=r"good\.gguf"):
        materialise(ModelConfig(path=str(tmp_path / "good.gguf")), tmp_path / "target")


def mutated(data: bytes, seed: str) -> bytes:
    """The file with some bytes changed, cut out or repeated."""
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        place = draw.randrange(len(changed) + 1)
        match draw.randrange(4):
            case 0:
                changed[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                changed[place : place + draw.choice((1, 8, 400))] = b""
            case 2:
                changed[place:place] = changed[max(0, place - draw.choice((1, 8, 100))) : place]
            case 3:
                changed[place : place + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, U64(2**62)))
    return bytes(changed)


def check_mutations(whole: Path, tmp_path: Path, seeds: range) -> None:
    """Every mutated model passes or is refused with a message; nothing else may happen."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, "good.gguf")
    good = gguf_bytes(tmp_path)
    outcomes = set()
    for seed in seeds:
        name = names[seed % len(names)]
        if name == "good.gguf":
            path = tmp_path / "bad.gguf"
            path.write_bytes(mutated(good, str(seed)))
        else:
            path = Path(shutil.copytree(whole, tmp_path / str(seed)))
            data = (whole / name).read_bytes()
            size = 2000 if name == WEIGHTS else len(data)  # its header, not its numbers
            (path / name).write_bytes(mutated(data[:size], str(seed)) + data[size:])
        try:
            model_identity(ModelConfig(path=str(path)))
            check_model(ModelConfig(path=str(path)))
            outcomes.add("passed")
        except InstructMixError as error:
            assert error.exit_code == 2, seed
            outcomes.add("refused")
        if path.is_dir():
            shutil.rmtree(path)
    assert outcomes == {"passed", "refused"}


def test_mutated_models_pass_or_are_refused(whole: Path, tmp_path: Path) -> None:
    check_mutations(whole, tmp_path, range(100))


@pytest.mark.long
def test_many_mutated_models_pass_or_are_refused(whole: Path, tmp_path: Path) -> None:
    check_mutations(whole, tmp_path, range(100, 5000))
