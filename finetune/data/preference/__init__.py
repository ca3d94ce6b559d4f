"""Preference data: prompts with a chosen and a rejected answer, or with one answer that is good or bad."""
