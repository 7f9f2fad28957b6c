"""What of a conversation to keep, for a memory without training: settings held against each other.

    python benchmarks/training_free_settings.py --model smollm2-135m-instruct

Values and phrasings are those of training, so that nothing is chosen on what recall is reported on. Five
facts are told and all asked; a value counts as recalled when each of its tokens is the likeliest, after the reply up to
it. Beside that stands how much the values surprise where they would be right, which tells settings apart with fewer
episodes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_free import Reader, left_padded, sentence_ends, shared, text_of
from training_free_page import write_page

import senri_hf
from senri_hf.files import write_json
from senri_hf.tasks import Episode, recall_episodes
from senri_hf.training import tell


SEED = 777
PLAIN = {"sharpness": 1.0}
EACH: list[dict[str, Any]] = [
    {},
    {"slots": 64},
    {"slots": 64, **PLAIN},
    {"slots": 64, "sharpness": 1.4},
    {"slots": 64, "read_gain": 0.0},
    {"sharpness": 1.4},
    PLAIN,
    {"policy": "all"},
    {"policy": "all", "sharpness": 1.4},
    {"span": 0},
    {"span": 3},
    {"min_surprise": 0.0},
    {"keep_share": 0.3},
]
ONE: list[dict[str, Any]] = [{"policy": "all"}, PLAIN, {}]


def name_of(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "defaults"


def together(batch: list[Episode]) -> list[Any]:
    """Every person's facts told in one conversation."""
    return [[[message for conversation in episode.told for message in conversation]] for episode in batch]


def apart(batch: list[Episode]) -> list[Any]:
    return [episode.told for episode in batch]


TOLD: dict[str, Callable[[list[Episode]], list[Any]]] = {"one conversation": together, "a conversation each": apart}


@torch.no_grad()
def values_read(reader: Reader, batch: list[Episode], memory: Any) -> tuple[list[bool], list[float]]:
    """Whether every value is the likeliest where it should stand, and its -log p in nats."""
    tokenizer, rows, values = reader.tokenizer, [], []
    for episode in batch:
        for question in episode.questions:
            text = text_of(tokenizer, episode, question, 0, "memory")
            rest = question.reply[question.reply.index(text.rsplit("\n", 1)[-1]) + len(text.rsplit("\n", 1)[-1]) :]
            start = rest.casefold().index(question.answer.casefold())
            value = tokenizer(rest[: start + len(question.answer)], add_special_tokens=False)["input_ids"]
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"] + value)
            values.append(torch.tensor(value))
    common, each = shared(rows), len(batch[0].questions)
    cache = memory.snapshot()
    reader.model(
        input_ids=torch.tensor([rows[0][:common]]).expand(len(batch), -1), past_key_values=cache, logits_to_keep=1
    )
    cache = cache.fork(each)
    ids, mask = left_padded([row[common:] for row in rows], tokenizer.pad_token_id)
    mask = torch.cat([mask.new_ones(len(rows), common), mask], dim=1)
    logits = reader.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1)[:, common:],
        past_key_values=cache,
        logits_to_keep=max(map(len, values)) + 1,
    ).logits.float()
    right, nats = [], []
    for row, value in zip(logits, values, strict=True):
        said = row[-len(value) - 1 : -1]
        right.append(bool((said.argmax(-1) == value).all()))
        nats.append(torch.nn.functional.cross_entropy(said, value, reduction="sum").item())
    return right, nats


def measure(reader: Reader, told: str, settings: dict[str, Any], count: int) -> dict[str, Any]:
    episodes = recall_episodes(count, split="train", facts=5, questions=5, seed=SEED)
    right: list[bool] = []
    nats: list[float] = []
    tokens = 0.0
    for start in range(0, count, 25):
        batch = episodes[start : start + 25]
        memory = senri_hf.MemoryCache.for_model(reader.model, **{"slots": 512, **settings})
        tell(reader.model, reader.tokenizer, TOLD[told](batch), memory)
        tokens += memory.attention_memory.slots.live.sum().item()
        found = values_read(reader, batch, memory)
        right += found[0]
        nats += found[1]
    return {
        "told": told,
        "settings": name_of(settings),
        "recall": sum(right) / len(right),
        "answers": len(right),
        "nats": sum(nats) / len(nats),
        "tokens": tokens / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--episodes", type=int, default=6)
    add("--output", type=Path, default=Path("docs/training_free.json"))
    args = parser.parse_args()
    model, tokenizer = senri_hf.load_base(args.model, dtype=args.dtype)
    reader = Reader(model.eval(), tokenizer, sentence_ends(tokenizer))
    planned = [("a conversation each", settings) for settings in EACH]
    planned += [("one conversation", settings) for settings in ONE]
    for told, settings in planned:
        results = json.loads(args.output.read_text()) if args.output.exists() else {}
        rows = results.setdefault("sweep", {}).setdefault(args.model, [])
        wanted = (told, name_of(settings), 5 * args.episodes)
        if any((row["told"], row["settings"], row["answers"]) == wanted for row in rows):
            continue
        rows.append(measure(reader, told, settings, args.episodes))
        write_json(args.output, results)
        print(json.dumps(rows[-1]), flush=True)
    write_page(json.loads(args.output.read_text()), args.output.parent)


if __name__ == "__main__":
    main()
