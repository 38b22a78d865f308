"""The embedded AWS: real processes over loopback."""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import psutil
import pytest
from botocore.exceptions import ClientError

from dask_lambda import local, local_shared
from dask_lambda.errors import ConfigurationError, LocalAWSError
from dask_lambda.local import LocalAWS
from dask_lambda.local_shared import local_aws, shared_status, start_shared, stop_shared
from dask_lambda.local_start import INVOCATIONS_PER_CORE, available_cores
from tests.helpers import eventually

pytestmark = pytest.mark.local

ROOT = Path(local.__file__).parents[1]

HANDLER = """
import os, subprocess, sys, time

def handler(event, context):
    print("invoked", file=sys.stderr, flush=True)
    if event == "environment":
        return dict(os.environ)
    if event == "daemon":  # leaves the process group, as badly behaved tasks do
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        return child.pid
    if isinstance(event, dict) and "wait_for" in event:
        open(event["started"], "a").write("x")
        while not os.path.exists(event["wait_for"]):
            time.sleep(0.01)
    return [event, os.getpid()]
"""


def handler_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny.py", HANDLER)
    return buffer.getvalue()


def start(directory: Path, **settings: object) -> LocalAWS:
    return LocalAWS.start(
        code=handler_zip(), handler="tiny.handler", directory=directory, **settings
    )


def invoke(aws: LocalAWS, event: object) -> object:
    answer = aws.client("lambda").invoke(FunctionName=aws.function, Payload=json.dumps(event))
    assert "FunctionError" not in answer
    return json.loads(answer["Payload"].read())


def processes(aws_pid: int) -> list[psutil.Process]:
    supervisor = psutil.Process(aws_pid)
    return [supervisor, *supervisor.children(recursive=True)]


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(found: list[psutil.Process]) -> bool:
    return eventually(lambda: all(gone(process) for process in found))


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalAWS]:
    """One for the tests that do not end it."""
    with start(tmp_path_factory.mktemp("aws"), concurrency=2) as running:
        yield running


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private directory for the state file, and no shared server left."""
    directory = tmp_path / "state"
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(directory))
    monkeypatch.setattr(local_shared, "_singletons", {})
    yield directory
    for running in local_shared._singletons.values():
        running.stop()
    stop_shared()


def test_start_invoke_stop_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    aws = start(tmp_path)
    assert invoke(aws, 7)[0] == 7  # type: ignore[index]
    found = processes(aws.pid)
    assert len(found) >= 3  # supervisor, server, worker
    assert aws.is_alive()
    assert aws.directory.stat().st_mode & 0o777 == 0o700
    aws.check()
    daemon = psutil.Process(int(invoke(aws, "daemon")))  # type: ignore[call-overload]
    if sys.platform.startswith("linux"):  # elsewhere what left the process group is not found
        found.append(daemon)

    aws.stop()

    assert all_gone(found)
    assert not list(tmp_path.iterdir())
    assert not aws.is_alive()
    aws.stop()  # again: nothing happens
    with pytest.raises(LocalAWSError, match="it was stopped"):
        aws.check()


CLIENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
import sys
from pathlib import Path
from tests_helper import start
aws = start(Path(sys.argv[1]))
aws.client("lambda").invoke(FunctionName=aws.function, Payload=b"1")
print(aws.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def client(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has started an embedded AWS below tmp_path / "data"."""
    (tmp_path / "data").mkdir()
    helper = f"HANDLER = {HANDLER!r}\n" + (
        "import io, zipfile\n"
        "from dask_lambda.local import LocalAWS\n"
        "def start(directory):\n"
        "    buffer = io.BytesIO()\n"
        "    with zipfile.ZipFile(buffer, 'w') as archive:\n"
        "        archive.writestr('tiny.py', HANDLER)\n"
        "    return LocalAWS.start(\n"
        "        code=buffer.getvalue(), handler='tiny.handler', directory=directory)\n"
    )
    (tmp_path / "tests_helper.py").write_text(helper)
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize("way", ["killed", "ends", "interrupted"])
def test_nothing_is_left_when_the_client_is_gone(
    client: subprocess.Popen[str], tmp_path: Path, way: str
) -> None:
    assert client.stdin is not None
    assert client.stdout is not None
    found = processes(int(client.stdout.readline()))
    assert len(found) >= 3

    if way == "killed":
        client.send_signal(signal.SIGKILL)
    elif way == "interrupted":
        client.send_signal(signal.SIGINT)
    else:
        client.stdin.close()

    assert all_gone(found)
    assert eventually(lambda: not list((tmp_path / "data").iterdir()))


