"""From files on disk to an answer about a sample: what ``defectnet predict`` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defectnet.errors import InputError
from defectnet.experiments.axis import calibrate_axis
from defectnet.experiments.known import look_up
from defectnet.experiments.measured import read_spectrum
from defectnet.experiments.predict import Identification, predict
from defectnet.experiments.resolution import parse_resolution
from defectnet.training.fit import load_checkpoint

log = logging.getLogger(__name__)


def ask(
    model: Path,
    doped: Path,
    formula: str,
    *,
    pristine: Path | None = None,
    candidates: Sequence[str] | None = None,
    dataset: Path | None = None,
    host: str | None = None,
    resolution: str | None = None,
    calibrate: bool = False,
    partial: bool = False,
    **reading: Any,
) -> Identification:
    """Concentrations of dopants in the sample whose spectrum is in the file ``doped``.

    Parameters: checkpoint ``model``; ``formula`` of the host; file ``pristine`` of the undoped host, or else its
    computed spectrum; ``candidates``; ``dataset`` and id or formula of the ``host`` in it, for what was computed of it;
    ``resolution`` as :func:`~defectnet.experiments.resolution.parse_resolution` takes it; ``calibrate``, whether to
    stretch the measured axis to the computed one; ``partial``, whether to accept spectra that end within the band or
    cover different ranges; ``reading``, further arguments of
    :func:`~defectnet.experiments.measured.read_spectrum`. Raises :class:`InputError` naming option or file and remedy.
    """
    trained = load_checkpoint(model)
    known = None
    if dataset is not None:
        known = look_up(dataset, host or formula)
    elif host is not None:
        raise InputError("--host: needs --dataset, the dataset that has it")
    elif pristine is None:
        raise InputError("--pristine: give the spectrum of the undoped host, or --dataset with a computed one")
    elif calibrate:
        raise InputError("--calibrate: needs --dataset, where the host's computed spectrum is")
    width = parse_resolution(resolution) if resolution is not None else None
    if calibrate and pristine is None:
        raise InputError("--calibrate: needs --pristine, the measured spectrum of the undoped host")
    sample = read_spectrum(doped, partial=partial, **reading)
    undoped = None if pristine is None else read_spectrum(pristine, partial=partial, **reading)
    if known is not None:
        if known.weighting != sample.weighting:
            raise InputError(f"--weighting {sample.weighting}: the spectra of {dataset} are weighted {known.weighting}")
        if calibrate:
            axis = calibrate_axis(undoped, known.density, known.edges_meV, width)
            log.info("axis multiplied by %.4f ± %.4f", axis.stretch, axis.stretch_error)
            undoped, sample = axis.apply(undoped), axis.apply(sample)
            width = width and width.stretched(axis.stretch)
        if width is not None:
            known = known.broadened(width)
    return predict(trained, undoped or known.spectrum(), sample, formula, candidates, known, partial=partial)
