"""Data that are read while the model trains, with a position that can be saved."""
