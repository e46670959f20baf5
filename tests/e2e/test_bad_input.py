"""Bad input gets one clear paragraph and exit code 2, and leaves nothing half-written."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from small_job import job_config

from system.cli import main

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False},
    )
    yield cluster.address
    cluster.shutdown()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must end with exit code 2."""
    code = main(arguments)
    message = capsys.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    return message


def change(config: Path, **values: object) -> str:
    value = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(value | values))
    return str(config)


def one_source(config: Path, text: str, name: str = "only.jsonl", **fields: str) -> str:
    (config.parent / "data" / name).write_text(text)
    return change(config, sources=[{"path": name, **fields}])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return job_config(tmp_path)


def test_a_missing_source_is_named_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = change(config, sources=[{"path": "none.jsonl", "category": "x"}])
    assert "none.jsonl" in refused(["run", path], capsys)
    assert not ray.is_initialized()
    assert not (config.parent / "run/corpus").exists()


def test_an_unknown_key_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(config, trian={})
    assert "did you mean 'train'" in refused(["run", path], capsys)


def test_a_model_path_that_does_not_exist_is_named(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = change(config, model={"path": "/no/such/model"})
    assert "/no/such/model" in refused(["run", path], capsys)
    assert not ray.is_initialized()


def test_check_refuses_what_run_refuses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change(config, sources=[{"path": "none.jsonl", "category": "x"}])
    assert "none.jsonl" in refused(["check", path], capsys)


@pytest.mark.parametrize(
    ("text", "fields", "words"),
    [
        ('{"colour": "red"}\n' * 9, {}, ["only.jsonl", "colour", "alpaca"]),
        ("", {}, ["only.jsonl", "found none"]),
        (
            json.dumps({"prompt": "a", "completion": "b"}) + "\n",
            {"category": "lonely"},
            ["lonely", "min_train_rows"],
        ),
        (
            "".join(
                json.dumps({"prompt": f"a {n}", "completion": "b"}) + "\n{broken\n"
                for n in range(50)
            ),
            {"category": "x"},
            ["50", "bad-json", "max_rejected_share"],
        ),
    ],
    ids=["unknown format", "empty source", "too few rows", "too many rejected"],
)
def test_unusable_rows_are_described(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    address: str,
    text: str,
    fields: dict[str, str],
    words: list[str],
) -> None:
    path = one_source(config, text, **fields)
    message = refused(["run", path, "--set", f"cluster.address={address}"], capsys)
    for word in words:
        assert word in message
    assert not (config.parent / "run/corpus/record.json").exists()
    assert not list((config.parent / "run").glob("corpus/*/manifest.json"))


@pytest.mark.slow
def test_infeasible_limits_are_named_before_the_influence_stage(
    config: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    named = yaml.safe_load(config.read_text())["sources"][:-1]
    path = change(
        config,
        sources=named,  # nothing to tag, nothing to measure: no engine has to start
        tag={"accuracy_rows": 0},
        solve={"budget": 150, "lower": {"addition": 100, "chat": 90}},
    )
    message = refused(["run", path, "--set", f"cluster.address={address}"], capsys)
    assert "addition" in message
    assert "chat" in message
    assert not list((config.parent / "run").glob("influence/*/units"))


def test_a_stage_before_from_must_be_finished(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ingest" in refused(["run", str(config), "--from", "solve"], capsys)


def test_status_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run directory" in refused(["status", str(tmp_path)], capsys)


def test_export_before_select_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "select" in refused(["export", str(tmp_path), "--format", "trl"], capsys)
