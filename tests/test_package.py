"""Packaging: what goes in, what is cut, how it is zipped, what is refused.

``tests/test_packaged.py`` has what needs a real build.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_lambda.deploy import elf, image, layers, package, trim, wheels
from dask_lambda.deploy.environment import (
    WORKER,
    Installed,
    digest,
    everything,
    find_installed,
    read_requirements,
    resolve,
)
from dask_lambda.deploy.layers import MAX_LAYERS, Size
from dask_lambda.deploy.platforms import Platform
from dask_lambda.errors import PackagingError
from lambda_worker.environment import FILE
from tests.runtime_api import HERE

LINUX = Platform("3.12", "x86_64", (2, 34))
ARM = Platform("3.12", "arm64", (2, 34))

# -- platforms -----------------------------------------------------------------------------------


def test_wheels_for_any_older_c_library_are_taken_and_newer_ones_come_first():
    tags = Platform("3.12", "arm64", (2, 18)).tags
    assert tags[:3] == ["manylinux_2_18_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert tags[-1] == "manylinux1_aarch64"
    assert not [tag for tag in tags if "2_19" in tag]


@pytest.mark.parametrize("python", ["3.7", "3.99", "4.0", "three"])
def test_a_python_that_lambda_has_not_is_refused_with_those_it_has(python):
    with pytest.raises(PackagingError, match=r"3\.12.*3\.13"):
        Platform.of_lambda(python)


def test_an_unknown_architecture_is_refused_with_those_that_there_are():
    with pytest.raises(PackagingError, match="x86_64 and arm64"):
        Platform.of_lambda("3.12", "riscv")


def test_workers_of_another_python_are_not_built(tmp_path):
    other = Platform("3.1", "x86_64", (2, 34))
    with pytest.raises(PackagingError, match=r"Python 3\.1 cannot be built with Python"):
        package.build(form="layers", platform=other, cache=tmp_path)


# -- what goes in --------------------------------------------------------------------------------


def having(*packages: Installed) -> Callable[[str], Installed | None]:
    return {each.name: each for each in packages}.get


NUMPY = Installed("numpy", "2.4.6")
PANDAS = Installed(
    "pandas", "3.1.1", ("numpy>=1.26", 'tzdata; sys_platform == "win32"', 'lxml; extra == "xml"')
)
LXML = Installed("lxml", "6.0")
MINE = Installed("mine", "1.0", asked=True, local="file:///home/me/mine", editable=True)


@pytest.mark.parametrize(
    ("asked", "packages"),
    [
        (["numpy"], ["numpy"]),
        (["pandas"], ["numpy", "pandas"]),
        (["Pandas>=3", "numpy"], ["numpy", "pandas"]),
        (["pandas[xml]"], ["lxml", "numpy", "pandas"]),
        (["pandas", "pandas[xml]"], ["lxml", "numpy", "pandas"]),
        (['numpy; sys_platform == "darwin"'], []),
        (['numpy; platform_machine == "aarch64"'], []),
    ],
)
def test_what_is_asked_for_comes_with_what_it_needs_on_lambda(asked, packages):
    found = resolve(asked, LINUX, having(NUMPY, PANDAS, LXML))
    assert list(found.packages) == packages
    assert not found.missing


def test_versions_are_the_clients_and_what_it_has_not_is_left_to_the_installer():
    found = resolve(["pandas", "new-one[a]>=2"], LINUX, having(NUMPY, PANDAS))
    assert found.packages == {"numpy": "2.4.6", "pandas": "3.1.1"}
    assert found.missing == ("new-one[a]>=2",)
    assert found.listed == {"pandas", "new-one"}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("numpy<2", "numpy<2 is asked for, but this Python has 2.4.6"),
        ("numpy ==", "not a requirement"),
        ("-e .", "not a requirement"),
        ("mine @ file:///tmp/mine", "names an address"),
        ("local", "install it in editable mode"),
        ("mine", "travel with the tasks"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_name(asked, text):
    local = Installed("local", "1.0", local="file:///home/me/local")
    with pytest.raises(PackagingError) as caught:
        resolve([asked], LINUX, having(NUMPY, local, MINE))
    assert text in str(caught.value)


def test_a_circle_of_requirements_ends():
    one = Installed("one", "1", ("two[x]",))
    two = Installed("two", "2", ("one", 'one[y]; extra == "x"'))
    assert list(resolve(["one"], LINUX, having(one, two)).packages) == ["one", "two"]


def test_nothing_that_a_worker_needs_brings_the_aws_sdk_along():
    found = resolve(package.environment.WORKER, LINUX, find_installed)
    assert {"numpy", "scipy", "dask", "obstore"} <= set(found.packages)
    assert not {"boto3", "botocore", "aiohttp", "pip", "ministack"} & set(found.packages)


def test_everything_is_what_nobody_else_needs_or_somebody_asked_for():
    every = [
        *(NUMPY, PANDAS, MINE),
        Installed("boto3", "1", ("botocore",)),
        Installed("botocore", "1"),
        Installed("pip", "26"),
        Installed("dask-lambda", "0.1", ("aiohttp",)),
        Installed("aiohttp", "3"),
        Installed("click", "8", asked=True),
        Installed("flask", "3", ("click",)),
    ]
    assert everything(every, LINUX) == ["click", "flask", "pandas"]


def test_a_requirements_file_is_read_with_its_comments_and_other_files(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("zarr>=3\n")
    (tmp_path / "a.txt").write_text(
        "# mine\npandas>=2 , \\\n  <4  # new\n\n-r more/b.txt\n"
        "numpy==2.4.6 --hash=sha256:00 \\\n  --hash=sha256:11\n"
    )
    read = read_requirements(tmp_path / "a.txt")
    assert [text.replace(" ", "") for text in read] == ["pandas>=2,<4", "zarr>=3", "numpy==2.4.6"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("numpy\n-e .\n", "line 2: '-e .' is an option"),
        ("--extra-index-url somewhere\n", "line 1"),
        ("numpy\n\n./mine\n", "line 3: './mine' is not a requirement"),
        ("-r not-there.txt\n", "not-there.txt' cannot be read"),
    ],
)
def test_a_requirements_file_with_something_else_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "requirements.txt").write_text(text)
    with pytest.raises(PackagingError) as caught:
        read_requirements(tmp_path / "requirements.txt")
    assert said in str(caught.value)


PACKAGES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("1234"), min_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PACKAGES, PACKAGES)
def test_environments_have_one_name_if_and_only_if_they_are_equal(one, other):
    shuffled = dict(reversed(list(one.items())))
    assert digest(one, LINUX, 1) == digest(shuffled, LINUX, 1)
    assert (digest(one, LINUX, 1) == digest(other, LINUX, 1)) == (one == other)
    assert len({digest(one, where, n) for where in (LINUX, ARM) for n in (1, 2)}) == 4


@pytest.mark.parametrize("name", ["dask", "Cloudpickle", "obstore"])
def test_what_the_worker_imports_cannot_be_left_out(tmp_path, name):
    with pytest.raises(PackagingError, match=f"without {name.lower()}"):
        package.build(without=["scipy", name], cache=tmp_path)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (["numpy"], "numpy is to be left out, but is needed by scipy: leave that out, too"),
        (["scpiy"], "scpiy is to be left out, but is not installed here: check the name"),
    ],
)
def test_what_would_not_be_left_out_is_said(tmp_path, without, said):
    with pytest.raises(PackagingError, match=said):
        package.build(without=without, cache=tmp_path)


# -- what an installer says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: Could not find a version that satisfies the requirement numpy==2.4.6 "
        "(from versions: 1.0, 2.2.6)\nERROR: No matching distribution found for numpy==2.4.6\n",
        "  × No solution found when resolving dependencies:\n  ╰─▶ Because numpy==2.4.6 has no "
        "wheels with a matching platform tag (e.g., `manylinux_2_26_x86_64`)\n",
        "error: No solution found when resolving dependencies\n  cause: Because numpy==2.4.6 has "
        "no usable wheels and you require numpy==2.4.6, we can conclude that ...\n",
    ],
    ids=["pip", "uv", "uv of today"],
)
def test_a_missing_wheel_is_named_with_what_to_do(said):
    old = wheels.understand(said, Platform("3.11", "x86_64", (2, 26)))
    assert isinstance(old, wheels.NoWheelError)
    assert "numpy==2.4.6" in str(old)
    assert "glibc 2.26" in str(old)
    assert "use Python 3.12" in str(old)
    assert "container image" in str(old)
    arm = str(wheels.understand(said, ARM))
    assert "build for x86_64" in arm
    assert "use Python" not in arm


def test_an_index_that_cannot_be_reached_is_not_taken_for_a_missing_wheel():
    said = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: No matching distribution found for numpy==2.4.6\n"
    )
    error = wheels.understand(said, LINUX)
    assert not isinstance(error, wheels.NoWheelError)
    assert "could not be reached" in str(error)


def test_a_name_that_nobody_has_is_to_be_checked():
    said = "ERROR: No matching distribution found for nunpy\n"
    assert "check the name nunpy, which is not installed" in str(wheels.understand(said, LINUX))


def test_any_other_failure_is_told_in_the_installers_words():
    assert "strange words" in str(wheels.understand("some strange words", LINUX))


# -- what is cut ---------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lib/__init__.py", None),
        ("lib/core.py", None),
        ("lib/data.json", None),
        ("lib/fast.so", None),
        ("lib/tests/test_core.py", "tests"),
        ("lib/tests/data/big.csv", "tests"),
        ("lib/sub/test/test_sub.py", "tests"),
        ("lib/conftest.py", "tests"),
        ("lib/test/client.py", None),
        ("lib/testing/__init__.py", None),
        ("lib/core.pyi", "stubs"),
        ("lib/py.typed", None),
        ("lib/core.pyx", "sources"),
        ("lib/include/api.h", "sources"),
        ("lib/docs/index.html", "docs"),
        ("lib/docs/examples.py", None),
        ("bin/lib", "scripts"),
        ("share/man/man1/lib.1", "scripts"),
        ("share/proj/proj.db", None),
        ("lib/__pycache__/core.cpython-312.pyc", "bytecode"),
        ("lib-1.0.dist-info/RECORD", "metadata"),
        ("lib-1.0.dist-info/METADATA", None),
        ("lib-1.0.dist-info/entry_points.txt", None),
        ("lib-1.0.dist-info/licenses/LICENSE", None),
    ],
)
def test_each_kind_of_file_is_cut_or_kept(tmp_path, name, why):
    cuts = trim.plan(tree(tmp_path, {name: ""}))
    assert [cut.why for cut in cuts] == [why] * (why is not None)


@pytest.mark.parametrize(
    "statement",
    [
        "from lib.tests import helper",
        "from lib.tests.helper import x",
        "import lib.tests.helper as h",
        "from .tests.helper import (x,\n    y)",
        "from . import tests\nfrom .tests import helper",
        "def f():\n    from .tests import (  # late\n        helper)",
    ],
)
def test_tests_that_are_imported_by_what_stays_stay_too(tmp_path, statement):
    tree(
        tmp_path,
        {
            "lib/__init__.py": "",
            "lib/core.py": statement,
            "lib/tests/__init__.py": "",
            "lib/tests/helper.py": "from .other import x\ny = 2",
            "lib/tests/other.py": "x = 1",
            "lib/tests/test_core.py": "import lib.tests.helper",
        },
    )
    assert [str(cut.path) for cut in trim.plan(tmp_path)] == ["lib/tests/test_core.py"]


def test_a_stub_that_says_what_to_load_stays(tmp_path):
    tree(
        tmp_path,
        {
            "lib/__init__.py": "import lazy_loader\nlazy_loader.attach_stub(__name__, __file__)",
            "lib/__init__.pyi": "from . import a",
            "lib/a.pyi": "",
        },
    )
    assert [str(cut.path) for cut in trim.plan(tmp_path)] == ["lib/a.pyi"]


def test_a_library_is_left_out_if_the_same_one_is_loaded_before(tmp_path):
    tree(
        tmp_path,
        {
            "numpy.libs/libgfortran.so": "one",
            "scipy.libs/libgfortran.so": "one",
            "scipy.libs/libblas.so": "blas",
            "numpy.libs/libother.so": "one",
            "scipy.libs/libother.so": "two",
            "other.libs/libgfortran.so": "one",
        },
    )
    (cut,) = trim.plan(tmp_path)
    assert (str(cut.path), cut.why, cut.nbytes) == ("scipy.libs/libgfortran.so", "duplicates", 3)


def test_what_is_cut_is_gone_with_its_empty_folders_and_nothing_else(tmp_path):
    tree(tmp_path, {"lib/a.py": "", "lib/tests/deep/test_x.py": "", "lib/c/x.h": "", "lib/c/d": ""})
    trim.apply(tmp_path, trim.plan(tmp_path))
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == ["lib", "lib/a.py", "lib/c", "lib/c/d"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: b"\x7fELF\x02\x01" + b))
def test_any_file_may_be_called_a_library(content):
    once = elf.strip(content)
    assert len(once) <= len(content)
    assert elf.strip(once) == once


@pytest.mark.skipif(sys.platform != "linux", reason="libraries of Linux")
def test_a_library_keeps_all_that_is_loaded_and_works(tmp_path):
    library = next(Path(np.__file__).parent.rglob("_multiarray_umath*.so"))
    before = library.read_bytes()
    after = elf.strip(before)
    assert len(after) < len(before)
    assert after[64:] == before[64 : len(after)]
    assert elf.strip(after) == after


def test_compiled_modules_have_no_date_and_say_where_they_will_be(tmp_path):
    compiled = []
    for name, date in (("one", 1e9), ("two", 1.5e9)):
        tree(tmp_path / name, {"lib/a.py": "def f():\n    return {'x', 'y', 'z'}"})
        os.utime(tmp_path / name / "lib" / "a.py", (date, date))
        trim.compile_all(tmp_path / name, "/opt/python", processes=1)
        (path,) = (tmp_path / name).rglob("*.pyc")
        compiled.append(path.read_bytes())
    assert compiled[0] == compiled[1]
    assert b"/opt/python/lib/a.py" in compiled[0]
    assert str(tmp_path).encode() not in compiled[0]


# -- layers --------------------------------------------------------------------------------------

SIZES = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4), st.integers(0, 250), max_size=20
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES, st.randoms(use_true_random=False))
def test_every_package_is_in_one_layer_and_there_are_not_too_many(sizes, random):
    shares = layers.share_out(sizes, target=100)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert 1 <= len(shares) <= MAX_LAYERS
    if sum(sizes.values()) <= 250:  # what Lambda allows, in these units
        assert all(len(s) == 1 or sum(sizes[n] for n in s) <= 100 for s in shares)
    shuffled = random.sample(list(sizes.items()), len(sizes))
    assert layers.share_out(dict(shuffled), target=100) == shares


def test_equal_files_give_equal_zips_whatever_their_dates_and_order(tmp_path):
    made = []
    for name, date in (("one", 1e9), ("two", 1.5e9)):
        root = tree(tmp_path / name, {"b/x.py": "x", "a.py": "a", "c/run": "c"})
        (root / "c" / "run").chmod(0o777 if name == "one" else 0o700)
        for path in root.rglob("*"):
            os.utime(path, (date, date))
        order = ["a.py", "b/x.py", "c/run"]
        layers.write_zip(tmp_path / f"{name}.zip", root, order if name == "one" else order[::-1])
        made.append((tmp_path / f"{name}.zip").read_bytes())
    assert made[0] == made[1]
    with zipfile.ZipFile(io.BytesIO(made[0])) as archive:
        assert archive.namelist() == ["python/a.py", "python/b/x.py", "python/c/run"]
        modes = [oct(entry.external_attr >> 16) for entry in archive.infolist()]
    assert modes == ["0o100644", "0o100644", "0o100755"]


def test_another_content_gives_another_hash(tmp_path):
    tree(tmp_path, {"a": "1"})
    one = layers.write_zip(tmp_path / "one.zip", tmp_path, ["a"])
    tree(tmp_path, {"a": "2"})
    assert layers.write_zip(tmp_path / "two.zip", tmp_path, ["a"]) != one


def test_what_is_too_large_is_refused_with_what_takes_the_room():
    sizes = [Size("torch", "2.13", 900_000_000), Size("numpy", "2.4.6", 50_000_000)]
    with pytest.raises(PackagingError) as caught:
        layers.check(sizes, layers.MAX_UNZIPPED, "layers", "Use an image.")
    text = str(caught.value)
    assert "950 MB unzipped, and layers may have 262 MB" in text  # Lambda's 250 MiB
    assert "torch 2.13 (900 MB), numpy 2.4.6 (50 MB)" in text
    assert text.endswith("Use an image.")
    layers.check(sizes[1:], layers.MAX_UNZIPPED, "layers", "")


def test_a_layer_that_is_too_large_for_a_request_goes_through_s3():
    small = layers.Layer("a", "", layers.MAX_DIRECT, 0, ())
    assert not small.through_s3
    assert layers.Layer("a", "", layers.MAX_DIRECT + 1, 0, ()).through_s3


# -- the image -----------------------------------------------------------------------------------


def test_the_recipe_copies_what_is_there_and_starts_the_runtime_client():
    text = image.dockerfile(ARM, "lambda_worker.handler.handler")
    assert "ARG BASE=python:3.12-" in text
    assert 'ENTRYPOINT ["python", "-m", "awslambdaric"]' in text
    assert 'CMD ["lambda_worker.handler.handler"]' in text
    copied = [line.split()[1] for line in text.splitlines() if line.startswith("COPY")]
    assert copied == [f"{image.PACKAGES}/", f"{image.WORKER}/"]


def test_without_docker_the_recipe_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackagingError) as caught:
        image.build(tmp_path / "context", "name:tag", ARM)
    assert str(tmp_path / "context") in str(caught.value)
    assert "--platform linux/arm64" in str(caught.value)


# -- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A cache in which an environment of nothing but a file is kept; its directory."""
    directory = tmp_path / "environments" / "0123"
    tree(directory, {"tree/a.py": "a = 1"})
    sha256 = layers.write_zip(directory / "layer-1.zip", directory / "tree", ["a.py"])
    manifest = {
        "digest": "0123",
        "form": "layers",
        "platform": {"python": "3.12", "architecture": "x86_64", "glibc": [2, 34]},
        "packages": {"a": "1"},
        "listed": ["a"],
        "layers": [
            {
                "file": "layer-1.zip",
                "sha256": sha256,
                "nbytes": 100,
                "unzipped": 5,
                "packages": ["a"],
            }
        ],
        "sizes": [{"name": "a", "version": "1", "nbytes": 5}],
        "cuts": {},
    }
    (directory / package.MANIFEST).write_text(json.dumps(manifest))
    return directory


