"""``dask-lambda deploy``, ``status``, ``destroy``: what is in an AWS account.

May import: click, common, env (for options); everything else late.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dask_lambda.cli.common import (
    as_json,
    confirm,
    endpoint_url,
    name,
    print_json,
    region,
    settings_before_deployment,
    yes,
)
from dask_lambda.cli.env import build_packages, choice_of_packages, summary

if TYPE_CHECKING:
    from dask_lambda.deploy.artifact import Package, Recipe
    from dask_lambda.deploy.aws import Account
    from dask_lambda.deploy.calls import Step
    from dask_lambda.deploy.deployment import Prepared
    from dask_lambda.deploy.naming import Where
    from dask_lambda.deploy.resources import Blueprint, Options
    from dask_lambda.deploy.status import State

#: Exit codes of ``status``.
NOTHING_DEPLOYED = 3
DIFFERS = 4
#: For which it is said what snapshots cost.
SNAPSHOT_DAYS = 30

SIGNS = {"create": "+", "change": "~", "delete": "-", "keep": "=", "leave": "=", "empty": "-"}


@click.command(short_help="Put function, bucket and role into an account, or update them.")
@name
@region
@endpoint_url
@click.option("--bucket", metavar="NAME", help="A bucket of your own; default: one is made.")
@click.option("--prefix", default="dask-lambda", show_default=True, help="Of object names.")
@click.option(
    "--memory",
    multiple=True,
    type=int,
    metavar="MB",
    help="A function for each size; give it several times.  [default: 1769, 3538, 10240]",
)
@click.option("--timeout", type=int, default=900, show_default=True, help="Seconds.")
@click.option("--storage", type=int, default=512, show_default=True, help="MB of /tmp.")
@click.option("--log-days", type=int, default=14, show_default=True, help="Log lines are kept.")
@click.option(
    "--expire-days",
    type=int,
    default=7,
    show_default=True,
    help="After which S3 deletes what killed programs have left.",
)
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="More tags.")
@click.option("--permissions-boundary", metavar="ARN", help="Of the execution role.")
@click.option("--tracing", is_flag=True, help="Switch X-Ray on.")
@click.option("--metrics", is_flag=True, help="Have workers write metrics for CloudWatch.")
@click.option(
    "--snapstart",
    is_flag=True,
    help="Have environments begin as copies of a snapshot, which costs while it exists.",
)
@choice_of_packages
@click.option(
    "--preimport",
    metavar="MODULES",
    help="Imported before the first call, by commas.  [default: numpy,dask.array]",
)
@click.option(
    "--image",
    metavar="URI",
    help="A container image in ECR that you have pushed, in place of what would be built.",
)
@click.option(
    "--worker-only",
    is_flag=True,
    help="No packages but the worker itself: for emulators that run it in this environment.",
)
@click.option("--dry-run", is_flag=True, help="Only print the API calls and the policies.")
@click.option(
    "--cloudformation",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Only write a template, and the zip files beside it.",
)
@yes
@as_json
def deploy(**given: Any) -> None:
    """Put function, bucket and role into an AWS account, or bring them up to date.

    What will be done is shown first.  It can be done at any time: what is there already stays.
    """
    from dask_lambda import __version__ as version
    from dask_lambda.deploy import deployment
    from dask_lambda.deploy.resources import LADDER, Options

    options = Options(
        given["name"],
        given["bucket"],
        given["prefix"],
        tuple(given["memory"]) or LADDER,
        given["timeout"],
        given["storage"],
        given["log_days"],
        given["expire_days"],
        _tags(given["tags"]),
        given["permissions_boundary"],
        given["tracing"],
        given["metrics"],
        given["snapstart"],
    )
    _check_options(options, given)
    account = open_account(given["region"], given["endpoint_url"])
    package = _package(given, account.where)
    if given["cloudformation"]:
        if package.recipe is not None:  # a template cannot build one
            raise click.ClickException(_how_to_push(package.recipe, account.where))
        from dask_lambda.deploy.resources import blueprint

        wanted = blueprint(
            options, account.where, package, version=version, secure=account.is_secure
        )
        _write_template(wanted, account, given["cloudformation"], given["as_json"])
        return
    prepared = deployment.prepare(account, options, package, version)
    if given["dry_run"]:
        _print_dry_run(prepared, given["as_json"])
        return
    _check_docker(prepared)
    if not given["as_json"]:
        _print_plan(prepared)
    if prepared.changes:
        confirm(given["yes"], given["as_json"], "Do that?")
    done = deployment.deploy(
        prepared, (lambda step: None) if given["as_json"] else (lambda step: click.echo(f"{step}"))
    )
    left_out = [{"name": s.name, "why": why} for s, why in done.applied.left_out]
    if given["as_json"]:
        print_json(
            {
                "deployed": done.record.name,
                "done": [str(step) for step in done.applied.done],
                "left_out": left_out,
                "functions": done.record.names.functions,
                "bucket": done.record.bucket,
                "role": done.record.names.role_arn,
                "environment": done.record.environment,
                "configuration": str(done.configuration),
                "warnings": prepared.warnings,
                "snapshots_usd_30_days": _snapshots(prepared)[0] if options.snapstart else 0.0,
                "invoker_policy": _invoker(done.record.names),
            }
        )
        return
    for each in left_out:
        click.echo(f"left out {each['name']}, which this account does not take: {each['why']}")
    click.echo(f"Dask programs of yours use it from now on: {done.configuration}")
    click.echo("To try it: dask-lambda hello.  For somebody else who computes with it:")
    click.echo("dask-lambda deploy --dry-run prints the policy that they need.")


@click.command()
@name
@region
@endpoint_url
@click.option("--bucket", metavar="NAME", help="The bucket of your own that it was deployed with.")
@as_json
@click.pass_context
def status(context: click.Context, /, as_json: bool, **given: Any) -> None:
    """Say what is deployed, and what somebody has changed since.

    Exit code 0: as it was deployed; 3: nothing is; 4: something differs.
    """
    from dask_lambda.deploy.status import state_of

    account = open_account(given["region"], given["endpoint_url"], given["name"])
    state = state_of(account, given["name"], given["bucket"])
    if as_json:
        print_json(_describe(state))
    else:
        _print_state(state)
    differs = state.remarks or state.foreign
    context.exit(NOTHING_DEPLOYED if not state.exists else DIFFERS if differs else 0)


@click.command()
@name
@region
@endpoint_url
@click.option("--bucket", metavar="NAME", help="The bucket of your own that it was deployed with.")
@click.option("--kept", is_flag=True, help="Kept runs as well.")
@yes
@as_json
def destroy(as_json: bool, yes: bool, kept: bool, **given: Any) -> None:
    """Remove exactly what `deploy` has made.

    A bucket of your own stays, with all that is not below our prefix.
    """
    from dask_lambda.deploy import record as records
    from dask_lambda.deploy.destroy import destroy, prepare_removal
    from dask_lambda.deploy.status import known

    account = open_account(given["region"], given["endpoint_url"], given["name"])
    record = known(account, given["name"], given["bucket"])
    removal = prepare_removal(account, record, kept=kept)
    doing = [step for step in removal.steps if step.calls]
    if not as_json:
        for step in removal.steps:
            _print_step(step)
    if doing:
        confirm(yes, as_json, f"Remove {len(doing)} things from {record.where}?")
    used = records.is_used(record)
    stays = destroy(
        removal, (lambda step: None) if as_json else (lambda step: click.echo(f"{step}"))
    )
    others = [{"name": each.name, "region": each.region} for each in records.find(None)]
    if as_json:
        removed = [f"{s.kind} {s.name}" for s in doing]
        print_json({"removed": removed, "stays": stays, "used": used, "others": others})
        return
    if not doing:
        click.echo(f"nothing of {record.name!r} is in {record.where}")
    if used:
        click.echo("Dask programs of yours use the embedded AWS on this machine from now on.")
        for each in others:
            which = f"--name {each['name']} --region {each['region']}"
            click.echo(f"To have them use another deployment: dask-lambda deploy {which}")


def _check_options(options: Options, given: dict[str, Any]) -> None:
    """Refuse what is out of range, or contradicts itself, before anything is looked at."""
    from dask_lambda.errors import ConfigurationError

    try:
        options.check()
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    ready = [each for each in ("image", "worker_only") if given[each]]
    choice = [each for each in ("packages", "requirements", "everything", "without") if given[each]]
    flags = {"packages": "--package", "requirements": "--from"}
    both = [flags.get(e, f"--{e.replace('_', '-')}") for e in (*ready, *choice)]
    if ready and len(both) > 1:
        raise click.UsageError(f"{' and '.join(both)} contradict each other: nothing is built then")


def open_account(region: str | None, endpoint_url: str | None, name: str | None = None) -> Account:
    """Open the account that is meant: by options, else by the record of a deployment."""
    from dask_lambda.deploy import record
    from dask_lambda.deploy.aws import Account

    if name is not None and (region is None or endpoint_url is None):
        found = record.find(name, region)
        if len(found) == 1:
            region = region or found[0].region
            endpoint_url = endpoint_url or found[0].endpoint_url
    settings = settings_before_deployment()
    return Account.open(region or settings.region, endpoint_url or settings.endpoint_url)


def _package(given: dict[str, Any], where: Where) -> Package:
    """Build what is deployed, or find it built."""
    from dask_lambda.deploy import artifact
    from dask_lambda.deploy import package as packaging
    from dask_lambda.deploy.naming import image_uri
    from lambda_worker.environment import PREIMPORT

    wanted = given["preimport"]
    early = [(PREIMPORT, packaging.PREIMPORT if wanted is None else wanted)]
    if given["image"]:
        return artifact.from_image(given["image"], given["architecture"], early)
    if given["worker_only"]:
        return artifact.worker_only(given["architecture"], early if wanted is not None else ())
    built = build_packages(given)
    click.echo(summary(built), err=True)
    if built.form == "image":
        recipe = packaging.image_recipe(built)
        uri = image_uri(given["name"], where, recipe.tag)
        return artifact.from_recipe(recipe, uri, built.digest, early)
    return artifact.from_environment(built, packaging.function_code(), early)


def _check_docker(prepared: Prepared) -> None:
    """Stop before anything is made, if an image is to be built and cannot be."""
    from dask_lambda.deploy import image
    from dask_lambda.deploy.calls import Push

    for step in prepared.changes:
        for call in step.calls:
            if isinstance(call, Push) and (why := image.unavailable()) is not None:
                where = prepared.wanted.names.where
                raise click.ClickException(f"{why}\n{_how_to_push(call.recipe, where)}")


def _how_to_push(recipe: Recipe, where: Where) -> str:
    """Say what is to be done where docker is: with a repository that is the user's own."""
    from dask_lambda.deploy.image import build_arguments

    image = f"{where.registry}/dask-lambda:{recipe.tag}"
    build = " ".join(build_arguments(recipe.context, image, recipe.platform))
    architecture = recipe.platform.architecture
    because = f" ({recipe.because})" if recipe.because else ""
    otherwise = "leave packages of yours out (--without)"
    if recipe.platform.python == "3.11":
        otherwise = (
            f"use Python 3.12 or newer here, for which there are more wheels; or {otherwise}"
        )
    return (
        f"these packages need a container image{because}. Its recipe is in {recipe.context}. "
        "Where docker is:\n"
        f"  aws ecr create-repository --region {where.region} --repository-name dask-lambda\n"
        f"  aws ecr get-login-password --region {where.region} | docker login --username AWS "
        f"--password-stdin {where.registry}\n"
        f"  docker {build}\n"
        f"  docker push {image}\n"
        f"  dask-lambda deploy --image {image} --architecture {architecture}\n"
        f"Or {otherwise}"
    )


