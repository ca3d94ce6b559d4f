"""Family granite."""
