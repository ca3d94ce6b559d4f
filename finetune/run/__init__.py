"""A training run put together from its arguments, in the order in which things happen."""
