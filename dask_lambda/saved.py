"""Collections that outlive the process: ``save(x, "name")``, and ``load("name")`` in another one.

May import: scheduler, resume, description, graph, kept_folder, kept_runs, errors, the ground.

A saved collection is a kept run whose record names a *description*: one more sealed object in the
run's folder, which tells what the collection is and which objects are its blocks.  The record is
what counts: it is replaced in one step when all is there, and what it does not mention any more is
deleted afterwards.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches
from functools import partial
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.base import collections_to_expr
from dask.core import flatten
from toolz.functoolz import identity

from dask_lambda import kept_runs
from dask_lambda.description import Description
from dask_lambda.errors import ConfigurationError, IntegrityError, LostDataError
from dask_lambda.graph import Graph
from dask_lambda.kept_folder import DESCRIPTION, Folder, kept_prefix, label_of, new_label
from dask_lambda.kept_runs import KeptRun, Saved
from dask_lambda.plan import Plan
from dask_lambda.resume import Resumption
from dask_lambda.reuse import Reuse
from dask_lambda.scheduler import chosen
from lambda_worker import codec, protocol
from lambda_worker.protocol import Key, Reference


def save(
    x: Any, name: str, *, overwrite: bool = False, scheduler: Any = None, **kwargs: Any
) -> Any:
    """Compute a collection and keep its blocks in S3, to be loaded in any later session.

    If it breaks off, the same call goes on where it was.  If the very same collection is saved
    under this name already, nothing is computed.

    Parameters
    ----------
    x : dask collection, or a tuple, list or dict (with strings as keys) of collections
        Arrays, dataframes with series, indices and scalars, bags with their items, and delayed
        values.
    name : str
        Up to 100 letters, digits, dots, dashes and underscores.
    overwrite : bool
        Whether something else that has this name may be replaced: another saved collection, or a
        computation with ``resume=name``.  All is computed anew then, but for what the same call
        has done if it broke off.  Until the new collection is complete, the old one stays and can
        be loaded, so it may be read by what is computed (``save(load("a") + 1, "a",
        overwrite=True)``), and its blocks may be part of it.  Collections that were loaded before
        lose their blocks then.
    scheduler : LambdaScheduler, optional
        Default: the one in Dask's configuration, or the one behind ``lambda_get``.
    **kwargs
        As for ``compute``: ``retries``, ``max_cost_usd``, ``optimize_graph``, ...

    Returns
    -------
    The same collection, or tuple, list or dict, whose blocks are loaded from S3: what
    :func:`load` returns.

    Raises
    ------
    TypeError
        If ``x`` cannot be saved.
    ConfigurationError
        If the name is taken, is no name, or is used by another process at this moment.
    The tasks' own exceptions, and those of :mod:`dask_lambda.errors`; nothing is spent before the
    two above.

    See Also
    --------
    load : In another process, or another day.
    """
    kept_runs.check_name(name)
    for each in ("resume", "keep"):
        if each in kwargs:
            raise ConfigurationError(f"save() takes no {each!r}: it goes on by itself")
    description, collections = Description.of(x)
    runner = chosen(scheduler, "collections are saved and loaded by")
    expression = collections_to_expr(collections, kwargs.pop("optimize_graph", True)).optimize()
    keys: list[Key] = []
    for form, each in zip(description.forms, expression.__dask_keys__(), strict=True):
        own = list(flatten(each))
        # Beside other collections Dask does not keep the order of a frame's partitions.
        keys += sorted(own) if form.kind == "frame" else own
    assert len(keys) == sum(form.blocks for form in description.forms)
    saving = partial(Saving, description=description, keys=keys, overwrite=overwrite)
    runner.persist_under(expression, keys, saving, resume=name, keep=False, **kwargs)
    return load(name, scheduler=runner)


def load(name: str, *, scheduler: Any = None) -> Any:
    """Rebuild a collection that was saved; no block is downloaded before it is needed.

    Computed with a scheduler of this package, blocks go from S3 to the workers that need them.

    Parameters
    ----------
    name : str
    scheduler : LambdaScheduler, optional
        Default: the one in Dask's configuration, or the one behind ``lambda_get``.

    Returns
    -------
    What :func:`save` was given: a collection, or a tuple, list or dict of collections.

    Raises
    ------
    ConfigurationError
        If nothing is saved under this name, or its bucket is not the one that is configured.
    LostDataError
        If it was deleted behind our back.
    IntegrityError
        If its description is not what was saved.
    VersionMismatchError
        If it was saved with versions of the packages from which these here cannot read.
    """
    record = kept_runs.read(name)
    if record is None or record.saved is None:
        raise ConfigurationError(_nothing_saved(name, record))
    bucket = chosen(scheduler, "collections are saved and loaded by").open_kept(record)
    try:
        value = bucket.load(_described(record, record.saved))
    except LostDataError as error:
        raise LostDataError(
            f"the saved collection {name!r} is gone: its objects were deleted from bucket "
            f"{record.place.bucket!r} (by hand, or by a lifecycle rule?). Save it again, or remove "
            f"what is left: dask-lambda runs delete {name}"
        ) from error
    except IntegrityError as error:
        raise IntegrityError(
            f"the saved collection {name!r} cannot be loaded, since its description is damaged: "
            f"{error}. Save it again, which writes a new one"
        ) from error
    description, references = Description.from_value(record, value)
    return description.rebuild(record, references, value["versions"])


class Saving(Resumption):
    """The computation of what is to be saved.

    Parameters
    ----------
    *arguments, **named
        As for Resumption.
    description : Description
    keys : sequence of key
        Of all blocks, in order.
    overwrite : bool
        Whether something else may be replaced.
    """

    kind: kept_runs.Kind = "saved"

    def __init__(
        self,
        *arguments: Any,
        description: Description,
        keys: Sequence[Key],
        overwrite: bool,
        **named: Any,
    ):
        super().__init__(*arguments, **named)
        self._description, self._keys, self._overwrite = description, keys, overwrite
        self._staying: frozenset[str] = frozenset()  # labels of what is replaced in the end
        self._own: dict[str, Reference] = {}  # blocks that are there already, by label
        self._identity = ""

    @property
    def again(self) -> str:
        """How to go on, for people."""
        return f"save it again under this name ({self.name!r})"

    def _check_kind(self, found: KeptRun) -> None:
        if found.kind == "computed" and not self._overwrite:
            raise ConfigurationError(
                f"the name {self.name!r} is taken by computations with resume={self.name!r}: "
                "choose another one, or replace their results with overwrite=True"
            )
        self._staying = frozenset(found.results)

    def prepare(self, graph: Graph) -> None:
        """Have tasks copy what is not made by a task, or is another run's and goes with that."""
        for key in {graph.resolve(key) for key in self._keys}:
            stored = graph.stored.get(key)
            if stored is not None and protocol.run_of(stored.name) == self.record.run:
                self._own[label_of(stored.name)] = stored
            elif stored is not None or key in graph.literals:
                _copied(graph, key)

    def identify(self, graph: Graph, cut: Graph, *, references: bool) -> None:
        """Compute the fingerprints; refuse to replace another collection unasked.

        Blocks that have no fingerprint get a label that is drawn: they stay with the collection
        like all others, but are not found again if this breaks off.
        """
        super().identify(graph, cut, references=False)
        of = self._marks.of
        renamed = self.record.renamed
        names = {label: fingerprint for fingerprint, label in renamed.items()}
        labels = []
        for key in map(graph.resolve, self._keys):
            if key in graph.stored:
                label = label_of(graph.stored[key].name)
                labels.append(names.get(label, label))
            else:
                labels.append(of.get(key, ""))
                of.setdefault(key, new_label())
        if renamed:
            of.update({key: renamed.get(label, label) for key, label in of.items()})
        self._identity = self._description.identity(labels) if all(labels) else ""
        if self._overwrite:
            self._rename(self._staying)
        saved = self.record.saved
        same = saved is not None and saved.identity == self._identity != ""
        if saved is None or same or self._overwrite:
            return
        raise ConfigurationError(
            f"another collection is saved under {self.name!r} ({saved.what}): choose another name, "
            "or replace it with overwrite=True"
            + ("" if self._identity else "; whether this is the same one cannot be told, see above")
        )

    def begin(self, *, anew: bool) -> Reuse:
        """See what is there; return what is left to do.

        Raises
        ------
        LostDataError
            If blocks are gone that were loaded from what has the same name.
        """
        left = super().begin(anew=anew)
        if lost := self._own.keys() - self._inventory.results.keys():
            raise LostDataError(
                f"{len(lost)} blocks are gone that were loaded from {self.name!r}, among them "
                f"{self._own[min(lost)].name}: load it again, if it was saved anew meanwhile"
            )
        return left

    def _give_up(self, results: Mapping[str, Reference]) -> None:
        """What is replaced in the end stays; what takes the place of a part gets another label."""
        self._rename(self._staying & results.keys())
        super()._give_up({k: v for k, v in results.items() if k not in self._staying})

    def _rename(self, labels: Set[str]) -> None:
        """Have results with these labels computed anew, under others that are found again."""
        of, renamed = self._marks.of, self.record.renamed
        names = {label: fingerprint for fingerprint, label in renamed.items()}
        found = [(key, label) for key, label in of.items() if label in labels]
        for key, label in found:
            of[key] = renamed[names.get(label, label)] = new_label()
        if found:
            kept_runs.write(self.record)

    def folder(self, plan: Plan) -> Folder:
        """Return where the objects of the run go."""
        folder = super().folder(plan)
        folder.results |= self._staying | self._own.keys()
        return folder

    def succeed(self, values: Mapping[Key, Any]) -> None:
        """Describe the collection, make that the one that has the name, delete what had it."""
        record = self.record
        references = [values[self._graph.resolve(key)] for key in self._keys]
        labels = {label_of(each.name) for each in references}
        old = record.saved
        same = old is not None and bool(self._identity) and old.identity == self._identity
        if not same or labels != self._staying or not self._is_described():
            record.saved = self._describe(references)
        record.kind, record.status, record.results = "saved", "done", sorted(labels)
        record.renamed = {key: label for key, label in record.renamed.items() if label in labels}
        kept_runs.write(record)  # from here on it is the new one
        gone = {_name_of(record, old.label)} if old and old != record.saved else set()
        if self._staying - labels:
            there = self._bucket.survey(record).results
            for label in self._staying - labels & there.keys():
                gone.update(protocol.objects_of(there[label].name))
        if gone:
            self._bucket.delete(sorted(gone))

    def _is_described(self) -> bool:
        """Whether the description is there and intact."""
        assert self.record.saved is not None
        try:
            self._bucket.load(_described(self.record, self.record.saved))
        except (LostDataError, IntegrityError):
            return False
        return True

    def _describe(self, references: Sequence[Reference]) -> Saved:
        label = DESCRIPTION + secrets.token_hex(16)
        name = _name_of(self.record, label)
        value = self._description.to_value(self.record, references)
        sealed = codec.dumps(value, self.record.secret, name)
        self._bucket.write(name, sealed)
        return Saved(label, len(sealed), self._identity, self._description.what)


