"""What is remembered of the tasks that this process has run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_lambda.estimates import Estimates
from dask_lambda.history import SAMPLES, History

GUESSED = Estimates(
    seconds={("add-1", 0): 1.0, ("add-1", 1): 3.0, ("dot-2", 0): 2.0},
    nbytes={("add-1", 0): 100, ("add-1", 1): 300, ("dot-2", 0): 50},
)
TASKS = list(GUESSED.seconds)


def test_of_a_prefix_that_never_ran_nothing_is_known() -> None:
    assert History().ratio("add") is None


def test_the_ratio_is_what_was_measured_over_what_was_guessed() -> None:
    history = History()
    history.learn(GUESSED, TASKS, {"add": (2, 8.0, 100), "dot": (1, 1.0, 50)})
    assert history.ratio("add") == (2.0, 0.25)
    assert history.ratio("dot") == (0.5, 1.0)


def test_what_a_group_did_not_run_is_not_counted() -> None:
    history = History()
    history.learn(GUESSED, [("add-1", 0)], {"add": (1, 8.0, 100)})
    assert history.ratio("add") == (8.0, 1.0)
    assert history.ratio("dot") is None


def test_several_groups_are_averaged() -> None:
    history = History()
    for seconds in (1.0, 3.0):
        history.learn(GUESSED, [("add-1", 0)], {"add": (1, seconds, 100)})
    found = history.ratio("add")
    assert found is not None
    assert found[0] == pytest.approx(2.0)


def test_what_was_long_ago_is_forgotten() -> None:
    history = History()
    history.observe("add", SAMPLES, (100.0, 1.0), (1.0, 1.0))
    for _ in range(10 * SAMPLES):
        history.observe("add", 1, (2.0, 1.0), (1.0, 1.0))
    found = history.ratio("add")
    assert found is not None
    assert found[0] == pytest.approx(2.0, rel=0.01)


def test_other_names_of_a_task_are_not_learned_from() -> None:
    history = History()
    history.learn(GUESSED, [("add-1", 0)], {"add": (1, 1.0, 100), "alias": (1, 1e-6, 100)})
    assert history.ratio("alias") is None


def test_a_group_that_measured_nothing_teaches_nothing() -> None:
    history = History()
    history.learn(GUESSED, TASKS, {})
    assert history.ratio("add") is None


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.01, 100.0)), min_size=1, max_size=50))
def test_the_ratio_lies_among_those_that_were_seen(seen: list[tuple[int, float]]) -> None:
    history = History()
    for count, ratio in seen:
        history.observe("add", count, (ratio, 1.0), (ratio, 1.0))
    found = history.ratio("add")
    assert found is not None
    ratios = [ratio for _, ratio in seen]
    for value in found:
        assert min(ratios) * 0.999 <= value <= max(ratios) * 1.001
