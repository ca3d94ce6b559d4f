"""Family baichuan2."""
