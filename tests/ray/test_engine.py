"""One real vLLM engine in this process: exact, order-free, robust against poison rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_builders import CONTEXT, SETTINGS, VOCABULARY, build_model, per_token, token_table

from system import schema
from system.errors import DataError, ModelError, StageError
from system.models.base import load_model
from system.models.chat import encode_prompt
from system.scoring.engine import Engine
from system.scoring.llm import BLOCK_TOKENS
from system.scoring.parity import ParityTest
from system.scoring.score import NOT_FINITE, score_reference, score_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [build_model(root / f"m{seed}", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def engine(model_dirs: list[str]) -> Engine:
    return Engine(model_dirs[0], SETTINGS)


@pytest.fixture(autouse=True)
def base_weights(engine: Engine, model_dirs: list[str]) -> None:
    engine.reload(model_dirs[0])


def test_losses_equal_transformers_within_a_thousandth_of_a_nat_per_token(engine, model_dirs):
    tokens = token_table(40)
    scored = score_tokens(engine, tokens)
    expected = score_reference(load_model(model_dirs[0]), tokens)
    assert scored.rejected == {}
    assert scored.table.schema == schema.SCORES
    assert scored.table["id"].to_pylist() == tokens["id"].to_pylist()
    assert scored.table["num_tokens"] == expected.table["num_tokens"]
    np.testing.assert_allclose(per_token(scored.table), per_token(expected.table), atol=1e-4)


def test_reloaded_weights_give_the_losses_of_the_new_weights_and_back(engine, model_dirs):
    tokens = token_table(12, seed=3)
    first = score_tokens(engine, tokens).table
    engine.reload(model_dirs[1])
    second = score_tokens(engine, tokens).table
    expected = score_reference(load_model(model_dirs[1]), tokens).table
    np.testing.assert_allclose(per_token(second), per_token(expected), atol=1e-4)
    assert np.abs(per_token(first) - per_token(second)).min() > 1e-3
    engine.reload(model_dirs[0])
    assert score_tokens(engine, tokens).table.equals(first)


def test_losses_do_not_depend_on_the_order_or_the_company_of_rows(engine):
    tokens = token_table(60, seed=5)
    losses = per_token(score_tokens(engine, tokens).table)
    order = np.random.default_rng(1).permutation(60)
    shuffled = per_token(score_tokens(engine, tokens.take(pa.array(order))).table)
    np.testing.assert_allclose(shuffled, losses[order], rtol=0, atol=1e-5)
    alone = [per_token(score_tokens(engine, tokens.slice(row, 1)).table)[0] for row in (0, 7, 59)]
    np.testing.assert_allclose(alone, losses[[0, 7, 59]], rtol=0, atol=1e-5)


def test_a_row_beyond_the_context_is_an_error_that_names_it(engine):
    long = token_table(1, longest=CONTEXT + 1).set_column(0, "id", pa.array(["too-long"]))
    with pytest.raises(DataError, match=rf"too-long has {CONTEXT + 1} tokens.*{CONTEXT}"):
        score_tokens(engine, pa.concat_tables([token_table(2), long.cast(schema.TOKENS)]))


def test_a_token_outside_the_vocabulary_is_an_error_that_names_its_row(engine):
    table = token_table(1).set_column(2, "input_ids", pa.array([[1, VOCABULARY] * (CONTEXT // 2)]))
    with pytest.raises(DataError, match=f"row0000 has the token {VOCABULARY}"):
        score_tokens(engine, table.cast(schema.TOKENS))


def test_a_row_without_response_token_is_an_error_that_names_it(engine):
    table = token_table(1).set_column(3, "response_mask", pa.array([[True] + [False] * 159]))
    with pytest.raises(DataError, match="row0000 has no response token"):
        score_tokens(engine, table.cast(schema.TOKENS))


def fail_on(engine: Engine, token: int):
    """Makes the engine's own model raise whenever it reads the token; returns the way back."""

    def hook(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if bool((ids == token).any()):
            raise RuntimeError("injected fault")

    def install(model):
        return model.register_forward_pre_hook(hook, with_kwargs=True)

    return engine._llm.apply_model(install)[0]


def with_token(tokens: pa.Table, rows: list[int], token: int) -> pa.Table:
    """The table with `token` in the given rows and in no other."""
    ids = [[t if t != token else token - 1 for t in row] for row in tokens["input_ids"].to_pylist()]
    for row in rows:
        ids[row][1] = token
    return tokens.set_column(2, "input_ids", pa.array(ids)).cast(schema.TOKENS)


def test_a_poison_row_is_quarantined_and_the_others_keep_their_losses(engine):
    tokens = with_token(token_table(30, seed=8), [4, 21], 77)
    healthy = per_token(score_tokens(engine, tokens).table)
    handle = fail_on(engine, 77)
    try:
        scored = score_tokens(engine, tokens)
    finally:
        handle.remove()
    assert sorted(scored.rejected) == ["row0004", "row0021"]
    assert all("injected fault" in reason for reason in scored.rejected.values())
    assert scored.table.num_rows == 28
    np.testing.assert_allclose(
        per_token(scored.table), np.delete(healthy, [4, 21]), rtol=0, atol=1e-5
    )
    assert score_tokens(engine, tokens).rejected == {}


def test_an_engine_that_fails_on_everything_is_an_error_not_a_quarantine(engine):
    tokens = with_token(token_table(40, seed=9), list(range(40)), 77)
    handle = fail_on(engine, 77)
    try:
        with pytest.raises(StageError, match="injected fault"):
            score_tokens(engine, tokens)
    finally:
        handle.remove()


def poison_embedding(model_dir: str, target: Path, tokens: list[int]) -> str:
    model = load_model(model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens] = float("nan")
    model.save_pretrained(target)
    return str(target)


def test_weights_with_nan_everywhere_are_an_error_that_says_so(engine, model_dirs, tmp_path):
    engine.reload(poison_embedding(model_dirs[0], tmp_path, list(range(VOCABULARY))))
    with pytest.raises(StageError, match="finite log-likelihood"):
        score_tokens(engine, token_table(3))


def test_a_row_with_nan_is_rejected_with_its_reason(engine):
    tokens = with_token(token_table(6, seed=2), [3], 77)

    def hook(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        bad = torch.zeros(len(output), 1)
        if bool((ids == 77).any()):
            place = int((ids == 77).nonzero()[0])
            bad[place] = float("nan")
        return output + bad

    def install(model):
        return model.register_forward_hook(hook, with_kwargs=True)

    only = tokens.slice(3, 1)
    mask = [[False] + [True] * (len(only["input_ids"][0]) - 1)]
    only = only.set_column(3, "response_mask", pa.array(mask)).cast(schema.TOKENS)
    tokens = pa.concat_tables([tokens.slice(0, 3), only, tokens.slice(4)])
    handle = engine._llm.apply_model(install)[0]
    try:
        scored = score_tokens(engine, tokens)
    finally:
        handle.remove()
    assert scored.rejected == {"row0003": NOT_FINITE}
    assert scored.table.num_rows == 5


def test_reloading_a_directory_without_weights_is_a_clear_error(engine, tmp_path):
    with pytest.raises(ModelError, match="safetensors"):
        engine.reload(str(tmp_path))


@pytest.mark.parametrize("prompt_tokens", [5, BLOCK_TOKENS, 3 * BLOCK_TOKENS - 1, 100])
def test_choices_that_share_a_cached_prompt_are_exact_at_every_block_border(
    engine, model_dirs, prompt_tokens
):
    rng = np.random.default_rng(prompt_tokens)
    prompts = rng.integers(0, VOCABULARY, (3, prompt_tokens)).tolist()
    prompts.append(prompts[0])
    shared = rng.integers(0, VOCABULARY, 2).tolist()
    candidates = [[5], [7, 9, 11], [*shared, 1], [*shared, 2], shared]
    found = engine.choose(prompts, candidates)
    rows, masks = [], []
    for prompt in prompts:
        for candidate in candidates:
            rows.append(prompt + candidate)
            masks.append([False] * len(prompt) + [True] * len(candidate))
    tokens = pa.table(
        {"id": [str(n) for n in range(20)], "category": ["x"] * 20, "input_ids": rows,
         "response_mask": masks},
        schema=schema.TOKENS,
    )  # fmt: skip
    expected = score_reference(load_model(model_dirs[0]), tokens).table["nll"]
    np.testing.assert_allclose(found, -np.array(expected).reshape(4, 5), rtol=0, atol=1e-4)
    again = engine.choose(prompts, candidates)
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-5)


def test_generation_is_the_greedy_continuation_of_transformers(engine, model_dirs):
    model = load_model(model_dirs[0])
    tokenizer = engine.tokenizer
    texts = ["what is two plus three", "name the capital", "plus"]
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": text}], CONTEXT) for text in texts
    ]
    answers = engine.generate(prompts, 12).texts
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(12):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert answer == expected
    assert len(set(answers)) == 3


