"""What goes wrong in a cluster whose tasks run on Lambda, what is said about them, and its life."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep, time
from typing import Any
from urllib.parse import urlsplit

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pytest
from distributed import (
    Client,
    Lock,
    Reschedule,
    Worker,
    get_client,
    get_worker,
    secede,
    wait,
    worker_client,
)
from distributed.scheduler import NoValidWorkerError

import dask_lambda
from dask_lambda import LambdaClient, LambdaCluster
from dask_lambda.errors import (
    BudgetExceededError,
    ConfigurationError,
    FunctionTimeoutError,
    LostDataError,
    NotOnLambdaError,
    OutOfMemoryError,
    UnserializableError,
    WorkerDiedError,
)
from tests.helpers import eventually, notes

pytestmark = pytest.mark.local

ROOT = Path(dask_lambda.__file__).parents[1]
Names = Callable[[], list[str]]


@pytest.fixture(scope="module")
def cluster(aws: Any) -> Iterator[LambdaCluster]:
    watchful = {
        "distributed.scheduler.no-workers-timeout": "0.5 s",
        "distributed.scheduler.validate": True,  # both state machines check themselves
        "distributed.worker.validate": True,
    }
    with (
        dask.config.set(watchful),
        LambdaCluster(dashboard_address="127.0.0.1:0", resources={"GPU": 1}) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LambdaCluster) -> Iterator[Client]:
    with cluster.get_client() as client:
        yield client


def results(bucket_names: Names) -> list[str]:
    """The objects in the bucket, without the leases of sessions."""
    return [name for name in bucket_names() if not name.endswith("/lease")]


def inc(x: int) -> int:
    return x + 1


def ones(n: int) -> np.ndarray:
    return np.ones(n)


def nap(seconds: float) -> float:
    sleep(seconds)
    return seconds


def when(x: int) -> float:
    return time()


class OwnError(Exception):
    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def fail(code: int) -> None:
    raise OwnError(code)


BIG = 100_000

# -- errors --------------------------------------------------------------------------------------


def test_a_task_s_own_exception_comes_with_its_remote_traceback(client: Client) -> None:
    future = client.submit(fail, 7, key="failing")
    with pytest.raises(OwnError) as caught:
        future.result()
    assert caught.value.code == 7
    assert "in fail" in notes(caught.value)
    assert "'failing'" in notes(caught.value)
    assert future.status == "error"
    with pytest.raises(OwnError):  # what needs its result fails as well, and is not run
        client.submit(inc, future).result()


def test_a_worker_that_dies_and_a_task_that_takes_too_long_are_errors_of_ours(
    client: Client,
) -> None:
    with pytest.raises(WorkerDiedError, match="'dying'"):
        client.submit(os._exit, 3, key="dying").result()
    with dask.annotate(timeout=0.2), pytest.raises(FunctionTimeoutError, match="'slow'"):
        client.submit(nap, 3, key="slow").result()


def test_what_cannot_be_pickled_is_named(client: Client) -> None:
    with pytest.raises(UnserializableError, match="^Task 'generator': "):
        client.submit(lambda: (i for i in range(3)), key="generator").result()


def test_retries_are_distributed_s_own(client: Client, tmp_path: Path) -> None:
    def flaky(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            raise OSError("not yet")
        return os.path.getsize(path)

    assert client.submit(flaky, str(tmp_path / "a"), retries=2).result() == 3
    with pytest.raises(OSError, match="not yet"):
        client.submit(flaky, str(tmp_path / "b"), retries=1).result()
    once_more = client.submit(flaky, str(tmp_path / "c"))
    wait(once_more)
    once_more.retry()
    wait(once_more)
    once_more.retry()
    assert once_more.result() == 3


def test_reschedule_runs_a_task_again(client: Client, tmp_path: Path) -> None:
    def shy(path: str) -> str:
        if not os.path.exists(path):
            open(path, "w").close()
            raise Reschedule
        return "done"

    assert client.submit(shy, str(tmp_path / "flag")).result() == "done"


@pytest.mark.parametrize(
    "task",
    [
        get_worker,
        get_client,
        secede,
        lambda: worker_client().__enter__(),
        lambda: Lock("x").acquire(),
    ],
    ids=["get_worker", "get_client", "secede", "worker_client", "Lock"],
)
def test_what_needs_a_worker_says_that_there_is_none_on_lambda(
    client: Client, task: Callable[[], Any]
) -> None:
    with pytest.raises(NotOnLambdaError, match="submit further tasks from the client"):
        client.submit(task).result()


def test_actors_say_why_there_are_none(client: Client) -> None:
    with pytest.raises(NotOnLambdaError, match="it is an actor"):
        client.submit(list, actor=True).result()


def test_p2p_shuffles_say_which_setting_to_use(client: Client) -> None:
    frame = dd.from_pandas(pd.DataFrame({"k": range(8), "a": range(8)}), npartitions=2)
    with (
        dask.config.set({"dataframe.shuffle.method": "p2p"}),
        pytest.raises(NotOnLambdaError, match=r"dataframe\.shuffle\.method"),
    ):
        frame.shuffle("k").compute()


def test_a_lost_object_is_an_error_and_not_an_endless_gather(
    client: Client, aws: Any, bucket_names: Names
) -> None:
    future = client.submit(ones, BIG, pure=False)  # no other test is to find it
    wait(future)
    for name in results(bucket_names):
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)
    for direct in (False, True):
        with pytest.raises(LostDataError):
            client.gather(future, direct=direct)


# -- what is said about tasks --------------------------------------------------------------------


def test_annotations_that_make_no_sense_are_refused_before_anything_is_sent(
    client: Client, cluster: LambdaCluster
) -> None:
    (worker,) = cluster.workers.values()
    assert eventually(lambda: not worker.session.engine.state.in_flight)  # of tests before
    before = cluster.report.invocations
    with dask.annotate(memory="much"), pytest.raises(ConfigurationError, match="memory='much'"):
        client.submit(inc, 1, pure=False).result()
    with dask.annotate(timeout=-1), pytest.raises(ConfigurationError, match="timeout=-1"):
        client.submit(inc, 1, pure=False).result()
    with dask.annotate(memory="1 TB"), pytest.raises(OutOfMemoryError, match="fits nowhere"):
        client.submit(inc, 1, pure=False).result()
    assert cluster.report.invocations == before


def test_memory_that_a_function_has_is_granted(client: Client) -> None:
    with dask.annotate(memory="100 MB", timeout=60):
        assert client.submit(inc, 1, pure=False).result() == 2


def test_what_takes_longer_than_lambda_allows_runs_here(client: Client) -> None:
    def function() -> str:
        return os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "")

    with dask.annotate(seconds=2000):
        assert client.submit(function, pure=False).result() == ""
    with dask.annotate(seconds=2000, where="lambda"):
        assert client.submit(function, pure=False).result()
    with dask.annotate(seconds="long"), pytest.raises(ConfigurationError, match="seconds='long'"):
        client.submit(inc, 1, pure=False).result()


def test_what_is_to_run_here_runs_here_and_reads_what_lambda_wrote(client: Client) -> None:
    def total(block: np.ndarray) -> tuple[float, str]:
        return block.sum(), os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "")

    block = client.submit(ones, BIG)
    with dask.annotate(where="local"):
        here = client.submit(total, block)
    assert here.result() == (BIG, "")
    there, function = client.submit(total, block, pure=False).result()
    assert there == BIG
    assert function


def test_resources_bound_how_many_run_and_what_nobody_has_is_an_error(
    client: Client, tmp_path: Path
) -> None:
    def alone(path: str, i: int) -> int:
        name = os.path.join(path, "running")
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))  # fails if another one runs
        sleep(0.05)
        os.unlink(name)
        return i

    futures = client.map(alone, [str(tmp_path)] * 4, range(4), resources={"GPU": 1})
    assert client.gather(futures) == [0, 1, 2, 3]
    with pytest.raises(NoValidWorkerError, match="TPU"):
        client.submit(inc, 1, pure=False, resources={"TPU": 1}).result()


def test_a_higher_priority_runs_first(client: Client, cluster: LambdaCluster) -> None:
    cluster.scale(1)
    try:
        blocker = client.submit(nap, 0.3)
        assert eventually(lambda: cluster.scheduler.unfinished() == 1)
        low = client.map(when, range(3), priority=-1, pure=False)
        high = client.map(when, range(3), priority=1, pure=False)
        assert max(client.gather(high)) < min(client.gather(low))
        del blocker
    finally:
        cluster.scale(6)


# -- the window ----------------------------------------------------------------------------------


def test_scale_sets_how_many_run_at_a_time(
    client: Client, cluster: LambdaCluster, caplog: pytest.LogCaptureFixture
) -> None:
    usual = cluster.window
    cluster.scale(2)
    assert cluster.window == 2
    assert sum(client.nthreads().values()) == 2
    assert "at most 2" in repr(cluster)
    assert client.gather(client.map(inc, range(300, 320))) == list(range(301, 321))
    with caplog.at_level(logging.WARNING, "dask_lambda"):
        cluster.scale(usual + 1_000)
    assert "serves" in caplog.text
    assert cluster.window == usual
    client.wait_for_workers(50, timeout=5)  # of which there is no need


def test_adapt_follows_the_number_of_tasks_within_bounds(
    client: Client, cluster: LambdaCluster
) -> None:
    usual = cluster.window
    adaptive = cluster.adapt(minimum=1, maximum=3)
    assert eventually(lambda: cluster.window == 1)
    futures = client.map(nap, [0.5 + i / 1000 for i in range(6)])
    assert eventually(lambda: cluster.window == 3)
    wait(futures)
    assert eventually(lambda: cluster.window == 1)
    adaptive.stop()
    cluster.scale(usual)
    assert cluster.window == usual
    with pytest.raises(ConfigurationError, match="minimum"):
        cluster.adapt(minimum=5, maximum=2)


# -- its life ------------------------------------------------------------------------------------


def test_a_restart_gives_up_what_runs_deletes_results_and_goes_on(
    client: Client, cluster: LambdaCluster, bucket_names: Names
) -> None:
    large = client.submit(ones, BIG)
    wait(large)
    running = client.submit(nap, 3)
    client.restart()
    assert running.cancelled()
    assert eventually(lambda: not results(bucket_names), 5)
    assert client.submit(inc, 1, pure=False).result() == 2


def test_a_worker_that_was_retired_is_replaced(client: Client, cluster: LambdaCluster) -> None:
    (address,) = client.scheduler_info()["workers"]
    client.retire_workers([address])
    assert client.submit(inc, 2, pure=False).result() == 3
    assert address not in client.scheduler_info()["workers"]


def test_clients_use_clusters_with_await(aws: Any, bucket_names: Names) -> None:
    async def use() -> list[Any]:
        async with (
            LambdaCluster(asynchronous=True, dashboard_address=None) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            futures = client.map(inc, range(5))
            total = client.submit(sum, futures)
            large = client.submit(ones, BIG)
            scattered = await client.scatter([1, 2, 3])
            both = await client.gather([total, *scattered])
            return [both, (await large).sum()]

    assert asyncio.run(use()) == [[15, 1, 2, 3], BIG]
    assert not results(bucket_names)


def test_tasks_for_lambda_and_for_a_worker_of_one_s_own_read_each_other_s_results(
    aws: Any,
) -> None:
    async def use() -> tuple[Any, ...]:
        async with (
            LambdaCluster(asynchronous=True, dashboard_address=None) as cluster,
            Worker(cluster.scheduler.address, nthreads=1, dashboard_address="127.0.0.1:0") as own,
            Client(cluster, asynchronous=True) as client,
        ):
            there = client.submit(ones, BIG, workers=["lambda"])
            here = client.submit(np.add, there, 1, workers=[own.address])
            again = client.submit(np.add, here, 1, workers=["lambda"])
            total = (await again).sum()
            assert type(own.data[here.key]) is np.ndarray
            await client.replicate([there, here])
            copies = await client.who_has([there, here])
            return total, (await here).sum(), sorted(map(len, copies.values()))

    assert asyncio.run(use()) == (3 * BIG, 2 * BIG, [2, 2])


def test_a_client_with_its_own_cluster_closes_it(aws: Any) -> None:
    before = set(threading.enumerate())
    with LambdaClient(dashboard_address=None, retries=0) as client:
        assert client.submit(inc, 1).result() == 2
        own = client.cluster
    assert own.status.name == "closed"
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in left if name.startswith(("dask-lambda", "IO loop"))}


async def _own_client() -> int:
    async with LambdaClient(asynchronous=True, dashboard_address=None) as client:
        return await client.submit(inc, 1)


def test_a_client_with_its_own_cluster_works_with_await(aws: Any) -> None:
    assert asyncio.run(_own_client()) == 2


def test_a_cluster_whose_scheduler_has_ended_ends(aws: Any, bucket_names: Names) -> None:
    async def use() -> None:
        async with (
            LambdaCluster(asynchronous=True, dashboard_address=None) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            await client.submit(ones, BIG)
            await cluster.scheduler.close()

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):  # to what is not there
        asyncio.run(asyncio.wait_for(use(), 60))
    assert not results(bucket_names)


def test_a_cluster_that_cannot_be_made_leaves_no_engine_behind(aws: Any) -> None:
    before = set(threading.enumerate())
    with pytest.raises(TypeError):
        LambdaCluster(scheduler_kwargs=5)
    assert not {each.name for each in set(threading.enumerate()) - before}


def test_wrong_settings_are_named_at_once(aws: Any) -> None:
    with pytest.raises(ConfigurationError, match="unknown setting 'n_workers'"):
        LambdaCluster(n_workers=4)
    with pytest.raises(ConfigurationError, match="retries"):
        LambdaCluster(retries=-1)
    with pytest.raises(ConfigurationError, match="protocol"):
        LambdaCluster(protocol="udp")


def test_other_processes_reach_it_over_tcp_and_everything_listens_on_loopback(aws: Any) -> None:
    with LambdaCluster(protocol="tcp", dashboard_address="127.0.0.1:0") as cluster:
        code = (
            "import sys; from distributed import Client; import numpy as np\n"
            "with Client(sys.argv[1]) as client:\n"
            "    print(client.submit(np.ones, 100_000).result().sum())\n"
            "    print(client.gather(client.scatter(5)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, cluster.scheduler_address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.split() == ["100000.0", "5"], done.stderr
        listening = [
            each.laddr.ip
            for each in psutil.Process().net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        ]
        assert set(listening) == {"127.0.0.1"}


def test_the_dashboard_answers(client: Client, cluster: LambdaCluster) -> None:
    base = cluster.dashboard_link.removesuffix("/status")
    assert base.startswith("http://127.0.0.1:")
    for page in ("status", "graph", "individual-task-stream", "individual-progress", "workers"):
        with urllib.request.urlopen(f"{base}/{page}", timeout=20) as answer:
            assert answer.status == 200
            assert "html" in answer.headers["content-type"]
    assert "dask-lambda" in cluster._repr_html_()
    assert "Function" in cluster._repr_html_()


def test_a_budget_ends_all_calls_with_an_error(aws: Any) -> None:
    with LambdaClient(dashboard_address=None, max_cost_usd=1e-9) as client:
        with pytest.raises(BudgetExceededError):
            client.gather(client.map(inc, range(50)))
        with pytest.raises(BudgetExceededError, match="begin with a new executor or cluster"):
            client.submit(inc, 100).result()


SCRIPTS = {
    "exits without closing": "",
    "is interrupted": "import _thread; _thread.interrupt_main(); import time; time.sleep(20)",
    "raises": "1 / 0",
}


@pytest.mark.parametrize("end", SCRIPTS, ids=lambda end: end.replace(" ", "_"))
def test_a_program_that_ends_leaves_nothing(aws: Any, bucket_names: Names, end: str) -> None:
    gc.collect()
    before = set(bucket_names())
    script = f"""
