"""What all commands share.  May import: click; everything else late."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dask_lambda.config import Settings

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes = click.option("--yes", is_flag=True, help="Do not ask.")
name = click.option("--name", default="dask-lambda", show_default=True, help="Of the deployment.")
region = click.option("--region", help="Default: that of your AWS profile, or AWS_REGION.")
endpoint_url = click.option(
    "--endpoint-url", metavar="URL", help="Of an emulator, in place of AWS's own."
)


def size(nbytes: int) -> str:
    """Return a number of bytes for people to read."""
    from dask.utils import format_bytes

    return format_bytes(nbytes)


def confirm(yes: bool, as_json: bool, question: str) -> None:
    """Go on if the user says so."""
    if yes:
        return
    if as_json:
        raise click.UsageError("with --json nobody is asked: add --yes")
    click.confirm(question, abort=True)


def print_json(value: dict[str, Any]) -> None:
    """Print an answer as JSON."""
    click.echo(json.dumps(value, indent=1))


def settings_before_deployment() -> Settings:
    """Return the settings without functions and bucket, which may not be there yet."""
    from dask_lambda.config import Settings

    return Settings.resolve(backend="local", larger_functions={})
