"""Family chatglm2."""
