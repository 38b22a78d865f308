"""The Lambda function, called in this process with events as Lambda would."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from lambda_worker import codec, handler, protocol
from lambda_worker.protocol import Body, Reference, Request, Value, load_reference
from tests.handler_client import CONTEXT, OTHER_RUN, OTHER_SECRET, RUN, SECRET, client, inc, name_of

__all__ = ["client"]


# -- running -------------------------------------------------------------------------------------


def test_a_task_runs_and_its_value_comes_back(client):
    assert client.result(Task("y", inc, 41)) == 42


def test_inputs_come_inline_or_from_s3(client):
    inputs = {"a": client.inline("a", [1]), "b": client.put("b", [2])}
    assert client.result(
        Task("y", lambda a, b: a + b, TaskRef("a"), TaskRef("b")), inputs=inputs
    ) == [1, 2]


def test_several_groups_succeed_and_fail_each_by_itself(client):
    said = client.call(
        client.group(Task("a", inc, 1)),
        client.group(Task("b", inc, "text")),
        client.group(Task("c", inc, 2)),
    )
    assert client.load(said[0]["outputs"][0]) == 2
    assert said[1]["error"]["type"] == "builtins.TypeError"
    assert client.load(said[2]["outputs"][0]) == 3


def test_a_group_of_several_tasks_commits_only_its_outputs_in_their_order(client):
    client.inline_bytes = 0
    tasks = [Task("a", inc, 0), Task("b", inc, TaskRef("a")), Task("c", inc, TaskRef("b"))]
    (said,) = client.call(client.group(*tasks, outputs=["c", "a"]))
    assert [client.load(record) for record in said["outputs"]] == [3, 1]
    assert client.objects() == {name_of("a"), name_of("c")}


def test_an_input_under_two_names_is_sent_once(client):
    tasks = [Task("y", lambda a, b: a + b, TaskRef("a"), TaskRef("b"))]
    group = client.group(*tasks, inputs={"a": client.put("x", 21)})
    group.body = client.inline("body-y", Body(tasks, ["a", "b"], [0, 0], ["y"]).fields())
    (said,) = client.call(group)
    assert client.load(said["outputs"][0]) == 42


def test_buffers_of_a_task_that_travel_as_objects_are_put_back_in_their_places(client):
    arrays = [np.full(2000, i, np.uint8) for i in range(3)]
    task = Task("y", lambda *a: [int(x[0]) for x in a], *arrays)
    group = client.group(task)
    frames = codec.serialize(Body([task], [], [], ["y"]).fields())
    assert len(frames) == 4
    uploads = []
    for place in (3, 1):
        name = name_of(f"frame-{place}")
        data = codec.seal([frames.pop(place)], SECRET, name)
        client.store.put_new(name, data)
        uploads.append((place, Value(name, len(data), shared=True)))
    sealed = codec.seal(frames, SECRET, name_of("body-y"))
    group.body = Value(name_of("body-y"), len(sealed), sealed)
    group.frames = uploads[::-1]
    (said,) = client.call(group)
    assert client.load(said["outputs"][0]) == [0, 1, 2]


def test_a_request_whose_groups_are_in_s3_is_served(client):
    groups = [client.group(Task("a", inc, 1)), client.group(Task("b", inc, 2))]
    listing = client.put("groups", json.dumps([g.to_json() for g in groups]).encode())
    request = Request(RUN, client.secrets, "bucket", 1000, listing)
    reply = handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)
    assert [client.load(said["outputs"][0]) for said in reply["groups"]] == [2, 3]


def test_a_task_may_change_its_inputs_without_changing_them_for_others(client):
    def fill(x):
        x[:] = 7
        return int(x.sum())

    shared = client.put("x", np.zeros(1000))
    shared.shared = True
    for key in "abc":
        task = Task(key, fill, TaskRef("x"))
        assert client.result(task, inputs={"x": shared}) == 7000
    assert client.result(Task("d", np.sum, TaskRef("x")), inputs={"x": shared}) == 0


# -- the reply -----------------------------------------------------------------------------------


def test_only_the_first_call_of_an_environment_is_cold(client):
    event = client.event(client.group(Task("a", inc, 1)))
    assert handler.handler(event, CONTEXT)["cold"] is True
    assert handler.handler(event, CONTEXT)["cold"] is False


def test_the_reply_counts_what_this_call_did_to_s3(client):
    client.inline_bytes = 0
    event = client.event(
        client.group(Task("y", inc, TaskRef("x")), inputs={"x": client.put("x", 1)})
    )
    counts = handler.handler(event, CONTEXT)["s3"]
    assert (counts["gets"], counts["puts"], counts["lists"], counts["deletes"]) == (1, 1, 0, 0)
    assert counts["bytes_read"] > 0
    assert counts["bytes_written"] > 0
    counts = handler.handler(client.event(client.group(Task("z", inc, 1))), CONTEXT)["s3"]
    assert (counts["gets"], counts["puts"]) == (0, 1)


def test_the_reply_tells_time_and_memory(client):
    reply = handler.handler(client.event(client.group(Task("a", inc, 1))), CONTEXT)
    assert reply["memory_mb"] == 1769
    assert reply["peak_memory"] > 2**20
    assert 0 <= reply["groups"][0]["seconds"] * 1e3 <= reply["milliseconds"]


def test_one_line_of_json_is_logged_for_each_call(client, capsys):
    client.call(client.group(Task("a", inc, 1)), client.group(Task("b", inc, None)))
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    record = json.loads(line)
    assert (record["run"], record["request"], record["groups"], record["errors"]) == (
        RUN,
        "41d0",
        2,
        1,
    )
    assert captured.out == ""  # MiniStack keeps file descriptor 1 for itself
    assert SECRET.hex() not in line


# -- where results go ----------------------------------------------------------------------------


def test_small_results_come_inline_and_touch_no_bucket(client):
    record = client.run(Task("y", inc, 1))["outputs"][0]
    assert "data" in record
    assert client.objects() == set()


def test_large_results_go_to_the_bucket(client):
    client.inline_bytes = 1000
    record = client.run(Task("y", bytes, 1001))["outputs"][0]
    assert "data" not in record
    assert client.objects() == {name_of("y")}
    assert client.load(record) == bytes(1001)


def test_with_no_inline_bytes_everything_goes_to_the_bucket(client):
    client.inline_bytes = 0
    assert "data" not in client.run(Task("y", inc, 1))["outputs"][0]
    assert client.objects() == {name_of("y")}


def test_inline_results_together_stay_below_what_a_reply_may_hold(client):
    client.inline_bytes = 4_000_000
    groups = [client.group(Task(f"y{i}", bytes, 1_500_000)) for i in range(4)]
    said = client.call(*groups)
    inline = ["data" in s["outputs"][0] for s in said]
    assert inline == [True, True, False, False]
    assert len(json.dumps(said)) < protocol.MAX_PAYLOAD_BYTES
    assert all(client.load(s["outputs"][0]) == bytes(1_500_000) for s in said)


def test_the_first_commit_wins_and_its_size_is_told(client):
    client.inline_bytes = 0
    first = client.run(Task("y", bytes, 5000))["outputs"][0]
    second = client.run(Task("y", bytes, 9000))["outputs"][0]
    assert second == first
    assert client.load(second) == bytes(5000)


# -- the cache -----------------------------------------------------------------------------------


def test_a_shared_input_is_fetched_once_for_all_calls(client):
    shared = client.put("x", np.arange(1000))
    shared.shared = True
    gets, hits = [], []
    for key in "abc":
        group = client.group(Task(key, np.sum, TaskRef("x")), inputs={"x": shared})
        reply = handler.handler(client.event(group), CONTEXT)
        gets.append(reply["s3"]["gets"])
        hits.append(reply["cache_hits"])
    assert gets == [1, 0, 0]
    assert hits == [0, 1, 1]


def test_an_input_with_one_reader_is_not_cached(client):
    x = client.put("x", 1)
    client.run(Task("y", inc, TaskRef("x")), inputs={"x": x})
    assert len(handler.environment.cache) == 0


def test_an_object_that_was_written_anew_in_another_session_is_not_taken_from_the_cache(client):
    """What is resumed may have dropped an object that two attempts make differently."""
    for session in ("lease-1", "lease-2"):
        stored = client.put("x", session)
        stored.shared = True
        event = client.event(client.group(Task("y", str, TaskRef("x")), inputs={"x": stored}))
        event["lease"] = [name_of(session), False]
        (record,) = handler.handler(event, CONTEXT)["groups"]
        assert client.load(record["outputs"][0]) == session
        client.store.delete(stored.name)


def test_a_cached_object_is_verified_for_each_reader(client):
    stored = client.put("x", 41, OTHER_RUN, OTHER_SECRET)
    stored.shared = True
    client.secrets[OTHER_RUN] = OTHER_SECRET
    assert client.result(Task("y", inc, TaskRef("x")), inputs={"x": stored}) == 42
    assert len(handler.environment.cache) == 1
    client.secrets[OTHER_RUN] = b"guessed" * 5
    error = client.run(Task("y", inc, TaskRef("x")), inputs={"x": stored})["error"]
    assert error["kind"] == "integrity"


# -- stored results of other runs ----------------------------------------------------------------


def test_a_task_may_load_stored_results_of_runs_whose_secrets_are_named(client):
    stored = client.put("x", 41, OTHER_RUN, OTHER_SECRET)
    load = Task("x", load_reference, Reference(stored.name, stored.size))
    client.secrets[OTHER_RUN] = OTHER_SECRET
    assert client.result(load, Task("y", inc, TaskRef("x"))) == 42


def test_without_its_secret_a_stored_result_is_not_loaded(client):
    stored = client.put("x", 41, OTHER_RUN, OTHER_SECRET)
    error = client.run(Task("y", inc, TaskRef("x")), inputs={"x": stored})["error"]
    assert error["kind"] == "integrity"
    assert OTHER_RUN in error["message"]
    load = Task("x", load_reference, Reference(stored.name, stored.size))
    assert client.run(load)["error"]["type"] == "builtins.LookupError"


# -- refused before anything is unpickled --------------------------------------------------------


class Trap:
    """Its unpickling leaves a trace."""

    def __reduce__(self):
        return _spring, ()


def _spring():
    handler.environment.sprung = True


@pytest.fixture
def no_unpickling(client):
    yield
    assert not hasattr(handler.environment, "sprung")


def forged(label: str) -> Value:
    """A pickle under the name of an object, without the run's tag."""
    data = bytes(32) + codec.dumps(Trap(), b"wrong", name_of(label))[32:]
    return Value(name_of(label), len(data), data)


