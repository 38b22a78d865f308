"""What of distributed's cannot work on Lambda: found before it is sent, or in what it raises.

May import: graph, errors, the ground, dask.

A function on Lambda has no connection to other tasks, nor to the scheduler.
"""

from __future__ import annotations

import re
from typing import Any

from dask._task_spec import GraphNode, Task, _execute_subgraph

from dask_lambda.errors import NotOnLambdaError
from dask_lambda.graph import short
from lambda_worker.calls import call_joblib
from lambda_worker.protocol import Key

_INSTEAD = (
    "A task on Lambda has no worker and no client, so that it cannot submit tasks, use locks, "
    "queues or actors, or step back from its thread: submit further tasks from the client when its "
    "result is there (as_completed), or express them as a graph (dask.delayed) beforehand."
)
_P2P = (
    "it is part of a P2P shuffle, merge or rechunk, for which workers send each other data, which "
    "functions on Lambda cannot. Use dask.config.set({'dataframe.shuffle.method': 'tasks', "
    "'array.rechunk.method': 'tasks'}), which importing dask_lambda does if you have not set them."
)
_ACTOR = (
    "it is an actor, which lives on a worker, and functions on Lambda do not live on. Keep its "
    "state in the results of tasks: each takes the last state, and returns the next one."
)

#: Where a remote traceback has been: file, function.
_FRAME = re.compile(r'^  File "([^"]+)", line \d+, in (\S+)$', re.MULTILINE)
_OWN = re.compile(r"[/\\]distributed[/\\][\w/\\]+\.py$")
_SHUFFLE = re.compile(r"[/\\]distributed[/\\]shuffle[/\\]\w+\.py$")
#: What tasks call to have a worker or a client.
_CALLS = frozenset(
    {"get_worker", "get_client", "worker_client", "secede", "rejoin", "current", "default_client"}
)
#: Functions of dask.dataframe that end in a P2P shuffle.
_TRANSFERS = frozenset({"_shuffle_transfer", "assign_index_merge_transfer"})


def refusal(key: Key, node: GraphNode, *, actor: bool) -> NotOnLambdaError | None:
    """Return why a task cannot run on Lambda, as far as can be seen.

    Parameters
    ----------
    key : key
    node : GraphNode
    actor : bool
        Whether it is to be one.
    """
    why = _ACTOR if actor else _P2P if _is_p2p(node) else ""
    return NotOnLambdaError(f"Task {short(key)} was not sent to Lambda: {why}") if why else None


def _is_p2p(node: Any) -> bool:
    """Whether a task, or one that is fused into it, sends data to other workers."""
    if not isinstance(node, Task):
        return False
    function = node.func
    modules = type(node).__module__, getattr(function, "__module__", None) or ""
    if any(module.startswith("distributed.shuffle") for module in modules):
        return True
    if function is _execute_subgraph:
        return any(map(_is_p2p, node.args[0].values()))
    return getattr(function, "__name__", "") in _TRANSFERS and modules[1].startswith("dask.")


def adapted(node: GraphNode) -> GraphNode:
    """Return the task to run in place of one of joblib's, which looks for a client."""
    if not isinstance(node, Task):
        return node
    function = node.func
    batch = getattr(function, "func", None)  # inside what catches tracebacks
    modules = type(function).__module__, type(batch).__module__
    if modules != ("joblib._utils", "joblib._dask"):
        return node
    return Task(node.key, call_joblib, function, *node.args, **node.kwargs)


def explained(key: Key, error: BaseException) -> BaseException:
    """Return what to tell of a failure: of what needs a worker, that there is none."""
    if not isinstance(error, ValueError | AttributeError | RuntimeError):
        return error
    notes = "\n".join(getattr(error, "__notes__", ()))
    frames = _FRAME.findall(notes)
    own = [name for path, name in frames if _OWN.search(path)]
    if not own:
        return error
    said = f"{type(error).__name__}: {error}"
    if any(_SHUFFLE.search(path) for path, _ in frames):
        words = f"Task {short(key)} failed on Lambda ({said}): {_P2P}"
    elif (called := next((name for name in own if name in _CALLS), "")) or _OWN.search(
        frames[-1][0]
    ):
        words = (
            f"Task {short(key)} called distributed's {called or own[0]}() on Lambda, where it does "
            f"not work ({said}). {_INSTEAD}"
        )
    else:
        return error
    explanation = NotOnLambdaError(words)
    explanation.add_note(notes)
    return explanation
