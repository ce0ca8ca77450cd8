"""What a network has to beat: the mean of the training answers, and ridge regression.

Both have the network's interface: ``predict(samples)`` gives concentrations [n, 56] as fractions, zero outside
``samples.candidates``. Both learn from masked entries only, with all candidates of a host in the mask.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from defectnet.dataset.samples import Samples

MIN_ROWS = 5
"""Training rows in which an element must be a candidate before ridge regression is tried on it."""


class MeanBaseline:
    """Answers every question with the mean concentration of the candidates in the training part."""

    def fit(self, samples: Samples) -> MeanBaseline:
        """Learn the mean over all masked entries, absent candidates included."""
        self.mean = float(samples.targets[samples.candidates].mean())
        return self

    def predict(self, samples: Samples) -> np.ndarray:
        """Concentrations [n, 56] as fractions."""
        return np.where(samples.candidates, np.float32(self.mean), np.float32(0))


class RidgeBaseline:
    """One ridge regression per element on (doped - pristine spectrum, host composition).

    The penalty is chosen by leave-one-out cross-validation. Elements with fewer than :data:`MIN_ROWS` training rows
    get the mean.
    """

    def fit(self, samples: Samples) -> RidgeBaseline:
        """Fit each element on the rows where it is a candidate."""
        self.mean = MeanBaseline().fit(samples)
        features = self._features(samples)
        self.models: dict[int, Pipeline] = {}
        for element in np.flatnonzero(samples.candidates.sum(axis=0) >= MIN_ROWS):
            asked = samples.candidates[:, element]
            model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 6, 13)))
            self.models[int(element)] = model.fit(features[asked], samples.targets[asked, element])
        return self

    def predict(self, samples: Samples) -> np.ndarray:
        """Concentrations [n, 56] as fractions."""
        features = self._features(samples)
        predicted = self.mean.predict(samples)
        for element, model in self.models.items():
            asked = samples.candidates[:, element]
            if asked.any():
                predicted[asked, element] = model.predict(features[asked])
        return predicted

    @staticmethod
    def _features(samples: Samples) -> np.ndarray:
        return np.hstack([samples.doped - samples.pristine, samples.composition]).astype(np.float64)