def test_ctrl_c_in_the_terminal_does_not_reach_it(aws: LocalAWS) -> None:
    for process in processes(aws.pid):
        assert os.getsid(process.pid) != os.getsid(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a death signal")
def test_the_server_dies_with_a_killed_supervisor(tmp_path: Path) -> None:
    aws = start(tmp_path)
    invoke(aws, 1)
    found = processes(aws.pid)
    os.kill(aws.pid, signal.SIGKILL)
    assert all_gone(found)
    assert not aws.is_alive()
    aws.stop()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_supervisor_left_is_swept_by_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / "dask-lambda-left"
    left.mkdir()
    (left / "lock").write_text("1")
    starting = tmp_path / "dask-lambda-starting"
    starting.mkdir()  # no lock yet: its supervisor is about to take it
    with start(tmp_path) as aws:
        assert not left.exists()
        assert starting.exists()
        assert aws.directory.exists()


def test_a_server_that_died_is_an_error_that_says_how(tmp_path: Path) -> None:
    aws = start(tmp_path)
    os.kill(aws.server_pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(LocalAWSError, match=r"has ended \(exit code -9\)"):
            aws.check(wait=10)
        aws.stop()
    assert not list(tmp_path.iterdir())


def test_a_server_that_cannot_start_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "hypercorn.py").write_text("raise ImportError('broken on purpose')")
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(LocalAWSError, match="broken on purpose"):
        start(tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LocalAWSError, match=f"port {port} .* in use"):
            start(tmp_path, port=port)
    assert not list(tmp_path.iterdir())


def test_without_ministack_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ministack", None)  # find_spec raises ValueError or gives None
    with pytest.raises(LocalAWSError, match=r"pip install '\.\[local\]'"):
        start(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"concurrency": 0}, {"memory": 64}, {"timeout": 901}, {"port": 0}, {"concurrency": "4"}],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        start(tmp_path, **settings)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LocalAWSError, match="missing"):
        start(tmp_path / "missing")


def test_the_users_settings_do_not_reach_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "of-the-user")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/of-the-user")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://of-the-user.invalid")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://of-the-user.invalid")
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")
    monkeypatch.setenv("DASK_DASK_LAMBDA__FUNCTION", "of-the-user")
    monkeypatch.setenv("MY_TOKEN", "of-the-user")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("S3_PERSIST", "0")
    with start(tmp_path) as aws:
        environment = invoke(aws, "environment")
    assert isinstance(environment, dict)
    assert not [name for name, value in environment.items() if "of-the-user" in value]
    assert environment["AWS_ENDPOINT_URL"] == aws.endpoint_url
    assert environment["AWS_ACCESS_KEY_ID"].startswith("ASIA")  # the role's, not the root user's
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["TMPDIR"].startswith(str(tmp_path))


def test_it_listens_on_one_loopback_port_only(aws: LocalAWS) -> None:
    invoke(aws, 1)
    listening = {
        tuple(connection.laddr)
        for process in processes(aws.pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    }
    assert listening == {("127.0.0.1", int(aws.endpoint_url.rpartition(":")[2]))}


@pytest.mark.parametrize("key", ["test", "000000000000", "ASIA0000000000000000"])
def test_strangers_are_refused(aws: LocalAWS, key: str) -> None:
    session = botocore.session.Session()
    stranger = session.create_client(
        "lambda",
        region_name=aws.region,
        endpoint_url=aws.endpoint_url,
        aws_access_key_id=key,
        aws_secret_access_key="test",
    )
    with pytest.raises(ClientError) as refusal:
        stranger.invoke(FunctionName=aws.function, Payload=b"1")
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_requests_without_credentials_are_refused(aws: LocalAWS) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(aws.endpoint_url.rpartition(":")[2]))
    statuses = {}
    for method, path in [
        ("GET", "/_ministack/health"),
        ("POST", "/_ministack/reset"),
        ("OPTIONS", "/"),
        ("POST", f"/2015-03-31/functions/{aws.function}/invocations"),
        ("GET", f"/{aws.bucket}"),
    ]:
        connection.request(method, path)
        response = connection.getresponse()
        response.read()
        statuses[method, path] = response.status
    connection.close()
    assert list(statuses.values()) == [200, 403, 403, 403, 403]


