"""A client of a method that returns an Operation, on grpcio and googleapis' own messages.

    operations.py HOST:PORT AUTHORITY

Calls it three times: waits for the first, which succeeds, and for the second, which the service
refuses, and cancels the third, which is delayed. Then lists them, and deletes the first.
"""

import sys

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import duration_pb2, wrappers_pb2

address, authority = sys.argv[1:]
channel = grpc.insecure_channel(address, options=[("grpc.default_authority", authority)])
make = channel.unary_unary(
    "/shop.Orders/Make",
    request_serializer=wrappers_pb2.StringValue.SerializeToString,
    response_deserializer=operations_pb2.Operation.FromString,
)
operations = operations_pb2_grpc.OperationsStub(channel)


def wait(name):
    limit = duration_pb2.Duration(seconds=10)
    request = operations_pb2.WaitOperationRequest(name=name, timeout=limit)
    return operations.WaitOperation(request)


made, call = make.with_call(wrappers_pb2.StringValue(value="good"))
assert made.name.startswith("operations/") and not made.done, made
assert ("outrigger-message-id", made.name.split("/")[1]) in call.initial_metadata()
done = wait(made.name)
assert done.done and done.WhichOneof("result") == "response", done
answer = wrappers_pb2.StringValue()
assert done.response.Unpack(answer) and answer.value == "made", done
assert operations.GetOperation(operations_pb2.GetOperationRequest(name=made.name)) == done

refused = make(wrappers_pb2.StringValue(value="bad"), metadata=[("x-kind", "bad")])
refused = wait(refused.name)
assert refused.done and refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], refused

delayed = make(wrappers_pb2.StringValue(value="later"), metadata=[("outrigger-delay", "1h")])
pending = operations.GetOperation(operations_pb2.GetOperationRequest(name=delayed.name))
assert not pending.done, pending
operations.CancelOperation(operations_pb2.CancelOperationRequest(name=delayed.name))
cancelled = operations.GetOperation(operations_pb2.GetOperationRequest(name=delayed.name))
assert cancelled.done and cancelled.error.code == grpc.StatusCode.CANCELLED.value[0], cancelled

def refused_with(code, call, request):
    try:
        call(request)
        raise AssertionError(f"{request} was answered")
    except grpc.RpcError as error:
        assert error.code() == code, error


def names(**asked):
    found = operations.ListOperations(operations_pb2.ListOperationsRequest(**asked))
    return [operation.name for operation in found.operations], found.next_page_token


get, delete = operations_pb2.GetOperationRequest, operations_pb2.DeleteOperationRequest
refused_with(grpc.StatusCode.NOT_FOUND, operations.GetOperation, get(name="operations/nothing"))

everything = [made.name, refused.name, delayed.name]
assert names(name="operations") == (everything, ""), names()
page, token = names(page_size=2)
assert page == everything[:2] and token, (page, token)
assert names(page_size=2, page_token=token) == (everything[2:], "")
refused_with(
    grpc.StatusCode.INVALID_ARGUMENT,
    operations.ListOperations,
    operations_pb2.ListOperationsRequest(filter="done=true"),
)

operations.DeleteOperation(delete(name=made.name))
refused_with(grpc.StatusCode.NOT_FOUND, operations.GetOperation, get(name=made.name))
refused_with(grpc.StatusCode.NOT_FOUND, operations.DeleteOperation, delete(name=made.name))
# A dead letter is the operator's.
refused_with(
    grpc.StatusCode.FAILED_PRECONDITION, operations.DeleteOperation, delete(name=refused.name)
)
assert names() == (everything[1:], ""), names()
print("operations ok")
