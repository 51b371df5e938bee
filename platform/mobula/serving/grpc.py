"""The act route over gRPC, through Serve's own gRPC proxy.

`policy_service.proto` is for clients in other languages.  The same messages are described here, so that neither generated code nor its
protobuf version is part of the package; a test compiles the file and compares.
"""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from mobula.errors import DataError
from mobula.serving import wire
from mobula.serving.guard import Refusal, admitted
from mobula.serving.schemas import Problem
from mobula.serving.tokens import Doorkeeper

PACKAGE = "mobula"
FILE = "mobula/serving/policy_service.proto"
METHOD = "/mobula.PolicyService/Act"
SERVICER = "mobula.serving.grpc.add_PolicyServiceServicer_to_server"
"""For `grpc_servicer_functions` of Serve's grpc_options."""

STATUS = {
    "authentication": grpc.StatusCode.UNAUTHENTICATED,
    "permission": grpc.StatusCode.PERMISSION_DENIED,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "invalid_request": grpc.StatusCode.INVALID_ARGUMENT,
    "rate_limit": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
}

# Messages ---------------------------------------------------------------------------------------------------

_Field = descriptor_pb2.FieldDescriptorProto


def _file() -> descriptor_pb2.FileDescriptorProto:
    """What `policy_service.proto` says."""
    file = descriptor_pb2.FileDescriptorProto(name=FILE, package=PACKAGE, syntax="proto3")
    array = file.message_type.add(name="Array")
    _add(array, "dtype", 1, _Field.TYPE_STRING)
    _add(array, "shape", 2, _Field.TYPE_INT64, repeated=True)
    _add(array, "data", 3, _Field.TYPE_BYTES)
    request = file.message_type.add(name="ActRequest")
    _add(request, "policy", 1, _Field.TYPE_STRING)
    _add(request, "obs", 2, _Field.TYPE_MESSAGE, of="Array")
    _add(request, "explore", 3, _Field.TYPE_BOOL, optional=True)
    _add(request, "seed", 4, _Field.TYPE_INT64, optional=True)
    _add_map(request, "state", 5)
    _add(request, "actions", 6, _Field.TYPE_MESSAGE, of="Array", optional=True)
    answer = file.message_type.add(name="ActAnswer")
    _add(answer, "policy", 1, _Field.TYPE_STRING)
    _add(answer, "version", 2, _Field.TYPE_STRING)
    _add_map(answer, "fields", 3)
    _add_map(answer, "state", 4)
    service = file.service.add(name="PolicyService")
    service.method.add(name="Act", input_type=".mobula.ActRequest", output_type=".mobula.ActAnswer")
    return file


def _add(
    message: Any,
    name: str,
    number: int,
    type: Any,
    *,
    of: str = "",
    repeated: bool = False,
    optional: bool = False,
) -> None:
    field = message.field.add(name=name, number=number, type=type, json_name=name)
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if of:
        field.type_name = f".{PACKAGE}.{of}"
    if optional:
        # proto3 keeps whether such a field was set in a union of its own.
        field.proto3_optional = True
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")


def _add_map(message: Any, name: str, number: int) -> None:
    entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
    entry.options.map_entry = True
    _add(entry, "key", 1, _Field.TYPE_STRING)
    _add(entry, "value", 2, _Field.TYPE_MESSAGE, of="Array")
    _add(message, name, number, _Field.TYPE_MESSAGE, of=f"{message.name}.{entry.name}", repeated=True)


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def _class(name: str) -> Any:
    found: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
    # Serve sends requests from its proxy to the replica: the class must be found by its name.
    found.__module__ = __name__
    return found


Array = _class("Array")
ActRequest = _class("ActRequest")
ActAnswer = _class("ActAnswer")


def to_message(array: Any) -> Any:
    """An Array of a NumPy array."""
    packed = wire.packed(np.asarray(array))
    return Array(dtype=packed["dtype"], shape=packed["shape"], data=packed["data"])


def from_message(message: Any, name: str) -> np.ndarray[Any, Any]:
    """The NumPy array of an Array.  Raises DataError that begins with `name`."""
    try:
        found = wire.unpacked({"dtype": message.dtype, "shape": list(message.shape), "data": message.data})
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {error}") from None
    return np.asarray(found)


# Server -----------------------------------------------------------------------------------------------------


def add_PolicyServiceServicer_to_server(servicer: Any, server: Any) -> None:
    """What protoc would have generated; Serve asks for a function of this form."""
    handlers = {
        "Act": grpc.unary_unary_rpc_method_handler(
            servicer.Act,
            request_deserializer=ActRequest.FromString,
            response_serializer=ActAnswer.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mobula.PolicyService", handlers),))


async def remote_act(backend: Any, doorkeeper: Doorkeeper | None, request: Any, context: Any) -> Any:
    """The answer to a gRPC request; what is wrong with it becomes the call's status."""
    try:
        if doorkeeper is not None:
            metadata = {name.lower(): value for name, value in context.invocation_metadata()}
            admitted(doorkeeper, metadata.get("authorization", ""), "policies")
        card = backend.cards.get(request.policy)
        if card is None or card.kind != "policy":
            raise Refusal(404, "not_found", f"no policy {request.policy!r} is served")
        policy = await backend.policy(request.policy)
        if not request.HasField("obs"):
            raise DataError("obs: it is missing")
        asked = policy.check(
            from_message(request.obs, "obs"),
            explore=request.explore if request.HasField("explore") else None,
            seed=_seed(request),
            state={name: from_message(value, f"state.{name}") for name, value in request.state.items()}
            or None,
            actions=from_message(request.actions, "actions") if request.HasField("actions") else None,
            bounds=True,
        )
        answer = await backend.answer(policy, asked)
    except DataError as error:
        return _failed(context, Problem(message=str(error), type="invalid_request"))
    except Refusal as refusal:
        return _failed(context, refusal.problem)
    state = answer.pop("state", {})
    return ActAnswer(
        policy=request.policy,
        version=card.version,
        fields={name: to_message(value) for name, value in answer.items()},
        state={name: to_message(value) for name, value in state.items()},
    )


def _seed(request: Any) -> int | None:
    if not request.HasField("seed"):
        return None
    if request.seed < 0:
        raise DataError("seed: it is negative")
    return int(request.seed)


def _failed(context: Any, problem: Problem) -> Any:
    context.set_code(STATUS.get(problem.type, grpc.StatusCode.INTERNAL))
    context.set_details(problem.message)
    return ActAnswer()


# Client -----------------------------------------------------------------------------------------------------


def stub(channel: Any) -> Any:
    """The call `ActRequest -> ActAnswer` on a channel, synchronous or asyncio."""
    return channel.unary_unary(
        METHOD, request_serializer=ActRequest.SerializeToString, response_deserializer=ActAnswer.FromString
    )
