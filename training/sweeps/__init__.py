"""A grid of runs from one YAML file."""
