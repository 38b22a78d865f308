"""The run report: dollars computed by hand, numbers that add up."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dask_lambda.cost import Prices
from dask_lambda.report import RunCounts, RunReport
from lambda_worker.store import Counts

FIELDS = [
    *("tasks", "local_tasks", "reused", "invocations", "cold_starts", "restores"),
    *("retries", "throttles", "speculative"),
    *("wall_seconds", "compute_seconds", "billed_gb_seconds"),
    *("s3_puts", "s3_gets", "s3_lists", "s3_deletes", "bytes_written", "bytes_read"),
    *("cache_hits", "peak_memory_mb", "cost_usd", "prices", "failed"),
]


def test_a_million_of_each_costs_what_the_price_lists_say():
    million = 1_000_000
    none = {"invocations": 0, "gb_seconds": 0.0}
    prices = Prices()
    assert prices.cost(**none) == 0
    assert prices.cost(**none | {"invocations": million}) == pytest.approx(0.20)
    assert prices.cost(**none | {"gb_seconds": million}) == pytest.approx(16.6667)
    assert prices.cost(**none, puts=million) == pytest.approx(5.00)
    assert prices.cost(**none, lists=million) == pytest.approx(5.00)
    assert prices.cost(**none, gets=million) == pytest.approx(0.40)


def test_a_small_run_costs_what_was_computed_by_hand():
    # 10 invocations, 2 GB-s, 3 PUTs, 1 LIST, 5 GETs:
    # 10 x 0.0000002 + 2 x 0.0000166667 + 4 x 0.000005 + 5 x 0.0000004
    # = 0.000002 + 0.0000333334 + 0.00002 + 0.000002
    cost = Prices().cost(invocations=10, gb_seconds=2.0, puts=3, lists=1, gets=5)
    assert cost == pytest.approx(0.0000573334, rel=1e-12)


def test_other_prices_may_be_given():
    arm = Prices(lambda_gb_second=0.0000133334)
    assert arm.cost(invocations=0, gb_seconds=1.0) == pytest.approx(0.0000133334)


def reply(**fields) -> dict:
    return {"cold": False, "milliseconds": 0.0, "memory_mb": 1024, **fields}


def test_billed_time_is_rounded_up_to_milliseconds_for_each_invocation():
    counts = RunCounts()
    counts.add_reply(reply(milliseconds=1.2), None)
    counts.add_reply(reply(milliseconds=1.2), None)
    assert counts.billed_gb_seconds == pytest.approx(0.004)


def test_billed_time_is_lambdas_own_where_it_was_sent():
    counts = RunCounts()
    counts.add_reply(reply(milliseconds=1.2), 412.0)
    assert counts.billed_gb_seconds == pytest.approx(0.412)


def test_half_the_memory_is_half_the_gigabyte_seconds():
    counts = RunCounts()
    counts.add_reply(reply(milliseconds=1000, memory_mb=512), None)
    counts.add_billed(1000, 1536)
    assert counts.billed_gb_seconds == pytest.approx(0.5 + 1.5)


def test_what_is_served_elsewhere_is_not_billed_but_its_requests_are_counted():
    counts = RunCounts()
    s3 = {"gets": 2, "puts": 1, "lists": 0, "deletes": 0, "bytes_read": 30, "bytes_written": 7}
    counts.add_work(reply(cold=True, s3=s3, peak_memory=2**30))
    assert counts.billed_gb_seconds == 0
    assert counts.cold_starts == 0
    assert counts.workers == Counts(2, 1, 0, 0, 30, 7)
    assert counts.peak_memory_mb == 1024


def test_cold_starts_and_requests_of_the_workers_are_summed_up():
    counts = RunCounts()
    s3 = {"gets": 2, "puts": 1, "lists": 0, "deletes": 0, "bytes_read": 30, "bytes_written": 7}
    counts.add_reply(reply(cold=True, s3=s3), None)
    counts.add_reply(reply(s3=s3), None)
    counts.add_reply(reply(), None)  # a refusal says nothing of S3
    assert counts.cold_starts == 1
    assert counts.workers == Counts(4, 2, 0, 0, 60, 14)


def test_environments_that_began_as_copies_are_counted_and_paid_by_their_memory():
    counts = RunCounts(invocations=3)
    counts.add_reply(reply(cold=True, restored=True, memory_mb=2048), 500.0)
    counts.add_restore(2048)
    counts.add_restore(1024)
    report = counts.report(Counts(), 1.0, failed=False, prices=Prices())
    assert (report.cold_starts, report.restores) == (1, 2)
    # 3 x $0.0000002 + 1 GB-s x $0.0000166667 + 3 GB x $0.0001397998
    assert report.cost_usd == pytest.approx(0.0004366661, rel=1e-12)


def test_cache_hits_are_summed_up_and_the_peak_of_memory_is_the_largest():
    counts = RunCounts()
    counts.add_reply(reply(cache_hits=2, peak_memory=300 * 2**20), None)
    counts.add_reply(reply(cache_hits=1, peak_memory=200 * 2**20), None)
    counts.add_reply(reply(), None)  # a refusal says nothing of either
    report = counts.report(Counts(), 1.0, failed=False, prices=Prices())
    assert (report.cache_hits, report.peak_memory_mb) == (3, 300.0)


def make_report(**changes) -> RunReport:
    counts = RunCounts(
        tasks=9,
        invocations=10,
        cold_starts=2,
        retries=1,
        throttles=3,
        compute_seconds=1.5,
        billed_gb_seconds=2.0,
        workers=Counts(gets=4, puts=2, lists=0, deletes=0, bytes_read=1000, bytes_written=2000),
    )
    client = Counts(gets=1, puts=1, lists=1, deletes=2, bytes_read=5, bytes_written=6)
    return counts.report(client, 3.25, **{"failed": False, "prices": Prices(), **changes})


def test_the_report_adds_client_and_workers_and_prices_the_sum():
    report = make_report()
    assert (report.s3_gets, report.s3_puts, report.s3_lists, report.s3_deletes) == (5, 3, 1, 2)
    assert (report.bytes_read, report.bytes_written) == (1005, 2006)
    assert (report.tasks, report.invocations, report.cold_starts) == (9, 10, 2)
    assert (report.retries, report.throttles, report.wall_seconds) == (1, 3, 3.25)
    assert report.cost_usd == pytest.approx(0.0000573334, rel=1e-12)


def test_the_report_has_the_fields_that_were_promised_and_is_plain_data():
    report = make_report()
    record = report.to_dict()
    assert list(record) == FIELDS
    assert json.loads(json.dumps(record)) == record
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.tasks = 0


def test_people_can_read_the_report():
    text = str(make_report(failed=True))
    lines = dict(line.strip().rsplit("  ", 1) for line in text.splitlines()[1:])
    lines = {name.strip(): value for name, value in lines.items()}
    assert lines["bytes written"] == "2,006"
    assert lines["cost usd"] == "0.000057"
    assert lines["wall seconds"] == "3.250"
    assert lines["failed"] == "yes"


def test_notebooks_show_every_field_as_a_row():
    html = make_report()._repr_html_()
    assert html.count("<tr>") == len(FIELDS)
    assert "<td>2,006</td>" in html


def test_what_was_taken_from_a_counter_is_not_counted_again():
    counts = Counts(gets=3, bytes_read=10)
    assert counts.take() == Counts(gets=3, bytes_read=10)
    counts.puts += 1
    assert counts.take() == Counts(puts=1)
