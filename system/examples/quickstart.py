"""`instructmix quickstart`: the default job, with generated instructions and a tiny model.

The package `reasoning-gym` generates the instructions: task families with verifiable answers.  They
are grouped into categories, some of which share skills (for example arithmetic and equations).
"""

from __future__ import annotations

import importlib.resources
import json
import warnings
from collections.abc import Sequence
from typing import Any

import yaml

from system import storage
from system.config import RunConfig
from system.config.load import apply_overrides, parse_config
from system.errors import ConfigError

FAMILIES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "arithmetic": (
        ("chain_sum", {"max_terms": 3, "max_digits": 2}),
        ("basic_arithmetic", {"max_terms": 3, "max_digits": 2}),
    ),
    "multiplication": (("products", {"max_terms": 2, "max_digits": 3}),),
    "number theory": (("gcd", {"max_value": 100}), ("lcm", {"max_value": 40})),
    "equations": (("simple_equations", {}),),
    "fractions": (("fraction_simplification", {"max_value": 60, "max_factor": 12}),),
    "binary numbers": (("count_bits", {"max_n": 4096}), ("base_conversion", {})),
    "spelling": (("spell_backward", {"max_word_len": 6}), ("letter_counting", {})),
    "counting": (("leg_counting", {"max_animals": 3}),),
    "logic": (("syllogism", {}),),
    "dates and times": (("calendar_arithmetic", {}), ("time_intervals", {})),
    "sequences": (("number_sequence", {}),),
    "family relations": (("family_relationships", {}),),
}
"""Category -> task families of reasoning-gym, with their settings."""

ROWS_PER_CATEGORY = 900
RECIPE = 1
"""Version of the recipe; increase it if the same settings generate other rows."""


def prepare_quickstart(run_dir: str, overrides: Sequence[str]) -> RunConfig:
    """Generates the instructions (once) and returns the configuration of the job.

    Raises:
        ConfigError: the package `reasoning-gym` is not installed, or an override is not valid.
    """
    example = importlib.resources.files("system.configs").joinpath("quickstart.yaml")
    value = yaml.safe_load(example.read_text("utf-8"))
    value["run_dir"] = run_dir
    value["data_dir"] = storage.join(run_dir, "data")
    apply_overrides(value, overrides)
    config = parse_config(value, where="quickstart")
    uri = storage.join(config.data_dir, "instructions.jsonl")
    marker = storage.join(config.data_dir, "recipe.json")
    recipe = {"recipe": RECIPE, "rows": ROWS_PER_CATEGORY, "seed": config.seed}
    if not (storage.is_whole(marker) and storage.read_json(marker) == recipe):
        rows = generate_instructions(ROWS_PER_CATEGORY, config.seed)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        storage.write_bytes(uri, "".join(f"{line}\n" for line in lines).encode())
        storage.write_json(marker, recipe)
    return config


def generate_instructions(rows_per_category: int, seed: int) -> list[dict[str, str]]:
    """Rows `question, answer, category, task`; the same arguments give the same rows.

    Raises:
        ConfigError: the package `reasoning-gym` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            "quickstart needs the package reasoning-gym to generate instructions, but it is not "
            "installed: run pip install 'instructmix[quickstart]'"
        ) from error
    rows = []
    for category, families in FAMILIES.items():
        share = -(-rows_per_category // len(families))
        for task, settings in families:
            dataset = reasoning_gym.create_dataset(task, size=share, seed=seed, **settings)
            rows += [
                {
                    "question": item["question"],
                    "answer": str(item["answer"]),
                    "category": category,
                    "task": task,
                }
                for item in (dataset[index] for index in range(share))
            ]
    return rows
