"""What clients have left in a bucket, and its removal.

May import: kept_runs, kept_folder, lifecycle, credentials, config, cost, errors, the ground;
botocore, boto3 and local_shared late.  For the command line: it talks to S3 with a botocore client
and no engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from dask_lambda import kept_runs, lifecycle
from dask_lambda.config import Settings
from dask_lambda.credentials import NO_CREDENTIALS, region_of_environment
from dask_lambda.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigurationError,
    DaskLambdaError,
)
from dask_lambda.kept_folder import DESCRIPTION, kept_prefix, label_of
from dask_lambda.kept_runs import KeptRun, Place
from lambda_worker import protocol
from lambda_worker.store import LOOPBACK

#: Objects that one request deletes at most.
BATCH = 1000


NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class FoundRun:
    """A run's objects in a bucket.

    Attributes
    ----------
    run : str
    kept : bool
    name : str, optional
        Of a kept run whose record is on this machine.
    objects, nbytes : int
    newest : datetime
        When the last of them was written.
    saved : bool
        Whether a saved collection is described there.
    """

    run: str
    kept: bool
    name: str | None = None
    objects: int = 0
    nbytes: int = 0
    newest: datetime = NEVER
    saved: bool = False
    names: list[str] = field(default_factory=list, repr=False)

    def add(self, entry: dict[str, Any]) -> None:
        """Count an object."""
        self.objects += 1
        self.nbytes += entry["Size"]
        self.newest = max(self.newest, entry["LastModified"])
        self.saved |= self.kept and label_of(entry["Key"]).startswith(DESCRIPTION)


@dataclass(slots=True)
class Cleaned:
    """What was, or would be, removed."""

    runs: list[FoundRun] = field(default_factory=list)
    uploads: int = 0


class Bucket:
    """A bucket, for those who manage it.

    Parameters
    ----------
    s3 : botocore client
    place : Place
    """

    def __init__(self, s3: Any, place: Place):
        self._s3, self.place = s3, place

    @classmethod
    def configured(cls) -> Bucket | None:
        """Return the bucket that the configuration means.

        Returns
        -------
        Bucket or None
            None for an embedded AWS that ends, with all that is in it, with the process it is for.

        Raises
        ------
        ConfigurationError, AccessDeniedError
        """
        from dask_lambda.local_shared import shared_status

        settings = Settings.resolve()
        if not settings.is_local:
            assert settings.bucket is not None
            place = Place(settings.bucket, settings.prefix, settings.region, settings.endpoint_url)
            return cls(_client(place), place)
        shared = shared_status()
        if shared is None:
            return None
        place = Place(shared.bucket, settings.prefix, shared.region, shared.endpoint_url)
        return cls(shared.client("s3"), place)

    @classmethod
    def of(cls, place: Place) -> Bucket | None:
        """Return the bucket of a kept run; None if it was an embedded AWS's that has ended."""
        from dask_lambda.local_shared import shared_status

        shared = shared_status()
        if shared is not None and shared.endpoint_url == place.endpoint_url:
            return cls(shared.client("s3"), place)
        bucket = cls(_client(place), place)
        if urlsplit(place.endpoint_url or "").hostname in LOOPBACK and not bucket._answers():
            return None
        return bucket

    def _answers(self) -> bool:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            EndpointConnectionError,
            NoCredentialsError,
        )

        try:
            self._s3.head_bucket(Bucket=self.place.bucket)
        except (EndpointConnectionError, NoCredentialsError):
            return False  # an embedded AWS of ours needs none of the user's
        except BotoCoreError:  # a later request says what is wrong
            return True
        except ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404)
        return True

    # -- runs ------------------------------------------------------------------------------------

    def run(self, run: str, *, kept: bool) -> FoundRun:
        """Find the objects of one run, with their names."""
        found = FoundRun(run, kept)
        prefix = kept_prefix(self.place.prefix) if kept else self.place.prefix
        for shard in protocol.shards():
            for entry in self._entries(f"{shard}/{prefix}/{run}/"):
                found.add(entry)
                found.names.append(entry["Key"])
        return found

    def runs(self, *, kept: bool) -> list[FoundRun]:
        """Find all runs whose objects have names like ours, the oldest first."""
        found: dict[str, FoundRun] = {}
        prefix = kept_prefix(self.place.prefix) if kept else self.place.prefix
        ours = _names(prefix)
        for shard in protocol.shards():
            for entry in self._entries(f"{shard}/{prefix}/"):
                if (match := ours.fullmatch(entry["Key"])) is not None:
                    found.setdefault(match[1], FoundRun(match[1], kept)).add(entry)
        return sorted(found.values(), key=lambda each: each.newest)

    def clean(
        self, older: timedelta, *, kept: bool = False, saved: bool = False, dry: bool = False
    ) -> Cleaned:
        """Delete runs whose newest object is older, and uploads that were begun before.

        Parameters
        ----------
        older : timedelta
        kept : bool
            Whether kept runs are deleted, too, with their records.
        saved : bool
            Whether saved collections are among these.
        dry : bool
            Only say what would be deleted.
        """
        before = datetime.now(UTC) - older
        cleaned = Cleaned()
        records = {record.run: record for record in kept_runs.records()} if kept else {}
        for each in self.runs(kept=False) + (self.runs(kept=True) if kept else []):
            if each.newest > before or (each.saved and not saved):
                continue
            if each.run in records:
                each.name = records[each.run].name
            if dry or self._delete_old(each, before, records.get(each.run)):
                cleaned.runs.append(each)
        for prefix in (self.place.prefix, *([kept_prefix(self.place.prefix)] if kept else [])):
            cleaned.uploads += self._abort(prefix, before, dry)
        return cleaned

    def _delete_old(self, old: FoundRun, before: datetime, record: KeptRun | None) -> bool:
        if record is not None:
            try:
                with kept_runs.locked(record.name):
                    gone = self._delete_old(old, before, None)
                    if gone:
                        kept_runs.remove(record.name)
                    return gone
            except ConfigurationError:  # somebody is using it
                return False
        now = self.run(old.run, kept=old.kept)
        if now.newest > before:  # it goes on
            return False
        self.delete(now.names)
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        names = list(names)
        for first in range(0, len(names), BATCH):
            batch = [{"Key": name} for name in names[first : first + BATCH]]
            with _translated("s3:DeleteObject", self.place.bucket):
                answer = self._s3.delete_objects(
                    Bucket=self.place.bucket, Delete={"Objects": batch, "Quiet": True}
                )
            if errors := answer.get("Errors"):
                raise DaskLambdaError(
                    f"{len(errors)} objects could not be deleted, among them "
                    f"{errors[0].get('Key')} ({errors[0].get('Code')}: {errors[0].get('Message')})"
                )

    def _abort(self, prefix: str, before: datetime, dry: bool) -> int:
        """Give up uploads in parts that nobody will complete; return how many."""
        count = 0
        ours = _names(prefix)
        pages = self._s3.get_paginator("list_multipart_uploads")
        for shard in protocol.shards():
            with _translated("s3:ListBucketMultipartUploads", self.place.bucket):
                for page in pages.paginate(Bucket=self.place.bucket, Prefix=f"{shard}/{prefix}/"):
                    for upload in page.get("Uploads", []):
                        old = upload["Initiated"] <= before
                        if not old or ours.fullmatch(upload["Key"]) is None:
                            continue
                        count += 1
                        if not dry:
                            with suppress(self._s3.exceptions.NoSuchUpload):  # just completed
                                self._s3.abort_multipart_upload(
                                    Bucket=self.place.bucket,
                                    Key=upload["Key"],
                                    UploadId=upload["UploadId"],
                                )
        return count

    def _entries(self, prefix: str) -> Iterator[dict[str, Any]]:
        pages = self._s3.get_paginator("list_objects_v2")
        with _translated("s3:ListBucket", self.place.bucket):
            for page in pages.paginate(Bucket=self.place.bucket, Prefix=prefix):
                yield from page.get("Contents", [])

    # -- lifecycle rules -------------------------------------------------------------------------

    def rules(self) -> list[lifecycle.Rule]:
        """Return all lifecycle rules of the bucket."""
        return list(self._lifecycle().get("Rules", []))

    def install(self, days: int, *, kept: bool = False) -> None:
        """Have S3 delete what is left behind after so many days.

        Parameters
        ----------
        days : int
        kept : bool
            Whether kept runs are deleted as well.
        """
        before = self._lifecycle()
        rules = lifecycle.merged(before.get("Rules", []), self.place.prefix, days)
        if kept:
            rules = lifecycle.merged(rules, kept_prefix(self.place.prefix), days)
        self._put(rules, before)

    def uninstall(self) -> None:
        """Remove our rules, and no others."""
        before = self._lifecycle()
        rules = before.get("Rules", [])
        for prefix in (self.place.prefix, kept_prefix(self.place.prefix)):
            rules = lifecycle.without(rules, prefix)
        self._put(rules, before)

    def _lifecycle(self) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        with _translated("s3:GetLifecycleConfiguration", self.place.bucket):
            try:
                found: dict[str, Any] = self._s3.get_bucket_lifecycle_configuration(
                    Bucket=self.place.bucket
                )
            except ClientError as error:
                if error.response["Error"]["Code"] != "NoSuchLifecycleConfiguration":
                    raise
                return {}
        return found

    def _put(self, rules: list[lifecycle.Rule], before: dict[str, Any]) -> None:
        """Replace all rules of the bucket; S3 knows no other way."""
        from botocore import xform_name

        bucket = self.place.bucket
        operation, parameters = lifecycle.replacement(bucket, rules, before)
        with _translated("s3:PutLifecycleConfiguration", bucket):
            getattr(self._s3, xform_name(operation))(**parameters)