def _copied(graph: Graph, key: Key) -> None:
    """Put a task that copies a value in its place, in a graph."""
    given = f"given-{protocol.key_label(key)}"
    copy = f"copy-{protocol.key_label(key)}"
    nodes: dict[Key, Any] = graph.literals if key in graph.literals else graph.stored
    nodes[given] = nodes.pop(key)
    graph.tasks[copy] = Task(copy, identity, TaskRef(given))
    for name in [name for name, target in graph.aliases.items() if target == key]:
        graph.aliases[name] = copy
    graph.aliases[key] = copy


def _name_of(record: KeptRun, label: str) -> str:
    return protocol.object_name(kept_prefix(record.place.prefix), record.run, label)


def _described(record: KeptRun, saved: Saved) -> Reference:
    return Reference(_name_of(record, saved.label), saved.size)


def _nothing_saved(name: str, record: KeptRun | None) -> str:
    if record is not None and record.kind == "saved":
        return (
            f"{name!r} is not complete: its saving broke off ({record.status}), or goes on. Save "
            "it again to go on"
        )
    if record is not None:
        return (
            f"{name!r} is not a saved collection, but computations with resume={name!r}: persist "
            "with that to use their results"
        )
    known = [each.name for each in kept_runs.records() if each.saved is not None]
    meant = get_close_matches(name, known, n=1)
    return (
        f"there is no saved collection {name!r}"
        + (f": is {meant[0]!r} meant?" if meant else "")
        + f" There are: {', '.join(known) or 'none'} (in {kept_runs.runs_directory()})"
    )
