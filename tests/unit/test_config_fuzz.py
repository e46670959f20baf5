"""No configuration ends in a traceback: `check` accepts it or says what is wrong (exit code 2)."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from system import cli
from system.config.load import parse_config

MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "data_dir": ".",
    "sources": [{"path": "rows.jsonl", "category": "c"}],
    "model": {"path": "builtin:tiny"},
    "solve": {"budget": 10},
}
ODD = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**300, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "x" * 5000, "\x1b[31m", "é\u202e", "../..", "/", "/dev/null", "/proc/self/mem",
    "s3://", "s3://x", "hf://", "hf://a/b/c", "file://", "http://[", "none://x", "~nobody/x",
    "${NONE}", "$", "*", "**", "[", "rows.jsonl", "rows.jsonl/x", "a.csv", "(", "(?P<category>.)",
    r"(a)\1", "m:f", "os:system", "a.b:c", "no.gguf", "org/name", "2024-01-01", "1e-4",
    [], [[]], [None], ["a", "a"], [1, 1], {}, {"a": {}}, {"": ""}, {1: 2}, {None: None},
    [{"path": 3}], {"path": "rows.jsonl"}, {"a": {"path": "rows.jsonl"}},
    "add", "loss", "gradient", "near", "messages", "columns", "2020-13-45", "auto", "local",
)  # fmt: skip
GARBAGE = (
    "", "[", "{", "]", "}", ":", "- ", "&a ", "*a", "!!int ", "!!set ", "!!timestamp ", "'", '"',
    "\t", "\n", "\x00", "<<: ", "? ", "| ", "9" * 5000, "[" * 3000, "%", "#",
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a value."""
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(draw: random.Random) -> Any:
    """A configuration with every key, of which one to three have an odd value or are gone."""
    value = json.loads(parse_config(MINIMAL, "minimal").model_dump_json())
    # Mostly few keys: with all of them, most mutations fail at the same first checks.
    if draw.random() < 0.7:
        value = json.loads(json.dumps(MINIMAL)) | {
            key: value[key] for key in draw.sample(sorted(value), 2)
        }
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *parents, last = draw.choice(places(value)[1:])
        node = value
        for key in parents:
            node = node[key]
        match draw.randrange(8):
            case 0:
                del node[last]
            case 1 if isinstance(node, dict):
                node[draw.choice(("x", "path ", 1, None, "pathh"))] = draw.choice(ODD)
            case _:
                node[last] = draw.choice(ODD)
        if not places(value)[1:]:
            break
    return value


def garbled(draw: random.Random, text: str) -> str:
    """The text with some characters replaced, cut out or repeated."""
    for _ in range(draw.choice((1, 2, 10))):
        place = draw.randrange(len(text) + 1)
        piece = draw.choice((*GARBAGE, text[:place][-30:]))
        text = text[:place] + piece + text[place + draw.choice((0, 0, 1, 20)) :]
    return text


def check_configurations(folder: Path, capsys: pytest.CaptureFixture, seeds: range) -> None:
    (folder / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 50)
    file = folder / "run.yaml"
    codes = set()
    for seed in seeds:
        draw = random.Random(str(seed))
        text = yaml.safe_dump(changed(draw))
        file.write_text(garbled(draw, text) if seed % 3 == 0 else text)
        code = cli.main(["check", str(file)])
        printed = capsys.readouterr()
        assert code in (0, 2), (seed, printed.err)
        if code == 2:
            assert printed.err.startswith("instructmix: ") and len(printed.err) < 5000, seed
        codes.add(code)
    assert codes == {0, 2}


def test_odd_configurations_pass_or_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_configurations(tmp_path, capsys, range(150))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_odd_configurations_pass_or_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_configurations(tmp_path, capsys, range(150, 10_000))
