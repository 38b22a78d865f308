"""Fingerprints: equal in every session that computes the same, different as soon as it does not."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask import delayed

from dask_lambda import fingerprint
from dask_lambda.fingerprint import fingerprints
from tests.helpers import graph_of, shown

ROOT = Path(fingerprint.__file__).parents[1]

MODULE = """
import numpy as np
OFFSET = 1

def helper(x):
    return x + 2

def imported(x):
    return helper(x) + OFFSET

class Tool:
    step = 4
    def __call__(self, x):
        return x * self.step
"""

SCRIPT = """
import enum, functools, json, sys
from dataclasses import dataclass
import dask, dask.array as da, dask.bag as db, dask.dataframe as dd, numpy as np, pandas as pd
from dask import delayed
import own
from tests.helpers import graph_of
from dask_lambda.fingerprint import fingerprints

dask.config.set(scheduler="sync")
FACTOR = 5
TABLE = {"one": 1, "two": 2}

def scaled(x, by=6):
    return x * by * FACTOR

def chosen(x):
    return x if str(x) in {"alpha", "beta", "gamma", "delta"} else TABLE

def adder(n):
    def add(x):
        return x + n
    return add

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def imports_inside(x):
    import own
    return own.helper(x)

def of_module(x):
    return own.helper(x)

def draw():
    return np.random.random()

@functools.lru_cache
def cached(x):
    return x + 7

class Base:
    def run(self, x):
        return x + 8

class Child(Base):
    @property
    def size(self):
        return 9
    def __call__(self, x):
        return self.run(x)

class Colour(enum.Enum):
    RED = 1

@dataclass
class Pair:
    left: int
    right: float = 1.5

data = np.arange(24.0).reshape(6, 4)
x = da.from_array(data, chunks=(3, 2))
frame = pd.DataFrame({"key": list("abab"), "value": [1.0, 2.0, 3.0, 4.0]})
table = dd.from_pandas(frame, npartitions=2)
if len(sys.argv) > 2:
    table.to_csv(sys.argv[1] + "/*.csv")
    table.to_parquet(sys.argv[1] + "/table")
rng = da.random.default_rng(10)
cases = {
    "array": (x + 11).sum(axis=0),
    "fused": (x.T @ x + 1).mean(),
    "random": rng.normal(size=(6, 6), chunks=3).std(),
    "map_blocks": x.map_blocks(scaled, dtype=float),
    "lambda": x.map_blocks(lambda b: b + 12, dtype=float),
    "closure": x.map_blocks(adder(13), dtype=float),
    "delayed": delayed(scaled)(delayed(scaled)(1), by=[delayed(scaled)(2)]),
    "set": delayed(chosen)({"alpha", "beta", "gamma", "delta"}),
    "recursive": delayed(even)(14),
    "imported": delayed(own.imported)(15),
    "of module": delayed(of_module)(16),
    "imports inside": delayed(imports_inside)(17),
    "cached": delayed(cached)(18),
    "instance": delayed(Child())(19),
    "tool": delayed(own.Tool())(20),
    "method": delayed(Child().run)(21),
    "enum": delayed(str)(Colour.RED),
    "dataclass": delayed(str)(Pair(1)),
    "partial": delayed(functools.partial(scaled, by=22))(1),
    "bag": db.from_sequence(range(9), npartitions=3).map(lambda v: v * 23).sum(),
    "words": db.from_sequence(["b", "a"], npartitions=1).frequencies(),
    "dataframe": table.groupby("key").value.sum(),
    "applied": table.map_partitions(lambda part: part.assign(more=24)),
    "csv": dd.read_csv(sys.argv[1] + "/*.csv").value.sum(),
    "text": db.read_text(sys.argv[1] + "/0.csv").count(),
    "parquet": dd.read_parquet(sys.argv[1] + "/table").value.sum(),
    "cholesky": da.linalg.cholesky(x.T @ x + da.eye(4, chunks=2) * 30),
    "draws": delayed(sum)([delayed(draw)() for _ in range(5)]),
}
out = {}
for name, collection in cases.items():
    graph = graph_of(collection)
    found = fingerprints(graph)
    assert not found.reasons, (name, found.reasons)
    assert len(set(found.of.values())) == len(graph.tasks) + len(graph.literals), name
    out[name] = sorted(found.of[graph.resolve(key)] for key in graph.outputs)
print(json.dumps(out))
"""


class Sessions:
    """Sessions of a script, each in a process of its own."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "data").mkdir()
        (directory / "bytecode").mkdir()
        self.seeds = iter(range(1, 1000))

    def run(self, script: str = SCRIPT, module: str = MODULE, *, write: bool = False) -> Any:
        (self.directory / "own.py").write_text(module)
        (self.directory / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, "script.py", "data", *(["write"] if write else [])],
            cwd=self.directory,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.directory)]),
                "PYTHONHASHSEED": str(next(self.seeds)),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    made = Sessions(tmp_path_factory.mktemp("sessions"))
    made.run(write=True)
    return made


