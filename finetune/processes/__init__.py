"""Processes of one run: how they are laid out, how they talk, how they end together."""