def _tags(given: tuple[str, ...]) -> dict[str, str]:
    tags = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals:
            raise click.BadParameter(f"{each!r} is not KEY=VALUE", param_hint="--tag")
        tags[key] = value
    return tags


def _invoker(names: Any) -> dict[str, Any]:
    from dask_lambda.deploy import policies

    return policies.invoker(names)


def _print_dry_run(prepared: Prepared, as_json: bool) -> None:
    from dask_lambda.deploy import policies

    wanted = prepared.wanted
    documents = {
        "execution role": wanted.role.policy,
        "execution role's trust": wanted.role.trust,
        "whoever computes": policies.invoker(wanted.names),
        "whoever deploys": policies.deployer(
            wanted.names, image=wanted.package.image, boundary=wanted.role.boundary
        ),
    }
    if as_json:
        print_json(
            {
                "steps": [step.to_json() for step in prepared.steps],
                "policies": documents,
                "warnings": prepared.warnings,
                "snapshots_usd_30_days": _snapshots(prepared)[0] if wanted.names.alias else 0.0,
            }
        )
        return
    _print_plan(prepared)
    click.echo("\nThe API calls:")
    for step in prepared.changes:
        for call in step.calls:
            shown = call.to_json()
            click.echo(f"\n{call.service} {call.operation}   (needs {call.action})")
            click.echo(json.dumps(shown["parameters"], indent=1))
    for who, document in documents.items():
        click.echo(f"\nThe policy of the {who}:" if "role" in who else f"\nThe policy for {who}:")
        click.echo(json.dumps(document, indent=1))
    click.echo("\nNothing was changed.")


