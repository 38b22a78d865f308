"""What this machine knows of a deployment, and the configuration by which Dask finds it.

May import: naming, config's names, errors, the standard library, yaml, dask.config.

Two files.  The *record*, in the state directory, says what was deployed, so that ``status`` can
tell what somebody has changed since, and ``destroy`` knows the bucket.  It is written before
anything is made.  The *configuration*, in Dask's directory, has function and bucket, so that
``lambda_get`` uses them without a word.  Neither holds a secret.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dask.config
import yaml

from dask_lambda.deploy.naming import ALIAS, Names, Where, size_of
from dask_lambda.errors import ConfigurationError
from dask_lambda.kept_runs import runs_directory

#: Version of the record's format.
FORMAT = 1
#: Sorted before ``dask-lambda.yaml`` and ``dask.yaml``: what the user writes there wins.
CONFIGURATION = "dask-lambda-deployed.yaml"
MARK = "# Written by `dask-lambda deploy`; `dask-lambda destroy` removes it."


@dataclass(slots=True)
class Record:
    """What was deployed.

    Attributes
    ----------
    name : str
    account, region, partition : str
    endpoint_url : str, optional
    bucket : str
    own_bucket : bool
        Whether the bucket was made, and is to be removed.
    prefix : str
    sizes : list of int
        MB; of the functions that there are.
    settings : dict
        Function to what was set: settings as Lambda names them, ``CodeSha256`` and ``Layers``.
    environment : str
        Hash of the package.
    architecture : str
    version : str
        Of dask_lambda.
    options : dict
        What the user chose.
    complete : bool
        Whether the deployment went through to its end.
    removing : bool
        Whether its removal was begun.
    """

    name: str
    account: str
    region: str
    partition: str
    endpoint_url: str | None
    bucket: str
    own_bucket: bool
    prefix: str
    sizes: list[int] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: str = ""
    architecture: str = "x86_64"
    version: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    removing: bool = False

    @property
    def where(self) -> Where:
        """The account and region."""
        return Where(self.account, self.region, self.partition)

    @property
    def names(self) -> Names:
        """All names."""
        alias = ALIAS if self.options.get("snapstart") else ""
        return Names(self.name, self.where, self.bucket, self.prefix, tuple(self.sizes), alias)

    @property
    def path(self) -> Path:
        """The file."""
        return _path(self.name, self.where)

    def write(self) -> None:
        """Write it, all of it or nothing."""
        _write(self.path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    def remove(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)


def read(name: str, where: Where) -> Record | None:
    """Return the record of a deployment; None if this machine has none.

    Raises
    ------
    ConfigurationError
        If it cannot be read.
    """
    return _read(_path(name, where))


def find(name: str | None, region: str | None = None) -> list[Record]:
    """Return the records of this machine, of a name and of a region if they are given."""
    found = [_read(path) for path in sorted(_directory().glob("*.json"))]
    return [
        each
        for each in found
        if each is not None and name in (None, each.name) and region in (None, each.region)
    ]


def _read(path: Path) -> Record | None:
    try:
        known = json.loads(path.read_text("utf-8"))
        if known.pop("format") != FORMAT:
            raise ValueError("it is of another version of dask_lambda")
        return Record(**known)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the record {path} of a deployment cannot be read ({error}): remove it; what is in "
            "the account is found by its tags"
        ) from error


def _directory() -> Path:
    return runs_directory().parent / "deployments"


def _path(name: str, where: Where) -> Path:
    return _directory() / f"{name}.{where.account}.{where.region}.json"


# -- Dask's configuration --------------------------------------------------------------------------


def configuration_path() -> Path:
    """Return the file that ``deploy`` writes: in the directory that Dask reads last."""
    directory = Path(dask.config.PATH)
    if directory.is_file() or directory.suffix in (".yaml", ".yml", ".json"):
        directory = Path.home() / ".config" / "dask"
    return directory / CONFIGURATION


def configuration(record: Record) -> dict[str, Any]:
    """Return the settings under ``dask-lambda:`` that mean a deployment."""
    names = record.names
    smallest, *larger = record.sizes
    settings: dict[str, Any] = {
        "function": names.called(smallest),
        "memory": smallest,
        "bucket": record.bucket,
        "prefix": record.prefix,
        "region": record.region,
        "architecture": record.architecture,
        "timeout": int(record.options.get("timeout", 900)),
        "larger-functions": {str(memory): names.called(memory) for memory in larger},
    }
    if record.endpoint_url:
        settings["endpoint-url"] = record.endpoint_url
    return settings


def configure(record: Record) -> Path:
    """Have Dask use a deployment from now on, here and in new processes.

    Returns
    -------
    Path
        The file that was written.
    """
    settings = configuration(record)
    path = configuration_path()
    text = yaml.safe_dump({"dask-lambda": settings}, sort_keys=False)
    _write(path, f"{MARK}\n# The deployment {record.name!r} in {record.where}.\n{text}")
    return path


def is_used(record: Record) -> bool:
    """Whether Dask has been told to use this deployment, and has not been told otherwise."""
    try:
        text = configuration_path().read_text("utf-8")
        found = yaml.safe_load(text)["dask-lambda"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False
    function = str(found.get("function")).partition(":")[0]
    same = (found.get("bucket"), found.get("region")) == (record.bucket, record.region)
    return text.startswith(MARK) and same and size_of(record.name, function) is not None


def unconfigure(record: Record) -> None:
    """Remove the file, if it means this deployment."""
    if is_used(record):
        configuration_path().unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".", suffix=".new", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
