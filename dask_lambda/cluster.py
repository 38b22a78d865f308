"""A ``distributed`` cluster whose tasks run on Lambda.

May import: proxy, proxy_scheduler, scheduler, report, config, signals, errors, dask, distributed.

>>> with LambdaCluster() as cluster, cluster.get_client() as client:          # doctest: +SKIP
...     client.map(function, items)

A :class:`LambdaCluster` has a real ``distributed.Scheduler``, with its dashboard, and one worker,
which has the tasks run on Lambda (:mod:`dask_lambda.proxy`).  Both live in this process, in the
thread of the cluster's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import ExitStack, suppress
from html import escape
from typing import Any

from dask.typing import no_default
from distributed import Client, SpecCluster
from distributed.core import Status
from distributed.utils import NoOpAwaitable, format_dashboard_link
from tornado.ioloop import PeriodicCallback

from dask_lambda import signals
from dask_lambda.config import Settings
from dask_lambda.errors import ConfigurationError
from dask_lambda.proxy import ProxyWorker, beside
from dask_lambda.proxy_scheduler import ProxyScheduler
from dask_lambda.report import RunReport
from dask_lambda.scheduler import LambdaScheduler

#: Of the one worker.
NAME = "lambda"
#: How often :meth:`LambdaCluster.adapt` looks, in seconds.
ADAPT_SECONDS = 0.5
#: Where the cluster listens, if it does.
LOOPBACK = "127.0.0.1"

logger = logging.getLogger("dask_lambda")


class LambdaCluster(SpecCluster):
    """A cluster for ``distributed.Client`` that runs its tasks on AWS Lambda.

    Nothing runs there while there is nothing to do.  Results stay in S3 until a client gathers
    them, and are deleted when no future refers to them any more; all are when the cluster closes.

    Parameters
    ----------
    protocol : {"inproc", "tcp"}
        How clients reach the scheduler: from this process only, or from others on this machine.
    dashboard_address : str, optional
        Host and port of the dashboard; another port is taken if this one is in use.  None: none.
    resources : dict, optional
        What there is of abstract resources: tasks annotated with ``resources=`` run at the same
        time as far as these allow.
    asynchronous : bool
        Whether it is used with ``await`` in a running event loop.
    name, loop, port, security, silence_logs, scheduler_kwargs : optional
        As for ``distributed.LocalCluster``.
    **settings
        As for :class:`~dask_lambda.LambdaScheduler`.  ``resume``, ``keep`` and ``plan`` mean
        nothing here: each task is an invocation, or shares one with others that are ready.

    Raises
    ------
    ConfigurationError
        For a keyword that is not a setting, or a wrong value.
    DaskLambdaError
        If function or bucket cannot be used.
    """

    status: Status
    workers: dict[Any, ProxyWorker]
    _adaptive: Adaptive | None

    def __init__(
        self,
        *,
        protocol: str = "inproc",
        dashboard_address: str | None = f"{LOOPBACK}:8787",
        resources: dict[str, float] | None = None,
        asynchronous: bool = False,
        name: str | None = None,
        loop: Any = None,
        port: int = 0,
        security: Any = None,
        silence_logs: int | bool = logging.WARNING,
        scheduler_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ):
        protocol = protocol.removesuffix("://")
        if protocol not in ("inproc", "tcp", "tls"):
            raise ConfigurationError(f"protocol is {protocol!r}; it must be 'inproc' or 'tcp'")
        self.status = Status.closed  # for __del__, if this fails
        self._engine = LambdaScheduler(**settings)
        self._settings = Settings.resolve(**settings)
        self._last_report: RunReport | None = None
        self._holding = True
        signals.hold()  # in the main thread, if it is: SIGTERM is to delete what is there
        with ExitStack() as stack:
            stack.callback(self._end)  # if anything goes wrong, Ctrl-C included
            if not asynchronous:  # in the caller's thread, who gets what goes wrong as it is
                self._engine.connect()
            host = None if protocol == "inproc" else LOOPBACK
            unmoved: dict[Any, BaseException] = {}
            scheduler = {
                "protocol": f"{protocol}://",
                "host": host,
                "port": port,
                "security": security,
                "dashboard": dashboard_address is not None,
                # Without a dashboard there is a page of numbers, which is for this machine as well.
                "dashboard_address": dashboard_address or f"{LOOPBACK}:0",
                "unmoved": unmoved,
                **(scheduler_kwargs or {}),
            }
            worker = {
                "protocol": f"{protocol}://",
                "host": host,
                "security": security,
                "dashboard_address": f"{LOOPBACK}:0",
                "resources": resources,
                "silence_logs": silence_logs,
                "engine": self._engine,
                "retries": self._settings.retries,
                "unmoved": unmoved,
            }
            spec = {"cls": ProxyWorker, "options": worker}
            super().__init__(
                scheduler={"cls": ProxyScheduler, "options": scheduler},
                workers={NAME: spec},
                worker=spec,
                asynchronous=asynchronous,
                loop=loop,
                security=security,
                silence_logs=silence_logs,
                name=name,
            )
            stack.pop_all()

    # -- its life --------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self.status == Status.created:
            await asyncio.to_thread(self._engine.connect)
        await super()._start()

    async def _close(self) -> None:
        self._keep_report()
        await super()._close()
        await beside(self._end)

    def _end(self) -> None:
        self._engine.close()
        if self._holding:
            self._holding = False
            signals.release()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        """Have a new worker in place of one that was closed: by ``client.restart()``, say."""
        if op == "remove" and self.status == Status.running:
            gone = self.scheduler_info["workers"].pop(msg, {})
            if gone.get("name") == NAME:
                self._futures.add(task := asyncio.ensure_future(self._replace()))
                task.add_done_callback(self._futures.discard)
            return
        super()._update_worker_status(op, msg)

    async def _replace(self) -> None:
        self._keep_report()
        if (worker := self.workers.pop(NAME, None)) is not None:
            await worker.close()
        if self.status == Status.running and self.scheduler.status == Status.running:
            await self._correct_state()  # which waits for the scheduler, however long

    async def _wait_for_workers(self, n_workers: int = 0, timeout: Any = None) -> None:
        """Wait for the one worker there is: Lambda starts environments when they are needed."""
        await super()._wait_for_workers(min(n_workers, 1), timeout)

    # -- what it shows ---------------------------------------------------------------------------

    @property
    def report(self) -> RunReport:
        """What was done since the start, or the last ``client.restart()``."""
        self._keep_report()
        assert self._last_report is not None
        return self._last_report

    def _keep_report(self) -> None:
        worker = self.workers.get(NAME)
        if worker is not None and worker.status != Status.closed:
            with suppress(AssertionError):  # it is starting
                self._last_report = worker.session.report()

    @property
    def window(self) -> int:
        """How many invocations may be in flight; see :meth:`scale`."""
        worker = self.workers.get(NAME)
        return worker.window if worker is not None else 0

    @property
    def dashboard_link(self) -> str:
        """Address of the dashboard; empty if there is none."""
        port = self.scheduler_info.get("services", {}).get("dashboard")
        return "" if port is None else format_dashboard_link(LOOPBACK, port)

    def __repr__(self) -> str:
        if self.status != Status.running:
            return f"<LambdaCluster {self.name}: {self.status.name}>"
        return (
            f"<LambdaCluster {self.name}: {self.scheduler_address!r}, "
            f"function {self._function()!r}, invocations in flight: at most {self.window}>"
        )

    def _repr_html_(self, cluster_status: str | None = None) -> str:
        if self.status == Status.running:
            cells = {"Function": self._function(), "Invocations in flight": f"≤ {self.window}"}
            cluster_status = "<tr>" + "".join(
                f'<td style="text-align: left;"><strong>{name}:</strong> {escape(str(value))}</td>'
                for name, value in cells.items()
            )
            cluster_status += "</tr>"
        html: str = super()._repr_html_(cluster_status=cluster_status)
        return html

    def _scaling_status(self) -> str:
        mode = "adaptive" if self._adaptive is not None else "manual"
        return f"<p>Invocations in flight: at most {self.window} ({mode})</p>"

    def _function(self) -> str:
        return self.workers[NAME].session.engine.backend.function if self.workers else ""

    # -- its window ------------------------------------------------------------------------------

    def scale(self, n: int = 0, memory: Any = None, cores: int | None = None) -> Any:
        """Set how many invocations may be in flight.

        Parameters
        ----------
        n : int
            At least 1: nothing runs while there is nothing to do, whatever the number.
        memory, cores
            Mean nothing here (``cores`` is taken for ``n``): a function has what it was given.
        """
        if self.status in (Status.closing, Status.closed, Status.failed):
            return super().scale(n)  # by which the worker is closed
        if n < 1 and cores is None:
            logger.warning("scale(%r): between tasks nothing runs anyway; it becomes scale(1)", n)
        n = max(n, cores or 0, 1)
        if self._adaptive is not None:
            self._adaptive.stop()
            self._adaptive = None
        if self.asynchronous:
            self._resize(n)
            return NoOpAwaitable()

        async def resize() -> None:
            self._resize(n)

        return self.sync(resize)

    scale_up = scale

    def _resize(self, n: int) -> None:
        """Change the window; in the thread of the event loop."""
        worker = self.workers.get(NAME)
        if worker is None or worker.status != Status.running:
            return
        n = worker.resize(n)
        self.scheduler.set_nthreads(worker.address, n)
        if (info := self.scheduler_info["workers"].get(worker.address)) is not None:
            info["nthreads"] = n

    def adapt(self, minimum: int = 1, maximum: float = math.inf, **options: Any) -> Adaptive:
        """Let the number of invocations in flight follow the number of tasks, within bounds.

        Parameters
        ----------
        minimum, maximum : int
            Of invocations in flight.
        **options
            Of distributed's own ``adapt``, which mean nothing here.

        Returns
        -------
        Adaptive
            To :meth:`~Adaptive.stop` it.
        """
        if self._adaptive is not None:
            self._adaptive.stop()
        self._adaptive = Adaptive(self, minimum, maximum)
        return self._adaptive


class Adaptive:
    """Has the window of a cluster follow its tasks.

    Parameters
    ----------
    cluster : LambdaCluster
    minimum, maximum : int
    """

    def __init__(self, cluster: LambdaCluster, minimum: int, maximum: float):
        usual = cluster.window
        self.minimum = max(1, minimum)
        self.maximum = usual if maximum == math.inf else int(maximum)
        if not self.minimum <= self.maximum:
            raise ConfigurationError(
                f"adapt(minimum={minimum}, maximum={maximum}): the minimum is above the maximum"
            )
        worker = cluster.workers[NAME]
        self.maximum = worker.affordable(self.maximum)
        self.minimum = min(self.minimum, self.maximum)
        self._cluster = cluster
        self.periodic_callback: PeriodicCallback | None = PeriodicCallback(
            self.adapt, ADAPT_SECONDS * 1000
        )
        cluster.loop.add_callback(self._start)

    def __repr__(self) -> str:
        return f"Adaptive(minimum={self.minimum}, maximum={self.maximum})"

    def _start(self) -> None:
        if self.periodic_callback is not None:
            self.adapt()
            self.periodic_callback.start()

    def adapt(self) -> None:
        """Look at the tasks, and change the window."""
        cluster = self._cluster
        wanted = max(self.minimum, min(self.maximum, cluster.scheduler.unfinished()))
        if wanted != cluster.window and cluster.status == Status.running:
            cluster._resize(wanted)

    def stop(self) -> None:
        """Leave the window as it is from now on."""
        callback, self.periodic_callback = self.periodic_callback, None
        if callback is not None:
            self._cluster.loop.add_callback(callback.stop)


class LambdaClient(Client):
    """A ``distributed.Client`` with a :class:`LambdaCluster` of its own, closed with it.

    Parameters
    ----------
    asynchronous : bool
        Whether it is used with ``await`` in a running event loop.
    set_as_default, timeout, direct_to_workers : optional
        As for ``distributed.Client``.
    **settings
        As for :class:`LambdaCluster`.
    """

    def __init__(
        self,
        *,
        asynchronous: bool = False,
        set_as_default: bool = True,
        timeout: Any = no_default,
        direct_to_workers: bool | None = None,
        **settings: Any,
    ):
        own = LambdaCluster(asynchronous=asynchronous, **settings)
        with ExitStack() as stack:
            stack.callback(own.close)  # if anything goes wrong, Ctrl-C included
            super().__init__(
                own,
                asynchronous=asynchronous,
                set_as_default=set_as_default,
                timeout=timeout,
                direct_to_workers=direct_to_workers,
            )
            stack.pop_all()

    async def _start(self, *arguments: Any, **options: Any) -> Any:
        await self.cluster  # raises what goes wrong, which the client would only log
        return await super()._start(*arguments, **options)

    async def _close(self, fast: bool = False) -> None:
        await super()._close(fast)
        if self._asynchronous:
            await self.cluster.close()

    def close(self, timeout: Any = no_default) -> Any:
        """Close the client and its cluster."""
        closing = super().close(timeout)
        if closing is None and not self._asynchronous:
            self.cluster.close()
        return closing
