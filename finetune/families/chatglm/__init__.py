"""Family chatglm."""
