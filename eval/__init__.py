"""Measuring a model: how far it recalls, how far it can see, and how well it reads."""
