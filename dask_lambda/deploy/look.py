"""Looking at what there is in the account.

May import: aws, naming, resources' names, snapshots' names, seen, errors.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

from dask_lambda.deploy.aws import Account, code_of
from dask_lambda.deploy.naming import ALIAS, LOGS, repository_name, role_name, size_of
from dask_lambda.deploy.resources import layer_description
from dask_lambda.deploy.seen import (
    Seen,
    SeenBucket,
    SeenFunction,
    SeenLayer,
    SeenLogGroup,
    SeenRepository,
    SeenRole,
)
from dask_lambda.deploy.snapshots import DESCRIPTION
from dask_lambda.errors import AccessDeniedError, DeploymentError


class ForeignBucketError(DeploymentError):
    """The bucket is somebody else's."""


def look(account: Account, deployment: str, bucket: str, *, foreign: bool = False) -> Seen:
    """Return everything that has names like a deployment's.

    Parameters
    ----------
    account : Account
    deployment, bucket : str
        Their names.
    foreign : bool
        A bucket of somebody else's is no error; there is none then, and that is told.

    Raises
    ------
    AccessDeniedError
        A permission to look is missing.
    ForeignBucketError
        The bucket is somebody else's.
    """
    refused = False
    try:
        seen_bucket = look_at_bucket(account, bucket)
    except ForeignBucketError:
        if not foreign:
            raise
        seen_bucket, refused = None, True
    return Seen(
        seen_bucket,
        _role(account, role_name(deployment, account.region)),
        _log_groups(account, deployment),
        _layers(account, deployment),
        look_at_functions(account, deployment),
        refused,
        _repository(account, repository_name(deployment)),
    )


def look_at_bucket(account: Account, name: str) -> SeenBucket | None:
    """Return a bucket of this account; None if there is none of this name.

    Raises
    ------
    ForeignBucketError
        It is somebody else's.
    """
    from botocore.exceptions import ClientError

    try:
        # Its name can be guessed: somebody else may have a bucket of this name that lets us in.
        owner = {"ExpectedBucketOwner": account.where.account}
        head = account.found("s3", "HeadBucket", "404", "NoSuchBucket", Bucket=name, **owner)
    except AccessDeniedError as error:
        raise ForeignBucketError(
            f"the bucket {name!r} is somebody else's, or you may not list it (s3:ListBucket): "
            "names of buckets are unique in the world; choose another name (--name or --bucket)"
        ) from error
    except ClientError as error:
        if code_of(error) == "400":
            raise DeploymentError(
                f"S3 refuses to say anything of the bucket {name!r} (400): it may be in another "
                "region, or its name may not be one"
            ) from error
        raise
    if head is None:
        return None
    headers = head["ResponseMetadata"]["HTTPHeaders"]
    region = head.get("BucketRegion") or headers.get("x-amz-bucket-region") or account.region
    if region != account.region:
        return SeenBucket(name, region)
    where = {"Bucket": name}
    tags = account.found("s3", "GetBucketTagging", "NoSuchTagSet", **where)
    blocked = account.found(
        "s3", "GetPublicAccessBlock", "NoSuchPublicAccessBlockConfiguration", **where
    )
    encryption = account.found(
        "s3", "GetBucketEncryption", "ServerSideEncryptionConfigurationNotFoundError", **where
    )
    policy = account.found("s3", "GetBucketPolicy", "NoSuchBucketPolicy", **where)
    lifecycle = account.found(
        "s3", "GetBucketLifecycleConfiguration", "NoSuchLifecycleConfiguration", **where
    )
    versioning = account.call("s3", "GetBucketVersioning", **where)
    block = (blocked or {}).get("PublicAccessBlockConfiguration", {})
    rules = (encryption or {}).get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
    return SeenBucket(
        name,
        region,
        _tags((tags or {}).get("TagSet", [])),
        versioning.get("Status", ""),
        bool(block) and all(block.values()),
        bool(rules),
        json.loads(policy["Policy"]) if policy else None,
        {k: v for k, v in (lifecycle or {}).items() if k != "ResponseMetadata"},
    )


def look_at_functions(account: Account, deployment: str) -> dict[str, SeenFunction]:
    """Return the functions with names like a deployment's."""
    found = {}
    names = [
        each["FunctionName"]
        for each in account.pages("lambda", "ListFunctions", "Functions")
        if size_of(deployment, each["FunctionName"]) is not None
    ]
    for name in names:
        answer = account.found(
            "lambda", "GetFunction", "ResourceNotFoundException", FunctionName=name
        )
        if answer is not None:
            image = answer.get("Code", {}).get("ImageUri")
            tags = _tags_of_function(account, answer)
            versions, live = _versions(account, name)
            found[name] = SeenFunction(name, answer["Configuration"], image, tags, versions, live)
    return found


