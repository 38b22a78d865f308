"""What a saved collection is, apart from its blocks: its kind, its shape, and where they are.

May import: stored, kept_folder, kept_runs, errors, the ground; Dask's collections late.

A description is a value of built-in types that is sealed and stored like any other.  It holds
nothing of Dask's own, so that another version of Dask can load what this one has saved.  What is
NumPy's or pandas' (types, empty examples, divisions) is a pickle of its own inside, which is opened
after the versions were looked at.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dask.base import is_dask_collection
from dask.highlevelgraph import HighLevelGraph
from dask.utils import typename

from dask_lambda.errors import VersionMismatchError
from dask_lambda.kept_folder import kept_prefix
from dask_lambda.kept_runs import KeptRun
from dask_lambda.stored import StoredBlock, stored_block
from lambda_worker import protocol
from lambda_worker.protocol import Key, Reference

#: Version of this format.
FORMAT = 1
#: Packages whose objects are in blocks and descriptions, if they are loaded.
PACKAGES = ("dask", "numpy", "pandas", "pyarrow")

Kind = Literal["array", "frame", "bag", "item", "delayed"]
#: How several collections were handed over.
Layout = Literal["one", "tuple", "list", "dict"]

logger = logging.getLogger("dask_lambda")


@dataclass(frozen=True, slots=True)
class Form:
    """One collection without its blocks.

    Attributes
    ----------
    kind : {"array", "frame", "bag", "item", "delayed"}
        A frame is a DataFrame, Series, Index or Scalar; an item is one element of a bag.
    blocks : int
    shape : tuple
        Chunks of an array, None for an unknown size; ``(length,)`` of a delayed value, if it has
        one.
    pickled : bytes
        Type and example of an array; example and divisions of a frame.
    what : str
        The collection in a few words.
    """

    kind: Kind
    blocks: int
    shape: tuple[Any, ...]
    pickled: bytes
    what: str

    @classmethod
    def of(cls, collection: Any) -> Form:
        """Describe a collection.

        Raises
        ------
        TypeError
            If it is none that can be saved.
        """
        kind = kind_of(collection)
        if kind == "array":
            known = tuple(
                tuple(None if math.isnan(size) else int(size) for size in axis)
                for axis in collection.chunks
            )
            sizes = (str(s) if s == s else "?" for s in collection.shape)
            return cls(
                kind,
                math.prod(map(len, known)),
                known,
                _pickled((collection.dtype, collection._meta)),
                f"array ({', '.join(sizes)}) of {collection.dtype}",
            )
        if kind == "frame":
            meta, divisions = collection._meta, tuple(collection.divisions)
            what = type(collection).__name__.lower()
            if what == "dataframe":
                what += f" of {len(collection.columns)} columns"
            return cls(kind, len(divisions) - 1, (), _pickled((meta, divisions)), what)
        if kind == "bag":
            return cls(kind, collection.npartitions, (), b"", "bag")
        if kind == "item":
            return cls(kind, 1, (), b"", "bag item")
        length = collection._length
        return cls(kind, 1, () if length is None else (length,), b"", "delayed value")

    def rebuild(self, name: str, references: Sequence[Reference], said: str) -> Any:
        """Build the collection whose blocks are loaded from where they are.

        Parameters
        ----------
        name : str
            In Dask's keys; another one for other blocks.
        references : sequence of Reference
        said : str
            Of which versions the pickles are, for an error.

        Raises
        ------
        VersionMismatchError
            If types and examples cannot be unpickled.
        """
        match self.kind:
            case "array":
                return self._array(name, references, said)
            case "frame":
                return self._frame(name, references, said)
            case "bag":
                from dask.bag import Bag

                keys = [(name, number) for number in range(self.blocks)]
                return Bag(_graph(name, keys, references), name, self.blocks)
            case "item":
                from dask.bag.core import Item

                return Item(_graph(name, [name], references), name)
            case "delayed":
                from dask.delayed import Delayed

                length = self.shape[0] if self.shape else None
                return Delayed(name, _graph(name, [name], references), length)

    def _array(self, name: str, references: Sequence[Reference], said: str) -> Any:
        from itertools import product

        from dask.array import Array

        dtype, meta = _unpickled(self.pickled, said)
        chunks = tuple(tuple(math.nan if s is None else s for s in axis) for axis in self.shape)
        places = product(*(range(len(axis)) for axis in chunks))
        keys = [(name, *place) for place in places]
        return Array(_graph(name, keys, references), name, chunks, dtype=dtype, meta=meta)

    def _frame(self, name: str, references: Sequence[Reference], said: str) -> Any:
        from dask.dataframe import from_graph

        meta, divisions = _unpickled(self.pickled, said)
        keys = [(name, number) for number in range(self.blocks)]
        return from_graph(Blocks(name, keys, references), meta, divisions, keys, "saved")


class Blocks(Mapping[Key, StoredBlock]):
    """The graph of a frame, of which Dask asks for a token: that of its name will do."""

    def __init__(self, name: str, keys: Iterable[Key], references: Iterable[Reference]):
        self._name = name
        self._nodes = dict(_nodes(keys, references))

    def __getitem__(self, key: Key) -> StoredBlock:
        return self._nodes[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __dask_tokenize__(self) -> Any:
        return "dask_lambda", "saved", self._name


@dataclass(frozen=True, slots=True)
class Description:
    """One saved collection, or several.

    Attributes
    ----------
    layout : {"one", "tuple", "list", "dict"}
    names : tuple of str
        The keys of a dict.
    forms : tuple of Form
    """

    layout: Layout
    names: tuple[str, ...]
    forms: tuple[Form, ...]

    @classmethod
    def of(cls, x: Any) -> tuple[Description, list[Any]]:
        """Describe what a user wants to save.

        Returns
        -------
        (Description, list)
            With the collections, as they are to be computed.

        Raises
        ------
        TypeError
            If it is neither a collection that can be saved nor a tuple, list or dict of those.
        """
        layout: Layout = "one"
        names: tuple[str, ...] = ()
        collections = [x]
        if type(x) is dict:
            layout, names, collections = "dict", tuple(x), list(x.values())
            if not all(type(name) is str for name in names):
                raise TypeError("the keys of a dict of collections that is saved must be strings")
        elif type(x) in (tuple, list):
            layout, collections = ("tuple" if type(x) is tuple else "list"), list(x)
        for each in collections:  # all of them, before one is looked into
            kind_of(each)
        if not collections:
            raise TypeError(f"there is no collection in this {layout}: nothing can be saved")
        # What partitions there are is known when the frame has been optimised.
        ready = [each.optimize() if kind_of(each) == "frame" else each for each in collections]
        return cls(layout, names, tuple(map(Form.of, ready))), ready

    @property
    def what(self) -> str:
        """What it is, in a few words."""
        blocks = sum(form.blocks for form in self.forms)
        count = "1 block" if blocks == 1 else f"{blocks:,} blocks"
        words = [form.what for form in self.forms]
        if self.layout == "dict":
            words = [f"{name}: {word}" for name, word in zip(self.names, words, strict=True)]
        if len(words) > 3:
            words[3:] = [f"{len(words) - 3} more"]
        return f"{'; '.join(words)}; {count}"

    def identity(self, labels: Sequence[str]) -> str:
        """Return what is the same for what is the same collection, in any session.

        Parameters
        ----------
        labels : sequence of str
            Fingerprints of the blocks.
        """
        hasher = hashlib.sha256(repr((self.layout, self.names)).encode())
        for form in self.forms:
            hasher.update(repr((form.kind, form.blocks, form.shape, form.what)).encode())
        hasher.update("\n".join(labels).encode())
        return hasher.hexdigest()

    def to_value(self, record: KeptRun, references: Sequence[Reference]) -> dict[str, Any]:
        """Describe the collection, and where its blocks are, in built-in types.

        Parameters
        ----------
        record : KeptRun
            The blocks are objects of this run.
        references : sequence of Reference
            To the blocks of one collection after the other, each in the order of its keys.
        """
        return {
            "format": FORMAT,
            "versions": versions(),
            "layout": self.layout,
            "names": self.names,
            "forms": [asdict(form) for form in self.forms],
            "blocks": "\n".join(each.name.partition(f"/{record.run}/")[2] for each in references),
            "sizes": [each.size for each in references],
        }

    @classmethod
    def from_value(
        cls, record: KeptRun, value: Mapping[str, Any]
    ) -> tuple[Description, list[Reference]]:
        """Inverse of :meth:`to_value`.

        Raises
        ------
        VersionMismatchError
            If another version of the format was written.
        """
        if value["format"] != FORMAT:
            raise VersionMismatchError(
                f"{record.name!r} was saved in format {value['format']}, and this version of "
                f"dask_lambda reads format {FORMAT}: use the version that saved it"
            )
        description = cls(
            value["layout"], tuple(value["names"]), tuple(Form(**form) for form in value["forms"])
        )
        prefix = kept_prefix(record.place.prefix)
        references = []
        for block, size in zip(value["blocks"].splitlines(), value["sizes"], strict=True):
            label, attempt, rest = block.partition("~/")
            name = protocol.object_name(prefix, record.run, label) + attempt + rest
            references.append(Reference(name, size))
        return description, references

    def rebuild(self, record: KeptRun, references: Sequence[Reference], written: Any) -> Any:
        """Build what was saved, of collections whose blocks are loaded from where they are.

        Parameters
        ----------
        record : KeptRun
        references : sequence of Reference
        written : dict
            The versions with which it was saved.

        Raises
        ------
        VersionMismatchError
            If what is NumPy's or pandas' cannot be unpickled with the versions that are here.
        """
        assert record.saved is not None
        said = _differences(record.name, written)
        if said:
            logger.warning("%s", said)
        found = []
        token = record.saved.label.rpartition("-")[2]
        for number, form in enumerate(self.forms):
            own, references = references[: form.blocks], references[form.blocks :]
            name = f"saved-{form.kind}-" + protocol.key_label((record.run, token, number))
            found.append(form.rebuild(name, own, said))
        if self.layout == "dict":
            return dict(zip(self.names, found, strict=True))
        if self.layout == "one":
            return found[0]
        return tuple(found) if self.layout == "tuple" else found


def kind_of(collection: Any) -> Kind:
    """Return which kind of collection something is.

    Raises
    ------
    TypeError
        If it is none that can be saved.
    """
    if is_dask_collection(collection):
        where: tuple[tuple[Kind, str, str], ...] = (
            ("array", "dask.array.core", "Array"),
            ("frame", "dask.dataframe.dask_expr._collection", "FrameBase"),
            ("bag", "dask.bag.core", "Bag"),
            ("item", "dask.bag.core", "Item"),
            ("delayed", "dask.delayed", "Delayed"),
        )
        for kind, module, name in where:
            if module in sys.modules and isinstance(collection, getattr(sys.modules[module], name)):
                return kind
    raise TypeError(
        f"a {typename(type(collection))} cannot be saved: save takes a Dask array, dataframe "
        "(series, index, scalar), bag or delayed value, or a tuple, list or dict of those"
    )


def versions() -> dict[str, str]:
    """Return the versions with which pickles are written here."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in PACKAGES:
        version = getattr(sys.modules.get(package), "__version__", None)
        if version is not None:
            found[package] = str(version)
    return found


