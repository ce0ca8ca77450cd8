"""Training, evaluation and use of networks."""
