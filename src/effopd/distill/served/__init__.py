"""A teacher behind an OpenAI-compatible vLLM server: client, checks, loss on its top k, trainer."""
