"""A CloudFormation template that creates what ``deploy`` does, for an administrator.  Pure.

May import: resources, snapshots' names, artifact.

A template cannot hold zip files: they are written beside it, under names that are their hashes, and
the one who creates the stack puts them into a bucket first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from dask_lambda.deploy.artifact import Archive
from dask_lambda.deploy.resources import (
    BLOCK_PUBLIC_ACCESS,
    ENCRYPTION,
    ROLE_POLICY,
    Blueprint,
    FunctionSpec,
)
from dask_lambda.deploy.snapshots import DESCRIPTION

Template = dict[str, Any]

CODE_BUCKET = "CodeBucket"
CODE_PREFIX = "CodePrefix"
PARAMETERS = {
    CODE_BUCKET: {"Type": "String", "Description": "A bucket in this region with the zip files"},
    CODE_PREFIX: {
        "Type": "String",
        "Default": "",
        "Description": "What their names begin with there",
    },
}


def template(wanted: Blueprint) -> Template:
    """Return the template, to be written as JSON.

    Parameters
    ----------
    wanted : Blueprint
        A bucket of the user's own is not part of it, and is to exist.
    """
    tags = _tags(wanted.role.tags)
    resources: dict[str, Any] = {}
    if wanted.bucket.is_ours:
        resources |= _bucket(wanted)
    role = wanted.role
    resources["Role"] = {
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": role.name,
            "Description": "dask_lambda workers: their objects and their logs",
            "AssumeRolePolicyDocument": role.trust,
            "Policies": [{"PolicyName": ROLE_POLICY, "PolicyDocument": role.policy}],
            "Tags": tags,
            **({"PermissionsBoundary": role.boundary} if role.boundary else {}),
        },
    }
    for layer in wanted.layers:
        resources[_logical("Layer", layer.name)] = {
            "Type": "AWS::Lambda::LayerVersion",
            "Properties": {
                "LayerName": layer.name,
                "Description": layer.description,
                "Content": _code(layer.archive),
                "CompatibleRuntimes": [layer.runtime],
                "CompatibleArchitectures": [layer.architecture],
            },
        }
    for group, function in zip(wanted.log_groups, wanted.functions, strict=True):
        log, name = (_logical(kind, str(function.memory)) for kind in ("Logs", "Function"))
        resources[log] = {
            "Type": "AWS::Logs::LogGroup",
            "DeletionPolicy": "Delete",
            "UpdateReplacePolicy": "Delete",
            "Properties": {
                "LogGroupName": group.name,
                "RetentionInDays": group.days,
                "Tags": _tags(group.tags),
            },
        }
        settings = {**function.settings, "Role": {"Fn::GetAtt": ["Role", "Arn"]}}
        resources[name] = {
            "Type": "AWS::Lambda::Function",
            "DependsOn": [log],
            "Properties": {
                "FunctionName": function.name,
                **_package(function),
                "Architectures": [function.architecture],
                "Tags": _tags(function.tags),
                **settings,
            },
        }
        if function.alias:
            resources |= _snapshot(function)
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"dask_lambda: the deployment {wanted.options.name} "
        f"for {wanted.names.where.region}",
        **({} if wanted.package.image else {"Parameters": PARAMETERS}),
        "Resources": resources,
        "Outputs": {
            "Bucket": {
                "Description": "Setting dask-lambda.bucket",
                "Value": {"Ref": "Bucket"} if wanted.bucket.is_ours else wanted.bucket.name,
            },
            "Role": {
                "Description": "The execution role",
                "Value": {"Fn::GetAtt": ["Role", "Arn"]},
            },
            **{
                _logical("Function", str(each.memory)): {
                    "Description": f"The function with {each.memory} MB",
                    "Value": {
                        "Ref": _logical("Alias" if each.alias else "Function", str(each.memory))
                    },
                }
                for each in wanted.functions
            },
        },
    }


def files(wanted: Blueprint) -> dict[str, Archive]:
    """Return the zip files that the template names, by their names."""
    archives = [wanted.package.code, *(layer.archive for layer in wanted.layers)]
    return {_file(archive): archive for archive in archives if archive is not None}


def _bucket(wanted: Blueprint) -> dict[str, Any]:
    spec = wanted.bucket
    rules = [
        {
            "Id": rule["ID"],
            "Status": rule["Status"],
            "Prefix": rule["Filter"]["Prefix"],
            "ExpirationInDays": rule["Expiration"]["Days"],
            "AbortIncompleteMultipartUpload": rule["AbortIncompleteMultipartUpload"],
        }
        for rule in spec.rules()
    ]
    encryption = [
        {
            "ServerSideEncryptionByDefault": rule["ApplyServerSideEncryptionByDefault"],
            "BucketKeyEnabled": rule["BucketKeyEnabled"],
        }
        for rule in ENCRYPTION["Rules"]
    ]
    bucket: dict[str, Any] = {
        "Type": "AWS::S3::Bucket",
        # CloudFormation deletes empty buckets only; what is kept there is not lost by accident.
        "DeletionPolicy": "Delete",
        "UpdateReplacePolicy": "Retain",
        "Properties": {
            "BucketName": spec.name,
            "PublicAccessBlockConfiguration": BLOCK_PUBLIC_ACCESS,
            "BucketEncryption": {"ServerSideEncryptionConfiguration": encryption},
            "LifecycleConfiguration": {"Rules": rules},
            "Tags": _tags(spec.tags),
        },
    }
    resources: dict[str, Any] = {"Bucket": bucket}
    if spec.policy is not None:
        resources["BucketPolicy"] = {
            "Type": "AWS::S3::BucketPolicy",
            "Properties": {"Bucket": {"Ref": "Bucket"}, "PolicyDocument": spec.policy},
        }
    return resources


def _called(function: FunctionSpec) -> str:
    return "Alias" if function.alias else "Function"


def _snapshot(function: FunctionSpec) -> dict[str, Any]:
    """Return a version of a function, and the alias by which it is called.

    CloudFormation publishes a version when it makes one, and never again: so its name is another
    one for each state of the function.  The one before is deleted when the alias means the new one.
    """
    name = _logical("Function", str(function.memory))
    parts = [function.settings, _package(function), function.architecture]
    state = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    version = f"Version{function.memory}{state[:16]}"
    return {
        version: {
            "Type": "AWS::Lambda::Version",
            "DeletionPolicy": "Delete",
            "UpdateReplacePolicy": "Delete",
            "Properties": {
                "FunctionName": {"Ref": name},
                "Description": DESCRIPTION,
            },
        },
        _logical("Alias", str(function.memory)): {
            "Type": "AWS::Lambda::Alias",
            "Properties": {
                "FunctionName": {"Ref": name},
                "FunctionVersion": {"Fn::GetAtt": [version, "Version"]},
                "Name": function.alias,
            },
        },
    }


def _package(function: FunctionSpec) -> dict[str, Any]:
    if function.code is None:
        return {"PackageType": "Image", "Code": {"ImageUri": function.image}}
    layers = [{"Ref": _logical("Layer", each)} for each in function.layers]
    return {"Code": _code(function.code), "Layers": layers}


def _code(archive: Archive) -> dict[str, Any]:
    return {
        "S3Bucket": {"Ref": CODE_BUCKET},
        "S3Key": {"Fn::Sub": f"${{{CODE_PREFIX}}}{_file(archive)}"},
    }


def _file(archive: Archive) -> str:
    return f"{archive.sha256[:32]}.zip"


def _logical(kind: str, name: str) -> str:
    return kind + re.sub(r"[^A-Za-z0-9]", "", name.title())


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": name, "Value": value} for name, value in tags.items()]
