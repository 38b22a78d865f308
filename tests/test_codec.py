"""Values to sealed bytes and back: nothing is copied, and nothing foreign is unpickled."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lambda_worker import codec
from lambda_worker.errors import IntegrityError, UnserializableError

SECRET = b"s" * 32
NAME = "0/prefix/run/label"


def roundtrip(value):
    return codec.loads(codec.dumps(value, SECRET, NAME), SECRET, NAME)


def assert_same(got, expected):
    """Equal, with equal types all the way down, NaN equal to itself."""
    assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        # NumPy's pickling swaps the bytes of strided arrays in the other order.
        assert got.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    else:
        assert got == expected or got != got


DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),  # of either byte order
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
    hnp.datetime64_dtypes(endianness="="),  # pickle itself forgets the other
    hnp.timedelta64_dtypes(endianness="="),
    hnp.byte_string_dtypes(max_len=5),
    hnp.unicode_string_dtypes(max_len=5),
    st.just(np.dtype([("a", "<i4"), ("b", "f8", (2,))])),
    st.just(np.dtype(object)),
)


@st.composite
def arrays(draw):
    """Arrays small and large, in C and Fortran order, strided, reversed, read-only."""
    dtype = draw(DTYPES)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    if dtype.hasobject:
        array = np.empty(shape, object)
        array.fill(draw(st.sampled_from([None, "text", (1, 2)])))
    elif dtype.names:
        array = np.zeros(shape, dtype)
        array["a"] = draw(st.integers(-5, 5))
    else:
        array = draw(hnp.arrays(dtype, shape))
    if draw(st.booleans()):
        array = np.tile(
            array, (draw(st.sampled_from([1, 3, 700])),) + (1,) * max(0, array.ndim - 1)
        )
    how = draw(st.sampled_from(["C", "F", "strided", "reversed", "read-only"]))
    if how == "F":
        array = np.asfortranarray(array)
    elif how == "strided" and array.ndim:
        array = array[::2]
    elif how == "reversed" and array.ndim:
        array = array[::-1]
    elif how == "read-only":
        array.flags.writeable = False
    return array


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.binary(max_size=20),
        st.binary(min_size=1, max_size=3).map(lambda b: b * 1500),
        st.binary(min_size=1, max_size=3).map(lambda b: bytearray(b * 1500)),
        arrays(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ),
    max_leaves=6,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(VALUES)
def test_any_value_comes_back_as_it_was(value):
    sealed = codec.dumps(value, SECRET, NAME)
    assert_same(codec.loads(sealed, SECRET, NAME), value)
    assert_same(codec.loads(bytes(sealed), SECRET, NAME), value)


# -- zero-copy and layout ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_loaded_array_is_a_view_of_the_sealed_bytes(order):
    array = np.asarray(np.arange(6000.0).reshape(60, 100), order=order)
    sealed = codec.dumps({"x": array}, SECRET, NAME)
    loaded = codec.loads(sealed, SECRET, NAME)["x"]
    assert np.shares_memory(loaded, np.frombuffer(sealed, np.uint8))
    assert loaded.flags.f_contiguous == array.flags.f_contiguous
    np.testing.assert_array_equal(loaded, array)


def test_serialising_a_large_array_does_not_copy_it():
    array = np.arange(100_000)
    _, frame = codec.serialize(array)
    assert np.shares_memory(np.frombuffer(frame, np.uint8), array)


def test_a_read_only_array_is_a_view_even_of_read_only_bytes():
    array = np.arange(1000.0)
    array.flags.writeable = False
    sealed = bytes(codec.dumps(array, SECRET, NAME))
    assert np.shares_memory(codec.loads(sealed, SECRET, NAME), np.frombuffer(sealed, np.uint8))


@pytest.mark.parametrize("container", [bytes, bytearray])
@pytest.mark.parametrize("writable", [True, False])
def test_an_array_may_be_written_to_exactly_if_it_could_be_before(container, writable):
    array = np.arange(1000.0)
    array.flags.writeable = writable
    sealed = container(codec.dumps(array, SECRET, NAME))
    assert codec.loads(sealed, SECRET, NAME).flags.writeable == writable


@pytest.mark.parametrize("container", [bytes, bytearray])
@pytest.mark.parametrize("writable", [True, False])
def test_a_buffer_that_is_an_object_of_its_own_is_as_writable_as_it_was(container, writable):
    buffer = memoryview(bytearray(5000))
    sealed = container(codec.seal([buffer if writable else buffer.toreadonly()], SECRET, NAME))
    (frame,) = codec.unseal(sealed, SECRET, NAME)
    assert frame.readonly != writable


def test_an_array_that_had_to_be_copied_does_not_keep_the_sealed_bytes_alive():
    class Downloaded(np.ndarray):
        """Read-only bytes that a weak reference can watch."""

    sealed = np.frombuffer(bytes(codec.dumps(np.zeros(10_000), SECRET, NAME)), np.uint8)
    sealed = sealed.view(Downloaded)
    watch = weakref.ref(sealed)
    loaded = codec.loads(sealed, SECRET, NAME)
    del sealed
    assert watch() is None
    assert loaded.sum() == 0


def test_writing_to_an_array_that_came_from_read_only_bytes_does_not_change_them():
    sealed = bytes(codec.dumps(np.zeros(1000), SECRET, NAME))
    codec.loads(sealed, SECRET, NAME)[:] = 1
    np.testing.assert_array_equal(codec.loads(sealed, SECRET, NAME), np.zeros(1000))


def test_every_frame_begins_at_a_multiple_of_64_bytes():
    arrays = [np.full(1024 + 13 * i, i, np.uint8) for i in range(9)]
    sealed = codec.dumps(arrays, SECRET, NAME)
    start = np.frombuffer(sealed, np.uint8).__array_interface__["data"][0]
    frames = codec.unseal(sealed, SECRET, NAME)
    assert len(frames) == 10
    for frame in frames:
        at = np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
        assert (at - start) % 64 == 0


def test_small_buffers_stay_in_the_pickle_stream_and_large_ones_leave_it():
    small, large = np.zeros(1023, np.uint8), np.zeros(1024, np.uint8)
    assert len(codec.serialize([small, small])) == 1
    assert len(codec.serialize([small, large])) == 2


def test_frames_keep_their_order():
    values = [np.full(2000, i, np.uint8) for i in range(20)]
    for i, loaded in enumerate(roundtrip(values)):
        np.testing.assert_array_equal(loaded, np.full(2000, i, np.uint8))


def test_an_array_that_occurs_twice_is_stored_once_and_stays_one():
    array = np.zeros(10_000)
    sealed = codec.dumps([array, array], SECRET, NAME)
    assert len(sealed) < 1.5 * array.nbytes
    a, b = codec.loads(sealed, SECRET, NAME)
    assert a is b


class Strided:
    """Hands out a buffer that is not contiguous."""

    def __init__(self, array):
        self.array = array

    def __reduce_ex__(self, protocol):
        return Strided, (pickle.PickleBuffer(self.array),)


def test_a_buffer_that_is_not_contiguous_is_refused_by_pickle_and_not_silently_flattened():
    with pytest.raises(pickle.PicklingError):
        codec.serialize(Strided(np.arange(4000)[::2]))


def test_a_masked_array_and_a_memory_map_come_back(tmp_path):
    masked = np.ma.masked_greater(np.arange(2000), 1000)
    loaded = roundtrip(masked)
    np.testing.assert_array_equal(loaded.mask, masked.mask)
    np.testing.assert_array_equal(loaded.data, masked.data)
    mapped = np.memmap(tmp_path / "map", np.int64, "w+", shape=(500,))
    mapped[:] = 7
    np.testing.assert_array_equal(roundtrip(mapped), np.full(500, 7))


def test_data_frames_and_arrow_tables_come_back_without_a_copy_of_their_columns():
    frame = pd.DataFrame({"x": np.arange(2000.0), "name": ["a", "b"] * 1000})
    pd.testing.assert_frame_equal(roundtrip(frame), frame)
    table = pa.table({"x": np.arange(2000.0), "name": ["a", "b"] * 1000})
    sealed = codec.dumps(table, SECRET, NAME)
    loaded = codec.loads(sealed, SECRET, NAME)
    assert loaded.equals(table)
    column = loaded["x"].chunk(0).to_numpy()
    assert np.shares_memory(column, np.frombuffer(sealed, np.uint8))


def test_functions_and_classes_of_a_script_travel_by_value(tmp_path):
    root = Path(codec.__file__).parents[1]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from lambda_worker import codec\n"
        "class Point:\n"
        "    def __init__(self, x): self.x = x\n"
        "def double(p): return Point(2 * p.x)\n"
        "sealed = codec.dumps((double, Point(21)), b's' * 32, 'n')\n"
        "sys.stdout.buffer.write(sealed)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    made = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, check=True
    )
    double, point = codec.loads(made.stdout, b"s" * 32, "n")
    assert double(point).x == 42


# -- what is not ours is not unpickled -----------------------------------------------------------


class Trap:
    """Its unpickling leaves a trace."""

    sprung = False

    def __reduce__(self):
        return _spring, ()


def _spring():
    Trap.sprung = True


@pytest.fixture
def trap():
    """A sealed value that must not be unpickled; checks that it was not."""
    Trap.sprung = False
    pickled = [memoryview(pickle.dumps(Trap(), protocol=5)), memoryview(bytes(2000))]
    yield codec.seal(pickled, SECRET, NAME)
    assert not Trap.sprung


def test_the_trap_works():
    Trap.sprung = False
    pickle.loads(pickle.dumps(Trap()))
    assert Trap.sprung


def refused(sealed, secret=SECRET, name=NAME):
    with pytest.raises(IntegrityError) as info:
        codec.loads(sealed, secret, name)
    return str(info.value)


def test_a_flipped_bit_anywhere_is_noticed(trap):
    for place in [*range(0, len(trap), 37), len(trap) - 1]:
        changed = bytearray(trap)
        changed[place] ^= 0x10
        refused(changed)


def test_a_truncated_or_prolonged_object_is_noticed(trap):
    for size in (0, 1, 31, 32, 39, 40, 100, len(trap) - 1):
        message = refused(trap[:size])
        assert NAME in message
    refused(trap + b"\0")


def test_an_object_under_another_name_is_refused(trap):
    assert "0/prefix/run/other" in refused(trap, name="0/prefix/run/other")


def test_an_object_of_another_run_is_refused(trap):
    refused(trap, secret=b"t" * 32)


def test_an_unsealed_pickle_is_refused(trap):
    refused(pickle.dumps(Trap()))
    refused(bytes(32) + trap[32:])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    refused(data)


def test_the_message_says_that_nothing_was_loaded(trap):
    trap[-1] ^= 1
    assert "not unpickled" in refused(trap)
    assert str(len(trap)) in refused(trap)


def test_a_valid_tag_over_another_format_is_refused():
    sealed = codec.seal([memoryview(pickle.dumps(1))], SECRET, NAME)
    sealed[32:36] = b"DLv9"
    body = memoryview(sealed)[32:]
    sealed[:32] = codec._tag(body, SECRET, NAME)
    assert "DLv9" in refused(sealed)


def test_two_seals_of_one_value_under_two_names_differ_in_their_tag_only():
    a, b = codec.dumps([1, 2], SECRET, "a"), codec.dumps([1, 2], SECRET, "b")
    assert a[:32] != b[:32]
    assert a[32:] == b[32:]


# -- compression ---------------------------------------------------------------------------------

N = 100_000  # float64: above MIN_COMPRESS_BYTES


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(N),
        np.arange(2 * N).reshape(2, N),
        {"noise": np.random.default_rng(1).random(N), "ones": np.ones(N), "small": np.ones(9)},
        [np.zeros(N), np.ones(N), bytes(N), b"x" * 10 * N, bytearray(10 * N)],
        [f"text {i}" for i in range(N)],  # all of it in the pickle stream
        np.zeros(0),
        None,
    ],
    ids=["zeros", "counter", "mixed", "several", "stream", "empty", "none"],
)
@pytest.mark.parametrize("container", [bytes, bytearray])
def test_a_compressed_value_comes_back_as_it_was(value, container):
    frames = codec.serialize(value)
    sealed = codec.seal(frames, SECRET, NAME, "zstd")
    assert_same(codec.loads(container(sealed), SECRET, NAME), value)
    plain = codec.seal(frames, SECRET, NAME)
    assert len(sealed) <= len(plain)
    assert sum(f.nbytes for f in codec.unseal(sealed, SECRET, NAME)) == sum(
        f.nbytes for f in frames
    )


def test_only_large_frames_that_it_shortens_are_compressed():
    noise = np.random.default_rng(1).bytes(2**20)
    for buffer, less in [(noise, False), (bytes(2**20), True), (bytes(2**16), False)]:
        sealed = codec.seal([memoryview(buffer)], SECRET, NAME, "zstd")
        assert (len(sealed) < len(buffer)) == codec.is_compressed(sealed, NAME) == less
    half = noise + bytes(2**20)  # noise in some of the pieces that are looked at
    assert len(codec.seal([memoryview(half)], SECRET, NAME, "zstd")) < 0.6 * len(half)


@pytest.mark.parametrize("writable", [True, False])
def test_a_compressed_array_may_be_written_to_exactly_if_it_could_be_before(writable):
    x = np.zeros(N)
    x.flags.writeable = writable
    sealed = codec.seal(codec.serialize(x), SECRET, NAME, "zstd")
    loaded = codec.loads(bytes(sealed), SECRET, NAME)
    assert loaded.flags.writeable == writable
    assert loaded.ctypes.data % codec.ALIGNMENT == 0


def test_nothing_is_decompressed_before_the_tag_is_verified(monkeypatch):
    sealed = codec.seal([memoryview(bytes(2**20))], SECRET, NAME, "zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnserializableError):
        codec.unseal(sealed, SECRET, NAME)
    sealed[-1] ^= 1
    refused(sealed)


@pytest.mark.parametrize("wrong", [-1, 1, 2**20])
def test_a_compressed_frame_has_the_length_that_is_stored_with_it(wrong):
    sealed = codec.seal([memoryview(bytes(2**20))], SECRET, NAME, "zstd")
    place = sealed.index((2**20).to_bytes(8, "little"))
    sealed[place : place + 8] = (2**20 + wrong).to_bytes(8, "little")
    codec.sign(sealed, SECRET, NAME)
    with pytest.raises(IntegrityError, match="compressed frame"):
        codec.unseal(sealed, SECRET, NAME)


def test_a_compressed_frame_that_is_none_is_refused():
    sealed = codec.seal([memoryview(bytes(2**20))], SECRET, NAME, "zstd")
    place = sealed.index((2**20).to_bytes(8, "little")) + 8
    sealed[place : place + 4] = b"none"
    codec.sign(sealed, SECRET, NAME)
    with pytest.raises(IntegrityError, match="compressed frame"):
        codec.unseal(sealed, SECRET, NAME)


def test_without_the_package_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnserializableError, match="install it on the client and for the Lambda"):
        codec.seal([memoryview(bytes(2**20))], SECRET, NAME, "zstd")


def test_very_long_objects_are_tagged_in_steps_with_the_same_tag(monkeypatch):
    frames = codec.serialize(np.arange(1000))
    in_one = codec.seal(frames, SECRET, NAME)
    monkeypatch.setattr(codec, "MAX_ONE_SHOT_BYTES", 100)
    assert codec.seal(frames, SECRET, NAME) == in_one


@pytest.mark.parametrize("value", [1, np.arange(5000), [np.zeros(2000), bytes(3000)], "x" * 10**6])
def test_the_size_is_known_before_it_is_sealed(value):
    frames = codec.serialize(value)
    assert codec.sealed_size(frames) == len(codec.seal(frames, SECRET, NAME))
