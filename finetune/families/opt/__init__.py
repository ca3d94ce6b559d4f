"""Family opt."""
