"""The part of msgpack that flax writes: maps, lists, strings, numbers, and arrays as an extension
that holds shape, dtype and bytes (github.com/msgpack/msgpack, spec.md). Nothing in a file can run.
"""

import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

# A value's first byte: a value, a number's struct format, or a kind with its length's format.
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", *(">" + c for c in "BHIQbhiq")), strict=True))
SIZED = {
    0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
    0xC7: ("array", ">B"), 0xC8: ("array", ">H"), 0xC9: ("array", ">I"),
    0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
# first byte of the range, kind, mask of the length in it; downwards, the first that fits
FIXED = ((0xA0, "str", 0x1F), (0x90, "list", 0x0F), (0x80, "map", 0x0F))
DTYPES = {"float16", "bfloat16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint32"}
DEPTH = 50


def unpack(data: bytes) -> Any:
    """The one value in `data`; arrays as numpy arrays.

    Raises:
      ValueError: it is not one msgpack value of the kinds that flax writes.
    """
    try:
        value, end = _value(data, 0, 0)
    except (struct.error, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"not msgpack: {error}") from None
    if end < len(data):
        raise ValueError(f"not msgpack: {len(data) - end} bytes follow the first value")
    return value


def _take(data: bytes, at: int, count: int) -> tuple[bytes, int]:
    if at + count > len(data):
        raise ValueError("not msgpack: it ends in the middle of a value")
    return data[at : at + count], at + count


def _number(data: bytes, at: int, code: str) -> tuple[Any, int]:
    piece, at = _take(data, at, struct.calcsize(code))
    return struct.unpack(code, piece)[0], at


def _value(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    head, at = _number(data, at, ">B")
    if head in CONSTANTS:
        return CONSTANTS[head], at
    if head <= 0x7F or head >= 0xE0:
        return (head if head <= 0x7F else head - 0x100), at
    if head in NUMBERS:
        return _number(data, at, NUMBERS[head])
    return _sized(data, *_size(data, at, head), depth)


def _size(data: bytes, at: int, head: int) -> tuple[int, str, int]:
    """Where the content begins, its kind, its length."""
    if head in SIZED:
        kind, code = SIZED[head]
        count, at = _number(data, at, code)
        return at, kind, count
    if 0xD4 <= head <= 0xD8:
        return at, "array", 1 << (head - 0xD4)
    for first, kind, mask in FIXED:
        if first <= head <= first + mask:
            return at, kind, head & mask
    raise ValueError(f"not msgpack: byte {head:#x} begins no value")


def _sized(data: bytes, at: int, kind: str, count: int, depth: int) -> tuple[Any, int]:
    if depth > DEPTH:
        raise ValueError(f"not msgpack of flax: nested more than {DEPTH} deep")
    if kind in ("map", "list"):
        items = []
        for _ in range(2 * count if kind == "map" else count):
            item, at = _value(data, at, depth + 1)
            items.append(item)
        pairs = zip(items[::2], items[1::2], strict=True)
        return (dict(pairs) if kind == "map" else items), at
    if kind == "array":
        code, at = _number(data, at, ">B")
        content, at = _take(data, at, count)
        return _array(code, content), at
    content, at = _take(data, at, count)
    return (content.decode() if kind == "str" else content), at


def _array(code: int, content: bytes) -> np.ndarray:
    # flax: 1 is an array, 3 a numpy scalar; 2, a complex number, has no place in theta
    if code not in (1, 3):
        raise ValueError(f"not msgpack of flax: extension {code} is no array")
    shape, dtype, buffer = unpack(content)
    name = dtype.decode() if isinstance(dtype, bytes) else dtype
    if name not in DTYPES:
        raise ValueError(f"not msgpack of flax: arrays of dtype {name!r} are not read")
    return np.frombuffer(buffer, jnp.dtype(name)).reshape(shape)
