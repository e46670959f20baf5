"""Renders chat templates within limits, so that no template can loop, recurse or write for ever.

A chat template is a program that comes with a model.  The sandbox of Jinja keeps it from files and
from Python's internals, but lets it work and write without end.  Here every render has three
limits: steps, depth of calls, and size of a value.  They are counted, not timed, so they hit at the
same place on every machine.  They grow with the conversation, so no conversation is too long.

A step is a pass through a block (loop, branch, macro), a call, a filter or 1 KiB of text.  No value
ever grows above the largest size, because every operation that makes one is counted.

Filters, globals and settings are those of transformers, which defines what chat templates may use,
without the few whose cost has no bound or whose result is random.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SOURCE = 2**20
"""Largest number of characters of a template."""
_STEPS, _STEPS_PER_CHAR = 200_000, 20
_SIZE, _SIZE_PER_CHAR = 2**22, 64
_DEPTH = 64
_STEP_CHARS = 1024
_ITEM_CHARS = 16
"""What an item of a list counts, in characters."""
_WIDTH = 100
"""Largest width, indentation or separator."""
_NUMBER_BITS = 4096
_TEXTS, _LISTS = (str, bytes), (list, tuple, set)
_PADDED = {
    "center", "expandtabs", "indent", "join", "ljust", "rjust", "round", "to_bytes", "tojson",
    "zfill",
}  # fmt: skip
"""Filters and methods that repeat a text, or a power, as often as an argument says."""
_UNBOUNDED = {"batch", "pprint", "random", "slice", "striptags", "urlize", "wordwrap", "xmlattr"}
_WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*(\d{4}|\{)")
"""A conversion of `%` or `str.format` with a large or computed width."""


class TemplateLimitError(Exception):
    """A template went beyond a limit; the message names it."""


@dataclass(slots=True)
class _Meter:
    """What is left of the limits of one render."""

    steps: int
    size: int
    written: int = 0
    depth: int = 0

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TemplateLimitError("takes too many steps (loops or calls that do not end)")

    def weigh(self, value: Any) -> int:
        """Counts the size of a new value as steps, and returns the size."""
        size = len(value) if isinstance(value, str) else _size(value, self.size)
        if size > self.size:
            raise TemplateLimitError(f"makes a value of more than {self.size:,} characters")
        self.step(1 + size // _STEP_CHARS)
        return size


_METER: ContextVar[_Meter] = ContextVar("meter")
"""The meter of the render in progress.  There is none while a template is compiled; then Jinja puts
off what it could not compute."""


class LimitedTemplate:
    """A compiled chat template.

    Raises:
        jinja2.TemplateSyntaxError: the source is not a template.
        Exception: of any kind, from Jinja, if the source is nested too deeply.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"has more than {MAX_SOURCE:,} characters")
        self._template = _environment().from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
        """Renders a conversation.

        Args:
            messages: turns.
            **values: further variables of the template.

        Raises:
            TemplateLimitError: the template goes beyond a limit.
            Exception: of any kind; whatever the template's own code raises.
        """
        chars = _size([messages, values], 2**62)
        meter = _Meter(steps=_STEPS + _STEPS_PER_CHAR * chars, size=_SIZE + _SIZE_PER_CHAR * chars)
        token = _METER.set(meter)
        try:
            # Not Template.render, which would rewrite the traceback of every error.
            context = self._template.new_context({"messages": messages, **values})
            return self._template.environment.concat(self._template.root_render_func(context))
        finally:
            _METER.reset(token)


