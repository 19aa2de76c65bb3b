"""A model's inputs: pictures → tiles, and prompts and conversations → tokens."""