def test_more_than_the_reserved_concurrency_is_refused(aws: LocalAWS, tmp_path: Path) -> None:
    started, release = tmp_path / "started", tmp_path / "release"
    event = {"started": str(started), "wait_for": str(release)}
    running = [threading.Thread(target=invoke, args=(aws, event)) for _ in range(2)]
    for thread in running:
        thread.start()
    try:
        assert eventually(lambda: started.exists() and started.read_text() == "xx")
        with pytest.raises(ClientError) as refusal:
            invoke(aws, 1)
    finally:
        release.touch()
        for thread in running:
            thread.join()
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
    assert refusal.value.response["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert invoke(aws, 3)[0] == 3  # type: ignore[index]


def test_objects_are_kept_in_files(aws: LocalAWS) -> None:
    s3 = aws.client("s3")
    server = psutil.Process(aws.server_pid)
    body = os.urandom(8 << 20)
    s3.put_object(Bucket=aws.bucket, Key="first", Body=body)
    before = server.memory_info().rss
    for number in range(40):  # 320 MB
        s3.put_object(Bucket=aws.bucket, Key=f"x/{number}", Body=body)
    assert server.memory_info().rss - before < 100 << 20
    assert s3.get_object(Bucket=aws.bucket, Key="x/39")["Body"].read() == body
    for number in range(40):
        s3.delete_object(Bucket=aws.bucket, Key=f"x/{number}")
    sizes = [f.stat().st_size for f in (aws.directory / "s3").rglob("*") if f.is_file()]
    assert sum(sizes) < 9 << 20


def test_a_start_says_so_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dask_lambda"), start(tmp_path, concurrency=3) as aws:
        pass
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert aws.endpoint_url in line
    assert "3 concurrent" in line
    assert "real AWS" in line


# One for the process.


def test_threads_get_the_same_object(state: Path) -> None:
    found: list[LocalAWS] = []
    threads = [threading.Thread(target=lambda: found.append(local_aws())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert found[0].concurrency == INVOCATIONS_PER_CORE * available_cores()


def test_the_next_call_replaces_one_that_died(state: Path) -> None:
    first = local_aws()
    os.kill(first.pid, signal.SIGTERM)
    assert eventually(lambda: not first.is_alive())
    second = local_aws()
    assert second is not first
    assert second.is_alive()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_stops_nor_keeps_the_parents(state: Path) -> None:
    aws = local_aws()
    outcome_read, outcome = os.pipe()
    release, release_write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        aws.stop()
        local._stop_owned()
        os.write(outcome, b"1" if aws.is_alive() and not local_shared._singletons else b"0")
        os.close(release_write)
        os.read(release, 1)
        os._exit(0)
    try:
        assert os.read(outcome_read, 1) == b"1"
        assert aws.is_alive()
        found = processes(aws.pid)
        # The parent's end of the pipe is the only one, although the child lives.
        assert aws._supervisor is not None
        assert aws._supervisor.stdin is not None
        aws._supervisor.stdin.close()
        assert all_gone(found)
    finally:
        os.close(release_write)
        os.waitpid(child, 0)
        for handle in (outcome_read, outcome, release):
            os.close(handle)


# One for several processes.


def test_the_shared_one_is_used_if_it_matches(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert shared_status() is None
    shared = start_shared(concurrency=2)
    assert (state / "local.json").stat().st_mode & 0o777 == 0o600
    assert local_aws().endpoint_url == shared.endpoint_url
    assert local_aws(concurrency=2).endpoint_url == shared.endpoint_url
    caplog.clear()
    assert local_aws(concurrency=3, log_level=logging.WARNING).endpoint_url != shared.endpoint_url
    assert "is not used: its concurrency is 2, not 3" in caplog.text
    assert start_shared().pid == shared.pid
    with pytest.raises(LocalAWSError, match="its concurrency is 2, not 3"):
        start_shared(concurrency=3)
    with pytest.raises(LocalAWSError, match="worker code differs"):
        start_shared(code=handler_zip())

    local_aws().stop()  # not ours
    assert shared.is_alive()

    found = processes(shared.pid)
    assert stop_shared()
    assert all_gone(found)
    assert not shared.directory.exists()
    assert not list(state.iterdir())
    assert not stop_shared()


@pytest.mark.parametrize("content", ["", "{}", "[]", "dead"])
def test_a_stale_state_file_is_removed(state: Path, tmp_path: Path, content: str) -> None:
    state.mkdir()
    if content == "dead":  # the id of a living process, which is not the supervisor
        shared = start_shared()
        content = (state / "local.json").read_text()
        content = content.replace(f'"pid": {shared.pid}', f'"pid": {os.getpid()}')
        stop_shared()
    (state / "local.json").write_text(content)
    assert shared_status() is None
    assert not (state / "local.json").exists()
    assert not stop_shared()
