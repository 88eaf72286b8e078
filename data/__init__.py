"""Text sources, tokenizers, packing and recall tasks: what models are trained and tested on."""
