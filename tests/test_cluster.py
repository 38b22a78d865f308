"""What code written for ``distributed.Client`` does, with tasks on Lambda."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from operator import add
from pathlib import Path
from time import sleep
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pytest
from dask import delayed
from distributed import Client, Queue, Variable, as_completed, fire_and_forget, progress, wait
from distributed.client import FutureCancelledError

from dask_lambda import LambdaCluster
from tests.helpers import eventually

pytestmark = pytest.mark.local

Names = Callable[[], list[str]]


@pytest.fixture(scope="module")
def cluster(aws: Any) -> Iterator[LambdaCluster]:
    with LambdaCluster(dashboard_address="127.0.0.1:0", silence_logs=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_client(cluster: LambdaCluster) -> Iterator[Client]:
    with cluster.get_client() as client:
        yield client


@pytest.fixture
def results(bucket_names: Names) -> Names:
    """``results()``: the objects in the bucket, without the session's lease."""
    return lambda: [name for name in bucket_names() if not name.endswith("/lease")]


@pytest.fixture
def client(shared_client: Client, results: Names) -> Iterator[Client]:
    """A client of the cluster; what a test has left in the bucket when it is over is a failure."""
    yield shared_client
    gc.collect()
    assert eventually(lambda: not results(), 5), f"objects are left: {results()}"


def inc(x: int) -> int:
    return x + 1


def where() -> tuple[int, str]:
    return os.getpid(), os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "")


def ones(n: int) -> np.ndarray:
    return np.ones(n)


def nap(x: float) -> float:
    sleep(x)
    return x


BIG = 100_000  # floats: above inline-bytes


# -- futures -------------------------------------------------------------------------------------


def test_submit_runs_a_function_on_lambda(client: Client) -> None:
    process, function = client.submit(where).result()
    assert process != os.getpid()
    assert function


def test_map_and_gather_keep_the_order(client: Client) -> None:
    futures = client.map(inc, range(50))
    assert client.gather(futures) == list(range(1, 51))


def test_futures_are_arguments_also_inside_lists_and_dicts(client: Client) -> None:
    one, two = client.submit(inc, 0), client.submit(inc, 1)
    total = client.submit(lambda a, b, c: a + sum(b) + c["x"], one, [two, two], {"x": one})
    assert total.result() == 6


def test_gathered_values_are_values_also_directly_from_the_worker(client: Client) -> None:
    large, small = client.submit(ones, BIG), client.submit(inc, 1)
    for direct in (False, True):
        found = client.gather([large, small], direct=direct)
        assert type(found[0]) is np.ndarray
        assert found[0].sum() == BIG
        assert found[1] == 2


def test_sizes_and_types_are_those_of_the_values(client: Client, cluster: LambdaCluster) -> None:
    array, frame = client.submit(ones, BIG), client.submit(pd.DataFrame, {"a": [1, 2]})
    wait([array, frame])
    assert array.type is np.ndarray
    assert frame.type is pd.DataFrame
    assert cluster.scheduler.tasks[array.key].nbytes == 8 * BIG
    assert client.nbytes(summary=False)[array.key] == 8 * BIG


def test_a_released_future_deletes_its_object_and_an_alias_keeps_it(
    client: Client, results: Names
) -> None:
    large = client.submit(ones, BIG)
    wait(large)
    assert len(results()) == 1
    total = client.submit(np.sum, large)
    del large
    assert total.result() == BIG
    assert eventually(lambda: not results(), 5)


def test_what_was_released_is_computed_again_when_it_is_asked_for_again(client: Client) -> None:
    first = client.submit(inc, 41, key="again")
    assert first.result() == 42
    first.release()
    del first
    assert eventually(lambda: not client.who_has().get("again"))
    assert client.submit(inc, 41, key="again").result() == 42


def test_scattered_values_go_to_s3_once_and_come_back(client: Client, results: Names) -> None:
    data = np.arange(float(BIG))
    future = client.scatter(data)
    assert len(results()) == 1
    sums = client.map(lambda x, i: x.sum() + i, [future] * 5, range(5))
    assert client.gather(sums) == [data.sum() + i for i in range(5)]
    assert len(results()) == 1
    assert (future.result() == data).all()
    assert client.gather(client.scatter({"a": 1, "b": [2]})) == {"a": 1, "b": [2]}


def test_a_value_that_cannot_be_pickled_is_refused_when_it_is_scattered(client: Client) -> None:
    with pytest.raises(TypeError, match="pickle"):
        client.scatter(threading.Lock())


def test_as_completed_yields_what_is_done_first(client: Client) -> None:
    slow, fast = client.submit(nap, 1.0), client.submit(nap, 0.0)
    assert [future.key for future in as_completed([slow, fast])] == [fast.key, slow.key]
    added = as_completed(client.map(inc, range(3)), with_results=True)
    assert sorted(result for _, result in added) == [1, 2, 3]


def test_wait_says_what_is_done(client: Client) -> None:
    futures = client.map(inc, range(5))
    done, not_done = wait(futures)
    assert done == set(futures)
    assert not not_done


def test_fire_and_forget_runs_though_nobody_holds_the_future(
    client: Client, cluster: LambdaCluster
) -> None:
    done = Variable("fired")
    before = cluster.report.tasks
    fire_and_forget(client.submit(inc, 77))
    assert eventually(lambda: cluster.report.tasks > before)
    del done


def test_coroutine_functions_run_on_lambda(client: Client) -> None:
    async def work(x: int) -> tuple[int, int]:
        import asyncio

        await asyncio.sleep(0)
        return x + 1, os.getpid()

    value, process = client.submit(work, 1).result()
    assert value == 2
    assert process != os.getpid()


