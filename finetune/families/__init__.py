"""Model families: one folder for all that only one family has."""
