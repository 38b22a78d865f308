"""Who may import whom: downwards only, and the worker starts without heavy packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dask_lambda
import lambda_worker

ROOT = Path(lambda_worker.__file__).parents[1]
WORKER = sorted((ROOT / "lambda_worker").glob("*.py"))
CLIENT = sorted((ROOT / "dask_lambda").rglob("*.py"))

#: The engine from the top down: a module imports only what stands below it.
ENGINE = [
    *("cluster", "proxy", "proxy_scheduler", "unsupported"),
    *("__init__", "cleaning", "saved"),
    *("executor", "mapping", "chains", "calling", "arguments", "futures", "distant"),
    *("scheduler", "session", "session_run", "computation", "estimation", "forecast"),
    *("resume", "planner"),
    *("callbacks", "annotations", "placement"),
    *("dispatch", "opening", "ending", "access", "sending", "warming", "objects", "run"),
    *("description", "stored"),
    *("kept_folder", "kept_runs"),
    *("simulate", "bounds", "timeline", "aws_model"),
    "standalone",
    *(
        "invoke",
        "encode",
        "local_modules",
        "pickling",
        "lease",
        "lambda_answers",
        "failures",
        "replies",
        "state",
        "outputs",
        "books",
        "events",
        "window",
        "pace",
        "policy",
        "reuse",
        "splitting",
        "entangled",
        "plan",
        "grouping",
    ),
    *("tiling", "units"),
    *("folding", "fingerprint", "digest", "libraries"),
    *("history", "estimates", "graph", "cost_model", "kernels"),
    *("backend", "local_shared", "local", "local_start", "local_process", "local_supervisor"),
    *("local_server", "lifecycle"),
    *("report", "config", "prices", "cost", "credentials", "loop_thread", "signals", "errors"),
]
#: What is deployed to an account, likewise.  It stands beside the engine: nothing of the engine
#: imports it, only the command line does.
DEPLOY = [
    *("doctor", "hello", "status", "destroy", "deployment", "cloudformation"),
    *("record", "logs", "apply", "look", "plan", "function_plan", "snapshots", "differences"),
    *("aws", "calls", "seen", "resources", "policies", "naming", "artifact"),
]
PURE_DEPLOY = [
    *("cloudformation", "plan", "function_plan", "snapshots", "differences", "calls", "seen"),
    *("resources", "policies", "naming", "artifact"),
]
#: The ground, likewise.
GROUND = [
    *("standalone", "handler", "log_lines", "lease", "limits", "uploads", "prefetch", "execute"),
    *("calls", "folds", "commit", "store", "codec", "cache", "memory", "modules", "protocol"),
    *("container_credentials", "snapshot", "environment", "errors"),
]
#: The packaging of workers, likewise.
PACKAGING = [
    "package",
    "image",
    "layers",
    "trim",
    "elf",
    "wheels",
    "environment",
    "platforms",
    "__init__",
]
PURE = [
    *("fingerprint", "digest", "libraries", "reuse", "lifecycle"),
    *(
        "state",
        "outputs",
        "books",
        "events",
        "window",
        "pace",
        "policy",
        "splitting",
        "entangled",
        "plan",
        "grouping",
        "tiling",
        "units",
        "folding",
        "estimates",
        "graph",
        "cost_model",
    ),
    *(
        "kernels",
        "failures",
        "lambda_answers",
        "replies",
        "cost",
        "simulate",
        "bounds",
        "timeline",
        "aws_model",
    ),
    *("prices", "forecast"),
]
WORLD = {
    *("asyncio", "socket", "threading", "time", "datetime", "subprocess", "concurrent"),
    *("aiohttp", "boto3", "botocore", "obstore", "urllib", "http", "tempfile", "os"),
}


def imports(path: Path, *, late: bool = True) -> set[str]:
    """Full names that a module imports; without ``late`` at its top level only."""
    tree = ast.parse(path.read_text("utf-8"))
    names = set()
    nodes = ast.walk(tree) if late else _top_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def _top_level(tree: ast.Module):
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        stack.extend(ast.iter_child_nodes(node))


def inner_imports(path: Path, package: str) -> set[str]:
    """Modules of the package that one of them imports at its top level."""
    modules = {p.stem for p in path.parent.glob("*.py")}
    names = imports(path, late=False)
    return {m for m in modules if f"{package}.{m}" in names}


@pytest.mark.parametrize("path", WORKER, ids=lambda path: path.stem)
def test_the_worker_never_imports_the_client(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "dask_lambda"]


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_imports_downwards(name):
    below = set(GROUND[GROUND.index(name) + 1 :])
    assert inner_imports(ROOT / "lambda_worker" / f"{name}.py", "lambda_worker") <= below


def test_every_module_of_the_ground_has_its_place():
    assert {path.stem for path in WORKER} == {"__init__", *GROUND}


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_imports_downwards(name):
    path = ROOT / "dask_lambda" / f"{name}.py"
    above = set(ENGINE[: ENGINE.index(name) + 1])
    assert not inner_imports(path, "dask_lambda") & above


def test_every_module_of_the_engine_has_its_place():
    found = {path.stem for path in (ROOT / "dask_lambda").glob("*.py")}
    assert found == {"__main__", *ENGINE}


@pytest.mark.parametrize("name", PACKAGING)
def test_packaging_imports_downwards_and_nothing_of_the_engine(name):
    path = ROOT / "dask_lambda" / "deploy" / f"{name}.py"
    above = set(PACKAGING[: PACKAGING.index(name) + 1])
    assert not inner_imports(path, "dask_lambda.deploy") & above
    others = {name for name in imports(path) if name.startswith("dask_lambda.")}
    allowed = ("dask_lambda.deploy", "dask_lambda.errors", "dask_lambda.local_start")
    assert all(name.startswith(allowed) for name in others)


@pytest.mark.parametrize("name", DEPLOY)
def test_what_deploys_imports_downwards(name):
    path = ROOT / "dask_lambda" / "deploy" / f"{name}.py"
    above = set(DEPLOY[: DEPLOY.index(name) + 1])
    assert not inner_imports(path, "dask_lambda.deploy") & above


@pytest.mark.parametrize("name", PURE_DEPLOY)
def test_descriptions_of_deployments_know_nothing_of_the_world(name):
    tops = {n.split(".")[0] for n in imports(ROOT / "dask_lambda" / "deploy" / f"{name}.py")}
    assert not tops & WORLD


def test_every_module_that_deploys_has_its_place():
    found = {path.stem for path in (ROOT / "dask_lambda" / "deploy").glob("*.py")}
    assert found == {"__init__", *DEPLOY, *PACKAGING}


def test_nothing_but_the_command_line_imports_what_deploys():
    for path in CLIENT:
        if path.parent.name in ("cli", "deploy"):
            continue
        names = imports(path)
        assert not {n for n in names if n.startswith("dask_lambda.deploy")}, path.name
        assert path.stem == "__main__" or "dask_lambda.cli" not in names, path.name


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_nothing_of_the_world(name):
    tops = {n.split(".")[0] for n in imports(ROOT / "dask_lambda" / f"{name}.py")}
    assert not tops & WORLD


def test_the_state_machine_imports_the_plan_and_nothing_else_of_the_engine():
    imported = inner_imports(ROOT / "dask_lambda" / "state.py", "dask_lambda")
    assert imported == {"books", "outputs", "events", "window", "policy", "plan"}


def test_the_state_machine_calls_no_clock_and_no_unseeded_randomness():
    tree = ast.parse((ROOT / "dask_lambda" / "state.py").read_text("utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {
        c for c in calls if c.split(".")[-1] in {"monotonic", "time", "perf_counter", "now"}
    }
    assert {c for c in calls if c.startswith("random.")} == {"random.Random"}


def test_every_module_has_its_place_in_the_architecture():
    told = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    modules = {path.name for path in [*WORKER, *CLIENT] if not path.stem.startswith("__")}
    assert not {name for name in modules if not re.search(rf"\b{name}", told)}


@pytest.mark.parametrize(
    "path", [*WORKER, *CLIENT], ids=lambda path: f"{path.parent.stem}.{path.stem}"
)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(out.stdout.split())


def test_a_cold_start_loads_no_heavy_package():
    loaded = loaded_by("import lambda_worker.handler")
    heavy = {"boto3", "botocore", "distributed", "dask.array", "dask.dataframe", "pandas"}
    assert not loaded & (heavy | {"dask_lambda", "scipy", "aiohttp", "tornado"})


def test_importing_the_client_loads_no_aws_sdk_and_no_collection():
    loaded = loaded_by("import dask_lambda")
    assert "dask_lambda.scheduler" in loaded
    assert not loaded & {"boto3", "distributed", "dask.array", "dask.dataframe", "pandas", "scipy"}


def test_the_classes_for_distributed_are_there_when_they_are_asked_for():
    assert {"LambdaCluster", "LambdaClient"} <= set(dir(dask_lambda))
    loaded = loaded_by("import dask_lambda; dask_lambda.LambdaCluster")
    assert "dask_lambda.cluster" in loaded
    with pytest.raises(AttributeError, match="LambdaClusters"):
        dask_lambda.LambdaClusters  # noqa: B018
