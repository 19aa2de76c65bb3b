"""LLaVA folders of real parts, a trained vision tower and a trained language model: how they are made (`make`), and what is
measured on them (`figures`)."""
