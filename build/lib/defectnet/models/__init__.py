"""Networks and the baselines they have to beat."""
