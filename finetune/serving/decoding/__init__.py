"""Running an exported folder: the static graph, its settings, and nothing of PaddleNLP."""
