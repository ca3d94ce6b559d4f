"""Fine-tuning of generative language models on PaddlePaddle.

Importing this package is free: neither paddle nor paddlenlp is loaded until a
run has passed every check of its arguments.
"""

__version__ = "0.1.0"
