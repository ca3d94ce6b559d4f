"""Family chatglm4."""
