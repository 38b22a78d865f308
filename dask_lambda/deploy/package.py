"""The worker's environment as something that Lambda takes: resolved, built, trimmed, checked, kept.

May import: all of deploy but what creates things on AWS; local_start for the worker's own code,
errors, the ground.

An environment is named by a hash of what goes in.  It is built once, in a directory of the cache
that gets its name when it is complete, so that an interrupted build is never taken for a whole one;
after that, :func:`build` finds it there.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import platform as this_platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dask_lambda import local_start
from dask_lambda.deploy import environment, image, layers, trim, wheels
from dask_lambda.deploy.artifact import Recipe
from dask_lambda.deploy.layers import Layer, Size
from dask_lambda.deploy.platforms import Platform
from dask_lambda.errors import PackagingError
from lambda_worker.environment import FILE, Deployed, normal_name

#: What a worker imports before its first call (``DASK_LAMBDA_PREIMPORT``): what most tasks need.
PREIMPORT = "numpy,dask.array"
#: Where Lambda unpacks a function's own code.
CODE_PATH = "/var/task"
#: The handler is imported with the packages; nothing needs so long.
CHECK_SECONDS = 300
#: Builds that were killed are removed after that.
ABANDONED_SECONDS = 24 * 3600.0

MANIFEST = "manifest.json"
Form = Literal["layers", "image"]

_CHECK = """
import sys
sys.path[:0] = sys.argv[1:3]
import importlib
for name in sys.argv[3:]:
    importlib.import_module(name)