def test_the_trap_works(client):
    pickle.loads(pickle.dumps(Trap()))
    assert handler.environment.sprung


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": 999},
        {"protocol": None},
        {"client": {"python": "3.7", "dask": "2026.8.0"}},
        {"client": {**protocol.versions(), "dask": "1.0"}},
        {"client": {}},
        {"groups": "another format", "protocol": protocol.PROTOCOL + 1},
    ],
)
def test_a_client_with_other_versions_is_refused_and_told_ours(client, changes):
    group = client.group(Task("y", inc, 1))
    group.body = client.inline("body-y", Trap())
    reply = handler.handler({**client.event(group), **changes}, CONTEXT)
    assert reply["refused"] == {"protocol": protocol.PROTOCOL, **protocol.versions()}
    assert "groups" not in reply
    json.dumps(reply)


@pytest.mark.usefixtures("no_unpickling")
def test_an_event_that_is_not_a_request_is_refused(client):
    assert "refused" in handler.handler({}, CONTEXT)
    assert "refused" in handler.handler({"Records": []}, CONTEXT)


@pytest.mark.usefixtures("no_unpickling")
def test_a_forged_body_is_not_unpickled(client):
    group = client.group(Task("y", inc, 1))
    group.body = forged("body-y")
    (said,) = client.call(group)
    assert said["error"]["kind"] == "integrity"
    assert name_of("body-y") in said["error"]["message"]


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("inline", [True, False])
def test_a_forged_input_is_not_unpickled(client, inline):
    value = forged("x")
    if not inline:
        client.store.put_new(value.name, value.data)
        value.data = None
    error = client.run(Task("y", inc, TaskRef("x")), inputs={"x": value})["error"]
    assert error["kind"] == "integrity"


