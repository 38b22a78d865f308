"""The proxy of the fault tests does what it says, seen from both of its sides."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from lambda_worker.protocol import key_label, object_name
from tests.faults.plans import BOUNDS, INTENSITIES, MENUS, Dealer, Faults, draw
from tests.faults.proxy import (
    EXPIRED,
    REASONS,
    Action,
    Answer,
    Corrupt,
    Damage,
    Delay,
    Duplicate,
    Proxy,
    Request,
    Reset,
    Stall,
    Strike,
    Truncate,
    out_of_memory,
    throttle,
)
from tests.helpers import eventually

BODY = bytes(range(256)) * 40
INVOKE = "/2015-03-31/functions/f/invocations"


class Upstream(ThreadingHTTPServer):
    """A server that notes what it gets; it answers when it may."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[tuple[str, str, bytes]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.got.append((self.command, self.path, body))
        number = len(self.server.got)
        assert self.server.may_answer.wait(20)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("X-Number", str(number))
        self.send_header("X-Said", self.headers.get("X-Say", ""))
        self.end_headers()
        self.wfile.write(BODY)

    do_GET = do_PUT = do_POST = _serve

    def log_message(self, *arguments: Any) -> None:
        return


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[Proxy]:
    with Proxy(upstream.url) as running:
        yield running


def ask(
    proxy: Proxy, method: str = "GET", path: str = "/bucket/x", body: Any = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=20)
    try:
        connection.request(method, path, body, {"X-Say": "hello"})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def event(*outputs: str) -> bytes:
    return json.dumps({"run": "r", "groups": [{"outputs": list(outputs)}]}).encode()


# -- what happens to a request -------------------------------------------------------------------


def test_without_a_plan_requests_and_answers_pass_unchanged(
    proxy: Proxy, upstream: Upstream
) -> None:
    path = "/bucket/0/a%2Fb/%7E?list-type=2&prefix=a%2Bb"
    answer, body = ask(proxy, "PUT", path, BODY)
    assert upstream.got == [("PUT", path, BODY)]
    assert answer.status == 200
    assert answer.headers["X-Said"] == "hello"
    assert body == BODY
    assert proxy.seen == {"put": 1}


def test_a_plan_says_it_for_one_kind_of_request_in_turn(proxy: Proxy, upstream: Upstream) -> None:
    proxy.plan(get=[throttle(), None, Answer(500)])
    assert [ask(proxy)[0].status for _ in range(4)] == [429, 200, 500, 200]
    assert ask(proxy, "PUT")[0].status == 200
    assert proxy.seen == {"get": 4, "put": 1}


@pytest.mark.parametrize("forwarded", [False, True])
def test_an_answer_in_place_of_awss_may_come_after_it_was_done(
    proxy: Proxy, upstream: Upstream, forwarded: bool
) -> None:
    proxy.plan(invoke=[out_of_memory(forwarded=forwarded)])
    answer, body = ask(proxy, "POST", INVOKE, event())
    assert answer.status == 200
    assert answer.headers["X-Amz-Function-Error"] == "Unhandled"
    assert json.loads(body)["errorType"] == "Runtime.OutOfMemory"
    assert len(upstream.got) == forwarded


@pytest.mark.parametrize("reason", REASONS)
def test_a_throttle_has_its_reason(proxy: Proxy, reason: str) -> None:
    proxy.plan(invoke=[throttle(reason)])
    answer, body = ask(proxy, "POST", INVOKE, event())
    assert answer.status == 429
    assert answer.headers["x-amzn-ErrorType"] == "TooManyRequestsException"
    assert json.loads(body)["Reason"] == reason


def test_expired_credentials_are_told_as_lambda_tells_them(proxy: Proxy) -> None:
    proxy.plan(invoke=[EXPIRED])
    answer, body = ask(proxy, "POST", INVOKE, event())
    assert answer.status == 403
    assert answer.headers["x-amzn-ErrorType"] == "ExpiredTokenException"
    assert "expired" in json.loads(body)["message"]


@pytest.mark.parametrize(
    ("action", "reached"),
    [
        (Reset(forwarded=False), 0),
        (Reset(forwarded=True), 1),
        (Stall(0.05, forwarded=False), 0),
        (Stall(0.05, forwarded=True), 1),
    ],
)
def test_a_connection_breaks_before_or_after_the_request_took_effect(
    proxy: Proxy, upstream: Upstream, action: Action, reached: int
) -> None:
    proxy.plan(put=[action])
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", body=BODY)
    assert len(upstream.got) == reached
    assert ask(proxy, "PUT", body=BODY)[1] == BODY


