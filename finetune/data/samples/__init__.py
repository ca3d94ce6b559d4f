"""From pieces of text to ids and labels."""
