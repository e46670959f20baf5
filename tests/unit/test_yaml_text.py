"""YAML that cannot be read ends in one sentence, and no text takes long."""

import pytest

from system.yaml_text import parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 20)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}\n" for k in range(1, 60)
)
REFUSED = {
    "day 45": ("!!timestamp 2020-13-45", "month"),
    "no date": ("!!timestamp soon", "built"),
    "no number": ("!!int abc", "abc"),
    "no real number": ("!!float abc", "abc"),
    "no truth value": ("!!bool perhaps", "perhaps"),
    "5,000 digits": ("9" * 5000, "4300"),
    "5,000 hexadecimal digits": ("0x" + "f" * 5000, "300 digits"),
    "bytes": ("!!binary aGVsbG8=", "bytes"),
    "no bytes": ("!!binary é", "base64|ascii"),
    "a set": ("!!set {a, b}", "set"),
    "pairs": ("!!pairs [a: 1]", "tuple"),
    "code": ("!!python/object/apply:os.system ['true']", "constructor"),
    "3,000 brackets": ("[" * 3000, "nested too deeply"),
    "3,000 closed brackets": ("[" * 3000 + "]" * 3000, "nested too deeply"),
    "200 mappings": ("{a: " * 200 + "1" + "}" * 200, "100 deep"),
    "100,000 dashes": ("- " * 100_000, "nested too deeply"),
    "a list in itself": ("&a [*a]", "part of"),
    "a mapping in itself": ("a: &a {b: {c: *a}}", "part of"),
    "a key in itself": ("&a {? *a : 1}", "part of|unhashable"),
    "a merge of itself": ("&a {<<: *a}", "part of"),
    "an alias bomb": (BOMB, "1,000,000"),
    "a merge bomb": (MERGE_BOMB, "1,000,000"),
    "a key twice": ("a: 1\nb: 2\na: 3", "'a' occurs twice in line 3"),
    "a list as key": ("? [a]\n: 1", "unhashable"),
    "an unknown alias": ("*a", "undefined alias"),
    "two documents": ("a: 1\n---\nb: 2", "document"),
    "NUL": ('"a\\0b"', "no text may hold"),
    "half a character": ('"\\ud800"', "no text may hold"),
    "control characters": ("a\x07b", "unacceptable character|special characters"),
    "a tab": ("a:\n\tb: 1", "tab|token"),
    "too long": ("a" * (16 * 2**20 + 1), "characters"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", REFUSED)
def test_yaml_that_cannot_be_read_says_why(name: str) -> None:
    text, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", {"a": {"b": 1}, "c": {"b": 1},
                                                  "d": {"b": 1, "e": 2}}),
        ("{0: zero, 1.5: x, true: y, null: z}", {0: "zero", 1.5: "x", True: "y", None: "z"}),
        ("[.inf, 1e3, 1_000, 0x10]", [float("inf"), "1e3", 1000, 16]),
    ],
)  # fmt: skip
def test_ordinary_yaml_is_read(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_what_an_alias_repeats_can_be_changed_alone() -> None:
    value = parse_yaml("a: &x {b: [1]}\nc: *x")
    value["a"]["b"].append(2)
    assert value["c"] == {"b": [1]}