"""


@dataclass(frozen=True, slots=True)
class Package:
    """An environment that is built and can be deployed.

    Attributes
    ----------
    digest : str
        Of all that went in; it travels with every reply of a worker.
    form : {"layers", "image"}
    platform : Platform
    packages : dict
        Name to version.
    listed : tuple of str
        What was asked for.
    layers : tuple of Layer
        To be published in any order; none for an image.
    sizes : tuple of Size
        What takes the room, the largest first.
    cuts : dict
        What was left out: why, to bytes.
    directory : Path
        Where the layers' files are, or the image's context.
    fresh : bool
        It was built now, and not found in the cache.
    because : str
        Why it is an image, if nobody asked for one.
    """

    digest: str
    form: Form
    platform: Platform
    packages: Mapping[str, str]
    listed: tuple[str, ...]
    layers: tuple[Layer, ...]
    sizes: tuple[Size, ...]
    cuts: Mapping[str, int]
    directory: Path
    fresh: bool = True
    because: str = ""

    @property
    def unzipped(self) -> int:
        """Bytes that the packages take on Lambda."""
        return sum(size.nbytes for size in self.sizes)


def build(
    packages: Sequence[str] = (),
    *,
    requirements: Path | None = None,
    everything: bool = False,
    without: Sequence[str] = (),
    architecture: str = "x86_64",
    form: Form | Literal["auto"] = "auto",
    cache: Path | None = None,
    platform: Platform | None = None,
) -> Package:
    """Build the environment of the workers, or find it built.

    Parameters
    ----------
    packages : sequence of str
        Requirements besides what every worker needs, such as "pandas" or "dask[dataframe]": each is
        taken in the version that this interpreter has.
    requirements : Path, optional
        A file with more of them.
    everything : bool
        All that this interpreter has, but what only the client needs.
    without : sequence of str
        Names of what no task needs and would be there otherwise, "scipy" for example.
    architecture : {"x86_64", "arm64"}
    form : {"auto", "layers", "image"}
        "auto": layers; an image if they would be too large, or if a package has no wheel for the C
        library of Lambda's own runtime.
    cache : Path, optional
        Default: ``dask-lambda`` in the user's directory of caches.
    platform : Platform, optional
        In place of the one that ``architecture`` and ``form`` mean.

    Returns
    -------
    Package

    Raises
    ------
    PackagingError
        If it cannot be built; it says which package is to blame and what to do.
    """
    if platform is not None and platform.python != _this_python():  # before the index is asked
        raise PackagingError(
            f"workers with Python {platform.python} cannot be built with Python "
            f"{_this_python()}: both sides must have the same"
        )
    unwanted = _unwanted(without)
    asked = [*environment.WORKER, *packages]
    if requirements is not None:
        asked += environment.read_requirements(requirements)
    parent = (cache or cache_directory()) / "environments"
    forms: tuple[Form, ...] = ("layers", "image") if form == "auto" else (form,)
    jobs = []
    for each in forms:
        where = platform or Platform.of_lambda(architecture=architecture, image=each == "image")
        every = environment.everything(environment.all_installed(), where) if everything else []
        wanted = [r for r in [*asked, *every] if environment.name_of(r) not in unwanted]
        jobs.append(_Job(each, where, wanted, parent))
    _check_left_out(unwanted, jobs[0].resolved)
    if (
        len(jobs) == 2
        and (there := jobs[1].find())
        and there.because  # layers were tried before; else somebody has asked for an image
        and not jobs[0].find()
    ):
        return there
    for job in jobs[:-1]:
        try:
            return job.find() or job.run()
        except (wheels.NoWheelError, _TooLarge) as error:
            jobs[-1].because = str(error)
    if found := jobs[-1].find():
        return dataclasses.replace(found, because=jobs[-1].because or found.because)
    return jobs[-1].run()


def _unwanted(names: Sequence[str]) -> set[str]:
    unwanted = {normal_name(name) for name in names}
    if needed := sorted(unwanted & environment.INDISPENSABLE):
        raise PackagingError(f"no worker starts without {', '.join(needed)}")
    return unwanted


def _check_left_out(unwanted: Collection[str], resolved: environment.Resolved) -> None:
    """Refuse to leave out what will be there all the same, and what nobody knows."""
    for name in sorted(unwanted):
        if name in resolved.packages:
            raise PackagingError(
                f"{name} is to be left out, but is needed by "
                f"{', '.join(sorted(resolved.needed_by[name]))}: leave that out, too"
            )
        if environment.find_installed(name) is None:
            raise PackagingError(
                f"{name} is to be left out, but is not installed here: check the name"
            )


class _TooLarge(PackagingError):
    """Larger than layers may be."""


class _Job:
    """One form of one environment."""

    def __init__(self, form: Form, platform: Platform, asked: Sequence[str], parent: Path):
        self.form = form
        self.platform = platform
        self.parent = parent
        self.because = ""
        if form == "image":
            asked = [*asked, image.RUNTIME_CLIENT]
        self.resolved = environment.resolve(asked, platform, environment.find_installed)
        self._packages: dict[str, str] | None = None

    @property
    def packages(self) -> dict[str, str]:
        """Name to version of all; asks the index for what is not installed here."""
        if self._packages is None:
            self._packages = wheels.complete(
                self.resolved.packages, self.resolved.missing, self.platform
            )
        return self._packages

    @property
    def digest(self) -> str:
        content = {**self.packages, "": self.form}
        return environment.digest(content, self.platform, trim.VERSION)

    def find(self) -> Package | None:
        """Look into the cache."""
        return read(self.parent / self.digest)

    def run(self) -> Package:
        """Build it."""
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.parent)
            directory = Path(tempfile.mkdtemp(prefix=".building-", dir=self.parent))
        except OSError as error:
            raise PackagingError(
                f"the cache {self.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME"
            ) from error
        try:
            self._build(directory)
            return _keep(directory, self.parent / self.digest)
        except OSError as error:
            raise PackagingError(f"the packages cannot be built in {directory}: {error}") from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _build(self, directory: Path) -> None:
        tree = directory / image.PACKAGES
        wheels.install(self.packages, self.platform, tree)
        owners = _owners(tree)
        modules = _modules(owners, self.resolved.listed)
        cuts = trim.plan(tree)
        trim.apply(tree, cuts)
        why = Counter({"symbols": trim.strip_all(tree)})
        for cut in cuts:
            why[cut.why] += cut.nbytes
        trim.compile_all(tree, layers.PATH if self.form == "layers" else image.ROOT)
        (tree / FILE).write_text(
            Deployed(self.digest, self.packages, self.resolved.listed).to_json(), "utf-8"
        )
        files = _files(tree, owners)
        sizes = sorted(
            (
                Size(name, self.packages[name], sum((tree / f).stat().st_size for f in files[name]))
                for name in files
            ),
            key=lambda size: (-size.nbytes, size.name),
        )
        self._check_size(sizes)
        check_imports(tree, modules, self.platform)
        made = self._layers(directory, tree, files, sizes) if self.form == "layers" else []
        manifest = {
            "digest": self.digest,
            "form": self.form,
            "platform": dataclasses.asdict(self.platform),
            "packages": self.packages,
            "listed": sorted(self.resolved.listed),
            "layers": [dataclasses.asdict(layer) for layer in made],
            "sizes": [dataclasses.asdict(size) for size in sizes],
            "cuts": dict(why.most_common()),
            "because": self.because,
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")

    def _check_size(self, sizes: Sequence[Size]) -> None:
        if self.form == "image":
            layers.check(
                sizes, layers.MAX_IMAGE, "a container image", "Leave out what no task needs."
            )
            return
        try:
            layers.check(
                sizes,
                layers.MAX_UNZIPPED - layers.OWN_CODE,
                "a function's layers",
                "Leave out what no task needs (scipy, perhaps), or build a container image, which "
                "may have 10 GB.",
            )
        except PackagingError as error:
            raise _TooLarge(str(error)) from None

    def _layers(
        self,
        directory: Path,
        tree: Path,
        files: Mapping[str, Collection[str]],
        sizes: Sequence[Size],
    ) -> list[Layer]:
        """Write the zip files; the last one, which changes with every package, has the list."""
        nbytes = {size.name: size.nbytes for size in sizes}
        shares = layers.share_out(nbytes)

        def write(place: int) -> Layer:
            name = f"layer-{place + 1}.zip"
            share = shares[place]
            content = [file for package in share for file in files[package]]
            content += [FILE] * (place + 1 == len(shares))
            sha256 = layers.write_zip(directory / name, tree, content)
            unzipped = sum(nbytes[package] for package in share)
            return Layer(name, sha256, (directory / name).stat().st_size, unzipped, tuple(share))

        with ThreadPoolExecutor() as pool:  # compressing does not hold Python's lock
            made = list(pool.map(write, range(len(shares))))
        shutil.rmtree(tree)
        return made


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


# ---------------------------------------------------------------------------------------------
# which file is whose
# ---------------------------------------------------------------------------------------------


def _owners(tree: Path) -> dict[str, str]:
    """Map each file of unpacked wheels to the package that brought it."""
    owners = {}
    for record in sorted(tree.glob("*.dist-info/RECORD")):
        name = normal_name(record.parent.name.split("-")[0])
        with open(record, encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                if row:
                    owners[row[0]] = name
    return owners


def _modules(owners: Mapping[str, str], listed: Collection[str]) -> list[str]:
    """Name the top-level modules of what was asked for."""
    found = set()
    for path, name in owners.items():
        top, _, rest = path.partition("/")
        if name in listed and not top.startswith(("_", ".")):
            if rest == "__init__.py":
                found.add(top)
            elif not rest and path.endswith((".py", ".so")):
                found.add(top.split(".")[0])
    return sorted(found - {"tests", "test", "docs", "examples", "benchmarks"})


def _files(tree: Path, owners: Mapping[str, str]) -> dict[str, list[str]]:
    """Share all files out to packages; what was compiled belongs to its source's."""
    files: dict[str, list[str]] = {name: [] for name in owners.values()}
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder, name).relative_to(tree)
            if path.name == FILE:
                continue
            if path.parent.name == "__pycache__":
                source = (path.parents[1] / (name.split(".")[0] + ".py")).as_posix()
            else:
                source = path.as_posix()
            owner = owners.get(source) or owners.get(f"{path.parts[0]}/__init__.py")
            if owner is None:  # of no package that says so: it goes with any, and is not lost
                owner = next(iter(sorted(files)))
            files[owner].append(path.as_posix())
    return files


