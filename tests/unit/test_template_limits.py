"""Chat templates render as those of transformers, and none can work, recurse or write for ever."""

import pyarrow as pa
import pytest
from training_builders import CHATML, LLAMA3, THINKING, ZEPHYR, build_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from system.config import ModelConfig
from system.errors import ConfigError, ModelError
from system.models.base import model_identity
from system.models.chat import encode_rows
from system.models.jinja_limits import LimitedTemplate, TemplateLimitError
from system.models.template import compile_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of Italy?"},
    {"role": "assistant", "content": "<think>a</think>Rome <b>&'\" \u00e9"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, None, 0.5, "é"]}}}]
VALUES = {
    "tools": TOOLS, "documents": None, "add_generation_prompt": True,
    "bos_token": "<s>", "eos_token": "</s>",
}  # fmt: skip
LANGUAGE = (
    "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for m in messages[::-1] if m.role != 'system' %}{{ m['content'] | trim | upper }}\n"
    "{% else %}none{% endfor %}",
    "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }} {{ ns.seen | join(', ') }}",
    "{% macro show(x, depth) %}{% if x is mapping %}{% for k, v in x.items() %}{{ '  ' * depth }}"
    "{{ k }}:{{ show(v, depth + 1) }}{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}"
    "{{ show(tools[0], 1) }}",
    "{{ tools | tojson }}|{{ tools | tojson(indent=4) }}|{{ tools[0] | tojson(sort_keys=true) }}",
    "{% generation %}{% set x = 1 %}{{ messages[-1].content.split('</think>')[-1] }}"
    "{% endgeneration %}{{ x is defined }}",
    "{% for i in range(5) %}{% if i == 3 %}{% break %}{% elif i == 1 %}{% continue %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ '%s-%03d' % ('a', 7) }} {{ '{:>5}|{}'.format('x', 2) }} {{ '%s %s' | format(1, 2) }}",
    "{{ messages[0].content.replace('e', 'E') | replace('B', 'b') }}{{ none_such }}{{ none }}",
    "{%- if tools is not none and tools | length > 0 -%}\n  {{- 'yes' }}\n{%- endif %}\n tail",
    "{% set text %}{% for m in messages %}{{ m.role }},{% endfor %}{% endset %}"
    "{{ text ~ 1 ~ none }}",
    "{% filter upper %}{{ messages[1].content }}{% endfilter %}{{ (1, 2) }}{{ {'a': [1]} }}"
    "{{ 2 ** 5 }}{{ 7 // 2 % 2 }}",
    "{% macro wrap() %}[{{ caller() }}]{% endmacro %}{% call wrap() %}in{% endcall %}",
    "{% for item in [[1, [2]], [3]] recursive %}{{ item if item is number else loop(item) }}"
    "{% endfor %}{{ messages | map('length') | sum }}{{ messages[0] | items | list }}",
    "{{ bos_token + 'x' }}{{ raise_exception('no') if messages | length > 9 else eos_token }}",
    "{% block one %}{{ messages[0].content.strip('B.') }}{% endblock %}{{ self.one() }}",
)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, ZEPHYR, THINKING, *LANGUAGE])
def test_a_template_renders_as_in_transformers(source: str) -> None:
    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, **VALUES)
    assert LimitedTemplate(source).render(MESSAGES, **VALUES) == theirs[0]


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops of loops": "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}"
    "{{ a() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "block": "{% block b %}{{ self.b() }}{% endblock %}",
    "caller": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "times": "{{ 'a' * 10 ** 11 }}",
    "times, turned": "{{ 10 ** 11 * 'a' }}",
    "times a list": "{{ [0] * 10 ** 11 }}",
    "power": "{{ 9 ** (10 ** 9) }}",
    "doubling": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "doubling a mapping": "{% set ns = namespace(x=1) %}{% for i in range(99) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x == ns.x }}",
    "doubling by dict()": "{% set ns = namespace(x=1) %}{% for i in range(99) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "doubling by format": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubling by a block": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
    "center": "{{ 'a' | center(10 ** 11) }}",
    "center by name": "{{ ['a'] | map('center', 10 ** 11) | list }}",
    "center by attribute": "{{ ('a' | attr('center'))(10 ** 11) }}",
    "ljust": "{{ 'a'.ljust(10 ** 11) }}",
    "zfill": "{{ 'a'.zfill(width) if width else 'a'.zfill(10 ** 11) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 11) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 11) }}",
    "tojson": "{{ [[1]] | tojson(indent=10 ** 11) }}",
    "round": "{{ 1.5 | round(10 ** 11, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 11, 'big') }}",
    "format": "{{ '%100000000000d' % 1 }}",
    "format by *": "{{ '%*d' % (10 ** 11, 1) }}",
    "format filter": "{{ '%100000000000d' | format(1) }}",
    "str.format": "{{ '{:100000000000}'.format(1) }}",
    "str.format, nested": "{{ '{:{}}'.format(1, 10 ** 11) }}",
    "format_map": "{{ '{a:100000000000}'.format_map({'a': 1}) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 10 ** 6}) }}",
    "join of a long separator": "{{ ('a' * 10 ** 6).join(range(10 ** 5) | map('string')) }}",
    "replace with a long text": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "replace of nothing": "{{ ('a' * 10 ** 6) | replace('', 'b' * 10 ** 6) }}",
    "output": "{% set x = 'a' * 10 ** 6 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "slices of output": "{% set x = 'a' * 10 ** 6 %}{% for i in range(99999) %}{{ x[1:] }}"
    "{% endfor %}",
    "output of a macro": "{% set x = 'a' * 10 ** 6 %}{% macro m() %}{% for i in range(99999) %}"
    "{{ x[1:] }}{% endfor %}{% endmacro %}{{ m() }}",
    "constant output": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "ranges": "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_meets_a_limit(name: str) -> None:
    with pytest.raises(TemplateLimitError):
        LimitedTemplate(ENDLESS[name]).render(MESSAGES, **VALUES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum(n=10 ** 9) }}", "{{ [1] | batch(10 ** 9, 0) | list }}", "{{ [1] | random }}",
        "{% for %}", "{{ " + "(" * 5000, "{% if a %}" * 5000, "{{ " + "-" * 5000 + "1 }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30, "x" * (2**20 + 1), "{{ a | none_such }}",
        "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ ''.__class__ }}{{ x.y.z }}",
        "{% include 'other' %}", "{{ raise_exception('never') }}", "{{ 9 ** 999999999 }}",
    ],
)  # fmt: skip
def test_a_template_that_always_fails_is_refused_before_anything_starts(
    source: str, tmp_path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    config = ModelConfig(path="builtin:tiny", chat_template=str(file))
    if "x.y.z" in source or "lipsum" in source:  # undefined here, and refused by the tokenizer
        model_identity(config)
        return
    with pytest.raises((ModelError, ConfigError), match=r"mine\.jinja") as caught:
        model_identity(config)
    assert caught.value.exit_code == 2


def test_a_template_without_end_ends_the_run_and_rejects_no_row() -> None:
    trap = CHATML + (
        "{% if 'trap' in messages[0].content %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    tokenizer = build_tokenizer(trap)
    turns = [{"role": "user", "content": "a trap"}, {"role": "assistant", "content": "b"}]
    table = pa.table({"messages": [turns]})
    with pytest.raises(ConfigError, match=r"chat template.*steps.*model\.chat_template"):
        encode_rows(table, tokenizer, 64)


def test_an_error_of_one_row_rejects_that_row() -> None:
    tokenizer = build_tokenizer(CHATML + "{{ '' if messages[0].content != 'x' else 1 / 0 }}")
    rows = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
        for text in ("x", "y")
    ]
    _, kept, reasons = encode_rows(pa.table({"messages": rows}), tokenizer, 64)
    assert kept == [1]
    assert reasons == {0: "template-refused"}


@pytest.mark.parametrize("turns", [2, 400])
def test_long_conversations_stay_within_the_limits(turns: int) -> None:
    messages = [
        {"role": ("user", "assistant")[k % 2], "content": f"{k} " + "word " * 4000}
        for k in range(turns)
    ]
    quadratic = CHATML + "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}"
    template = compile_template(quadratic, "the template")
    text = template.render(messages, add_generation_prompt=False)
    assert len(text) > 20_000 * turns
