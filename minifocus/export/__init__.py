"""A model as a package for csrc/runtime, which answers without Python."""
