"""The `solve` command: tables in, mix.json out, one clear paragraph and exit code 2 otherwise."""

import argparse
import doctest
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from system.cli import main
from system.errors import ConfigError, DataError, InstructMixError
from system.solve import Mix
from system.solve.command import add_arguments, run

ROOT = Path(__file__).parents[2]
WORKED = ROOT / "tests" / "golden" / "solve" / "worked"
BASE = "category,count,supply\na,100,150\nb,100,110\nc,100,300\n"
ERRORS = "target,a,b,c\na,0.1,0.2,0.3\nb,0.4,0.5,0.6\nc,0.7,0.8,0.9\n"
EFFECT = "target,a,b,c\na,1,0.5,0\nb,0.2,1,0.1\nc,-0.3,0.1,1\n"


def solve(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def files(tmp_path):
    def write(**content: str) -> Path:
        for name, text in content.items():
            suffix = ".yaml" if name == "limits" else ".csv"
            (tmp_path / (name + suffix)).write_text(text)
        return tmp_path

    write(base=BASE, effect=EFFECT)
    return write


def solved(where: Path, *words: str) -> Mix:
    out = where / "mix.json"
    assert solve(*words, "--base", where / "base.csv", "--out", out) == 0
    return Mix.from_json(out.read_text())


def console_blocks() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "optimiser.md").read_text()
    blocks = re.findall(r"```console\n\$ instructmix solve (.*?)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    return blocks


@pytest.mark.parametrize(("words", "shown"), console_blocks())
def test_worked_example_of_the_docs_prints_what_the_docs_show(
    words, shown, capsys, monkeypatch, tmp_path
):
    for file in WORKED.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    is_refused = shown.startswith("instructmix: ")
    assert main(["solve", *shlex.split(words)]) == (2 if is_refused else 0)
    out, error = capsys.readouterr()
    assert (error if is_refused else out) == shown


def test_python_example_of_the_docs_is_true():
    page = ROOT / "docs" / "optimiser.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0
    assert result.attempted >= 9


def test_node_limit_is_an_option_of_the_command(files):
    where = files()
    words = ("--effect", where / "effect.csv", "--integer", "--move", "0.5")
    free = solved(where, *words)
    assert solved(where, *words, "--mip-max-nodes", "5000").counts() == free.counts()
    with pytest.raises(ConfigError, match="mip_max_nodes must be at least 1"):
        solved(where, *words, "--mip-max-nodes", "0")


def test_worked_example_equals_its_golden_mix(tmp_path):
    out = tmp_path / "mix.json"
    effect, base = WORKED / "effect.csv", WORKED / "base.csv"
    solve("--effect", effect, "--base", base, "--guard", "0.2", "--out", out)
    found, golden = json.loads(out.read_text()), json.loads((WORKED / "mix.json").read_text())
    for mix in (found, golden):
        for key in ("seconds", "version", "iterations", "rows"):
            mix["solver"].pop(key)

    def compare(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for k, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}[{k}]")
        elif isinstance(a, float):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-12), where
        else:
            assert a == b, where

    compare(found, golden, "mix")


def test_mix_json_has_the_promised_keys(files):
    where = files()
    solved(where, "--effect", where / "effect.csv")
    mix = json.loads((where / "mix.json").read_text())
    promised = {"status", "objective", "base_objective", "categories", "targets"}
    assert promised | {"move_price", "budget_price", "solver"} <= mix.keys()
    category = {"category", "base", "count", "share", "reduced_cost", "supply_price", "at"}
    assert category <= mix["categories"][0].keys()
    assert {"target", "base_effect", "effect", "guard_price"} <= mix["targets"][0].keys()
    assert {"name", "version", "seconds"} <= mix["solver"].keys()
    assert mix["objective"] == pytest.approx(123.6666666667)


def test_csv_parquet_and_npy_give_the_same_mix(files):
    where = files()
    values = np.array([[1, 0.5, 0], [0.2, 1, 0.1], [-0.3, 0.1, 1]])
    np.save(where / "effect.npy", values)
    table = {"target": ["a", "b", "c"]} | {n: values[:, j] for j, n in enumerate("abc")}
    pq.write_table(pa.table(table), where / "effect.parquet")
    counts = [
        solved(where, "--effect", where / f"effect{s}").counts()
        for s in (".csv", ".parquet", ".npy")
    ]
    assert counts[0] == counts[1] == counts[2]


