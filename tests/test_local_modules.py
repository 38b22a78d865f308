"""Which modules are the user's own, and what of them travels."""

from __future__ import annotations

import io
import os
import site
import sys
import zipfile
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import dask
import pytest
from dask._task_spec import Task
from hypothesis import given
from hypothesis import strategies as st

from dask_lambda import local_modules
from dask_lambda.errors import ConfigurationError, LocalModulesError
from dask_lambda.libraries import absolute, mentioned, missing_module
from dask_lambda.local_modules import LocalModules, imports_of, locate, mentions_of
from dask_lambda.pickling import FunctionCache
from tests.helpers import forget_modules, write_files


def packed(roots: Any, **settings: Any) -> dict[str, bytes]:
    """The files that travel for some top-level modules."""
    data = LocalModules(**settings).archive([roots] if isinstance(roots, str) else roots).data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# -- which are local -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("json", "numpy", "yaml", "_thread", "__main__", "no_such_module", "no name"),
        *("lambda_worker", "dask_lambda", "dask", "cloudpickle"),
    ],
)
def test_pythons_installed_and_the_workers_own_modules_are_not_local(name):
    assert locate(name) == ()


@pytest.mark.parametrize("loaded", [False, True])
def test_files_and_packages_on_the_path_are_local_loaded_or_not(project, tmp_path, loaded):
    project({"own_file.py": "", "own_package/__init__.py": ""})
    if loaded:
        import own_package  # noqa: F401
    assert locate("own_file") == (str(tmp_path / "project/own_file.py"),)
    assert locate("own_package") == (str(tmp_path / "project/own_package"),)


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_what_is_installed_in_another_environment_is_not_local(tmp_path, monkeypatch, folder):
    write_files(tmp_path / folder, {"foreign_file.py": "", "foreign_package/__init__.py": ""})
    monkeypatch.syspath_prepend(tmp_path / folder)
    assert locate("foreign_file") == locate("foreign_package") == ()


