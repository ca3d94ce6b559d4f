"""Family internlm2."""
