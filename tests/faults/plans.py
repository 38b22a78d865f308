"""Which faults a run meets: random, and a pure function of a seed.

:func:`draw` says what happens to the n-th request of a kind.  :class:`Faults` does that for one
run, counts, and keeps the faults survivable: what is retried a bounded number of times happens
less often than that to each output or object.  A run whose faults are all survivable must end in
the right answer.  With ``fatal`` one fault is drawn besides that no client can survive; then the
run ends in the right answer (the request was not needed, or was made twice), or in the one error
that says so.

The :class:`Dealer` tells the requests of several runs apart, which share a proxy: by the names of
the outputs of their invocations, which are made of the keys of their tasks.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dask_lambda import errors
from lambda_worker import protocol
from tests.faults.proxy import (
    CONFLICT,
    DENIED,
    EXPIRED,
    EXPIRED_TOKEN,
    FORBIDDEN,
    NO_SUCH_KEY,
    REASONS,
    SLOW_DOWN,
    Action,
    Answer,
    Corrupt,
    Damage,
    Delay,
    Duplicate,
    Request,
    Reset,
    Stall,
    Strike,
    Truncate,
    exited,
    lambda_error,
    out_of_memory,
    s3_error,
    throttle,
    timed_out,
)


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes
    ----------
    name : str
        For the counts.
    action : Action
    bound : str
        Which of the bounds in :class:`Faults` it counts towards.
    """

    name: str
    action: Action
    bound: str = "transient"


Maker = Callable[[random.Random], Fault]


@dataclass(frozen=True)
class Intensity:
    """How many requests meet a fault.

    Attributes
    ----------
    invoke, s3 : float
        Shares of the invocations, and of the requests to S3.
    only : frozenset of str, optional
        Names of faults; default: all that are survivable.
    fatal : bool
        One fault is fatal.
    """

    invoke: float = 0.0
    s3: float = 0.0
    only: frozenset[str] | None = None
    fatal: bool = False


INTENSITIES = {
    "none": Intensity(),
    "mild": Intensity(0.15, 0.05),
    "heavy": Intensity(0.35, 0.12),
    "30 % of invocations fail": Intensity(
        0.3, only=frozenset({"500", "503", "reset before", "reset after", "kill", "exit"})
    ),
    "throttles": Intensity(0.3, only=frozenset({"throttle"})),
    "duplicates": Intensity(
        0.5, 0.05, only=frozenset({"duplicate", "reset during", "reset after", "stall after"})
    ),
    "S3": Intensity(0.1, 0.3),
    "fatal": Intensity(0.1, 0.05, fatal=True),
}

#: How often each of what is retried a bounded number of times happens to one output or object.
BOUNDS = {
    "death": 2,  # before a task is blamed
    "transient": 5,
    "throttle": 6,  # never given up, but ever more slowly
    "expired": 2,
    "resources": 2,  # of a run with retries
    "s3": 3,  # for each kind of request; obstore retries
    "damage": 1,  # an object is fetched once more
    "none": 1_000_000,
}


def draw(seed: int, intensity: Intensity, kind: str, index: int) -> Fault | None:
    """Return what happens to a request: a pure function.

    Parameters
    ----------
    seed : int
    intensity : Intensity
    kind : str
        As :attr:`Request.kind`.
    index : int
        How many of this kind came before.
    """
    rng = random.Random(f"{seed}/{kind}/{index}")
    share = intensity.invoke if kind == "invoke" else intensity.s3
    if rng.random() >= share:
        return None
    menu = MENUS.get(kind, ())
    makers = [(w, m) for name, w, m in menu if intensity.only is None or name in intensity.only]
    if not makers:
        return None
    weights, choices = zip(*makers, strict=True)
    return rng.choices(choices, weights)[0](rng)


def _simple(name: str, action: Action, bound: str = "transient") -> Maker:
    return lambda rng: Fault(name, action, bound)


def _error(status: int) -> Maker:
    name = {500: "ServiceException", 502: "EC2UnexpectedException"}.get(status, "")
    return _simple(str(status), lambda_error(status, name, "try again"))


def _throttle(rng: random.Random) -> Fault:
    """Throttle: mostly for too many at a time, after which an engine soon comes back."""
    weights = [1 if "Rate" in reason else 5 for reason in REASONS]
    return Fault("throttle", throttle(rng.choices(REASONS, weights)[0]), "throttle")


