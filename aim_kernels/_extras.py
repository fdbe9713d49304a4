"""Optional packages: which extra of this one installs them."""

from __future__ import annotations

import importlib.util

#: Packages that are not of the extra ``demo``, by the extra that installs them.
EXTRAS = {"h5py": "compare", "av": "video", "scipy": "compare", "PIL": "compare"}
#: Names of distributions that differ from the name of the import.
NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def require(package: str, purpose: str) -> None:
    """Raises :class:`MissingPackageError` unless the top-level ``package`` is installed. Imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"{purpose} needs the package {NAMES.get(package, package)}, which is not installed: "
            f'pip install "aim-kernels[{EXTRAS.get(package, "demo")}]"'
        )
