"""Several processes that work as one, each with a device of its own.

`processes.py`: those that torchrun started, and what they do together. `liveness.py`: one of them that dies, named to the others.
`tensor_parallel.py`: a decoder that they share.
"""
