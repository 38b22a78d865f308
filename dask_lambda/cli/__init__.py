"""The command line, ``dask-lambda`` or ``python -m dask_lambda``.

May import: click, its own modules of commands; everything else inside the commands, so that
``--help`` is immediate.
"""

from __future__ import annotations

from typing import Any

import click

from dask_lambda.cli import bucket, cost, deploy, env, local, look, runs


class _Group(click.Group):
    """A group whose commands show our errors as one message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from dask_lambda.errors import DaskLambdaError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if str(interrupt):  # what was done so far
                click.echo(str(interrupt), err=True)
            raise
        except DaskLambdaError as error:
            raise click.ClickException(str(error)) from error
        except Exception as error:
            if type(error).__module__.startswith("botocore."):  # not imported for this alone
                raise click.ClickException(f"AWS: {error}") from error
            raise


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


for command in (
    *(deploy.deploy, deploy.status, deploy.destroy),
    *(look.hello, look.doctor, look.logs),
    *(env.env, local.local, runs.runs, cost.cost, bucket.clean, bucket.lifecycle_rules),
):
    main.add_command(command)
