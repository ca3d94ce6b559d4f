"""Text to ids and back, in PaddleNLP's way and in a faster one with the same ids."""
