"""Linear layers whose weights are held in 4 or 8 bits."""
