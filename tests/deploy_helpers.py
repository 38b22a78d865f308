"""What the tests of deployment share."""

from __future__ import annotations

from typing import Any

from dask_lambda.deploy.aws import Account


def inventory(account: Account) -> dict[str, Any]:
    """Everything in an account that a deployment may have a part in."""
    buckets = account.call("s3", "ListBuckets")["Buckets"]
    roles = account.pages("iam", "ListRoles", "Roles")
    return {
        "buckets": sorted(each["Name"] for each in buckets),
        "functions": sorted(
            each["FunctionName"] for each in account.pages("lambda", "ListFunctions", "Functions")
        ),
        "layers": sorted(
            each["LayerName"] for each in account.pages("lambda", "ListLayers", "Layers")
        ),
        "roles": sorted(each["RoleName"] for each in roles),
        "policies": sorted(
            each["PolicyName"]
            for each in account.pages("iam", "ListPolicies", "Policies", Scope="Local")
        ),
        "log groups": sorted(
            each["logGroupName"]
            for each in account.pages("logs", "DescribeLogGroups", "logGroups")
            if "dask-lambda-" in each["logGroupName"]
        ),
    }
