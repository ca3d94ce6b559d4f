"""Model families: one record each, and what loads, tokenizes and rehearses them."""
