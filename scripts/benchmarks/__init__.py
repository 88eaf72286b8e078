"""The benchmarks of `scripts/bench.py`: timing is shared; attention, training and decoding have a file each."""

TRAINING_PEERS = {  # name: attention implementation of transformers, whether the layers are compiled
    "transformers sdpa": ("sdpa", False),
    "transformers sdpa, layers compiled": ("sdpa", True),
    "transformers eager": ("eager", False),
    "transformers eager, layers compiled": ("eager", True),
    "transformers flex": ("flex_attention", False),  # the last two run on a GPU only
    "transformers flash": ("flash_attention_2", False),
}
