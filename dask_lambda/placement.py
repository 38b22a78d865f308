"""Where tasks run: on Lambda, or on machines of the user's own.

May import: config, plan, errors, the ground.

Tasks run on Lambda, unless they are annotated ``where="local"``, or declare (``memory=``,
``seconds=``) more than Lambda has.  What Lambda could run if it were configured for it is another
matter: a laptop that quietly does the work of a function that is too small by an oversight would be
a surprise.  So such tasks are refused, with the setting to raise, unless the user has named an
executor, which says that it is there for work.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container
from dataclasses import dataclass, field

from dask_lambda.config import MAX_MEMORY, MAX_TIMEOUT, Settings
from dask_lambda.errors import (
    ConfigurationError,
    DaskLambdaError,
    FunctionTimeoutError,
    OutOfMemoryError,
)
from dask_lambda.plan import Where
from lambda_worker.memory import machine_memory
from lambda_worker.protocol import Key

logger = logging.getLogger("dask_lambda")

#: In place of a key: what was active when the graph was computed, and is said of all its tasks.
EVERY_TASK = "the computation"
#: How many tasks are named in one line of the log.
NAMED = 5


@dataclass(frozen=True, slots=True)
class Offer:
    """What there is to run tasks.

    Attributes
    ----------
    memory_mb : int
        Of the largest function.
    timeout : float
        Of the function, in seconds.
    local : bool
        Whether tasks may run outside of Lambda.
    chosen : bool
        Whether the user has said where.
    local_mb : float
        Memory there; infinite if it is not known.
    """

    memory_mb: int
    timeout: float
    local: bool = True
    chosen: bool = False
    local_mb: float = math.inf

    @classmethod
    def of(cls, settings: Settings, memory_mb: int) -> Offer:
        """Return what is configured.

        Parameters
        ----------
        settings : Settings
        memory_mb : int
            Of the usual function.
        """
        executor = settings.local_executor
        anywhere = hasattr(executor, "get_executor")  # a cluster's machines are not this one
        return cls(
            max(memory_mb, *settings.larger_functions, 0),
            settings.timeout,
            local=executor != "none",
            chosen=executor not in ("auto", "none"),
            local_mb=math.inf if anywhere else machine_memory() // 2**20,
        )

    def __str__(self) -> str:
        function = (
            f"the largest function has {self.memory_mb:,} MB and {self.timeout:,g} s "
            f"(Lambda allows {MAX_MEMORY:,} MB and {MAX_TIMEOUT} s)"
        )
        if not self.local:
            return f"{function}, and nothing runs on this machine (dask-lambda.local-executor)"
        if self.local_mb == math.inf:
            return function
        return f"{function}, this machine {self.local_mb:,.0f} MB"


@dataclass(frozen=True, slots=True)
class Declared:
    """What is said of a task.

    Attributes
    ----------
    where : {"lambda", "local"}, optional
    memory : int
        Bytes that it needs.
    seconds : float
        That it takes.
    """

    where: Where | None = None
    memory: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        said = []
        if self.memory:
            said.append(f"{self.memory / 2**20:,.0f} MB of memory")
        if self.seconds:
            said.append(f"{self.seconds:,g} s")
        return " and ".join(said)


def place(name: str, declared: Declared, offer: Offer) -> tuple[Where, str]:
    """Decide where a task runs.

    Parameters
    ----------
    name : str
        Of the task, for errors.
    declared : Declared
    offer : Offer

    Returns
    -------
    where : {"lambda", "local"}
    why : str
        What it declares that Lambda has not, if that is the reason.

    Raises
    ------
    ConfigurationError
        If it is to run locally, and that is switched off.
    OutOfMemoryError, FunctionTimeoutError
        If it fits nowhere.
    """
    too_large = declared.memory > offer.memory_mb * 2**20
    too_long = declared.seconds > offer.timeout
    if declared.where == "local":
        if not offer.local:
            raise ConfigurationError(
                f"Task {name} is annotated with where='local', but dask-lambda.local-executor is "
                "'none': set it to 'auto', or to an executor"
            )
        if declared.memory > offer.local_mb * 2**20:
            raise _fits_nowhere(name, declared, offer, too_large)
        return "local", ""
    if declared.where == "lambda":
        if too_large:
            raise _too_small(name, declared, offer, too_large)
        return "lambda", ""
    if not (too_large or too_long):
        return "lambda", ""
    never = declared.memory > MAX_MEMORY * 2**20 or declared.seconds > MAX_TIMEOUT
    if not (never or (offer.chosen and offer.local)):
        raise _too_small(name, declared, offer, too_large)
    if not offer.local or declared.memory > offer.local_mb * 2**20:
        raise _fits_nowhere(name, declared, offer, too_large)
    return "local", f"it declares {declared}"


def _too_small(name: str, declared: Declared, offer: Offer, too_large: bool) -> DaskLambdaError:
    advice = (
        "Give the function more memory (dask-lambda.memory), name a larger one in "
        "dask-lambda.larger-functions, or make the chunks smaller"
        if too_large
        else "Raise the function's time-out (dask-lambda.timeout), or make the chunks smaller"
    )
    elsewhere = "; annotate the task with where='local' to run it on this machine"
    return _error(too_large)(
        f"Task {name} declares {declared}, but {offer}; nothing was sent. {advice}"
        f"{elsewhere if offer.local else ''}."
    )


def _fits_nowhere(name: str, declared: Declared, offer: Offer, too_large: bool) -> DaskLambdaError:
    return _error(too_large or declared.memory > offer.local_mb * 2**20)(
        f"Task {name} fits nowhere: it declares {declared}, but {offer}; nothing was sent. Make "
        "the chunks smaller, or have dask-lambda.local-executor name an executor on a machine "
        "that is large enough."
    )


def _error(too_large: bool) -> type[DaskLambdaError]:
    return OutOfMemoryError if too_large else FunctionTimeoutError


@dataclass
class Placement:
    """Where each task of a computation runs: a function of the key.

    Attributes
    ----------
    usual : {"lambda", "local"}
        Of tasks of which nothing is said.
    of : dict
        Of the others, by key.
    reasons : dict
        Why, of those that Lambda cannot run; :data:`EVERY_TASK` stands for all.
    """

    usual: Where = "lambda"
    of: dict[Key, Where] = field(default_factory=dict)
    reasons: dict[Key, str] = field(default_factory=dict)

    def __call__(self, key: Key) -> Where:
        """Return where a task runs."""
        return self.of.get(key, self.usual)

    def tell(self, tasks: Container[Key]) -> None:
        """Say which tasks do not run on Lambda although nobody has asked for that.

        Parameters
        ----------
        tasks : container of key
            That are run at all.
        """
        found = {key: why for key, why in self.reasons.items() if key in tasks}
        named = [f"{key!r} ({why})" for key, why in list(found.items())[:NAMED]]
        if not named and self.usual == "local" and EVERY_TASK in self.reasons:
            named = [f"all of {EVERY_TASK} ({self.reasons[EVERY_TASK]})"]
        if named:
            logger.warning(
                "outside of Lambda, since no function that is configured can run them, run these "
                "tasks: %s%s. They run on Lambda if they declare no more than a function has "
                "(dask-lambda.memory and dask-lambda.larger-functions up to %s MB, "
                "dask-lambda.timeout up to %d s)",
                ", ".join(named),
                f", and {len(found) - NAMED} more" if len(found) > NAMED else "",
                f"{MAX_MEMORY:,}",
                MAX_TIMEOUT,
            )
