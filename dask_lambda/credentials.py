"""AWS credentials that may be renewed while a run goes on.

May import: errors, the ground, botocore's names.

Temporary credentials end after hours.  Those that botocore renews by itself (an assumed role, SSO
with a valid session, an instance's role) need nothing.  Others are renewed by somebody else: a
shared credentials file is written anew, ``aws sso login`` is run in another terminal.  A botocore
session reads such sources once; so when AWS says that credentials have expired, a new session looks
again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dask_lambda.errors import AccessDeniedError

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials

#: Many requests find out at the same time that credentials have expired: one look is enough.
REFRESH_SECONDS = 1.0

NO_CREDENTIALS = (
    "no AWS credentials were found: log in, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY"
)


def region_of_environment() -> str | None:
    """Return ``AWS_REGION``, which AWS's other tools read, and botocore does not."""
    return os.environ.get("AWS_REGION") or None


class Credentials:
    """One source of credentials, for signing Invokes and for S3.

    Parameters
    ----------
    find : callable
        Looks for credentials anew: botocore ``Credentials`` or None.

    Raises
    ------
    AccessDeniedError
        If there are none.
    """

    def __init__(self, find: Callable[[], Any]):
        self._find = find
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._current = find()
        if self._current is None:
            raise AccessDeniedError(
                f"{NO_CREDENTIALS} (or set dask-lambda.backend to 'local' to use none)"
            )

    def __repr__(self) -> str:
        return "Credentials(...)"  # and nothing of what they are

    @property
    def at_hand(self) -> bool:
        """Whether they need not be renewed just now, for which botocore may ask the network."""
        needed = getattr(self._current, "refresh_needed", None)
        return needed is None or not needed()

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return those that are valid now; botocore renews what it can."""
        frozen: ReadOnlyCredentials = self._current.get_frozen_credentials()
        return frozen

    def refresh(self) -> None:
        """Look for credentials anew, after AWS has refused the ones that there are.

        It may read files and ask the network, and is to be called in a thread.  If none are found,
        the old ones stay.
        """
        with self._lock:
            if time.monotonic() - self._looked < REFRESH_SECONDS:
                return
            try:
                found = self._find()
            except Exception:  # noqa: BLE001  a file that is being written; next time, perhaps
                found = None
            self._current = found or self._current
            self._looked = time.monotonic()

    def __call__(self) -> dict[str, Any]:
        """Return them in obstore's form, which asks anew whenever they are about to expire.

        They are said to expire now, so that what :meth:`refresh` found is used at once; obstore
        asks ten times a second at the most.
        """
        try:
            frozen = self.get_frozen_credentials()
        except Exception as error:  # noqa: BLE001  botocore could not renew them, for any reason
            raise PermissionError(f"ExpiredToken: {type(error).__name__}: {error}") from None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC),
        }


def find_credentials() -> Any:
    """Look where boto3 looks, anew: botocore ``Credentials`` or None."""
    import boto3

    return boto3.Session().get_credentials()


def open_with_own_credentials(bucket: str, endpoint_url: str | None, region: str) -> Any:
    """Open a bucket with the credentials that boto3 finds in this process.

    Returns
    -------
    obstore store
    """
    from lambda_worker.store import open_bucket

    provider = Credentials(find_credentials)
    return open_bucket(
        bucket, endpoint_url=endpoint_url, region=region, credential_provider=provider
    )
