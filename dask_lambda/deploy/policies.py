"""Who may do what: the policy documents, with the least that is needed.  Pure.

May import: resources' names (:mod:`dask_lambda.deploy.naming`), the ground.

``SECURITY.md`` lists the same permissions; ``tests/test_deploy_policies.py`` compares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dask_lambda.deploy.naming import Names
from lambda_worker import protocol

Document = dict[str, Any]
Statement = dict[str, Any]

VERSION = "2012-10-17"
#: Of one object: read, write, delete, and give up an upload in parts.
OBJECT_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
#: A shard of the object names: one character for each of its digits.
ANY_SHARD = "?" * protocol.SHARD_DIGITS

#: What it takes to have snapshots of functions, and to have them called.
SNAPSHOT_ACTIONS = ("lambda:PublishVersion", "lambda:CreateAlias", "lambda:UpdateAlias")

#: API operations whose permission has another name than the operation.
ACTIONS = {
    ("s3", "HeadBucket"): "s3:ListBucket",
    ("s3", "ListObjectsV2"): "s3:ListBucket",
    ("s3", "ListObjectVersions"): "s3:ListBucketVersions",
    ("s3", "ListMultipartUploads"): "s3:ListBucketMultipartUploads",
    ("s3", "DeleteObjects"): "s3:DeleteObject",
    ("s3", "HeadObject"): "s3:GetObject",
    ("s3", "GetBucketEncryption"): "s3:GetEncryptionConfiguration",
    ("s3", "PutBucketEncryption"): "s3:PutEncryptionConfiguration",
    ("s3", "GetPublicAccessBlock"): "s3:GetBucketPublicAccessBlock",
    ("s3", "PutPublicAccessBlock"): "s3:PutBucketPublicAccessBlock",
    ("s3", "GetBucketLifecycleConfiguration"): "s3:GetLifecycleConfiguration",
    ("s3", "PutBucketLifecycleConfiguration"): "s3:PutLifecycleConfiguration",
    ("s3", "DeleteBucketLifecycle"): "s3:PutLifecycleConfiguration",
    ("lambda", "Invoke"): "lambda:InvokeFunction",
}


def action_of(service: str, operation: str) -> str:
    """Return the name of the permission that an API operation needs."""
    return ACTIONS.get((service, operation), f"{service}:{operation}")


def trust() -> Document:
    """Return who may take on the execution role: Lambda."""
    return _document(
        {
            "Effect": "Allow",
            "Principal": {"Service": "lambda.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    )


def execution(names: Names, *, tracing: bool = False) -> Document:
    """Return what the function's role may: its objects, and its own log.

    Parameters
    ----------
    names : Names
    tracing : bool
        Whether X-Ray is on, to which the role then may write.
    """
    statements = [
        *_objects(names),
        _allow(
            "Logs",
            ("logs:CreateLogStream", "logs:PutLogEvents"),
            [f"{names.log_group_arn(group)}:*" for group in names.log_groups],
        ),
    ]
    if tracing:
        actions = ("xray:PutTraceSegments", "xray:PutTelemetryRecords")
        statements.append(_allow("Traces", actions, ["*"]))  # X-Ray has no resources to name
    return _document(*statements)


def invoker(names: Names) -> Document:
    """Return what a person needs who computes, reads the logs and clears up, and is no admin."""
    return _document(
        _allow("Invoke", ("lambda:InvokeFunction",), names.called_arns),
        *_objects(names),
        _allow("Uploads", ("s3:ListBucketMultipartUploads",), [names.bucket_arn]),
        _allow("Account", ("lambda:GetAccountSettings",), ["*"]),
        _allow(
            "ReadLogs",
            ("logs:FilterLogEvents",),
            [arn for group in names.log_groups for arn in _both(names.log_group_arn(group))],
        ),
    )


#: Statements of :func:`invoker` without which nothing can be computed.
NEEDED = ("Invoke", "Objects", "List")


def deployer(names: Names, *, image: str | None = None, boundary: str | None = None) -> Document:
    """Return what a person needs who deploys, looks after, and removes the deployment.

    Parameters
    ----------
    names : Names
    image : str, optional
        URI of the container image in ECR that the functions are made of, which is pushed, or
        fetched: Lambda has whoever makes them allow it to fetch that.
    boundary : str, optional
        ARN of the role's permissions boundary: nothing is allowed to the role then that this does
        not allow.  Without one, who may say what the role may can have all that can be allowed.
    """
    role = names.role_arn
    functions = names.any_function_arn
    layers = names.any_layer_arn
    return _document(
        *(_images(names, image) if image else []),
        # Looked for each time, so that one which is not wanted any more is removed.
        _allow(
            "Repository",
            (
                "ecr:DescribeRepositories",
                "ecr:ListTagsForResource",
                "ecr:GetRepositoryPolicy",
                "ecr:ListImages",
                "ecr:DeleteRepository",
            ),
            [names.repository_arn],
        ),
        _allow(
            "Bucket",
            (
                "s3:CreateBucket",
                "s3:DeleteBucket",
                "s3:ListBucket",
                "s3:ListBucketVersions",
                "s3:GetBucketTagging",
                "s3:PutBucketTagging",
                "s3:GetBucketVersioning",
                "s3:PutBucketVersioning",
                "s3:GetBucketPublicAccessBlock",
                "s3:PutBucketPublicAccessBlock",
                "s3:GetEncryptionConfiguration",
                "s3:PutEncryptionConfiguration",
                "s3:GetBucketPolicy",
                "s3:PutBucketPolicy",
                "s3:GetLifecycleConfiguration",
                "s3:PutLifecycleConfiguration",
                "s3:ListBucketMultipartUploads",
            ),
            [names.bucket_arn],
        ),
        _allow("Objects", (*OBJECT_ACTIONS, "s3:DeleteObjectVersion"), names.object_arns),
        _bounded(
            _allow(
                "RolePermissions",
                ("iam:CreateRole", "iam:PutRolePermissionsBoundary", "iam:PutRolePolicy"),
                [role],
            ),
            boundary,
        ),
        _allow(
            "Role",
            (
                *(() if boundary else ("iam:DeleteRolePermissionsBoundary",)),
                "iam:GetRole",
                "iam:DeleteRole",
                "iam:TagRole",
                "iam:UpdateAssumeRolePolicy",
                "iam:GetRolePolicy",
                "iam:DeleteRolePolicy",
                "iam:ListRolePolicies",
                "iam:ListAttachedRolePolicies",
                "iam:DetachRolePolicy",
            ),
            [role],
        ),
        {
            **_allow("PassRole", ("iam:PassRole",), [role]),
            "Condition": {"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}},
        },
        _allow(
            "Functions",
            (
                "lambda:CreateFunction",
                "lambda:GetFunction",
                "lambda:GetFunctionConfiguration",
                "lambda:UpdateFunctionCode",
                "lambda:UpdateFunctionConfiguration",
                "lambda:DeleteFunction",
                "lambda:TagResource",
                "lambda:ListTags",  # else GetFunction says nothing of tags (its API reference)
                "lambda:InvokeFunction",
                # Looked for each time, so that snapshots which are not wanted any more go.
                "lambda:ListVersionsByFunction",
                "lambda:DeleteAlias",
                *(SNAPSHOT_ACTIONS if names.alias else ()),
            ),
            [functions],
        ),
        _allow(
            "Layers",
            (
                "lambda:PublishLayerVersion",
                "lambda:ListLayerVersions",
                "lambda:GetLayerVersion",  # Lambda asks for it when a function gets a layer
                "lambda:DeleteLayerVersion",
            ),
            _both(layers),
        ),
        _allow(
            "Look",
            (
                "lambda:ListFunctions",
                "lambda:ListLayers",
                "lambda:GetAccountSettings",
                "logs:DescribeLogGroups",
            ),
            ["*"],
        ),
        _allow(
            "Logs",
            (
                "logs:CreateLogGroup",
                "logs:PutRetentionPolicy",
                "logs:TagResource",
                "logs:ListTagsForResource",
                "logs:DeleteLogGroup",
                "logs:FilterLogEvents",
            ),
            _both(names.any_log_group_arn),
        ),
    )


def fetching(names: Names) -> Document:
    """Return a repository's policy by which Lambda may fetch its images, for our functions."""
    return _document(
        {
            "Sid": "LambdaFetches",
            "Effect": "Allow",
            "Principal": {"Service": "lambda.amazonaws.com"},
            "Action": ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
            "Condition": {"StringLike": {"aws:sourceArn": names.any_function_arn}},
        }
    )