class _Generator(CodeGenerator):
    """Writes a counter into every block, and around every operation that makes a value."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def _weighed(self, visit: Callable[..., None], node: nodes.Expr, frame: Frame) -> None:
        if getattr(node, "ctx", "load") != "load":  # the target of an assignment
            visit(node, frame)
            return
        self.write("environment.weigh(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._weighed(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._weighed(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._weighed(super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._weighed(super().visit_Dict, node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def step(self) -> None:
        meter = _METER.get()
        meter.steps -= 1
        if meter.steps < 0:
            meter.step()

    def weigh(self, value: Any) -> Any:
        _METER.get().weigh(value)
        return value

    def write(self, value: Any) -> Any:
        """Counts what the template writes; Jinja calls it for every expression."""
        meter = _METER.get()
        meter.written += meter.weigh(value)
        if meter.written > meter.size:
            raise TemplateLimitError(f"writes more than {meter.size:,} characters")
        return value

    def concat(self, parts: Iterable[str]) -> str:
        meter = _METER.get()
        kept, length = [], 0
        for part in parts:
            length += len(part)
            if length > meter.size:
                raise TemplateLimitError(f"writes more than {meter.size:,} characters")
            kept.append(part)
        meter.step(1 + length // _STEP_CHARS)
        return "".join(kept)

    def call(self, context: Context, called: Any, /, *args: Any, **values: Any) -> Any:
        meter = _METER.get()
        if not isinstance(called, Macro):
            # The sandbox wraps `str.format`.
            method = getattr(called, "__wrapped__", called)
            name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
            # The method `join` belongs to its separator.
            others = [owner] if name == "join" else [*args, *values.values()]
            _refuse_growth(name, owner, others, meter.size)
        meter.depth += 1
        if meter.depth > _DEPTH:
            raise TemplateLimitError(f"calls itself more than {_DEPTH} times")
        try:
            result = super().call(context, called, *args, **values)
        finally:
            meter.depth -= 1
        return self.weigh(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _refuse_growth("format", left, [right], _METER.get().size)
        elif operator in ("*", "**"):
            _refuse_product(operator, left, right, _METER.get().size)
        return self.weigh(super().call_binop(context, operator, left, right))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for trainers; it writes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """A namespace that can be changed after it was put into a list, so it must not be written."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _environment() -> _Environment:
    # Without the optimiser: it computes constants while compiling, outside all limits.
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )  # fmt: skip
    environment.finalize = environment.write
    environment.filters["tojson"] = _tojson
    for name in _UNBOUNDED:
        del environment.filters[name]
    for name, function in environment.filters.items():
        environment.filters[name] = _limited(name, function)
    del environment.globals["lipsum"]
    environment.globals |= {
        "namespace": _Namespace, "raise_exception": _refuse, "strftime_now": _strftime_now,
    }  # fmt: skip
    return environment


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, within the limits."""
    # Jinja marks functions that get the context, the environment or its settings first.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*args: Any, **values: Any) -> Any:
        meter = _METER.get()
        rest = [*args[first + 1 :], *values.values()]
        _refuse_growth(name, args[first] if len(args) > first else None, rest, meter.size)
        result = function(*args, **values)
        meter.weigh(result)
        return result

    return limited


def _refuse_growth(name: str, value: Any, others: list[Any], limit: int) -> None:
    """Refuses a filter or method that could make a value far above the largest size.

    Args:
        name: of filter or method.
        value: what it is applied to.
        others: its other arguments.
        limit: largest size.
    """
    if name in _PADDED:
        for width in others:
            if (abs(width) if isinstance(width, int) else _size(width, limit)) > _WIDTH:
                raise TemplateLimitError(f"uses {name} with a width of more than {_WIDTH}")
    elif name == "replace" and isinstance(value, str) and len(others) > 1:
        old, new = others[:2]
        if isinstance(old, str) and value.count(old) * _size(new, limit) > limit:
            raise TemplateLimitError(f"makes a value of more than {limit:,} characters")
    elif name in ("format", "format_map") and isinstance(value, str):
        parts = value.count("%") + value.count("{")
        if _WIDE.search(value) or parts * _size(others, limit) > limit:
            raise TemplateLimitError(f"formats a text of more than {limit:,} characters")
    elif name in ("translate", "maketrans", "sum") and any(
        isinstance(other, dict | list) for other in others
    ):
        raise TemplateLimitError(f"uses {name}, which chat templates may not")


def _refuse_product(operator: str, left: Any, right: Any, limit: int) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if (bits * right if operator == "**" else bits + right.bit_length()) > _NUMBER_BITS:
            raise TemplateLimitError(f"computes a number of more than {_NUMBER_BITS} bits")
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and _size(value, limit) * count > limit:
            raise TemplateLimitError(f"makes a value of more than {limit:,} characters")


def _size(value: Any, limit: int) -> int:
    """Characters of a value, with all that it contains; stops above the limit."""
    size, waiting = 0, [value]
    while waiting and size <= limit:
        item = waiting.pop()
        if isinstance(item, _TEXTS):
            size += len(item)
        elif isinstance(item, dict):
            size += 2 * _ITEM_CHARS * len(item)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, _LISTS):
            size += _ITEM_CHARS * len(item)
            waiting += item
    return size


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
