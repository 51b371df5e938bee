"""Bodies of requests and answers: JSON, MessagePack, or the bytes of one array.

In MessagePack an array may be {"dtype": "<f4", "shape": [..], "data": bytes} in place of nested lists; answers to MessagePack hold such
arrays.  JSON has no NaN: null stands for it, both ways.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from pydantic_core import from_json, to_json

from mobula.errors import DataError

JSON, MSGPACK, RAW = "application/json", "application/x-msgpack", "application/octet-stream"
MSGPACK_NAMES = (MSGPACK, "application/msgpack", "application/vnd.msgpack")

Array = np.ndarray[Any, Any]


class BadType(DataError):
    """A body of a type that is not read here."""


class BadBody(DataError):
    """A body that cannot be read at all."""


def media_type(header: str | None) -> str:
    """The bare type of a Content-Type header; JSON where there is none.  Raises BadType for one that is not read here."""
    name = (header or JSON).partition(";")[0].strip().lower()
    if name in MSGPACK_NAMES:
        return MSGPACK
    # curl's own default, which people leave as it is when they send JSON.
    if name in (JSON, "application/x-www-form-urlencoded", "text/json"):
        return JSON
    if name == RAW:
        return RAW
    raise BadType(f"Content-Type is {name}: {JSON}, {MSGPACK} and {RAW} are read")


def accepted(header: str | None, otherwise: str) -> str:
    """The type to answer in: the first of an Accept header that is written here."""
    for entry in (header or "").split(","):
        name = entry.partition(";")[0].strip().lower()
        if name in MSGPACK_NAMES:
            return MSGPACK
        if name in (JSON, RAW):
            return name
    return JSON if otherwise == RAW else otherwise


def read(body: bytes, kind: str) -> dict[str, Any]:
    """The object in a JSON or MessagePack body.  Raises BadBody."""
    try:
        found = (
            from_json(body, allow_inf_nan=False)
            if kind == JSON
            else msgpack.unpackb(body, raw=False, strict_map_key=True, object_hook=unpacked)
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise BadBody(f"the body is no {kind}: {str(error) or type(error).__name__}") from None
    if not isinstance(found, dict):
        raise BadBody("the body is no object of fields and values")
    return found


def unpacked(found: dict[str, Any]) -> Any:
    """The array that {"dtype", "shape", "data"} stands for; any other object as it is.  Raises ValueError where it is none."""
    if found.keys() != {"dtype", "shape", "data"}:
        return found
    dtype = np.dtype(found["dtype"])
    # Numbers only: an object array would be made of addresses.
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"arrays of {dtype} are not read")
    shape = tuple(found["shape"])
    if len(shape) > 16 or not all(isinstance(n, int) and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"an array of shape {shape}")
    data = found["data"]
    if not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and type {dtype} does not have {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def packed(array: Array) -> dict[str, Any]:
    """An array as MessagePack carries it here."""
    array = np.asarray(array, order="C")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def write(answer: Mapping[str, Any], kind: str) -> bytes:
    """An answer, whose values may be arrays, as JSON or MessagePack."""
    if kind == MSGPACK:
        packed_answer: bytes = msgpack.packb(answer, default=lambda value: packed(np.asarray(value)))
        return packed_answer
    return to_json({name: _plain(value) for name, value in answer.items()}, inf_nan_mode="null")


def write_request(request: Mapping[str, Any], kind: str) -> bytes:
    """What a client sends; NaN becomes null in JSON."""
    return write(request, kind) if kind != JSON else json.dumps(_nulls(request), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _nulls(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, dict):
        return {name: _nulls(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
