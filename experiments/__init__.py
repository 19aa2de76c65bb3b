"""What is measured, and how: every figure of the README and of docs/ comes from a program here, run from the repository's root.

accuracy            the embedded model's answers, with and without samplers; scales_by_content: where they look
compare             all methods at equal budgets: accuracy, tokens, FLOPs, time, memory
operators           the operators beside their references
end_to_end          prefill, decoding, loading and memory beside transformers
paper.reproduce     the paper's tables and figures in miniature
kernels.*           the CUDA kernels: on a GPU (gpu_check), as the compiler sees them (ptxas), broken on purpose (mutate)
miniature.make      everything in weights/tiny, from nothing

Each is run as `python -m experiments.NAME`; records of what was measured are in results/.
"""