@pytest.fixture(scope="module")
def usual(sessions: Sessions) -> Any:
    return sessions.run()


def test_sessions_with_other_hash_seeds_agree(sessions: Sessions, usual: Any) -> None:
    again = sessions.run()
    assert {name for name in usual if usual[name] != again[name]} == set()


def test_comments_and_places_in_the_file_do_not_matter(sessions: Sessions, usual: Any) -> None:
    moved = sessions.run("# a comment\n\n\n" + SCRIPT, "\n\n" + MODULE)
    # What is imported inside a function is not looked into, but taken as the text that it is.
    assert {name for name in usual if usual[name] != moved[name]} == {"imports inside"}


SCRIPT_CHANGES = {
    ("x * by * FACTOR", "x * by + FACTOR"): {"map_blocks", "delayed", "partial"},
    ("by=6", "by=7"): {"map_blocks", "delayed", "partial"},
    ("FACTOR = 5", "FACTOR = 6"): {"map_blocks", "delayed", "partial"},
    ('"gamma", "delta"} else', '"gamma", "other"} else'): {"set"},
    ('"two": 2', '"two": 3'): {"set"},
    ('"beta", "gamma", "delta"})', '"beta", "gamma"})'): {"set"},
    ("adder(13)", "adder(14)"): {"closure"},
    ("return x + n", "return x - n"): {"closure"},
    ("n != 0 and", "n != 1 and"): {"recursive"},
    ("lambda b: b + 12", "lambda b: b + 13"): {"lambda"},
    ("v * 23", "v * 24"): {"bag"},
    ("more=24", "more=25"): {"applied"},
    ("x + 7", "x - 7"): {"cached"},
    ("x + 8", "x - 8"): {"instance", "method"},
    ("return 9", "return 10"): {"instance", "method"},
    ("RED = 1", "RED = 2"): {"enum"},
    ("Pair(1)", "Pair(1, 2.5)"): {"dataclass"},
    ("x + 11", "x + 12"): {"array"},
    ("default_rng(10)", "default_rng(11)"): {"random"},
    ("by=22", "by=23"): {"partial"},
    ("range(5)", "range(6)"): {"draws"},
    ('list("abab")', 'list("abaa")'): {"dataframe", "applied"},
}
MODULE_CHANGES = {
    ("x + 2", "x + 3"): {"imported", "of module", "imports inside"},
    ("OFFSET = 1", "OFFSET = 2"): {"imported", "imports inside"},
    ("step = 4", "step = 5"): {"tool", "imports inside"},
}


def batches() -> list[dict[tuple[str, str], set[str]]]:
    """Changes that have nothing in common can be made together."""
    made: list[dict[tuple[str, str], set[str]]] = []
    for change, names in {**SCRIPT_CHANGES, **MODULE_CHANGES}.items():
        for batch in made:
            if names.isdisjoint(set().union(*batch.values())):
                batch[change] = names
                break
        else:
            made.append({change: names})
    return made


@pytest.mark.parametrize("batch", batches(), ids=lambda batch: str(len(batch)))
def test_what_changes_is_not_mistaken_for_what_it_was(
    sessions: Sessions, usual: Any, batch: dict[tuple[str, str], set[str]]
) -> None:
    script, module = SCRIPT, MODULE
    for change in batch:
        assert (script + module).count(change[0]) == 1, change
        script, module = script.replace(*change), module.replace(*change)
    other = sessions.run(script, module)
    changed = {name for name in usual if usual[name] != other[name]}
    assert changed == set().union(*batch.values())


def test_a_file_that_dask_reads_is_part_of_the_task(sessions: Sessions, usual: Any) -> None:
    data = sessions.directory / "data"
    with open(data / "0.csv", "a") as file:
        file.write("9,c,9.0\n")
    other = sessions.run()
    assert {name for name in usual if usual[name] != other[name]} == {"csv", "text"}
    with open(data / "table" / "part.0.parquet", "ab") as file:
        file.write(b"")
    os.utime(data / "table" / "part.0.parquet", (1e9, 1e9))
    last = sessions.run()
    assert {name for name in other if last[name] != other[name]} == {"parquet"}


# -- in this process ------------------------------------------------------------------------------


def of(collection: Any) -> list[str]:
    return sorted(fingerprints(graph_of(collection)).of.values())


def inc(x: Any) -> Any:
    return x + 1


def draw() -> float:
    return random.random()


