from __future__ import annotations

import pyarrow as pa
import pytest
from ingest_builders import ingest, write_lines
from training_builders import (
    BACKWARDS,
    CHATML,
    FORGETFUL,
    LLAMA3,
    OPEN_THOUGHT,
    REASONING,
    SILENT,
    THINKING,
    ZEPHYR,
    build_tokenizer,
)

from system import schema
from system.config import SourceConfig
from system.errors import DataError, ModelError
from system.models.chat import encode, encode_prompt, encode_table
from system.models.template import template_profile

SINGLE = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "  The answer is 4."},
]
MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of Italy?"},
    {"role": "assistant", "content": "Rome is."},
    {"role": "user", "content": "Of France?"},
    {"role": "assistant", "content": "Paris\n"},
]
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR}
END = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "zephyr": "</s>"}


def spoken(tokenizer, encoded) -> list[str]:
    """The masked-in stretches, decoded."""
    stretches, current = [], []
    for token, said in zip(encoded.input_ids.tolist(), encoded.response_mask, strict=True):
        if said:
            current.append(token)
        elif current:
            stretches.append(current)
            current = []
    if current:
        stretches.append(current)
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in stretches]


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_covers_the_answer_and_its_end_of_turn_and_nothing_else(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    answer = SINGLE[1]["content"].strip() if name == "llama3" else SINGLE[1]["content"]
    encoded = encode(tokenizer, SINGLE, 512)
    assert spoken(tokenizer, encoded) == [answer + END[name]]
    rendered = tokenizer.apply_chat_template(SINGLE, tokenize=False)
    whole = tokenizer.decode(encoded.input_ids.tolist(), clean_up_tokenization_spaces=False)
    assert whole == rendered


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_assistant_turn_of_a_conversation_is_masked_in(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    last = "Paris" if name == "llama3" else "Paris\n"
    assert spoken(tokenizer, encode(tokenizer, MULTI, 512)) == [
        "Rome is." + END[name],
        last + END[name],
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_prompt_at_inference_is_the_prefix_that_training_saw(name, messages):
    tokenizer = build_tokenizer(TEMPLATES[name])
    encoded = encode(tokenizer, messages, 512)
    prompt = encode_prompt(tokenizer, messages, 512)
    ids = encoded.input_ids.tolist()
    assert ids[: len(prompt)] == prompt
    assert encoded.response_mask[len(prompt)] and not encoded.response_mask[len(prompt) - 1]


def test_white_space_at_the_border_is_never_shared_by_prompt_and_response():
    tokenizer = build_tokenizer(CHATML)
    messages = [SINGLE[0], {"role": "assistant", "content": "\n\n  indented"}]
    encoded = encode(tokenizer, messages, 512)
    assert spoken(tokenizer, encoded) == ["\n\n  indented<|im_end|>"]


def test_sentencepiece_like_tokenizer_keeps_its_text_and_gets_an_exact_mask():
    tokenizer = build_tokenizer(CHATML, metaspace=True)
    assert not template_profile(tokenizer, CHATML).cuts_text
    messages = [SINGLE[0], {"role": "assistant", "content": "The answer is 4."}]
    encoded = encode(tokenizer, messages, 512)
    whole = tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False
    )["input_ids"]
    assert encoded.input_ids.tolist() == whole
    said = [token for token, is_said in zip(whole, encoded.response_mask, strict=True) if is_said]
    assert tokenizer.convert_ids_to_tokens(said)[-1] == "<|im_end|>"
    text = "".join(tokenizer.convert_ids_to_tokens(said)).replace("▁", " ")
    assert text == "The answer is 4.<|im_end|>"


def test_template_that_rewrites_history_trains_the_last_turn_only():
    tokenizer = build_tokenizer(THINKING)
    assert not template_profile(tokenizer, THINKING).keeps_history
    said = spoken(tokenizer, encode(tokenizer, MULTI, 512))
    assert said == ["<think>\n\n</think>\n\nParis\n<|im_end|>"]


def test_generation_prompt_that_opens_a_thought_does_not_hide_the_answer():
    tokenizer = build_tokenizer(OPEN_THOUGHT)
    assert not template_profile(tokenizer, OPEN_THOUGHT).opens_as_prompted
    messages = [SINGLE[0], {"role": "assistant", "content": "<think> is what it starts with"}]
    said = spoken(tokenizer, encode(tokenizer, messages, 512))
    assert said == ["<think> is what it starts with</s>"]


@pytest.mark.parametrize("template", [BACKWARDS, SILENT], ids=["backwards", "silent"])
def test_unusable_template_is_refused_with_the_rendered_sample(template):
    with pytest.raises(ModelError, match="capital of France"):
        encode(build_tokenizer(template), SINGLE, 512)


def test_tokenizer_without_template_is_refused():
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        encode(build_tokenizer(None), SINGLE, 512)


def test_truncation_cuts_the_end_and_keeps_ids_and_mask_aligned():
    tokenizer = build_tokenizer(CHATML)
    whole, cut = encode(tokenizer, MULTI, 512), encode(tokenizer, MULTI, 30)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:30]
    assert cut.response_mask.tolist() == whole.response_mask.tolist()[:30]


def build_table(conversations: list) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([f"id{k}" for k in range(len(conversations))]),
            "category": pa.array(["chat"] * len(conversations)),
            "messages": pa.array(conversations, type=schema.MESSAGES),
        }
    )


