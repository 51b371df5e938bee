"""The service's OpenAPI document: FastAPI's, with what each served artefact takes and gives."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mobula.serving.backend import Backend
from mobula.serving.guard import OPEN
from mobula.serving.schemas import ErrorAnswer

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "the body cannot be read"},
    401: {"model": ErrorAnswer, "description": "no token, or none of ours"},
    403: {"model": ErrorAnswer, "description": "the token lacks the scope"},
    404: {"model": ErrorAnswer, "description": "nothing of that name is served"},
    413: {"model": ErrorAnswer, "description": "the body is too large"},
    422: {"model": ErrorAnswer, "description": "a field is missing or wrong; `param` names it"},
    429: {"model": ErrorAnswer, "description": "the token's rate is used up"},
    500: {"model": ErrorAnswer, "description": "the service failed"},
    504: {"model": ErrorAnswer, "description": "the answer took too long"},
}

DESCRIPTION = """Trained policies, mechanisms, planners and language models behind one address.

Every request but the health checks carries `Authorization: Bearer TOKEN`.  Errors have one form, `{"error": {message, type, param,
code}}`, which OpenAI's clients read too.  Policies take and give JSON, MessagePack (`application/x-msgpack`) or, as
`application/octet-stream`, the bytes of an array of observations."""


def openapi(app: FastAPI, backend: Backend) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, with the act route of each policy and the reports of each mechanism, and their examples."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    for path in OPEN:
        document["paths"][path]["get"]["security"] = []
    errors = {
        str(status): {
            "description": entry["description"],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
        }
        for status, entry in [*ERRORS.items(), (415, {"description": "the body's type is not read"})]
    }
    # FastAPI describes errors with the type of the route's own answer.
    for entry in document["paths"].values():
        for operation in entry.values():
            operation["responses"].update({k: v for k, v in errors.items() if k in operation["responses"]})
    for name, card in backend.cards.items():
        schemas = backend.schemas.get(name, {})
        if card.kind == "policy":
            document["paths"][f"/v1/policies/{name}/act"] = {
                "post": _operation(
                    f"act_{name}",
                    "policies",
                    f"{card.method} acts in {card.env}",
                    schemas["request"],
                    schemas["answer"],
                    card.example,
                    errors,
                )
            }
        if "reports" in schemas:
            reports = dict(schemas["reports"])
            document["components"]["schemas"].update(_moved(reports.pop("$defs", {})))
            request = {
                "type": "object",
                "properties": {
                    "reports": _moved(reports),
                    "seed": {
                        "anyOf": [
                            {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
                            {"type": "null"},
                        ]
                    },
                },
                "required": ["reports"],
                "additionalProperties": False,
            }
            answer = {"$ref": "#/components/schemas/MechanismAnswer"}
            example = schemas.get("mechanism_example") or card.example
            document["paths"][f"/v1/mechanisms/{name}/run"] = {
                "post": _operation(
                    f"run_{name}", "mechanisms", f"runs {name}", request, answer, example, errors
                )
            }
    return document


def _operation(
    identity: str, tag: str, summary: str, request: Any, answer: Any, example: Any, errors: Any
) -> dict[str, Any]:
    example = example or {}
    given = {"schema": request, "example": example.get("request")}
    return {
        "operationId": identity,
        "tags": [tag],
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": given}},
        "responses": {
            "200": {
                "description": "the answer",
                "content": {"application/json": {"schema": answer, "example": example.get("answer")}},
            },
            **errors,
        },
    }


def _moved(schema: Any) -> Any:
    """A schema of pydantic's whose definitions stand among the document's components."""
    if isinstance(schema, dict):
        return {
            key: value.replace("#/$defs/", "#/components/schemas/")
            if key == "$ref" and isinstance(value, str)
            else _moved(value)
            for key, value in schema.items()
        }
    return [_moved(value) for value in schema] if isinstance(schema, list) else schema
