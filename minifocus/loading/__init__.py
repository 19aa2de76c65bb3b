"""A model's folder in Hugging Face's layout: reading its config and weights, and replacing one saved model by another."""
