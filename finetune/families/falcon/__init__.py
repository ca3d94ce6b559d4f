"""Family falcon."""
