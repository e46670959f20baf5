from pathlib import Path

import pytest
import yaml

from system.config.load import load_config
from system.errors import ConfigError

MINIMAL = {
    "run_dir": "runs/x",
    "sources": [{"path": "a.jsonl"}],
    "model": {"path": "builtin:tiny"},
    "solve": {"budget": 100},
}


def write(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return str(path)


def test_minimal_config_loads(tmp_path: Path) -> None:
    assert load_config(write(tmp_path)).train.num_workers == 2


def test_set_overrides_nested_values_and_list_items(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path),
        ["train.learning_rate=1e-4", "sources.0.category=math", "influence.directions=[add]"],
    )
    assert config.train.learning_rate == 1e-4
    assert config.sources[0].category == "math"
    assert config.influence.directions == ("add",)


def test_environment_variables_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/somewhere")
    assert load_config(write(tmp_path, data_dir="${WHERE}/x")).data_dir == "/somewhere/x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trian": {}}, ["trian", "did you mean 'train'"]),
        ({"train": {"learning_rat": 1}}, ["train.learning_rat", "'learning_rate'"]),
        ({"train": {"learning_rate": -1}}, ["train.learning_rate", "greater than 0", "-1"]),
        ({"sources": []}, ["sources", "at least 1"]),
        ({"sources": [{"path": "a", "catgory": "b"}]}, ["sources.0.catgory", "'category'"]),
        (
            {"sources": [{"path": "a", "category": "b", "category_column": "c"}]},
            ["sources.0", "category_column"],
        ),
        ({"ingest": {"estimate_share": 0.6, "test_share": 0.5}}, ["0.6", "0.5", "train"]),
        ({"influence": {"dose_rows": 300}}, ["300", "192"]),
        ({"solve": {"budget": 10, "guard": 0.1, "guard_nats": 1}}, ["guard or guard_nats"]),
    ],
)
def test_bad_values_are_named(tmp_path: Path, changes: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, **changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "train", "=3", "run_dir.x=3", "sources.7.path=x", "sources.0.path.x=1", "sources.x.path=1",
        "sources.-1.path=x", f"sources.{'9' * 5000}.path=x", "train.num_workers=!!int abc",
        "sources.0=[&a [*a]]", f"seed={'9' * 5000}", f"seed={'[' * 3000}", "seed={a: 1, a: 2}",
    ],
)  # fmt: skip
def test_bad_overrides_are_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize("text", ["- a\n", "a: [", ""])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_config(str(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing there"):
        load_config(str(tmp_path / "none.yaml"))


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