@pytest.mark.usefixtures("no_unpickling")
def test_a_genuine_object_under_another_name_is_not_unpickled(client):
    genuine = client.inline("a", Trap())
    moved = Value(name_of("b"), genuine.size, genuine.data)
    error = client.run(Task("y", inc, TaskRef("x")), inputs={"x": moved})["error"]
    assert error["kind"] == "integrity"


@pytest.mark.usefixtures("no_unpickling")
def test_a_list_of_groups_that_cannot_be_read_is_told_and_does_not_end_the_worker(client):
    value = forged("groups")
    client.store.put_new(value.name, value.data)
    for listing, kind in [
        (Value(value.name, value.size), "integrity"),
        (Value(name_of("gone"), 100), "store-missing"),
    ]:
        request = Request(RUN, client.secrets, "bucket", 1000, listing)
        reply = handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)
        assert reply["error"]["kind"] == kind
        assert "groups" not in reply


def test_an_input_that_is_gone_is_told_with_its_name(client):
    gone = Value(name_of("gone"), 100)
    error = client.run(Task("y", inc, TaskRef("x")), inputs={"x": gone})["error"]
    assert error["kind"] == "store-missing"
    assert name_of("gone") in error["message"]
    assert "s3:GetObject" in error["message"]


def test_one_of_many_inputs_that_is_gone_fails_its_group_only(client):
    inputs = {f"x{i}": client.put(f"x{i}", i) for i in range(20)}
    refs = [TaskRef(key) for key in inputs]
    bad = {**inputs, "x7": Value(name_of("gone"), 100)}
    said = client.call(
        client.group(Task("a", lambda *x: sum(x), *refs), inputs=bad),
        client.group(Task("b", lambda *x: sum(x), *refs), inputs=inputs),
    )
    assert said[0]["error"]["kind"] == "store-missing"
    assert client.load(said[1]["outputs"][0]) == 190
