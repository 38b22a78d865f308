"""What is to exist in the account: a description, from what the user chose.  Pure.

May import: artifact, naming, policies, config's limits, lifecycle, errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dask_lambda import lifecycle
from dask_lambda.config import MAX_MEMORY, MAX_TIMEOUT, MIN_MEMORY
from dask_lambda.deploy import policies
from dask_lambda.deploy.artifact import Archive, Package, Recipe
from dask_lambda.deploy.layers import MAX_LAYERS
from dask_lambda.deploy.naming import (
    ALIAS,
    DEFAULT,
    PREFIX,
    TAG,
    Names,
    Where,
    bucket_name,
    check_name,
)
from dask_lambda.errors import ConfigurationError

#: MB: one core, two, and as much as there is.  At 1,769 MB a function has one whole core (Lambda).
LADDER = (1769, 3538, 10_240)
#: With more, the policy for whoever computes would come near to what IAM takes (6,144 characters).
MAX_SIZES = 10
#: MB of memory for each core (Lambda: "Configure Lambda function memory").
MB_PER_CORE = 1769
#: MB of ``/tmp`` (Lambda quotas).
MIN_STORAGE, MAX_STORAGE = 512, 10_240
#: What CloudWatch Logs takes as a number of days (its API: PutRetentionPolicy).
RETENTIONS = (
    *(1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922),
    *(3288, 3653),
)
#: Of which version of Python on, and in which regions not, Lambda takes snapshots of zip files
#: ("Improving startup performance with Lambda SnapStart", AWS Lambda developer guide): New Zealand
#: and Taipei.
SNAPSHOT_PYTHON = (3, 12)
NO_SNAPSHOTS = ("ap-southeast-6", "ap-east-2")
#: Of the bucket.
BLOCK_PUBLIC_ACCESS = {
    "BlockPublicAcls": True,
    "IgnorePublicAcls": True,
    "BlockPublicPolicy": True,
    "RestrictPublicBuckets": True,
}
ENCRYPTION = {
    "Rules": [
        {
            "ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"},
            "BucketKeyEnabled": False,
        }
    ]
}
#: The name of the role's policy in the role.
ROLE_POLICY = "dask-lambda"
#: Of str.__hash__ in all workers, so that tasks which partition strings agree (as distributed has).
HASH_SEED = "6640"


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose.

    Attributes
    ----------
    name : str
        Of the deployment.
    bucket : str, optional
        A bucket of the user's own; default: one is made.
    prefix : str
        Of object names, behind the shard.
    memory : tuple of int
        MB; a function for each.
    timeout : int
        Seconds that an invocation may take.
    storage : int
        MB of ``/tmp``.
    log_days : int
        After which log lines are deleted.
    expire_days : int
        After which S3 deletes what killed programs have left; kept runs stay.
    tags : mapping
        More tags for everything.
    boundary : str, optional
        ARN of a permissions boundary for the role.
    tracing, metrics : bool
        X-Ray; metrics in CloudWatch.
    snapstart : bool
        Whether environments begin as copies of a snapshot.
    """

    name: str = DEFAULT
    bucket: str | None = None
    prefix: str = "dask-lambda"
    memory: tuple[int, ...] = LADDER
    timeout: int = MAX_TIMEOUT
    storage: int = MIN_STORAGE
    log_days: int = 14
    expire_days: int = 7
    tags: Mapping[str, str] = field(default_factory=dict)
    boundary: str | None = None
    tracing: bool = False
    metrics: bool = False
    snapstart: bool = False

    def check(self) -> None:
        """Refuse what AWS would refuse half-way.

        Raises
        ------
        ConfigurationError
        """
        check_name(self.name)
        if not self.memory:
            raise ConfigurationError("there must be a function: give at least one memory size")
        if len(set(self.memory)) > MAX_SIZES:
            raise ConfigurationError(
                f"{len(set(self.memory))} memory sizes are too many: there may be {MAX_SIZES}"
            )
        for memory in self.memory:
            _check_range("memory", memory, MIN_MEMORY, MAX_MEMORY, "MB")
        _check_range("timeout", self.timeout, 1, MAX_TIMEOUT, "seconds")
        _check_range("storage", self.storage, MIN_STORAGE, MAX_STORAGE, "MB")
        _check_range("expire-days", self.expire_days, 1, 36_500, "days")
        if self.log_days not in RETENTIONS:
            raise ConfigurationError(
                f"log-days is {self.log_days}; CloudWatch takes one of "
                + ", ".join(map(str, RETENTIONS))
            )
        if not PREFIX.fullmatch(self.prefix):
            raise ConfigurationError(
                f"prefix is {self.prefix!r}; it must consist of letters, digits and . _ = -, with "
                "slashes between them, if any"
            )
        if self.snapstart and self.storage != MIN_STORAGE:
            raise ConfigurationError(
                f"storage is {self.storage:,} MB; with --snapstart it must be {MIN_STORAGE}: "
                "Lambda takes no snapshots of more (AWS Lambda developer guide)"
            )
        for name in self.tags:
            if not name or name.lower().startswith("aws:") or name.startswith("dask-lambda:"):
                raise ConfigurationError(f"a tag cannot be called {name!r}")

    def to_json(self) -> dict[str, Any]:
        """Return them for a record."""
        return {**asdict(self), "tags": dict(self.tags), "memory": list(self.memory)}

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> Options:
        """Return what :meth:`to_json` has given."""
        return cls(**{**known, "memory": tuple(known["memory"])})


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """The bucket.  Of a user's own one only the lifecycle rules for our prefix are ours."""

    name: str
    is_ours: bool
    prefix: str
    expire_days: int
    tags: Mapping[str, str]
    policy: policies.Document | None

    def rules(self) -> list[lifecycle.Rule]:
        """Return our lifecycle rules."""
        return lifecycle.rules(self.prefix, self.expire_days)


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """The execution role."""

    name: str
    arn: str
    trust: policies.Document
    policy: policies.Document
    boundary: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LogGroupSpec:
    """A log group."""

    name: str
    days: int
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer; its versions cannot be changed, and have no tags, so all is in the description."""

    deployment: str
    name: str
    content: str
    archive: Archive
    runtime: str
    architecture: str

    @property
    def description(self) -> str:
        """By which a version of equal content is found."""
        return layer_description(self.deployment, self.content)


@dataclass(frozen=True, slots=True)
class RepositorySpec:
    """The repository in ECR, and the image in it that is ours to build and push."""

    name: str
    recipe: Recipe
    uri: str
    policy: policies.Document
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A function: what the code is, and all settings as Lambda names them."""

    name: str
    memory: int
    code: Archive | None  #: None for an image
    image: str | None
    architecture: str
    layers: tuple[str, ...]  #: their names; a version's ARN is known when it has been published
    settings: Mapping[str, Any]
    tags: Mapping[str, str]
    alias: str = ""  #: by which it is called, if Lambda keeps snapshots of it


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything that is to exist."""

    options: Options
    names: Names
    package: Package
    bucket: BucketSpec
    role: RoleSpec
    log_groups: tuple[LogGroupSpec, ...]
    layers: tuple[LayerSpec, ...]
    functions: tuple[FunctionSpec, ...]
    repository: RepositorySpec | None = None


def names_of(options: Options, where: Where) -> Names:
    """Return the names of a deployment."""
    bucket = options.bucket or bucket_name(options.name, where)
    sizes = tuple(sorted(set(options.memory)))
    alias = ALIAS if options.snapstart else ""
    return Names(options.name, where, bucket, options.prefix, sizes, alias)


def blueprint(
    options: Options, where: Where, package: Package, *, version: str, secure: bool = True
) -> Blueprint:
    """Describe what is to exist.

    Parameters
    ----------
    options : Options
    where : Where
    package : Package
    version : str
        Of dask_lambda, for a tag.
    secure : bool
        Whether AWS is spoken to over TLS; then the bucket refuses everything else.

    Raises
    ------
    ConfigurationError
        If an option is out of range.
    """
    options.check()
    if options.snapstart:
        _check_snapshots(package, where)
    if len(package.layers) > MAX_LAYERS:
        raise ConfigurationError(
            f"the package has {len(package.layers)} layers; a function takes {MAX_LAYERS}"
        )
    if package.image is not None and f".{where.region}." not in package.image.partition("/")[0]:
        raise ConfigurationError(
            f"the image {package.image!r} is in another region than the functions, which would be "
            f"in {where.region}: Lambda takes images of its own region only"
        )
    names = names_of(options, where)
    tags = _tags(options, version)
    layers = tuple(
        LayerSpec(
            options.name,
            names.layer(layer.name),
            layer.content,
            layer.archive,
            package.runtime,
            package.architecture,
        )
        for layer in package.layers
    )
    functions = tuple(
        FunctionSpec(
            names.function(memory),
            memory,
            package.code,
            package.image,
            package.architecture,
            tuple(layer.name for layer in layers),
            _settings(options, names, package, memory),
            tags,
            names.alias,
        )
        for memory in names.sizes
    )
    return Blueprint(
        options,
        names,
        package,
        *surroundings(options, where, version=version, secure=secure),
        layers,
        functions,
        _repository(names, package, tags),
    )


def surroundings(
    options: Options, where: Where, *, version: str, secure: bool = True
) -> tuple[BucketSpec, RoleSpec, tuple[LogGroupSpec, ...]]:
    """Describe what functions need around them, whatever they run.

    Parameters
    ----------
    options, where, version, secure
        As of :func:`blueprint`.
    """
    names, tags = names_of(options, where), _tags(options, version)
    bucket = BucketSpec(
        names.bucket,
        options.bucket is None,
        options.prefix,
        options.expire_days,
        tags,
        policies.tls_only(names) if secure else None,
    )
    role = RoleSpec(
        names.role,
        names.role_arn,
        policies.trust(),
        policies.execution(names, tracing=options.tracing),
        options.boundary,
        tags,
    )
    return bucket, role, tuple(LogGroupSpec(g, options.log_days, tags) for g in names.log_groups)


def _tags(options: Options, version: str) -> dict[str, str]:
    return {**options.tags, TAG: options.name, "dask-lambda:version": version}


def _repository(names: Names, package: Package, tags: Mapping[str, str]) -> RepositorySpec | None:
    if package.recipe is None or package.image is None:
        return None
    return RepositorySpec(
        names.repository, package.recipe, package.image, policies.fetching(names), tags
    )


def _settings(options: Options, names: Names, package: Package, memory: int) -> dict[str, Any]:
    """Return what UpdateFunctionConfiguration takes, without the layers."""
    threads = str(max(1, round(memory / MB_PER_CORE)))
    variables = {
        "PYTHONHASHSEED": HASH_SEED,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **dict(package.variables),
    }
    if options.metrics:
        variables["DASK_LAMBDA_METRICS"] = "1"
    zipped = {} if package.image else {"Runtime": package.runtime, "Handler": package.handler}
    return {
        "Description": f"dask_lambda worker, environment {package.environment}"[:256],
        **zipped,
        "Role": names.role_arn,
        "MemorySize": memory,
        "Timeout": options.timeout,
        "Environment": {"Variables": variables},
        "EphemeralStorage": {"Size": options.storage},
        "TracingConfig": {"Mode": "Active" if options.tracing else "PassThrough"},
        "SnapStart": {"ApplyOn": "PublishedVersions" if options.snapstart else "None"},
    }


def _check_snapshots(package: Package, where: Where) -> None:
    """Refuse what Lambda takes no snapshots of."""
    version = tuple(map(int, package.runtime.removeprefix("python").split(".")))
    if package.image is None and version < SNAPSHOT_PYTHON:
        least = ".".join(map(str, SNAPSHOT_PYTHON))
        raise ConfigurationError(
            f"--snapstart needs Python {least} or newer, and functions run the version of this "
            f"Python, {version[0]}.{version[1]}: use a newer one here, or leave --snapstart out"
        )
    if where.region in NO_SNAPSHOTS:
        raise ConfigurationError(
            f"Lambda takes no snapshots in {where.region}: another --region, or leave --snapstart "
            "out"
        )


def layer_description(deployment: str, content: str = "") -> str:
    """Return the description of a layer version with this content, or how all of them begin.

    It stands in for a tag, which layers cannot have: it says whose a version is.  Its name does
    not, since what follows the deployment's name in it may belong to the name of another one.
    """
    return f"dask_lambda {deployment} {content}"[:256]


def _check_range(name: str, value: int, low: int, high: int, unit: str) -> None:
    if not low <= value <= high:
        raise ConfigurationError(f"{name} is {value:,}; it must be {low:,} to {high:,} ({unit})")
