"""From trained weights to answers."""
