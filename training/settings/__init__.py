"""Settings of a run: the schema, reading YAML, checks, and the sentence for each mistake."""
