"""Collections are described in built-in types, and rebuilt from that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_lambda.description import Description, versions
from dask_lambda.errors import VersionMismatchError
from dask_lambda.kept_runs import KeptRun, Place, Saved
from lambda_worker import codec, protocol
from lambda_worker.protocol import Reference


def record_of(name: str = "x") -> KeptRun:
    record = KeptRun.new(name, Place("bucket", "prefix"), "function")
    record.saved = Saved("saved-" + "0" * 32, 0, "", "")
    return record


def round_trip(x: Any, references: list[Reference], record: KeptRun) -> Any:
    description, _ = Description.of(x)
    sealed = codec.dumps(description.to_value(record, references), record.secret, "name")
    value = codec.loads(sealed, record.secret, "name")
    again, found = Description.from_value(record, value)
    assert again == description
    assert [(r.name, r.size) for r in found] == [(r.name, r.size) for r in references]
    return again.rebuild(record, found, value["versions"])


def references_of(record: KeptRun, count: int, attempts: bool = False) -> list[Reference]:
    names = [
        protocol.object_name("prefix-kept", record.run, f"{number:032x}") for number in range(count)
    ]
    if attempts:
        names = [protocol.attempt_name(name) for name in names]
    return [Reference(name, 100 + number) for number, name in enumerate(names)]


def stored_in(x: Any) -> list[str]:
    """The names of the objects of which a collection is made, in the order of its keys."""
    graph = dict(x.__dask_graph__())
    keys = [x.key] if not hasattr(x, "npartitions") else list(dask.core.flatten(x.__dask_keys__()))
    return [graph[graph.get(key).target if key not in graph else key].args[0].name for key in keys]


axes = st.lists(
    st.lists(st.one_of(st.integers(0, 5), st.just(math.nan)), min_size=1, max_size=4).map(tuple),
    max_size=3,
).map(tuple)
dtypes = st.sampled_from(
    ["?", "i1", ">u4", "f2", "f8", "c16", "M8[ns]", "m8[s]", "S3", "U2", "O", "i4,f8"]
).map(np.dtype)


@settings(max_examples=60, deadline=None)
@given(chunks=axes, dtype=dtypes, attempts=st.booleans())
def test_arrays_of_all_chunks_and_types_are_described(
    chunks: tuple[Any, ...], dtype: Any, attempts: bool
) -> None:
    x = da.Array({}, "x", chunks, dtype=dtype)
    record = record_of()
    references = references_of(record, math.prod(map(len, chunks)), attempts)
    y = round_trip(x, references, record)
    assert str(y.chunks) == str(x.chunks)
    assert y.dtype == x.dtype
    assert y._meta.shape == x._meta.shape
    assert stored_in(y) == [each.name for each in references]


sorted_values = st.one_of(
    st.lists(st.integers(-9, 9), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.floats(-9, 9), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.text("abc", max_size=3), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.integers(0, 99), min_size=2, max_size=6, unique=True).map(
        lambda days: [pd.Timestamp("2024-01-01") + pd.Timedelta(days=d) for d in sorted(days)]
    ),
    st.integers(2, 6).map(lambda count: [None] * count),
)


@settings(max_examples=60, deadline=None)
@given(divisions=sorted_values, series=st.booleans())
def test_frames_of_all_divisions_are_described(divisions: list[Any], series: bool) -> None:
    dtypes = {"a": "f8", "b": "category", "c": "datetime64[ns]", "d": "string"}
    meta: Any = pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in dtypes.items()})
    meta = meta["b"] if series else meta
    keys = [("f", number) for number in range(len(divisions) - 1)]
    x = dd.from_graph(dict.fromkeys(keys, 0), meta, tuple(divisions), keys, "f")
    record = record_of()
    references = references_of(record, len(keys))
    y = round_trip(x, references, record)
    assert y.divisions == x.divisions
    assert type(y) is type(x)
    assert str(y.dtypes) == str(x.dtypes)
    graph = dict(y.__dask_graph__())
    loads = [graph[graph[key].target].args[0].name for key in y.__dask_keys__()]
    assert loads == [each.name for each in references]


def test_a_hundred_thousand_blocks_are_described_in_a_few_megabytes() -> None:
    record = record_of()
    x = da.Array({}, "x", ((1,) * 1000, (1,) * 100), dtype="f8")
    references = references_of(record, 100_000)
    value = Description.of(x)[0].to_value(record, references)
    assert len(codec.dumps(value, record.secret, "name")) < 5e6
    assert round_trip(x, references, record).npartitions == 100_000


def test_collections_of_one_description_have_keys_of_their_own() -> None:
    record = record_of()
    x = [da.Array({}, "x", ((2, 2),), dtype="f8")] * 2
    a, b = round_trip(x, references_of(record, 4), record)
    assert a.name != b.name
    assert len({*stored_in(a), *stored_in(b)}) == 4


def test_other_versions_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    record = record_of()
    description, _ = Description.of(da.Array({}, "x", ((2,),), dtype="f8"))
    references = references_of(record, 1)
    value = description.to_value(record, references)
    description.rebuild(record, references, {**versions(), "dask": "1.0"})
    assert not caplog.text
    description.rebuild(record, references, {**versions(), "numpy": "0.5.1"})
    assert "'x' was saved with numpy 0.5.1 (here " in caplog.text
    broken = replace(description, forms=(replace(description.forms[0], pickled=b"cnowhere\nX\n."),))
    with pytest.raises(VersionMismatchError, match=r"saved with python 2\.7 \(here "):
        broken.rebuild(record, references, {**versions(), "python": "2.7"})
    with pytest.raises(VersionMismatchError, match="was saved in format 99"):
        Description.from_value(record, {**value, "format": 99})
