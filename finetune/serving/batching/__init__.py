"""Continuous batching: requests join the rows that are being decoded between two steps, finished rows leave."""
