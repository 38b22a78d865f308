"""What is a library's and what is the user's own, and what code mentions.

May import: nothing.  Pure, but for where modules are found.

A library changes with its version, and is installed wherever it is needed.  All else is the user's
own: it may change at any time, and exists on this machine only.  An editable install is the user's
own as well, since its files are not among the installed ones.
"""

from __future__ import annotations

import dis
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from typing import Any

#: Our own packages change with their version, wherever they are installed.
OWN = frozenset({"dask_lambda", "lambda_worker"})
_MAIN = frozenset({"__main__", "__mp_main__"})
#: In the paths of installed packages, wherever their environment is (Debian has the second).
_FOLDERS = ("/site-packages/", "/dist-packages/")


def _paths() -> tuple[str, ...]:
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    paths.update(getattr(site, "getsitepackages", list)())
    paths.add(site.getusersitepackages())
    return tuple(_posix(path).rstrip("/") + "/" for path in paths if path)


def _posix(path: str) -> str:
    return path.replace("\\", "/")


_LIBRARIES = _paths()


def of_library(path: str) -> bool:
    """Whether a file or directory is a library's, or Python's own."""
    path = _posix(path) + "/"
    return path.startswith(_LIBRARIES) or any(folder in path for folder in _FOLDERS)


def is_library(module: str) -> bool:
    """Whether a module changes with a version number only, as far as is known without a search."""
    top = module.partition(".")[0]
    if top in _MAIN:
        return False
    if top in sys.stdlib_module_names or top in OWN:
        return True
    loaded = sys.modules.get(top)
    path = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", ())), None)
    return path is not None and of_library(path)


def spec_of(top: str) -> ModuleSpec | None:
    """Return where a top-level module was loaded from, or would be; None if nowhere."""
    spec = getattr(sys.modules.get(top), "__spec__", None)
    if isinstance(spec, ModuleSpec):
        return spec
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):  # loaded, and has no specification
        return None


# ---------------------------------------------------------------------------------------------
# distributions
# ---------------------------------------------------------------------------------------------


def distributions_of(top: str) -> list[tuple[str, str]]:
    """Return names and versions of the installed packages that a module comes with.

    ``sklearn`` is of ``scikit-learn``; several packages may share a namespace.
    """
    try:
        return [(top, metadata.version(top))]
    except (metadata.PackageNotFoundError, ValueError):  # distributed under another name
        names = sorted(set(_distributions().get(top, ())))
    return [(name, metadata.version(name)) for name in names]


@lru_cache(1)
def _distributions() -> Mapping[str, Sequence[str]]:
    return metadata.packages_distributions()


def requirement(top: str) -> str:
    """Return what to install for a module, in pip's words, for a message."""
    found = [f"{name}=={version}" for name, version in distributions_of(top)]
    return " or ".join(f"'{each}'" for each in found) or f"the package of {top!r}"


def missing_module(module: str) -> str:
    """Say what to do about a module that is not local, and that a worker could not import."""
    top = module.partition(".")[0]
    said = f"The package or module {module!r} is not installed on the worker"
    loaded = sys.modules.get(top)
    if distributions_of(top):
        return (
            f"{said}. Here it comes with {requirement(top)}: add that to what the function is "
            "made of (its deployment package, a layer, or its image)."
        )
    if loaded is not None and spec_of(top) is None:
        return (
            f"{said}. Here it was made while the program ran, and has no file that could travel: "
            f"cloudpickle.register_pickle_by_value(sys.modules[{top!r}]) sends what tasks use of "
            "it along."
        )
    return (
        f"{said}, and not known here as a package: add it to what the function is made of, or "
        "define what the task needs in the notebook or script itself."
    )


# ---------------------------------------------------------------------------------------------
# what code mentions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mentioned:
    """What code names, with all code inside it, sorted."""

    names: tuple[str, ...]  #: globals
    attributes: tuple[str, ...]
    imports: tuple[str, ...]  #: modules; relative ones begin with dots


@lru_cache(4096)
def mentioned(code: types.CodeType) -> Mentioned:
    """Return what code names."""
    names, attributes, imports = set[str](), set[str](), set[str]()
    for each in _with_inner(code):
        level: Any = 0  # is loaded two steps before an import
        before: Any = 0
        for step in dis.get_instructions(each):
            if step.opname == "EXTENDED_ARG":
                continue
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
                names.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                attributes.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                dots = level if isinstance(level, int) else 0
                imports.add("." * dots + step.argval)
            level, before = before, step.argval
    return Mentioned(tuple(sorted(names)), tuple(sorted(attributes)), tuple(sorted(imports)))


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def absolute(name: str, namespace: Mapping[str, Any]) -> str:
    """Return the full name of a module that code mentions; nothing if it has none.

    Parameters
    ----------
    name : str
        Of :attr:`Mentioned.imports`.
    namespace : mapping
        The globals of the code.
    """
    if not name.startswith("."):
        return name
    package = namespace.get("__package__")
    if not package:
        return ""
    try:
        return importlib.util.resolve_name(name, package)
    except ImportError:  # beyond the top
        return ""
