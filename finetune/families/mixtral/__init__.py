"""Family mixtral."""
