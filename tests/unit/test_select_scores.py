"""Where scores come from: the user's function, the corpus' column, the base model."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from selection_world import corpus_of, hex_id, make_features, rows

from actors.pipeline import STAGES, stage_inputs
from system.config import RunConfig, SelectConfig
from system.config.load import parse_config
from system.errors import ConfigError, DataError
from system.functions import UserFunction
from system.models.template import Encoded
from system.rundir import StageRecord
from system.selection import scores
from system.selection.choose import choose_rows
from system.selection.difficulty import _parts
from system.selection.scores import judge, read_scores, score_blocks

FUNCTIONS = """
import numpy as np
import pyarrow as pa

def length(rows):
    return [len(turns[-1]["content"]) for turns in rows["messages"].to_pylist()]

def as_array(rows):
    return np.array(length(rows), dtype=np.float32)

def as_arrow(rows):
    return pa.array(length(rows), pa.int32())

def some(rows):
    found = length(rows)
    found[0], found[-1] = None, float("nan")
    return found

def short(rows):
    return [1.0]

def words(rows):
    return ["much"] * rows.num_rows

def one_number(rows):
    return 3.0

def table(rows):
    return [[1.0]] * rows.num_rows

def broken(rows):
    raise ZeroDivisionError("x")

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> str:
    name = f"scorers_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


def rule(score: str, **changes: object) -> SelectConfig:
    return SelectConfig.model_validate({"method": "quality", "score": score, **changes})


@pytest.mark.parametrize("function", ["length", "as_array", "as_arrow"])
def test_a_users_function_orders_the_rows(tmp_path, module, function, monkeypatch):
    monkeypatch.setattr(scores, "FUNCTION_ROWS", 4)
    texts = ["x" * (1 + k * 7 % 23) for k in range(23)]
    corpus = corpus_of(tmp_path / "c", 10, rows(23, texts=texts))
    settings = rule(f"{module}:{function}")
    make_features(corpus, settings, str(tmp_path))
    chosen = choose_rows(corpus, "a", 5, settings, 0, str(tmp_path))
    longest = sorted(range(23), key=lambda k: -len(texts[k]))[:5]
    assert [bytes(row).hex() for row in chosen.ids] == [hex_id(k) for k in longest]
    shortest = choose_rows(corpus, "a", 1, rule(settings.score, order="lowest"), 0, str(tmp_path))
    assert bytes(shortest.ids[0]).hex() == hex_id(0)


def test_none_comes_last_and_nan_is_quarantined(tmp_path, module):
    corpus = corpus_of(tmp_path / "c", 30, rows(30))
    settings = rule(f"{module}:some")
    make_features(corpus, settings, str(tmp_path))
    chosen = choose_rows(corpus, "a", 30, settings, 0, str(tmp_path))
    names = sorted(hex_id(k) for k in range(30))
    assert bytes(chosen.ids[-1]).hex() == names[0]
    assert chosen.notes == {"no-score": 1}
    assert chosen.quarantined.to_pylist() == [
        {"id": names[-1], "category": "a", "reason": "score-not-finite"}
    ]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("short", r"expected 30 scores, one a row, found 1 \(on rows 0 to 29"),
        ("words", "expected numbers or None: could not convert"),
        ("one_number", "found float"),
        ("table", "expected numbers or None"),
        ("broken", "raised ZeroDivisionError: x"),
        ("absent", "expected a function 'absent'.*nothing of that name"),
        ("constant", "expected a function 'constant'.*found int"),
    ],
)
def test_a_function_that_does_something_else_is_named(tmp_path, module, name, match):
    corpus = corpus_of(tmp_path / "c", 30, rows(30))
    with pytest.raises(ConfigError, match=match) as caught:
        make_features(corpus, rule(f"{module}:{name}"), str(tmp_path))
    assert str(caught.value).startswith(f"select.score '{module}:{name}': ")


def test_a_module_that_is_not_there_or_does_not_import_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("no_such_module_at_all:f", "no_such_package_at_all.inner:f"):
        with pytest.raises(ConfigError, match=r"found none.*Start the command in"):
            UserFunction.here(name, "select.score").load()
    (tmp_path / "halfway_broken_module.py").write_text("import json\nraise RuntimeError('no')\n")
    with pytest.raises(ConfigError, match="importing 'halfway_broken_module' failed with Runtime"):
        UserFunction.here("halfway_broken_module:f", "select.score").load()


def test_scores_that_are_missing_are_an_error_not_a_guess(tmp_path, module):
    corpus = corpus_of(tmp_path / "c", 30, rows(30))
    (shard,) = corpus.shards("train", "a")
    with pytest.raises(DataError, match="expected the scores of 30 rows, found no file"):
        read_scores(corpus, shard, rule("loss"), str(tmp_path))


