"""Family glm4."""