def tls_only(names: Names) -> Document:
    """Return a bucket policy that refuses requests which are not encrypted on the way."""
    return _document(
        {
            "Sid": "EncryptedInTransit",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [names.bucket_arn, f"{names.bucket_arn}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }
    )


_REFUSED = re.compile(
    r"not authorized to perform: (?P<action>[\w-]+:\w+)(?: on resource: (?P<on>\S+))?"
)


def refused(message: str) -> tuple[str, str] | None:
    """Return the action and resource that AWS's message about a missing permission names."""
    found = _REFUSED.search(message)
    return (found["action"], (found["on"] or "").strip('"')) if found else None


def normal(document: Document) -> Document:
    """Return a document in a form in which two that mean the same are equal."""

    def values(given: Any) -> Any:
        return (
            sorted(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        )

    statements = document.get("Statement", [])
    statements = [statements] if isinstance(statements, dict) else statements
    return {
        "Version": document.get("Version"),
        "Statement": [
            {
                name: values(value) if name in ("Action", "Resource") else value
                for name, value in statement.items()
            }
            for statement in statements
        ],
    }


def contains(document: Document | None, other: Document) -> bool:
    """Whether a document has all statements of another one."""
    if document is None:
        return False
    has = normal(document)["Statement"]
    return all(each in has for each in normal(other)["Statement"])


def joined(document: Document | None, other: Document) -> Document:
    """Return a document with the statements of another one in place of those of the same name."""
    if document is None:
        return other
    names = {each.get("Sid") for each in other["Statement"]}
    statements = document.get("Statement", [])
    statements = [statements] if isinstance(statements, dict) else statements
    kept = [each for each in statements if each.get("Sid") not in names]
    return {**document, "Statement": [*kept, *other["Statement"]]}


def _both(arn: str) -> list[str]:
    """Return an ARN with and without what may follow it: services differ in which they check."""
    return [arn, f"{arn}:*"]


def _images(names: Names, image: str) -> list[Statement]:
    """Return what it takes to push an image, and to make a function of it."""
    return [
        _allow(
            "Image",
            (
                "ecr:BatchGetImage",
                "ecr:GetDownloadUrlForLayer",
                "ecr:GetRepositoryPolicy",
                "ecr:SetRepositoryPolicy",
            ),
            [names.arn_of_image(image)],
        ),
        _allow(
            "Push",
            (
                "ecr:CreateRepository",
                "ecr:TagResource",
                "ecr:BatchCheckLayerAvailability",
                "ecr:InitiateLayerUpload",
                "ecr:UploadLayerPart",
                "ecr:CompleteLayerUpload",
                "ecr:PutImage",
                "ecr:BatchDeleteImage",
            ),
            [names.repository_arn],
        ),
        _allow("Login", ("ecr:GetAuthorizationToken",), ["*"]),  # which knows no resources
    ]


def _objects(names: Names) -> list[Statement]:
    # S3 answers 403 in place of 404 for what is not there, unless the bucket may be listed without
    # conditions: a condition on the prefix would not be met by a GET.
    return [
        _allow("Objects", OBJECT_ACTIONS, names.object_arns),
        _allow("List", ("s3:ListBucket",), [names.bucket_arn]),
    ]


def _bounded(statement: Statement, boundary: str | None) -> Statement:
    """Return a statement that is for a role with a certain permissions boundary only."""
    if boundary is None:
        return statement
    return {**statement, "Condition": {"StringEquals": {"iam:PermissionsBoundary": boundary}}}


def _allow(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Statement:
    return {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": list(resources)}


def _document(*statements: Statement) -> Document:
    return {"Version": VERSION, "Statement": list(statements)}
