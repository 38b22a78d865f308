"""What must hold in the state machine after every event."""

from __future__ import annotations

from dask_lambda.books import RunBook
from dask_lambda.state import State


def check(state: State) -> None:
    """Raise AssertionError if something does not hold."""
    assert state.window.limit <= state.window.size
    flying: dict[str, int] = {}
    attempts: dict[int, int] = {}
    for flight in state.in_flight.values():
        for job in flight.jobs:
            assert job.missing == 0, "a job is in flight before its inputs"
            assert job.run is flight.run
            attempts[id(job)] = attempts.get(id(job), 0) + 1
        flying[flight.run.name] = flying.get(flight.run.name, 0) + 1
    assert all(count <= 2 for count in attempts.values()), "one duplicate at the most"
    local = [flight.jobs for flight in state.in_flight.values() if flight.is_local]
    assert all(len(jobs) == 1 for jobs in local), "what is outside of Lambda is never in batches"
    assert not any(f.is_local and (f.speculative or f.rung) for f in state.in_flight.values())
    assert state.local.used == len(local) <= state.local.slots
    assert state.local.memory_used == sum(job.spec.memory for (job,) in local)
    assert len(local) < 2 or state.local.memory_used <= state.local.memory
    assert state._speculating == sum(f.speculative for f in state.in_flight.values())
    for run in state._runs.values():
        assert run.in_flight == flying.get(run.name, 0)
        if run.ended:
            assert run.in_flight, "an ended run without invocations was not forgotten"
            continue
        for key, datum in run.data.items():
            assert datum.readers >= sum(not job.done for job in datum.waiting), key
            assert not (datum.available and datum.waiting), key
        both = (*run.ready, *run.local)
        ready = [job for _, _, job in both if not (run.isolated and job.done)]
        assert not any(job.spec.is_local for _, _, job in run.ready)
        assert all(job.spec.is_local for _, _, job in run.local)
        assert run.local_queued or not any(job.spec.is_local for job in ready)
        assert all(not job.missing and not job.in_flight and not job.done for job in ready)
        assert run.queued or run.starved or all(job.spec.is_local for job in ready)
        _check_isolated(run)
        assert not run.starved or run.in_flight, "a run that waits for nothing"
        for flight in state.in_flight.values():
            for job in flight.jobs:
                assert job.in_flight == attempts[id(job)]


def _check_isolated(run: RunBook) -> None:
    """What must hold besides in a run whose groups fail alone."""
    if not run.isolated:
        assert not run.jobs
        assert all(datum.failed is None for datum in run.data.values())
        return
    assert len({id(job) for job in run.jobs.values()}) == run.unfinished
    for key, job in run.jobs.items():
        assert not job.done
        assert key in job.spec.outputs
    for key, datum in run.data.items():
        if datum.failed is not None:
            assert not datum.available
            assert not datum.waiting, f"somebody waits for {key}, which will never be there"
            assert datum.keep or datum.readers
        elif datum.available:
            assert datum.keep or datum.readers, f"nobody needs {key}"
        else:
            assert key in run.jobs, f"nobody makes {key}"
