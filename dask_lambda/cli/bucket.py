"""``dask-lambda clean`` and ``lifecycle``: what killed programs leave in the bucket.

May import: click, common; everything else late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import as_json, confirm, print_json, size, yes

if TYPE_CHECKING:
    from dask_lambda.cleaning import Bucket, Cleaned


@click.command()
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
        confirm(yes, as_json, "Delete them?")
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
        print_json({"runs": described, "uploads": found.uploads, "deleted": not dry_run})
    else:
        _print_cleaned(found, bucket, "would be deleted" if dry_run else "deleted")


@click.group(name="lifecycle")
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
        print_json({"days": days, "kept_days": kept_days})
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
        print_json({"installed": True, "days": days, "kept": kept})
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
        print_json({"removed": True})
    else:
        click.echo(f"{bucket.place.bucket} has none of our rules now")


def _configured() -> Bucket | None:
    from dask_lambda.cleaning import Bucket

    return Bucket.configured()


def _nothing_there(as_json: bool, answer: dict[str, Any]) -> None:
    if as_json:
        print_json(answer)
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
            f"{kind} {each.run}{called}: {each.objects:,} objects, {size(each.nbytes)}, "
            f"the newest of {newest}"
        )
    objects = sum(each.objects for each in found.runs)
    click.echo(
        f"{what} in {bucket.place.bucket}: {len(found.runs):,} runs with {objects:,} objects, "
        f"{found.uploads:,} unfinished uploads"
    )


def _days(number: int) -> str:
    return "1 day" if number == 1 else f"{number:,} days"
