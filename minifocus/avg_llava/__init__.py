"""AVG-LLaVA (Lan et al., 2024): one granularity for a whole picture, which a router chooses from picture and question.

scaler.py pools the picture, router.py chooses, sampler.py is the two behind the hook, router_file.py keeps what is learned.
Its training is in training/granularities.py (stage 3) and training/router.py (stage 4).
"""