def test_what_was_given_up_goes_on_and_the_next_answer_waits_for_it(
    proxy: Proxy, upstream: Upstream
) -> None:
    proxy.plan(invoke=[Reset(forwarded=True, after=0.05)])
    upstream.may_answer.clear()
    with pytest.raises(ConnectionError):
        ask(proxy, "POST", INVOKE, event("0/p/r/x", "0/p/r/y"))
    assert eventually(lambda: len(upstream.got) == 1)
    assert proxy.in_flight == 1
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(ask, proxy, "POST", INVOKE, event("0/p/r/y"))
        assert eventually(lambda: len(upstream.got) == 2)  # at the same time
        assert proxy.peak == 2
        upstream.may_answer.set()
        assert again.result()[1] == BODY
    assert eventually(lambda: not proxy.in_flight)


def test_a_late_request_is_answered_rightly(proxy: Proxy, upstream: Upstream) -> None:
    proxy.plan(get=[Delay(0.01)])
    assert ask(proxy)[1] == BODY
    assert len(upstream.got) == 1


@pytest.mark.parametrize("second", [False, True])
def test_a_duplicate_runs_at_the_same_time(proxy: Proxy, upstream: Upstream, second: bool) -> None:
    proxy.plan(invoke=[Duplicate(second)])
    upstream.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, proxy, "POST", INVOKE, event("0/p/r/x"))
        assert eventually(lambda: len(upstream.got) == 2)
        upstream.may_answer.set()
        _, body = asked.result()
    assert body == BODY
    assert upstream.got[0] == upstream.got[1]
    assert proxy.seen["invoke"] == 1


def test_a_truncated_body_is_shorter_than_announced_or_not(proxy: Proxy) -> None:
    proxy.plan(get=[Truncate(0.5), Truncate(0.5, announced=False)])
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy)
    assert caught.value.partial == BODY[: len(BODY) // 2]
    answer, body = ask(proxy)
    assert body == BODY[: len(BODY) // 2]
    assert int(answer.headers["Content-Length"]) == len(body)


def test_a_byte_is_changed_on_the_way_or_for_good(proxy: Proxy, upstream: Upstream) -> None:
    proxy.plan(get=[Corrupt(1.0)], put=[Damage(0.0), Damage(0.25, cut=True)])
    _, body = ask(proxy)
    assert body[:-1] == BODY[:-1]
    assert body[-1] != BODY[-1]
    ask(proxy, "PUT", body=BODY)
    ask(proxy, "PUT", body=BODY)
    stored = [data for _, _, data in upstream.got[1:]]
    assert stored[0][1:] == BODY[1:]
    assert stored[0][0] != BODY[0]
    assert stored[1] == BODY[: len(BODY) // 4]


def test_the_worker_is_told_by_a_field_of_the_event(proxy: Proxy, upstream: Upstream) -> None:
    proxy.plan(invoke=[Strike({"kind": "kill", "seconds": 0})])
    ask(proxy, "POST", INVOKE, event("0/p/r/x"))
    sent = json.loads(upstream.got[0][2])
    assert sent.pop("fault") == {"kind": "kill", "seconds": 0}
    assert sent == json.loads(event("0/p/r/x"))


def test_concurrency_is_limited(proxy: Proxy, upstream: Upstream) -> None:
    proxy.limit(concurrency=2)
    upstream.may_answer.clear()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, proxy, "POST", INVOKE, event()) for _ in range(2)]
        assert eventually(lambda: len(upstream.got) == 2)
        answer, body = ask(proxy, "POST", INVOKE, event())
        assert answer.status == 429
        assert json.loads(body)["Reason"].endswith("ConcurrentInvocationLimitExceeded")
        upstream.may_answer.set()
        assert [each.result()[0].status for each in running] == [200, 200]
    assert ask(proxy, "POST", INVOKE, event())[0].status == 200
    assert proxy.peak == 2


def test_the_rate_is_limited(proxy: Proxy) -> None:
    proxy.limit(rate=1e-3)
    statuses = [ask(proxy, "POST", INVOKE, event())[0].status for _ in range(3)]
    assert statuses == [200, 429, 429]
    proxy.plan()
    assert ask(proxy, "POST", INVOKE, event())[0].status == 200


# -- whose request it is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "query", "body", "names"),
    [
        ("put", "/bucket/0/p/r/x", {}, b"", ["0/p/r/x"]),
        ("put", "/bucket/0/p/r/x~/1", {"uploadId": "u"}, b"", ["0/p/r/x~/1"]),
        ("get", "/bucket/0/p/r/x%7E/1", {}, b"", ["0/p/r/x~/1"]),
        ("list", "/bucket", {"prefix": "0/p/r/"}, b"", ["0/p/r/"]),
        (
            "delete",
            "/bucket",
            {},
            b"<Delete><Object><Key>0/p/r/x</Key></Object><Object><Key>1/p/r/y</Key></Object></Delete>",
            ["0/p/r/x", "1/p/r/y"],
        ),
        ("invoke", INVOKE, {}, event("0/p/r/x"), ["0/p/r/x"]),
    ],
)
def test_a_request_is_told_by_its_objects(
    kind: str, path: str, query: Any, body: bytes, names: list[str]
) -> None:
    request = Request(kind, path, body, query)
    assert list(request.names) == names
    assert request.run == "r"


