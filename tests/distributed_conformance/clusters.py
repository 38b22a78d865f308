"""The clusters that stand in for the ones that distributed's tests ask for.

``distributed.utils_test`` starts a cluster in two ways: ``gen_cluster``, for coroutines, by its
function ``start_cluster``, and ``cluster``, which the fixtures use, for all others. Both are
replaced here, so that everything else that they do, and check, stays distributed's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import distributed
from distributed import utils_test
from distributed.deploy.spec import SpecCluster

#: Makes a cluster with one worker; ``asynchronous`` and no other setting is given.
Factory = Callable[..., SpecCluster]


def one_worker(*, asynchronous: bool) -> SpecCluster:
    """A cluster with one ordinary worker in this process: the yardstick for ``LambdaCluster``."""
    return distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=8,
        processes=False,
        protocol="tcp://",
        dashboard_address=None,
        asynchronous=asynchronous,
    )


def on_lambda(*, asynchronous: bool) -> SpecCluster:
    """A ``LambdaCluster`` on the embedded AWS."""
    # Imported here, so that the yardsticks need nothing of ours.
    from dask_lambda import LambdaCluster

    return LambdaCluster(protocol="tcp", dashboard_address=None, asynchronous=asynchronous)


class StandIn:
    """Clusters of one kind in the place of distributed's.

    Attributes
    ----------
    started
        how many there have been
    """

    def __init__(self, factory: Factory):
        self.started = 0
        self._factory = factory
        self._running: dict[Any, SpecCluster] = {}

    def install(self) -> None:
        """Replace what ``gen_cluster``, ``cluster`` and the fixtures start."""
        utils_test.start_cluster = self._start_cluster
        utils_test.end_cluster = self._end_cluster
        utils_test.cluster = self._cluster

    async def _start_cluster(
        self, nthreads: list[Any], *arguments: Any, **named: Any
    ) -> tuple[Any, list[Any]]:
        """A scheduler, and its one worker for each of those that the test wants to see."""
        self.started += 1
        cluster = await self._factory(asynchronous=True)
        (worker,) = cluster.workers.values()
        self._running[cluster.scheduler] = cluster
        return cluster.scheduler, [worker] * len(nthreads)

    async def _end_cluster(self, scheduler: Any, workers: list[Any]) -> None:
        await self._running.pop(scheduler).close()
        utils_test.check_invalid_worker_transitions(scheduler)
        utils_test.check_invalid_task_states(scheduler)
        utils_test.check_worker_fail_hard(scheduler)

    @contextmanager
    def _cluster(self, nworkers: int = 2, **named: Any) -> Iterator[tuple[dict, list[dict]]]:
        self.started += 1
        with utils_test.check_instances(), self._factory(asynchronous=False) as cluster:
            (worker,) = cluster.workers.values()
            yield (
                {"address": cluster.scheduler_address},
                [{"address": worker.address, "proc": None}] * nworkers,
            )
