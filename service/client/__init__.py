"""The SDK: every route of the service as a typed method, sync and async.

with ErrataClient() as errata:
    edit = errata.submit("The capital of Sikinia is", "Bergen")
    errata.wait([edit.id])
    print(errata.ask("The capital of Sikinia is").text)
"""

from service.client.asynchronous import AsyncErrataClient
from service.client.calls import Answer
from service.client.errors import ApiError, ClientError, ConnectionFailedError, WaitTimeoutError
from service.client.synchronous import ErrataClient
from service.client.waiting import AT_REST

__all__ = [
    "AT_REST",
    "Answer",
    "ApiError",
    "AsyncErrataClient",
    "ClientError",
    "ConnectionFailedError",
    "ErrataClient",
    "WaitTimeoutError",
]
