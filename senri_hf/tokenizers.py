"""Tokenizers of models that this package starts from."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


OPEN_CALM = "cyberagent/open-calm-small"


def load_open_calm_tokenizer(name_or_path: str | Path = OPEN_CALM, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of OpenCALM: byte-level BPE for Japanese, 52,000 tokens, none of them unknown.

    Padding is its end of text, as it has no token of its own for that.

    Args:
        name_or_path: A name on the Hub, or a folder that holds such a tokenizer.
        kwargs: As for `AutoTokenizer.from_pretrained`: `revision`, `token`, `cache_dir`, …

    Raises:
        OSError: when there is none there; offline, with what to do.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(
            f"There is no tokenizer at {str(name_or_path)!r}, neither here nor on the Hub ({error}). Without a "
            "network, give the folder of a copy that save_pretrained wrote: load_open_calm_tokenizer(folder); "
            "examples/senri_japanese trains a tokenizer of the same kind"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
