"""No secret of a configuration is in what a run writes or prints."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from ingest_builders import numbered

from actors import ingestor
from actors.jobs import submit_job
from actors.overview import describe_plan, describe_status
from actors.pipeline import STAGES, Plan, run_pipeline, stage_inputs
from system import storage
from system.config import RunConfig
from system.config.load import load_config, parse_config
from system.data.ingest.plan import open_plan
from system.errors import ConfigError, DataError
from system.progress import Progress
from system.redact import without_secrets
from system.report import write_report
from system.rundir import fingerprint

SECRETS = {
    "DATA_FOLDER": "very-private-folder",
    "DATA_USER": "someone-we-know",
    "DATA_PASSWORD": "pa$s%40word/with+signs=",
    "DATA_SIGNATURE": "c2lnbmF0dXJlIG9mIGEgdXJs",
}
LITERAL = ("plain-user", "plain-password", "plain-signature-1234567890")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def write_config(folder: Path, **changes: Any) -> str:
    """A configuration with one source in a secret folder, one behind variables, one literal."""
    (folder / SECRETS["DATA_FOLDER"]).mkdir(exist_ok=True)
    rows = [*numbered(60), *numbered(3), {"prompt": "q"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    first_file(folder).write_text(text)
    paths = [
        "memory://${DATA_USER}:${DATA_PASSWORD}@host/b.jsonl?sig=${DATA_SIGNATURE}",
        f"memory://{LITERAL[0]}:{LITERAL[1]}@host/c.jsonl?X-Amz-Signature={LITERAL[2]}&v=1",
    ]
    for number, path in enumerate(paths, start=1):
        lines = (json.dumps(row) for row in numbered(60, 100 * number))
        storage.write_bytes(os.path.expandvars(path), "".join(f"{x}\n" for x in lines).encode())
    value = {
        "run_dir": str(folder / "run"),
        "data_dir": str(folder),
        "sources": [
            {"path": "${DATA_FOLDER}/${DATA_USER}.jsonl", "category": "a"},
            {"path": paths[0], "category": "b"},
            {"path": paths[1], "category": "c"},
        ],
        "ingest": {"min_train_rows": 1, "min_heldout_rows": 1},
        "model": {"path": "builtin:tiny"},
        "solve": {"budget": 10},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(value | changes))
    return str(path)


def first_file(folder: Path) -> Path:
    return folder / SECRETS["DATA_FOLDER"] / f"{SECRETS['DATA_USER']}.jsonl"


def assert_hidden(text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    for secret in (*SECRETS.values(), *LITERAL):
        assert secret.encode() not in data, f"{secret} in {data[:2000]!r}"


def run_ingest(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage `ingest` with all work in this process."""

    def do_all(context: Any, plan: Any, step: Any, units: Any) -> dict[int, Any]:
        for file in storage.list_names(storage.join(plan.attempt, "work")):
            if file.endswith(".json"):
                assert_hidden(storage.read_bytes(storage.join(plan.attempt, "work", file)))
        return {index: step.do(plan, unit) for index, unit in units.items()}

    monkeypatch.setattr(ingestor, "_do_all", do_all)
    run_pipeline(config, Plan(last="ingest"), Progress(is_terminal=False))


def test_a_whole_run_directory_holds_no_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(write_config(folder))
    run_ingest(config, monkeypatch)
    write_report(str(folder / "run"))
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "record.json", "manifest.json", "report.html", "log.txt"} <= names
    for path in files:
        assert_hidden(path.read_bytes())
        assert_hidden(str(path.relative_to(folder)))
    assert_hidden(describe_status(str(folder / "run")))
    assert_hidden(describe_plan(config).text)
    printed = capsys.readouterr()
    assert_hidden(printed.out + printed.err)
    # What was read is still said, without the secret.
    manifest = next((folder / "run").rglob("manifest.json")).read_text()
    assert "${DATA_FOLDER}/${DATA_USER}.jsonl" in manifest
    assert "***@host/c.jsonl?***" in manifest


def test_config_json_keeps_variables_and_runs_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(folder)
    value = yaml.safe_load(Path(path).read_text())
    value["sources"].pop()  # a secret that is written out cannot be kept and be hidden
    Path(path).write_text(yaml.safe_dump(value))
    run_ingest(load_config(path), monkeypatch)
    again = load_config(str(folder / "run" / "config.json"))
    assert again == load_config(path)
    assert folder / again.sources[0].path == first_file(folder)
    capsys.readouterr()
    run_ingest(again, monkeypatch)
    assert "ingest: already finished" in capsys.readouterr().err


def test_an_ingest_that_was_killed_goes_on_from_a_plan_without_secrets(folder: Path) -> None:
    config = load_config(write_config(folder))
    attempt = str(folder / "attempt")
    first = open_plan(config, attempt)
    assert open_plan(config, attempt) == first
    assert first.chunks[1].ranges[0].uri.endswith(SECRETS["DATA_SIGNATURE"])
    assert_hidden((folder / "attempt" / "work" / "plan.json").read_bytes())


def test_errors_hide_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(folder))
    first_file(folder).unlink()
    for fails in (partial(run_ingest, config, monkeypatch), partial(describe_plan, config)):
        with pytest.raises(DataError, match=r"\$\{DATA_FOLDER\}/\$\{DATA_USER\}.jsonl") as error:
            fails()
        assert_hidden(str(error.value))
    path = write_config(folder, seed="${DATA_SIGNATURE}", model={"path": 3})
    with pytest.raises(ConfigError, match=r"seed: .*\$\{DATA_SIGNATURE\}") as config_error:
        load_config(path)
    assert_hidden(str(config_error.value))


