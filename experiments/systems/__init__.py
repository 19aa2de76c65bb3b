"""The tables of the other systems' papers in miniature: LLaVA-STF's and AVG-LLaVA's."""
