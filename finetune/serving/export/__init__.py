"""From a trained model to a folder that Paddle runs as a static graph."""
