"""Which potentials the current interpreter can run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = {"sevennet": "sevenn", "mace": "mace-torch", "mattersim": "mattersim", "chgnet": "chgnet"}


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


INSTALLED = [name for name, package in PACKAGES.items() if _installed(package)]
ABSENT = [name for name in PACKAGES if name not in INSTALLED]
