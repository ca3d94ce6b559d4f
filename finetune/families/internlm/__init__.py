"""Family internlm."""
