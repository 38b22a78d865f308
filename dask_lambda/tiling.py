"""Which neighbouring groups run in one invocation.  Pure.

May import: units, cost_model, the ground.

When there are more groups than the window, each environment runs several of them in any case.  If
these read the same panels, they had better run in one invocation, which reads each panel once:
a block of p x q tiles of a matrix product reads p + q panels in place of 2 p q.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from dask_lambda.cost_model import CostModel
from dask_lambda.units import Unit, indices
from lambda_worker.protocol import Key

#: Tiles of one block at the most.
MAX_TILES = 64
#: A grid with gaps is cut in every way that is tried, up to so many units.
MAX_CUTS = 2000
#: Sides of blocks to try.
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Units put into blocks.

    Attributes
    ----------
    blocks : list of list of int
        Roots of the units of each block.
    tiles : int
        In a block.
    cost : float
        Seconds in all, and the money in the seconds that it is worth.
    why : str
    """

    blocks: list[list[int]]
    tiles: int
    cost: float
    why: str


class Tiling:
    """Chooses blocks of units.

    Parameters
    ----------
    keys, nbytes, seconds : sequence
        Of the tasks and data for which the numbers in units stand.
    model : CostModel
    """

    def __init__(
        self,
        keys: Sequence[Key],
        nbytes: Sequence[int],
        seconds: Sequence[float],
        model: CostModel,
    ):
        self._keys, self._nbytes, self._seconds, self._model = keys, nbytes, seconds, model

    def best(self, units: Mapping[int, Unit]) -> Blocks:
        """Choose the sides of the blocks for the units of one class, by the time for all of them.

        Parameters
        ----------
        units : mapping
            By their roots.
        """
        grid = self._grid(units)
        axes = [max(axis) + 1 for axis in zip(*grid, strict=True)]
        first = next(iter(units.values()))
        alone = best = self._waves(len(units), [first])
        shape = (1,) * len(axes)
        for sides in product(*([n for n in SIDES if n <= axis] for axis in axes)):
            tiles = math.prod(sides)
            if not 1 < tiles <= MAX_TILES:
                continue
            sample, count = _sample(grid, axes, sides)
            if len(sample) < 2:
                continue
            if (cost := self._waves(count, [units[root] for root in sample])) < best:
                shape, best = sides, cost
        why = (
            f"blocks of {' x '.join(map(str, shape))} take {best[1]:.3f} s, {best[2]:.6f} USD, "
            f"one by one {alone[1]:.3f} s, {alone[2]:.6f} USD"
        )
        return Blocks(_blocks(grid, shape), math.prod(shape), best[0], why)

    def _grid(self, units: Mapping[int, Unit]) -> dict[tuple[int, ...], int]:
        """Return units by their places in a grid; in a row, if their keys do not tell."""
        places = {root: indices(self._keys[root]) for root in units}
        if len(set(map(len, places.values()))) == 1 and len(set(places.values())) == len(units):
            axes = [sorted(set(axis)) for axis in zip(*places.values(), strict=True)]
            ranks = [{index: rank for rank, index in enumerate(axis)} for axis in axes]
            return {
                tuple(rank[i] for i, rank in zip(place, ranks, strict=True)): root
                for root, place in places.items()
            }
        return {(rank,): root for rank, root in enumerate(units)}

    def time(self, units: Sequence[Unit]) -> tuple[float, int, int]:
        """Return how long units take in one invocation, and its GETs and PUTs."""
        reads = set[int]().union(*(unit.reads for unit in units))
        repeats = set[int]().union(*(unit.repeats for unit in units))
        work = sum(unit.work for unit in units) + sum(self._seconds[r] for r in repeats)
        sizes = [size for d in reads if not self._model.is_inline(size := self._nbytes[d])]
        writes, written = sum(u.writes for u in units), sum(u.written for u in units)
        seconds = self._model.group_time(work, len(sizes), sum(sizes), writes, written)
        return seconds, len(sizes), writes

    def _waves(self, count: int, block: Sequence[Unit]) -> tuple[float, float, float]:
        """Return what so many blocks take, window after window: in all, in time, in money."""
        model = self._model
        time, reads, writes = self.time(block)
        if len(block) > 1:
            peak = max(unit.peak for unit in block) + sum(self._nbytes[u.tasks[-1]] for u in block)
            if peak > model.room or time > model.group_seconds:
                return math.inf, math.inf, math.inf
        seconds = math.ceil(count / model.window) * time
        usd = count * model.group_usd(time, reads, writes)
        return seconds + usd / model.waiting_usd, seconds, usd


def _blocks(grid: Mapping[tuple[int, ...], int], sides: Sequence[int]) -> list[list[int]]:
    """Cut a grid into blocks."""
    blocks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, root in grid.items():
        blocks[tuple(i // n for i, n in zip(at, sides, strict=True))].append(root)
    return list(blocks.values())


def _sample(
    grid: Mapping[tuple[int, ...], int], axes: Sequence[int], sides: Sequence[int]
) -> tuple[list[int], int]:
    """Return the largest block, and the number of blocks."""
    if len(grid) < math.prod(axes) and len(grid) <= MAX_CUTS:  # a triangle, say
        blocks = _blocks(grid, sides)
        return max(blocks, key=len), len(blocks)
    count = math.prod(math.ceil(axis / n) for axis, n in zip(axes, sides, strict=True))
    return [grid[at] for at in product(*map(range, sides)) if at in grid], min(count, len(grid))