def _either(name: str, make: Callable[..., Answer], bound: str) -> Maker:
    """Return what happens to the function in place of the work, or after all of it."""
    return lambda rng: Fault(name, make(forwarded=rng.random() < 0.5), bound)


def _kill(rng: random.Random) -> Fault:
    """Kill the worker before, during or after the work, most of which takes milliseconds."""
    seconds = rng.choice([0.0, 10 ** rng.uniform(-3.5, -1), 60.0])
    return Fault("kill", Strike({"kind": "kill", "seconds": seconds}), "death")


def _straggler(rng: random.Random) -> Fault:
    strike = Strike({"kind": "sleep", "seconds": 10 ** rng.uniform(-1.5, 0.2)})
    return Fault("straggler", strike, "none")


def _overslept(rng: random.Random) -> Fault:
    return Fault("overslept", Strike({"kind": "sleep", "seconds": 3600.0}), "resources")


def _during(rng: random.Random) -> Fault:
    return Fault("reset during", Reset(forwarded=True, after=10 ** rng.uniform(-3, -1)))


def _stall(forwarded: bool, bound: str = "transient") -> Maker:
    name = "stall after" if forwarded else "stall before"
    return lambda rng: Fault(name, Stall(10 ** rng.uniform(-1.5, -0.3), forwarded), bound)


def _delay(rng: random.Random) -> Fault:
    return Fault("delay", Delay(10 ** rng.uniform(-2, -0.3)), "none")


def _duplicate(rng: random.Random) -> Fault:
    return Fault("duplicate", Duplicate(second=rng.random() < 0.5), "none")


def _truncate(announced: bool, bound: str) -> Maker:
    name = "truncated" if announced else "shortened"
    return lambda rng: Fault(name, Truncate(rng.random(), announced), bound)


def _corrupt(rng: random.Random) -> Fault:
    return Fault("corrupted", Corrupt(rng.random()), "damage")


_S3 = (
    ("SlowDown", 3, _simple("SlowDown", SLOW_DOWN, "s3")),
    ("S3 500", 1, _simple("S3 500", s3_error(500, "InternalError"), "s3")),
    ("reset before", 1, _simple("reset before", Reset(forwarded=False), "s3")),
    ("reset after", 2, _simple("reset after", Reset(forwarded=True), "s3")),
    ("stall before", 0.5, _stall(False, "s3")),
    ("stall after", 0.5, _stall(True, "s3")),
    ("delay", 1, _delay),
)
#: What can happen to each kind of request, and how likely it is: name, weight, fault.
MENUS: dict[str, tuple[tuple[str, float, Maker], ...]] = {
    "invoke": (
        ("throttle", 2, _throttle),
        ("500", 1, _error(500)),
        ("502", 1, _error(502)),
        ("503", 1, _error(503)),
        ("504", 1, _error(504)),
        ("reset before", 2, _simple("reset before", Reset(forwarded=False))),
        ("reset during", 2, _during),
        ("reset after", 2, _simple("reset after", Reset(forwarded=True))),
        ("stall before", 0.5, _stall(False)),
        ("stall after", 0.5, _stall(True)),
        ("delay", 1, _delay),
        ("duplicate", 2, _duplicate),
        ("truncated", 1, _truncate(True, "transient")),
        ("kill", 2, _kill),
        ("straggler", 1, _straggler),
        ("overslept", 0.05, _overslept),
        ("exit", 1, _either("exit", exited, "death")),
        ("out of memory", 0.5, _either("out of memory", out_of_memory, "resources")),
        ("timed out", 0.5, _either("timed out", timed_out, "resources")),
        ("expired", 0.3, _simple("expired", EXPIRED, "expired")),
    ),
    "get": (
        *_S3,
        ("truncated", 1, _truncate(True, "s3")),
        ("shortened", 0.5, _truncate(False, "damage")),
        ("corrupted", 0.5, _corrupt),
        ("S3 expired", 0.2, _simple("S3 expired", EXPIRED_TOKEN, "expired")),
    ),
    "put": (
        *_S3,
        ("conflict", 1, _simple("conflict", CONFLICT, "s3")),
        ("S3 expired", 0.2, _simple("S3 expired", EXPIRED_TOKEN, "expired")),
    ),
    "head": _S3,
    "delete": _S3,
    "list": _S3,
    # Not "reset after": told twice to complete an upload, S3 answers 200 and MiniStack 404.
    "post": tuple(entry for entry in _S3 if "after" not in entry[0]),
}

