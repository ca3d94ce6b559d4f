"""The training loop and what surrounds it: loss, evaluation, checkpoints, logs."""