def test_thousands_of_futures_at_once_are_no_trouble(client: Client) -> None:
    assert sum(client.gather(client.map(inc, range(2_000)))) == sum(range(2_001))


# -- collections ---------------------------------------------------------------------------------


def test_compute_runs_arrays_bags_dataframes_and_delayed(client: Client) -> None:
    x = da.arange(24, chunks=6).reshape(6, 4)
    assert (x @ x.T).sum().compute() == (
        np.arange(24).reshape(6, 4) @ np.arange(24).reshape(6, 4).T
    ).sum()
    assert db.from_sequence(range(6), npartitions=3).map(inc).sum().compute() == 21
    assert delayed(add)(delayed(inc)(1), 2).compute() == 4
    frame = pd.DataFrame({"a": [1, 2, 1, 2], "b": [1.0, 2.0, 3.0, 4.0]})
    got = dd.from_pandas(frame, npartitions=2).groupby("a").b.sum().compute()
    assert got.to_dict() == {1: 4.0, 2: 6.0}


def test_persist_leaves_the_blocks_in_s3_and_later_computations_read_them_there(
    client: Client, results: Names
) -> None:
    x = da.ones(4 * BIG, chunks=BIG).persist()
    wait(x)
    assert len(results()) == 4
    assert x.sum().compute() == 4 * BIG
    assert (x + 1).mean().compute() == 2


def test_the_memory_of_the_client_stays_flat_however_large_what_is_in_between_is(
    client: Client,
) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    blocks = client.map(ones, [1_000_000 + i for i in range(12)])  # 96 MB
    twice = client.map(lambda block: 2 * block, blocks)  # as much again
    total = client.submit(lambda parts: sum(part.sum() for part in parts), twice)
    wait(total)
    assert process.memory_info().rss - before < 48e6
    assert total.result() == 2 * sum(1_000_000 + i for i in range(12))


def test_shuffles_and_merges_go_through_tasks(client: Client) -> None:
    left = pd.DataFrame({"k": range(20), "a": range(20)})
    right = pd.DataFrame({"k": range(0, 40, 2), "b": range(20)})
    dleft, dright = dd.from_pandas(left, npartitions=3), dd.from_pandas(right, npartitions=2)
    merged = dleft.merge(dright, on="k").compute().sort_values("k").reset_index(drop=True)
    pd.testing.assert_frame_equal(merged, left.merge(right, on="k"))
    shuffled = dleft.shuffle("k").compute().sort_values("k").reset_index(drop=True)
    pd.testing.assert_frame_equal(shuffled, left)


def test_delayed_results_are_futures_with_client_compute(client: Client) -> None:
    future = client.compute(delayed(inc)(delayed(inc)(1)))
    assert future.result() == 3
    assert client.get({"x": (inc, "y"), "y": 1}, "x") == 2
    assert dask.compute(delayed(inc)(5)) == (6,)
    nested = client.compute({"x": [delayed(inc)(1), da.ones(3).sum()], "y": 1})
    assert nested.result() == {"x": [2, 3], "y": 1}


# -- what else clients have ----------------------------------------------------------------------


def test_variables_queues_and_datasets_hold_futures(client: Client) -> None:
    variable, queue = Variable("lambda-v", client=client), Queue("lambda-q", client=client)
    variable.set(client.submit(inc, 1))
    assert variable.get().result() == 2
    queue.put(client.submit(inc, 2))
    assert queue.get().result() == 3
    client.publish_dataset(numbers=client.submit(inc, 3))
    assert client.get_dataset("numbers").result() == 4
    client.unpublish_dataset("numbers")
    variable.delete()
    queue.close()


def test_progress_and_the_task_stream_and_the_performance_report(
    client: Client, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from distributed import get_task_stream, performance_report

    page = tmp_path / "report.html"
    with get_task_stream(client) as stream, performance_report(str(page)):
        futures = client.map(inc, range(200, 210))
        progress(futures, notebook=False)
        wait(futures)
    assert "100% Completed" in capsys.readouterr().out
    assert {each["key"] for each in stream.data} >= {future.key for future in futures}
    assert all(each["thread"] is not None for each in stream.data)
    assert page.stat().st_size > 10_000


def test_a_grid_search_of_scikit_learn_runs_through_joblib(
    client: Client, cluster: LambdaCluster
) -> None:
    import joblib
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    data, target = load_breast_cancer(return_X_y=True)
    search = GridSearchCV(SVC(), {"C": [0.1, 10]}, cv=3)
    before = cluster.report.tasks
    usual = cluster.window
    cluster.scale(2)  # environments that import scikit-learn
    with joblib.parallel_config(backend="dask"):
        search.fit(data, target)
    cluster.scale(usual)
    assert cluster.report.tasks > before
    assert search.best_params_ == {"C": 10}


def test_client_run_runs_where_the_cluster_is(client: Client) -> None:
    assert list(client.run(os.getpid).values()) == [os.getpid()]


def test_cancelled_calls_end_and_their_slots_are_free(
    client: Client, cluster: LambdaCluster, tmp_path: Path
) -> None:
    def until(i: int, flag: str) -> None:  # Lambda does not call back what it runs
        while not os.path.exists(flag):
            sleep(0.02)

    flag = tmp_path / "flag"
    long = client.map(until, range(cluster.window), flag=str(flag))
    more = client.submit(inc, 12345)
    assert eventually(lambda: cluster.scheduler.unfinished() == len(long) + 1)
    client.cancel([*long, more])
    with pytest.raises(FutureCancelledError):
        more.result()
    assert eventually(lambda: cluster.scheduler.unfinished() == 0, 5)
    flag.touch()
