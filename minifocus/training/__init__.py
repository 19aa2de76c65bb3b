"""Training LLaVA with FocusLLaVA's samplers (paper §3.2, §3.3 and §4.1).

In the order in which a step goes: `examples.py` (conversations as tokens), `packed.py` (a batch of conversations through
the model, with tokens hidden by masks instead of removed), `objective.py` (what is minimised), `loop.py` (steps,
checkpoints, several processes), `curve.py` (the picture of a run).
"""
