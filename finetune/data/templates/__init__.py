"""From conversations to pieces of text with a loss flag."""