# ---------------------------------------------------------------------------------------------
# checking
# ---------------------------------------------------------------------------------------------


def runs_here(platform: Platform) -> bool:
    """Whether what is built for a platform can be imported by this interpreter."""
    name, _, version = (_libc() or "").partition(" ")
    if sys.platform != "linux" or name != "glibc" or this_platform.machine() != platform.machine:
        return False
    return tuple(map(int, version.split(".")[:2])) >= platform.glibc


def _libc() -> str | None:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return None


def check_imports(tree: Path, modules: Sequence[str], platform: Platform) -> bool:
    """Import the worker and some modules with nothing but the packages at hand.

    Returns
    -------
    bool
        Whether this machine could do that.

    Raises
    ------
    PackagingError
        If something cannot be imported.
    """
    if not runs_here(platform):
        return False
    with tempfile.TemporaryDirectory(prefix="dask-lambda-") as code:
        unpack_worker(Path(code))
        names = ["lambda_worker.handler", "dask.array", *modules]
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-c", _CHECK, str(tree), code, *names],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=CHECK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PackagingError(
                f"importing {', '.join(names)} took more than {CHECK_SECONDS} s"
            ) from None
    if done.returncode:
        raise PackagingError(
            "the packages cannot be imported as they would be deployed: leave out the one that "
            f"fails, or install another version of it.\n{done.stderr.strip()[-2000:]}"
        )
    return True