import numpy as np, os, time
from distributed import wait
from dask_lambda import LambdaClient
client = LambdaClient(backend="aws", function={aws.function!r}, bucket={aws.bucket!r},
    region={aws.region!r}, endpoint_url={aws.endpoint_url!r}, concurrency=2, dashboard_address=None)
large = client.submit(np.ones, {BIG})
wait(large)
running = client.submit(time.sleep, 3)
print("started", flush=True)
{SCRIPTS[end]}
"""
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": aws.access_key_id,
        "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout == "started\n", done.stderr
    assert eventually(lambda: set(bucket_names()) <= before, 5)


def test_a_cluster_that_was_closed_holds_no_connections(aws: Any) -> None:
    def connections() -> int:
        return sum(
            each.raddr.port == urlsplit(aws.endpoint_url).port
            for each in psutil.Process().net_connections("tcp")
            if each.raddr
        )

    before = connections()
    with LambdaClient(dashboard_address=None) as client:
        client.gather(client.map(ones, [BIG] * 3, pure=False))
        assert connections() > before
    gc.collect()
    assert eventually(lambda: connections() <= before), "its pool of connections is still there"


def test_ports_are_free_when_a_cluster_is_closed(aws: Any) -> None:
    with LambdaCluster(protocol="tcp", dashboard_address="127.0.0.1:0") as cluster:
        ports = [cluster.scheduler.port, cluster.scheduler.http_server.port]
    for port in ports:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
