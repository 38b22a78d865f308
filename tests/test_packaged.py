"""The packaged environment, really built: it runs with nothing else at hand, as on Lambda.

All tests share one build (some 60 MB of wheels, half a minute), which is kept in ``.venv`` for as
long as the code that builds it stays the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Alias, Task

from dask_lambda.deploy import package, wheels
from lambda_worker import codec, protocol
from lambda_worker.environment import FILE, PREIMPORT, Deployed
from tests.helpers import eventually, graph_of
from tests.runtime_api import HERE, RuntimeAPI, bootstrap, function_environment, runtime_client

ROOT = Path(package.__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="Lambda's packages are for Linux"),
]


@pytest.fixture(scope="session")
def built() -> package.Package:
    """The environment of all workers, as layers."""
    code = b"".join(p.read_bytes() for p in sorted(Path(package.__file__).parent.glob("*.py")))
    cache = ROOT / ".venv" / "packages" / hashlib.sha256(code).hexdigest()[:16]
    for other in cache.parent.glob("*/"):
        if other != cache:
            shutil.rmtree(other)  # of code that was different
    return package.build(form="layers", platform=HERE, cache=cache)


@pytest.fixture(scope="session")
def unpacked(
    built: package.Package, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """What Lambda makes of it: the packages, and the function's own code."""
    root = tmp_path_factory.mktemp("lambda")
    for layer in built.layers:
        zipfile.ZipFile(built.directory / layer.file).extractall(root / "opt")
    zipfile.ZipFile(io.BytesIO(package.function_code())).extractall(root / "task")
    yield root / "opt" / "python", root / "task"
    shutil.rmtree(root)


RUN, SECRET = "run", b"s" * 32


def event(tasks: list[Any], output: Any, timeout: float | None = None) -> dict[str, Any]:
    """The event of an invocation with one group, whose output comes back in the reply."""
    name = protocol.object_name("prefix", RUN, "body")
    body = protocol.Body(tasks, [], [], [output])
    sealed = codec.dumps(body.fields(), SECRET, name)
    group = protocol.GroupRequest(
        protocol.Value(name, len(sealed), sealed),
        [],
        [protocol.object_name("prefix", RUN, "output")],
        timeout=timeout,
    )
    return protocol.Request(RUN, {RUN: SECRET}, "bucket", 100_000, [group]).to_json()


def array_event() -> dict[str, Any]:
    """A matrix product and its trace, in blocks, as Dask hands them to a scheduler."""
    x = da.ones((60, 60), chunks=20)
    graph = graph_of((x @ x.T).sum())
    (output,) = graph.outputs
    tasks: list[Any] = []
    for key in TopologicalSorter({k: graph.dependencies(k) for k in graph.tasks}).static_order():
        names = {n: graph.resolve(n) for n in graph.tasks[key].dependencies}
        tasks += [Alias(name, target) for name, target in names.items() if name != target]
        tasks.append(graph.tasks[key])
    return event(tasks, graph.resolve(output))


def value(reply: dict[str, Any]) -> Any:
    """The output of the one group."""
    (group,) = reply["groups"]
    assert "error" not in group, group["error"]
    (record,) = group["outputs"]
    sealed = protocol.Value.from_json(record)
    return codec.loads(sealed.data, SECRET, sealed.name)


def hello() -> str:
    return "hello"


def fail() -> None:
    raise ZeroDivisionError("by nothing")


def wait(seconds: float) -> None:
    time.sleep(seconds)


def environment_of(unpacked: tuple[Path, Path], directory: Path, **variables: str) -> RuntimeAPI:
    """An execution environment of the function."""
    packages, task = unpacked
    runtime_client(directory / "runtime")
    paths = [directory / "runtime", task, packages]
    variables = {"HOME": str(directory), **variables}
    handler = "lambda_worker.handler.handler"
    return RuntimeAPI(handler, function_environment(paths, **variables), directory / "log")


