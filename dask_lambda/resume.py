"""One computation under a name: what it takes from earlier ones, and leaves to later ones.

May import: kept_folder, kept_runs, fingerprint, reuse, plan, graph, report, errors, the ground.  To
be used in the caller's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Protocol

from dask_lambda import kept_runs
from dask_lambda.errors import (
    ConfigurationError,
    IntegrityError,
    LocalAWSError,
    LostDataError,
)
from dask_lambda.fingerprint import Fingerprints, fingerprints
from dask_lambda.graph import Graph
from dask_lambda.kept_folder import Folder, Inventory, named
from dask_lambda.kept_runs import KeptRun, Place
from dask_lambda.plan import Plan
from dask_lambda.report import RunReport
from dask_lambda.reuse import Reuse, reuse
from lambda_worker import protocol
from lambda_worker.protocol import Key, Reference

logger = logging.getLogger("dask_lambda")

#: So often a computation goes on without objects that turned out to be damaged; after that it
#: begins anew.
MAX_DROPS = 3


class Bucket(Protocol):
    """What looks into the bucket: the engine's access to it."""

    def survey(self, record: KeptRun) -> Inventory:
        """See what a kept run has there."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""

    def load(self, reference: Reference) -> Any:
        """Load a stored value."""

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write an object."""


