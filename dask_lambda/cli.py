"""The command line, ``dask-lambda`` or ``python -m dask_lambda``.

May import: click; everything else inside the commands, so that ``--help`` is immediate.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dask_lambda.cleaning import Bucket, Cleaned
    from dask_lambda.kept_runs import KeptRun
    from dask_lambda.local import LocalAWS

#: Exit code of ``status`` when nothing runs, as with the init scripts of Unix services.
NOT_RUNNING = 3

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes = click.option("--yes", is_flag=True, help="Do not ask.")


class _Group(click.Group):
    """A group whose commands show our errors as one message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from dask_lambda.errors import DaskLambdaError

        try:
            return super().invoke(ctx)
        except DaskLambdaError as error:
            raise click.ClickException(str(error)) from error


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    from importlib import metadata

    if wanted and not context.resilient_parsing:
        try:
            version = metadata.version("dask_lambda")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"dask-lambda {version}")
        context.exit()


@click.group(cls=_Group)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def main() -> None:
    """Run Dask graphs on AWS Lambda and S3."""


@main.group()
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
        _print_json({**_describe(aws), "started": started})
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
        _print_json({"running": False} if aws is None else _describe(aws))
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
        _print_json({"stopped": stopped})
    else:
        click.echo("stopped" if stopped else "not running")


@main.group()
def runs() -> None:
    """Look at, or delete, what was computed with `resume` or `keep`, or saved."""


@runs.command(name="list")
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
        _print_json({"runs": found})
        return
    if not found:
        click.echo("no runs are kept")
    for each in found:
        what = f"  {each['saved']}" if each["saved"] else ""
        click.echo(f"{each['name']:24} {each['status']:8} {_holds(each):30} {each['used']}{what}")


@runs.command()
@click.argument("name")
@as_json
def show(name: str, as_json: bool) -> None:
    """Show one kept run or saved collection: what it has in S3, and what that costs."""
    found = _describe_run(_record(name).name)
    if as_json:
        _print_json(found)
        return
    fields = ["name", "kind", "saved", "status", "created", "used", "tasks", "results"]
    for field in (*fields, "bucket", "folder"):
        if found[field] is not None:
            click.echo(f"  {field:9} {found[field]}")
    click.echo(f"  {'objects':9} {_holds(found)}")
    if found["usd_per_month"] is not None:
        click.echo(f"  {'storage':9} ${found['usd_per_month']:.4f} a month")


@runs.command()
@click.argument("name")
@yes
@as_json
def delete(name: str, yes: bool, as_json: bool) -> None:
    """Delete a kept run or saved collection: its objects in S3 and its record here."""
    from dask_lambda.cleaning import delete_run

    record = _record(name)
    _confirm(yes, as_json, f"Delete the kept run {name!r} with all of its objects?")
    found = delete_run(record)
    count = found.objects if found is not None else 0
    if as_json:
        _print_json({"deleted": name, "objects": count})
    else:
        click.echo(f"deleted {name}, {count:,} objects")


