"""The Lambda function, called in this process with events as Lambda would."""

from __future__ import annotations

import json
import pickle
import threading
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import obstore
import pytest
from dask._task_spec import Task, TaskRef
from obstore.store import MemoryStore

from lambda_worker import codec, handler, lease, protocol
from lambda_worker.errors import StoreError
from lambda_worker.protocol import Body, GroupRequest, Reference, Request, Value, load_reference
from lambda_worker.store import Store

RUN, SECRET = "run", b"s" * 32
OTHER_RUN, OTHER_SECRET = "other", b"o" * 32
CONTEXT = SimpleNamespace(memory_limit_in_mb="1769", aws_request_id="41d0")


def name_of(label: str, run: str = RUN) -> str:
    return protocol.object_name("prefix", run, label)


@dataclass
class Client:
    """Builds requests by hand and reads replies, sharing a bucket with the worker."""

    store: Store
    inline_bytes: int = 100_000
    secrets: dict[str, bytes] = field(default_factory=lambda: {RUN: SECRET})

    def put(self, label: str, value: Any, run: str = RUN, secret: bytes = SECRET) -> Value:
        """Store an object; the value that refers to it."""
        name = name_of(label, run)
        data = codec.dumps(value, secret, name)
        self.store.put_new(name, data)
        return Value(name, len(data))

    def inline(self, label: str, value: Any) -> Value:
        name = name_of(label)
        data = codec.dumps(value, SECRET, name)
        return Value(name, len(data), data)

    def group(self, *tasks: Task, outputs: Any = None, inputs: Any = None) -> GroupRequest:
        """A group of tasks; by default its last one's value is its output."""
        inputs = inputs or {}
        outputs = [tasks[-1].key] if outputs is None else outputs
        body = Body(list(tasks), list(inputs), list(range(len(inputs))), outputs)
        return GroupRequest(
            self.inline(f"body-{tasks[0].key}", body.fields()),
            list(inputs.values()),
            [name_of(str(key)) for key in outputs],
        )

    def event(self, *groups: GroupRequest) -> dict[str, Any]:
        request = Request(RUN, self.secrets, "bucket", self.inline_bytes, list(groups))
        return json.loads(json.dumps(request.to_json()))

    def call(self, *groups: GroupRequest) -> list[dict[str, Any]]:
        """Invoke the function; what it says of each group."""
        return json.loads(json.dumps(handler.handler(self.event(*groups), CONTEXT)))["groups"]

    def run(self, *tasks: Task, inputs: Any = None) -> dict[str, Any]:
        (said,) = self.call(self.group(*tasks, inputs=inputs))
        return said

    def load(self, record: dict[str, Any]) -> Any:
        value = Value.from_json(record)
        data = value.data
        if data is None:
            data = self.store.get(value.name, value.size)
        assert len(data) == value.size
        return codec.loads(data, SECRET, value.name)

    def result(self, *tasks: Task, inputs: Any = None) -> Any:
        return self.load(self.run(*tasks, inputs=inputs)["outputs"][0])

    def objects(self) -> set[str]:
        return {e["path"] for page in obstore.list(self.store.bucket) for e in page}


@pytest.fixture
def client(monkeypatch):
    """A client of a new execution environment whose S3 is in memory."""
    bucket = MemoryStore()
    environment = handler.Environment()
    environment._stores["bucket"] = Store(bucket)
    monkeypatch.setattr(handler, "environment", environment)
    monkeypatch.setattr(protocol, "resolvers", {})
    yield Client(Store(bucket))
    environment.fetching.shutdown()
    environment.uploading.shutdown()


def inc(x):
    return x + 1


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


# -- what goes wrong in a task -------------------------------------------------------------------


def exception_of(record: dict[str, Any]) -> BaseException:
    value = Value.from_json(record["exception"])
    return codec.loads(value.data, SECRET, value.name)


def test_a_tasks_exception_comes_back_as_itself_with_its_key_and_traceback(client):
    def reciprocal(x):
        return 1 / x

    error = client.run(Task(("y", 3), reciprocal, 0))["error"]
    assert error["kind"] == "exception"
    assert error["type"] == "builtins.ZeroDivisionError"
    assert error["message"] == "ZeroDivisionError: division by zero"
    assert error["key"] == "('y', 3)"
    exception = exception_of(error)
    assert type(exception) is ZeroDivisionError
    assert exception.__traceback__ is None
    assert "in reciprocal" in error["traceback"]


def test_the_traceback_begins_outside_of_the_worker(client):
    traceback = client.run(Task("y", inc, "text"))["error"]["traceback"]
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert "lambda_worker/execute.py" not in traceback
    assert "in inc" in traceback


def test_the_cause_of_an_exception_is_in_the_traceback(client):
    def fail():
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    error = client.run(Task("y", fail))["error"]
    assert "KeyError: 'inner'" in error["traceback"]
    assert "direct cause" in error["traceback"]
    assert str(exception_of(error)) == "outer"