def test_an_editable_install_by_a_path_is_local(tmp_path, monkeypatch):
    write_files(tmp_path, {"src/by_path/__init__.py": ""})
    write_files(tmp_path / "site-packages", {"__editable__.by_path.pth": f"{tmp_path / 'src'}\n"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    site.addsitedir(str(tmp_path / "site-packages"))
    assert locate("by_path") == (str(tmp_path / "src/by_path"),)


def test_an_editable_install_by_a_finder_is_local(tmp_path, monkeypatch):
    """As setuptools makes them for layouts that one path cannot express."""
    write_files(tmp_path, {"lib/__init__.py": "import by_finder.inner", "lib/inner.py": ""})

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name == "by_finder":
                return spec_from_file_location(name, tmp_path / "lib/__init__.py")
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert locate("by_finder") == (str(tmp_path / "lib"),)
    assert packed("by_finder").keys() == {"by_finder/__init__.py", "by_finder/inner.py"}
    forget_modules(tmp_path)


def test_an_editable_install_by_a_link_is_local(tmp_path, monkeypatch):
    write_files(tmp_path, {"src/by_link/__init__.py": "", "cache/cached.py": ""})
    (tmp_path / "site-packages/installed").mkdir(parents=True)
    (tmp_path / "site-packages/by_link").symlink_to(tmp_path / "src/by_link")
    for name in ("cached.py", "installed/__init__.py"):  # as uv installs, if it is told so
        (tmp_path / "site-packages" / name).symlink_to(tmp_path / "cache/cached.py")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    assert packed("by_link").keys() == {"by_link/__init__.py"}
    assert locate("cached") == locate("installed") == ()


def test_of_a_namespace_the_local_portions_travel(tmp_path, monkeypatch):
    for place, module in [("here", "one"), ("there", "two"), ("site-packages", "three")]:
        write_files(tmp_path / place, {f"shared_space/{module}.py": ""})
        monkeypatch.syspath_prepend(tmp_path / place)
    assert packed("shared_space").keys() == {"shared_space/one.py", "shared_space/two.py"}


def test_a_module_without_a_file_is_not_local(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_at_run_time", ModuleType("made_at_run_time"))
    assert locate("made_at_run_time") == ()
    assert "register_pickle_by_value" in missing_module("made_at_run_time")


# -- what travels --------------------------------------------------------------------------------


def test_a_package_travels_with_its_data_and_without_what_is_no_part_of_it(project):
    project(
        {
            "whole/__init__.py": "",
            "whole/inner/deep.py": "x = 1",
            "whole/data/table.csv": "1,2",
            "whole/tests/test_it.py": "",
            "whole/.env": "SECRET=1",
            "whole/.git/config": "",
            "whole/__pycache__/deep.cpython-311.pyc": b"",
            "whole/node_modules/left.js": "",
            "whole/venv/pyvenv.cfg": "",
            "whole/venv/lib/big.py": "",
        }
    )
    assert packed("whole") == {
        "whole/__init__.py": b"",
        "whole/inner/deep.py": b"x = 1",
        "whole/data/table.csv": b"1,2",
        "whole/tests/test_it.py": b"",
    }


def test_links_are_followed_and_may_lead_back(project, tmp_path):
    project({"linked/__init__.py": "", "elsewhere/more.py": ""})
    (tmp_path / "project/linked/more").symlink_to(tmp_path / "project/elsewhere")
    (tmp_path / "project/linked/again").symlink_to(tmp_path / "project/linked")
    (tmp_path / "project/linked/nowhere.py").symlink_to(tmp_path / "nowhere")
    assert packed("linked").keys() == {"linked/__init__.py", "linked/more/more.py"}


@pytest.mark.parametrize(("platform", "travels"), [("linux", True), ("darwin", False)])
def test_what_is_compiled_travels_from_linux_only(project, monkeypatch, platform, travels):
    project({"fast/__init__.py": "", "fast/core.cpython-311-linux.so": b"\x7fELF"})
    monkeypatch.setattr(local_modules.sys, "platform", platform)
    assert ("fast/core.cpython-311-linux.so" in packed("fast")) is travels


def test_imports_are_followed_through_local_modules(project):
    project(
        {
            "first.py": "import json, numpy, second.deep as s, missing_one\n",
            "second/__init__.py": "",
            "second/deep.py": "def f():\n    from third import x\n",
            "third.py": "import first, importlib\nimportlib.import_module('fourth')\n",
            "fourth.py": "from . import nothing\nthis is no Python",
            "unrelated.py": "",
        }
    )
    assert packed("first").keys() == {
        *("first.py", "second/__init__.py", "second/deep.py", "third.py", "fourth.py")
    }


def test_imports_are_found_wherever_they_are():
    source = (
        b"import a.b, c as d\nfrom e.f import g\nfrom . import h\nfrom .i import j\n"
        b"if x:\n  try:\n    import k\n  except ImportError:\n    l = __import__('m.n')\n"
    )
    assert imports_of(source) == {"a", "c", "e", "k", "m"}
    assert imports_of(b"no python\0") == frozenset()


@pytest.mark.parametrize(
    "source",
    [
        *("import a", "import a.b as c, d", "import  a , d.e", "import b, \\\n  a, d"),
        *(
            "from a import b",
            "from a.b.c import (d,\n e)",
            "from a \\\n import *",
            "x = 1; import a",
        ),
        *("if x: import a", "try:\n\timport a\nexcept: pass", "def f():\n  from a import b"),
        *("__import__('a')", 'importlib.import_module( "a.b")', "import ä; import a"),
    ],
)
def test_what_a_source_seems_to_import_is_never_less_than_what_it_does(source):
    exact = imports_of(source.encode())
    assert exact & {"a", "b", "d"}
    assert exact <= mentions_of(source.encode())


def test_what_a_text_only_seems_to_import_does_not_travel(project):
    project({"talker.py": '"""How to import silent, from silent import all."""\n', "silent.py": ""})
    assert "silent" in mentions_of(b"import silent, from")
    assert packed("talker").keys() == {"talker.py"}


@pytest.mark.parametrize(
    "path", sorted(Path(dask.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_of_real_sources_no_import_is_overlooked(path):
    source = path.read_bytes()
    assert imports_of(source) <= mentions_of(source)


@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z]{1,5}/[a-z]{1,5}\.py", fullmatch=True),
        st.binary(max_size=50),
        max_size=5,
    )
)
def test_equal_files_make_equal_archives(files):
    again = dict(reversed(files.items()))
    assert local_modules._zip(files) == local_modules._zip(again)
    changed = {**files, "a/b.py": files.get("a/b.py", b"") + b"#"}
    assert local_modules._zip(files) != local_modules._zip(changed)


def test_an_archive_says_nothing_of_when_and_where_it_was_made(project, tmp_path):
    project({"steady.py": "x = 1"})
    first = LocalModules().archive(["steady"])
    os.utime(tmp_path / "project/steady.py", (0, 0))
    assert LocalModules().archive(["steady"]) == first


def test_a_run_reads_a_file_once_and_the_next_run_anew(project):
    project({"edited.py": "x = 1", "added.py": ""})
    run = LocalModules()
    run.archive(["edited"])
    project({"edited.py": "x = 2"})

    def read(archive: Any) -> bytes:
        return zipfile.ZipFile(io.BytesIO(archive.data)).read("edited.py")

    assert read(run.archive(["edited", "added"])) == b"x = 1"
    assert read(LocalModules().archive(["edited", "added"])) == b"x = 2"


# -- includes and excludes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("big", set()),
        ("big.part", {"big/__init__.py", "big/data/a.bin"}),
        ("big/data/*", {"big/__init__.py", "big/part.py"}),
        ("*.bin", {"big/__init__.py", "big/part.py"}),
        ("bi", {"big/__init__.py", "big/part.py", "big/data/a.bin"}),
    ],
)
def test_modules_and_files_are_excluded(project, pattern, left):
    project({"big/__init__.py": "", "big/part.py": "", "big/data/a.bin": b"1"})
    assert packed("big", exclude=[pattern]).keys() == left


def test_what_is_excluded_is_neither_noted_nor_followed(project):
    project({"one.py": "import two", "two.py": "import three", "three.py": ""})
    modules = LocalModules(exclude=["two"])
    modules.note("two")
    modules.note("one")
    assert modules.roots == {"one"}
    assert packed("one", exclude=["two"]).keys() == {"one.py"}


def test_what_is_included_travels_whoever_mentions_it(project):
    project({"plugin/__init__.py": "", "plugin/a.py": ""})
    assert LocalModules(include=["plugin.a"]).roots == {"plugin"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("json", "on every worker"),
        ("dask.array", "on every worker"),
        ("yaml", r"is installed .*Install 'PyYAML==.*' where the function is"),
        ("no_such_module", "not found here"),
        ("excluded", "to be included and to be excluded"),
    ],
)
def test_what_cannot_be_included_is_said(name, said):
    with pytest.raises(ConfigurationError, match=said):
        LocalModules(include=[name], exclude=["excluded"])


