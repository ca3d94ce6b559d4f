"""Models and data sets of public hubs, by name."""
