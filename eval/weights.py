"""Are the weight files of a checkpoint whole, and which ones are they? Told before anything is loaded."""

import hashlib
import json
from pathlib import Path

from model.errors import UserError


def check_weights(folder: Path) -> None:
    """Refuse a checkpoint folder whose safetensors files are missing or cut short."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {f.name for f in files})
        if missing:
            raise UserError(f"{folder}: {missing[0]} is named in {index.name} but missing; copy the checkpoint again")
    if not files and not list(folder.glob("*.bin")):
        raise UserError(f"{folder}: no model.safetensors beside config.json; copy the checkpoint again")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Compare the size that the header promises with the size of the file.

    A safetensors file is 8 bytes (header length, little endian), the JSON header, and the tensors' bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is cut short ({size:,} bytes, less than its header); copy or export it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{file} is damaged (its header is not JSON); copy or export it again") from error
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    promised = 8 + length + max(ends, default=0)
    if size != promised:
        raise UserError(f"{file} is cut short: {size:,} bytes of {promised:,}; copy or export it again")


def weights_sha256(folder: Path) -> str:
    """One hash over the weight files of a checkpoint, in order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