def test_blocks_are_cut_by_rows_and_the_column_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "ENGINE_ROWS", 8)
    corpus = corpus_of(tmp_path, 20, rows(30))
    cut = [(block.start, block.rows) for block in score_blocks(corpus, rule("ifd"))]
    assert cut == [(0, 8), (8, 8), (16, 4), (0, 8), (8, 2)]
    assert len({block.path for block in score_blocks(corpus, rule("ifd"))}) == 5
    assert score_blocks(corpus, rule("column")) == []
    assert score_blocks(corpus, SelectConfig(score="ifd")) == []


def test_an_instruction_that_does_not_help_puts_its_row_behind():
    table = judge(np.array([0.4, 1.0, 1.7, math.inf, math.nan]), "ifd")
    assert table["reason"].to_pylist() == [
        None, "ifd-not-below-one", "ifd-not-below-one", "score-not-finite", "score-not-finite",
    ]  # fmt: skip
    assert table["is_usable"].to_pylist() == [True, True, True, False, False]
    assert judge(np.array([1.7]), "loss")["reason"].to_pylist() == [None]


def test_each_response_stands_alone_behind_the_opening():
    row = Encoded(
        input_ids=np.array([9, 1, 2, 3, 9, 4, 5], np.int32),
        response_mask=np.array([0, 0, 1, 1, 0, 1, 1], bool),
    )
    parts = [(ids.tolist(), mask.tolist()) for ids, mask in _parts(row, [7, 8])]
    assert parts == [
        ([7, 8, 2, 3], [False, False, True, True]),
        ([7, 8, 4, 5], [False, False, True, True]),
    ]
    assert _parts(row, None) == [(row.input_ids, row.response_mask)]


def config(**select: object) -> RunConfig:
    value = {
        "run_dir": "r", "model": {"path": "builtin:tiny"},
        "sources": [{"path": "a", "score_column": "s", "embedding_column": "v"}],
        "solve": {"budget": 3}, "select": select,
    }  # fmt: skip
    return parse_config(value, where="test")


def select_inputs(**select: object) -> dict[str, object]:
    (stage,) = [stage for stage in STAGES if stage.name == "select"]
    record = StageRecord(
        stage="x", fingerprint="0" * 16, inputs={}, outputs={}, counts={}, lines=(), seconds=0.0,
        finished="", versions={},
    )  # fmt: skip
    return stage_inputs(stage, config(**select), dict.fromkeys(stage.after, record))


def test_the_fingerprint_holds_what_the_method_reads_and_no_more(module, tmp_path):
    assert select_inputs() == select_inputs(score="ifd", embedding="model", max_similarity=0.3)
    quality = select_inputs(method="quality")
    assert quality == select_inputs(method="quality", embedding="model", block_rows=64)
    for changes in ({"score": "loss"}, {"order": "lowest"}, {"repeats": False}):
        assert select_inputs(method="quality", **changes) != quality
    diverse = select_inputs(method="quality+diversity")
    for changes in ({"embedding": "model"}, {"max_similarity": 0.8}, {"score": "ifd"}):
        assert select_inputs(method="quality+diversity", **changes) != diverse
    cover = select_inputs(method="facility-location")
    assert cover == select_inputs(method="facility-location", score="ifd", max_similarity=0.1)
    assert cover != select_inputs(method="facility-location", block_rows=64)
    named = select_inputs(method="quality", score=f"{module}:length")
    (tmp_path / f"{module}.py").write_text(FUNCTIONS + "\n# other\n")
    assert select_inputs(method="quality", score=f"{module}:length") != named
    with pytest.raises(ConfigError, match="expected a module 'no_such_module_at_all'"):
        select_inputs(method="quality", score="no_such_module_at_all:f")


@pytest.mark.parametrize("score", ["losss", "module", "a:b:c", ":f", "a b:c"])
def test_a_score_of_no_known_form_is_refused(score):
    with pytest.raises(ConfigError, match=r"select\.score: expected column, loss, ifd, or"):
        config(method="quality", score=score)


@pytest.mark.parametrize(
    ("select", "column"),
    [
        ({"method": "quality"}, "score_column"),
        ({"method": "quality+diversity", "score": "ifd", "embedding": "column"},
         "embedding_column"),
    ],
)  # fmt: skip
def test_a_column_that_no_source_names_is_refused_before_anything_starts(select, column):
    value = config(**select).model_dump(mode="json")
    value["sources"] = [{"path": "a"}]
    with pytest.raises(ConfigError, match=f"is `column`, but no source sets {column}"):
        parse_config(value, where="test")
    value["select"]["method"] = "random"
    parse_config(value, where="test")
