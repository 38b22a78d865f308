"""How runs are made: with what every run needs, and on what terms.

May import: run, sending, kept_folder, encode, local_modules, plan, graph, events, config, the
ground.
"""

from __future__ import annotations

import math
import secrets as tokens
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Required, TypedDict, TypeVar, Unpack

from dask_lambda.config import MAX_MEMORY, Settings
from dask_lambda.encode import Encoder
from dask_lambda.events import Budget
from dask_lambda.graph import Graph, short
from dask_lambda.kept_folder import Folder
from dask_lambda.local_modules import LocalModules
from dask_lambda.plan import Plan
from dask_lambda.run import Learn, Run
from dask_lambda.sending import Backend, Sender
from lambda_worker.protocol import Compression, Key, Reference
from lambda_worker.store import Store

R = TypeVar("R", bound=Run)


class Terms(TypedDict, total=False):
    """On what terms a run is carried out.

    Attributes
    ----------
    inline_bytes : int
        Results up to this size travel in the reply.
    compression : {"none", "zstd"}
        Of larger ones, and of large data that tasks read; default: none.
    speculate : bool
        Send an invocation once more that takes conspicuously long.
    patience : float
        Seconds for which a group is tried while the network or AWS fails.
    max_cost_usd, max_seconds : float or None
        The run is stopped before it exceeds them.
    memory_mb : int
        Of the usual function, as far as is known before it says so itself: for its price.
    modules : dict
        What of the user's own modules travels with the tasks: names and patterns for
        ``"include"`` and ``"exclude"`` (:class:`~dask_lambda.local_modules.LocalModules`).
    """

    inline_bytes: Required[int]
    compression: Compression
    speculate: bool
    patience: float
    max_cost_usd: float | None
    max_seconds: float | None
    memory_mb: int
    modules: Mapping[str, Sequence[str]]


class GraphTerms(Terms, total=False):
    """The same for the run of one graph, and what is to become of its results.

    Attributes
    ----------
    keep_results : bool
        Leave the results in S3, in place of fetching them.
    watch : bool
        Tell of each task in ``Run.events``; with ``watch_values``, which needs a plan of single
        tasks, with its value.
    watch_values : bool
    learn : callable or None
        Told what the workers measured.
    folder : Folder or None
        Where the run's objects are, if they outlive it.  Then all results go there, and
        ``inline_bytes`` is for the graph's own data.
    """

    keep_results: bool
    watch: bool
    watch_values: bool
    learn: Learn | None
    folder: Folder | None


def terms_of(settings: Settings) -> Terms:
    """Return the terms that users have set."""
    return {
        "inline_bytes": settings.inline_bytes,
        "compression": settings.compression,
        "speculate": settings.speculate,
        "patience": settings.patience,
        "max_cost_usd": settings.max_cost_usd,
        "max_seconds": settings.max_seconds,
        "memory_mb": settings.memory,
        "modules": settings.modules,
    }


class RunMaker:
    """Makes the runs of one engine, in any thread.

    Parameters
    ----------
    backend : Backend
    sender : Sender
        Which knows what functions cost.
    secret_of : callable
        Returns the secret under which a stored result was sealed.
    """

    def __init__(self, backend: Backend, sender: Sender, secret_of: Callable[[Reference], bytes]):
        self._backend = backend
        self._sender = sender
        self._secret_of = secret_of
        self._modules: set[str] = set()  # local ones that runs have needed

    def of_plan(self, plan: Plan, **terms: Unpack[GraphTerms]) -> Run:
        """Make the run of one graph.

        Raises
        ------
        ConfigurationError
            If a module to include is not local.
        """
        readers = Counter(key for group in plan.groups for key in group.inputs)
        objects: dict[str, Any] = {}
        if (folder := terms.get("folder")) is not None:
            objects = {
                "secret": folder.record.secret,
                "prefix": folder.prefix,
                "run": folder.record.run,
                "label": folder.label,
                "once": folder.once,
                "present": folder.data,
                "inline_literals": terms["inline_bytes"],
            }
            terms["inline_bytes"] = 0
        shared = frozenset(key for key, count in readers.items() if count > 1)
        return self._make(Run, plan, dict(terms), objects, shared=shared)

    def open_ended(
        self, kind: Callable[..., R], shown: Callable[[Key], str] = short, **terms: Unpack[Terms]
    ) -> R:
        """Make a run to which tasks are added while it goes on.

        Parameters
        ----------
        kind : callable
            The class of the run, perhaps with further fields.
        shown : callable
            How users know a key.
        **terms
            See :class:`Terms`.
        """
        graph = Graph({}, {}, {}, {}, frozenset(), {})
        plan = Plan((), frozenset(), (), frozenset(), graph)
        objects = {"forgetful": True, "shown": shown}
        return self._make(kind, plan, {**terms, "watch": True}, objects, shared=frozenset())

    def _make(
        self,
        kind: Callable[..., R],
        plan: Plan,
        terms: dict[str, Any],
        objects: dict[str, Any],
        **fields: Any,
    ) -> R:
        name, secret = tokens.token_hex(16), objects.pop("secret", None) or tokens.token_bytes(32)
        store = Store(self._backend.bucket)
        encoder = Encoder(
            plan.graph,
            store,
            bucket=self._backend.bucket_name,
            secret=secret,
            secret_of=self._secret_of,
            compression=terms.pop("compression", "none"),
            modules=LocalModules(**(terms.pop("modules", None) or {}), remembered=self._modules),
            **{"prefix": self._backend.prefix, "run": name, **objects},
        )
        usual = {"keep_results": False, "watch": False, "watch_values": False}
        return kind(
            graph=plan.graph,
            plan=plan,
            store=store,
            encoder=encoder,
            name=name,
            secret=secret,
            **{**usual, "memory_mb": MAX_MEMORY, **terms},
            **fields,
        )

    def budget(self, run: Run) -> Budget | None:
        """Return what a run may cost, if that was limited."""
        if run.max_cost_usd is None and run.max_seconds is None:
            return None
        return Budget(
            math.inf if run.max_cost_usd is None else run.max_cost_usd,
            math.inf if run.max_seconds is None else run.started + run.max_seconds,
            tuple(self._sender.usd_second(i, run.memory_mb) for i in self._backend.invokers),
        )
