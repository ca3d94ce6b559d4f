"""A process group for Paddle on CPU, over sockets."""
