"""Notices ranks that died or hang, and ends the others with the reason."""
