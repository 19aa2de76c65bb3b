"""From a loaded model to a package that a C++ program answers with: see docs/embedding.md."""
