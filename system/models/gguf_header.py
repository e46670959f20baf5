"""Checks the header of a GGUF file against the file, before a library reads it.

The readers that exist trust the header: a length of 2^62 makes them loop for ever.  Here every
length is compared with the bytes that are left.  Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from system.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
"""Number of a value type -> its `struct` code."""
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
"""Arrays within arrays; no known model has any."""
_MAX_DIMS = 8
_VERSIONS = (2, 3)


class _DamageError(Exception):
    """What is wrong with the file."""


def check_gguf(path: Path) -> None:
    """Checks that header and tensors lie inside the file; reads the header only.

    Raises:
        ModelError: the file is no GGUF file, or is damaged or cut off.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _Header(data).check()
    except (OSError, ValueError, _DamageError) as error:
        raise ModelError(
            f"{path}: expected a GGUF model, but the file is damaged or cut off: {error}. Get the "
            "file again and compare its size and checksum with those of its publisher."
        ) from error


class _Header:
    """Walks through the header once, from front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._order = "<"

    def check(self) -> None:
        if self._data[:4] != b"GGUF":
            raise _DamageError(f"it starts with {self._data[:4]!r}, not with b'GGUF'")
        self._at = 4
        version = self._scalar("I", "the version")
        if version & 0xFFFF == 0:  # written on a machine with the other byte order
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise _DamageError(f"version {version} is none of {_VERSIONS}")
        num_tensors = self._scalar("Q", "the number of tensors")
        num_values = self._scalar("Q", "the number of values")
        self._require(24 * num_tensors + 12 * num_values, "its tensors and values")
        alignment, num_blocks = 32, 0
        for number in range(num_values):
            key = self._text(f"the name of value {number}")
            value = self._value(self._scalar("I", f"the type of {key!r}"), key, 0)
            if key == "general.alignment":
                alignment = value
            elif key.endswith(".block_count"):
                num_blocks = value
        if not isinstance(alignment, int) or alignment < 1:
            raise _DamageError(f"general.alignment is {alignment!r}")
        if not isinstance(num_blocks, int) or num_blocks > num_tensors:
            raise _DamageError(f"it names {num_blocks!r} blocks and has {num_tensors} tensors")
        extents = [self._tensor(number) for number in range(num_tensors)]
        start = -(-self._at // alignment) * alignment
        self._check_extents(extents, len(self._data) - start)

    def _check_extents(self, extents: list[tuple[int, int, str]], size: int) -> None:
        end, before = 0, ""
        for offset, length, name in sorted(extents):
            if offset < end:
                raise _DamageError(f"the tensors {before!r} and {name!r} overlap")
            end, before = offset + length, name
            if end > size:
                raise _DamageError(
                    f"tensor {name!r} ends at byte {end:,} of {size:,} bytes of data"
                )

    def _tensor(self, number: int) -> tuple[int, int, str]:
        """Offset, length in bytes and name."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text(f"the name of tensor {number}")
        num_dims = self._scalar("I", f"the number of dimensions of {name!r}")
        if num_dims > _MAX_DIMS:
            raise _DamageError(f"tensor {name!r} has {num_dims:,} dimensions")
        size = 1
        for _ in range(num_dims):
            size *= self._scalar("Q", f"the shape of {name!r}")
        kind = self._scalar("I", f"the type of {name!r}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _DamageError(f"tensor {name!r} has the unknown type {kind}") from None
        offset = self._scalar("Q", f"the offset of {name!r}")
        return offset, -(-size // block) * block_bytes, name

    def _value(self, kind: int, key: str, depth: int) -> Any:
        """Steps over a value; returns it if it is a number."""
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], f"the value of {key!r}")
        if kind == _STRING:
            self._bytes(f"the value of {key!r}")
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            inner = self._scalar("I", f"the type of {key!r}")
            length = self._scalar("Q", f"the length of {key!r}")
            if inner in _SCALARS:
                self._skip(length * struct.calcsize(f"<{_SCALARS[inner]}"), f"the list {key!r}")
                return None
            self._require(8 * length, f"the list {key!r}")  # each has at least a length
            for _ in range(length):
                self._value(inner, key, depth + 1)
        else:
            raise _DamageError(f"the value of {key!r} has the unknown type {kind}")
        return None

    def _scalar(self, code: str, what: str) -> Any:
        start = self._skip(struct.calcsize(f"<{code}"), what)
        return struct.unpack_from(f"{self._order}{code}", self._data, start)[0]

    def _bytes(self, what: str) -> bytes:
        length = self._scalar("Q", what)
        start = self._skip(length, what)
        return self._data[start : start + length]

    def _text(self, what: str) -> str:
        try:
            return self._bytes(what).decode()
        except UnicodeDecodeError:
            raise _DamageError(f"{what} is no UTF-8 text") from None

    def _skip(self, size: int, what: str) -> int:
        """Moves on by `size` bytes; returns where it was."""
        self._require(size, what)
        self._at += size
        return self._at - size

    def _require(self, size: int, what: str) -> None:
        left = len(self._data) - self._at
        if size > left:
            raise _DamageError(
                f"{what} takes {size:,} bytes at byte {self._at:,}; {left:,} are left"
            )
