"""A real model is told something, the conversation is thrown away, and another process answers from the saved memory.

make demo
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import senri_hf
from senri_hf.commands.chat import find_adapter, load_model


TOLD = (
    "Hello! My name is Priya. Please remember my name.",
    "I live in Lisbon.",
    "My dog is called Biscuit.",
)
ASKED = ("What is my name?", "Which city do I live in?", "What is my dog called?")


def tell(model_name: str, adapter: str | None, folder: Path) -> None:
    """Have one conversation per fact, throw each away, and save what is remembered."""
    model, tokenizer = load_model(model_name, find_adapter(model_name, adapter))
    chat = senri_hf.MemoryChat(model, tokenizer)
    for text in TOLD:
        reply, info = chat.say(text, max_new_tokens=24)
        print(f"  you   > {text}\n  model > {reply.strip()}\n          ({info.tokens_written} tokens written)")
        chat.new_conversation()
    chat.memory.save_pretrained(folder)
    print(f"\nThe conversations are gone. The memory is a file: {chat.memory.nbytes:,} bytes.")


def ask(model_name: str, adapter: str | None, folder: Path) -> None:
    """Answer from the saved memory, and without it."""
    model, tokenizer = load_model(model_name, find_adapter(model_name, adapter))
    for title, memory in (
        ("with the memory", senri_hf.MemoryCache.from_pretrained(folder, model=model)),
        ("without it", senri_hf.MemoryCache.for_model(model)),
    ):
        print(f"\nA new process, {title}:")
        chat = senri_hf.MemoryChat(model, tokenizer, memory)
        for question in ASKED:
            reply, _ = chat.say(question, update_memory=False, max_new_tokens=24)
            print(f"  you   > {question}\n  model > {reply.strip()}")
            chat.new_conversation()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", help="folder of a trained adapter; the shipped one without it")
    parser.add_argument("--ask", type=Path, metavar="MEMORY", help="only ask, from this saved memory")
    args = parser.parse_args()
    if args.ask:
        return ask(args.model, args.adapter, args.ask)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        print("A new memory:")
        tell(args.model, args.adapter, Path(folder) / "memory")
        command = [sys.executable, __file__, "--model", args.model, "--ask", str(Path(folder) / "memory")]
        subprocess.run(command + (["--adapter", args.adapter] if args.adapter else []), check=True)
    print(f"\n{time.perf_counter() - start:.0f} seconds.")
    return None


if __name__ == "__main__":
    main()
