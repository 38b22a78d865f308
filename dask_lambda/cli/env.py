"""``dask-lambda env``: the packages that workers run; and the options that choose them.

May import: click, common; everything else late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import as_json, print_json, settings_before_deployment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dask_lambda.deploy.package import Package

#: So many packages are named; the others are added up.
LARGEST = 8

OPTIONS = (
    click.option("--package", "packages", multiple=True, help="A package that tasks import."),
    click.option(
        "--from",
        "requirements",
        type=click.Path(exists=True, dir_okay=False),
        help="A file with requirements.",
    ),
    click.option("--everything", is_flag=True, help="All packages that are installed here."),
    click.option("--without", multiple=True, help="A package that no task needs."),
    click.option(
        "--architecture",
        type=click.Choice(["x86_64", "arm64"]),
        default="x86_64",
        show_default=True,
        help="arm64 costs a fifth less for the same time.",
    ),
)


def choice_of_packages(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose packages."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def requirements(packages: Sequence[str]) -> list[str]:
    """Return what was asked for, with what Dask's configuration makes workers need."""
    more = ["zstandard"] if settings_before_deployment().compression == "zstd" else []
    return [*packages, *more]


def build_packages(given: dict[str, Any], form: Any = "auto") -> Package:
    """Build what the options choose, or find it built."""
    from pathlib import Path

    from dask_lambda.deploy import package

    click.echo("building the workers' packages, unless they are built already ...", err=True)
    return package.build(
        requirements(given["packages"]),
        requirements=Path(given["requirements"]) if given["requirements"] else None,
        everything=given["everything"],
        without=given["without"],
        architecture=given["architecture"],
        form=form,
    )


@click.group()
def env() -> None:
    """Build, or look at, the packages that workers run."""


@env.command(short_help="Build them as `deploy` would; nothing is uploaded.")
@choice_of_packages
@click.option(
    "--form",
    type=click.Choice(["auto", "layers", "image"]),
    default="auto",
    show_default=True,
    help="auto: layers, unless they would be too large or a package has no wheel for them.",
)
@as_json
def build(form: str, as_json: bool, **given: Any) -> None:
    """Build the workers' packages, as `deploy` would; nothing is uploaded.

    They are taken in the versions that are installed here.
    """
    from dask_lambda.deploy import package

    built = build_packages(given, form)
    recipe = package.image_recipe(built).context / "Dockerfile" if built.form == "image" else None
    if as_json:
        print_json({**_describe(built), "recipe": str(recipe) if recipe else None})
        return
    _print(built)
    if recipe is not None:
        click.echo(f"the recipe of the container image: {recipe}")


@env.command(short_help="List what was built here, or show one.")
@click.argument("environment", required=False)
@as_json
def show(environment: str | None, as_json: bool) -> None:
    """List the environments that were built here, or show one: sizes, versions, what was cut.

    ENVIRONMENT is its hash, or the beginning of it.
    """
    from dask_lambda.deploy import package

    kept = package.kept()
    if environment is None:
        if as_json:
            print_json({"environments": [_describe(each) for each in kept]})
            return
        if not kept:
            click.echo("no environment was built here: dask-lambda env build")
        for each in kept:
            click.echo(f"{each.digest}  {_form(each):38} {_megabytes(each.unzipped)}")
        return
    found = [each for each in kept if each.digest.startswith(environment)]
    if len(found) != 1:
        known = ", ".join(each.digest for each in found or kept) or "none"
        which = f"several environments begin with {environment!r}" if found else ""
        raise click.ClickException(
            f"{which or f'there is no environment {environment!r}'}; there are: {known}"
        )
    if as_json:
        print_json(_describe(found[0]))
        return
    _print(found[0])
    click.echo("packages:")
    for name, version in sorted(found[0].packages.items()):
        click.echo(f"  {name} {version}")


def summary(built: Package) -> str:
    """Say in a line what an environment is and what takes the room."""
    largest = ", ".join(f"{each.name} {each.nbytes / 1e6:.0f}" for each in built.sizes[:4])
    return (
        f"{len(built.packages)} packages, {_megabytes(built.unzipped)} unzipped ({largest}, ...), "
        f"environment {built.digest}"
    )


def _print(built: Package) -> None:
    click.echo(f"environment {built.digest}: {_form(built)}")
    if built.because:
        click.echo(f"  an image, because {built.because}")
    zipped = sum(layer.nbytes for layer in built.layers)
    of_them = f", {_megabytes(zipped)} zipped" if built.layers else ""
    click.echo(f"  {_megabytes(built.unzipped)} unzipped{of_them}")
    rows = [(f"{each.name} {each.version}", each.nbytes) for each in built.sizes[:LARGEST]]
    if rest := built.sizes[LARGEST:]:
        rows.append((f"{len(rest)} others", sum(each.nbytes for each in rest)))
    for name, nbytes in rows:
        click.echo(f"    {name:32} {nbytes / 1e6:8.1f} MB")
    click.echo("  left out:")
    for why, nbytes in built.cuts.items():
        click.echo(f"    {why:32} {nbytes / 1e6:8.1f} MB")
    click.echo(f"  kept in {built.directory}")


def _form(built: Package) -> str:
    kind = "an image" if built.form == "image" else f"{len(built.layers)} layers"
    return f"{kind}, Python {built.platform.python}, {built.platform.architecture}"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def _describe(built: Package) -> dict[str, Any]:
    return {
        "environment": built.digest,
        "form": built.form,
        "because": built.because or None,
        "python": built.platform.python,
        "architecture": built.platform.architecture,
        "listed": list(built.listed),
        "packages": dict(built.packages),
        "unzipped": built.unzipped,
        "zipped": sum(layer.nbytes for layer in built.layers) or None,
        "layers": [
            {"file": each.file, "bytes": each.nbytes, "packages": list(each.packages)}
            for each in built.layers
        ],
        "sizes": {each.name: each.nbytes for each in built.sizes},
        "cuts": dict(built.cuts),
        "directory": str(built.directory),
    }
