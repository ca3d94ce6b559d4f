"""How a run ends early on request."""


class Interrupted(Exception):
    """A termination signal arrived; what the message names was saved before."""