def _versions(account: Account, name: str) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """Return the versions that a deployment has published, and the one by which it is called."""
    pages = account.pages("lambda", "ListVersionsByFunction", "Versions", FunctionName=name)
    published = [each for each in pages if each["Version"] != "$LATEST"]
    if not published:
        return (), None
    alias = {"FunctionName": name, "Qualifier": ALIAS}
    live = account.found("lambda", "GetFunctionConfiguration", "ResourceNotFoundException", **alias)
    ours = (each for each in published if each.get("Description", "").startswith(DESCRIPTION))
    return tuple(each["Version"] for each in ours), live


def _tags_of_function(account: Account, answer: dict[str, Any]) -> dict[str, str]:
    """Return the tags of a function, as GetFunction has answered.

    It leaves them out if the caller may not list them, and the function would look like somebody
    else's; so they are asked for then, and it is said which permission is missing.
    """
    if "Tags" not in answer:
        arn = answer["Configuration"]["FunctionArn"]
        answer = account.call("lambda", "ListTags", Resource=arn)
    tags: dict[str, str] = answer.get("Tags", {})
    return tags


def _role(account: Account, name: str) -> SeenRole | None:
    answer = account.found("iam", "GetRole", "NoSuchEntity", RoleName=name)
    if answer is None:
        return None
    role = answer["Role"]
    inline = account.pages("iam", "ListRolePolicies", "PolicyNames", RoleName=name)
    policies = {}
    for policy in map(str, inline):
        found = account.call("iam", "GetRolePolicy", RoleName=name, PolicyName=policy)
        policies[policy] = _document(found["PolicyDocument"])
    attached = account.pages("iam", "ListAttachedRolePolicies", "AttachedPolicies", RoleName=name)
    return SeenRole(
        name,
        _document(role["AssumeRolePolicyDocument"]),
        policies,
        tuple(each["PolicyArn"] for each in attached),
        role.get("PermissionsBoundary", {}).get("PermissionsBoundaryArn"),
        _tags(role.get("Tags", [])),
    )


def _log_groups(account: Account, deployment: str) -> dict[str, SeenLogGroup]:
    found = {}
    prefix = f"{LOGS}{deployment}-"
    for each in account.pages("logs", "DescribeLogGroups", "logGroups", logGroupNamePrefix=prefix):
        name = each["logGroupName"]
        if size_of(deployment, name.removeprefix(LOGS)) is None:
            continue
        arn = each["arn"].removesuffix(":*")
        tags = account.call("logs", "ListTagsForResource", resourceArn=arn)
        found[name] = SeenLogGroup(name, each.get("retentionInDays"), tags.get("tags", {}))
    return found


def _layers(account: Account, deployment: str) -> tuple[SeenLayer, ...]:
    found = []
    for layer in account.pages("lambda", "ListLayers", "Layers"):
        name = layer["LayerName"]
        if not name.startswith(f"{deployment}-"):
            continue
        versions = account.pages("lambda", "ListLayerVersions", "LayerVersions", LayerName=name)
        found += [
            SeenLayer(
                name,
                each["Version"],
                each["LayerVersionArn"],
                each.get("Description", ""),
                tuple(each.get("CompatibleArchitectures", [])),
            )
            for each in versions
            if each.get("Description", "").startswith(layer_description(deployment))
        ]
    return tuple(found)


def _repository(account: Account, name: str) -> SeenRepository | None:
    named = {"repositoryName": name}
    answer = account.found(
        "ecr", "DescribeRepositories", "RepositoryNotFoundException", repositoryNames=[name]
    )
    if answer is None:
        return None
    (repository,) = answer["repositories"]
    arn = repository["repositoryArn"]
    tags = account.call("ecr", "ListTagsForResource", resourceArn=arn)
    policy = account.found(
        "ecr", "GetRepositoryPolicy", "RepositoryPolicyNotFoundException", **named
    )
    images = account.pages("ecr", "ListImages", "imageIds", **named)
    return SeenRepository(
        name,
        _tags(tags.get("tags", [])),
        json.loads(policy["policyText"]) if policy else None,
        tuple(sorted(each["imageTag"] for each in images if "imageTag" in each)),
    )


def _tags(tags: list[dict[str, str]]) -> dict[str, str]:
    return {each["Key"]: each["Value"] for each in tags}


def _document(given: Any) -> dict[str, Any]:
    """Return a policy; botocore decodes IAM's URL-encoded ones, mostly."""
    if isinstance(given, str):
        given = json.loads(unquote(given))
    return dict(given)
