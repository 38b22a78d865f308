"""``dask-lambda runs``: what is kept.  May import: click, common; everything else late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import as_json, confirm, print_json, size, yes

if TYPE_CHECKING:
    from dask_lambda.kept_runs import KeptRun


@click.group(short_help="Look at, or delete, kept runs and saved collections.")
def runs() -> None:
    """Look at, or delete, what was computed with `resume` or `keep`, or saved."""


@runs.command(name="list", short_help="List those of this user on this machine.")
@as_json
def list_runs(as_json: bool) -> None:
    """List the kept runs, and saved collections, of this user on this machine."""
    from dask_lambda import kept_runs
    from dask_lambda.errors import ConfigurationError

    found = []
    for name in kept_runs.names():
        try:
            found.append(_describe_run(name))
        except ConfigurationError as error:  # a broken record hides no others
            click.echo(f"{name}: {error}", err=True)
    if as_json:
        print_json({"runs": found})
        return
    if not found:
        click.echo("no runs are kept")
    for each in found:
        what = f"  {each['saved']}" if each["saved"] else ""
        click.echo(f"{each['name']:24} {each['status']:8} {_holds(each):30} {each['used']}{what}")


@runs.command(short_help="Show one: what it has in S3, and what that costs.")
@click.argument("name")
@as_json
def show(name: str, as_json: bool) -> None:
    """Show one kept run or saved collection: what it has in S3, and what that costs."""
    found = _describe_run(_record(name).name)
    if as_json:
        print_json(found)
        return
    fields = ["name", "kind", "saved", "status", "created", "used", "tasks", "results"]
    for field in (*fields, "bucket", "folder"):
        if found[field] is not None:
            click.echo(f"  {field:9} {found[field]}")
    click.echo(f"  {'objects':9} {_holds(found)}")
    if found["usd_per_month"] is not None:
        click.echo(f"  {'storage':9} ${found['usd_per_month']:.4f} a month")


@runs.command(short_help="Delete one: its objects in S3 and its record here.")
@click.argument("name")
@yes
@as_json
def delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete a kept run or saved collection: its objects in S3 and its record here."""
    from dask_lambda.cleaning import delete_run

    record = _record(name)
    confirm(yes, as_json, f"Delete the kept run {name!r} with all of its objects?")
    found = delete_run(record)
    count = found.objects if found is not None else 0
    if as_json:
        print_json({"deleted": name, "objects": count})
    else:
        click.echo(f"deleted {name}, {count:,} objects")


def _record(name: str) -> KeptRun:
    from dask_lambda import kept_runs

    record = kept_runs.read(name)
    if record is None:
        known = ", ".join(kept_runs.names()) or "none"
        raise click.ClickException(f"there is no kept run {name!r}; there are: {known}")
    return record


def _describe_run(name: str) -> dict[str, Any]:
    """Describe a kept run, without its secret."""
    from datetime import UTC, datetime

    from dask_lambda.cleaning import Bucket
    from dask_lambda.errors import DaskLambdaError
    from dask_lambda.kept_folder import kept_prefix
    from dask_lambda.prices import prices_for

    record = _record(name)
    prices = prices_for(record.place.region)
    objects: int | None = None
    nbytes: int | None = None
    status: str = record.status
    try:
        bucket = Bucket.of(record.place)
        objects = nbytes = 0
        if bucket is None:
            status = "gone"  # with the embedded AWS
        else:
            found = bucket.run(record.run, kept=True)
            objects, nbytes = found.objects, found.nbytes
    except DaskLambdaError as error:
        objects = nbytes = None
        click.echo(f"{name}: {error}", err=True)

    def date(seconds: float) -> str:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

    return {
        "name": record.name,
        "kind": record.kind,
        "saved": None if record.saved is None else record.saved.what,
        "status": status,
        "created": date(record.created),
        "used": date(record.used),
        "tasks": record.tasks,
        "results": len(record.results),
        "function": record.function,
        "bucket": record.place.bucket,
        "endpoint_url": record.place.endpoint_url,
        "folder": f"*/{kept_prefix(record.place.prefix)}/{record.run}/",
        "objects": objects,
        "bytes": nbytes,
        "usd_per_month": None if nbytes is None else prices.storage(nbytes),
    }


def _holds(found: dict[str, Any]) -> str:
    if found["objects"] is None:
        return "unknown"
    return f"{found['objects']:,} objects, {size(found['bytes'])}"
