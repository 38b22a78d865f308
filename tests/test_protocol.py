"""What travels: requests, names, references."""

from __future__ import annotations

import json
import pickle
import re
import threading

import pytest
from dask._task_spec import Task, TaskRef
from hypothesis import given, settings
from hypothesis import strategies as st

from lambda_worker import protocol
from lambda_worker.errors import RequestError
from lambda_worker.protocol import (
    Body,
    GroupRequest,
    Modules,
    Reference,
    Request,
    Value,
    collect_references,
    key_label,
    load_reference,
    object_name,
    run_of,
    shards,
)

NAMES = st.text(min_size=1, max_size=20)
VALUES = st.builds(
    Value,
    NAMES,
    st.integers(0, protocol.MAX_OBJECT_BYTES),
    st.none() | st.binary(max_size=50),
    st.booleans(),
)
GROUPS = st.builds(
    GroupRequest,
    VALUES,
    st.lists(VALUES, max_size=3),
    st.lists(NAMES, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 9), VALUES), max_size=2),
    st.booleans(),
)
REQUESTS = st.builds(
    Request,
    st.just("run"),
    st.dictionaries(NAMES, st.binary(min_size=32, max_size=32), max_size=3).map(
        lambda secrets: {**secrets, "run": bytes(32)}
    ),
    NAMES,
    st.integers(0, 4_000_000),
    st.lists(GROUPS, max_size=3) | VALUES,
    st.sampled_from(["none", "zstd"]),
    NAMES | st.just(""),
    st.booleans(),
    st.none() | st.builds(Modules, NAMES, VALUES),
    st.dictionaries(NAMES, NAMES, max_size=3),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(REQUESTS)
def test_a_request_comes_out_of_json_as_it_went_in(request):
    event = json.loads(json.dumps(request.to_json()))
    assert Request.from_json(event) == request
    assert event["protocol"] == protocol.PROTOCOL
    assert event["client"] == protocol.versions()


@pytest.mark.parametrize(
    "modules", [5, "text", {}, {"digest": 5, "archive": {"name": "n", "size": 1}}, {"digest": "d"}]
)
def test_modules_that_make_no_sense_are_refused(modules):
    event = Request("run", {"run": bytes(32)}, "bucket", 0, []).to_json()
    Request.from_json(event)
    with pytest.raises(RequestError, match="the modules"):
        Request.from_json({**event, "modules": modules})


def test_a_value_that_is_in_s3_carries_no_bytes():
    assert Value("n", 5).to_json() == {"name": "n", "size": 5}
    assert "data" in Value("n", 0, b"").to_json()


def test_inline_bytes_fit_into_lambdas_payload_with_their_base64_and_more():
    assert protocol.MAX_INLINE_TOTAL_BYTES * 4 / 3 < 0.95 * protocol.MAX_PAYLOAD_BYTES


def test_a_body_survives_pickling():
    body = Body([Task("y", abs, TaskRef("x"))], ["x"], [0], ["y"])
    again = Body(*pickle.loads(pickle.dumps(body.fields())))
    assert again.tasks[0]({"x": -1}) == 1
    assert (again.inputs, again.sources, again.outputs) == (["x"], [0], ["y"])


# -- names ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(min_size=1, max_size=50).filter(lambda label: "/" not in label))
def test_an_object_is_named_by_shard_prefix_run_and_label(label):
    name = object_name("a/b", "run", label)
    shard, rest = name.split("/", 1)
    assert shard in shards()
    assert rest == f"a/b/run/{label}"
    assert run_of(name) == "run"
    assert name == object_name("a/b", "run", label)


def test_the_objects_of_a_run_spread_over_all_shards():
    assert len(shards()) == len(set(shards())) == 16
    used = {object_name("p", "r", key_label(("x", i))).split("/")[0] for i in range(500)}
    assert used == set(shards())


@pytest.mark.parametrize("key", ["x", ("x", 0), b"x", 1.5, "ü" * 10_000, "a/../b\0", "\udc80"])
def test_any_key_gives_a_short_label_of_harmless_characters(key):
    assert re.fullmatch("[0-9a-f]{32}", key_label(key))


def test_keys_that_differ_have_labels_that_differ():
    keys = ["x", ("x",), b"x", ("x", 0), ("x", "0"), "('x', 0)", 0, "0", ("x", (0,)), ("x", 1)]
    assert len({key_label(key) for key in keys}) == len(keys)


def test_an_error_is_bound_to_another_name_than_the_output():
    name = object_name("p", "run", "label")
    assert protocol.error_name(name) != name
    assert run_of(protocol.error_name(name)) == "run"


# -- versions ------------------------------------------------------------------------------------


def test_the_versions_are_those_of_this_interpreter():
    import sys

    import dask

    assert protocol.versions() == {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "dask": dask.__version__,
    }


# -- references ----------------------------------------------------------------------------------


def test_references_are_gathered_while_they_are_pickled():
    a, b = Reference("0/p/r/a", 1), Reference("0/p/s/b", 2)
    with collect_references() as found:
        data = pickle.dumps({"x": [a, {"y": b}]})
    assert found == [a, b]
    loaded = pickle.loads(data)["x"][0]
    assert (loaded.name, loaded.size) == ("0/p/r/a", 1)


def test_references_are_not_gathered_outside():
    with collect_references() as found:
        pass
    pickle.dumps(Reference("0/p/r/a", 1))
    assert found == []


def test_gathering_nests():
    a, b, c = (Reference(f"0/p/r/{label}", 1) for label in "abc")
    with collect_references() as outer:
        pickle.dumps(a)
        with collect_references() as inner:
            pickle.dumps(b)
        pickle.dumps(c)
    assert (outer, inner) == ([a, c], [b])


def test_gathering_ends_with_an_exception_too():
    with pytest.raises(ZeroDivisionError), collect_references():
        raise ZeroDivisionError
    with collect_references() as found:
        pickle.dumps(Reference("0/p/r/a", 1))
    assert len(found) == 1


def test_each_thread_gathers_its_own():
    with collect_references() as found:
        thread = threading.Thread(target=pickle.dumps, args=(Reference("0/p/r/a", 1),))
        thread.start()
        thread.join()
    assert found == []


def test_a_reference_carries_no_secret():
    assert pickle.loads(pickle.dumps(Reference("0/p/r/a", 7))).__reduce__()[1] == ("0/p/r/a", 7)


def test_a_reference_is_loaded_by_whoever_knows_its_run(monkeypatch):
    monkeypatch.setitem(protocol.resolvers, "r", lambda reference: ("loaded", reference.name))
    assert load_reference(Reference("0/p/r/a", 1)) == ("loaded", "0/p/r/a")


def test_a_reference_of_an_unknown_run_says_what_to_do():
    with pytest.raises(LookupError, match="persist again"):
        load_reference(Reference("0/p/nobody/a", 1))
