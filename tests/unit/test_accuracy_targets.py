"""Targets measured by right answers: which rows are asked, and what an answer counts."""

import json

import numpy as np
import pyarrow as pa
import pytest
from answer_rows import corpus_of, tokenizer  # noqa: F401  (a fixture)

from system import storage
from system.config import InfluenceConfig, IngestConfig
from system.data.corpus import Corpus
from system.errors import DataError
from system.influence.design.accuracy_targets import (
    QUESTIONS,
    check_some_vary,
    draw_accuracy_targets,
    score_answers,
)
from system.influence.design.external_targets import read_target
from system.scoring.answers import Generated

ROWS = {
    "math": [(f"{n}+{n}?", str(2 * n)) for n in range(12)],
    "few": [("1?", "1"), ("2?", None), ("3?", None)],
    "talk": [(f"hi {n}", None) for n in range(9)],
}


def estimate_corpus(folder) -> Corpus:
    """`corpus_of` with its rows in the estimate split."""
    corpus_of(folder, ROWS)
    uri = f"{folder}/manifest.json"
    manifest = storage.read_json(uri)
    for shard in manifest["shards"]:
        shard["split"] = "estimate"
    storage.write_json(uri, manifest)
    return Corpus.open(uri)


def draw(folder, tokenizer, num_rows=8, external=None):
    return draw_accuracy_targets(
        run_seed=0, corpus=estimate_corpus(folder), num_rows=num_rows, max_prompt_tokens=64,
        external=external or {}, tokenizer=tokenizer,
    )  # fmt: skip


def test_only_categories_with_verifiable_rows_are_targets(tmp_path, tokenizer):
    questions, targets, left_out = draw(tmp_path, tokenizer)
    assert [target.name for target in targets] == ["math"]
    assert targets[0].num_rows == questions.num_rows == 8
    assert {name.split(":")[0]: count for name, count in left_out.items()} == {"few": 1, "talk": 0}
    text = tokenizer.decode(questions["input_ids"][0].as_py())
    assert text.endswith("<|im_start|>assistant\n")
    smaller, *_ = draw(tmp_path, tokenizer, num_rows=5)
    assert smaller["id"].to_pylist() == questions["id"].to_pylist()[:5]


def test_no_verifiable_row_at_all_says_what_to_do(tmp_path, tokenizer):
    corpus_of(tmp_path, {"talk": ROWS["talk"]})
    with pytest.raises(DataError, match="answer_column"):
        draw_accuracy_targets(
            run_seed=0, corpus=Corpus.open(f"{tmp_path}/manifest.json"), num_rows=4,
            max_prompt_tokens=64, external={}, tokenizer=tokenizer,
        )  # fmt: skip


def test_a_further_target_needs_answers_too(tmp_path, tokenizer):
    corpus = estimate_corpus(tmp_path)
    named = corpus.sample("estimate", "math", 12, 0)
    _, targets, _ = draw(tmp_path, tokenizer, external={"bench": named})
    assert [target.name for target in targets] == ["math", "bench"]
    silent = corpus.sample("estimate", "talk", 9, 0)
    with pytest.raises(DataError, match=r"bench.*0 rows with a verifiable answer"):
        draw(tmp_path, tokenizer, external={"bench": silent})


@pytest.mark.parametrize(
    "where",
    [{"answer_pattern": "#### (.+)"}, {"answer_column": "final"}],
    ids=lambda w: next(iter(w)),
)
def test_a_further_target_s_answers_are_read_from_its_files(tmp_path, tokenizer, where):
    lines = [
        {"question": f"{n} and {n}?", "answer": f"so it is\n#### {2 * n}", "final": f"{2 * n}"}
        for n in range(9)
    ]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {"targets": {"bench": {"path": "bench.jsonl", **where}}, "metric": "accuracy"}
    source = InfluenceConfig.model_validate(values).target_sources["bench"]
    table, left_out = read_target(source, data_dir=str(tmp_path), ingest=IngestConfig(), exclude=())
    assert left_out == {}
    assert sorted(table["answer"].to_pylist()) == sorted(f"{2 * n}" for n in range(9))
    assert set(table["answer_pattern"].to_pylist()) == {where.get("answer_pattern")}
    questions, targets, _ = draw(tmp_path, tokenizer, external={"bench": table})
    assert [target.name for target in targets] == ["math", "bench"]
    assert questions["category"].to_pylist().count("bench") == 8


def test_the_answers_of_a_target_are_checked_when_the_configuration_is_read():
    targets = {"bench": {"path": "x", "answer_pattern": "no group"}}
    with pytest.raises(ValueError, match="exactly one group"):
        InfluenceConfig.model_validate({"targets": targets})


def wrote(*texts: str | None) -> Generated:
    failures = {place: "the engine failed" for place, text in enumerate(texts) if text is None}
    return Generated(texts=list(texts), failures=failures)


def test_a_wrong_answer_is_a_loss_of_one():
    questions = pa.table(
        {
            "id": ["a", "b", "c"], "category": ["math"] * 3, "input_ids": [[1]] * 3,
            "answer": ["4", "4", "yes"], "answer_pattern": ["#### (.+)", "#### (.+)", None],
            "stop_token_ids": [[0]] * 3,
        },
        schema=QUESTIONS,
    )  # fmt: skip
    found = score_answers(wrote("so #### 4.0", "4", "Yes."), questions)
    assert found.table["nll"].to_pylist() == [0.0, 1.0, 0.0]
    assert found.table["num_tokens"].to_pylist() == [1, 1, 1]
    with pytest.raises(ValueError, match="1 answers to 3 questions"):
        score_answers(wrote("4"), questions)
    lost = score_answers(wrote("#### 4", None, "no"), questions)
    assert lost.table["id"].to_pylist() == ["a", "c"], "a failed engine is no wrong answer"
    assert lost.table["nll"].to_pylist() == [0.0, 1.0]
    assert lost.rejected == {"b": "the engine failed"}


def test_runs_that_answer_alike_measure_nothing():
    with pytest.raises(DataError, match=r"all 2 runs .* 3 questions alike \(66.7% right\)"):
        check_some_vary({"r0": np.array([0.0, 0, 1]), "r1": np.array([0.0, 0, 1])})
    check_some_vary({"r0": np.array([0.0, 0, 1]), "r1": np.array([0.0, 1, 1])})