# ---------------------------------------------------------------------------------------------
# the worker's own code
# ---------------------------------------------------------------------------------------------


def unpack_worker(directory: Path) -> None:
    """Write ``lambda_worker`` into a directory."""
    with zipfile.ZipFile(io.BytesIO(local_start.worker_code())) as archive:
        archive.extractall(directory)


def function_code() -> bytes:
    """Return the function's own code, ``lambda_worker``, as a zip file; compiled, for cold starts.

    Equal sources and interpreters give equal bytes.
    """
    with tempfile.TemporaryDirectory(prefix="dask-lambda-") as directory:
        root = Path(directory, "code")
        unpack_worker(root)
        trim.compile_all(root, CODE_PATH, processes=1)
        target = Path(directory, "code.zip")
        files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        layers.write_zip(target, root, files, folder="")
        return target.read_bytes()


def image_recipe(package: Package, handler: str = local_start.HANDLER) -> Recipe:
    """Complete the directory from which an image is built: the worker as it is now, and the recipe.

    The tag names the packages, the worker and the recipe: equal ones are not pushed again.
    """
    code = package.directory / image.WORKER
    shutil.rmtree(code, ignore_errors=True)
    unpack_worker(code)
    trim.compile_all(code, image.ROOT, processes=1)
    recipe = image.dockerfile(package.platform, handler)
    (package.directory / "Dockerfile").write_text(recipe, "utf-8")
    content = hashlib.sha256(local_start.worker_code() + recipe.encode()).hexdigest()
    tag = f"{package.digest}-{content[:16]}"
    why = package.because.partition(": ")[0]  # what to do about it is done
    return Recipe(package.directory, package.platform, tag, why)


# ---------------------------------------------------------------------------------------------
# the cache
# ---------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Return where environments are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dask-lambda"


def read(directory: Path) -> Package | None:
    """Read an environment that was built; nothing if it is not there, or not whole."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text("utf-8"))
        made = tuple(
            Layer(**{**layer, "packages": tuple(layer["packages"])}) for layer in manifest["layers"]
        )
        for layer in made:
            if layers.sha256_of(directory / layer.file) != layer.sha256:
                return None
        if manifest["form"] == "image" and not (directory / image.PACKAGES / FILE).is_file():
            return None
        where = manifest["platform"]
        return Package(
            manifest["digest"],
            manifest["form"],
            Platform(where["python"], where["architecture"], tuple(where["glibc"])),
            manifest["packages"],
            tuple(manifest["listed"]),
            made,
            tuple(Size(**size) for size in manifest["sizes"]),
            manifest["cuts"],
            directory,
            fresh=False,
            because=manifest.get("because", ""),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept(cache: Path | None = None) -> list[Package]:
    """Return all environments of the cache."""
    parent = (cache or cache_directory()) / "environments"
    found = [read(path) for path in sorted(parent.glob("[0-9a-f]*"))]
    return [package for package in found if package is not None]


def _keep(directory: Path, target: Path) -> Package:
    """Give a complete build its name, unless another process was quicker."""
    package = read(directory)
    assert package is not None
    try:
        directory.rename(target)
    except OSError:
        if read(target) is None:  # what is there is damaged
            shutil.rmtree(target)
            directory.rename(target)
    return dataclasses.replace(package, directory=target, fresh=True)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(".building-*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