def _differences(name: str, written: Mapping[str, str]) -> str:
    """Say which versions differ so much that pickles may mean something else."""
    here = versions()
    differing = [
        f"{package} {version} (here {here[package]})"
        for package, version in written.items()
        if package in here and _main(package, version) != _main(package, here[package])
    ]
    return f"{name!r} was saved with {', '.join(differing)}" if differing else ""


def _main(package: str, version: str) -> str:
    """Return what of a version must agree: of Dask nothing, since nothing of it is pickled."""
    if package == "dask":
        return ""
    return version if package == "python" else version.partition(".")[0]


def _pickled(value: Any) -> bytes:
    import cloudpickle

    return bytes(cloudpickle.dumps(value, protocol=5))


def _unpickled(data: bytes, said: str) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:
        raise VersionMismatchError(
            f"the types of a saved collection cannot be unpickled ({type(error).__name__}: "
            f"{error}){': ' + said if said else ''}. Install the packages, and the versions, with "
            "which it was saved"
        ) from error


def _nodes(
    keys: Iterable[Key], references: Iterable[Reference]
) -> Iterator[tuple[Key, StoredBlock]]:
    for key, reference in zip(keys, references, strict=True):
        yield key, stored_block(key, reference)


def _graph(name: str, keys: Iterable[Key], references: Iterable[Reference]) -> HighLevelGraph:
    nodes: dict[Any, Any] = dict(_nodes(keys, references))
    return HighLevelGraph.from_collections(name, nodes)