def test_table_equals_row_by_row_encoding_and_counts_what_it_drops():
    tokenizer = build_tokenizer(
        "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        + CHATML
    )
    lost = [{"role": "user", "content": "sea " * 200}, {"role": "assistant", "content": "Yes."}]
    refused = [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]
    tokens, dropped = encode_table(
        build_table([SINGLE, lost, MULTI, refused]), tokenizer, max_length=120
    )
    assert dropped == {"no-response-token": 1, "template-refused": 1}
    assert tokens.schema.equals(schema.TOKENS)
    assert tokens.column("id").to_pylist() == ["id0", "id2"]
    for row, messages in zip(tokens.to_pylist(), [SINGLE, MULTI], strict=True):
        alone = encode(tokenizer, messages, 120)
        assert row["input_ids"] == alone.input_ids.tolist()
        assert row["response_mask"] == alone.response_mask.tolist()


def test_table_with_nothing_left_is_an_empty_tokens_table():
    tokens, dropped = encode_table(build_table([MULTI]), build_tokenizer(CHATML), max_length=4)
    assert tokens.num_rows == 0 and dropped == {"no-response-token": 1}
    assert tokens.schema.equals(schema.TOKENS)


def test_conversation_without_an_answer_is_refused():
    with pytest.raises(DataError, match="assistant"):
        encode(build_tokenizer(CHATML), SINGLE[:1], 512)


def test_row_that_a_stable_template_rewrites_is_dropped_and_counted():
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}"
    )
    thought = [*MULTI[:2], {"role": "assistant", "content": "hm|Rome is."}, *MULTI[3:]]
    tokens, dropped = encode_table(build_table([MULTI, thought]), build_tokenizer(template), 512)
    assert tokens.num_rows == 1 and dropped == {"not-prefix-stable": 1}


def marked(turn: dict, **marks: object) -> dict:
    return {**turn, **marks}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_without_a_loss_is_read_but_not_masked_in(name):
    tokenizer = build_tokenizer(TEMPLATES[name])
    last = "Paris" if name == "llama3" else "Paris\n"
    muted = [*MULTI[:2], marked(MULTI[2], loss=False), *MULTI[3:]]
    encoded, plain = encode(tokenizer, muted, 512), encode(tokenizer, MULTI, 512)
    assert spoken(tokenizer, encoded) == [last + END[name]]
    assert encoded.input_ids.tolist() == plain.input_ids.tolist()
    assert encode_prompt(tokenizer, muted, 512) == encode_prompt(tokenizer, MULTI, 512)


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
def test_nothing_after_the_last_learned_turn_is_encoded(template):
    tokenizer = build_tokenizer(template)
    muted = [*MULTI[:-1], marked(MULTI[-1], loss=False)]
    encoded, short = encode(tokenizer, muted, 512), encode(tokenizer, MULTI[:3], 512)
    assert encoded.input_ids.tolist() == short.input_ids.tolist()
    assert encoded.response_mask.tolist() == short.response_mask.tolist()