def test_too_large_modules_are_refused_with_what_is_largest_and_what_to_do(project, tmp_path):
    project({"heavy/__init__.py": "", "heavy/small.bin": b"1", "heavy/big.bin": b""})
    os.truncate(tmp_path / "project/heavy/big.bin", local_modules.MAX_BYTES)
    with pytest.raises(LocalModulesError) as caught:
        LocalModules().archive(["heavy"])
    assert "The largest: heavy/big.bin (64.0 MB), heavy/small.bin" in str(caught.value)
    assert "modules.exclude('heavy')" in str(caught.value)
    assert "heavy/small.bin" in packed("heavy", exclude=["heavy/big.bin"])


def test_several_modules_may_be_too_large_together(project, tmp_path, monkeypatch):
    monkeypatch.setattr(local_modules, "MAX_BYTES", 100)
    project({"half.py": "import other_half\n" + "#" * 50, "other_half.py": "#" * 60})
    assert packed("other_half")
    with pytest.raises(LocalModulesError, match=r"half.py .*, other_half.py .*exclude"):
        LocalModules().archive(["half"])


def test_what_is_no_file_is_not_opened(project, tmp_path):
    project({"piped/__init__.py": ""})
    os.mkfifo(tmp_path / "project/piped/pipe")  # opening it would wait without end
    assert packed("piped").keys() == {"piped/__init__.py"}


def test_what_was_deleted_after_its_import_is_not_local_any_more(project, tmp_path):
    project({"gone/__init__.py": ""})
    import gone  # noqa: F401

    (tmp_path / "project/gone/__init__.py").unlink()
    assert locate("gone") == ()


