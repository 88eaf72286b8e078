"""What windows cost a pretrained model, and what training brought back: `python -m eval.receipt`."""
