"""The decoder: what each layer may see, attention, rotary positions, ring cache, Hugging Face interop."""
