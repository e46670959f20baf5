import argparse
import json
from pathlib import Path

import pytest
import yaml

from system.config import RunConfig
from system.errors import ConfigError
from system.examples.planted import NUM_KEYS, planted_world
from system.examples.planted_command import add_arguments, run

WORLD = planted_world(4)
TASKS = {task.name: task for task in WORLD.tasks}


def rows(name, count=300):
    return list(WORLD.rows(TASKS[name], count))


def relation(target, source):
    found = [
        item
        for item in WORLD.truth()["relations"]
        if (item["target"], item["source"]) == (target, source)
    ]
    assert len(found) == 1
    return found[0]


def facts(name):
    """Key -> set of answers, read off the rows as a model would."""
    found: dict[str, set[str]] = {}
    for row in rows(name):
        (key,) = [word for word in row["instruction"].split() if word in TASKS[name].keys]
        found.setdefault(key, set()).add(row["output"])
    return found


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"weather"}))
def test_every_key_has_one_answer_and_every_row_is_new(name):
    found = facts(name)
    assert len(found) == NUM_KEYS and all(len(answers) == 1 for answers in found.values())
    prompts = [row["instruction"] for row in rows(name)]
    assert len(set(prompts)) == len(prompts)


def test_the_weather_has_no_facts():
    assert min(len(answers) for answers in facts("weather").values()) > 3


def test_duplicates_share_all_facts_and_no_wording():
    assert facts("colour") == facts("colour-reworded")
    assert TASKS["colour"].wording != TASKS["colour-reworded"].wording
    assert relation("colour", "colour-reworded")["gamma"] == 1.0


def test_contradictions_share_the_wording_and_no_fact():
    right, wrong = facts("colour"), facts("colour-contradicted")
    assert TASKS["colour"].wording == TASKS["colour-contradicted"].wording
    assert right.keys() == wrong.keys() and all(right[key] != wrong[key] for key in right)
    assert relation("colour", "colour-contradicted")["sign"] == -1


def test_a_journey_is_composed_of_its_parts():
    first, second, journey = facts("first-step"), facts("second-step"), facts("journey")
    for key, answers in journey.items():
        middle, end = next(iter(answers)).split(" then ")
        assert first[key] == {middle} and second[middle] == {end}
    assert relation("journey", "first-step")["sign"] == 1


def test_unrelated_tasks_share_no_word():
    def words(name):
        task = TASKS[name]
        return {*task.keys, *(word for answer in task.answers for word in answer.split())}

    unrelated = [
        (item["target"], item["source"])
        for item in WORLD.truth()["relations"]
        if item["relation"] == "unrelated"
    ]
    assert len(unrelated) > 40
    for target, source in unrelated:
        assert not words(target) & words(source), (target, source)


def test_the_warm_up_says_nothing_about_planted_keys_but_their_names():
    planted = {key for task in WORLD.tasks for key in task.keys}
    asked = [row for row in WORLD.warm_rows(2000) if not row["instruction"].startswith("repeat")]
    assert len(asked) > 1000
    for row in asked:
        assert not planted & set(row["instruction"].split()), row
    assert planted <= {word for row in WORLD.warm_rows(4000) for word in row["output"].split()}


def test_another_seed_is_another_world():
    assert planted_world(5).tasks[0].facts != WORLD.tasks[0].facts
    assert planted_world(4) == WORLD


def command(out, *options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--out", str(out), *options]))


def test_the_command_writes_data_truth_and_a_configuration_that_loads(tmp_path, capsys):
    assert command(tmp_path / "world", "--rows", "200", "--no-model") == 0
    config = RunConfig.model_validate(
        yaml.safe_load((tmp_path / "world" / "config.yaml").read_text())
    )
    assert len(config.sources) == len(TASKS)
    for source in config.sources:
        lines = Path(config.data_dir, source.path).read_text().splitlines()
        assert len(lines) == 200 and set(json.loads(lines[0])) == {"instruction", "input", "output"}
    truth = json.loads((tmp_path / "world" / "truth.json").read_text())
    assert len(truth["relations"]) == len(TASKS) ** 2
    assert "config.yaml" in capsys.readouterr().out


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "world").mkdir()
    with pytest.raises(ConfigError, match="expected a new directory"):
        command(tmp_path / "world")


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 200"):
        command(tmp_path / "world", "--rows", "20")
    assert not (tmp_path / "world").exists()