def test_sentencepiece_like_tokenizer_leaves_turns_without_a_loss_out_of_the_mask():
    tokenizer = build_tokenizer(CHATML, metaspace=True)
    muted = [*MULTI[:2], marked(MULTI[2], loss=False), *MULTI[3:]]
    encoded, plain = encode(tokenizer, muted, 512), encode(tokenizer, MULTI, 512)
    first_end = encoded.input_ids.tolist().index(
        tokenizer.convert_tokens_to_ids("<|im_end|>"), int(plain.response_mask.argmax())
    )
    assert not encoded.response_mask[: first_end + 1].any()
    assert encoded.response_mask[first_end + 1 :].tolist() == (
        plain.response_mask[first_end + 1 :].tolist()
    )


def test_reasoning_is_rendered_and_learned_where_the_template_knows_it():
    tokenizer = build_tokenizer(REASONING)
    thoughtful = [SINGLE[0], {"role": "assistant", "content": "4.", "reasoning": "2 + 2 = 4"}]
    said = ["<think>\n2 + 2 = 4\n</think>\n\n4.<|im_end|>"]
    assert spoken(tokenizer, encode(tokenizer, thoughtful, 512)) == said
    assert spoken(tokenizer, encode(tokenizer, SINGLE, 512)) == ["  The answer is 4.<|im_end|>"]


def test_only_the_last_turn_is_learned_where_the_template_forgets_earlier_reasoning():
    tokenizer = build_tokenizer(FORGETFUL)
    profile = template_profile(tokenizer, FORGETFUL)
    assert (profile.reasoning_key, profile.keeps_history) == ("thinking", True)
    assert not profile.keeps_reasoning
    turns = [marked(turn, reasoning=f"hm {k}") for k, turn in enumerate(MULTI)]
    turns = [turn if turn["role"] == "assistant" else MULTI[k] for k, turn in enumerate(turns)]
    said = ["<think>\nhm 4\n</think>\n\nParis\n<|im_end|>"]
    assert spoken(tokenizer, encode(tokenizer, turns, 512)) == said
    assert len(spoken(tokenizer, encode(tokenizer, MULTI, 512))) == 2


def test_rows_whose_reasoning_the_template_does_not_render_are_left_out_by_name():
    thoughtful = [SINGLE[0], marked(SINGLE[1], reasoning="The answer")]
    table = build_table([SINGLE, thoughtful])
    tokens, dropped = encode_table(table, build_tokenizer(CHATML), 512)
    assert tokens.num_rows == 1 and dropped == {"reasoning-not-rendered": 1}
    with pytest.raises(DataError, match=r"ingest\.reasoning: drop"):
        encode(build_tokenizer(CHATML), thoughtful, 512)
    assert encode_table(table, build_tokenizer(REASONING), 512)[1] == {}


def test_a_mark_in_a_file_reaches_the_response_mask(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Capital {k}?"},
                {"role": "assistant", "content": "Quiet.", "weight": 0},
                {"role": "user", "content": "Again?"},
                {"role": "assistant", "content": "Said.", "weight": 1},
            ]
        }
        for k in range(60)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(path="rows.jsonl", category="c")
    table = pa.Table.from_pylist(ingest(tmp_path, source).rows())
    tokenizer = build_tokenizer(CHATML)
    tokens, dropped = encode_table(table, tokenizer, 512)
    assert (tokens.num_rows, dropped) == (60, {})
    for row in tokens.to_pylist():
        learned = [t for t, m in zip(row["input_ids"], row["response_mask"], strict=True) if m]
        assert tokenizer.decode(learned) == "Said.<|im_end|>"
        assert "Quiet." in tokenizer.decode(row["input_ids"])
