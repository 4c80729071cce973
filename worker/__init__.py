"""The train worker, and what runs inside a vLLM node."""
