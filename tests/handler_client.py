"""A client of the Lambda function in this process: what the tests of the worker share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from dask._task_spec import Task
from obstore.store import MemoryStore

from lambda_worker import codec, handler, protocol
from lambda_worker.protocol import Body, GroupRequest, Request, Value
from lambda_worker.store import Store

RUN, SECRET = "run", b"s" * 32
OTHER_RUN, OTHER_SECRET = "other", b"o" * 32
CONTEXT = SimpleNamespace(memory_limit_in_mb="1769", aws_request_id="41d0")


def name_of(label: str, run: str = RUN) -> str:
    return protocol.object_name("prefix", run, label)


@dataclass
class Client:
    """Builds requests by hand and reads replies, sharing a bucket with the worker."""

    store: Store
    inline_bytes: int = 100_000
    secrets: dict[str, bytes] = field(default_factory=lambda: {RUN: SECRET})

    def put(self, label: str, value: Any, run: str = RUN, secret: bytes = SECRET) -> Value:
        """Store an object; the value that refers to it."""
        name = name_of(label, run)
        data = codec.dumps(value, secret, name)
        self.store.put_new(name, data)
        return Value(name, len(data))

    def inline(self, label: str, value: Any) -> Value:
        name = name_of(label)
        data = codec.dumps(value, SECRET, name)
        return Value(name, len(data), data)

    def group(self, *tasks: Task, outputs: Any = None, inputs: Any = None) -> GroupRequest:
        """A group of tasks; by default its last one's value is its output."""
        inputs = inputs or {}
        outputs = [tasks[-1].key] if outputs is None else outputs
        body = Body(list(tasks), list(inputs), list(range(len(inputs))), outputs)
        return GroupRequest(
            self.inline(f"body-{tasks[0].key}", body.fields()),
            list(inputs.values()),
            [name_of(str(key)) for key in outputs],
        )

    def event(self, *groups: GroupRequest) -> dict[str, Any]:
        request = Request(RUN, self.secrets, "bucket", self.inline_bytes, list(groups))
        return json.loads(json.dumps(request.to_json()))

    def call(self, *groups: GroupRequest) -> list[dict[str, Any]]:
        """Invoke the function; what it says of each group."""
        return json.loads(json.dumps(handler.handler(self.event(*groups), CONTEXT)))["groups"]

    def run(self, *tasks: Task, inputs: Any = None) -> dict[str, Any]:
        (said,) = self.call(self.group(*tasks, inputs=inputs))
        return said

    def load(self, record: dict[str, Any]) -> Any:
        value = Value.from_json(record)
        data = value.data
        if data is None:
            data = self.store.get(value.name, value.size)
        assert len(data) == value.size
        return codec.loads(data, SECRET, value.name)

    def result(self, *tasks: Task, inputs: Any = None) -> Any:
        return self.load(self.run(*tasks, inputs=inputs)["outputs"][0])

    def objects(self) -> set[str]:
        return {e["path"] for page in obstore.list(self.store.bucket) for e in page}


@pytest.fixture
def client(monkeypatch):
    """A client of a new execution environment whose S3 is in memory."""
    bucket = MemoryStore()
    environment = handler.Environment()
    environment._stores["bucket"] = Store(bucket)
    monkeypatch.setattr(handler, "environment", environment)
    monkeypatch.setattr(protocol, "resolvers", {})
    yield Client(Store(bucket))
    environment.fetching.shutdown()
    environment.uploading.shutdown()


def inc(x):
    return x + 1
