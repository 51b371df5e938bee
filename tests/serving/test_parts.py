"""Tokens, bodies, names and clients, each by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobula.client import AccessError, AsyncPolicyClient, PolicyClient, RequestError, Retries
from mobula.errors import ClusterError, ConfigError
from mobula.serving import commands, tokens, wire

# Tokens -----------------------------------------------------------------------------------------------------


def test_tokens_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "tokens.json"
    token, _ = tokens.new(file, "robot", ["policies"], 5.0)
    text = file.read_text()
    assert token not in text and token.removeprefix(tokens.PREFIX) not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keeper = tokens.Doorkeeper(tokens.read(file))
    found = keeper.grant(f"Bearer {token}")
    assert found is not None and found[1] == tokens.Grant("robot", frozenset({"policies"}), 5.0)
    for header in (token, "Bearer", f"Basic {token}", f"Bearer {token}x", f"Bearer {tokens.digest(token)}"):
        assert keeper.grant(header) is None
    tokens.revoke(file, "robot")
    assert tokens.Doorkeeper(tokens.read(file)).grant(f"Bearer {token}") is None


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"abc": {}},
        {"0" * 64: []},
        {"0" * 64: {"name": "a"}},
        {"0" * 64: {"name": "a", "scopes": []}},
        {"0" * 64: {"name": "a", "scopes": ["root"]}},
        {"0" * 64: {"name": "a", "scopes": ["*"], "rate": 0}},
        {"0" * 64: {"name": "a", "scopes": ["*"], "rate": True}},
    ],
)
def test_tables_that_are_none(table: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        tokens.grants_from(table)
    (tmp_path / "t.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"t\.json"):
        tokens.read(tmp_path / "t.json")


def test_names_of_tokens(tmp_path: Path) -> None:
    tokens.new(tmp_path / "t", "a")
    for name in ("a", "", "a b", "../x"):
        with pytest.raises(ConfigError):
            tokens.new(tmp_path / "t", name)
    with pytest.raises(ConfigError, match="it holds a"):
        tokens.revoke(tmp_path / "t", "b")


def test_a_rate_is_kept_over_any_second() -> None:
    """A bucket of two tokens a second: a burst of two, then one each half second."""
    keeper = tokens.Doorkeeper({})
    # In eighths of a second, which floating-point numbers hold exactly.
    passed = [at for at in range(41) if keeper.wait("k", 2.0, at / 8) == 0]
    assert passed == [0, 1, *range(4, 41, 4)]
    assert keeper.wait("other", 2.0, 5.0) == 0
    assert keeper.wait("k", None, 5.0) == 0
    fresh = tokens.Doorkeeper({})
    assert fresh.wait("k", 0.5, 0.0) == 0
    assert fresh.wait("k", 0.5, 1.0) == pytest.approx(1.0)
    assert fresh.wait("k", 0.5, 2.0) == 0


# Bodies -----------------------------------------------------------------------------------------------------

arrays = hnp.arrays(
    st.sampled_from(["<f4", "<f8", "<i8", "<i4", "|u1", "|b1"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
)


@given(arrays)
def test_arrays_survive_messagepack(array: np.ndarray[Any, Any]) -> None:
    found = wire.read(wire.write({"obs": array}, wire.MSGPACK), wire.MSGPACK)["obs"]
    assert found.dtype == array.dtype and found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@given(arrays)
def test_arrays_survive_json_up_to_nan(array: np.ndarray[Any, Any]) -> None:
    found = np.array(wire.read(wire.write({"obs": array}, wire.JSON), wire.JSON)["obs"], dtype=np.float64)
    wanted = np.where(np.isfinite(array), array, np.nan).astype(np.float64)
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O"},
        {"dtype": "<c16"},
        {"dtype": "<U4"},
        {"dtype": "f4,f4"},
        {"dtype": 3},
        {"dtype": "<f16"},
        {"shape": [3]},
        {"shape": [-1]},
        {"shape": [2.0]},
        {"shape": "2"},
        {"shape": [1] * 20 + [2]},
        {"shape": [2**40, 0]},
        {"data": "text"},
        {"data": b"123"},
    ],
)
def test_arrays_that_lie_are_refused(change: dict[str, Any]) -> None:
    import msgpack

    lie = {"dtype": "<f4", "shape": [2], "data": b"\0" * 8, **change}
    with pytest.raises(wire.BadBody):
        wire.read(msgpack.packb({"obs": lie}), wire.MSGPACK)


@given(st.binary(max_size=200), st.sampled_from([wire.JSON, wire.MSGPACK]))
def test_any_bytes_are_read_or_refused(body: bytes, kind: str) -> None:
    with contextlib.suppress(wire.BadBody):
        assert isinstance(wire.read(body, kind), dict)


# Names ------------------------------------------------------------------------------------------------------


def test_names_of_artefacts(tmp_path: Path) -> None:
    assert commands.named(["models:/cart/3", "b=runs/x", str(tmp_path / "run 1" / "policy")]) == {
        "cart": "models:/cart/3",
        "b": "runs/x",
        "run-1": str(tmp_path / "run 1" / "policy"),
    }
    assert commands.named(["runs/x"], "grid") == {"grid": "runs/x"}
    assert commands.named(["./a=b"]) == {"a-b": "./a=b"}
    with pytest.raises(ConfigError, match="two artefacts"):
        commands.named(["a/x", "b/x"])
    with pytest.raises(ConfigError, match="--name"):
        commands.named(["a", "b"], "c")


# Clients ----------------------------------------------------------------------------------------------------


def server(*answers: Any) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport that gives `answers` one after the other (the last one again and again), and what it was asked."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    return httpx.MockTransport(handle), seen


def good() -> httpx.Response:
    body = wire.write(
        {"policy": "p", "version": "v", "action": np.array([1]), "x_hat": np.zeros(2)}, wire.MSGPACK
    )
    return httpx.Response(200, content=body, headers={"content-type": wire.MSGPACK})


def failed(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "no", "param": "obs"}}, headers=headers)


QUICK = Retries(attempts=4, first=0.001, longest=0.002)


def ask(transport: httpx.MockTransport, mode: str) -> Any:
    if mode == "sync":
        client = PolicyClient("http://x", "t", retries=QUICK)
        client.http = httpx.Client(**client.settings, transport=transport)
        with client:
            return client.act("p", [1.0, 2.0], seed=3)

    async def run() -> Any:
        client = AsyncPolicyClient("http://x", "t", retries=QUICK)
        client.http = httpx.AsyncClient(**client.settings, transport=transport)
        async with client:
            return await client.act("p", [1.0, 2.0], seed=3)

    return asyncio.run(run())


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_may_be_lost_on_the_way_is_sent_again(mode: str) -> None:
    transport, seen = server(
        httpx.ConnectError("gone"), httpx.Response(500, text="Internal Server Error"), failed(503), good()
    )
    answer = ask(transport, mode)
    assert (answer.action.tolist(), answer.version, answer.fields["x_hat"].shape) == ([1], "v", (2,))
    assert len(seen) == 4 and len({request.content for request in seen}) == 1
    assert seen[0].headers["authorization"] == "Bearer t"
    sent = wire.read(seen[0].content, wire.MSGPACK)
    assert sent["obs"].tolist() == [1.0, 2.0] and sent["seed"] == 3 and "state" not in sent


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_helps_nobody_is_not_sent_again(mode: str) -> None:
    for answer, error in (
        (failed(401), AccessError),
        (failed(403), AccessError),
        (failed(404), RequestError),
        (failed(422), RequestError),
        (failed(500), ClusterError),
    ):
        transport, seen = server(answer)
        with pytest.raises(error, match="no"):
            ask(transport, mode)
        assert len(seen) == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_service_that_is_away(mode: str) -> None:
    transport, seen = server(httpx.ConnectError("refused"))
    with pytest.raises(ClusterError, match="4 attempts"):
        ask(transport, mode)
    assert len(seen) == 4


def test_pauses_grow_and_a_server_may_say_how_long() -> None:
    retries = Retries(first=0.1, longest=1.0)
    pauses = [[retries.pause(attempt, None) for _ in range(500)] for attempt in range(6)]
    for attempt, found in enumerate(pauses):
        most = min(1.0, 0.1 * 2**attempt)
        assert min(found) >= 0 and 0.9 * most < max(found) <= most
    assert retries.pause(0, failed(429, **{"retry-after": "3"})) == 3.0


def test_a_refused_field_is_named() -> None:
    transport, _ = server(failed(422))
    with pytest.raises(RequestError) as caught:
        ask(transport, "sync")
    assert (caught.value.status, caught.value.param) == (422, "obs")
