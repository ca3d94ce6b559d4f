"""Family phi3."""
