"""What tasks took earlier in this process.  May import: estimates, the ground."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dask.utils import key_split

from dask_lambda.estimates import Estimates
from lambda_worker.protocol import Key

#: How many measurements of a prefix its mean remembers.
SAMPLES = 32


@dataclass(slots=True)
class _Measured:
    count: float = 0.0
    seconds: float = 0.0  # per unit of the guess
    nbytes: float = 0.0


class History:
    """What tasks took earlier in this process, by key prefix.  May be used by several threads.

    What is remembered is the ratio of the measured to the guessed, so that it also helps where
    blocks are larger or smaller than they were.
    """

    def __init__(self) -> None:
        self._prefixes: dict[str, _Measured] = {}
        self._lock = threading.Lock()

    def observe(
        self, prefix: str, count: int, seconds: tuple[float, float], nbytes: tuple[float, float]
    ) -> None:
        """Take note of some tasks of one prefix.

        Parameters
        ----------
        prefix : str
        count : int
        seconds, nbytes : (float, float)
            The measured and the guessed sums over these tasks.
        """
        with self._lock:
            known = self._prefixes.setdefault(prefix, _Measured())
            known.count = min(known.count + count, SAMPLES)
            weight = min(1.0, count / known.count)
            known.seconds += weight * (seconds[0] / max(seconds[1], 1e-12) - known.seconds)
            known.nbytes += weight * (nbytes[0] / max(nbytes[1], 1.0) - known.nbytes)

    def learn(
        self, guessed: Estimates, tasks: Iterable[Key], measured: Mapping[str, Sequence[float]]
    ) -> None:
        """Take note of what a worker measured for the tasks of one group.

        Parameters
        ----------
        guessed : Estimates
            What :func:`guess` said.
        tasks : iterable of key
        measured : mapping
            Key prefix to the number of tasks, their seconds, and the bytes of their results.
        """
        sums = {prefix: [0.0, 0.0] for prefix in measured}
        for key in tasks:
            if (found := sums.get(key_split(key))) is not None:
                found[0] += guessed.seconds[key]
                found[1] += guessed.nbytes[key]
        for prefix, (count, seconds, nbytes) in measured.items():
            guesses = sums[prefix]
            if not count or not guesses[0]:
                continue
            self.observe(prefix, int(count), (seconds, guesses[0]), (nbytes, guesses[1]))

    def ratio(self, prefix: str) -> tuple[float, float] | None:
        """Return measured over guessed, of seconds and of bytes, or None if nothing is known."""
        known = self._prefixes.get(prefix)
        return None if known is None else (known.seconds, known.nbytes)
