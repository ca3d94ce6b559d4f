"""Preference alignment: losses over pairs and single answers, their reference model, metrics and evaluation."""
