"""What examples/export.py writes for the C++ runtime (csrc/runtime)."""
