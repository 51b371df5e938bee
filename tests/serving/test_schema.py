"""schemathesis holds the service against its own OpenAPI document: valid and invalid requests of every route."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app
from mobula.serving.tokens import Doorkeeper, grants_from

from .conftest import Keys

QUIET = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def header(keys: Keys) -> dict[str, str]:
    return {"Authorization": f"Bearer {keys.everything}"}


@pytest.fixture(scope="module")
def schema(artefacts: dict[str, str], keys: Keys, header: dict[str, str]) -> Any:
    app = create_app(LocalBackend(artefacts), Doorkeeper(grants_from(keys.table)))
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=header)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_server_error_and_no_violation(schema: Any, header: dict[str, str], mode: GenerationMode) -> None:
    """All of schemathesis' checks: no 5xx, documented statuses and types, answers as described, bad requests refused."""
    called = 0
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.path in ("/healthz", "/readyz") and mode is GenerationMode.NEGATIVE:
            # Nothing about a request without parameters, and without a token, can be wrong.
            continue
        # What a planner reads in words, a tokenizer makes of a text or a mechanism asks of its bids is beyond a schema, and so is that a
        # recurrent state has as many rows as the observations; what a policy asks of an observation is not.
        exact = (
            operation.path.endswith("/act") and "bandit" not in operation.path
        ) or operation.method == "get"
        called += tried(operation, mode, header, [] if exact else [positive_data_acceptance])
    assert called > 100


def tried(operation: Any, mode: GenerationMode, header: dict[str, str], excluded: list[Any]) -> int:
    """Number of requests that were sent, each of them checked."""
    called = 0

    @QUIET
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        nonlocal called
        called += 1
        case.call_and_validate(headers=header, excluded_checks=excluded)

    call()
    return called