# -- what is remembered, and what was missed -----------------------------------------------------


def test_a_run_that_reads_what_others_stored_has_their_modules(project):
    project({"stored.py": "", "vanished.py": ""})
    remembered: set[str] = set()
    LocalModules(include=["vanished"], remembered=remembered).note("stored.part")
    later = LocalModules(exclude=["vanished"], remembered=remembered)
    assert later.roots == set()
    later.recall()
    assert later.roots == {"stored"}


def test_a_module_that_a_worker_missed_is_supplied_once(project):
    project({"missed.py": "", "noted.py": ""})
    modules = LocalModules()
    modules.note("noted")
    assert modules.supply("missed", known=1)
    assert modules.supply("missed", known=1)  # by another request of that time
    assert not modules.supply("missed", known=2)
    assert not modules.supply("noted", known=1)
    assert not modules.supply("numpy.no_such_part", known=2)
    assert modules.roots == {"missed", "noted"}


def test_what_is_missing_is_explained(project):
    project({"left_out.py": "", "unseen.py": "", "sent/__init__.py": ""})
    modules = LocalModules(exclude=["left_out"])
    modules.archive(["sent"])
    assert "modules.exclude keeps it" in modules.advice("left_out.part")
    assert "modules.include('unseen')" in modules.advice("unseen")
    assert "travelled with the tasks, but without 'sent.core'" in modules.advice("sent.core")
    assert "Here it comes with 'PyYAML==" in modules.advice("yaml")
    assert "not known here" in modules.advice("no_such_module")


# -- what is noted while tasks are pickled -------------------------------------------------------

HELPER = """
import functools

CONSTANT = 1

def function(x=0):
    return x

@functools.lru_cache
def cached(x=0):
    return x

class Kind:
    def method(self):
        return 1
"""


def noted(value: object) -> set[str]:
    """The local modules that are noted while a task is pickled."""
    modules = LocalModules()
    functions = FunctionCache(modules.note)
    for _ in range(2):
        functions.dumps(Task("t", print, value), buffer_callback=lambda buffer: True)
    return set(modules.roots)


def test_what_is_pickled_by_name_is_noted(project):
    project({"helper.py": HELPER})
    import helper

    own = helper.Kind()
    named = [helper.function, helper.cached, helper.Kind, own, own.method, helper, {"a": [own]}]
    assert [noted(each) for each in named] == [{"helper"}] * len(named)
    assert noted(helper.CONSTANT) == set()


def test_what_functions_by_value_use_is_noted(project):
    project({"helper.py": HELPER, "inner.py": "", "deeper.py": ""})
    import helper

    def closes():
        return helper.function()

    def imports():
        import inner

        return inner

    def nested():
        def within():
            from deeper import x

            return x, imports()

        return within

    class Derived(helper.Kind):
        def other(self):
            import inner

            return inner

    assert noted(closes) == {"helper"}
    assert noted(imports) == {"inner"}
    assert noted(nested) == {"inner", "deeper"}
    assert noted(Derived()) == {"helper", "inner"}


def test_what_is_registered_to_travel_by_value_is_not_noted(project):
    source = "import helper\ndef f():\n    import inner\n    return helper.function()"
    project({"by_value.py": source, "helper.py": HELPER, "inner.py": ""})
    import by_value

    cloudpickle.register_pickle_by_value(by_value)
    try:
        assert noted(by_value.f) == noted(by_value) | {"inner"} == {"helper", "inner"}
    finally:
        cloudpickle.unregister_pickle_by_value(by_value)


def test_a_relative_import_in_a_function_means_its_package():
    def f():
        from ..d.e import f
        from . import a
        from .b import c

        return a, c, f

    imports = mentioned(f.__code__).imports
    assert imports == (".", "..d.e", ".b")
    inside = {"__package__": "top.inner"}
    assert [absolute(name, inside) for name in imports] == ["top.inner", "top.d.e", "top.inner.b"]
    assert [absolute(name, {}) for name in imports] == ["", "", ""]
    assert absolute("json", {}) == "json"


def test_the_users_path_is_as_it_was(project):
    before = list(sys.path)
    project({"quiet.py": "raise RuntimeError('imported')"})
    assert packed("quiet")
    assert sys.path == before
    assert "quiet" not in sys.modules