#: What no client survives: on which kind of request, what it is, and the error that says so.
FATAL: tuple[tuple[str, Fault, type[Exception]], ...] = (
    ("invoke", Fault("forbidden", FORBIDDEN), errors.AccessDeniedError),
    ("get", Fault("denied", DENIED), errors.AccessDeniedError),
    ("put", Fault("denied", DENIED), errors.AccessDeniedError),
    ("get", Fault("missing", NO_SUCH_KEY), errors.LostDataError),
    ("put", Fault("damaged", Damage()), errors.IntegrityError),
    ("put", Fault("cut", Damage(cut=True)), errors.IntegrityError),
)


class Faults:
    """The faults of one run.

    Parameters
    ----------
    seed : int
    intensity : Intensity
    without : iterable of str
        Names of faults that do not happen.
    retries : bool
        Whether the run repeats what runs out of memory or time.

    Attributes
    ----------
    injected : Counter
        By name.
    fatal : type, optional
        The error that the run may end in, once a fault that is fatal has happened.
    """

    def __init__(
        self,
        seed: int,
        intensity: Intensity,
        without: Iterable[str] = (),
        *,
        retries: bool = True,
    ):
        self.seed = seed
        self.intensity = intensity
        self.without = frozenset(without)
        if not retries:
            self.without |= {"out of memory", "timed out", "overslept"}
        self.injected: Counter[str] = Counter()
        self.fatal: type[Exception] | None = None
        self._seen: Counter[str] = Counter()
        self._spent: Counter[tuple[str, ...]] = Counter()
        rng = random.Random(f"{seed}/fatal")
        self._fatal_kind, self._fatal_fault, self._fatal_error = rng.choice(FATAL)
        self._fatal_index = rng.randrange(4)

    def __call__(self, request: Request) -> Action:
        """Decide what happens to a request of the run."""
        kind = request.kind
        index = self._seen[kind]
        self._seen[kind] += 1
        if self.intensity.fatal and (kind, index) == (self._fatal_kind, self._fatal_index):
            self.fatal = self._fatal_error
            return self._happens(self._fatal_fault)
        fault = draw(self.seed, self.intensity, kind, index)
        if fault is None or fault.name in self.without or not self._affordable(fault, request):
            return None
        if fault.action is CONFLICT and "partNumber" in request.query:
            return None  # a part is never written on a condition
        return self._happens(fault)

    def _happens(self, fault: Fault) -> Action:
        self.injected[fault.name] += 1
        return fault.action

    def _affordable(self, fault: Fault, request: Request) -> bool:
        bound = BOUNDS[fault.bound]
        subjects = [
            (fault.bound, name, request.kind if fault.bound == "s3" else "")
            for name in request.names
        ]
        if any(self._spent[subject] >= bound for subject in subjects):
            return False
        self._spent.update(subjects)
        return True


class Dealer:
    """Tells the requests of several runs apart, and asks each run's faults."""

    def __init__(self) -> None:
        self._labels: dict[str, Faults] = {}
        self._runs: dict[str, Faults] = {}
        self._lock = threading.Lock()

    def add(self, faults: Faults, keys: Iterable[protocol.Key]) -> None:
        """Expect a run whose graph has these keys."""
        labels = {protocol.key_label(key): faults for key in keys}
        with self._lock:
            self._labels.update(labels)

    def remove(self, keys: Iterable[protocol.Key]) -> None:
        """Do not expect a run with these keys any more; the requests of its end still come."""
        with self._lock:
            for key in keys:
                self._labels.pop(protocol.key_label(key), None)

    def faults_of(self, name: str) -> Faults | None:
        """Return the faults of the run to which an object belongs."""
        return self._runs.get(protocol.run_of(name))

    def forget(self) -> None:
        """Forget all runs: they have ended."""
        with self._lock:
            self._runs.clear()

    def __call__(self, request: Request) -> Action:
        """Decide what happens to a request."""
        with self._lock:
            faults = self._runs.get(request.run)
            if faults is None and request.kind == "invoke":
                labels = (name.rpartition("/")[2] for name in request.names)
                found = (self._labels.get(label) for label in labels)
                faults = next((each for each in found if each is not None), None)
                if faults is not None:
                    self._runs[request.run] = faults
        return faults(request) if faults is not None else None
