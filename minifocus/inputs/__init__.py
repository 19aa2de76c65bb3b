"""What comes in: pictures, prompts and conversations, and what a model makes tiles and tokens of."""
