"""A model's folder in Hugging Face's layout: its config, its weights, and how a saved one takes the place of another."""
