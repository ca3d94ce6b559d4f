"""Family baichuan."""
