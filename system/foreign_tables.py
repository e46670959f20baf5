"""Arrow data that others wrote: checked, made plain, and turned into Python values.

Three things can go wrong when foreign Arrow data is converted.  Damaged offsets make the library
read outside of its buffers, which ends the process.  An extension type may run code of its own (one
of Ray's unpickles).  And a few bytes may stand for gigabytes: many rows can share one text of a
dictionary.  So every table from a file passes `checked` before a value is looked at;
`expanded_bytes` says what its values need, and `python_rows` makes the values.

A row is the same row whatever container it comes from: NaN is a missing value, keys of objects that
are null are left out (Arrow fills them in), JSON text that is marked as such is decoded, and class
labels become their names.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Clean = Callable[[Any], Any]

_VALUE_BYTES = 8
"""Least size of a value in memory; also of one that takes no byte in its file."""


def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows, safe to convert: validated, without extension types and time zones.

    An extension type is replaced by the type that it stores, a time with a zone by the same time in
    UTC.  Only JSON text keeps its mark.  Text may still be invalid UTF-8: that costs one row later.

    Raises:
        pa.ArrowException: the data is damaged, or has a type that is not supported.
    """
    batch.validate()
    try:
        fields = [field.with_type(_plain_type(field.type)) for field in batch.schema]
        columns = [_plain_array(column) for column in batch.columns]
        plain = pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, batch.schema.metadata))
        binary = pa.RecordBatch.from_arrays(
            [_plain_array(column, is_binary=True) for column in columns], names=batch.schema.names
        )
    except RecursionError:
        raise pa.ArrowInvalid("its columns are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"the name of a column is not UTF-8: {error.object!r:.80}") from None
    binary.validate(full=True)
    return plain


def checked_table(table: pa.Table) -> pa.Table:
    """As `checked`, for a whole table.

    Raises:
        pa.ArrowException: the data is damaged, or has a type that is not supported.
    """
    batches = [checked(batch) for batch in table.to_batches()]
    if not batches:
        fields = [field.with_type(_plain_type(field.type)) for field in table.schema]
        return pa.schema(fields, table.schema.metadata).empty_table()
    return pa.Table.from_batches(batches)


def _plain_type(kind: pa.DataType, is_binary: bool = False) -> pa.DataType:
    """The type without extension types and time zones; with `is_binary`, text becomes bytes."""
    types = pa.types
    if types.is_union(kind) or types.is_run_end_encoded(kind):
        raise pa.ArrowNotImplementedError(f"columns of type {kind} are not supported")
    if isinstance(kind, pa.BaseExtensionType):
        is_json = isinstance(kind, pa.JsonType) and not is_binary
        return kind if is_json else _plain_type(kind.storage_type, is_binary)
    if types.is_timestamp(kind):
        return pa.timestamp(kind.unit)
    if is_binary and kind in _BINARY:
        return _BINARY[kind]
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _plain_type(kind.value_type, is_binary), kind.ordered)
    if types.is_struct(kind):
        return pa.struct([f.with_type(_plain_type(f.type, is_binary)) for f in kind])
    if types.is_map(kind):
        key, item = (_plain_type(t, is_binary) for t in (kind.key_type, kind.item_type))
        return pa.map_(kind.key_field.with_type(key), kind.item_field.with_type(item))
    if _is_list(kind):
        field = kind.value_field.with_type(_plain_type(kind.value_type, is_binary))
        if types.is_fixed_size_list(kind):
            return pa.list_(field, kind.list_size)
        return _LISTS[kind.id](field)
    return kind


def _plain_array(array: pa.Array, is_binary: bool = False) -> pa.Array:
    """The array as `_plain_type` says; buffers are shared and their content is not looked at."""
    kind = _plain_type(array.type, is_binary)
    if kind == array.type:
        return array
    if isinstance(array, pa.ExtensionArray):
        return _plain_array(array.storage, is_binary)
    if pa.types.is_dictionary(kind):
        values = _plain_array(array.dictionary, is_binary)
        return pa.DictionaryArray.from_arrays(array.indices, values, ordered=kind.ordered)
    buffers, children = array.buffers(), None
    if pa.types.is_struct(kind):
        # Children of a struct are not cut where it is: those of a whole array are.
        inner = [_plain_array(array.field(k), is_binary) for k in range(kind.num_fields)]
        return pa.StructArray.from_arrays(inner, fields=list(kind), mask=array.is_null())
    if pa.types.is_map(kind):
        inner = [_plain_array(part, is_binary) for part in (array.keys, array.items)]
        entries = pa.StructArray.from_arrays(inner, fields=[kind.key_field, kind.item_field])
        buffers, children = buffers[:2], [entries]
    elif _is_list(kind):
        num_buffers = {pa.types.is_fixed_size_list: 1, _is_list_view: 3}
        count = next((n for is_kind, n in num_buffers.items() if is_kind(kind)), 2)
        buffers, children = buffers[:count], [_plain_array(array.values, is_binary)]
    return pa.Array.from_buffers(
        kind, len(array), buffers, array.null_count, array.offset, children
    )


_LISTS = {
    kind(pa.null()).id: kind for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
}
_BINARY = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def _is_list(kind: pa.DataType) -> bool:
    return kind.id in _LISTS or pa.types.is_fixed_size_list(kind)


