"""Plans of computations: what is known of their tasks, and what comes of it.

May import: plan, annotations, placement, history, estimates, cost_model, graph, config, cost; of
an engine it only knows what it offers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dask.base import collections_to_expr
from dask.utils import key_split

from dask_lambda import graph as graphs
from dask_lambda.annotations import Annotations
from dask_lambda.config import Settings
from dask_lambda.cost import Prices
from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import Basis, Estimates, estimate, guess
from dask_lambda.graph import Graph
from dask_lambda.history import History
from dask_lambda.placement import Offer
from dask_lambda.plan import Group, Plan, cut_graph, make_plan, topological
from lambda_worker.protocol import Key

if TYPE_CHECKING:
    from dask_lambda.dispatch import Engine

#: What tasks took in this process, whichever scheduler ran them.
history = History()


class Planner:
    """Plans one computation, and learns from it for the next ones.

    Parameters
    ----------
    graph, settings, annotations
    window : int
        Invocations in flight.
    memory_mb : int
        Of the usual function.
    prices : Prices
        Of its GB-seconds, and of requests.
    """

    def __init__(
        self,
        graph: Graph,
        settings: Settings,
        annotations: Annotations,
        window: int,
        memory_mb: int,
        prices: Prices,
    ):
        self._graph, self._settings, self._annotations = graph, settings, annotations
        self._memory = annotations.memory()
        self._places = annotations.placement(Offer.of(settings, memory_mb))
        self._model = CostModel.of(
            memory_mb,
            settings.timeout,
            inline_bytes=settings.inline_bytes,
            window=window,
            prices=prices,
        )
        self._guessed = Estimates({}, {})

    @classmethod
    def of(
        cls, graph: Graph, settings: Settings, annotations: Annotations, engine: Engine | None
    ) -> Planner:
        """Return the planner for what an engine offers."""
        if engine is None:
            return cls(graph, settings, annotations, 1, settings.memory, Prices())
        memory = engine.backend.invokers[0].memory_mb or settings.memory
        window, prices = engine.backend.window, engine.usual_prices
        return cls(graph, settings, annotations, window, memory, prices)

    @classmethod
    def of_collections(
        cls,
        collections: Sequence[Any],
        optimize_graph: bool,
        settings: Settings,
        window: int,
        prices: Prices,
    ) -> Planner:
        """Return the planner of what is not run: no engine is asked what it offers."""
        expression = collections_to_expr(collections, optimize_graph).optimize()
        keys = list(expression.__dask_keys__())
        graph = graphs.normalise(graphs.materialise(expression), keys)
        return cls(graph, settings, Annotations(expression), window, settings.memory, prices)

    def cut(self, *, finalise: bool) -> Graph:
        """Return the graph as it will be run, with long sums cut."""
        if self._settings.plan == "none":
            return self._graph
        return cut_graph(
            self._graph, finalise=finalise, estimates=self._expected(), model=self._model
        )

    def _expected(self) -> Estimates:
        order = topological(self._graph, set())
        self._guessed = guess(self._graph, order, self._model.speed)
        return self._corrected(self._guessed, self._graph)

    def _corrected(self, guessed: Estimates, graph: Graph) -> Estimates:
        return estimate(
            guessed,
            graph,
            ratio=history.ratio,
            said_seconds=self._annotations.seconds(),
            said_nbytes=self._annotations.nbytes(),
            default_seconds=self._settings.default_task_seconds,
        )

    def guessed(self, graph: Graph, unknown_bytes: Mapping[Key, int] | None = None) -> Estimates:
        """Return what the functions alone say of the tasks of a plan's graph.

        Parameters
        ----------
        graph : Graph
        unknown_bytes : mapping, optional
            Results of tasks of which nothing is known.
        """
        return guess(graph, topological(graph, set()), self._model.speed, unknown_bytes)

    def expected(self, graph: Graph, unknown_bytes: Mapping[Key, int] | None = None) -> Estimates:
        """Return what is expected of the tasks of a plan's graph.

        Parameters
        ----------
        graph : Graph
        unknown_bytes : mapping, optional
            Results of tasks of which nothing is known.
        """
        return self._corrected(self.guessed(graph, unknown_bytes), graph)

    def basis(self, graph: Graph) -> dict[Key, Basis]:
        """Say where the expected seconds of each task of a plan's graph come from."""
        unknown = self.expected(graph).unknown
        said = self._annotations.seconds() or (lambda key: None)
        found: dict[Key, Basis] = {}
        for key in graph.tasks:
            prefix = key_split(key)
            if said(key) is not None or prefix in self._settings.default_task_seconds:
                found[key] = "said"
            elif history.ratio(prefix) is not None:
                found[key] = "measured"
            else:
                found[key] = "unknown" if key in unknown else "guessed"
        return found

    def plan(self, *, finalise: bool, cut: bool = True) -> Plan:
        """Plan the computation."""
        retries = self._annotations.of("retries", self._settings.retries)
        if self._settings.plan == "none":
            return make_plan(
                self._graph,
                mode="none",
                finalise=finalise,
                retries=retries,
                memory=self._memory,
                places=self._places,
            )
        return make_plan(
            self._graph,
            mode="auto",
            finalise=finalise,
            retries=retries,
            estimates=self._expected(),
            model=self._model,
            memory=self._memory,
            places=self._places,
            cut=cut,
        )

    def tell(self) -> None:
        """Say what does not run on Lambda although nobody has asked for that."""
        if self._places is not None:
            self._places.tell(self._graph.tasks)

    def learn(self, group: Group, measured: Mapping[str, Sequence[float]]) -> None:
        """Take note of what a worker measured."""
        known = [key for key in group.tasks if key in self._guessed.seconds]
        history.learn(self._guessed, known, measured)
