"""A real model is told something, the conversation is thrown away, and another process answers from the saved memory.

First without any training: the model reads what surprised it through its own attention. Then with a trained adapter.

    make demo
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import senri_hf
from senri_hf.commands.chat import find_adapter, load_model


TOLD = (
    "Hello! My name is Priya. Please remember my name.",
    "I live in Lisbon.",
    "My dog is called Biscuit.",
)
ASKED = ("What is my name?", "Which city do I live in?", "What is my dog called?")


# A small base model declines to answer such questions, whatever it knows: its reply is begun for it.
BEGUN = ("Your name is", "You live in", "Your dog is called")


def tell_untrained(model_name: str, folder: Path) -> None:
    """Have a plain model read one conversation per fact, and save what surprised it."""
    model, tokenizer = load_model(model_name, None)
    memory = senri_hf.MemoryCache.for_model(model, tokenizer=tokenizer)
    for text in TOLD:
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": "Thank you for telling me."}]
        inputs = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            model(**inputs, past_key_values=memory)
        memory.clear_context()
        print(f"  you   > {text}")
    memory.save_pretrained(folder)
    words = sorted(memory.remembered(), key=lambda part: -part.surprise)[:8]
    print(f"\nThe conversations are gone. {memory.nbytes:,} bytes hold what surprised it most, such as")
    print("  " + ", ".join(repr(part.text.strip()[-40:]) for part in words))


def ask_untrained(model_name: str, folder: Path) -> None:
    """Ask the plain model with that memory, and without it."""
    model, tokenizer = load_model(model_name, None)
    for title, memory in (
        ("with the memory", senri_hf.MemoryCache.from_pretrained(folder, model=model)),
        ("without it", senri_hf.MemoryCache.for_model(model)),
    ):
        print(f"\nA new process, {title}:")
        for question, begun in zip(ASKED, BEGUN, strict=True):
            asked = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) + begun
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            output = model.generate(**inputs, past_key_values=memory.snapshot(), max_new_tokens=8, do_sample=False)
            reply = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            print(f"  you   > {question}\n  model > {begun}…{reply.splitlines()[0] if reply else ''}")


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
    parser.add_argument("--untrained", action="store_true", help="only without training")
    args = parser.parse_args()
    if args.ask:
        return ask_untrained(args.model, args.ask) if args.untrained else ask(args.model, args.adapter, args.ask)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", args.model, "--ask", str(Path(folder) / "memory")]
        print("A model as it was downloaded, which remembers some of it without training:")
        tell_untrained(args.model, Path(folder) / "memory")
        subprocess.run([*command, "--untrained"], check=True)
        if not args.untrained:
            print("\n\nThe same model with a trained memory adapter, which answers by itself:")
            tell(args.model, args.adapter, Path(folder) / "memory")
            subprocess.run(command + (["--adapter", args.adapter] if args.adapter else []), check=True)
    print(f"\n{time.perf_counter() - start:.0f} seconds.")
    return None


if __name__ == "__main__":
    main()
