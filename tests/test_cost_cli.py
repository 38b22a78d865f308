"""``dask-lambda cost``: what kept runs have cost, and what their objects cost."""

from __future__ import annotations

import json
from typing import Any

import dask
import pytest
from click.testing import CliRunner

from dask_lambda import kept_runs
from dask_lambda.cleaning import delete_run
from dask_lambda.cli import main
from dask_lambda.kept_runs import KeptRun, Place, Spent
from tests.helpers import report


@pytest.fixture(autouse=True)
def _own_records(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["cost", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", *arguments))
    return found


def record(name: str, **fields: Any) -> KeptRun:
    """A record of a run whose embedded AWS has ended."""
    place = Place("bucket", "prefix", "us-east-1", "http://127.0.0.1:9")
    made = KeptRun.new(name, place, "function")
    for field, value in fields.items():
        setattr(made, field, value)
    kept_runs.write(made)
    return made


def test_two_computations_of_a_name_are_added_up(connect) -> None:
    def tasks(count: int) -> list[Any]:
        return [dask.delayed(abs)(-i, dask_key_name=f"t-{i}") for i in range(count)]

    scheduler = connect()
    reports = []
    for count in (3, 5):
        dask.compute(*tasks(count), scheduler=scheduler, resume="added", plan="none")
        reports.append(report())
    try:
        found = told()
        (each,) = found["runs"]
        assert (each["name"], each["status"], each["computations"]) == ("added", "done", 2)
        assert each["invocations"] == sum(one.invocations for one in reports) == 5
        assert each["cost_usd"] == pytest.approx(sum(one.cost_usd for one in reports))
        assert each["gb_seconds"] == pytest.approx(sum(one.billed_gb_seconds for one in reports))
        assert each["objects"] >= 5
        assert each["usd_per_month"] == pytest.approx(each["bytes"] / 2**30 * 0.023)
        assert found["total"]["cost_usd"] == each["cost_usd"]
        assert told("--no-storage")["runs"][0]["bytes"] is None
    finally:
        kept = kept_runs.read("added")
        assert kept is not None
        delete_run(kept)


def test_what_fails_has_cost_something_too(connect) -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        dask.compute(dask.delayed(fails)(), scheduler=connect(), resume="failing")
    (each,) = told("--no-storage")["runs"]
    assert (each["status"], each["computations"], each["invocations"]) == ("failed", 1, 1)
    assert each["cost_usd"] == pytest.approx(report().cost_usd)
    assert each["cost_usd"] > 0
    kept = kept_runs.read("failing")
    assert kept is not None
    delete_run(kept)


def test_a_record_of_an_earlier_version_is_read_and_its_costs_are_not_known() -> None:
    old = record("old")
    content = old.to_json()
    del content["spent"]
    (kept_runs.runs_directory() / "old.json").write_text(json.dumps(content))
    found = kept_runs.read("old")
    assert found is not None
    assert found.spent is None
    record("new", spent=Spent(1.0).plus(2, 3.0, 0.5))
    answer = told()
    new, each = answer["runs"]
    assert (each["cost_usd"], each["computations"]) == (None, None)
    assert "did not count" in each["notes"][0]
    assert (new["cost_usd"], new["invocations"]) == (0.5, 2)
    assert answer["total"]["cost_usd"] == 0.5
    assert "?" in run()


def test_what_is_gone_costs_nothing_any_more() -> None:
    record("ended", spent=Spent(1.0).plus(2, 3.0, 0.5), created=1.0)
    (each,) = told()["runs"]
    assert (each["status"], each["objects"], each["usd_per_month"]) == ("gone", 0, 0)
    assert each["notes"] == []


def test_what_was_killed_or_began_before_it_was_counted_is_told() -> None:
    record("killed", status="running", spent=Spent(2000.0), created=1000.0)
    text = run("--no-storage")
    assert "killed: goes on, or was killed" in text
    assert "killed: counted since 1970-01-01T00:33:20" in text


def test_names_choose_and_unknown_ones_are_refused() -> None:
    record("one")
    record("two")
    assert [each["name"] for each in told("two", "--no-storage")["runs"]] == ["two"]
    refused = CliRunner().invoke(main, ["cost", "three"])
    assert refused.exit_code == 1
    assert "there are: one, two" in refused.output


def test_without_any_run_it_says_so() -> None:
    assert run().startswith("no runs are kept:")
    assert told() == {"runs": [], "total": dict.fromkeys(told()["total"])}


def test_the_table_has_a_line_for_each_run_and_one_for_all() -> None:
    record("a", spent=Spent(1.0).plus(10, 1.0, 0.25), created=1.0)
    record("b", spent=Spent(1.0).plus(20, 2.0, 0.50), created=1.0)
    lines = run("--no-storage").splitlines()
    assert lines[0].startswith("name  status  runs  invocations")
    assert lines[3].split()[:5] == ["all", "2", "30", "3.0", "0.750000"]
