"""``dask-lambda cost``: what kept runs cost.  May import: click, common; everything else late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import as_json, print_json, size

if TYPE_CHECKING:
    from dask_lambda.kept_runs import KeptRun

COLUMNS = ("name", "status", "runs", "invocations", "GB-s", "USD", "stored", "USD a month")


@click.command(short_help="Say what kept runs cost, and what storing them costs.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--no-storage", is_flag=True, help="Do not ask S3 how much is stored.")
@as_json
def cost(names: tuple[str, ...], no_storage: bool, as_json: bool) -> None:
    """Say what kept runs and saved collections have cost, and what storing them costs.

    All of this user on this machine, or those that are named.  What ran without `resume`, `keep` or
    `save` leaves no record: its report said what it cost.
    """
    from dask_lambda import kept_runs
    from dask_lambda.errors import ConfigurationError

    found = []
    for name in names or kept_runs.names():
        try:
            record = kept_runs.read(name)
        except ConfigurationError as error:  # a broken record hides no others
            click.echo(f"{name}: {error}", err=True)
            continue
        if record is None:
            known = ", ".join(kept_runs.names()) or "none"
            raise click.ClickException(f"there is no kept run {name!r}; there are: {known}")
        found.append(_describe(record, storage=not no_storage))
    total = {field: _sum(each[field] for each in found) for field in SUMMED}
    if as_json:
        print_json({"runs": found, "total": total})
        return
    if not found:
        click.echo("no runs are kept: only those with a name are (resume=NAME, or save()); what")
        click.echo("another one has cost, last_report() says in the program that ran it")
        return
    _print_table(found, total)


#: Of these there is a sum over all runs.
SUMMED = (
    *("computations", "invocations", "gb_seconds", "cost_usd"),
    *("objects", "bytes", "usd_per_month"),
)


def _describe(record: KeptRun, *, storage: bool) -> dict[str, Any]:
    """Describe what a kept run costs; None stands for what is not known."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from dask_lambda.config import Settings
    from dask_lambda.prices import prices_for

    prices = prices_for(record.place.region, Settings.resolve().prices)
    spent = dict.fromkeys(("since", *SUMMED[:4])) if record.spent is None else asdict(record.spent)
    if record.spent is not None:
        since = datetime.fromtimestamp(record.spent.since, UTC)
        spent["since"] = since.isoformat(timespec="seconds")
    objects, nbytes, status = _stored(record) if storage else (None, None, record.status)
    notes = []
    if record.spent is None:
        notes.append("written by an earlier version, which did not count")
    elif record.spent.since > record.created + 1:
        notes.append(f"counted since {spent['since']}, when there was something already")
    if record.status == "running":
        notes.append("goes on, or was killed: what that has cost is not counted")
    return {
        "name": record.name,
        "kind": record.kind,
        "status": status,
        **spent,
        "objects": objects,
        "bytes": nbytes,
        "usd_per_month": None if nbytes is None else prices.storage(nbytes),
        "storage_prices": prices.source,
        "notes": notes,
    }


def _stored(record: KeptRun) -> tuple[int | None, int | None, str]:
    """Ask S3 what a kept run has there: objects, their bytes, and whether it is there at all."""
    from dask_lambda.cleaning import Bucket
    from dask_lambda.errors import DaskLambdaError

    try:
        bucket = Bucket.of(record.place)
        if bucket is None:
            return 0, 0, "gone"  # with the embedded AWS
        found = bucket.run(record.run, kept=True)
    except DaskLambdaError as error:
        click.echo(f"{record.name}: {error}", err=True)
        return None, None, record.status
    return found.objects, found.nbytes, record.status


def _sum(figures: Any) -> Any:
    """Add what is known; None if nothing is."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if known else None


def _print_table(found: list[dict[str, Any]], total: dict[str, Any]) -> None:
    rows = [COLUMNS, *map(_row, found), _row({"name": "all", "status": "", **total})]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        texts = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in _paired(row, widths)]
        click.echo("  ".join(texts).rstrip())
    for each in found:
        for note in each["notes"]:
            click.echo(f"{each['name']}: {note}")
    sources = sorted({each["storage_prices"] for each in found})
    click.echo(f"storage at the prices of {' / '.join(sources)}; ? is not known")


def _paired(row: tuple[str, ...], widths: list[int]) -> Any:
    return enumerate(zip(row, widths, strict=True))


def _row(each: dict[str, Any]) -> tuple[str, ...]:
    def text(field: str, form: str) -> str:
        return "?" if each[field] is None else form.format(each[field])

    stored = "?" if each["bytes"] is None else size(each["bytes"])
    return (
        each["name"],
        each["status"],
        text("computations", "{:,}"),
        text("invocations", "{:,}"),
        text("gb_seconds", "{:,.1f}"),
        text("cost_usd", "{:,.6f}"),
        stored,
        text("usd_per_month", "{:,.6f}"),
    )
