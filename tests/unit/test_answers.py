from __future__ import annotations

import pyarrow as pa
from answer_rows import (
    corpus_of,
    tokenizer,  # noqa: F401  (a fixture)
)
from transformers import PreTrainedTokenizerFast

from system.data.corpus import Corpus
from system.scoring.answers import ANSWERS, Generated, ask, check_answers, draw_rows, end_of_turn


def draw(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rows: int, seed: int = 0):
    tables = [draw_rows(corpus, "test", category, rows, seed) for category in corpus.categories]
    return ask(pa.concat_tables(tables), tokenizer, max_prompt_tokens=100)


def test_only_rows_with_an_answer_are_asked(tmp_path, tokenizer):
    corpus = corpus_of(
        tmp_path, {"math": [("1+1?", "2"), ("hm?", None), ("2+2?", "4")], "talk": [("hi", None)]}
    )
    questions = draw(corpus, tokenizer, 10)
    assert sorted(questions.rows["answer"].to_pylist()) == ["2", "4"]
    texts = [tokenizer.decode(prompt) for prompt in questions.prompts]
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert not any("####" in text for text in texts)


def test_a_smaller_draw_is_the_start_of_a_larger_one_and_seeds_differ(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, {"math": [(f"{n}?", str(n)) for n in range(40)]})
    many = draw(corpus, tokenizer, 20).rows["id"].to_pylist()
    assert draw(corpus, tokenizer, 5).rows["id"].to_pylist() == many[:5]
    assert set(draw(corpus, tokenizer, 5, seed=1).rows["id"].to_pylist()) != set(many[:5])


def test_the_end_of_a_turn_is_what_the_template_ends_it_with(tokenizer):
    assert end_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_outputs_are_checked_against_the_expected_answers(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, {"math": [("1+1?", "2"), ("2+2?", "4")]})
    questions = draw(corpus, tokenizer, 2)
    expected = questions.rows["answer"].to_pylist()
    outputs: list[str | None] = [f"I say #### {expected[0]}.0", "#### 99"]
    answers, rejected = check_answers(questions, Generated(texts=outputs, failures={}), tokenizer)
    assert rejected == {}
    assert answers.schema == ANSWERS
    assert answers["correct"].to_pylist() == [True, False]
    assert answers["expected"].to_pylist() == expected
    failed = Generated(texts=[None, "#### 99"], failures={0: "out of memory"})
    answers, rejected = check_answers(questions, failed, tokenizer)
    assert answers["correct"].to_pylist() == [False]
    assert rejected == {questions.rows["id"][0].as_py(): "out of memory"}


def test_a_corpus_without_answers_asks_nothing(tmp_path, tokenizer):
    questions = draw(corpus_of(tmp_path, {"talk": [("hi", None)]}), tokenizer, 5)
    assert questions.rows.num_rows == 0
    assert questions.prompts == []