def delete_run(record: KeptRun) -> FoundRun | None:
    """Delete a kept run and its record.

    Returns
    -------
    FoundRun or None
        What was deleted; None if the embedded AWS that had its objects has ended.

    Raises
    ------
    ConfigurationError
        If it is being used.
    """
    with kept_runs.locked(record.name):
        bucket = Bucket.of(record.place)
        found = bucket.run(record.run, kept=True) if bucket is not None else None
        if bucket is not None and found is not None:
            bucket.delete(found.names)
        kept_runs.remove(record.name)
        return found


def _names(prefix: str) -> re.Pattern[str]:
    """Return the pattern of our object names; its group is the run."""
    digits = protocol.SHARD_DIGITS
    return re.compile(rf"[0-9a-f]{{{digits}}}/{re.escape(prefix)}/([0-9a-f]{{32}})/.+", re.DOTALL)


def _client(place: Place) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.Session(region_name=place.region or region_of_environment())
        return session.client(
            "s3",
            endpoint_url=place.endpoint_url,
            config=Config(
                connect_timeout=10,
                retries={"mode": "standard", "total_max_attempts": 5},
                s3={"addressing_style": "path"} if place.endpoint_url else None,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"the AWS configuration cannot be used: {error}") from error


@contextmanager
def _translated(action: str, bucket: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code == "NoSuchBucket":
            raise BucketNotFoundError(
                f"the bucket {bucket!r} does not exist ({action}): check dask-lambda.bucket"
            ) from error
        if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise AccessDeniedError(
                f"access denied: {action} on bucket {bucket!r} ({error}): check the credentials, "
                "and that the policy allows the action"
            ) from error
        raise DaskLambdaError(f"{action} on bucket {bucket!r} failed: {error}") from error
    except NoCredentialsError as error:
        raise AccessDeniedError(f"{action} on bucket {bucket!r}: {NO_CREDENTIALS}") from error
    except BotoCoreError as error:
        raise DaskLambdaError(f"{action} on bucket {bucket!r} failed: {error}") from error