def test_a_npy_matrix_goes_with_tables_of_either_order(files):
    where = files(turned="target,c,a,b\nb,0.1,0.2,1\nc,1,-0.3,0.1\na,0,1,0.5\n", errors=ERRORS)
    errors = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    np.save(where / "errors.npy", errors)
    np.save(where / "effect.npy", np.array([[1, 0.5, 0], [0.2, 1, 0.1], [-0.3, 0.1, 1]]))
    words = ["--objective", "concave", "--effect", where / "turned.csv"]
    words += ["--remove", where / "effect.npy"]
    expected = solved(where, *words, "--stderr", where / "errors.csv")
    found = solved(where, *words, "--stderr", where / "errors.npy")
    assert replace(found, solver=expected.solver) == expected
    straight = solved(where, "--effect", where / "effect.csv")
    assert found.counts() == pytest.approx(straight.counts()), "removing is as adding"
    assert {t.target: t.base_effect for t in found.targets} == {
        t.target: pytest.approx(t.base_effect) for t in straight.targets
    }


def test_rows_and_columns_are_matched_by_name_not_by_place(files):
    where = files(turned="target,c,a,b\nb,0.1,0.2,1\nc,1,-0.3,0.1\na,0,1,0.5\n")
    straight = solved(where, "--gamma", where / "effect.csv")
    assert solved(where, "--gamma", where / "turned.csv").counts() == straight.counts()


def test_targets_need_not_be_sources(files):
    where = files(effect="target,a,b,c\nbench,1,2,0\na,1,0,0\n", limits="importance: {bench: 1}\n")
    mix = solved(where, "--effect", where / "effect.csv", "--limits", where / "limits.yaml")
    assert [t.importance for t in mix.targets] == [1, 0]
    assert mix.categories[1].at == "supply"


def test_empty_cell_is_not_identifiable_but_nan_is_an_error(files):
    where = files(effect="target,a,b,c\na,1,,0\nb,0.2,1,0.1\nc,-0.3,0.1,1\n")
    mix = solved(where, "--effect", where / "effect.csv")
    assert mix.categories[1].score == pytest.approx(1.1 / 3)
    assert "1 of 9 effects were not identifiable" in mix.notes[0]
    files(effect="target,a,b,c\na,1,nan,0\nb,0.2,1,0.1\nc,-0.3,0.1,1\n")
    with pytest.raises(DataError, match="finite number in column 'b' of row 'a'"):
        solve("--effect", where / "effect.csv", "--base", where / "base.csv", "--out", "-")


def test_limits_file_sets_groups_limits_and_guards(files):
    limits = """
groups: {ab: {categories: [a, b], max: 190}}
categories: {c: {upper: 115}, a: {lower: 80}}
guards: {a: 30}
"""
    where = files(limits=limits)
    mix = solved(where, "--effect", where / "effect.csv", "--limits", where / "limits.yaml")
    counts = mix.counts()
    assert counts["c"] <= 115 and counts["a"] >= 80 and counts["a"] + counts["b"] <= 190
    assert mix.groups[0].group == "ab" and mix.groups[0].upper == 190
    assert mix.targets[0].guard == 30 and mix.targets[1].guard is None


def test_a_category_whose_name_is_a_number_has_limits(files):
    where = files(
        base="category,count\n2024,100\n2025,100\n",
        effect="target,2024,2025\n2024,1,0\n2025,0,2\n",
        limits="categories: {2025: {upper: 105}}\n",
    )
    mix = solved(where, "--effect", where / "effect.csv", "--limits", where / "limits.yaml")
    assert mix.counts() == {"2024": 95, "2025": 105}


