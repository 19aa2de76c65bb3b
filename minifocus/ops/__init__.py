"""The samplers' operators. `reference.py` says in plain PyTorch what each does, `checks.py` what it demands of its arguments,
`backend.py` how the compiled ones of csrc/ are found, traced and differentiated."""

from .backend import BACKENDS, SCHEMAS, gather_tokens, importance, region_pool, region_route, select_top_p

__all__ = ["BACKENDS", "SCHEMAS", "gather_tokens", "importance", "region_pool", "region_route", "select_top_p"]
