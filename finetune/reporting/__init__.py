"""What a run shows and writes down: progress, log, curve, results."""
