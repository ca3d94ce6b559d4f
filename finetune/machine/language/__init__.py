"""The language in which commands speak to a person."""
