"""``dask-lambda hello``, ``doctor``, ``logs``: what runs, what is in the way, what was said.

May import: click, common; everything else late.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import as_json, print_json, region, settings_before_deployment

if TYPE_CHECKING:
    from dask_lambda.deploy.aws import Account
    from dask_lambda.deploy.logs import Line

#: Seconds after a deployment in which permissions may not be known everywhere yet, and for which
#: they are waited for then.
JUST_DEPLOYED, PATIENCE = 120.0, 30.0

SIGNS = {"passed": "ok", "warning": "!!", "failed": "FAILED", "skipped": "--"}


@click.command(short_help="Run a function in Lambda: where, and how fast.")
@as_json
def hello(as_json: bool) -> None:
    """Run a function in Lambda: say where it ran, and how long it took."""
    from dataclasses import asdict

    from dask_lambda.deploy.hello import hello

    said = hello(patience=_patience())
    if as_json:
        print_json(asdict(said))
        return
    place = said.place
    where = f"AWS, {place['region']}"
    if said.local:
        where = "the embedded AWS on this machine"
    elif said.endpoint_url:
        where = f"{place['region']}, at {said.endpoint_url}"
    click.echo(f"hello from {place['function']} in {where}")
    click.echo(f"  {place['memory_mb']} MB, {place['processor']}, Python {place['python']}")
    start = "cold start" if said.cold else "the environment was there already"
    if said.restored:
        start = "cold start, from a snapshot"
    click.echo(f"  first call     {said.first_seconds * 1e3:8.0f} ms  ({start})")
    click.echo(f"  warm           {said.warm_seconds * 1e3:8.0f} ms")
    click.echo(f"  through S3     {said.stored_seconds * 1e3:8.0f} ms")
    click.echo(f"  cost           ${said.cost_usd:.7f}")


@click.command(short_help="Say what is in the way, and what to do.")
@region
@as_json
@click.pass_context
def doctor(context: click.Context, region: str | None, as_json: bool) -> None:
    """Check credentials, permissions, quotas, versions and clocks, and say what to do.

    Exit code 1 if anything fails.
    """
    from dask_lambda.config import Settings
    from dask_lambda.deploy.doctor import examine
    from dask_lambda.errors import ConfigurationError

    wrong = ""
    try:
        settings = Settings.resolve()
    except ConfigurationError as error:
        settings, wrong = settings_before_deployment(), str(error)
    checks = []
    for check in examine(settings, region, wrong=wrong):
        checks.append(check)
        if not as_json:
            click.echo(f"{SIGNS[check.result]:7} {check.name}: {check.said}")
            if check.advice:
                click.echo(f"        -> {check.advice}")
    failed = sum(check.result == "failed" for check in checks)
    if as_json:
        described = [
            {"name": c.name, "result": c.result, "said": c.said, "advice": c.advice} for c in checks
        ]
        print_json({"checks": described, "failed": failed})
    elif not failed:
        click.echo("nothing is in the way")
    context.exit(1 if failed else 0)


@click.command(short_help="Print what the functions have logged.")
@click.option("--run", metavar="ID", help="Only lines that name this run.")
@click.option("--since", default="1h", show_default=True, metavar="TIME", help="30m, 12h, 2d.")
@click.option("--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--all", "everything", is_flag=True, help="Lambda's own lines as well.")
@as_json
def logs(run: str | None, since: str, follow: bool, everything: bool, as_json: bool) -> None:
    """Print what the functions have logged; with --json a JSON object a line."""
    import time
    from contextlib import suppress

    from dask.utils import parse_timedelta

    from dask_lambda.deploy import logs as reader

    try:
        begin = int((time.time() - parse_timedelta(since, default=False)) * 1000)
    except (KeyError, ValueError, TypeError) as error:
        raise click.BadParameter(f"{since!r} is no time: use 30m, 12h or 2d") from error
    account, functions = _configured()
    read = reader.follow if follow else reader.read
    with suppress(KeyboardInterrupt):
        for line in read(account, functions, begin, run=run):
            if everything or not line.is_platform:
                click.echo(_as_json(line) if as_json else _as_text(line))


def _patience() -> float:
    """Return for how long a missing permission may be one that is only too new."""
    import time
    from contextlib import suppress

    from dask_lambda.deploy import record

    for each in record.find(None):
        with suppress(OSError):
            if time.time() - each.path.stat().st_mtime < JUST_DEPLOYED:
                return PATIENCE
    return 0.0


def _configured() -> tuple[Account, list[str]]:
    """Return the account and the functions that computations use."""
    from dask_lambda.config import Settings
    from dask_lambda.deploy.aws import Account
    from dask_lambda.local_shared import shared_status

    settings = Settings.resolve()
    if not settings.is_local:
        assert settings.function is not None
        account = Account.open(settings.region, settings.endpoint_url)
        return account, [settings.function, *settings.larger_functions.values()]
    shared = shared_status()
    if shared is None:
        raise click.ClickException(
            "no function is configured (dask-lambda deploy), and no embedded AWS is kept running "
            "(dask-lambda local start): one that a program starts for itself ends with it"
        )
    return Account.of_local(shared), [shared.function]


def _as_json(line: Line) -> str:
    told: dict[str, Any] = {
        "time": line.time,
        "function": line.function,
        "stream": line.stream,
    }
    record = line.record
    return json.dumps({**told, "record": record} if record else {**told, "text": line.text})


def _as_text(line: Line) -> str:
    from datetime import UTC, datetime

    when = datetime.fromtimestamp(line.time / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    record = line.record
    if record is None:
        return f"{when}  {_plain(line.text)}"
    groups = record.get("groups", 0)
    run = record["run"]
    who = "no run" if run is None else f"run {_plain(str(run))}"  # of `doctor`, or of `warm`
    text = (
        f"{who:36}  {record.get('milliseconds', 0):8.1f} ms  "
        f"{groups} {'group' if groups == 1 else 'groups'}"
    )
    if record.get("cold"):
        text += "  cold start"
    if record.get("errors"):
        text += f"  {record['errors']} failed"
    keys = [str(each.get("key")) for each in record.get("work", [])]
    if keys:
        text += "  " + ", ".join(map(_plain, keys))
    return f"{when}  {text}"


def _plain(text: str) -> str:
    """Show what would control the terminal: a log holds whatever tasks print."""
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in text)
