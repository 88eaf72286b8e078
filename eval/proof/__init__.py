"""The constructive proof: weights set by hand that carry a value over exactly R tokens."""
