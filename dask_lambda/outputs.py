"""The outputs of groups: who waits for them, who reads them, and when nobody does any more.  Pure.

May import: books, events, plan, the ground.  Functions that change the records of one run;
what happens to the groups is decided in :mod:`dask_lambda.state`.
"""

from __future__ import annotations

from collections.abc import Iterable

from dask_lambda.books import Datum, Job, RunBook
from dask_lambda.events import Failure
from dask_lambda.plan import Group
from lambda_worker.protocol import Key


def expect(run: RunBook, groups: Iterable[Group]) -> None:
    """Take note that groups are to make their outputs."""
    for spec in groups:
        for key in spec.outputs:
            run.data.setdefault(key, Datum())


def await_inputs(job: Job) -> tuple[Failure, Group] | None:
    """Take note that a group reads its inputs, and of those that are not there yet.

    Returns
    -------
    tuple or None
        Why one of them will never be there, and whose fault that is.
    """
    failed = None
    for key in job.spec.inputs:
        datum = job.run.data[key]
        datum.readers += 1
        if datum.failed is not None:
            failed = datum.failed
        elif not datum.available:
            datum.waiting.append(job)
            job.missing += 1
    return failed


def made(job: Job) -> tuple[list[Job], list[Key]]:
    """Take note that a group is done.

    Returns
    -------
    ready : list of Job
        Those that waited for its outputs, and for nothing else any more.
    released : list of key
        Of its inputs and outputs: those that nobody reads any more.
    """
    run, data = job.run, job.run.data
    ready: list[Job] = []
    released: list[Key] = []
    for key in job.spec.outputs:
        run.jobs.pop(key, None)
        datum = data[key]
        datum.available = True
        for reader in datum.waiting:
            reader.missing -= 1
            if not reader.missing and not reader.done:
                ready.append(reader)
        datum.waiting.clear()
        if not datum.readers and not datum.keep and run.releases:
            released.append(key)
            del data[key]
    return ready, released + _has_read(job)


def _has_read(job: Job) -> list[Key]:
    """Take note that a group needs its inputs no more; return what can go."""
    run, data = job.run, job.run.data
    released = []
    for key in job.spec.inputs:
        datum = data[key]
        datum.readers -= 1
        if not datum.readers and not datum.keep and run.releases:
            if datum.available:
                released.append(key)
            elif datum.failed is None:  # it is being made
                continue
            del data[key]
    return released


def give_up(job: Job, failure: Failure, origin: Group) -> tuple[list[Job], list[Key]]:
    """End a group without result, and with it all that wait for its outputs.

    Returns
    -------
    lost : list of Job
    released : list of key
        What none of them will read any more.
    """
    run, data = job.run, job.run.data
    lost: list[Job] = []
    released: list[Key] = []
    stack = [job]
    while stack:
        job = stack.pop()
        if job.done:
            continue
        job.done = True
        lost.append(job)
        for key in job.spec.outputs:
            run.jobs.pop(key, None)
            datum = data[key]
            datum.failed = failure, origin
            stack += datum.waiting
            datum.waiting.clear()
            if not datum.readers and not datum.keep:
                del data[key]
        released += _has_read(job)
    return lost, released


def let_go(run: RunBook, keys: Iterable[Key]) -> list[Key]:
    """Take note that outputs are not kept any more; return those that can go at once."""
    released = []
    for key in keys:
        datum = run.data.get(key)
        if datum is None:
            continue
        datum.keep = False
        if datum.readers or not (datum.available or datum.failed):
            continue
        if datum.available:
            released.append(key)
        del run.data[key]
    return released


def unread(run: RunBook) -> list[Key]:
    """Drop the outputs that are there, and that nobody reads or keeps; return them."""
    idle = [k for k, d in run.data.items() if d.available and not d.readers and not d.keep]
    for key in idle:
        del run.data[key]
    return idle
