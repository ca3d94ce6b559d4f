"""Draws by (seed, step, sample, place), so that no layout and no resume changes them."""
