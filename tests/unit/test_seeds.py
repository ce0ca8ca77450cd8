import numpy as np
import pytest

from defectnet.seeds import generator


def test_same_purpose_same_stream():
    assert (generator(7, "mp-1", "plan", "0").random(8) == generator(7, "mp-1", "plan", "0").random(8)).all()


def test_stream_is_stable_across_machines_and_releases():
    assert generator(20250602, "Si", "plan", "0").integers(1_000_000, size=3).tolist() == [437959, 92786, 304471]


@pytest.mark.parametrize(
    "other", [(8, "ab", "c"), (7, "a", "bc"), (7, "ab"), (7, "c", "ab"), (7, "ab", "c", ""), (7, "abc"), (7,)]
)
def test_other_arguments_other_stream(other):
    assert not np.array_equal(generator(7, "ab", "c").random(4), generator(*other).random(4))


def test_streams_are_uncorrelated():
    draws = np.stack([generator(1, "host", str(k)).standard_normal(4000) for k in range(6)])
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 0.08
