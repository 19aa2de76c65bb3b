"""LLaVA folders of real parts, a trained vision tower and a trained language model, for the tests: how they are made (`make`)."""