def test_what_was_built_is_found_again(small, tmp_path):
    found = package.read(small)
    assert found is not None
    assert not found.fresh
    assert found.platform == LINUX
    assert found.unzipped == 5
    assert [each.digest for each in package.kept(tmp_path)] == ["0123"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "layer-1.zip").write_bytes(b"PK"),
        lambda d: (d / "layer-1.zip").unlink(),
        lambda d: (d / package.MANIFEST).write_text("{"),
        lambda d: (d / package.MANIFEST).write_text("{}"),
        lambda d: shutil.rmtree(d),
    ],
)
def test_what_is_damaged_is_not_taken_for_an_environment(small, tmp_path, damage):
    damage(small)
    assert package.read(small) is None
    assert package.kept(tmp_path) == []


@pytest.mark.parametrize("there", ["another one", "a damaged one", "nothing"])
def test_of_two_builds_one_is_kept(small, tmp_path, there):
    new = shutil.copytree(small, tmp_path / "new")
    if there == "a damaged one":
        (small / "layer-1.zip").write_bytes(b"")
    elif there == "nothing":
        shutil.rmtree(small)
    kept = package._keep(new, small)
    assert kept.directory == small
    assert package.read(small) is not None
    assert new.exists() == (there == "another one")  # its owner removes it


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(wheels.NoWheelError):
        package.build(form="layers", platform=HERE, cache=tmp_path)
    assert list((tmp_path / "environments").iterdir()) == []


