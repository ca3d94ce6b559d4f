"""Folders of models that see or hear beside reading: which part of them is a language model of a family here."""
