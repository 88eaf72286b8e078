"""Which window do these documents need? `python -m eval.needs` measures it and computes what windows cost."""