class Resumption:
    """One computation under a name.  A context: inside, the name belongs to it.

    Parameters
    ----------
    name : str or None
        None: a new one.
    place : Place
        Where its objects are.
    function : str
        That runs its tasks.
    bucket : Bucket
    keep : bool
        Whether intermediate results stay.
    ended : callable
        Whether nothing is left at another place: it was that of an embedded AWS which has ended.
    lasting : bool
        Whether the objects outlive this process.

    Raises
    ------
    ConfigurationError
        On entering: if another process uses the name, its objects are in another place, or it is
        a saved collection's.
    """

    kind: kept_runs.Kind = "computed"

    def __init__(
        self,
        name: str | None,
        place: Place,
        function: str,
        bucket: Bucket,
        *,
        ended: Callable[[Place], bool],
        keep: bool = False,
        lasting: bool = True,
    ):
        self.name = kept_runs.new_name() if name is None else name
        if name is None and lasting:
            logger.warning(
                "the objects of this computation stay in the bucket, under the name %s: to use "
                "them again, compute with resume=%r; to delete them: dask-lambda runs delete %s",
                self.name,
                self.name,
                self.name,
            )
        self._place, self._function, self._bucket = place, function, bucket
        self._keep, self._ended, self._lasting = keep, ended, lasting
        self._stack = ExitStack()
        self._drops = 0
        self._before: KeptRun | None = None
        self._inventory = Inventory()
        self._marks = Fingerprints()
        self._reuse: Reuse | None = None
        self._folder: Folder | None = None

    def __enter__(self) -> Resumption:
        self._stack.enter_context(kept_runs.locked(self.name))
        try:
            self.record = self._record()
            kept_runs.write(self.record)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.record.used = time.time()
        if kind is not None:
            self.record.status = "failed"
            if not isinstance(error, ConfigurationError | LocalAWSError):
                with suppress(Exception):  # it may forbid attributes
                    error.add_note(
                        f"What was done is kept under the name {self.name!r}: {self.again} to go on"
                        + ("" if self._lasting else ", in this program")
                    )
            elif self._before is not None:  # nothing was done
                self.record = replace(self._before, spent=self.record.spent)
        if self._folder is not None:  # what of the run still goes on has no say in the next one
            self._folder.open = False
        try:
            kept_runs.write(self.record)
        finally:
            self._stack.close()

    @property
    def again(self) -> str:
        """How to go on, for people."""
        return f"compute again with resume={self.name!r}"

    def _record(self) -> KeptRun:
        found = kept_runs.read(self.name)
        if found is not None and found.place != self._place:
            if not self._ended(found.place):
                raise ConfigurationError(
                    f"the objects of the kept run {self.name!r} are in {found.place}, not "
                    f"in {self._place}, which is configured now: choose another name, or "
                    f"delete the run (dask-lambda runs delete {self.name}, with its own settings)"
                )
            logger.warning(
                "nothing is left of the kept run %r: the embedded AWS that had its objects has "
                "ended",
                self.name,
            )
            found = None
        if found is not None:
            self._check_kind(found)
            self._before = replace(found)
        if found is None:
            found = KeptRun.new(self.name, self._place, self._function)
            found.kind = self.kind
            if not self._lasting:
                logger.warning(
                    "the kept run %r ends with this program, as the embedded AWS does that it "
                    "has started: 'dask-lambda local start' keeps one running",
                    self.name,
                )
        found.status, found.function, found.used = "running", self._function, time.time()
        return found

    def _check_kind(self, found: KeptRun) -> None:
        """Refuse a name that is used for something else."""
        if found.kind == "saved":
            raise ConfigurationError(
                f"{self.name!r} is the name of a saved collection, which a computation under the "
                "same name would change: choose another name, or delete the collection "
                f"(dask-lambda runs delete {self.name})"
            )

    # -- one attempt after the other -------------------------------------------------------------

    def prepare(self, graph: Graph) -> None:
        """Change a graph, in place, so that what has to stay is made by tasks: nothing to do."""

    def identify(self, graph: Graph, cut: Graph, *, references: bool) -> None:
        """Compute the fingerprints of a graph.

        Parameters
        ----------
        graph : Graph
        cut : Graph
            The same as it is to be run.
        references : bool
            Whether the results are to be referred to in S3, and so must be found again.

        Raises
        ------
        ConfigurationError
            If such a result has no fingerprint.
        """
        self._graph = cut
        self._marks = fingerprints(graph)
        if cut is not graph:
            self._marks.of = fingerprints(cut, (graph, self._marks)).of
        self.record.tasks = len(graph.tasks)
        for layer, (count, reason) in self._marks.reasons.items():
            if references:
                raise ConfigurationError(
                    f"{count} tasks of {layer!r} cannot be persisted under the name {self.name!r}: "
                    f"their results could not be found again ({reason}); persist without resume "
                    "and keep"
                )
            logger.warning(
                "%d tasks of %r cannot be resumed, nor what depends on them: %s",
                count,
                layer,
                reason,
            )

    def begin(self, *, anew: bool) -> Reuse:
        """See what is there; return what is left to do.

        Parameters
        ----------
        anew : bool
            Whether everything is to be computed, whatever is there.
        """
        self._inventory = found = self._bucket.survey(self.record)
        there = found.results
        if anew or self._drops > MAX_DROPS:
            self._give_up(there)
            there = {}
        left = reuse(self._graph, self._marks.of, there)
        self._give_up({label: there[label] for label in left.stale})
        self._reuse = left
        return left

    def _give_up(self, results: Mapping[str, Reference]) -> None:
        """Make room for results that take the place of these."""
        self._delete(results.values())

    def folder(self, plan: Plan) -> Folder:
        """Return where the objects of the run go."""
        labels = self._marks.of
        wanted = {labels[key] for key in plan.fetch if key in labels and key in self._graph.tasks}
        self._folder = Folder(
            self.record,
            again=self.again,
            keep=self._keep,
            labels=labels,
            results={*self.record.results, *wanted},
            data=self._inventory.data,
        )
        return self._folder

    def drop(self, error: LostDataError | IntegrityError) -> bool:
        """Delete what an error says is damaged; tell whether to go on without it.

        Parameters
        ----------
        error : LostDataError or IntegrityError
        """
        assert self._reuse is not None
        used = [self._reuse.graph.stored[key] for key in self._reuse.reused]
        used += [Reference(name, size) for name, size in self._inventory.data.items()]
        damaged = named(error, used)
        if not damaged or self._drops > MAX_DROPS:
            return False
        self._drops += 1
        logger.warning("the kept run %r goes on without what is damaged: %s", self.name, error)
        self._delete(damaged)
        return True

    def spent(self, report: RunReport) -> None:
        """Add what a run has cost to the record, which is written when all of this ends.

        Parameters
        ----------
        report : RunReport
        """
        before = self.record.spent or kept_runs.Spent(time.time())
        self.record.spent = before.plus(
            report.invocations, report.billed_gb_seconds, report.cost_usd
        )

    def succeed(self, values: Mapping[Key, Any]) -> None:
        """Take note of the results.

        Parameters
        ----------
        values : dict
            By resolved key; references, if that was asked for.
        """
        assert self._folder is not None
        self.record.results = sorted(self._folder.results)
        self.record.status = "done"

    def _delete(self, references: Iterable[Reference]) -> None:
        names = sorted({n for each in references for n in protocol.objects_of(each.name)})
        if names:
            self._bucket.delete(names)
