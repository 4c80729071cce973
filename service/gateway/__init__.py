"""The OpenAI-compatible proxy in front of the nodes."""
