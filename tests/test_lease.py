"""A run that has ended stops its workers; one that goes on is not stopped."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dask._task_spec import Task, TaskRef
from obstore.store import MemoryStore

from dask_lambda import LambdaScheduler
from dask_lambda import lease as client_lease
from dask_lambda.errors import RunDeletedError
from dask_lambda.local import LocalAWS
from lambda_worker.lease import LATE
from lambda_worker.store import Store
from tests.faults.proxy import Proxy, Request
from tests.helpers import eventually, report

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Names = Callable[[], list[str]]
#: Of 50 ms each: after so many of them the worker has looked for the lease.
TASKS, LOOKED = 300, 50


def step(directory: Path, number: int, seconds: float, *before: int) -> int:
    (directory / str(number)).touch()
    time.sleep(seconds)
    return number


def row(directory: Path, seconds: float = 0.05, count: int = TASKS) -> dict[str, Task]:
    """Many short tasks, each reading the one before: one group."""
    dsk = {}
    for i in range(count):
        before = [TaskRef(f"step-{i - 1}")] if i else []
        dsk[f"step-{i}"] = Task(f"step-{i}", step, directory, i, seconds, *before)
    return dsk


def lease_of(names: list[str]) -> str | None:
    return next((name for name in names if name.endswith("/lease")), None)


def logged(aws: LocalAWS, run: str) -> list[dict[str, Any]]:
    """What the function has logged of a run's invocations."""
    logs = aws.client("logs")
    try:
        pages = logs.get_paginator("filter_log_events").paginate(
            logGroupName=f"/aws/lambda/{aws.function}", filterPattern=f'"{run}"'
        )
        lines = [event["message"].strip() for page in pages for event in page["events"]]
    except logs.exceptions.ResourceNotFoundException:  # it has logged nothing at all
        return []
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return [record for record in records if record.get("run") == run]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("seen", [False, True], ids=["lease not seen yet", "lease seen"])
def test_after_ctrl_c_a_long_group_stops_between_its_tasks(
    aws: LocalAWS, connect: Connect, bucket_names: Names, tmp_path: Path, seen: bool
) -> None:
    scheduler = connect(default_task_seconds={"step": 0.05})
    assert len(scheduler.explain(_collection(row(tmp_path))).groups) == 1
    runs: list[str] = []

    def interrupt() -> None:
        if eventually(lambda: lease_of(bucket_names()), 60):
            runs.append(str(lease_of(bucket_names())).split("/")[-2])
        if seen:
            eventually(lambda: len(list(tmp_path.iterdir())) > LOOKED, 60)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        scheduler.get(row(tmp_path), f"step-{TASKS - 1}")
    thread.join()
    (run,) = runs
    assert eventually(lambda: any(line["cancelled"] for line in logged(aws, run)), 15)
    done = len(list(tmp_path.iterdir()))
    assert 0 < done < TASKS
    assert bucket_names() == []


def _collection(dsk: dict[str, Task]) -> Any:
    from dask.delayed import Delayed

    return Delayed(f"step-{TASKS - 1}", dsk)


def test_a_run_whose_lease_was_deleted_by_somebody_else_says_so(
    aws: LocalAWS, connect: Connect, bucket_names: Names, tmp_path: Path
) -> None:
    scheduler = connect(default_task_seconds={"step": 0.05})

    def delete() -> None:
        eventually(lambda: lease_of(bucket_names()), 60)
        eventually(lambda: len(list(tmp_path.iterdir())) > LOOKED, 60)
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=lease_of(bucket_names()))

    thread = threading.Thread(target=delete)
    thread.start()
    with pytest.raises(RunDeletedError, match=r"/lease'.*is gone.*dask-lambda clean.*again"):
        scheduler.get(row(tmp_path), f"step-{TASKS - 1}")
    thread.join()
    assert len(list(tmp_path.iterdir())) < TASKS


def test_a_long_run_has_one_lease_that_later_requests_tell_of(
    aws: LocalAWS, connect: Connect, bucket_names: Names, tmp_path: Path
) -> None:
    told: list[Any] = []

    def note(request: Request) -> None:
        if request.kind == "invoke":
            told.append(request.event["lease"])

    def wait(*before: Any) -> None:
        """Go on when the lease is there."""
        deadline = time.monotonic() + 60
        while not (tmp_path / "leased").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def watch() -> None:
        eventually(lambda: lease_of(bucket_names()), 60)
        (tmp_path / "leased").touch()

    thread = threading.Thread(target=watch)
    thread.start()
    dsk = {"x": Task("x", wait), "y": Task("y", wait, TaskRef("x"))}
    with Proxy(aws.endpoint_url, note) as proxy:
        connect(endpoint_url=proxy.url, plan="none").get(dsk, "y")
    thread.join()
    assert [leased for _, leased in told] == [False, True]
    assert told[0][0] == told[1][0]
    assert report().s3_puts == 1
    assert bucket_names() == []


def test_a_short_run_has_no_lease(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(client_lease, "AFTER", 60.0)
    connect().get(row(tmp_path, 0.0, 3), "step-2")
    assert (report().s3_puts, report().s3_deletes) == (0, 0)


def test_a_worker_that_the_lease_came_too_late_for_was_not_betrayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S3 may hold up the client for longer than a worker waits."""
    monkeypatch.setattr(client_lease, "AFTER", 0.0)

    async def written() -> tuple[bool, bool]:
        lease = client_lease.Lease(Store(MemoryStore()), "0/p/r/lease", b"secret")
        now = time.monotonic()
        with lease.held():
            while not lease.there:
                await asyncio.sleep(0.01)
        return lease.was_due(now), lease.was_due(now - LATE)

    assert asyncio.run(written()) == (True, False)