def _print_plan(prepared: Prepared) -> None:
    options = prepared.wanted.options
    click.echo(f"The deployment {options.name!r} in {prepared.wanted.names.where}:")
    for step in prepared.steps:
        _print_step(step)
    for warning in prepared.warnings:
        click.echo(f"note: {warning}")
    if not prepared.changes:
        click.echo("everything is there already")
    else:
        images = "; $0.10 for images" if prepared.wanted.repository else ""
        snapshots = " and, see below, snapshots" if prepared.wanted.names.alias else ""
        click.echo(
            "None of it costs anything while nothing runs, but what is stored ($0.023 per GB and "
            f"month in S3, in us-east-1{images}){snapshots}."
        )
    if prepared.wanted.names.alias:
        usd, source = _snapshots(prepared)
        click.echo(
            f"Snapshots cost ${usd:,.2f} in {SNAPSHOT_DAYS} days while they exist, whether "
            f"anything runs or not (prices of {source}); without --snapstart the next deploy "
            "deletes them."
        )


def _snapshots(prepared: Prepared) -> tuple[float, str]:
    """Return what the snapshots cost in some days, in US dollars, and whose prices these are."""
    from dask_lambda.prices import prices_for

    names = prepared.wanted.names
    prices = prices_for(names.where.region, settings_before_deployment().prices)
    return prices.snapshots(names.sizes, SNAPSHOT_DAYS * 24 * 3600), prices.source


