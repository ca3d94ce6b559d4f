"""Settings: what there is, which values are right, and what they do."""
