"""Family xverse."""