def _is_list_view(kind: pa.DataType) -> bool:
    return pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def expanded_bytes(array: pa.Array | pa.RecordBatch, limit: int) -> int:
    """About what the values take when each is written out; counting stops above `limit`.

    Many values may share the same bytes: a dictionary, views, lists of nothing.
    """
    if isinstance(array, pa.RecordBatch | pa.StructArray):
        parts = array.columns if isinstance(array, pa.RecordBatch) else _children(array)
        total = 0
        for part in parts:
            total += expanded_bytes(part, limit)
            if total > limit:
                break
        return total
    kind = array.type
    total = _VALUE_BYTES * len(array)
    if total > limit or not len(array):
        return total
    if isinstance(array, pa.ExtensionArray):
        return expanded_bytes(array.storage, limit)
    if pa.types.is_dictionary(kind):
        values, indices = array.dictionary, array.indices
        if _is_text(values.type):
            places = np.asarray(indices.drop_null().cast(pa.int64()))
            return total + int(_text_lengths(values)[places].sum())
        return total + len(array) * expanded_bytes(values, limit)
    if _is_text(kind):
        return total + int(_text_lengths(array).sum())
    if _is_list_view(kind):
        spans = zip(array.offsets.to_pylist(), array.sizes.to_pylist(), strict=True)
        for start, size in spans:
            total += expanded_bytes(array.values.slice(start or 0, size or 0), limit)
            if total > limit:
                break
        return total
    if _is_list(kind) or pa.types.is_map(kind):
        values = _inside(array)
        return total + sum(expanded_bytes(part, limit) for part in values)
    return total


def _children(array: pa.StructArray) -> list[pa.Array]:
    return [array.field(k) for k in range(array.type.num_fields)]


def _inside(array: pa.Array) -> list[pa.Array]:
    """The values of the lists or maps of an array that is cut out of a longer one."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return [array.values.slice(array.offset * size, len(array) * size)]
    first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
    parts = [array.keys, array.items] if pa.types.is_map(array.type) else [array.values]
    return [part.slice(first, last - first) for part in parts]


def _is_text(kind: pa.DataType) -> bool:
    return kind in _BINARY or kind in _BINARY.values()


def _text_lengths(array: pa.Array) -> np.ndarray:
    """[len(array)] int64: bytes of each text."""
    if array.type not in (pa.string_view(), pa.binary_view()):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0)).astype(np.int64)
    # A view is 16 bytes, the first four of which are the length.
    if not len(array):
        return np.zeros(0, np.int64)
    end = array.offset + len(array)
    views = np.frombuffer(array.buffers()[1], np.int32, 4 * end).reshape(-1, 4)
    lengths = views[array.offset :, 0].astype(np.int64)
    return np.where(np.asarray(array.is_valid()), lengths, 0)


def python_rows(batch: pa.RecordBatch, labels: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The rows of a checked batch as dicts.

    Args:
        batch: from `checked`.
        labels: names of the classes of each column that holds numbers of classes.

    Raises:
        ValueError, OverflowError, KeyError: some value has no form in Python.
    """
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        # The library converts maps in its own slow way only.
        has_maps = "map<" in str(field.type)
        values = column.to_pylist(maps_as_pydicts="strict") if has_maps else column.to_pylist()
        clean = _cleaner(column)
        if field.name in labels and pa.types.is_integer(field.type):
            clean = _class_names(labels[field.name])
        columns.append(values if clean is None else [clean(value) for value in values])
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its classes, from what the `datasets` library writes into a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in found.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def _class_names(names: list[str]) -> Clean:
    # The library writes -1 where a row has no label.
    return lambda value: (
        names[value] if value in range(len(names)) else None if value == -1 else value
    )


def _cleaner(array: pa.Array) -> Clean | None:
    """What makes a value of the array the value that JSON would give; None: nothing to do."""
    kind = array.type
    if isinstance(kind, pa.JsonType):
        return _json_value
    if pa.types.is_floating(kind):
        return lambda value: value if value == value else None
    if pa.types.is_dictionary(kind):
        return _cleaner(array.dictionary)
    if pa.types.is_struct(kind):
        children = _children(array)
        cleaners = {f.name: _cleaner(child) for f, child in zip(kind, children, strict=True)}
        is_whole = not any(child.null_count for child in children)
        return None if is_whole and not any(cleaners.values()) else _object_cleaner(cleaners)
    if pa.types.is_map(kind):
        return _object_cleaner({}, _cleaner(array.items))
    if _is_list(kind):
        inner = _cleaner(array.values)
        if inner is not None:
            return lambda value: None if value is None else [inner(item) for item in value]
    return None


def _json_value(text: str | None) -> Any:
    try:
        return None if text is None else without_nulls(decode_json(text))
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _object_cleaner(cleaners: dict[str, Clean | None], of_others: Clean | None = None) -> Clean:
    """Cleans the values by their key, and leaves out the keys that are null then."""
    by_key = {key: clean for key, clean in cleaners.items() if clean is not None}

    def clean(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if of_others is not None:
            value = {key: of_others(inner) for key, inner in value.items()}
        for key, clean_inner in by_key.items():
            value[key] = clean_inner(value[key])
        return {key: inner for key, inner in value.items() if inner is not None}

    return clean


def decode_json(text: str | bytes) -> Any:
    """The value of a JSON text; NaN, which some writers produce, is null.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def without_nulls(value: Any) -> Any:
    """The value of a JSON text without the keys of objects, at any depth, that are null.

    Changes the value itself: a copy of a large row would double the memory.
    """
    if type(value) is dict:
        for key in [key for key, inner in value.items() if inner is None]:
            del value[key]
    for inner in value.values() if type(value) is dict else value if type(value) is list else ():
        if type(inner) is dict or type(inner) is list:
            without_nulls(inner)
    return value
