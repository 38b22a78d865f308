"""What a wheel has to fit: a Python, a processor and a C library.  May import: errors.  Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from dask_lambda.errors import PackagingError

#: Python of Lambda's runtimes, and the glibc of the Amazon Linux below it ("Lambda runtimes", AWS
#: Lambda developer guide): 3.11 is on Amazon Linux 2, the later ones are on Amazon Linux 2023.
RUNTIMES = {"3.11": (2, 26), "3.12": (2, 34), "3.13": (2, 34), "3.14": (2, 34)}
#: glibc of the base image of :mod:`dask_lambda.deploy.image` (Debian 12).
IMAGE_GLIBC = (2, 36)
#: Lambda's name of an architecture, and that of wheels and kernels.
MACHINES = {"x86_64": "x86_64", "arm64": "aarch64"}
#: The oldest C library that manylinux wheels are made for, and the older names of such wheels.
_OLDEST = 5
_LEGACY = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}


@dataclass(frozen=True, slots=True)
class Platform:
    """Where the worker's packages will run.

    Attributes
    ----------
    python : str
        "3.12"
    architecture : {"x86_64", "arm64"}
    glibc : (int, int)
    """

    python: str
    architecture: str
    glibc: tuple[int, int]

    @classmethod
    def of_lambda(
        cls, python: str | None = None, architecture: str = "x86_64", *, image: bool = False
    ) -> Platform:
        """Return the platform of a runtime, or of a container image.

        Parameters
        ----------
        python : str, optional
            Default: this interpreter's version, which workers must have.
        architecture : {"x86_64", "arm64"}
        image : bool
            Of a container image, which brings a C library of its own.

        Raises
        ------
        PackagingError
            If Lambda has no such runtime.
        """
        python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
        if architecture not in MACHINES:
            raise PackagingError(
                f"Lambda has no architecture {architecture!r}: choose one of "
                + " and ".join(MACHINES)
            )
        if python not in RUNTIMES:
            raise PackagingError(
                f"Lambda has no runtime for Python {python}, and workers must have the client's "
                f"Python: run the client with one of {', '.join(RUNTIMES)}"
            )
        return cls(python, architecture, IMAGE_GLIBC if image else RUNTIMES[python])

    @property
    def machine(self) -> str:
        """The processor in the words of wheels."""
        return MACHINES[self.architecture]

    @property
    def tags(self) -> list[str]:
        """The platform tags of wheels that run there, the best ones first (PEP 600)."""
        major, newest = self.glibc
        tags = []
        for minor in range(newest, _OLDEST - 1, -1):
            tags.append(f"manylinux_{major}_{minor}_{self.machine}")
            if minor in _LEGACY:
                tags.append(f"{_LEGACY[minor]}_{self.machine}")
        return tags

    @property
    def markers(self) -> dict[str, str]:
        """The values of environment markers there (PEP 508)."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }

    def __str__(self) -> str:
        major, minor = self.glibc
        return f"Python {self.python}, {self.architecture}, glibc {major}.{minor}"
