"""What `submit` does before it talks to a cluster: paths, and the job's command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.jobs import entrypoint, is_here, resolve_paths
from system.cli import main
from system.config import RunConfig
from system.config.load import parse_config
from system.errors import ConfigError

CLUSTER = "http://head.example:8265"
LAPTOP = "http://127.0.0.1:8265"


def value(**changes: Any) -> dict[str, Any]:
    given = {
        "run_dir": "/shared/runs/first",
        "data_dir": "/shared/data",
        "sources": [{"path": "*.jsonl", "category": "math"}],
        "model": {"path": "Qwen/Qwen3-0.6B-Base"},
        "solve": {"budget": 100},
    }
    return given | changes


def config(**changes: Any) -> RunConfig:
    return parse_config(value(**changes), where="test")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("localhost:8265", True),
        ("http://head.example:8265", False),
        ("http://10.0.0.7:8265", False),
        ("https://localhost.example", False),
    ],
)
def test_only_loopback_addresses_are_this_machine(address: str, expected: bool) -> None:
    assert is_here(address) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run_dir": "s3://bucket/run", "data_dir": "gs://bucket/data"},
        {"data_dir": ".", "sources": [{"path": "hf://owner/name", "category": "math"}]},
        {"model": {"path": "builtin:tiny"}},
        {"model": {"path": "/shared/models/base", "chat_template": "/shared/chat.jinja"}},
    ],
)
def test_paths_that_a_cluster_can_see_travel_unchanged(changes: dict[str, Any]) -> None:
    given = config(**changes)
    assert resolve_paths(given, CLUSTER) == given


@pytest.mark.parametrize(
    ("key", "path", "changes"),
    [
        ("run_dir", "runs/x", {"run_dir": "runs/x"}),
        ("run_dir", "file://runs/x", {"run_dir": "file://runs/x"}),
        ("data_dir", "data", {"data_dir": "data"}),
        ("data_dir", ".", {"data_dir": "."}),
        (
            "data_dir",
            "data",
            {
                "data_dir": "data",
                "sources": [{"path": "/shared/a.jsonl", "category": "math"}],
                "influence": {"targets": {"exam": "exam.jsonl"}},
            },
        ),
        (
            "data_dir",
            "data",
            {
                "data_dir": "data",
                "sources": [{"path": "/shared/a.jsonl", "category": "math"}],
                "influence": {"targets": {"exam": {"path": "exam.jsonl", "test_share": 0.2}}},
            },
        ),
        (
            "data_dir",
            "data",
            {
                "data_dir": "data",
                "sources": [
                    {
                        "path": "/a.jsonl",
                        "category_column": "id",
                        "category_map": "ids.csv",
                        "category_unmapped": "keep",
                    }
                ],
            },
        ),
        (
            "data_dir",
            "data",
            {
                "data_dir": "data",
                "sources": [{"path": "s3://bucket/a.jsonl", "category": "math"}],
                "ingest": {"benchmarks": ["exam.jsonl"]},
            },
        ),
        ("model.path", "models/base", {"model": {"path": "models/base"}}),
        ("model.path", "./absent", {"model": {"path": "./absent"}}),
        ("model.path", "absent.gguf", {"model": {"path": "absent.gguf"}}),
        (
            "model.chat_template",
            "chat.jinja",
            {"model": {"path": "owner/name", "chat_template": "chat.jinja"}},
        ),
    ],
)
def test_relative_paths_are_refused_for_a_cluster_and_absolute_here(
    key: str,
    path: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    given = config(**changes)
    with pytest.raises(ConfigError) as caught:
        resolve_paths(given, CLUSTER)
    message = str(caught.value)
    assert f"{key} {path!r}" in message
    assert f"--set {key}=/shared/" in message
    assert CLUSTER in message and str(tmp_path) in message
    found: Any = resolve_paths(given, LAPTOP)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == str(tmp_path / path.removeprefix("file://"))


def test_every_relative_path_is_named_at_once(tmp_path: Path) -> None:
    given = config(run_dir="runs/x", data_dir="data")
    with pytest.raises(ConfigError, match=r"run_dir 'runs/x', data_dir 'data'"):
        resolve_paths(given, CLUSTER)


def test_submit_refuses_with_code_2_before_it_asks_the_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(value(run_dir="runs/x")))
    assert main(["submit", str(file), "--address", "http://head.invalid:8265"]) == 2
    assert "run_dir 'runs/x'" in capsys.readouterr().err


def test_a_cluster_runs_the_images_python() -> None:
    assert entrypoint(CLUSTER) == "python -m system.cli run config.json"


@pytest.mark.parametrize("is_here_too", [True, False], ids=["this-machine", "forwarded-port"])
def test_a_loopback_address_runs_this_python_where_it_exists(
    is_here_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives the command to a shell, and its exit code is the job's."""
    for folder in ("my python", "image"):
        (tmp_path / folder).mkdir()
        script = tmp_path / folder / "python"
        script.write_text(f'#!/bin/sh\necho "{folder}: $@"\nexit 3\n')
        script.chmod(0o755)
    mine = tmp_path / "my python/python"
    monkeypatch.setattr(sys, "executable", str(mine))
    command = entrypoint(LAPTOP)
    if not is_here_too:
        mine.unlink()
    result = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path / 'image'}:/usr/bin:/bin"},
        check=False,
    )
    used = "my python" if is_here_too else "image"
    assert result.stdout == f"{used}: -m system.cli run config.json\n"
    assert result.returncode == 3
