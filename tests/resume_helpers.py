"""What the tests of named computations share: records of a test's own, and marks of what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Names = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def _own_records_and_empty_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aws: Any, bucket_names: Names
) -> Iterator[None]:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    yield
    # A killed client's invocations go on; what they write last is not this test's concern.
    delete = aws.client("s3").delete_object
    for name in bucket_names():
        delete(Bucket=aws.bucket, Key=name)


class Marks:
    """What tasks leave behind when they run: a line for each time."""

    def __init__(self, directory: Path):
        self.path = directory / "marks"

    def counts(self) -> Counter[str]:
        return Counter(self.path.read_text().split()) if self.path.exists() else Counter()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path)