@contextmanager
def emulator(unpacked: tuple[Path, Path], directory: Path, seconds: int) -> Iterator[Any]:
    """Lambda's runtime interface emulator with the function; how to invoke it."""
    program = emulator_program()
    packages, task = unpacked
    runtime_client(directory / "runtime")
    paths = [directory / "runtime", task, packages]
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    addresses = [
        *("--runtime-interface-emulator-address", f"127.0.0.1:{ports[0]}"),
        *("--runtime-api-address", f"127.0.0.1:{ports[1]}"),
    ]
    variables = {
        "AWS_LAMBDA_FUNCTION_TIMEOUT": str(seconds),
        "HOME": str(directory),
    }
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [str(program), *addresses, *bootstrap("lambda_worker.handler.handler")],
            env=function_environment(paths, **variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", ports[0])) == 0

    def invoke(body: Any) -> Any:
        url = f"http://127.0.0.1:{ports[0]}/2015-03-31/functions/function/invocations"
        request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            content = response.read().decode()
        try:
            return json.loads(content)
        except ValueError:
            return content

    try:
        assert eventually(listens), (directory / "log").read_text()
        yield invoke
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def emulator_program() -> Path:
    """Lambda's emulator, which is in a wheel that is too large to be installed for it."""
    program = ROOT / ".venv" / "packages" / "aws-lambda-rie"
    if not program.exists():
        folder = program.with_suffix(".download")
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, "aws-sam-cli"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("the wheel with Lambda's emulator cannot be had here")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            machine = "x86_64" if platform.machine() == "x86_64" else "arm64"
            content = archive.read(f"samcli/local/rapid/aws-lambda-rie-{machine}")
        shutil.rmtree(folder)
        program.write_bytes(content)
        program.chmod(0o755)
    return program


WALK = """
import contextlib, importlib, io, json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
names = set()
for path in root.rglob("*"):
    parts = path.relative_to(root).parts
    left_out = {"tests", "test", "bin", "conftest.py", "__main__.py"} & set(parts)
    if path.suffix in (".py", ".so") and not left_out and "." not in "".join(parts[:-1]):
        module = [*parts[:-1], parts[-1].split(".")[0]]
        names.add(".".join(module[:-1] if module[-1] == "__init__" else module))
imported = []
for name in sorted(names):
    with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(name)
        imported.append(name)
print(json.dumps(imported))
"""


def importable(root: Path) -> set[str]:
    """All modules of a directory that a bare interpreter can import."""
    command = [sys.executable, "-I", "-S", "-B", "-c", WALK, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


BARE = """
import json, sys
base = list(sys.path)
sys.path[:0] = sys.argv[1:]
from types import SimpleNamespace
from lambda_worker.handler import handler
context = SimpleNamespace(memory_limit_in_mb="1769", aws_request_id="1")
reply = handler(json.load(sys.stdin), context)
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
strange = [f for f in files if f and not f.startswith((*base, *sys.argv[1:]))]
print(json.dumps([reply, strange, sorted(m for m in sys.modules if "." not in m)]))
"""


def test_it_is_within_lambdas_limits_and_says_what_takes_the_room(built):
    assert built.unzipped <= 200e6
    assert not [layer for layer in built.layers if layer.through_s3]
    assert {"scipy", "numpy"} == {size.name for size in built.sizes[:2]}
    assert built.unzipped == sum(layer.unzipped for layer in built.layers)
    assert set(built.packages) == {size.name for size in built.sizes}
    assert built.cuts["tests"] > 20e6


def test_the_layers_hold_no_more_than_they_say(built, unpacked):
    packages, _ = unpacked
    files = [p for p in packages.rglob("*") if p.is_file() and p.name != FILE]
    assert sum(p.stat().st_size for p in files) == built.unzipped
    deployed = Deployed.from_json((packages / FILE).read_text())
    assert deployed.digest == built.digest
    assert deployed.packages["numpy"] == np.__version__


@pytest.mark.exhaustive
def test_whatever_could_be_imported_before_can_be_imported_after(built, unpacked, tmp_path):
    wheels.install(built.packages, built.platform, tmp_path / "all")
    could, can = (importable(root) for root in (tmp_path / "all", unpacked[0]))
    assert len(could) > 1000
    assert could - can == set()


@pytest.mark.exhaustive
def test_what_an_image_would_hold_runs_as_its_recipe_says(tmp_path):
    built = package.build(form="image", cache=ROOT / ".venv" / "deployed" / "dask-lambda")
    if not package.runs_here(built.platform):
        pytest.skip("this machine has another C library or processor than the image")
    context = package.image_recipe(built).context
    lines = [line.split() for line in (context / "Dockerfile").read_text().splitlines()]
    for source, target in (line[1:] for line in lines if line[:1] == ["COPY"]):
        shutil.copytree(context / source, tmp_path / target.strip("/"), dirs_exist_ok=True)
    (handler,) = json.loads(next(" ".join(line[1:]) for line in lines if line[:1] == ["CMD"]))
    task = function_environment([tmp_path / "var" / "task"], HOME=str(tmp_path))
    with RuntimeAPI(handler, task, tmp_path / "log") as api:
        kind, reply = api.invoke(array_event())
        assert (kind, value(reply)) == ("response", 60**3), api.log()
        assert reply["environment"] == built.digest


def test_it_is_not_built_again(built):
    again = package.build(form="layers", platform=HERE, cache=built.directory.parents[1])
    assert not again.fresh
    assert again.digest == built.digest


def test_a_bare_interpreter_runs_a_task_of_an_array(unpacked):
    packages, task = unpacked
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", BARE, str(task), str(packages)],
        input=json.dumps(array_event()),
        env={"AWS_REGION": "us-east-1"},
        capture_output=True,
        text=True,
        check=True,
    )
    reply, strange, modules = json.loads(done.stdout)
    assert value(reply) == 60**3
    assert not strange
    assert {"numpy", "dask", "obstore"} <= set(modules)
    assert not {"boto3", "botocore", "dask_lambda"} & set(modules)
    assert not (packages / "boto3").exists()


def test_another_series_of_numpy_on_the_client_is_refused(unpacked, tmp_path):
    with environment_of(unpacked, tmp_path) as api:
        kind, reply = api.invoke({**array_event(), "packages": {"numpy": "1.0.0"}})
    assert kind == "response"
    assert reply["refused"]["packages"] == {"numpy": [np.__version__, "1.0.0"]}


def test_lambdas_runtime_client_drives_it(built, unpacked, tmp_path):
    with environment_of(unpacked, tmp_path, **{PREIMPORT: "dask.array,no_such_module"}) as api:
        kind, reply = api.invoke(event([Task("x", hello)], "x"))
        assert (kind, value(reply)) == ("response", "hello")
        assert reply["cold"]
        assert reply["environment"] == built.digest
        assert "no_such_module" in api.log()
        kind, reply = api.invoke(array_event())
        assert (kind, value(reply)) == ("response", 60**3)
        assert not reply["cold"]
        kind, reply = api.invoke(event([Task("x", fail)], "x"))
        assert kind == "response"
        assert reply["groups"][0]["error"]["type"] == "builtins.ZeroDivisionError"
        kind, reply = api.invoke(event([Task("x", wait, 60)], "x", timeout=0.2))
        assert reply["groups"][0]["error"]["kind"] == "timeout"
        kind, reply = api.invoke(event([Task("x", hello)], "x"))
        assert value(reply) == "hello"  # it goes on after all that
        assert api.invoke(event([Task("x", wait, 60)], "x"), timeout=0.5)[0] == "timeout"


def test_lambdas_own_emulator_drives_it(unpacked, tmp_path):
    with emulator(unpacked, tmp_path, seconds=60) as invoke:
        assert value(invoke(event([Task("x", hello)], "x"))) == "hello"
        assert value(invoke(array_event())) == 60**3
        reply = invoke(event([Task("x", fail)], "x"))
        assert reply["groups"][0]["error"]["type"] == "builtins.ZeroDivisionError"


def test_lambdas_own_emulator_ends_what_takes_too_long(unpacked, tmp_path):
    with emulator(unpacked, tmp_path, seconds=1) as invoke:
        assert "timed out after 1" in str(invoke(event([Task("x", wait, 60)], "x")))