def test_keys_are_not_part_of_it() -> None:
    assert of(delayed(inc)(1)) == of(delayed(inc)(1))
    assert of(delayed(inc, name="one")(1)) == of(delayed(inc, name="two")(1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ("a", b"a"),
        (["a-b", "c"], ["a", "b-c"]),
        (np.array(["a-b", "c"], object), np.array(["a", "b-c"], object)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1, [2]], [[1], 2]),
        ((1, 2), [1, 2]),
        (np.ones((2, 3)), np.ones((3, 2))),
        (np.ones(4), np.ones(4, "f4")),
        (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2).T.copy().T),
        (np.eye(3), np.asfortranarray(np.eye(3))),
        (np.arange(4), np.arange(4).astype("m8[s]")),
        (partial(inc, 1), partial(inc, 2)),
        (slice(1), slice(2)),
        (range(3), range(4)),
        (np.float32(1), np.float64(1)),
        (int, float),
    ],
    ids=shown,
)
def test_arguments_that_differ_a_little(one: Any, other: Any) -> None:
    assert of(delayed(id)(one)) != of(delayed(id)(other))
    assert of(delayed(id)(one)) == of(delayed(id)(copy.deepcopy(one)))


def test_a_view_is_what_it_shows() -> None:
    base = np.arange(12.0).reshape(3, 4)
    assert of(delayed(inc)(base[:, ::2])) == of(delayed(inc)(base[:, ::2].copy()))
    assert of(delayed(inc)(base[:, ::2])) != of(delayed(inc)(base[:, 1::2]))


def test_an_object_that_holds_itself() -> None:
    knot: list[Any] = [1]
    knot.append(knot)
    longer: list[Any] = [1, 2]
    longer.append(longer)
    graph = graph_of(delayed(len, traverse=False)(delayed(knot, traverse=False)))
    other = graph_of(delayed(len, traverse=False)(delayed(longer, traverse=False)))
    assert not fingerprints(graph).reasons
    assert fingerprints(graph).of.values() != fingerprints(other).of.values()


def test_equal_tasks_are_kept_apart_in_the_order_of_the_graph() -> None:
    draws = [delayed(draw)() for _ in range(3)]
    graph = graph_of(delayed(list)(draws))
    found = fingerprints(graph).of
    own = [found[draw.key] for draw in draws]
    assert len(set(own)) == 3
    again = [delayed(draw)() for _ in range(3)]
    other = fingerprints(graph_of(delayed(list)(again))).of
    assert [other[draw.key] for draw in again] == own


def test_what_reads_another_of_two_equal_tasks_is_another_task() -> None:
    one, two = delayed(draw)(), delayed(draw)()
    readers = [delayed(inc)(one), delayed(inc)(two), delayed(inc)(one)]
    found = fingerprints(graph_of(delayed(list)(readers))).of
    assert len({found[reader.key] for reader in readers}) == 3


def test_what_cannot_be_taken_apart_has_none_and_says_why() -> None:
    lock = threading.Lock()

    def locked(x: Any) -> Any:
        with lock:
            return x

    first = delayed(inc)(1)
    second = [delayed(locked)(first) for _ in range(2)]
    last = delayed(sum)(second)
    found = fingerprints(graph_of(last))
    assert set(found.of) == {first.key}
    ((name, (count, reason)),) = found.reasons.items()
    assert (name, count) == ("locked", 2)
    assert "lock" in reason


def test_results_in_s3_are_known_by_their_names() -> None:
    from dask_lambda.graph import normalise
    from lambda_worker.protocol import Reference, load_reference

    def with_reference(name: str) -> list[str]:
        from dask._task_spec import Task, TaskRef

        nodes = {
            "block": Task("block", load_reference, Reference(name, 5)),
            "out": Task("out", inc, TaskRef("block")),
        }
        return sorted(fingerprints(normalise(nodes, ["out"])).of.values())

    assert with_reference("0/p/r/a") == with_reference("0/p/r/a")
    assert with_reference("0/p/r/a") != with_reference("0/p/r/b")


def test_arrays_with_the_same_content_under_other_names() -> None:
    data = np.arange(8.0)
    one = da.from_array(data, chunks=4, name="one").map_blocks(inc)
    two = da.from_array(data.copy(), chunks=4, name="two").map_blocks(inc)
    assert of(one) == of(two)


VERSIONED = """
import sys
sys.path.insert(0, sys.argv[1])
from dask import delayed
from dask_lambda.fingerprint import fingerprints
from tests.helpers import graph_of
if sys.argv[2] == "imported":
    import boxed_parts

def inside(x):
    import boxed_parts
    return boxed_parts.double(x)

made = delayed(boxed_parts.double if sys.argv[2] == "imported" else inside)(1)
print(fingerprints(graph_of(made)).of[made.key])
"""


@pytest.mark.parametrize("way", ["imported", "inside"])
def test_another_version_of_a_library_that_does_not_say_its_own_is_another_function(
    tmp_path: Path, way: str
) -> None:
    """Most have no ``__version__``, and some are called otherwise than what they bring."""
    library = tmp_path / "site-packages"
    about = library / "Boxed.dist-info"
    about.mkdir(parents=True)
    (library / "boxed_parts.py").write_text("def double(x):\n    return 2 * x\n")
    (about / "RECORD").write_text("boxed_parts.py,,\n")

    def found(version: str) -> str:
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Boxed\nVersion: {version}\n")
        command = [sys.executable, "-c", VERSIONED, str(library), way]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120
        )
        return done.stdout

    assert found("1.0") == found("1.0") != found("1.1")
