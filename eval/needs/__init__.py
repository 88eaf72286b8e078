"""Which window do these documents need? `python -m eval.needs` measures it with a model and prices the patterns."""
