"""Detection limits against measurements that are simulated many times."""

import numpy as np
import pytest

from defectnet.training.detection import ERRORS, detection_limits

BINS, NOISE = 60, 0.05


@pytest.fixture
def responses():
    rng = np.random.default_rng(0)
    curves = rng.normal(0, 3, (4, BINS))
    curves[1] = curves[0] + 0.5 * curves[1]  # look-alikes
    return curves


@pytest.mark.parametrize("known", [False, True])
def test_amounts_at_the_limit_are_found_as_often_as_promised(responses, known):
    limits, rng = detection_limits(responses, NOISE, known), np.random.default_rng(1)
    for k in range(len(responses)):
        basis = responses[[k]] if known else responses
        place = 0 if known else k
        found = []
        for amount in (0.0, limits[k]):
            noise = NOISE * (rng.normal(size=(4000, BINS)) + rng.normal(size=(4000, BINS)))
            spectra = amount * responses[k] + noise
            found.append(np.linalg.lstsq(basis.T, spectra.T, rcond=None)[0][place])
        critical = limits[k] / 2
        assert np.mean(found[0] > critical) == pytest.approx(ERRORS, abs=0.015)
        assert np.mean(found[1] < critical) == pytest.approx(ERRORS, abs=0.015)


def test_limits_grow_with_noise_and_with_look_alikes(responses):
    alone, together = detection_limits(responses, NOISE, known=True), detection_limits(responses, NOISE)
    assert (together >= alone).all() and together[0] > 1.5 * alone[0]
    np.testing.assert_allclose(detection_limits(responses, 3 * NOISE), 3 * together)
    np.testing.assert_allclose(detection_limits(10 * responses, NOISE), together / 10)


def test_what_cannot_be_told_apart_is_never_detected(responses):
    responses[3] = 2 * responses[2]
    limits = detection_limits(responses, NOISE)
    assert np.isinf(limits[2:]).all() and np.isfinite(limits[:2]).all()
    assert np.isfinite(detection_limits(responses, NOISE, known=True)).all()
    responses[0] = 0
    assert np.isinf(detection_limits(responses, NOISE)[0]) and np.isinf(
        detection_limits(responses, NOISE, known=True)[0]
    )
