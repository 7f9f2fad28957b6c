"""A long life of memory without training, and what it costs.

    python benchmarks/training_free_life.py --model smollm2-135m-instruct

People tell five facts in a conversation each; then conversations follow, each some prose of a book, and along the way
the facts are asked (nothing of that is remembered), a few tokens are decoded and bytes are counted. With `--cost` only
the cost is measured: ending a conversation, and decoding from memory beside a plain cache of the same length. Times are
processor time of one thread, so that other work on the machine counts little.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training_free import Reader, sentence_ends, text_of
from training_free_grid import LIFE
from training_free_page import write_page
from transformers import DynamicCache

import senri_hf
from senri_hf.files import write_json
from senri_hf.tasks import recall_episodes, score_reply
from senri_hf.tasks.text import TEXT_SOURCES, ordinary_text
from senri_hf.training import tell


ASKED_AT = (0, 1, 3, 10, 30, 100, 300, 1000)
PROSE_TOKENS = 24
NEW_TOKENS = 12
ROUNDS = 5


def prose(tokenizer: Any, conversations: int) -> torch.Tensor:
    """Ids [conversations, PROSE_TOKENS], no text twice."""
    paragraphs = [text for source in TEXT_SOURCES[:4] for text in ordinary_text(source)]
    ids = tokenizer(" ".join(paragraphs), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: conversations * PROSE_TOKENS]).view(conversations, PROSE_TOKENS)


def seconds_of(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median processor seconds of every run, one of each per round, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if index:
                found[name].append(time.process_time() - start)
    return {name: median(seconds) for name, seconds in found.items()}


@torch.no_grad()
def per_token(model: Any, cache: Any, before: int) -> float:
    """Milliseconds to decode a token, past the first, which reads the prompt.

    Args:
        before: Tokens that the cache holds as context.
    """
    ids, total = torch.full((1, before + 8), 11), 0.0
    for count, sign in ((1, -1), (1 + NEW_TOKENS, 1)):
        start = time.process_time()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache(),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
        )
        total += sign * (time.process_time() - start)
    return total / NEW_TOKENS * 1000


@torch.no_grad()
def life(reader: Reader, slots: int, people: int, conversations: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Recall of the first conversations, bytes and decoding speed, against how many conversations followed."""
    model, tokenizer = reader.model, reader.tokenizer
    episodes = recall_episodes(people, split="validation", facts=5, questions=5, seed=31)
    texts = [[text_of(tokenizer, e, q, 0, "memory") for q in e.questions] for e in episodes]
    values = [[question.answer for question in episode.questions] for episode in episodes]
    questions = [question for episode in episodes for question in episode.questions]
    memory = senri_hf.MemoryCache.for_model(model, slots=slots)
    tell(model, tokenizer, [episode.told for episode in episodes], memory)
    stream = prose(tokenizer, conversations)
    found: dict[str, Any] = {"conversations": [], "recall": [], "bytes": [], "decode": []}
    found["what"] = (
        f"{people} people, five facts each in the first five conversations, then conversations of {PROSE_TOKENS} "
        f"tokens of prose; {slots} slots"
    )
    for past in range(conversations + 1):
        if past:
            model(input_ids=stream[past - 1].expand(people, -1), past_key_values=memory, logits_to_keep=1)
            memory.clear_context()
        if past in ASKED_AT or past == conversations:
            replies = [reply for row in reader.answer(texts, values, memory) for reply in row]
            right = [score_reply(reply, question) for reply, question in zip(replies, questions, strict=True)]
            alone = memory.select_rows([0])
            found["conversations"].append(past)
            found["recall"].append(sum(right) / len(right))
            found["bytes"].append(memory.nbytes / people)
            found["decode"].append(median(per_token(model, alone.snapshot, 0) for _ in range(3)))
            report(found)


@torch.no_grad()
def cost(reader: Reader, slots: int) -> dict[str, float]:
    """What ending a conversation takes, and decoding from memory beside a plain cache that is as long."""
    model, tokenizer = reader.model, reader.tokenizer
    text = prose(tokenizer, 128).flatten()
    full = senri_hf.MemoryCache.for_model(model, slots=slots, keep_share=1.0, min_surprise=0.0)
    model(input_ids=text[None, : slots + 64], past_key_values=full, logits_to_keep=1)
    full.clear_context()
    context = DynamicCache(config=model.config)
    model(input_ids=text[None, :slots], past_key_values=context, logits_to_keep=1)
    length = context.get_seq_length()

    def plain() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(context.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    said = full.snapshot()
    model(input_ids=text[None, -1000:], past_key_values=said, logits_to_keep=1)
    reading = seconds_of(
        {
            "end": lambda: said.snapshot().clear_context(),
            "read": lambda: model(input_ids=text[None, -1000:], past_key_values=full.snapshot(), logits_to_keep=1),
        }
    )
    pairs = [(per_token(model, full.snapshot, 0), per_token(model, plain, length)) for _ in range(ROUNDS + 1)][1:]
    ours, theirs = (median(times) for times in zip(*pairs, strict=True))
    return {
        "slots, all full": full.attention_memory.slots.size,
        "ending a conversation, ms per 1,000 tokens": reading["end"] * 1000,
        "reading it before, ms per 1,000 tokens": reading["read"] * 1000,
        "decoding a token from memory, ms": ours,
        "decoding a token from a plain cache of the same length, ms": theirs,
        "difference, median of pairs, %": median((a / b - 1) * 100 for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--slots", type=int, default=512)
    add("--people", type=int, default=4)
    add("--conversations", type=int, default=LIFE)
    add("--cost", action="store_true", help="measure the cost only")
    add("--output", type=Path, default=Path("docs/training_free.json"))
    args = parser.parse_args()
    model, tokenizer = senri_hf.load_base(args.model, dtype=args.dtype)
    reader = Reader(model.eval(), tokenizer, sentence_ends(tokenizer))

    def report(key: str, found: dict[str, Any]) -> None:
        results = json.loads(args.output.read_text()) if args.output.exists() else {}
        results.setdefault(key, {})[args.model] = found
        write_json(args.output, results)
        write_page(results, args.output.parent)
        print(json.dumps(found), flush=True)

    if args.cost:
        report("cost", cost(reader, args.slots))
    else:
        life(reader, args.slots, args.people, args.conversations, lambda found: report("life", found))


if __name__ == "__main__":
    main()
