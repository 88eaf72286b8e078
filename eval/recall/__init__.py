"""Recall of a planted value by distance: `python -m eval.recall MODEL`."""
