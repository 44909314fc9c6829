"""One exception of each client library; importable in workers, without pytest or asyncio."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# The module of each client, and the class that an `except` clause names.
CLIENTS: dict[str, tuple[str, str]] = {
    "aio_pika": ("aio_pika.exceptions", "MessageProcessError"),
    "aiohttp": ("aiohttp", "ClientResponseError"),
    "aiokafka": ("aiokafka.errors", "MessageSizeTooLargeError"),
    "aiormq": ("aiormq.exceptions", "ChannelNotFoundEntity"),
    "asyncmy": ("asyncmy.errors", "IntegrityError"),
    "asyncpg": ("asyncpg", "UniqueViolationError"),
    "azure": ("azure.core.exceptions", "HttpResponseError"),
    "boto3": ("botocore.exceptions", "ClientError"),
    "botocore": ("botocore.exceptions", "EndpointConnectionError"),
    "confluent_kafka": ("confluent_kafka", "KafkaException"),
    "elasticsearch": ("elasticsearch", "ApiError"),
    "google": ("google.api_core.exceptions", "TooManyRequests"),
    "grpc": ("grpc.aio", "AioRpcError"),
    "httpx": ("httpx", "HTTPStatusError"),
    "openai": ("openai", "RateLimitError"),
    "psycopg": ("psycopg.errors", "UniqueViolation"),
    "pydantic": ("pydantic", "ValidationError"),
    "pymongo": ("pymongo.errors", "BulkWriteError"),
    "redis": ("redis.exceptions", "ConnectionError"),
    "requests": ("requests", "HTTPError"),
    "sqlalchemy": ("sqlalchemy.exc", "IntegrityError"),
}


def imported(client: str) -> tuple[Any, Any]:
    """Return the module and the class of a client.

    Raises:
        ImportError: The client is not installed.
    """
    name, cls = CLIENTS[client]
    module = _module(name)
    return module, getattr(module, cls)


def _module(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def made(client: str) -> BaseException:
    """Return an exception of a client."""
    module, cls = imported(client)
    exc: BaseException
    match client:
        case "aio_pika":
            exc = cls("not processed", {"delivery_tag": 1})
        case "aiohttp":
            multidict, url = _module("multidict"), _module("yarl").URL("http://x")
            headers = multidict.CIMultiDictProxy(multidict.CIMultiDict({"Retry-After": "1"}))
            info = module.RequestInfo(url, "GET", headers, url)
            exc = cls(info, (), status=429, message="slow", headers={"Retry-After": "1"})
        case "aiormq":
            exc = cls(404, "no queue")
        case "asyncmy":
            exc = cls(1062, "duplicate")
        case "asyncpg":
            exc = cls.new(
                {
                    "S": "ERROR",
                    "C": "23505",
                    "M": "dup",
                    "D": "Key (id)=(1) already exists.",
                    "n": "pk",
                }
            )
        case "boto3":
            exc = _modeled()
        case "botocore":
            exc = cls(endpoint_url="http://x")
        case "confluent_kafka":
            exc = cls(module.KafkaError(module.KafkaError._MSG_TIMED_OUT, "slow"))
        case "elasticsearch":
            elastic = _module("elastic_transport")
            node = elastic.NodeConfig("http", "h", 1)
            meta = elastic.ApiResponseMeta(429, "1.1", elastic.HttpHeaders(), 0.1, node)
            exc = cls("429", meta, {"error": 1})
        case "google":
            exc = cls("slow", errors=[1])
        case "grpc":
            exc = cls(
                _module("grpc").StatusCode.UNAVAILABLE,
                module.Metadata(("a", "b")),
                module.Metadata(),
                "details",
            )
        case "httpx":
            exc = cls("429", request=_response().request, response=_response())
        case "openai":
            exc = cls("slow", response=_response(), body={"code": "rate"})
        case "pydantic":
            exc = _invalid(module)
        case "pymongo":
            exc = cls({"writeErrors": [{"index": 1, "code": 11000}]})
        case "requests":
            exc = cls("429", response=module.Response())
        case "sqlalchemy":
            exc = cls("insert into t values (?)", (1,), ValueError("UNIQUE constraint failed"))
        case _:
            exc = cls(f"{client} failed")
    return exc


def _modeled() -> BaseException:
    """Return an exception of a class that a boto3 client generates."""
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = _module("boto3").client("dynamodb", region_name="x", **keys)
    exc: BaseException = client.exceptions.ProvisionedThroughputExceededException(
        {"Error": {"Code": "P", "Message": "slow"}}, "BatchWriteItem"
    )
    return exc


def _response() -> Any:
    httpx = _module("httpx")
    return httpx.Response(
        429, request=httpx.Request("POST", "http://x"), headers={"retry-after": "2"}
    )


def _invalid(pydantic: Any) -> BaseException:
    class Model(pydantic.BaseModel):  # type: ignore[misc]
        number: int

    try:
        Model(number="x")
    except ValueError as exc:
        return exc
    raise AssertionError


def fail(batch: list[tuple[str, str]]) -> list[Any]:
    """Raise an exception of the client of the first item, or return one for each.

    Args:
        batch: Pairs of "raise" or "return" and a client.
    """
    how, client = batch[0]
    if how == "raise":
        raise made(client)
    return [made(client) for _ in batch]
