"""A few runs of the soak (``make soak``): whatever happens, right results and nothing left."""

from __future__ import annotations

import time

import pytest

from dask_lambda.local import LocalAWS
from tests.faults import graphs
from tests.faults.plans import INTENSITIES
from tests.faults.soak import MIX, Setup, Soak, Table, soak

pytestmark = pytest.mark.local
uses_bucket = True

FIRST_SEED = 20


@pytest.mark.slow
def test_mixed_graphs_under_random_faults_end_rightly_and_leave_nothing(
    aws: LocalAWS, credentials: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    names = list(graphs.GRAPHS)
    setups = [Setup.of(FIRST_SEED + i, names[i % len(names)]) for i in range(len(names))]
    table = Table()
    with Soak(aws, windows=(5, 3)) as context:
        soak(context, setups, time.monotonic() + 100, table)
    assert not table.bad, f"\n{table}"
    assert table.counts["runs"] == len(setups)
    assert table.counts["faulted runs"] > len(setups) / 2


def test_a_seed_says_all_about_a_run() -> None:
    setups = [Setup.of(seed) for seed in range(200)]
    assert setups == [Setup.of(seed) for seed in range(200)]
    assert {setup.graph for setup in setups} == graphs.GRAPHS.keys()
    assert {setup.settings["plan"] for setup in setups} == {"auto", "none"}
    assert {setup.intensity for setup in setups} >= MIX.keys() - {"none"}
    assert MIX.keys() == INTENSITIES.keys()
    assert '--seed 3 --graph "tree"' in str(Setup.of(3, "tree"))


def test_what_is_not_right_is_counted() -> None:
    table = Table()
    assert table.bad == 0
    table.counts["lost"] += 1
    table.counts["leftovers"] += 2
    assert table.bad == 3
    assert "| leftovers" in str(table)