@main.command()
@click.option(
    "--older-than",
    required=True,
    metavar="TIME",
    help="Only runs whose newest object is older: 1d, 12h, 30m, 0s.",
)
@click.option("--kept", is_flag=True, help="Kept runs as well, and their records.")
@click.option("--saved", is_flag=True, help="Kept runs, and saved collections among them.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@yes
@as_json
def clean(
    older_than: str, kept: bool, saved: bool, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete what killed programs have left in the bucket.

    Only objects with names like ours are looked at, in the bucket that is configured.  A run that
    goes on writes objects, so choose a time that no run is silent for.
    """
    from datetime import timedelta

    from dask.utils import parse_timedelta

    try:
        age = timedelta(seconds=parse_timedelta(older_than, default=False))
    except (KeyError, ValueError, TypeError) as error:
        raise click.BadParameter(f"{older_than!r} is no time: use 1d, 12h, 30m or 0s") from error
    bucket = _configured()
    if bucket is None:
        _nothing_there(as_json, {"runs": [], "uploads": 0})
        return
    kept |= saved
    found = bucket.clean(age, kept=kept, saved=saved, dry=True)
    if not dry_run and (found.runs or found.uploads):
        if not yes and not as_json:
            _print_cleaned(found, bucket, "to be deleted")
        _confirm(yes, as_json, "Delete them?")
        found = bucket.clean(age, kept=kept, saved=saved)
    if as_json:
        described = [
            {
                "run": each.run,
                "kept": each.kept,
                "saved": each.saved,
                "name": each.name,
                "objects": each.objects,
                "bytes": each.nbytes,
                "newest": each.newest.isoformat(),
            }
            for each in found.runs
        ]
        _print_json({"runs": described, "uploads": found.uploads, "deleted": not dry_run})
    else:
        _print_cleaned(found, bucket, "would be deleted" if dry_run else "deleted")


@main.group(name="lifecycle")
def lifecycle_rules() -> None:
    """Have S3 itself delete what killed programs leave."""


@lifecycle_rules.command(name="show")
@as_json
def show_lifecycle(as_json: bool) -> None:
    """Say after how many days S3 deletes our objects."""
    from dask_lambda.kept_folder import kept_prefix
    from dask_lambda.lifecycle import days_of

    bucket = _configured()
    if bucket is None:
        _nothing_there(as_json, {"days": None, "kept_days": None})
        return
    rules = bucket.rules()
    days = days_of(rules, bucket.place.prefix)
    kept_days = days_of(rules, kept_prefix(bucket.place.prefix))
    if as_json:
        _print_json({"days": days, "kept_days": kept_days})
        return
    for what, number in (("objects of runs", days), ("kept runs", kept_days)):
        said = f"are deleted after {_days(number)}" if number else "are not deleted"
        click.echo(f"{what} {said}")


@lifecycle_rules.command()
@click.option("--days", type=click.IntRange(min=1), required=True, help="Age of the objects.")
@click.option("--kept", is_flag=True, help="Kept runs as well, and saved collections.")
@as_json
@click.pass_context
def install(context: click.Context, days: int, kept: bool, as_json: bool) -> None:
    """Add our rules to the bucket's; others stay.

    They are for objects below our prefix only, in the bucket that is configured.
    """
    bucket = _configured()
    if bucket is None:
        _nothing_there(as_json, {"installed": False})
        context.exit(1)
    bucket.install(days, kept=kept)
    if as_json:
        _print_json({"installed": True, "days": days, "kept": kept})
    else:
        place = bucket.place
        said = f"objects of runs in {place.bucket} (*/{place.prefix}/*)"
        click.echo(f"{said} are deleted after {_days(days)}")
        if kept:
            from dask_lambda.kept_folder import kept_prefix

            click.echo(f"and kept runs (*/{kept_prefix(place.prefix)}/*) as well")


@lifecycle_rules.command()
@as_json
def remove(as_json: bool) -> None:
    """Remove our rules from the bucket; others stay."""
    bucket = _configured()
    if bucket is None:
        _nothing_there(as_json, {"removed": False})
        return
    bucket.uninstall()
    if as_json:
        _print_json({"removed": True})
    else:
        click.echo(f"{bucket.place.bucket} has none of our rules now")


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
    from dask_lambda.cost import Prices
    from dask_lambda.errors import DaskLambdaError
    from dask_lambda.kept_folder import kept_prefix

    record = _record(name)
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
        "usd_per_month": None if nbytes is None else nbytes / 1e9 * Prices().s3_gb_month,
    }


def _holds(found: dict[str, Any]) -> str:
    if found["objects"] is None:
        return "unknown"
    return f"{found['objects']:,} objects, {_size(found['bytes'])}"


def _configured() -> Bucket | None:
    from dask_lambda.cleaning import Bucket

    return Bucket.configured()


def _nothing_there(as_json: bool, answer: dict[str, Any]) -> None:
    if as_json:
        _print_json(answer)
    else:
        click.echo(
            "no bucket is configured, and no embedded AWS is kept running: one that a program "
            "starts for itself ends with it, and leaves nothing"
        )


def _print_cleaned(found: Cleaned, bucket: Bucket, what: str) -> None:
    for each in found.runs:
        kind = "saved collection" if each.saved else "kept run" if each.kept else "run"
        called = f" ({each.name})" if each.name else ""
        newest = each.newest.isoformat(timespec="seconds")
        click.echo(
            f"{kind} {each.run}{called}: {each.objects:,} objects, {_size(each.nbytes)}, "
            f"the newest of {newest}"
        )
    objects = sum(each.objects for each in found.runs)
    click.echo(
        f"{what} in {bucket.place.bucket}: {len(found.runs):,} runs with {objects:,} objects, "
        f"{found.uploads:,} unfinished uploads"
    )


def _days(number: int) -> str:
    return "1 day" if number == 1 else f"{number:,} days"


def _size(nbytes: int) -> str:
    from dask.utils import format_bytes

    return format_bytes(nbytes)


def _confirm(yes: bool, as_json: bool, question: str) -> None:
    if yes:
        return
    if as_json:
        raise click.UsageError("with --json nobody is asked: add --yes")
    click.confirm(question, abort=True)


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


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))