def test_in_a_group_of_several_tasks_the_one_that_failed_is_named(client):
    tasks = [Task("a", inc, 1), Task("b", inc, None), Task("c", inc, TaskRef("b"))]
    assert client.run(*tasks)["error"]["key"] == "'b'"


def test_an_exception_that_cannot_be_pickled_is_told_in_words(client):
    class Locked(Exception):
        def __init__(self, text):
            super().__init__(text)
            self.lock = threading.Lock()

    def fail():
        raise Locked("no")

    error = client.run(Task("y", fail))["error"]
    assert "exception" not in error
    assert error["message"] == "Locked: no"
    assert "lock" in error["unpicklable"]


def test_an_exception_that_cannot_be_unpickled_is_told_in_words(client):
    class Odd(Exception):
        def __reduce__(self):
            return _fail_to_load, ()

    def fail():
        raise Odd("no")

    error = client.run(Task("y", fail))["error"]
    assert "exception" not in error
    assert error["message"] == "Odd: no"
    assert error["unpicklable"] == "OSError: not here"


def test_an_exception_whose_text_fails_is_told_by_its_type(client):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    def fail():
        raise Mute

    assert client.run(Task("y", fail))["error"]["message"] == "Mute"


@pytest.mark.parametrize("exit_", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_exit_of_a_task_does_not_end_the_worker(client, exit_):
    def leave():
        raise exit_

    error = client.run(Task("y", leave))["error"]
    assert error["kind"] == "exception"
    assert type(exception_of(error)) is type(exit_)
    assert client.result(Task("z", inc, 1)) == 2


def test_a_huge_exception_is_cut_so_that_the_reply_fits(client):
    def fail():
        raise ValueError("x" * 3_000_000)

    said = client.run(Task("y", fail))
    assert len(json.dumps(said)) < 200_000
    assert said["error"]["message"].startswith("ValueError: xxx")


def test_a_missing_module_is_named(client):
    def load():
        import package_that_nobody_has  # noqa: F401

    assert client.run(Task("y", load))["error"]["module"] == "package_that_nobody_has"


class OfNoModule:
    def __reduce__(self):
        return __import__, ("package_that_nobody_has",)


def test_it_is_told_whether_a_module_was_missed_before_the_task_could_begin(client):
    def load():
        import package_that_nobody_has  # noqa: F401

    stored = client.put("stored", OfNoModule())
    reference = Reference(stored.name, stored.size)
    told = [
        client.run(Task("y", load)),
        client.run(Task("y", inc, OfNoModule())),
        client.run(Task("y", inc, TaskRef("x")), inputs={"x": client.inline("x", OfNoModule())}),
        client.run(Task("y", load_reference, reference)),
    ]
    assert [said["error"]["loading"] for said in told] == [False, True, True, True]


class FailsToLoad:
    def __reduce__(self):
        return _fail_to_load, ()


def _fail_to_load():
    raise OSError("not here")


def test_a_task_that_fails_to_unpickle_is_told_as_such(client):
    error = client.run(Task("y", inc, FailsToLoad()))["error"]
    assert error["kind"] == "exception"
    assert error["message"] == "unpickling the task: OSError: not here"
    assert type(exception_of(error)) is OSError


def test_an_input_that_fails_to_unpickle_is_told_with_its_name(client):
    inputs = {"x": client.inline("x", FailsToLoad())}
    error = client.run(Task("y", inc, TaskRef("x")), inputs=inputs)["error"]
    assert error["message"] == "unpickling its input 'x': OSError: not here"
    assert error["key"] == "'y'"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: (i for i in range(3)), "generator"),
        (threading.Lock, "lock"),
        (lambda: [1, (i for i in "ab")], "list"),
    ],
)
def test_a_result_that_cannot_be_pickled_is_told_with_its_type_and_key(client, make, kind):
    error = client.run(Task("y", make))["error"]
    assert error["kind"] == "unserializable"
    assert f"a {kind}, cannot be pickled" in error["message"]
    assert error["key"] == "'y'"
    assert client.objects() == set()


def test_a_result_whose_pickling_raises_something_odd_is_told_too(client):
    class Stubborn:
        def __reduce__(self):
            raise ZeroDivisionError("never")

    error = client.run(Task("y", Stubborn))["error"]
    assert error["kind"] == "unserializable"
    assert "ZeroDivisionError: never" in error["message"]


# -- the lease -----------------------------------------------------------------------------------


@pytest.fixture
def leased(client, monkeypatch):
    """``leased(groups, ...)``: call with a lease that is looked for before each task."""
    monkeypatch.setattr(lease, "AFTER", 0.0)
    monkeypatch.setattr(lease, "EVERY", 0.0)
    monkeypatch.setattr(lease, "WAIT", 20.0)
    name = name_of("lease")

    def call(*groups: GroupRequest, there: bool, said: bool) -> list[dict[str, Any]]:
        if there:
            client.store.put_new(name, b"lease")
        request = Request(RUN, client.secrets, "bucket", 0, list(groups), lease=name, leased=said)
        return handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)["groups"]

    yield call
    handler.environment.looking.shutdown()


