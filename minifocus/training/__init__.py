"""Training LLaVA with FocusLLaVA's samplers (paper §3.2, §3.3 and §4.1).

Read them in the order of a step: `examples.py` turns conversations into tokens, `packed.py` sends a batch of them through the
model and hides tokens by masks instead of removing them, `objective.py` computes the loss, and `loop.py` takes the steps.
Around these: `presets.py` and `settings.py` (what a run is told), `parts.py`, `lora.py` and `optimizers.py` (what is trained,
and how fast), `memory.py`, `checkpoint.py`, `log.py`, `plot_log.py` and `model_digest.py`. `shard.py` and
`sharded_checkpoint.py` are for processes that each hold a share of the model, `adapter_file.py` for what LoRA leaves.
"""
