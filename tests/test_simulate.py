"""The simulator against times that are worked out by hand, and against the embedded AWS."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask.base import collections_to_expr
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_lambda import LambdaScheduler
from dask_lambda.aws_model import AWS, AwsModel, Link, constant
from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.plan import Group, Plan, make_plan
from dask_lambda.simulate import Simulation, simulate, trace_estimates
from lambda_worker.protocol import Reference, load_reference
from tests.helpers import report

MB = 10**6
ENDLESS = math.inf

#: Nothing takes any time but what a test says.
FREE = AwsModel(
    scaling_burst=ENDLESS,
    request_interval=0.0,
    invoke=constant(0.0),
    refuse=constant(0.0),
    cold_start=constant(0.0),
    import_seconds=0.0,
    get=constant(0.0),
    put=constant(0.0),
    burst_bytes=ENDLESS,
    sustained_bytes=ENDLESS,
    bucket_bytes=0.0,
    stream_bytes=ENDLESS,
    codec_bytes=ENDLESS,
    group_seconds=0.0,
    straggler_probability=0.0,
    client_seconds=0.0,
    client_bytes=ENDLESS,
    request_bytes=0,
    seal_bytes=0,
)


def task(*reads: Any) -> tuple[Any, ...]:
    """A task that reads these keys."""
    return (max, [0, *reads])


def calls(count: int) -> dict[str, Any]:
    return {f"call-{i:04}": task() for i in range(count)}


def sums_of(*names: str) -> dict[str, Any]:
    """``sums_of("a", "b a", "c a b")``: a, b which reads a, and c which reads both."""
    return {each.split()[0]: task(*each.split()[1:]) for each in names}


def graph_of(dsk: dict[Any, Any], keys: Any = None) -> Graph:
    """The graph in which nobody reads the requested keys."""
    nodes = materialise(dsk)
    readers = {d for node in nodes.values() for d in node.dependencies}
    return normalise(nodes, keys or [key for key in nodes if key not in readers])


def truth_of(graph: Graph, seconds: Any = 1.0, nbytes: Any = 8) -> Estimates:
    """The same for every node, or by key."""
    every = (*graph.tasks, *graph.literals, *graph.stored)
    of_seconds = seconds if isinstance(seconds, dict) else dict.fromkeys(graph.tasks, seconds)
    sizes = dict.fromkeys(every, 8) | nbytes if isinstance(nbytes, dict) else None
    return Estimates(of_seconds, sizes or dict.fromkeys(every, nbytes))


def run(
    dsk: dict[Any, Any],
    aws: AwsModel = FREE,
    *,
    seconds: Any = 1.0,
    nbytes: Any = 8,
    groups: list[str] | None = None,
    **options: Any,
) -> Simulation:
    """Simulate a graph, one task for each invocation or in these groups."""
    graph = graph_of(dsk)
    plan = make_plan(graph)
    if groups is not None:
        plan = grouped(graph, plan, groups)
    return simulate(plan, truth_of(graph, seconds, nbytes), aws, **options)


def grouped(graph: Graph, plan: Plan, groups: list[str]) -> Plan:
    found = []
    members = [tuple(text.split()) for text in groups]
    for place, tasks in enumerate(members):
        reads = {d for key in tasks for d in graph.dependencies(key)} - set(tasks)
        others = {
            d
            for other in members
            if other != tasks
            for key in other
            for d in graph.dependencies(key)
        }
        outputs = tuple(key for key in tasks if key in plan.keep or key in others)
        inputs = tuple(sorted(reads & graph.tasks.keys()))
        found.append(Group(tasks, inputs, outputs, place, kind="group"))
    return replace(plan, groups=tuple(found))


# -- the model -----------------------------------------------------------------------------------


def test_a_distribution_goes_through_its_quantiles():
    for probability, seconds in AWS.get.points:
        assert AWS.get.at(probability) == pytest.approx(seconds)
    assert AWS.get.median == pytest.approx(0.027)


@given(st.floats(0.0, 0.9999), st.floats(0.0, 0.9999))
def test_a_higher_quantile_is_not_shorter(p, q):
    low, high = sorted((p, q))
    assert AWS.put.at(low) <= AWS.put.at(high)


def test_samples_are_distributed_as_the_quantiles_say():
    import random

    source = random.Random(1)
    samples = sorted(AWS.get.sample(source) for _ in range(20_000))
    for share in (0.5, 0.95, 0.99):
        assert samples[int(share * len(samples))] == pytest.approx(AWS.get.at(share), rel=0.1)


def test_a_link_is_fast_until_its_bucket_is_empty():
    link = AWS.link()
    assert link.transfer(0.0, 145e6) == pytest.approx(145 / 350)
    assert link.transfer(0.0, 435e6) == pytest.approx(290 / 350 + 290 / 75)


def test_an_idle_link_gets_its_tokens_back_at_the_sustained_rate():
    link = Link(burst=350e6, rate=75e6, bucket=290e6, tokens=0.0)
    assert link.transfer(2.0, 225e6) == pytest.approx(2.0 + 150 / 350 + 75 / 75)
    assert link.transfer(1000.0, 290e6) == pytest.approx(1000.0 + 290 / 350)


def test_more_memory_is_more_processors():
    assert AwsModel(memory_mb=1769).vcpus == 1.0
    assert AwsModel(memory_mb=10240).vcpus == pytest.approx(5.79, abs=0.01)


# -- one invocation ------------------------------------------------------------------------------


def test_a_cold_task_takes_client_request_start_work_and_reply():
    aws = FREE.replace(
        client_seconds=0.001,
        invoke=constant(0.030),
        cold_start=constant(0.3),
        import_seconds=0.4,
        group_seconds=0.002,
        client_bytes=1e6,
        request_bytes=1000,
    )
    result = run({"a": task()}, aws, nbytes=0)
    network = 2 * 1000 / 1e6
    assert result.report.wall_seconds == pytest.approx(0.001 + network + 0.03 + 0.7 + 0.002 + 1.0)
    assert result.report.cold_starts == result.report.invocations == result.report.tasks == 1
    assert result.report.compute_seconds == 1.0
    (only,) = result.timeline
    assert only.cold == pytest.approx(0.7)
    assert only.end - only.start == pytest.approx(1.002)


def test_the_start_of_an_environment_is_billed():
    aws = FREE.replace(cold_start=constant(0.5), memory_mb=2048)
    assert run({"a": task()}, aws).report.billed_gb_seconds == pytest.approx(2 * 1.5)


def test_a_task_that_follows_meets_a_warm_environment():
    aws = FREE.replace(invoke=constant(0.03), cold_start=constant(0.5))
    result = run(sums_of("a", "b a"), aws)
    assert result.report.cold_starts == 1
    assert result.report.wall_seconds == pytest.approx(0.5 + 2 * (0.03 + 1.0))
    assert [each.environment for each in result.timeline] == [0, 0]


def test_environments_may_be_warm_from_the_beginning():
    aws = FREE.replace(cold_start=constant(5.0), warm_environments=3)
    result = run(calls(3), aws)
    assert result.report.cold_starts == 0
    assert result.report.wall_seconds == pytest.approx(1.0)


def test_the_environment_that_was_used_last_is_used_first():
    result = run(sums_of("a", "b", "c a b"), seconds={"a": 2.0, "b": 1.0, "c": 1.0}, window=2)
    used = {each.groups[0].tasks[0]: each.environment for each in result.timeline}
    assert used["c"] == used["a"] != used["b"]


def test_an_environment_takes_ten_requests_a_second():
    aws = FREE.replace(request_interval=0.1)
    result = run(sums_of("a", "b a", "c b"), aws, seconds=0.06)
    assert [each.environment for each in result.timeline] == [0, 1, 0]


def test_small_results_travel_inline_and_large_ones_through_s3():
    small = run(sums_of("a", "b a", "c a"), nbytes=100).report
    assert (small.s3_puts, small.s3_gets, small.bytes_written) == (0, 0, 0)
    # a is put once and read twice, in two environments; the client fetches b and c.
    large = run(sums_of("a", "b a", "c a"), nbytes=MB).report
    assert (large.s3_puts, large.s3_gets) == (3, 4)
    assert (large.bytes_written, large.bytes_read) == (3 * MB, 4 * MB)


def test_an_environment_keeps_what_several_groups_read():
    result = run(sums_of("a", "b a", "c a b"), nbytes=MB, keep_results=True)
    assert result.report.s3_gets == 2  # a by b, b by c, in the same environment
    nothing = FREE.replace(cache_bytes=0)
    assert (
        run(sums_of("a", "b a", "c a b"), nothing, nbytes=MB, keep_results=True).report.s3_gets == 3
    )


def test_inputs_are_fetched_while_tasks_compute():
    aws = FREE.replace(sustained_bytes=75e6, burst_bytes=75e6)
    stored = {name: (load_reference, Reference(f"0/p/r/{name}", 75 * MB)) for name in "xy"}
    dsk = {**stored, "a": task("x"), "b": task("y", "a")}
    result = run(dsk, aws, nbytes={"x": 75 * MB, "y": 75 * MB}, groups=["a b"])
    # 1 s for x, then a takes 1 s while y comes, then b.
    assert result.report.wall_seconds == pytest.approx(3.0)
    (only,) = result.timeline
    assert only.waiting == pytest.approx(1.0)
    assert (only.gets, only.bytes_read) == (2 * 9, 150 * MB)  # in parts of 8 MiB


def test_what_is_fetched_ahead_is_bounded():
    aws = FREE.replace(sustained_bytes=75e6, burst_bytes=75e6, prefetch_bytes=100 * MB)
    stored = {name: (load_reference, Reference(f"0/p/r/{name}", 75 * MB)) for name in "xy"}
    dsk = {**stored, "a": task("x"), "b": task("y", "a")}
    # There is no room for y before a has begun, which is when it would have been next anyway.
    sizes = {"x": 75 * MB, "y": 75 * MB}
    assert run(dsk, aws, nbytes=sizes, groups=["a b"]).report.wall_seconds == pytest.approx(3.0)
    # With room for both it is no faster: one network.
    roomy = aws.replace(prefetch_bytes=200 * MB)
    assert run(dsk, roomy, nbytes=sizes, groups=["a b"]).report.wall_seconds == pytest.approx(3.0)


def test_one_request_is_not_faster_than_one_stream_of_s3():
    aws = FREE.replace(
        get=constant(0.02),
        put=constant(0.04),
        stream_bytes=5e6,
        sustained_bytes=200e6,
        burst_bytes=200e6,
    )
    result = run(sums_of("a", "b a"), aws, nbytes=5 * MB, keep_results=True)
    assert result.report.wall_seconds == pytest.approx(2 * (1.0 + 1.0 + 0.04) + 1.0 + 0.02)


def test_large_objects_travel_in_parts_in_several_streams():
    aws = FREE.replace(
        get=constant(0.02),
        put=constant(0.04),
        stream_bytes=5e6,
        sustained_bytes=200e6,
        burst_bytes=200e6,
    )
    result = run(sums_of("a", "b a"), aws, nbytes=160 * MB, keep_results=True)
    # Written in 10 parts, 4 at a time, to begin and to complete, and a pointer; read 8 at a time.
    transfers = 2 * (160 / 20 + 4 * 0.04) + 160 / 40 + 0.02
    assert result.report.wall_seconds == pytest.approx(2.0 + transfers)
    assert (result.report.s3_puts, result.report.s3_gets) == (2 * 13, 20)


def test_outputs_are_uploaded_while_later_tasks_compute():
    aws = FREE.replace(sustained_bytes=100e6, burst_bytes=100e6)
    result = run(sums_of("a", "b a"), aws, nbytes={"a": 50 * MB, "b": 8}, groups=["a b"])
    assert result.report.wall_seconds == pytest.approx(2.0)
    both = {"a": task(), "b": task()}
    result = run(both, aws, nbytes=50 * MB, groups=["a b"], keep_results=True)
    assert result.report.wall_seconds == pytest.approx(2.5)
    assert result.timeline[0].upload == pytest.approx(0.5)


def test_a_group_commits_what_others_read_and_nothing_else():
    result = run(
        sums_of("a", "b a", "c b", "d b"), nbytes=MB, groups=["a b c", "d"], keep_results=True
    )
    assert result.report.s3_puts == 3  # b, c, d
    assert result.report.tasks == 4
    assert result.report.invocations == 2


# -- many invocations ----------------------------------------------------------------------------


def test_the_window_bounds_what_is_in_flight():
    assert run(calls(10), window=5).report.wall_seconds == pytest.approx(2.0)
    assert run(calls(10), window=10).report.wall_seconds == pytest.approx(1.0)


def test_the_client_sends_one_after_the_other():
    aws = FREE.replace(client_seconds=0.02)
    result = run(calls(10), aws)
    starts = [each.start for each in result.timeline]
    assert starts == pytest.approx([0.01 * (i + 1) for i in range(10)])


def test_above_the_limit_of_the_account_requests_are_refused_and_sent_again():
    aws = FREE.replace(concurrency=5, refuse=constant(0.01))
    result = run(calls(10), aws)
    assert result.report.throttles >= 5
    assert result.report.retries == result.report.throttles
    assert result.report.invocations == 10
    assert not result.report.failed
    flying = [sum(a.start <= b.start < a.end for a in result.timeline) for b in result.timeline]
    assert max(flying) == 5


def test_environments_are_started_at_a_bounded_rate():
    aws = FREE.replace(scaling_burst=10.0, scaling_rate=1.0)
    result = run(calls(12), aws, seconds=100.0)
    starts = [each.start for each in result.timeline]
    assert starts[:10] == pytest.approx([0.0] * 10)
    assert starts[10] >= 1.0
    assert starts[11] >= 2.0
    assert result.report.throttles > 0


def test_a_straggler_takes_longer_by_its_factor():
    aws = FREE.replace(straggler_probability=1.0, straggler_factor=3.0)
    result = run({"a": task()}, aws)
    assert result.report.wall_seconds == pytest.approx(3.0)
    assert result.report.compute_seconds == pytest.approx(3.0)


def test_duplicates_of_stragglers_shorten_a_run_and_hardly_cost_more():
    aws = FREE.replace(straggler_probability=0.01, straggler_factor=60.0)
    without, with_them = (
        run(calls(500), seconds=5.0, aws=aws, speculate=speculate).report
        for speculate in (False, True)
    )
    assert without.wall_seconds == pytest.approx(300.0)
    assert with_them.wall_seconds < 30.0
    assert 1 <= with_them.speculative <= 10
    assert with_them.invocations == 500 + with_them.speculative
    assert with_them.cost_usd < 1.1 * without.cost_usd


def test_lost_environments_and_errors_of_the_service_are_survived():
    aws = FREE.replace(death_probability=0.05, error_probability=0.2)
    result = run(calls(200), aws, seed=3)
    assert not result.report.failed
    assert result.report.tasks == 200
    assert result.report.retries > 0
    assert result.report.invocations > 200  # those that died count, those that were refused do not


def test_a_service_that_only_fails_fails_the_run():
    assert run({"a": task()}, FREE.replace(error_probability=1.0)).report.failed


def test_what_runs_longer_than_lambda_lets_it_fails():
    result = run({"a": task()}, seconds=901.0)
    assert result.report.failed
    assert result.timeline[0].end == 900.0


def test_small_groups_share_an_invocation_when_the_planner_says_how_long_they_take():
    graph = graph_of(calls(100))
    plan = make_plan(graph)
    known = tuple(
        Group(g.tasks, g.inputs, g.outputs, kind="call", seconds=0.01) for g in plan.groups
    )
    plan = replace(plan, groups=known)
    truth = truth_of(graph, 0.01)
    one = simulate(plan, truth, FREE, window=5)
    several = simulate(plan, truth, FREE, window=5, batch=True)
    assert several.report.invocations < one.report.invocations == 100
    assert several.report.tasks == 100


# -- what the client has -------------------------------------------------------------------------


def test_a_large_literal_is_uploaded_once():
    dsk = {"x": "a literal", "a": task("x"), "b": task("x")}
    graph = normalise(materialise(dsk), ["a", "b"])
    plan = make_plan(graph)
    for size, puts in ((MB, 1), (100, 0)):
        truth = truth_of(graph, nbytes={"x": size})
        assert simulate(plan, truth, FREE).report.s3_puts == puts


def test_results_are_fetched_by_the_client_over_its_own_network():
    aws = FREE.replace(client_bytes=5e6)
    result = run(calls(4), aws, nbytes=5 * MB)
    assert result.report.s3_gets == 4
    assert result.report.wall_seconds == pytest.approx(1.0 + 4.0)


def test_kept_results_are_all_in_s3():
    assert run(calls(5), nbytes=100, keep_results=True).report.s3_puts == 5
    assert run(calls(5), nbytes=MB, keep_results=True).report.s3_gets == 0


def test_released_objects_are_deleted_in_batches():
    result = run({**calls(1500), "sum": task(*calls(1500))}, nbytes=MB, keep_results=True)
    assert result.report.s3_deletes == 2


def test_a_reference_inside_a_task_is_loaded_by_the_task():
    aws = FREE.replace(get=constant(0.5))
    dsk = {"a": (max, [(load_reference, Reference("0/p/r/x", MB)), 0])}
    result = run(dsk, aws)
    assert result.report.s3_gets == 1
    assert result.report.wall_seconds == pytest.approx(1.5)


# -- the whole -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run():
    dsk = {**calls(50), "sum": task(*calls(50))}
    first, again, other = (run(dsk, AWS, nbytes=MB, seed=seed) for seed in (1, 1, 2))
    assert first.report == again.report
    assert first.timeline == again.timeline
    assert first.report.wall_seconds != other.report.wall_seconds


def test_lower_bounds_of_a_chain():
    aws = FREE.replace(
        client_seconds=0.001, invoke=constant(0.03), get=constant(0.02), put=constant(0.04),
        sustained_bytes=10e6, burst_bytes=10e6,
    )  # fmt: skip
    dsk = {"x": (load_reference, Reference("0/p/r/x", 10 * MB)), "a": task("x"), "b": task("a")}
    sizes = {"x": 10 * MB, "a": MB, "b": 5 * MB}
    bounds = run(dsk, aws, nbytes=sizes, window=2, keep_results=True).bounds
    assert bounds.chain_seconds == pytest.approx(2.0)
    transfers = 0.02 + 1.0 + 0.04 + 0.5
    assert bounds.critical_path_seconds == pytest.approx(2.0 + 0.031 + transfers)
    assert bounds.bandwidth_seconds == pytest.approx(15 / 10 / 2)
    assert bounds.work_seconds == pytest.approx(1.0)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, float], dict[str, int]]:
    count = draw(st.integers(1, 12))
    dsk, seconds, nbytes = {}, {}, {}
    for i in range(count):
        reads = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        key = f"t{i:02}"
        dsk[key] = task(*(f"t{r:02}" for r in sorted(reads)))
        seconds[key] = draw(st.sampled_from([0.0, 0.01, 1.0]))
        nbytes[key] = draw(st.sampled_from([8, 10**5, 10**8]))
    return dsk, seconds, nbytes


@settings(deadline=None, max_examples=60)
@given(graphs(), st.sampled_from([1, 3, 1000]), st.booleans())
def test_no_run_is_faster_than_its_lower_bounds(drawn, window, keep):
    dsk, seconds, nbytes = drawn
    aws = AWS.without_chance()
    graph = graph_of(dsk)
    truth = truth_of(graph, seconds, nbytes)
    for mode in ("none", "auto"):
        plan = make_plan(graph, mode=mode, estimates=truth)
        result = simulate(plan, truth, aws, window=window, keep_results=keep)
        assert not result.report.failed
        assert result.report.tasks == sum(len(group.tasks) for group in plan.groups)
        bounds = result.bounds
        assert result.report.wall_seconds >= bounds.critical_path_seconds - 1e-9
        assert result.report.wall_seconds >= bounds.work_seconds - 1e-9
        assert result.report.wall_seconds >= bounds.bandwidth_seconds - 1e-9


def test_sums_that_the_planner_cuts_are_run_as_they_are_cut():
    x = da.ones((800, 800), chunks=50)
    expr = collections_to_expr([da.linalg.cholesky(x)], True).optimize()
    graph = normalise(materialise(expr), list(expr.__dask_keys__()))
    plan = make_plan(graph, mode="auto", estimates=truth_of(graph, 1.0, 10**8))
    assert len(plan.graph.tasks) > len(graph.tasks)
    cut = simulate(plan, lambda graph: truth_of(graph, 1.0, 10**8), AWS, keep_results=True)
    assert not cut.report.failed
    whole = simulate(make_plan(graph), truth_of(graph, 1.0, 10**8), AWS, keep_results=True)
    assert cut.report.wall_seconds < whole.report.wall_seconds


def test_a_trace_of_a_real_run_serves_as_the_truth():
    graph = graph_of(
        {"add-1": (operator.add, 1, 2), "mul-2": (operator.mul, "add-1", 3)}, ["mul-2"]
    )
    truth = trace_estimates(graph, {"add": (0.5, 100.0), "mul": (2.0, 8.0)})
    assert truth.seconds == {"add-1": 0.5, "mul-2": 2.0}
    assert truth.nbytes["add-1"] == 100
    with pytest.raises(KeyError):
        trace_estimates(graph, {"add": (0.5, 100.0)})


# -- next to a real run --------------------------------------------------------------------------


def both_reports(collection: Any, nbytes: int, **options: Any) -> tuple[Any, Any]:
    """Run a collection on the embedded AWS and in the simulator, task by task."""
    with LambdaScheduler(backend="local", plan="none") as scheduler:
        collection.compute(scheduler=scheduler, **options)
    real = report()
    expr = collections_to_expr([collection], True).optimize()
    graph = normalise(materialise(expr), list(expr.__dask_keys__()))
    truth = truth_of(graph, 0.0, nbytes)
    return real, simulate(make_plan(graph), truth, FREE, window=6, **options).report


COUNTED = ("tasks", "invocations", "s3_puts", "s3_gets", "s3_lists", "throttles", "retries")


@pytest.mark.local
@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("inline_bytes", [65536, 0])
@pytest.mark.usefixtures("without_lease")
def test_requests_are_those_of_a_real_run(inline_bytes):
    numbers = [dask.delayed(operator.neg)(i) for i in range(8)]
    while len(numbers) > 1:
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        numbers = [dask.delayed(operator.add)(*pair) for pair in pairs]
    real, simulated = both_reports(numbers[0], 8, inline_bytes=inline_bytes)
    assert {n: getattr(real, n) for n in COUNTED} == {n: getattr(simulated, n) for n in COUNTED}


@pytest.mark.local
@pytest.mark.usefixtures("aws")
@pytest.mark.usefixtures("without_lease")
def test_requests_are_those_of_a_real_run_with_blocks_in_s3():
    x = da.ones((4 * 200, 200), chunks=(200, 200)) + 1
    y = x.map_blocks(np.cumsum, axis=0)
    real, simulated = both_reports(y.sum(split_every=2), 200 * 200 * 8)
    assert real.invocations == simulated.invocations
    assert real.tasks == simulated.tasks