# -- random plans --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MENUS)
def test_what_is_drawn_is_a_function_of_seed_kind_and_number(kind: str) -> None:
    heavy = INTENSITIES["heavy"]
    drawn = [draw(7, heavy, kind, i) for i in range(300)]
    names = [fault and fault.name for fault in drawn]
    again = [draw(7, heavy, kind, i) for i in range(300)]
    assert [fault and fault.name for fault in again] == names
    other = [draw(8, heavy, kind, i) for i in range(300)]
    assert [fault and fault.name for fault in other] != names
    share = heavy.invoke if kind == "invoke" else heavy.s3
    assert abs(sum(name is not None for name in names) / 300 - share) < 0.1


def test_nothing_is_drawn_without_intensity() -> None:
    assert not any(draw(1, INTENSITIES["none"], kind, i) for kind in MENUS for i in range(100))


@pytest.mark.parametrize("seed", range(5))
def test_what_one_output_meets_is_bounded(seed: int) -> None:
    faults = Faults(seed, INTENSITIES["heavy"])
    actions = [faults(Request("invoke", INVOKE, event("0/p/r/x"), {})) for _ in range(2000)]
    assert sum(action is not None for action in actions) == faults.injected.total()
    deaths = faults.injected["kill"] + faults.injected["exit"]
    assert deaths == BOUNDS["death"]
    assert faults.injected["throttle"] == BOUNDS["throttle"]
    assert faults.fatal is None


@pytest.mark.parametrize("seed", range(20))
def test_a_fatal_plan_has_one_fatal_fault_and_knows_its_error(seed: int) -> None:
    faults = Faults(seed, INTENSITIES["fatal"])
    for kind in ("invoke", "get", "put"):
        for i in range(20):
            body = event(f"0/p/r/{i}") if kind == "invoke" else b""
            faults(Request(kind, f"/bucket/0/p/r/{i}", body, {}))
    assert faults.fatal is not None
    names = {"forbidden", "denied", "missing", "damaged", "cut"}
    assert sum(faults.injected[name] for name in names) == 1


def test_requests_of_several_runs_are_told_apart_by_the_keys_of_their_tasks() -> None:
    dealer = Dealer()
    mine, other = (Faults(seed, INTENSITIES["30 % of invocations fail"]) for seed in (1, 2))
    dealer.add(mine, ["a", "b"])
    dealer.add(other, ["c"])

    def invoke(run: str, label: str) -> Request:
        name = object_name("p", run, label)
        body = json.dumps({"run": run, "groups": [{"outputs": [name]}]}).encode()
        return Request("invoke", INVOKE, body, {})

    for _ in range(50):
        dealer(invoke("first", key_label("b")))
    assert mine.injected
    assert not other.injected
    dealer.remove(["a", "b"])
    before = mine.injected.total()
    for i in range(50):  # another task of the run, by its run
        dealer(invoke("first", f"of the planner's own {i}"))
    assert mine.injected.total() > before
    assert dealer(invoke("unknown", "unknown")) is None