def _print_step(step: Step) -> None:
    why = f" ({'; '.join(step.why)})" if step.why else ""
    click.echo(f"  {SIGNS[step.verb]} {step}{why}")


def _describe(state: State) -> dict[str, Any]:
    record = state.record
    return {
        "name": record.name,
        "deployed": state.exists,
        "account": record.account,
        "region": record.region,
        "bucket": record.bucket if state.seen.bucket else None,
        "role": record.names.role_arn if state.seen.role else None,
        "repository": state.seen.repository.name if state.seen.repository else None,
        "functions": [
            {
                "name": each.name,
                "state": each.state,
                "memory": each.memory,
                "snapshot": each.snapshot,
                "differences": each.differences,
            }
            for each in state.functions
        ],
        "environment": record.environment or None,
        "version": record.version or None,
        "concurrency": state.concurrency,
        "remarks": state.remarks,
        "foreign": state.foreign,
    }


def _print_state(state: State) -> None:
    record = state.record
    if not state.exists:
        click.echo(f"nothing of {record.name!r} is deployed in {record.where}")
        return
    click.echo(f"{record.name} in {record.where}")
    for each in state.functions:
        memory = f"{each.memory:,} MB" if each.memory else ""
        snapshot = f"  snapshot {each.snapshot}" if each.snapshot else ""
        click.echo(f"  function   {each.name:32} {each.state:10} {memory}{snapshot}")
    if state.seen.bucket:
        click.echo(f"  bucket     {record.bucket}")
    if state.seen.role:
        click.echo(f"  role       {record.names.role}")
    if state.seen.repository:
        click.echo(f"  repository {state.seen.repository.name}")
    if record.environment:
        click.echo(f"  packages   {record.environment}  ({record.architecture})")
    if state.concurrency is not None:
        click.echo(f"  account    {state.concurrency:,} executions at a time")
    for remark in (*state.remarks, *state.foreign):
        click.echo(f"  ! {remark}")
    if record.removing:
        click.echo("dask-lambda destroy goes on with removing it, deploy puts it in order again")
    elif state.remarks:
        click.echo("dask-lambda deploy puts it in order")


def _write_template(wanted: Blueprint, account: Account, path: str, as_json: bool) -> None:
    from pathlib import Path

    import yaml

    from dask_lambda.deploy import cloudformation
    from dask_lambda.deploy.deployment import record_of
    from dask_lambda.deploy.record import configuration

    target = Path(path)
    text = json.dumps(cloudformation.template(wanted), indent=1) + "\n"
    directory = target.with_name(f"{target.stem}-files")
    files = cloudformation.files(wanted)
    try:
        if files:
            directory.mkdir(parents=True, exist_ok=True)
        for name, archive in files.items():
            (directory / name).write_bytes(archive.read())
        target.write_text(text, "utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error}") from error
    settings = {"dask-lambda": configuration(record_of(wanted, account.endpoint_url))}
    if as_json:
        written = [str(directory / name) for name in files]
        print_json({"template": str(target), "files": written, "configuration": settings})
        return
    where = wanted.names.where
    parameters = ""
    click.echo(f"wrote {target}" + (f" and, beside it, {directory}" if files else ""))
    click.echo("Whoever may create a stack does:")
    if files:
        click.echo(f"  aws s3 cp --recursive {directory} s3://CODE-BUCKET/dask-lambda/")
        parameters = " --parameter-overrides CodeBucket=CODE-BUCKET CodePrefix=dask-lambda/"
    click.echo(
        f"  aws cloudformation deploy --region {where.region} --template-file {target} "
        f"--stack-name {wanted.options.name} --capabilities CAPABILITY_NAMED_IAM{parameters}"
    )
    click.echo("Then, in ~/.config/dask/dask-lambda.yaml:")
    for line in yaml.safe_dump(settings, sort_keys=False).splitlines():
        click.echo(f"  {line}")
