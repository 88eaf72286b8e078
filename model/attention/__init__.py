"""Attention under a layer's visibility: one public function, one plan, a file for each form."""
