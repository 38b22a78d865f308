"""``dask-lambda local``: an embedded AWS for several programs.  May import: click, common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import as_json, print_json

if TYPE_CHECKING:
    from dask_lambda.local import LocalAWS

#: Exit code of ``status`` when nothing runs, as with the init scripts of Unix services.
NOT_RUNNING = 3


@click.group()
def local() -> None:
    """Keep an embedded AWS running, for several programs."""


@local.command()
@click.option(
    "--concurrency",
    type=click.IntRange(1, 10_000),
    help="Concurrent invocations, each a process; default: three for each core.",
)
@click.option("--port", type=click.IntRange(1, 65_535), help="Default: a free port.")
@as_json
def start(concurrency: int | None, port: int | None, as_json: bool) -> None:
    """Start it, unless it is running."""
    from dask_lambda.local_shared import shared_status, start_shared

    before = shared_status()
    aws = start_shared(concurrency=concurrency, port=port)
    started = before is None or before.pid != aws.pid
    if as_json:
        print_json({**_describe(aws), "started": started})
        return
    click.echo("started" if started else "already running")
    _print_description(aws)
    click.echo("Dask programs on this machine use it now; to stop it: dask-lambda local stop")


@local.command()
@as_json
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Say whether it runs: exit code 0, or 3 if it does not."""
    from dask_lambda.local_shared import shared_status

    aws = shared_status()
    if as_json:
        print_json({"running": False} if aws is None else _describe(aws))
    elif aws is None:
        click.echo("not running")
    else:
        click.echo("running")
        _print_description(aws)
    context.exit(NOT_RUNNING if aws is None else 0)


@local.command()
@as_json
def stop(as_json: bool) -> None:
    """Stop it, if it is running, and remove its data."""
    from dask_lambda.local_shared import stop_shared

    stopped = stop_shared()
    if as_json:
        print_json({"stopped": stopped})
    else:
        click.echo("stopped" if stopped else "not running")


def _describe(aws: LocalAWS) -> dict[str, Any]:
    return {
        "running": True,
        "endpoint_url": aws.endpoint_url,
        "region": aws.region,
        "function": aws.function,
        "bucket": aws.bucket,
        "concurrency": aws.concurrency,
        "memory": aws.memory,
        "timeout": aws.timeout,
        "pid": aws.pid,
        "directory": str(aws.directory),
    }


def _print_description(aws: LocalAWS) -> None:
    for name in ("endpoint_url", "function", "bucket", "concurrency", "pid"):
        click.echo(f"  {name.replace('_url', ''):12} {getattr(aws, name)}")
