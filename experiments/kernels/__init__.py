"""The CUDA kernels, looked at from outside: on a GPU, through the compiler, and broken on purpose."""
