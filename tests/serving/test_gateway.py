"""The routes, answered in this process: who may pass, what is read, what is refused and how, what comes out."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from mobula.artifact import load_policy
from mobula.errors import DataError
from mobula.serving import wire
from mobula.serving.backend import LocalBackend, answered
from mobula.serving.gateway import create_app
from mobula.serving.guard import NOTE_SECONDS
from mobula.serving.tokens import Doorkeeper, grants_from

from .conftest import Keys


@pytest.fixture(scope="module")
def backend(artefacts: dict[str, str]) -> LocalBackend:
    return LocalBackend(artefacts)


@pytest.fixture(scope="module")
def service(backend: LocalBackend, keys: Keys) -> TestClient:
    """Without a token."""
    app = create_app(backend, Doorkeeper(grants_from(keys.table)), max_body_bytes=100_000)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(service: TestClient, keys: Keys) -> TestClient:
    """With a token for everything."""
    return TestClient(service.app, headers={"authorization": f"Bearer {keys.everything}"})


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found = response.json()
    assert set(found) == {"error"} and "Traceback" not in response.text
    return found["error"]  # type: ignore[no-any-return]


ROUTES = [
    ("GET", "/v1/models", "models", None),
    ("GET", "/v1/models/cart", "models", None),
    ("GET", "/openapi.json", "models", None),
    ("GET", "/docs", "models", None),
    ("POST", "/v1/policies/cart/act", "policies", {"obs": [0, 0, 0, 0]}),
    ("POST", "/v1/mechanisms/auction/run", "mechanisms", {"reports": {"bids": {"a": 2}}}),
    ("POST", "/v1/plans", "plans", {"goal": "(2, 2)"}),
    ("POST", "/v1/chat/completions", "completions", {"model": "tiny", "messages": [], "max_tokens": 1}),
    ("POST", "/v1/completions", "completions", {"model": "tiny", "prompt": "a", "max_tokens": 1}),
    ("GET", "/metrics", "metrics", None),
]


def test_every_route_of_the_application_is_in_the_table(service: TestClient) -> None:
    """So that the two tests below leave none out."""
    api: Any = service.app.app.api  # type: ignore[attr-defined]
    paths = {getattr(route, "path", "") for route in api.routes}
    filled = {path.replace("{name}", "*") for path in paths} - {"/healthz", "/readyz"}
    table = {path.replace("/cart", "/*").replace("/auction", "/*") for _, path, _, _ in ROUTES}
    assert filled == table


@pytest.mark.parametrize(("method", "path", "scope", "body"), ROUTES)
def test_without_a_token_401_without_the_scope_403(
    service: TestClient, keys: Keys, method: str, path: str, scope: str, body: Any
) -> None:
    for header in (
        {},
        {"authorization": "Bearer mob_wrong"},
        {"authorization": "Basic eDp5"},
        {"authorization": ""},
    ):
        refused = service.request(method, path, json=body, headers=header)
        assert problem(refused, 401)["type"] == "authentication"
        assert refused.headers["www-authenticate"].startswith(("Bearer", "Basic"))
    for other, token in keys.of.items():
        answer = service.request(method, path, json=body, headers={"authorization": f"Bearer {token}"})
        if other == scope:
            assert answer.status_code in (200, 422)
        else:
            assert scope in problem(answer, 403)["message"]


def test_unknown_addresses_ask_for_a_token_too(service: TestClient, client: TestClient) -> None:
    problem(service.get("/secret"), 401)
    assert problem(client.get("/secret"), 404)["type"] == "not_found"
    assert problem(client.get("/v1/plans"), 405)["type"] == "invalid_request"


def test_health_checks_need_no_token(service: TestClient) -> None:
    assert service.get("/healthz").json() == service.get("/readyz").json() == {"status": "ok"}


def test_a_browser_gives_the_token_as_a_password(service: TestClient, keys: Keys) -> None:
    word = base64.b64encode(f"me:{keys.everything}".encode()).decode()
    assert service.get("/docs", headers={"authorization": f"Basic {word}"}).status_code == 200


def test_a_rate_that_is_used_up_answers_429_with_the_time_to_wait(service: TestClient, keys: Keys) -> None:
    header = {"authorization": f"Bearer {keys.slow}"}
    statuses = [service.get("/v1/models", headers=header) for _ in range(3)]
    assert statuses[0].status_code == 200
    assert problem(statuses[2], 429)["type"] == "rate_limit"
    assert int(statuses[2].headers["retry-after"]) >= 1


def test_bodies_that_are_too_large_are_refused_declared_or_not(client: TestClient) -> None:
    body = json.dumps({"obs": [[0.0] * 4] * 20_000}).encode()
    assert problem(client.post("/v1/policies/cart/act", content=body), 413)["type"] == "too_large"

    def pieces() -> Any:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    assert problem(client.post("/v1/policies/cart/act", content=pieces()), 413)["type"] == "too_large"


# Acting -----------------------------------------------------------------------------------------------------


def test_act_answers_as_the_policy_does(client: TestClient, artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["swing"])
    obs = np.array([[0.6, -0.8, 3.0], [1.0, 0.0, -8.0]], dtype=np.float32)
    wanted = policy.answer(obs, explore=False)
    found = client.post("/v1/policies/swing/act", json={"obs": obs.tolist(), "explore": False}).json()
    assert (found["policy"], found["version"]) == ("swing", policy.version)
    np.testing.assert_allclose(found["action"], wanted["action"], rtol=1e-6)
    np.testing.assert_allclose(found["value"], wanted["value"], rtol=1e-6)
    assert "log_probability" not in found
    one = client.post("/v1/policies/swing/act", json={"obs": obs[0].tolist(), "explore": False}).json()
    np.testing.assert_allclose(one["action"], wanted["action"][0], rtol=1e-6)
    assert np.ndim(one["value"]) == 0


def test_log_probability_is_that_of_the_gaussian(client: TestClient, artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["swing"])
    found = client.post(
        "/v1/policies/swing/act", json={"obs": [0.6, -0.8, 1.0], "explore": True, "seed": 5}
    ).json()
    obs = torch.tensor([[0.6, -0.8, 1.0]])
    mean, log_std = policy.module._forward_inference({"obs": obs})["action_dist_inputs"][0].detach().tolist()
    # Pendulum's torque of [-2, 2] is drawn in [-1, 1].
    z = (found["action"][0] / 2 - mean) / np.exp(log_std)
    assert abs(found["action"][0]) < 2
    expected = -0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)
    assert found["log_probability"] == pytest.approx(expected, abs=1e-4)


def test_value_is_that_of_the_critic(artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["cart"])
    module: Any = policy.module
    obs = torch.tensor([[0.1, -0.2, 0.03, 0.4]])
    with torch.no_grad():
        wanted = float(module.vf(module.encoder(obs))[0, 0])
    assert float(policy.answer(obs[0].numpy())["value"]) == pytest.approx(wanted)


def test_the_formats_say_the_same(client: TestClient) -> None:
    obs = np.array([[0.6, -0.8, 3.0], [1.0, 0.0, -8.0]], dtype=np.float32)
    path, asked = "/v1/policies/swing/act", {"explore": True, "seed": 3}
    plain = client.post(path, json={"obs": obs.tolist(), **asked}).json()
    body = wire.write({"obs": obs, **asked}, wire.MSGPACK)
    packed = client.post(path, content=body, headers={"content-type": wire.MSGPACK})
    assert packed.headers["content-type"] == wire.MSGPACK
    unpacked = wire.read(packed.content, wire.MSGPACK)
    np.testing.assert_array_equal(unpacked["action"], np.array(plain["action"], dtype=np.float32))
    nested = client.post(
        path,
        content=wire.write({"obs": obs.tolist(), **asked}, wire.MSGPACK),
        headers={"content-type": "application/msgpack", "accept": "application/json"},
    ).json()
    assert nested["action"] == plain["action"]
    raw = client.post(
        f"{path}?explore=true&seed=3",
        content=obs.astype("<f4").tobytes(),
        headers={"content-type": wire.RAW, "accept": wire.RAW},
    )
    assert raw.headers["x-mobula-shape"] == "2,1"
    np.testing.assert_array_equal(
        np.frombuffer(raw.content, raw.headers["x-mobula-dtype"]).reshape(2, 1), unpacked["action"]
    )
    assert (
        client.post(path, content=obs.tobytes(), headers={"content-type": wire.RAW}).json()["policy"]
        == "swing"
    )


@pytest.mark.parametrize(
    ("policy", "body", "field"),
    [
        ("cart", {}, "obs"),
        ("cart", {"obs": [1, 2]}, "obs"),
        ("cart", {"obs": "zero"}, "obs"),
        ("cart", {"obs": None}, "obs"),
        ("cart", {"obs": [[0, 0, 0, 0], [0, 0]]}, "obs"),
        ("cart", {"obs": [0, 0, 0, None]}, "obs"),
        ("cart", {"obs": [0, 0, 0, 1e39]}, "obs"),
        ("cart", {"obs": [[[]]]}, "obs"),
        # Whole numbers may have any number of digits in JSON.
        ("cart", {"obs": [0, 0, 0, 10**309]}, "obs"),
        ("grid", {"obs": 10**309}, "obs"),
        (
            "bandit",
            {"obs": [0, 0], "state": {"mean": [0, 10**309], "cov": [[1, 0], [0, 1]], "age": 1}},
            "state.mean",
        ),
        ("swing", {"obs": [1.5, 0, 0]}, "obs"),
        ("grid", {"obs": 99}, "obs"),
        ("grid", {"obs": 0.5}, "obs"),
        ("cart", {"obs": [0, 0, 0, 0], "explore": "yes"}, "explore"),
        ("cart", {"obs": [0, 0, 0, 0], "explore": 1}, "explore"),
        ("cart", {"obs": [0, 0, 0, 0], "seed": -1}, "seed"),
        ("cart", {"obs": [0, 0, 0, 0], "seed": 1.5}, "seed"),
        ("cart", {"obs": [0, 0, 0, 0], "seed": 2**63}, "seed"),
        ("cart", {"obs": [0, 0, 0, 0], "state": {}}, "state"),
        ("cart", {"obs": [0, 0, 0, 0], "actions": 1}, "actions"),
        ("cart", {"obs": [0, 0, 0, 0], "temperature": 1}, "temperature"),
        ("bandit", {"obs": [0, 0], "state": {"mean": [0, 0]}}, "state"),
        ("bandit", {"obs": [0, 0], "state": {"mean": [0], "cov": [[1, 0], [0, 1]], "age": 1}}, "state.mean"),
        (
            "bandit",
            {"obs": [0, 0], "state": {"mean": [0, None], "cov": [[1, 0], [0, 1]], "age": 1}},
            "state.mean",
        ),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, policy: str, body: Any, field: str) -> None:
    found = problem(client.post(f"/v1/policies/{policy}/act", json=body), 422)
    assert found["type"] == "invalid_request"
    assert found["param"] == field and found["message"].startswith(field)


def test_a_wrong_shape_is_told_with_the_right_one(client: TestClient) -> None:
    found = problem(client.post("/v1/policies/cart/act", json={"obs": [1, 2, 3]}), 422)
    assert "(3,)" in found["message"] and "(4,)" in found["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (wire.JSON, b""),
        (wire.JSON, b"{"),
        (wire.JSON, b'{"obs": NaN}'),
        (wire.JSON, b"[1]"),
        (wire.JSON, b"\xff"),
        (wire.JSON, b"[" * 5000),
        (wire.MSGPACK, b"\xc1"),
        (wire.MSGPACK, b"\x81\xa3obs"),
        (wire.MSGPACK, b"\x81\x01\x02"),
        (wire.RAW, b""),
        (wire.RAW, b"\0" * 15),
    ],
)
def test_bodies_that_cannot_be_read(client: TestClient, kind: str, body: bytes) -> None:
    problem(client.post("/v1/policies/cart/act", content=body, headers={"content-type": kind}), 422)


def test_types_that_are_not_read(client: TestClient) -> None:
    problem(client.post("/v1/policies/cart/act", content=b"", headers={"content-type": "text/html"}), 415)


def test_names_that_are_not_served(client: TestClient) -> None:
    for name in ("nobody", "auction", "..%2f..%2fetc", "tiny"):
        assert (
            problem(client.post(f"/v1/policies/{name}/act", json={"obs": [0] * 4}), 404)["type"]
            == "not_found"
        )
    assert "cart" in problem(client.post("/v1/policies/car/act", json={"obs": [0] * 4}), 404)["message"]


def test_a_seed_draws_the_same_whatever_stands_beside_it(artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["swing"])
    obs = np.array([0.6, -0.8, 3.0], dtype=np.float32)
    alone = policy.answer(obs, explore=True, seed=11)
    neighbours = [
        policy.check(np.tile(obs, (n, 1)), explore=True, seed=s) for n, s in ((3, None), (5, 4), (1, 11))
    ]
    asked = policy.check(obs, explore=True, seed=11)
    together = policy.answers([*neighbours, asked, policy.check(obs, explore=False)])
    # The rounding of a matrix product may depend on its number of rows, the draws may not.
    np.testing.assert_allclose(together[3]["action"], alone["action"], rtol=1e-5)
    np.testing.assert_allclose(together[2]["action"][0], alone["action"], rtol=1e-5)
    assert together[4]["action"].shape == (1,) and "log_probability" not in together[4]
    many = policy.answers([policy.check(np.tile(obs, (100, 1)), explore=True)])[0]["log_probability"]
    assert len(np.unique(many)) > 90


def test_one_bad_request_of_a_batch_fails_alone(
    artefacts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(artefacts["grid"])
    module: Any = policy.module

    def served(batch: dict[str, Any]) -> dict[str, Any]:
        if bool((batch["obs"] == 3).any()):
            raise DataError("obs: 3 makes no sense today")
        return {"double": 2 * batch["obs"]}

    monkeypatch.setattr(module, "served", served)
    works = [(policy, policy.check(obs)) for obs in (1, 3, [2, 5])]
    first, second, third = answered(works)
    assert isinstance(second, DataError)
    assert first["double"] == 2 and third["double"].tolist() == [4, 10]  # type: ignore[index]


def test_policies_of_one_batch_do_not_mix(artefacts: dict[str, str]) -> None:
    cart, grid = load_policy(artefacts["cart"]), load_policy(artefacts["grid"])
    obs = np.zeros(4, dtype=np.float32)
    works = [(cart, cart.check(obs)), (grid, grid.check([1, 2])), (cart, cart.check(obs))]
    found: Any = answered(works)
    assert found[0]["value"] == found[2]["value"] == cart.answer(obs)["value"]
    np.testing.assert_array_equal(found[1]["probabilities"], grid.answer([1, 2])["probabilities"])


def test_recurrent_state_goes_in_and_out(client: TestClient, artefacts: dict[str, str]) -> None:
    policy = load_policy(artefacts["bandit"])
    state, expected = None, None
    for obs in ([0.3, -0.2], [None, None], [0.1, 0.4]):
        body = {"obs": obs, "explore": False, **({"state": state} if state else {})}
        found = client.post("/v1/policies/bandit/act", json=body).json()
        numbers = np.array(obs, dtype=np.float64)
        wanted = policy.answer(numbers, explore=False, state=expected)
        state, expected = found["state"], wanted["state"]
        np.testing.assert_allclose(found["x_hat"], wanted["x_hat"], rtol=1e-9)
        np.testing.assert_allclose(state["mean"], expected["mean"], rtol=1e-9)
    assert state["age"] == 3


# Planners, mechanisms ---------------------------------------------------------------------------------------


def test_a_plan_is_the_shortest_way(client: TestClient) -> None:
    found = client.post("/v1/plans", json={"goal": "be at (2, 0)", "state": "I stand at (0, 0)"}).json()
    # The wall at x = 1 is three cells high: three up, two across, three down.
    assert found["cost"] == 8 and len(found["plan"]) == 8
    assert found["safety"] == {"verdict": "safe", "reasons": ["no step enters a wall"]}
    x, y = 0, 0
    for step in found["plan"]:
        dx, dy = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}[step["action"]]
        x, y = x + dx, y + dy
        assert (x, y) not in {(1, 0), (1, 1), (1, 2)} and step["expectation"] == f"at {(x, y)}"
    assert (x, y) == (2, 0) and "8 steps" in found["rationale"]


def test_a_streamed_plan_is_the_same_in_pieces(client: TestClient) -> None:
    asked = {"goal": "(2, 0)", "state": "(0, 0)"}
    whole = client.post("/v1/plans", json=asked).json()
    with client.stream("POST", "/v1/plans", json={**asked, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line) for line in lines[:-1]]
    assert "".join(piece.get("rationale", "") for piece in pieces) == whole["rationale"]
    assert [piece["step"] for piece in pieces if "step" in piece] == whole["plan"]
    assert pieces[-1]["plan"]["cost"] == whole["cost"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"goal": ""}, "goal"),
        ({"goal": "somewhere"}, "goal"),
        ({"goal": "(9, 9)"}, "goal"),
        ({"goal": "(2, 0)", "max_steps": 3}, "max_steps"),
        ({"goal": "(2, 0)", "max_steps": 0}, "max_steps"),
    ],
)
def test_plans_that_cannot_be_made(client: TestClient, body: Any, field: str, stream: bool) -> None:
    response = client.post("/v1/plans", json={**body, "stream": stream})
    if stream and field in ("max_steps",) and body["max_steps"] == 3:
        # The planner finds out in the middle: the stream says it.
        assert "max_steps" in response.text and response.text.endswith("data: [DONE]\n\n")
    else:
        assert problem(response, 422)["param"] == field


def test_vickrey(client: TestClient) -> None:
    found = client.post(
        "/v1/mechanisms/auction/run", json={"reports": {"bids": {"a": 3, "b": 5, "c": 4}}}
    ).json()
    assert found["outcome"] == {"winner": "b"} and found["payments"] == {"a": 0, "b": 4, "c": 0}
    assert found["audit"]["second"] == 4
    tied = {"reports": {"bids": {"a": 5, "b": 5}}}
    winners = {
        client.post("/v1/mechanisms/auction/run", json={**tied, "seed": seed}).json()["outcome"]["winner"]
        for seed in (0, 1)
    }
    assert winners == {"a", "b"}


@pytest.mark.parametrize(
    ("reports", "field"),
    [
        ({}, "reports.bids"),
        ({"bids": {}}, "reports.bids"),
        ({"bids": {"a": "much"}}, "reports.bids.a"),
        ({"bids": {"a": -1}}, "reports.bids"),
        ({"bids": {"a": 1}, "tip": 1}, "reports.tip"),
    ],
)
def test_reports_that_make_no_sense(client: TestClient, reports: Any, field: str) -> None:
    found = problem(client.post("/v1/mechanisms/auction/run", json={"reports": reports}), 422)
    assert found["param"] == field


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the service logs; Ray keeps its loggers' records from the root."""
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "ray.serve"):
        yield caplog
    logger.removeHandler(caplog.handler)


