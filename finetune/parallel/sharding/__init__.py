"""The data axis: replicas, and what they share out."""
