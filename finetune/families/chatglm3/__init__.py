"""Family chatglm3."""