# Failures ---------------------------------------------------------------------------------------------------


def test_what_breaks_inside_stays_inside(
    backend: LocalBackend, keys: Keys, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    async def broken(policy: Any, asked: Any) -> Any:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(backend, "answer", broken)
    app = create_app(backend, Doorkeeper(grants_from(keys.table)))
    client = TestClient(
        app, headers={"authorization": f"Bearer {keys.everything}"}, raise_server_exceptions=False
    )
    response = client.post("/v1/policies/cart/act", json={"obs": [0] * 4}, headers={"x-request-id": "r17"})
    found = problem(response, 500)
    assert "secret" not in response.text and "r17" in found["message"]
    assert "the secret of the house" in said.text


def test_what_takes_too_long_is_given_up(
    backend: LocalBackend, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(policy: Any, asked: Any) -> Any:
        await asyncio.sleep(30)

    monkeypatch.setattr(backend, "answer", slow)
    app = create_app(backend, None, timeout_s=0.05)
    assert (
        problem(TestClient(app).post("/v1/policies/cart/act", json={"obs": [0] * 4}), 504)["type"]
        == "timeout"
    )


def test_the_access_log_has_one_object_a_request(
    backend: LocalBackend, keys: Keys, said: pytest.LogCaptureFixture
) -> None:
    app = create_app(backend, Doorkeeper(grants_from(keys.table)))
    client = TestClient(app, headers={"authorization": f"Bearer {keys.everything}"})
    with client:
        for request_id in ("r18", "r19"):
            client.post("/v1/policies/cart/act", json={"obs": [0] * 4}, headers={"x-request-id": request_id})
        lines: set[str] = set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not any("r19" in line for line in lines):
            time.sleep(NOTE_SECONDS)
            client.get("/healthz")
            # A set: where Ray has not set its loggers up, the root hears them too.
            lines = {line for record in said.records for line in record.getMessage().splitlines()}
    (line,) = [line for line in lines if "r18" in line]
    found = json.loads(line)
    assert sum("r19" in line for line in lines) == 1 and "healthz" not in "".join(lines)
    assert (found["token"], found["status"], found["path"]) == ("everything", 200, "/v1/policies/cart/act")
    assert "mob_" not in line


# The document -----------------------------------------------------------------------------------------------


def test_the_examples_of_the_document_are_real(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    seen = 0
    for path, entry in document["paths"].items():
        operation = entry.get("post", {})
        given = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" not in given:
            continue
        seen += 1
        found = client.post(path, json=given["example"])
        assert found.status_code == 200, (path, found.text)
        wanted = operation["responses"]["200"]["content"]["application/json"]
        for schema, value in ((given["schema"], given["example"]), (wanted["schema"], found.json())):
            Draft202012Validator({**schema, "components": document["components"]}).validate(value)
        assert set(found.json()) == set(wanted["example"])
    assert seen == 5


def test_schemas_take_what_the_service_takes(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    def valid(name: str, body: Any) -> bool:
        schema = document["paths"][f"/v1/policies/{name}/act"]["post"]["requestBody"]["content"][
            "application/json"
        ]
        return Draft202012Validator(schema["schema"]).is_valid(body)

    for name, body in (
        ("cart", {"obs": [0, 0, 0, 0]}),
        ("cart", {"obs": [[0, 0, 0, 0]], "seed": None}),
        ("cart", {"obs": [0, 0, 0]}),
        ("cart", {"obs": [0, 0, 0, 0], "state": None}),
        ("cart", {"obs": []}),
        ("swing", {"obs": [0, 0, 9]}),
        ("swing", {"obs": [0, 0, 7.5]}),
        ("grid", {"obs": 24}),
        ("grid", {"obs": 25}),
        ("grid", {"obs": [0, 3]}),
        ("grid", {"obs": 1.5}),
        ("bandit", {"obs": [None, 1.0]}),
        ("cart", {"obs": [None, 0, 0, 0]}),
    ):
        status = client.post(f"/v1/policies/{name}/act", json=body).status_code
        assert valid(name, body) == (status == 200), (name, body, status)


def test_models_lists_everything(client: TestClient, artefacts: dict[str, str]) -> None:
    found = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert set(found) == set(artefacts)
    assert found["cart"]["kind"] == "policy" and found["cart"]["observation_space"]["shape"] == [4]
    assert found["bandit"]["recurrent"] and found["planner"]["kind"] == "planner"
    assert found["tiny"]["kind"] == "language_model" and found["auction"]["kind"] == "mechanism"