def end_the_run(name: str, *read: Any) -> None:
    obstore.delete(handler.environment.store("bucket").bucket, name)


def three_steps(client: Client, second: Any, *arguments: Any) -> GroupRequest:
    """A group of three tasks; the first and the last one are outputs."""
    return client.group(
        Task("a", inc, 1),
        Task("b", second, *arguments, TaskRef("a")),
        Task("c", str, TaskRef("b")),
        outputs=["a", "c"],
    )


def test_when_the_lease_is_gone_the_worker_stops_before_the_next_task(client, leased, capsys):
    group = three_steps(client, end_the_run, name_of("lease"))
    first, second = leased(group, client.group(Task("d", inc, 1)), there=True, said=False)
    assert first["error"]["kind"] == second["error"]["kind"] == "cancelled"
    assert name_of("lease") in first["error"]["message"]
    assert set(first["left"]) == client.objects() == {name_of("a")}
    assert json.loads(capsys.readouterr().err)["cancelled"] is True


def test_a_lease_that_was_said_to_be_there_and_is_not_is_gone(client, leased):
    (said,) = leased(three_steps(client, inc), there=False, said=True)
    assert said["error"]["kind"] == "cancelled"
    assert client.objects() == set()


@pytest.mark.parametrize("there", [False, True])
def test_a_lease_that_is_there_or_may_yet_come_stops_nobody(client, leased, there):
    (said,) = leased(three_steps(client, inc), there=there, said=there)
    assert len(said["outputs"]) == 2


def test_a_lease_that_does_not_come_in_time_was_deleted_before(client, leased, monkeypatch):
    monkeypatch.setattr(lease, "LATE", 0.0)
    (said,) = leased(three_steps(client, inc), there=False, said=False)
    assert said["error"]["kind"] == "cancelled"


def test_an_answer_is_as_old_as_the_question(monkeypatch):
    """A task takes long while S3 answers: the client may have written the lease meanwhile."""
    clock, looks = [0.0], []

    class Pool(Executor):
        def submit(self, *work):
            looks.append(Future())
            return looks[-1]

    monkeypatch.setattr(lease, "WAIT", 0.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch = lease.LeaseWatch(lambda: True, False, Pool())
    clock[0] = lease.AFTER
    assert not watch.gone()
    clock[0] = lease.LATE + 1
    looks.pop().set_result(False)
    assert not watch.gone()
    clock[0] += lease.EVERY
    watch.gone()
    looks.pop().set_result(False)
    assert watch.gone()


def test_a_look_is_counted(client, leased):
    leased(client.group(Task("a", inc, 1)), there=True, said=True)
    request = Request(RUN, client.secrets, "bucket", 0, [], lease=name_of("lease"), leased=True)
    request.groups = [client.group(Task("b", inc, 1))]
    reply = handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)
    assert reply["s3"]["gets"] == 2  # before the group and before its task


def test_while_s3_does_not_answer_nobody_is_stopped(client, leased, monkeypatch):
    def refuse(self, name):
        raise StoreError("transient", "s3:GetObject: no answer")

    monkeypatch.setattr(Store, "exists", refuse)
    (said,) = leased(three_steps(client, inc), there=False, said=True)
    assert len(said["outputs"]) == 2


def test_nobody_waits_for_an_answer_that_takes_long(client, leased, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(lease, "WAIT", 0.0)
    monkeypatch.setattr(Store, "exists", lambda self, name: not answer.wait(20))
    (said,) = leased(three_steps(client, inc), there=False, said=True)
    answer.set()
    assert len(said["outputs"]) == 2


def test_a_short_invocation_does_not_look(client):
    request = Request(RUN, client.secrets, "bucket", 0, [client.group(Task("a", inc, 1))])
    request.lease, request.leased = name_of("lease"), True
    reply = handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)
    assert len(reply["groups"][0]["outputs"]) == 1
    assert reply["s3"]["gets"] == 0


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        Task("y", np.ones, 2**55),  # numpy's own subclass
        Task("y", bytearray, 2**62),
    ],
)
def test_a_lack_of_memory_is_marked(client, task):
    error = client.run(task)["error"]
    assert error["memory"] is True
    assert error["kind"] == "exception"
    assert "MemoryError" in error["type"]


class Swelling:
    """A result that needs more memory to be packed than there is."""

    def __reduce__(self):
        raise MemoryError


def test_a_lack_of_memory_while_the_result_is_packed_is_marked(client):
    error = client.run(Task("y", Swelling))["error"]
    assert error["memory"] is True
    assert error["key"] == "'y'"
    assert "packing its result" in error["message"]


def test_other_errors_are_not_marked(client):
    assert "memory" not in client.run(Task("y", inc, "text"))["error"]
