"""Text sources, tokenizer, packing and recall tasks: what models are trained on and asked."""
