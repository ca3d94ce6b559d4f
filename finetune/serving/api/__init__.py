"""A server with OpenAI's interface: chat completions, completions, models."""