def test_generation_stops_at_the_ids_it_is_given(engine):
    prompt = engine.tokenizer("name the capital")["input_ids"]
    longest = engine.generate([prompt], 12).texts[0]
    assert longest
    ids = engine.tokenizer(longest)["input_ids"]
    first = next(i for i in range(VOCABULARY) if engine.tokenizer.decode([i]) == longest[0])
    assert engine.generate([prompt], 12, [first, ids[0]]).texts[0] in ("", longest[0])


def test_a_prompt_on_which_the_engine_fails_is_named_and_has_no_answer(engine):
    prompts = [[5, 6, 7], [5, 77, 7, 8], [9, 10]]
    handle = fail_on(engine, 77)
    try:
        found = engine.generate(prompts, 4)
    finally:
        handle.remove()
    assert list(found.failures) == [1] and "injected fault" in found.failures[1]
    assert found.texts[1] is None
    assert None not in (found.texts[0], found.texts[2])


def test_an_engine_that_differs_from_transformers_is_refused(engine, model_dirs):
    other = ParityTest.of(
        model_dirs[1],
        vocab_size=VOCABULARY,
        max_length=CONTEXT,
        dtype="float32",
        trust_remote_code=False,
        seed=0,
    )
    with pytest.raises(ModelError, match="differ by"):
        other.check(engine)
    engine.reload(model_dirs[1])
    other.check(engine)
