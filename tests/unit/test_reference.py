"""The reference of the configuration: complete, true, and the page in docs/."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from system.cli import main
from system.config import RunConfig
from system.config.load import parse_config
from system.config.reference import read_sections, render_defaults, render_reference

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
SECTIONS = read_sections()
REQUIRED = {
    "run_dir": "runs/x",
    "sources": [{"path": "a.jsonl"}],
    "model": {"path": "builtin:tiny"},
    "solve": {"budget": 100},
}


def models_below(annotation: object) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        below = (models_below(field.annotation) for field in annotation.model_fields.values())
        return {annotation}.union(*below)
    return set().union(*(models_below(inner) for inner in get_args(annotation)))


def test_the_page_in_docs_is_what_the_code_says() -> None:
    assert PAGE.read_text() == render_reference(), (
        "docs/config.md is another text than the configuration's: "
        "instructmix config > docs/config.md"
    )


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: ",".join(section.paths) or "top")
def test_every_key_has_a_text(section) -> None:
    assert section.text
    assert [key.name for key in section.keys if not key.text] == []


def test_every_section_is_there_once_with_all_its_keys() -> None:
    models = models_below(RunConfig)
    assert len(SECTIONS) == len(models)
    keys = sorted(tuple(key.name for key in section.keys) for section in SECTIONS)
    assert keys == sorted(tuple(model.model_fields) for model in models)
    paths = [path for section in SECTIONS for path in section.paths]
    assert {"influence.lora", "train.lora", "sources[]", "solve.groups.NAME"} <= set(paths)
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    ("section", "key", "kind", "default"),
    [
        ("solve", "budget", "whole number > 0", "required"),
        ("solve", "guard", "number >= 0", "`null`"),
        ("solve", "groups", "map: name -> section", "`{}`"),
        ("ingest", "test_share", "number >= 0, <= 1", "`0.1`"),
        ("influence", "directions", "list of `add`, `remove`", "`[remove]`"),
        ("train", "num_workers", "whole number > 0 or [whole number > 0, whole number > 0]", "`2`"),
        ("sources[]", "name", "text", '`""`'),
        ("", "cluster", "section", "see section"),
    ],
)
def test_types_and_defaults_read_as_words(section, key, kind, default) -> None:
    (found,) = (item for item in SECTIONS if section in item.paths)
    (entry,) = (item for item in found.keys if item.name == key)
    assert (entry.type, entry.default) == (kind, default)


def test_a_table_has_four_cells_whatever_a_text_contains() -> None:
    rows = [line for line in render_reference().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


def test_the_defaults_with_what_is_required_are_the_configuration_without_them() -> None:
    text = render_defaults()
    assert "run_dir, sources, model.path, solve.budget" in text.splitlines()[0]
    value = yaml.safe_load(text)
    assert next(iter(value)) == "data_dir"
    for name, given in REQUIRED.items():
        value[name] = value.get(name, {}) | given if isinstance(given, dict) else given
    assert parse_config(value, "defaults") == parse_config(REQUIRED, "required")


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], render_reference()), (["--defaults"], render_defaults())]
)
def test_the_command_prints_both(arguments, expected, capsys) -> None:
    assert main(["config", *arguments]) == 0
    assert capsys.readouterr().out == expected
