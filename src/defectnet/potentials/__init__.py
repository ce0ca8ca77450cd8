"""Machine-learned potentials behind one protocol; each is imported only in the job that needs it.

A potential is a module with two functions, ``identify(settings) -> Identity`` (cheap, no model is loaded) and
``load(settings) -> ForceModel``. To add one: write the module, name it in :class:`defectnet.config.Potential`, add its
environment under ``envs/`` and run the conformance tests on it.
"""

from __future__ import annotations

from functools import cached_property
from importlib import import_module

from defectnet.config import Potential
from defectnet.potentials.base import Evaluation, ForceModel, ForceModelCalculator, HasHessianVectorProduct, Identity

__all__ = [
    "Evaluation",
    "ForceModel",
    "ForceModelCalculator",
    "HasHessianVectorProduct",
    "Identity",
    "LazyModel",
    "identify",
    "load",
]


def identify(settings: Potential) -> Identity:
    """What determines this potential's numbers. Raises InputError for a missing package or checkpoint."""
    return import_module(f"defectnet.potentials.{settings.name}").identify(settings)


def load(settings: Potential) -> ForceModel:
    """Load a potential. Raises InputError for a missing package, checkpoint or device."""
    return import_module(f"defectnet.potentials.{settings.name}").load(settings)


class LazyModel:
    """A potential that is loaded when it is first needed: a batch with nothing left to compute ends at once."""

    def __init__(self, settings: Potential):
        self._settings = settings
        self.identity = identify(settings)

    @cached_property
    def model(self) -> ForceModel:
        """The loaded potential."""
        return load(self._settings)
