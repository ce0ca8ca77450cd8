"""The dataset: file format, splits, and arrays for training."""
