"""Fetching ahead within a budget, and uploading behind within another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambda_worker.memory import share_out
from lambda_worker.prefetch import Prefetcher, Slot
from lambda_worker.uploads import Uploads
from tests.helpers import eventually


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Downloads:
    """Slots whose fetches are noted, and held up until they are let go."""

    def __init__(self, **sizes: int):
        self.started: list[str] = []
        self.gate = threading.Event()
        self.here = threading.get_ident()
        self.slots = {name: Slot(size, self._fetch(name)) for name, size in sizes.items()}

    def _fetch(self, name: str) -> Any:
        def fetch() -> str:
            self.started.append(name)
            if threading.get_ident() != self.here:
                assert self.gate.wait(20)
            return name.upper()

        return fetch

    def __getitem__(self, name: str) -> Slot[str]:
        return self.slots[name]


def test_slots_are_fetched_ahead_as_far_as_the_budget_allows(pool):
    downloads = Downloads(a=40, b=40, c=40, d=10)
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add(downloads.slots.values())
    assert prefetcher.held == 80  # d would fit, but it comes after c
    downloads.gate.set()
    assert prefetcher.take(downloads["a"]) == "A"
    assert prefetcher.held == 90
    for name in "bcd":
        assert prefetcher.take(downloads[name]) == name.upper()
    assert prefetcher.held == 0
    assert sorted(downloads.started) == list("abcd")


def test_a_slot_above_the_budget_is_fetched_alone(pool):
    downloads = Downloads(a=10, huge=1000, b=10)
    downloads.gate.set()
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add(downloads.slots.values())
    assert prefetcher.held == 10
    assert prefetcher.take(downloads["a"]) == "A"
    assert prefetcher.held == 1000
    assert prefetcher.take(downloads["huge"]) == "HUGE"
    assert prefetcher.take(downloads["b"]) == "B"


def test_a_slot_that_is_needed_before_its_turn_is_fetched_at_once(pool):
    downloads = Downloads(a=100, b=100, c=100)
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add(downloads.slots.values())
    assert prefetcher.take(downloads["c"]) == "C"
    assert prefetcher.held == 100
    downloads.gate.set()
    assert prefetcher.take(downloads["b"]) == "B"
    assert prefetcher.take(downloads["a"]) == "A"
    assert sorted(downloads.started) == list("abc")


def test_a_slot_that_waits_for_a_thread_is_fetched_by_who_needs_it():
    with ThreadPoolExecutor(1) as pool:
        downloads = Downloads(a=1, b=1)
        prefetcher = Prefetcher(pool, 100)
        prefetcher.add(downloads.slots.values())
        assert prefetcher.take(downloads["b"]) == "B"
        assert prefetcher.held == 1
        downloads.gate.set()
        assert prefetcher.take(downloads["a"]) == "A"
        assert prefetcher.held == 0


def test_the_order_may_be_changed_for_what_has_not_begun(pool):
    downloads = Downloads(a=100, b=100, c=100, d=100)
    downloads.gate.set()
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add(downloads.slots.values())
    prefetcher.put_first([downloads["c"], downloads["a"]])
    for name in "acbd":
        assert prefetcher.take(downloads[name]) == name.upper()
    assert downloads.started == list("acbd")


def test_an_error_is_that_of_who_takes_the_slot(pool):
    def fail() -> str:
        raise OSError("gone")

    bad, good = Slot(60, fail), Slot(60, lambda: "good")
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add([bad, good])
    with pytest.raises(OSError, match="gone"):
        prefetcher.take(bad)
    assert prefetcher.take(good) == "good"
    assert prefetcher.held == 0


def test_dropped_slots_make_room(pool):
    downloads = Downloads(a=60, b=60, c=60, d=60)
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add(downloads.slots.values())
    prefetcher.drop([downloads["a"], downloads["c"]])
    downloads.gate.set()
    assert prefetcher.take(downloads["b"]) == "B"
    assert prefetcher.take(downloads["d"]) == "D"
    prefetcher.drop(downloads.slots.values())
    prefetcher.close()
    assert prefetcher.held == 0
    assert "c" not in downloads.started


def test_closing_waits_for_what_runs_and_starts_nothing_more(pool):
    downloads = Downloads(a=60, b=60)
    prefetcher = Prefetcher(pool, 100)
    prefetcher.add(downloads.slots.values())
    assert eventually(lambda: downloads.started == ["a"])
    ended = threading.Event()

    def close() -> None:
        prefetcher.close()
        ended.set()

    thread = threading.Thread(target=close)
    thread.start()
    assert not ended.is_set()
    downloads.gate.set()
    thread.join(20)
    assert ended.is_set()
    assert downloads.started == ["a"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 80), max_size=12), st.randoms())
def test_in_whatever_order_slots_are_taken_the_books_are_right(sizes, random):
    with ThreadPoolExecutor(3) as pool:
        prefetcher = Prefetcher(pool, 100)
        slots = [Slot(size, lambda number=number: number) for number, size in enumerate(sizes)]
        prefetcher.add(slots)
        numbers = list(range(len(slots)))
        random.shuffle(numbers)
        for number in numbers:
            assert prefetcher.held <= 100
            if random.random() < 0.2:
                prefetcher.drop([slots[number]])
            else:
                assert prefetcher.take(slots[number]) == number
        prefetcher.close()
        assert prefetcher.held == 0


# -- uploads -------------------------------------------------------------------------------------


def test_an_upload_waits_until_there_is_room(pool):
    gate = threading.Event()
    uploads: Uploads[str] = Uploads(pool, 100)
    first = uploads.start(80, lambda: str(gate.wait(20)))
    roomy = threading.Event()

    def next_one() -> None:
        uploads.make_room(30)
        roomy.set()

    thread = threading.Thread(target=next_one)
    thread.start()
    uploads.make_room(20)  # for which there is room
    assert not roomy.is_set()
    gate.set()
    thread.join(20)
    assert roomy.is_set()
    assert first.result() == "True"
    uploads.make_room(1000)  # alone
    uploads.close()
    assert uploads.held == 0


def test_closing_waits_for_uploads_and_does_not_raise_their_errors(pool):
    def fail() -> str:
        raise OSError("refused")

    uploads: Uploads[str] = Uploads(pool, 100)
    failed = uploads.start(10, fail)
    good = uploads.start(10, lambda: "good")
    uploads.close()
    assert uploads.held == 0
    assert good.result() == "good"
    with pytest.raises(OSError, match="refused"):
        failed.result()


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [128, 512, 1769, 10_240])
def test_the_shares_leave_the_larger_part_to_the_tasks(memory):
    shares = share_out(memory)
    whole = shares.cache + shares.prefetch + shares.uploads + shares.tasks
    assert whole <= memory * 2**20
    assert shares.tasks > 0.4 * whole
    assert min(shares.cache, shares.prefetch, shares.uploads) > 2**20
