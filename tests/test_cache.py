"""The bounded cache of an execution environment."""

from __future__ import annotations

import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambda_worker.cache import Cache


def test_what_was_put_is_found_and_counted_as_a_hit():
    cache = Cache(100)
    cache.put("a", b"x" * 10)
    assert cache.get("a") == b"x" * 10
    assert cache.get("b") is None
    assert cache.hits == 1


def test_the_least_recently_used_goes_first():
    cache = Cache(30)
    for name in "abc":
        cache.put(name, b"x" * 10)
    cache.get("a")
    cache.put("d", b"x" * 10)
    assert cache.get("b") is None
    assert all(cache.get(name) for name in "acd")


def test_one_large_value_drives_out_several_small_ones():
    cache = Cache(30)
    for name in "abc":
        cache.put(name, b"x" * 10)
    cache.put("large", b"x" * 25)
    assert len(cache) == 1
    assert cache.size == 25


def test_a_value_above_the_limit_is_not_kept_and_drives_out_nothing():
    cache = Cache(30)
    cache.put("a", b"x" * 10)
    cache.put("huge", b"x" * 31)
    assert cache.get("huge") is None
    assert cache.get("a") is not None


def test_a_value_of_exactly_the_limit_is_kept():
    cache = Cache(30)
    cache.put("a", b"x" * 30)
    assert cache.get("a") is not None


def test_the_same_name_is_counted_once():
    cache = Cache(30)
    for _ in range(5):
        cache.put("a", b"x" * 10)
    assert (len(cache), cache.size) == (1, 10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(0, 40))))
def test_the_size_is_that_of_what_is_held_and_within_the_limit(steps):
    cache = Cache(50)
    held: dict[str, int] = {}  # what would be there if there were no limit
    for put, name, size in steps:
        if put:
            cache.put(name, bytes(held.setdefault(name, size)))
        else:
            data = cache.get(name)
            assert data is None or len(data) == held[name]
        there = {n: len(d) for n in "abcdef" if (d := cache._entries.get(n)) is not None}
        assert cache.size == sum(there.values()) <= 50


@pytest.fixture
def _hasty_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Sized:
    """Bytes whose length takes a moment, so that threads meet."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


@pytest.mark.usefixtures("_hasty_threads")
def test_threads_that_download_at_the_same_time_do_not_spoil_the_books():
    cache = Cache(500)
    broken = []

    def work(seed: int) -> None:
        try:
            for i in range(1000):
                cache.put(f"{(seed * 7 + i) % 97}", Sized(10 + i % 30))
                cache.get(f"{i % 97}")
        except Exception as error:
            broken.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert cache.size == sum(map(len, cache._entries.values())) <= 500