def inputs_of(config: RunConfig, stage: str = "ingest") -> dict[str, Any]:
    return stage_inputs(next(item for item in STAGES if item.name == stage), config, {})


def test_fingerprints_depend_on_what_a_variable_means_and_not_on_a_signature(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHARS", "5000")
    monkeypatch.setenv("HOW", "near")
    path = write_config(folder, ingest={"max_chars": "${CHARS}", "deduplicate": "${HOW}"})
    first = inputs_of(load_config(path))
    assert first["ingest.max_chars"] == 5000
    monkeypatch.setenv("DATA_SIGNATURE", "bmV3IHNpZ25hdHVyZSBvZiB1cmw")
    write_config(folder, ingest={"max_chars": "${CHARS}", "deduplicate": "${HOW}"})
    renewed = inputs_of(load_config(path))
    assert {key for key in first if first[key] != renewed.get(key)} <= {
        key
        for key in first
        if key.startswith("file.")  # the file was written again
    }
    assert first.keys() == renewed.keys()
    monkeypatch.setenv("CHARS", "5001")
    monkeypatch.setenv("HOW", "exact")
    changed = inputs_of(load_config(path))
    names = {"ingest.max_chars", "ingest.deduplicate"}
    assert {key for key in renewed if renewed[key] != changed[key]} == names


def test_a_configuration_without_secrets_has_the_fingerprint_that_it_had(folder: Path) -> None:
    value = {
        "run_dir": "~/r",
        "sources": [{"path": "x?[0-9]*.jsonl", "answer_pattern": "= (.*)$"}, {"path": "s3://b/y"}],
        "model": {"path": "org/name@main"},
        "solve": {"budget": 10},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(value))
    for config in (load_config(str(folder / "c.yaml")), parse_config(value, "c.yaml")):
        assert config.to_hash() == config.to_write() == config.model_dump(mode="json")


def test_two_files_that_differ_in_what_is_hidden_both_count(folder: Path) -> None:
    config = load_config(write_config(folder))
    stage = next(item for item in STAGES if item.name == "ingest")
    url = "https://host/x?token="
    both = {f"{url}{'a' * 20}": "1", f"{url}{'b' * 20}": "2"}
    prints = set()
    for stamps in (both, {**both, f"{url}{'a' * 20}": "3"}, {**both, f"{url}{'b' * 20}": "3"}):
        changed = {"identity": lambda _, stamps=stamps: stamps}
        inputs = stage_inputs(type(stage)(**{**fields_of(stage), **changed}), config, {})
        assert_hidden(json.dumps(inputs))
        prints.add(fingerprint(inputs))
    assert len(prints) == 3


def fields_of(stage: Any) -> dict[str, Any]:
    return {name: getattr(stage, name) for name in stage.__dataclass_fields__}


def test_a_job_gets_variables_beside_its_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    class Client:
        def __init__(self, address: str) -> None:
            pass

        def submit_job(self, **job: Any) -> None:
            text = Path(job["runtime_env"]["working_dir"], "config.json").read_text()
            sent.update(job | {"text": text})

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    monkeypatch.setenv("HOME", str(folder))
    path = write_config(folder, run_dir="${HOME}/run")
    submit_job(load_config(path), "http://127.0.0.1:8265", wait=False)
    assert sent["runtime_env"]["env_vars"] == SECRETS
    assert not any(secret in sent["text"] for secret in SECRETS.values())
    assert json.loads(sent["text"])["run_dir"] == str(folder / "run")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["a" * 10**6, "a://" * 50_000, "https://h/?" + "&a" * 10**5])
def test_long_texts_take_no_long_time(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/x.jsonl", "https://***@h/x.jsonl"),
        ("https://u:p@ss@h/x", "https://***@h/x"),
        ("https://token@h/x", "https://***@h/x"),
        ("s3://AKIA:se/cr/et@b/x.jsonl", "s3://***@b/x.jsonl"),
        ("simplecache::https://u:p@h/x?token=ab", "simplecache::https://***@h/x?***"),
        ("https://${U}:${P}@h/x?sig=${S}", "https://${U}:${P}@h/x?sig=${S}"),
        ("https://$U:pw@h/x", "https://***@h/x"),
        ("https://h/x?X-Goog-Signature=1&v=2", "https://h/x?***"),
        ("https://a.b/x?sv=2020&se=2030&sig=a%3D", "https://a.b/x?***"),
        ("https://h/x#access_token=abc", "https://h/x#***"),
        (f"https://h/x?unknown={'a' * 20}", "https://h/x?***"),
        (f"https://h/x?{'a' * 40}", "https://h/x?***"),
        ("https://h/x?download=true&v=3", "https://h/x?download=true&v=3"),
        ("a 'https://u:p@h/x?sig=1', b", "a 'https://***@h/x?***', b"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("hf://datasets/o/n@rev/x", "hf://datasets/o/n@rev/x"),
        ("s3://b/part-?.jsonl", "s3://b/part-?.jsonl"),
        ("mail a@b, 12:30, x?y=z", "mail a@b, 12:30, x?y=z"),
    ],
)
def test_addresses_are_shown_without_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown
