"""Real Japanese text that a Debian package carries, and a tokenizer of OpenCALM's kind that is trained on it.

The text is the Debian Reference (GPL-2+), as HTML: `apt-get install debian-reference-ja`, or without root
`apt-get download debian-reference-ja && dpkg -x debian-reference-ja_*.deb FOLDER`.
"""

from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


INSTALLED = Path("/usr/share/debian-reference")
# Read in order and never trained on.
HELD_OUT = "ch10.ja.html"
SHORTEST = 20


class Paragraphs(HTMLParser):
    """Collects what stands in `<p>`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def chapters(folder: Path | None = None) -> dict[str, list[str]]:
    """The paragraphs of every chapter, by file.

    Args:
        folder: Where the package was unpacked; the system's own when None.

    Raises:
        FileNotFoundError: when it is not there, with how to get it.
    """
    places = [INSTALLED] if folder is None else [folder, folder / "usr/share/debian-reference"]
    files = [path for place in places for path in sorted(place.glob("ch*.ja.html"))]
    if not files:
        raise FileNotFoundError(
            f"There is no Debian Reference in {places[0]}: apt-get install debian-reference-ja, or apt-get download "
            "debian-reference-ja && dpkg -x debian-reference-ja_*.deb FOLDER, and give --text FOLDER"
        )
    found = {}
    for path in files:
        parser = Paragraphs()
        parser.feed(path.read_text(encoding="utf-8"))
        paragraphs = (" ".join(text.split()) for text in parser.found)
        found[path.name] = [text for text in paragraphs if len(text) >= SHORTEST]
    return found


def split(folder: Path | None = None) -> tuple[str, str]:
    """Text to train on, and the chapter that is held out."""
    found = chapters(folder)
    held_out = "\n".join(found.pop(HELD_OUT))
    return "\n".join(text for paragraphs in found.values() for text in paragraphs), held_out


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text is made of its tokens, whatever it was trained on, and none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, bos_token=end)
