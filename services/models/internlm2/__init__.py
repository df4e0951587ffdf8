"""InternLM2 checkpoints in the Llama layout and back, without the Python code that they bring."""
