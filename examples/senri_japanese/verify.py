"""Check a Senri model from end to end: tokenizer, creation, forward, generation, memory that moves to another process.

    python examples/senri_japanese/verify.py --text FOLDER                       # with a tokenizer trained here
    python examples/senri_japanese/verify.py --tokenizer cyberagent/open-calm-small
    python examples/senri_japanese/verify.py --checkpoint checkpoints/senri_japanese/senri-delta-0

Without a checkpoint the model is new, of the default sizes. It ends with an error where something does not hold.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from japanese import split, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from senri_hf import MemoryCache, SenriConfig, SenriForCausalLM, load_open_calm_tokenizer, pythia_layers, senri_layers


TEXTS = (
    "吾輩は猫である。名前はまだ無い。",
    "人工知能（AI）の API を GPU で動かす。",
    "The quick brown fox jumps over the lazy dog.",
    "絵文字も大丈夫 😀🎉👨‍👩‍👧 です。",
    "ｶﾀｶﾅ・ひらがな・漢字・１２３・①②③",
)


def check(what: str, holds: bool, said: str = "") -> None:
    """Print one line; end the program where it does not hold."""
    print(f"{'ok    ' if holds else 'FAILED'} {what}{f': {said}' if said else ''}")
    if not holds:
        sys.exit(1)


def check_tokenizer(tokenizer: Any) -> None:
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        known = tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        check("tokens say the text, none is unknown", back == text and known, f"{len(ids):3} tokens  {text}")


@torch.no_grad()
def answer(model: Any, tokenizer: Any, memory: MemoryCache) -> str:
    inputs = tokenizer("名前は", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, past_key_values=memory, max_new_tokens=12, do_sample=False)
    return str(out[0].tolist())


@torch.no_grad()
def check_model(model: Any, tokenizer: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    check("a model", count > 0, f"{count:,} parameters, layers {model.config.layer_types}")
    inputs = tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    logits = model(**inputs, use_cache=False).logits
    check("forward", bool(logits.isfinite().all()), f"logits {list(logits.shape)}")
    memory, empty = MemoryCache.for_model(model), MemoryCache.for_model(model)
    with memory.read_only():
        model(**inputs, past_key_values=memory)
    check("read_only() writes nothing", not memory.state_dict())
    memory.clear_context()
    model(**inputs, past_key_values=memory, update_memory=True)
    memory.clear_context()
    check("memory is written", memory.nbytes > 0, f"{memory.nbytes:,} bytes")
    size = memory.nbytes
    told, untold = (model(**inputs, past_key_values=m.snapshot()).logits for m in (memory, empty))
    check("memory changes what is said", not torch.equal(told, untold))
    model(torch.randint(0, 100, (1, 3000)), past_key_values=memory.snapshot())
    check("memory does not grow", memory.nbytes == size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        memory.save_pretrained(f"{folder}/memory")
        here = answer(model, tokenizer, memory)
        command = [sys.executable, __file__, "--continue-from", folder]
        there = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    check("another process goes on with the same text", here == there, here)
    memory.reset_memory()
    check("reset", not memory.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="folder that debian-reference-ja was unpacked into")
    parser.add_argument("--tokenizer", help="OpenCALM's, from the Hub or a folder, instead of one trained here")
    parser.add_argument("--checkpoint", help="a model that pretrain.py saved")
    parser.add_argument("--continue-from", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.continue_from:
        model = AutoModelForCausalLM.from_pretrained(f"{args.continue_from}/model").eval()
        tokenizer = AutoTokenizer.from_pretrained(f"{args.continue_from}/model")
        print(answer(model, tokenizer, MemoryCache.from_pretrained(f"{args.continue_from}/memory", model=model)))
        return
    if args.checkpoint:
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    else:
        if args.tokenizer:
            tokenizer = load_open_calm_tokenizer(args.tokenizer)
        else:
            tokenizer = train_tokenizer(split(args.text)[0].splitlines(), 4096)
        set_seed(0)
        layers = senri_layers(1) + pythia_layers(5)
        model = SenriForCausalLM(SenriConfig(layers=layers, vocab_size=len(tokenizer))).eval()
    check_tokenizer(tokenizer)
    check_model(model, tokenizer)


if __name__ == "__main__":
    main()
