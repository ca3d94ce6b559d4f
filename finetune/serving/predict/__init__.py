"""Answers of a model, dynamic or exported: for the lines of a file, on a terminal, or for the chat page."""
