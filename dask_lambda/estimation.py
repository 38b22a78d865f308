"""``estimate(x)``: from collections and settings to what a run of them would cost.

May import: forecast, planner, aws_model, backend, prices, config, errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dask.base import unpack_collections

from dask_lambda.aws_model import AWS, EMBEDDED
from dask_lambda.backend import region_of, usual_window
from dask_lambda.config import DEFAULT_CONCURRENCY, Settings
from dask_lambda.errors import ConfigurationError
from dask_lambda.forecast import Estimate, forecast
from dask_lambda.planner import Planner
from dask_lambda.prices import prices_for

#: The embedded AWS at its first run: all of its processes import Dask and NumPy at the same time,
#: and have two cores for it (measured: 3.6 s with six processes).
FIRST_RUN = EMBEDDED.replace(import_seconds=4.0)


def estimate_run(
    collections: Sequence[Any],
    settings: Settings,
    optimize_graph: bool = True,
    *,
    persist: bool = False,
    on: str | None = None,
) -> Estimate:
    """Estimate what a computation does and costs.

    Parameters
    ----------
    collections : sequence of dask collections
        What would be computed together.
    settings : Settings
    optimize_graph : bool
        As ``dask.compute``'s.
    persist : bool
        Whether the results would stay in S3.
    on : {"aws", "local"}, optional
        Where; default: where the settings have it run.

    Raises
    ------
    TypeError
        If there is no collection to compute.
    ConfigurationError
        If a place, or an annotation of a task, is no good.
    """
    if on not in (None, "aws", "local"):
        raise ConfigurationError(f"on={on!r}: an estimate is made for 'aws' or for 'local'")
    found, _ = unpack_collections(*collections)
    if not found:
        raise TypeError("there is nothing to estimate: no Dask collection was given")
    where = on or ("local" if settings.is_local else "aws")
    if settings.resume is not None or settings.keep:  # results go through S3, whatever their size
        settings = replace(settings, inline_bytes=0)
    prices = prices_for(region_of(settings) if where == "aws" else None, settings.prices)
    usual = prices.on(settings.architecture or "x86_64")
    # Without a function and a bucket the settings mean the embedded AWS.
    same = settings.is_local == (where == "local")
    window = usual_window(settings) if same else settings.concurrency or DEFAULT_CONCURRENCY
    planner = Planner.of_collections(found, optimize_graph, settings, window, usual)
    plan = planner.plan(finalise=not persist)
    model, busy = (EMBEDDED, FIRST_RUN) if where == "local" else (AWS, AWS)
    changes: dict[str, Any] = {"memory_mb": settings.memory, "prices": usual}
    return forecast(
        plan,
        planner.basis(plan.graph),
        planner.guessed(plan.graph),
        partial(planner.expected, plan.graph),
        model.replace(**changes),
        busy.replace(**changes),
        prices,
        where=where,
        window=window,
        inline_bytes=settings.inline_bytes,
        keep_results=persist,
        speculate=settings.speculate,
        timeout=settings.timeout,
    )
