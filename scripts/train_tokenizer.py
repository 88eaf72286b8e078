"""Trains the tokenizer of a config on its training text and saves it.

    python scripts/train_tokenizer.py CONFIG.yaml [key=value ...] --out DIR

DIR gets tokenizer.model (for data.tokenizer.model_file) and the files that `AutoTokenizer.from_pretrained` reads.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.errors import UserError, cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.tokenizer.vocab_size=4096")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_intermixed_args()
    from training.settings.config_file import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    from data.tokenizer import FILE, prepare_tokenizer

    tokenizer = prepare_tokenizer(settings)
    try:
        tokenizer.save(arguments.out)
    except OSError as error:
        raise UserError(f"--out {str(arguments.out)!r} can't be written: {error.strerror}") from error
    print(f"{arguments.out / FILE}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    sys.exit(cli(main))