@pytest.mark.parametrize(
    ("files_", "words", "said"),
    [
        ({"base": "category,count\na,1\na,2\n"}, [], "different names, found 'a'"),
        ({"base": "category,count\na,1\nb,x\n"}, [], "column 'count' of row 'b'"),
        (
            {"base": "category,count\na,-1\nb,2\nc,3\n"},
            [],
            "every base count must be a number >= 0",
        ),
        ({"base": "category,count\na,0\nb,0\nc,0\n"}, [], "all 3 counts are 0"),
        ({"base": "category,weight\na,1\n"}, [], "expected the columns category,count"),
        ({"base": "category,count\na,1\nb,1\nd,1\n"}, [], "missing: ['d'], unknown: ['c']"),
        ({"effect": "target,a,b,c\na,1,2\n"}, [], "header has 4 columns but table row 2 has 3"),
        ({"effect": "target,a,b,c\na,1,2,inf\n"}, [], "found 'inf'"),
        ({"effect": ""}, [], "found an empty file"),
        ({}, ["--budget", "0"], "budget must be a finite number > 0, found 0.0"),
        ({}, ["--budget", "nan"], "budget must be a finite number > 0, found nan"),
        ({}, ["--budget", "600"], "less than the budget of 600"),
        ({}, ["--move", "1.5"], "move must be a finite number >= 0 and <= 1"),
        ({}, ["--unit", "tokens"], "mean tokens per example"),
        ({}, ["--objective", "robust"], "needs the standard error"),
        ({}, ["--objective", "concave"], "needs the effect of removing"),
        ({}, ["--max-categories", "0"], "max_categories must be at least 1"),
        ({"limits": "group: {}\n"}, [], "unknown keys ['group']"),
        ({"limits": "guards: {zz: 1}\n"}, [], "unknown targets ['zz']"),
        ({"limits": "groups: {g: {min: 5, max: 3}}\n"}, [], "0 <= min <= max"),
        ({"limits": "categories: {a: {supply: 3}}\n"}, [], "supply of category 'a' is given twice"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2(files, files_, words, said):
    where = files(**files_)
    if "limits" in files_:
        words = [*words, "--limits", where / "limits.yaml"]
    with pytest.raises(InstructMixError) as caught:
        solve("--effect", where / "effect.csv", "--base", where / "base.csv", "--out", "-", *words)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_flag_that_repeats_a_column_is_refused(files):
    where = files(base="category,count,cap\na,100,5\nb,100,5\nc,100,5\n")
    words = ["--effect", where / "effect.csv", "--base", where / "base.csv", "--out", "-"]
    with pytest.raises(ConfigError, match="keep one of them"):
        solve(*words, "--cap", "0.1")
    assert solve(*words) == 0


def test_gamma_must_be_square_and_effect_need_not_be(files):
    where = files(effect="target,a,b,c\nx,1,2,0\n")
    with pytest.raises(DataError, match="gamma is square"):
        solve("--gamma", where / "effect.csv", "--base", where / "base.csv", "--out", "-")
    assert solve("--effect", where / "effect.csv", "--base", where / "base.csv", "--out", "-") == 0


def test_missing_file_and_unwritable_place_are_named(files, tmp_path):
    where = files()
    with pytest.raises(DataError, match=r"nope\.csv: no such file"):
        solve("--effect", where / "nope.csv", "--base", where / "base.csv", "--out", "-")
    with pytest.raises(ConfigError, match="cannot be written"):
        solve(
            "--effect",
            where / "effect.csv",
            "--base",
            where / "base.csv",
            "--out",
            tmp_path / "no" / "mix.json",
        )


def test_command_runs_as_a_program_with_exit_codes(files):
    where = files()
    words = [
        sys.executable, "-m", "system.cli", "solve", "--base", where / "base.csv", "--out", "-",
    ]  # fmt: skip
    good = subprocess.run(
        [*words, "--effect", where / "effect.csv"], capture_output=True, text=True, cwd=ROOT
    )
    assert good.returncode == 0
    assert Mix.from_json(good.stdout).status == "optimal"
    bad = subprocess.run(
        [*words, "--effect", where / "effect.csv", "--budget", "9999"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("instructmix: ") and "Traceback" not in bad.stderr


def test_help_needs_neither_numpy_nor_highspy():
    code = (
        "import argparse, sys; from system.solve.command import add_arguments;"
        "add_arguments(argparse.ArgumentParser());"
        "print([m for m in ('numpy', 'highspy', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_text_that_is_no_mix_is_refused():
    with pytest.raises(DataError, match=r"expected the text of a mix\.json"):
        Mix.from_json("{}")


def test_the_regret_of_the_worked_example_is_written_on_request(tmp_path):
    effect, base = WORKED / "effect.csv", WORKED / "base.csv"
    errors = tmp_path / "stderr.csv"
    errors.write_text((WORKED / "stderr.csv").read_text().replace("0.0001", "0.002"))
    found = {}
    for draws in ("1", "200"):
        out = tmp_path / f"{draws}.json"
        solve(
            "--effect", effect, "--base", base, "--stderr", errors, "--regret", draws, "--out", out
        )
        found[draws] = json.loads(out.read_text())["expected_regret"]
    assert found["200"] > 0 and found["1"] != found["200"]
    with pytest.raises(InstructMixError, match="standard errors"):
        solve("--effect", effect, "--base", base, "--regret", "5", "--out", tmp_path / "x.json")
    with pytest.raises(InstructMixError, match="at least one draw"):
        solve("--effect", effect, "--base", base, "--regret", "0", "--out", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
