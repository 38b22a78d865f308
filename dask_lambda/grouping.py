"""Which tasks run together.  Pure.

May import: tiling, units, kernels, estimates, cost_model, graph, the ground.

Data that has one reader should not leave the worker, and what is cheaper to make than to read
should not be stored.  Three steps, each of which compares seconds (:mod:`dask_lambda.cost_model`):

1. *Views and copies*.  A task that is cheap and reads one value only (a slice, a transposed block,
   one item of a tuple) joins the task that it reads from, or is repeated by each of its readers; so
   is a block that is made of nothing (zeros, random numbers with their seed).
2. *Merging*.  A group whose outputs are read by one other group only may join it.  This is decided
   for a *class* of groups at once: those of the same layer at the same height of the graph.
   With unlimited concurrency time is the longest path; with little it is the work divided by the
   window; Graham's bound for list scheduling is their sum (Bell System Technical Journal 45,
   1966).  That, and the money in the time that it is worth, must not grow.
3. *Tiles*.  Where a class has more groups than the window, groups whose keys are neighbours are put
   into blocks (:mod:`dask_lambda.tiling`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from dask.utils import key_split

from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph
from dask_lambda.kernels import Catalogue
from dask_lambda.tiling import Tiling
from dask_lambda.units import Decision, Unit, indices, layer
from lambda_worker.folds import find_folds
from lambda_worker.protocol import Key

#: A longer path is doubted (:attr:`CostModel.tolerance`) if so many times what is saved makes up
#: for it: nobody gives a second for nothing.
DOUBT = 10.0


class Grouping:
    """Groups the tasks of a graph.

    Parameters
    ----------
    graph : Graph
    order : sequence of key
        The tasks to group, each after those that it reads.
    keep : set of key
        Tasks whose values are needed in the end.
    estimates : Estimates
    model : CostModel
    signature : callable
        Tasks run together only if this is the same for them (retries, for one).

    Attributes
    ----------
    decisions : list of Decision
    """

    def __init__(
        self,
        graph: Graph,
        order: Sequence[Key],
        keep: set[Key],
        estimates: Estimates,
        model: CostModel,
        signature: Callable[[Key], Hashable] | None = None,
    ):
        self.decisions: list[Decision] = []
        self._graph, self._model = graph, model
        self._keys: list[Key] = list(order)
        number = self._number = {key: i for i, key in enumerate(self._keys)}
        self._count = count = len(self._keys)
        self._keep = {number[key] for key in keep if key in number}
        self._signature = signature
        self._seconds = [estimates.seconds[key] for key in self._keys]
        self._nbytes = [estimates.nbytes[key] for key in self._keys]
        self._deps: list[list[int]] = []
        aliases = graph.aliases
        for key in self._keys:
            deps: list[int] = []
            for name in graph.tasks[key].dependencies:
                target = aliases.get(name, name) if aliases else name
                i = number.get(target)
                if i is None:  # data: numbered behind the tasks
                    i = number[target] = len(self._nbytes)
                    self._nbytes.append(estimates.nbytes[target])
                if i not in deps:
                    deps.append(i)
            deps.sort()  # a task's own order follows the hash seed
            self._deps.append(deps)
        self._readers: list[list[int]] = [[] for _ in self._nbytes]
        for i, reads in enumerate(self._deps):
            for d in reads:
                self._readers[d].append(i)
        catalogue = Catalogue()
        kernels = [catalogue.kernel(key, graph.tasks[key]) for key in self._keys]
        self._known = [kernel.known for kernel in kernels]
        self._item = [kernel.is_item for kernel in kernels]
        self._parent = list(range(count))  # union-find: who is in whose unit
        self._repeated: set[int] = set()  # tasks that are made by each unit that reads them
        self._twice: set[int] = set()  # those of them that are stored as well
        self._repeat_seconds: dict[int, float] = {}
        self._units: dict[int, Unit] = {}
        self._tiling = Tiling(self._keys, self._nbytes, self._seconds, model)
        self._terms: dict[int, frozenset[int]] = {}
        self._tolerated = 0.0  # seconds that were added to the longest path as not believed

    # -- the result ------------------------------------------------------------------------------

    def groups(self) -> list[tuple[list[Key], list[Key], float]]:
        """Return for each group its tasks in order, its outputs, and its seconds on a worker."""
        self._copies()
        self._make_units()
        self._merge()
        blocks = self._tile()
        keys, found = self._keys, []
        home: dict[int, int] = {}
        ordered = [self._in_order(block) for block in blocks]
        for place, tasks in enumerate(ordered):
            for i in tasks:
                home[i] = place
        for place, tasks in enumerate(ordered):
            outputs = []
            for i in tasks:
                if i in self._keep:
                    outputs.append(i)
                    continue
                for r in self._readers[i]:
                    if self._leaves(r, place, home):
                        outputs.append(i)
                        break
            every = self._with_repeats(tasks)
            units = [self._units[root] for root in blocks[place]]
            seconds = self._tiling.time(units)[0] - self._model.invoke_seconds
            found.append(([keys[i] for i in every], [keys[i] for i in outputs], seconds))
        return found

    @property
    def repeated(self) -> frozenset[Key]:
        """Tasks that each group that reads them runs for itself."""
        return frozenset(self._keys[i] for i in self._repeated)

    def _leaves(self, reader: int, place: int, home: dict[int, int]) -> bool:
        """Tell whether a reader is in another group, itself or as a repeated task."""
        if reader in self._repeated:
            return any(self._leaves(r, place, home) for r in self._readers[reader])
        return home[reader] != place

    def _in_order(self, block: Sequence[int]) -> list[int]:
        units = [self._units[root] for root in block]
        if len(units) == 1:
            return units[0].tasks
        # In turns: tiles that read the same panels read them at about the same time.
        tasks = []
        for step in range(max(len(unit.tasks) for unit in units)):
            tasks += [unit.tasks[step] for unit in units if step < len(unit.tasks)]
        return tasks

    def _with_repeats(self, tasks: Iterable[int]) -> Iterator[int]:
        """Yield tasks, each behind the repeated ones that it reads."""
        if not self._repeated:
            yield from tasks
            return
        there: set[int] = set()
        for task in tasks:
            stack = [task]
            while stack:
                i = stack[-1]
                missing = [d for d in self._deps[i] if d in self._repeated and d not in there]
                if missing:
                    stack += missing
                    continue
                stack.pop()
                if i not in there:
                    there.add(i)
                    yield i

    # -- 1: views and copies ---------------------------------------------------------------------

    def _copies(self) -> None:
        """Find what is repeated by each reader, and what joins the task that it reads from."""
        tally: dict[tuple[str, int, int], int] = defaultdict(int)
        for i in range(self._count):
            if i in self._keep or not self._known[i]:
                continue
            readers = len(self._readers[i])
            if readers < 2 or any(
                d < self._count and d not in self._repeated for d in self._deps[i]
            ):
                continue
            if not all(self._alike(i, r) for r in self._readers[i]):
                continue
            if self._repeats_if_cheaper(i, readers):
                tally["repeat", i, self._readers[i][0]] += 1
        for d in range(self._count):
            if d not in self._repeated:
                self._place_views(d, tally)
        for (what, i, reader), count in self._by_layer(tally).items():
            self._decide(what, i, reader, count)

    def _repeats_if_cheaper(self, i: int, readers: int) -> bool:
        """Let each reader make a value that needs nothing but data, if that is cheaper."""
        model, seconds = self._model, self._seconds[i]
        for d in self._deps[i]:
            if d in self._repeated:
                seconds += self._repeat_seconds[d]
            else:
                seconds += model.read_seconds(self._nbytes[d])
        size = self._nbytes[i]
        once = seconds + model.invoke_seconds + model.write_seconds(size)
        if readers * seconds > once + readers * model.read_seconds(size):
            return False
        self._repeated.add(i)
        self._repeat_seconds[i] = seconds
        return True

    def _place_views(self, d: int, tally: dict[tuple[str, int, int], int]) -> None:
        """Decide about the cheap tasks that read a task and nothing else.

        Each may join it ("up": what it shows is stored), or be repeated by its readers ("down": the
        whole is stored).  One that is needed in the end joins it in any case, and is repeated all
        the same if that is sooner than to wait until it is stored.
        """
        model, nbytes = self._model, self._nbytes
        whole_read, whole_write = model.read_seconds(nbytes[d]), model.write_seconds(nbytes[d])
        views = [
            t
            for t in self._readers[d]
            if len(self._deps[t]) == 1
            and self._known[t]
            and self._seconds[t] <= model.invoke_seconds + whole_read
            and self._alike(d, t)
        ]
        if not views:
            return
        rest = len(views) < len(self._readers[d]) or d in self._keep
        if not rest and len(views) == 1 and views[0] not in self._keep:
            return  # one reader: merging decides
        up, down = {}, {}
        for t in views:
            readers = len(self._readers[t])
            up[t] = model.write_seconds(nbytes[t]) + readers * model.read_seconds(nbytes[t])
            both = sum(1 for r in self._readers[t] if d in self._deps[r])
            down[t] = (readers - both) * whole_read + readers * self._seconds[t]
            if self._item[t] or not all(self._alike(t, r) for r in self._readers[t]):
                down[t] = math.inf  # nobody should fetch Q and R to read R
            if t in self._keep:
                if rest and down[t] < math.inf and self._is_sooner_made(t):
                    self._twice.add(t)
                    self._repeated.add(t)
                    self._repeat_seconds[t] = self._seconds[t]
                down[t] = math.inf
        best = {t: min(up[t], down[t]) for t in views}
        if not rest and sum(up.values()) <= whole_write + sum(best.values()):
            best = up
        for t in views:
            if best[t] == up[t]:
                self._parent[t] = d
                tally["join", t, d] += 1
            else:
                self._repeated.add(t)
                self._repeat_seconds[t] = self._seconds[t]
                tally["repeat", t, self._readers[t][0]] += 1

    def _is_sooner_made(self, t: int) -> bool:
        """Tell whether the readers of a view that is stored in any case should make it again."""
        model, seconds, readers = self._model, self._seconds[t], len(self._readers[t])
        wait = model.write_seconds(self._nbytes[t])
        return (
            seconds < wait and model.group_usd(readers * seconds, 0, 0) < wait * model.waiting_usd
        )

    def _alike(self, i: int, j: int) -> bool:
        if self._signature is None:
            return True
        return self._signature(self._keys[i]) == self._signature(self._keys[j])

    # -- units -----------------------------------------------------------------------------------

    def _find(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def _make_units(self) -> None:
        members: dict[int, list[int]] = defaultdict(list)
        for i in range(self._count):
            if i not in self._repeated or i in self._twice:
                members[self._find(i)].append(i)
        deps, nbytes = self._deps, self._nbytes
        for root, tasks in members.items():
            if len(tasks) == 1:
                outside = deps[root]
            else:
                inside = set(tasks)
                outside = [d for t in tasks for d in deps[t] if d not in inside]
            reads, repeats = set(outside), set[int]()
            if self._repeated:
                reads, repeats = self._seen_through(outside)
            held = sum([nbytes[d] for d in {*outside, *tasks}])
            work = sum([self._seconds[t] for t in tasks])
            self._units[root] = unit = Unit(tasks, reads, repeats, work, held, 0.0, 0)
            self._count_outputs(unit)
            self._assess(unit)

    def _seen_through(self, outside: list[int]) -> tuple[set[int], set[int]]:
        """Return what is read when repeated tasks are run in place of being read, and those."""
        reads: set[int] = set()
        repeats: set[int] = set()
        stack = list(outside)
        while stack:
            d = stack.pop()
            if d not in self._repeated:
                reads.add(d)
            elif d not in repeats:
                repeats.add(d)
                stack += self._deps[d]
        return reads, repeats

    def _count_outputs(self, unit: Unit) -> None:
        inside = set(unit.tasks)
        inline = self._model.inline_bytes
        for t in unit.tasks:
            size = self._nbytes[t]
            if size <= inline:
                continue
            readers = self._readers[t]
            if self._twice:
                readers = [
                    r for t in readers for r in (t, *(self._readers[t] if t in self._twice else ()))
                ]
            if t in self._keep or not inside.issuperset(readers):
                unit.writes += 1
                unit.written += size

    def _assess(self, unit: Unit) -> Unit:
        """Note how long a unit's invocation takes, and what it costs."""
        work, model, nbytes = unit.work, self._model, self._nbytes
        for i in unit.repeats:
            work += self._seconds[i]
        inline, count, total = model.inline_bytes, 0, 0
        for d in unit.reads:
            if (size := nbytes[d]) > inline:
                count += 1
                total += size
        unit.seconds = model.group_time(work, count, total, unit.writes, unit.written)
        unit.usd = model.group_usd(unit.seconds, count, unit.writes)
        return unit

    # -- 2: merging ------------------------------------------------------------------------------

    def _merge(self) -> None:
        """Merge units into their only readers, class by class from the leaves to the root."""
        readers, below = self._links()
        for members in self._classes(below, lambda root: layer(self._keys[root])):
            changed = True
            while changed:  # of what two read that are merged now, one is the only reader
                changed = False
                for merged, units in self._options(members, below, readers):
                    changed = True
                    for root, candidates in merged.items():
                        self._absorb(root, candidates, units[root], below, readers)
            for root in members:
                unit = self._units[root]
                unit.start = max((self._units[p].finish for p in below[root]), default=0.0)
                unit.finish = unit.start + unit.seconds

    def _absorb(
        self,
        root: int,
        candidates: list[int],
        unit: Unit,
        below: dict[int, set[int]],
        readers: dict[int, set[int]],
    ) -> None:
        for p in candidates:
            self._parent[p] = root
            del self._units[p]
            below[root] |= below[p]
            for q in below[p]:
                readers[q].discard(p)
                readers[q].add(root)
        below[root] -= set(candidates)
        self._units[root] = unit

    def _links(self) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        """Return the units that read from each unit, and those that it reads from."""
        readers: dict[int, set[int]] = {root: set() for root in self._units}
        below: dict[int, set[int]] = {root: set() for root in self._units}
        for root, unit in self._units.items():
            for d in unit.reads:
                if d < self._count:
                    source = self._find(d)
                    readers[source].add(root)
                    below[root].add(source)
        return readers, below

    def _classes(
        self, below: dict[int, set[int]], kind: Callable[[int], Hashable]
    ) -> Iterator[list[int]]:
        """Yield units of one kind and height, those of smaller height first."""
        height: dict[int, int] = {}
        classes: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
        for root in self._topological(below):
            height[root] = max((height[p] + 1 for p in below[root]), default=0)
            classes[height[root], kind(root)].append(root)
        for key in sorted(classes, key=lambda key: key[0]):
            yield classes[key]

    def _topological(self, below: dict[int, set[int]]) -> Iterator[int]:
        # Tasks are numbered in topological order, but a unit may hold later ones than its root.
        done: set[int] = set()
        for first in below:
            stack = [first]
            while stack:
                root = stack[-1]
                missing = [p for p in below[root] if p not in done] if root not in done else []
                if missing:
                    stack += missing
                    continue
                stack.pop()
                if root not in done:
                    done.add(root)
                    yield root

    def _options(
        self, members: list[int], below: dict[int, set[int]], readers: dict[int, set[int]]
    ) -> Iterator[tuple[dict[int, list[int]], dict[int, Unit]]]:
        """Yield what is to be merged into the units of a class, layer by layer of producers."""
        layers: dict[Any, dict[int, list[int]]] = defaultdict(dict)
        for root in members:
            for p in sorted(below[root]):
                if len(readers[p]) == 1 and self._free(p) and self._alike(p, root):
                    layers[layer(self._keys[p])].setdefault(root, []).append(p)
        if not layers:
            return
        together: dict[int, list[int]] = defaultdict(list)
        for found in layers.values():
            for root, candidates in found.items():
                together[root] += candidates
        if len(layers) > 1 and (units := self._wins(together, below, note=False)):
            yield together, units
            return
        for found in sorted(layers.values(), key=len, reverse=True):
            if units := self._wins(found, below):
                yield found, units

    def _free(self, p: int) -> bool:
        """Tell whether nothing that a unit makes is needed in the end."""
        return not any(t in self._keep for t in self._units[p].tasks)

    def _wins(
        self, merged: dict[int, list[int]], below: dict[int, set[int]], *, note: bool = True
    ) -> dict[int, Unit]:
        """Return the merged units of a class if merging is better, else nothing."""
        model, units = self._model, self._units
        seconds = usd = 0.0
        before = after = 0.0
        found: dict[int, Unit] = {}
        for root, candidates in merged.items():
            unit = units[root]
            joined = found[root] = self._merged(root, candidates)
            too_large = joined.peak > max(model.room, unit.peak)
            if too_large or joined.seconds > max(model.group_seconds, unit.seconds):
                if note:
                    why = (
                        f"it would hold {joined.peak / 2**20:,.0f} MB and take "
                        f"{joined.seconds:,.1f} s; at most {model.room / 2**20:,.0f} MB "
                        f"and {model.group_seconds:g} s"
                    )
                    self._decide("merge", candidates[0], root, len(candidates), False, why)
                return {}
            chosen = set(candidates)
            parts = [units[p] for p in candidates]
            seconds += joined.seconds - unit.seconds - sum(part.seconds for part in parts)
            usd += joined.usd - unit.usd - sum(part.usd for part in parts)
            rest = max((units[q].finish for q in below[root] if q not in chosen), default=0.0)
            start = max(rest, *(part.finish for part in parts))
            before = max(before, start + unit.seconds)
            start = max(rest, *(part.start for part in parts))
            after = max(after, start + joined.seconds)
        path = after - before
        saved = -(seconds / model.window + usd / model.waiting_usd)
        good = path <= saved + 1e-9
        doubt = min(model.tolerance * before - self._tolerated, DOUBT * saved)
        doubted = not good and path <= doubt
        good = good or doubted
        if good and len(merged) > model.window:
            good = self._wins_in_tiles(found, merged)
        if good and doubted:
            self._tolerated += path
        if note or good:
            root, candidates = next(iter(merged.items()))
            why = f"path {path:+.3f} s of {before:.3f} s, work {seconds:+.3f} s, {usd:+.6f} USD"
            count = sum(len(parts) for parts in merged.values())
            self._decide("merge", candidates[0], root, count, good, why)
        return found if good else {}

    def _wins_in_tiles(self, found: dict[int, Unit], merged: dict[int, list[int]]) -> bool:
        """Compare a class and its producers when both run in tiles, as there are so many.

        Where the network is the limit, tiles of more outputs and a part of each sum may be better
        than tiles of few outputs and all of it.
        """
        layers: dict[Any, dict[int, Unit]] = defaultdict(dict)
        for root, candidates in merged.items():
            layers[None][root] = self._units[root]
            for p in candidates:
                layers[layer(self._keys[p])][p] = self._units[p]
        apart = sum(self._tiling.best(units).cost for units in layers.values())
        return self._tiling.best(found).cost <= apart

    def _merged(self, root: int, candidates: Sequence[int]) -> Unit:
        """Describe a unit into which others are merged."""
        unit = self._units[root]
        parts = [self._units[p] for p in candidates]
        tasks = [t for part in parts for t in part.tasks] + unit.tasks
        reads = unit.reads.union(*(part.reads for part in parts)).difference(tasks)
        repeats = unit.repeats.union(*(part.repeats for part in parts))
        sums = self._sums(root)
        peak, held, total = 0.0, 0.0, 0.0
        for part, p in zip(parts, candidates, strict=True):
            peak = max(peak, held + total + part.peak)
            if p in sums:  # added to a running total as they come
                total = max(total, float(self._nbytes[p]))
            else:
                held += self._nbytes[p]
        chosen = set(candidates)
        summed = sum(self._nbytes[p] for p in chosen & sums)
        peak = max(peak, held + unit.peak - summed + total)
        work = unit.work + sum(part.work for part in parts)
        joined = Unit(tasks, reads, repeats, work, peak, unit.written, unit.writes)
        return self._assess(joined)

    def _sums(self, i: int) -> frozenset[int]:
        """Return the terms of the sums in a task, which the worker adds up one by one."""
        found = self._terms.get(i)
        if found is None:
            terms = set()
            if len(self._deps[i]) > 2:
                aliases = self._graph.aliases
                for fold in find_folds(self._graph.tasks[self._keys[i]]):
                    terms |= {self._number[aliases.get(key, key)] for key in fold.terms}
            found = self._terms[i] = frozenset(terms)
        return found

    # -- 3: tiles --------------------------------------------------------------------------------

    def _tile(self) -> list[list[int]]:
        """Put units into blocks that share what they read."""

        def kind(root: int) -> Hashable:
            key = self._keys[root]
            alike = None if self._signature is None else self._signature(key)
            return layer(key), len(indices(key)), len(self._units[root].tasks), alike

        blocks = []
        for members in self._classes(self._links()[1], kind):
            first = members[0]
            if len(members) <= self._model.window or len(indices(self._keys[first])) < 2:
                blocks += [[root] for root in members]
                continue
            tiles = self._tiling.best({root: self._units[root] for root in members})
            blocks += tiles.blocks
            self._decide("tile", first, first, len(members), tiles.tiles > 1, tiles.why)
        return blocks

    # -- why -------------------------------------------------------------------------------------

    def _by_layer(self, tally: dict[tuple[str, int, int], int]) -> dict[tuple[str, int, int], int]:
        first: dict[tuple[str, Any, Any], tuple[int, int]] = {}
        counts: dict[tuple[str, Any, Any], int] = defaultdict(int)
        for (what, i, reader), count in tally.items():
            name = what, layer(self._keys[i]), layer(self._keys[reader])
            first.setdefault(name, (i, reader))
            counts[name] += count
        return {(name[0], *first[name]): count for name, count in counts.items()}

    def _decide(
        self,
        what: str,
        producer: int,
        consumer: int,
        count: int,
        done: bool = True,
        why: str = "",
    ) -> None:
        if not why:
            size = self._nbytes[producer]
            why = (
                f"{self._seconds[producer] * 1e3:.1f} ms to make, "
                f"{self._model.read_seconds(size) * 1e3:.1f} ms to read ({size:,.0f} bytes)"
            )
        keys = self._keys
        self.decisions.append(
            Decision(what, key_split(keys[producer]), key_split(keys[consumer]), count, done, why)
        )
