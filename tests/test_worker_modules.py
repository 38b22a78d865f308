"""The archives of local modules in one environment: what is found, and what is not."""

from __future__ import annotations

import importlib
import importlib.resources
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lambda_worker import modules as worker
from lambda_worker.errors import RequestError
from lambda_worker.modules import LocalModules
from lambda_worker.protocol import archive_digest
from tests.helpers import forget_modules, write_files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalModules]:
    """The archives of an environment whose temporary directory is ``tmp_path / "tmp"``."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    found = LocalModules()
    yield found
    found.close()
    forget_modules(tmp_path)
    assert os.listdir(tmp_path / "tmp") == []


def zipped(**files: str) -> bytes:
    """An archive of single modules."""
    return raw({f"{name}.py": text for name, text in files.items()})


def raw(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return buffer.getvalue()


def use(here: LocalModules, data: bytes | None) -> int:
    """Use an archive as an invocation does; how often it had to be fetched."""
    fetched: list[bytes] = []

    def fetch() -> Any:
        assert data is not None
        fetched.append(data)
        return memoryview(data)

    here.use(None if data is None else archive_digest(data), fetch)
    return len(fetched)


def value_of(name: str) -> Any:
    return importlib.import_module(name).x


def test_modules_are_found_while_their_archive_is_in_use(here):
    before = list(sys.path)
    use(here, zipped(travelled="x = 1"))
    assert value_of("travelled") == 1
    use(here, None)
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        import travelled  # noqa: F401


def test_a_changed_module_takes_the_place_of_what_was_loaded(here):
    for x in (1, 2):
        use(here, zipped(a=f"from b import x as y\nx = {x}, y", b=f"x = -{x}"))
        assert value_of("a") == (x, -x)
    use(here, zipped(a="from b import x as y\nx = 2, y", b="x = -3"))
    assert value_of("a") == (2, -3)  # although its own file is the same


def test_runs_that_alternate_fetch_and_import_nothing_twice(here):
    archives = [zipped(mine="x = []"), zipped(mine="x = [0]"), None]
    assert [use(here, data) for data in archives] == [1, 1, 0]
    found = []
    for data in archives[:2]:
        use(here, data)
        value_of("mine").append("kept")
        found.append(sys.modules["mine"])
    for _ in range(2):
        for data, module in zip(archives[:2], found, strict=True):
            assert use(here, data) == 0
            assert sys.modules["mine"] is module
        use(here, None)
        assert "mine" not in sys.modules
    assert [module.x for module in found] == [["kept"], [0, "kept"]]


def test_the_same_archive_again_changes_nothing(here):
    data = zipped(steady="x = []")
    use(here, data)
    value_of("steady").append(1)
    assert use(here, data) == 0
    assert value_of("steady") == [1]


def test_what_is_installed_under_the_same_name_is_hidden_as_it_was_on_the_client(
    here, tmp_path, monkeypatch
):
    write_files(tmp_path / "installed", {"utils/__init__.py": "x = 'installed'"})
    monkeypatch.syspath_prepend(tmp_path / "installed")
    assert value_of("utils") == "installed"
    installed = sys.modules["utils"]
    use(here, zipped(utils="x = 'own'"))
    assert value_of("utils") == "own"
    use(here, None)
    assert sys.modules["utils"] is installed


def test_what_was_loaded_when_the_environment_started_is_never_replaced(here):
    before = importlib.import_module("lambda_worker.protocol")
    files = ("lambda_worker/__init__.py", "lambda_worker/protocol.py", "lambda_worker/new.py")
    use(here, raw(dict.fromkeys((*files, "json.py"), "x = 1")))
    assert sys.modules["lambda_worker.protocol"] is before
    assert not hasattr(sys.modules["json"], "x")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lambda_worker.new")


def test_packages_find_their_data_and_each_other(here):
    inner = "import importlib.resources as r\nx = r.files('pack').joinpath('t.txt').read_text()"
    use(
        here,
        raw(
            {
                "pack/__init__.py": "from .inner import x",
                "pack/inner.py": inner,
                "pack/t.txt": "data",
            }
        ),
    )
    assert value_of("pack") == "data"


def test_a_namespace_may_be_installed_in_part(here, tmp_path, monkeypatch):
    write_files(tmp_path / "installed", {"space/there.py": "x = 1"})
    monkeypatch.syspath_prepend(tmp_path / "installed")
    for _ in range(2):
        assert value_of("space.there") == 1
        use(here, raw({"space/here.py": "x = 2", "space/data.txt": "data"}))
        assert (value_of("space.here"), value_of("space.there")) == (2, 1)
        assert importlib.resources.files("space").joinpath("data.txt").read_text() == "data"
        use(here, None)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("space.here")


@pytest.mark.parametrize(
    "name",
    ["../out.py", "/out.py", "a/../../out.py", "a\\..\\out.py", "C:out.py", "a//b.py", "./a"],
)
def test_an_archive_that_would_leave_its_directory_is_refused(here, tmp_path, name):
    with pytest.raises(RequestError, match="holds"):
        use(here, raw({"good.py": "", name: ""}))
    assert os.listdir(tmp_path / "tmp") == []
    assert not list(tmp_path.rglob("out.py"))


def damaged() -> bytes:
    data = bytearray(zipped(cut="x = 'to be overwritten'"))
    place = data.index(b"overwritten")
    data[place : place + 3] = b"???"
    return bytes(data)


@pytest.mark.parametrize("make", [lambda: b"no zip file", damaged])
def test_what_is_no_archive_is_refused(here, make: Callable[[], bytes]):
    with pytest.raises(RequestError, match="cannot be read"):
        use(here, make())


def test_an_archive_is_the_one_that_was_announced(here):
    with pytest.raises(RequestError, match="announced"):
        here.use(archive_digest(zipped(a="")), lambda: zipped(a="x = 1"))


def test_after_a_failure_the_next_archive_works(here):
    good = zipped(fine="x = 1")
    use(here, good)
    with pytest.raises(RequestError):
        use(here, b"no zip file")
    with pytest.raises(ModuleNotFoundError):
        import fine  # noqa: F401
    assert use(here, good) == 0
    assert value_of("fine") == 1


def test_old_archives_are_removed_from_the_disk(here, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MAX_DISK_BYTES", 1000)
    for number in range(6):
        use(here, zipped(many=f"x = {number}"))
    assert len(os.listdir(tmp_path / "tmp")) == worker.MAX_ARCHIVES
    large = zipped(many="x = 'large'", padding="#" * 985)
    use(here, large)
    assert use(here, zipped(many="x = 5")) == 1
    assert use(here, large) == 1
    assert value_of("many") == "large"
    assert len(os.listdir(tmp_path / "tmp")) == 1
    with pytest.raises(RequestError, match="bytes"):
        use(here, zipped(padding="#" * 2000))


def test_a_task_that_changes_the_path_does_no_harm(here):
    use(here, zipped(own="x = 1"))
    sys.path.pop(0)
    use(here, None)
    use(here, zipped(own="x = 2"))
    assert value_of("own") == 2