@pytest.mark.parametrize("because", ["", "it is too large for layers"])
def test_an_image_that_somebody_asked_for_does_not_keep_layers_from_being_tried(
    tmp_path, monkeypatch, because
):
    job = package._Job("image", Platform.of_lambda(image=True), WORKER, tmp_path / "environments")
    manifest = {
        "digest": job.digest,
        "form": "image",
        "platform": dataclasses.asdict(job.platform),
        "packages": job.packages,
        "listed": [],
        "layers": [],
        "sizes": [],
        "cuts": {},
        "because": because,
    }
    files = {package.MANIFEST: json.dumps(manifest), f"{image.PACKAGES}/{FILE}": ""}
    tree(job.parent / job.digest, files)
    assert package.build(form="image", cache=tmp_path).because == because

    # Layers cannot be built here, so that what is said shows whether they were tried.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    found = package.build(cache=tmp_path)
    assert (found.digest, found.fresh) == (job.digest, False)
    assert found.because == because or "there is no wheel of" in found.because
    assert found.because


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert package.cache_directory() == Path("/somewhere/dask-lambda")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(PackagingError, match="XDG_CACHE_HOME"):
        package.build(form="layers", platform=HERE, cache=tmp_path / "cache")


def test_the_functions_own_code_is_the_same_each_time_and_compiled():
    code = package.function_code()
    assert code == package.function_code()
    names = zipfile.ZipFile(io.BytesIO(code)).namelist()
    assert "lambda_worker/handler.py" in names
    assert any(name.startswith("lambda_worker/__pycache__/handler.") for name in names)
    assert not [name for name in names if name.startswith("dask_lambda")]
