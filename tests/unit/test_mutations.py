"""The list of mutations still fits the code; `tests/mutation/mutate.py` runs them."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "tests/mutation/mutations.py")
assert _SPEC is not None and _SPEC.loader is not None
mutations = importlib.util.module_from_spec(_SPEC)
sys.modules["mutations"] = mutations
_SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_has_exactly_one_place_and_its_tests_exist(mutation):
    text = (ROOT / mutation.file).read_text()
    assert mutation.apply(text) != text
    compile(mutation.apply(text), mutation.file, "exec")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text()


def test_names_are_told_apart_and_every_area_has_mutations():
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(set(names)) == len(names) >= 24
    assert {mutation.area for mutation in mutations.MUTATIONS} == set(mutations.AREAS)
