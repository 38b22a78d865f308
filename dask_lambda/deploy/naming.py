"""What everything in the account is called, so that it is found again.  Pure.

May import: kept_folder (for a prefix), errors, the ground.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dask_lambda.errors import ConfigurationError
from dask_lambda.kept_folder import kept_prefix
from lambda_worker import protocol

#: The tag by which a deployment knows what is its own; its value is the deployment's name.
TAG = "dask-lambda:deployment"
DEFAULT = "dask-lambda"
#: With account and region the bucket's name must not be longer than 63 characters.
NAME = re.compile(r"[a-z][a-z0-9-]{0,27}[a-z0-9]")
#: Of object names: what means itself in policies, in URLs and on command lines.
PREFIX = re.compile(r"[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*")
LOGS = "/aws/lambda/"
#: By which functions are called of whose published versions Lambda keeps snapshots.
ALIAS = "snapstart"


@dataclass(frozen=True, slots=True)
class Where:
    """An account and a region.

    Attributes
    ----------
    account : str
        Twelve digits.
    region : str
    partition : str
        Which AWS: ``"aws"``, ``"aws-cn"``, ``"aws-us-gov"``.
    """

    account: str
    region: str
    partition: str = "aws"

    @property
    def registry(self) -> str:
        """The host from which Lambda takes container images: ECR's, in this account and region."""
        domain = "amazonaws.com.cn" if self.partition == "aws-cn" else "amazonaws.com"
        return f"{self.account}.dkr.ecr.{self.region}.{domain}"

    def __str__(self) -> str:
        return f"account {self.account}, {self.region}"


@dataclass(frozen=True, slots=True)
class Names:
    """All names of a deployment, and their ARNs.

    Attributes
    ----------
    deployment : str
    where : Where
    bucket : str
    prefix : str
        Of the object names, behind the shard.
    sizes : tuple of int
        MB of memory, one function for each.
    alias : str
        By which the functions are called, if not as they are.
    """

    deployment: str
    where: Where
    bucket: str
    prefix: str
    sizes: tuple[int, ...]
    alias: str = ""

    def function(self, memory: int) -> str:
        """Return the name of the function with so much memory."""
        return f"{self.deployment}-{memory}"

    @property
    def functions(self) -> list[str]:
        """The names of all functions, from the smallest."""
        return [self.function(memory) for memory in self.sizes]

    def called(self, memory: int) -> str:
        """Return by which name the function with so much memory is called."""
        name = self.function(memory)
        return f"{name}:{self.alias}" if self.alias else name

    @property
    def log_groups(self) -> list[str]:
        """The log groups of the functions."""
        return [LOGS + name for name in self.functions]

    @property
    def role(self) -> str:
        """The name of the execution role: IAM knows no regions, so it is in the name."""
        return role_name(self.deployment, self.where.region)

    def layer(self, name: str) -> str:
        """Return the name of a layer of the package."""
        return f"{self.deployment}-{name}"

    @property
    def repository(self) -> str:
        """The name of the repository in ECR, for workers that are a container image."""
        return repository_name(self.deployment)

    @property
    def repository_arn(self) -> str:
        """The ARN of the repository."""
        return self._arn("ecr", f"repository/{self.repository}")

    @property
    def bucket_arn(self) -> str:
        """The ARN of the bucket."""
        return f"arn:{self.where.partition}:s3:::{self.bucket}"

    @property
    def object_arns(self) -> list[str]:
        """Pattern of the ARNs of objects, of runs and of kept runs."""
        shard = "?" * protocol.SHARD_DIGITS
        prefixes = (self.prefix, kept_prefix(self.prefix))
        return [f"{self.bucket_arn}/{shard}/{prefix}/*" for prefix in prefixes]

    @property
    def role_arn(self) -> str:
        """The ARN of the execution role."""
        return f"arn:{self.where.partition}:iam::{self.where.account}:role/{self.role}"

    @property
    def called_arns(self) -> list[str]:
        """The ARNs of the functions, as they are called."""
        return [self.function_arn(self.called(memory)) for memory in self.sizes]

    def function_arn(self, name: str) -> str:
        """Return the ARN of a function, or of an alias of one."""
        return self._arn("lambda", f"function:{name}")

    @property
    def any_function_arn(self) -> str:
        """Pattern of the ARNs of functions of this deployment."""
        return self._arn("lambda", f"function:{self.deployment}-*")

    @property
    def any_layer_arn(self) -> str:
        """Pattern of the ARNs of layers of this deployment."""
        return self._arn("lambda", f"layer:{self.deployment}-*")

    def arn_of_image(self, image: str) -> str:
        """Return the ARN of the repository of an image in ECR.

        Parameters
        ----------
        image : str
            ``ACCOUNT.dkr.ecr.REGION.amazonaws.com/REPOSITORY:TAG``, or with ``@sha256:...``.
        """
        registry, _, name = image.partition("/")
        account, _, _, region = registry.split(".")[:4]
        name = re.split("[:@]", name)[0]
        return f"arn:{self.where.partition}:ecr:{region}:{account}:repository/{name}"

    @property
    def any_log_group_arn(self) -> str:
        """Pattern of the ARNs of log groups of this deployment."""
        return self.log_group_arn(f"{LOGS}{self.deployment}-*")

    def log_group_arn(self, name: str) -> str:
        """Return the ARN of a log group."""
        return self._arn("logs", f"log-group:{name}")

    def _arn(self, service: str, rest: str) -> str:
        where = self.where
        return f"arn:{where.partition}:{service}:{where.region}:{where.account}:{rest}"


def check_name(name: str) -> None:
    """Refuse what cannot be part of all the names.

    Raises
    ------
    ConfigurationError
    """
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be the name of a deployment: use 2 to 29 lower-case letters, digits "
            "and dashes, beginning with a letter and not ending with a dash"
        )


def role_name(deployment: str, region: str) -> str:
    """Return the name of a deployment's execution role."""
    return f"{deployment}-{region}"


def bucket_name(deployment: str, where: Where) -> str:
    """Return the name of a deployment's own bucket; bucket names are unique in the world."""
    return f"{deployment}-{where.account}-{where.region}"


def repository_name(deployment: str) -> str:
    """Return the name of a deployment's repository in ECR."""
    return f"{deployment}-workers"


def image_uri(deployment: str, where: Where, tag: str) -> str:
    """Return the URI of an image in a deployment's repository."""
    return f"{where.registry}/{repository_name(deployment)}:{tag}"


def size_of(deployment: str, function: str) -> int | None:
    """Return the memory size in a function's name, None if it is none of the deployment's."""
    found = re.fullmatch(re.escape(deployment) + r"-(\d+)", function)
    return int(found[1]) if found else None


def function_of(name: str) -> str:
    """Return the name of the function that is called by a name, an alias of it, or an ARN."""
    return name.rpartition("function:")[2].partition(":")[0]
