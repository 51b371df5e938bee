"""The act route's own schemas: what a policy takes and answers, described from its spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mobula.artifact import space_to_json
from mobula.errors import DataError
from mobula.policy import Policy
from mobula.serving import wire
from mobula.serving.schemas import Card, Whole

Schema = dict[str, Any]

PREFIX_ITEMS = 64
"""Longest vector whose components are described one by one."""


class ActRequest(BaseModel):
    """POST /v1/policies/{name}/act.  Arrays are checked against the policy's spaces, in NumPy."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    obs: Any
    explore: bool | None = Field(
        default=None, description="draw the action (true) or take the most likely one"
    )
    seed: Whole | None = Field(
        default=None, ge=0, lt=2**63, description="draws with the same seed are the same"
    )
    state: dict[str, Any] | None = Field(
        None, description="of recurrent policies: `state` of the last answer"
    )
    actions: Any = Field(default=None, description="logged actions to be scored")


def holds_truth(value: Any) -> bool:
    """Whether true or false stands among nested lists of numbers, which NumPy would take for 1 or 0."""
    if isinstance(value, dict):
        return any(holds_truth(inner) for inner in value.values())
    return any(holds_truth(inner) for inner in value) if isinstance(value, list) else isinstance(value, bool)


def raw_observations(body: bytes, policy: Policy) -> np.ndarray[Any, Any]:
    """[N, *obs_shape] of the bytes of an array in the observation space's dtype, little-endian, row by row."""
    space = policy.observation_space
    shape = tuple(space.shape or ())
    dtype = np.dtype(space.dtype).newbyteorder("<")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not body or len(body) % size:
        raise DataError(
            f"obs has {len(body)} bytes; a multiple of {size} is expected: rows of shape {shape}, {dtype.str}"
        )
    return np.frombuffer(body, dtype).reshape(-1, *shape)


# Descriptions ---------------------------------------------------------------------------------------------


def describe(name: str, policy: Policy) -> Card:
    """The card of a policy."""
    m = policy.manifest
    return Card(
        id=name,
        kind="policy",
        version=policy.version,
        method=m.get("method"),
        env=m.get("env"),
        observation_space=space_to_json(policy.observation_space),
        action_space=space_to_json(policy.action_space),
        recurrent=policy.recurrent,
        example=example(name, policy),
    )


def example(name: str, policy: Policy) -> dict[str, Any]:
    """A request and its answer, as JSON carries them."""
    policy.seed(0)
    found = policy.example()
    answer = wire.read(wire.write(found["answer"], wire.JSON), wire.JSON)
    return {"request": found["request"], "answer": {"policy": name, "version": policy.version, **answer}}


def request_schema(policy: Policy) -> Schema:
    """JSON schema of what the act route takes for this policy."""
    one = space_schema(policy.observation_space, policy.takes_missing)
    properties: Schema = {
        "obs": _one_or_many(one) | {"description": "an observation, or a list of them"},
        "explore": {
            "anyOf": [{"type": "boolean"}, {"type": "null"}],
            "description": f"draw the action or take the most likely one; left out: {str(policy.explore).lower()}",
        },
        "seed": {
            "anyOf": [{"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, {"type": "null"}],
            "description": "draws with the same seed are the same",
        },
    }
    # A field that this policy has no use for may be sent as null, as clients do.
    properties |= {"state": {"type": "null"}, "actions": {"type": "null"}}
    if policy.recurrent:
        states = policy.initial_state()
        properties["state"] = {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        name: _one_or_many(_state_schema(value)) for name, value in states.items()
                    },
                    "required": sorted(states),
                    "additionalProperties": False,
                },
                {"type": "null"},
            ],
            "description": "`state` of the last answer, with as many rows as obs; left out: a new episode begins",
        }
    if policy.scores_actions:
        properties["actions"] = _one_or_many(space_schema(policy.action_space)) | {
            "description": "logged actions to be scored, one an observation; no others are"
        }
    return {
        "type": "object",
        "properties": properties,
        "required": ["obs"],
        "additionalProperties": False,
    }


def answer_schema(policy: Policy, answer: Mapping[str, Any]) -> Schema:
    """JSON schema of its answer, of which `answer` is one for a single observation."""
    properties: Schema = {"policy": {"type": "string"}, "version": {"type": "string"}}
    for name, value in answer.items():
        if name == "state":
            properties[name] = {"type": "object"}
        elif name not in properties:
            array = np.asarray(value)
            kind = {"b": "boolean", "i": "integer", "u": "integer"}.get(array.dtype.kind, "number")
            item: Schema = {"type": [kind, "null"]} if kind == "number" else {"type": kind}
            properties[name] = _one_or_many(_nested(item, array.shape))
    properties["action"]["description"] = f"in {policy.action_space}"
    return {"type": "object", "properties": properties, "required": ["policy", "version", "action"]}


def space_schema(space: gymnasium.Space[Any], missing: bool = False) -> Schema:
    """JSON schema of one element of a space.  missing: null is a number that is not there."""
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        return {"type": "integer", "minimum": first, "maximum": first + int(space.n) - 1}
    if isinstance(space, spaces.MultiDiscrete):
        start = np.asarray(space.start)
        return _box(start, start + np.asarray(space.nvec) - 1, "integer", missing)
    if isinstance(space, spaces.MultiBinary):
        return _nested({"type": "integer", "minimum": 0, "maximum": 1}, space.shape)
    if isinstance(space, spaces.Box):
        if np.issubdtype(space.dtype, np.floating):
            most = np.finfo(space.dtype).max
            low, high = np.maximum(space.low, -most), np.minimum(space.high, most)
            return _box(low, high, "number", missing)
        return _box(space.low, space.high, "integer", missing)
    raise DataError(f"observations of {space} cannot be described")


def _state_schema(value: Tensor) -> Schema:
    if value.is_floating_point():
        most = torch.finfo(value.dtype).max
        return _nested({"type": "number", "minimum": -most, "maximum": most}, tuple(value.shape))
    least, most = torch.iinfo(value.dtype).min, torch.iinfo(value.dtype).max
    return _nested({"type": "integer", "minimum": least, "maximum": most}, tuple(value.shape))


def _box(low: Any, high: Any, kind: str, missing: bool) -> Schema:
    low, high = np.asarray(low), np.asarray(high)
    types: Any = [kind, "null"] if missing else kind
    same = bool((low == low.flat[0]).all() and (high == high.flat[0]).all())
    if low.ndim == 1 and not same and low.size <= PREFIX_ITEMS:
        items = [
            {"type": types, "minimum": a, "maximum": b}
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        return {"type": "array", "prefixItems": items, "minItems": low.size, "maxItems": low.size}
    item = {"type": types, "minimum": low.min().item(), "maximum": high.max().item()}
    return _nested(item, low.shape)


def _nested(item: Schema, shape: tuple[int, ...]) -> Schema:
    for n in reversed(shape):
        item = {"type": "array", "items": item, "minItems": n, "maxItems": n}
    return item


def _one_or_many(one: Schema) -> Schema:
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
