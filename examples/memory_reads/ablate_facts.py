"""Find what a memory adapter reads for one kind of fact, take it out, and see which recall goes.

    python examples/memory_reads/ablate_facts.py --adapter examples/name_recall/adapters/smollm2-135m-instruct

People tell facts of several kinds (cities, colours, names of pets), one a conversation, and ask for each of them in a
new one. Sparse autoencoders are trained on what the adapter's readers add to the residual stream there, one for each
layer. A kind's latents are those that add most to the log probability of its answers beyond what they add to those of
any other kind. They are found with people to train on, and ablated with others: people whose facts are drawn from the
same values and phrasings, and people whose values and phrasings never occurred there. Random latents that are active
about as often are the control. What is scored is whether every token of the answer is the most likely one after the
beginning of the reply, and the probability of its tokens.

Writes `results.json` and two figures into `--output`.
"""

import argparse
import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

import senri_hf
from senri_hf.interpretability import (
    ActivationStream,
    Edit,
    SparseAutoencoder,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainingArguments,
    captured,
    control_latents,
    intervene,
    plots,
    reconstruction_metrics,
)
from senri_hf.interpretability.hooks import replaced_output
from senri_hf.tasks import Question, recall_episodes
from senri_hf.tasks.recall import load_data
from senri_hf.training import tell


ROWS = 16
IGNORED = -100
# Shares of latents at which gradients are taken.
SHARES = (0.3, 0.7)
# By split of the data, the people that are tested.
TESTED = {"train": "other people", "validation": "other people, unseen values and phrasings"}


@dataclass
class Asked:
    """Questions about one kind of fact, one for each person, read up to the last token before the reply.

    Attributes:
        cache: What the person told, and the question.
        inputs: The last token of the question and the reply, as arguments of the model, [people, T].
        labels: The answer's tokens where they stand, -100 elsewhere, [people, T].
    """

    kind: str
    questions: list[Question]
    cache: senri_hf.MemoryCache
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """[people, T] which columns are no padding."""
        return self.inputs["attention_mask"][:, -self.labels.shape[1] :].bool()


def tokens_of(tokenizer: Any, question: Question) -> tuple[list[int], list[int], int]:
    """A question and its reply as ids, those of the answer in it (-100 elsewhere), and where the reply begins."""
    messages = [{"role": m["role"], "content": m["content"]} for m in question.conversation]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    reply = text.rindex(question.reply)
    start = reply + question.reply.lower().rindex(question.answer.lower())
    encoded = tokenizer(text[: reply + len(question.reply)], add_special_tokens=False, return_offsets_mapping=True)
    inside = [last > start and first < start + len(question.answer) for first, last in encoded["offset_mapping"]]
    labels = [i if here else IGNORED for i, here in zip(encoded["input_ids"], inside, strict=True)]
    return (
        encoded["input_ids"],
        labels,
        next(i for i, (_, last) in enumerate(encoded["offset_mapping"]) if last > reply),
    )


def told_and_asked(
    kinds: Sequence[str], people: int, split: str, seed: int
) -> Iterator[tuple[list[list[Any]], list[list[Question]]]]:
    """What people tell and ask, `ROWS` at a time: for every person conversations, and for every kind questions."""
    relations = {kind: [r["key"] for r in load_data()["relations"] if r["category"] == kind and r["split"] == "train"]
                 for kind in kinds}  # fmt: skip
    rng = random.Random(f"{split} {seed}")
    for start in range(0, people, ROWS):
        told: list[list[Any]] = []
        questions: list[list[Question]] = [[] for _ in kinds]
        for _ in range(min(ROWS, people - start)):
            one = [recall_episodes(1, split=split, relations=rng.choice(relations[kind]), seed=rng.randrange(10**9))[0]
                   for kind in kinds]  # fmt: skip
            conversations = [conversation for episode in one for conversation in episode.told]
            told.append(rng.sample(conversations, len(conversations)))
            for of_kind, episode in zip(questions, one, strict=True):
                of_kind.append(episode.questions[0])
        yield told, questions


@torch.no_grad()
def remembered(model: Any, tokenizer: Any, kinds: Sequence[str], people: int, split: str, seed: int) -> list[Asked]:
    """Questions to people who told a fact of every kind."""
    found = []
    for told, questions in told_and_asked(kinds, people, split, seed):
        memory = tell(model, tokenizer, told)
        found += [asked_after(model, tokenizer, memory, *pair) for pair in zip(kinds, questions, strict=True)]
        print(f"{split}: {len(found) // len(kinds) * ROWS} people told and asked", flush=True)
    return found


def asked_after(
    model: Any, tokenizer: Any, memory: senri_hf.MemoryCache, kind: str, questions: list[Question]
) -> Asked:
    """Questions, read with a memory."""
    rows = [tokens_of(tokenizer, question) for question in questions]
    before = max(start for _, _, start in rows) - 1
    after = max(len(ids) - start for ids, _, start in rows) + 1
    pad, length = tokenizer.pad_token_id, before + after
    ids, labels, mask = torch.full((len(rows), length), pad), torch.full((len(rows), length), IGNORED), None
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (row_ids, row_labels, start) in enumerate(rows):
        place = slice(before + 1 - start, before + 1 - start + len(row_ids))
        ids[row, place], labels[row, place], mask[row, place] = torch.tensor(row_ids), torch.tensor(row_labels), 1
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = memory.snapshot()
    prompt = {
        "input_ids": ids[:, :before],
        "attention_mask": mask[:, :before],
        "position_ids": position_ids[:, :before],
    }
    model(**prompt, past_key_values=cache, logits_to_keep=1)
    inputs = {"input_ids": ids[:, before:], "attention_mask": mask, "position_ids": position_ids[:, before:]}
    return Asked(kind, questions, cache, inputs, labels[:, before:])


def answered(model: Any, asked: Asked) -> torch.Tensor:
    """Logits [people, T, V] of what follows the question's last token and every token of the reply."""
    logits: torch.Tensor = model(**asked.inputs, past_key_values=asked.cache.snapshot()).logits
    return logits


@torch.no_grad()
def reads(model: Any, places: Sequence[str], questions: list[Asked]) -> list[list[torch.Tensor]]:
    """What readers at places add at replies, [tokens, d_in] for each of them: by questions."""
    found = []
    for asked in questions:
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(captured(model, place)) for place in places]
            answered(model, asked)
        found.append([output[0][asked.real].float() for output in outputs])
    return found


def log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p of the labelled tokens, [people, T - 1], 0 elsewhere."""
    wanted = labels[:, 1:]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return chosen * (wanted != IGNORED)


def train(place: str, activations: list[torch.Tensor], args: argparse.Namespace) -> tuple[SparseAutoencoder, Any]:
    """An autoencoder of one reader, and how well it explains reads; a tenth of them is kept from training for that."""
    kept, seen = activations[::10], [a for index, a in enumerate(activations) if index % 10]
    config = senri_hf.SparseAutoencoderConfig(
        d_in=seen[0].shape[-1],
        expansion_factor=args.expansion_factor,
        variant="batchtopk",
        k=args.k,
        dead_after=20_000,
        model_name=args.model,
        hook_name=place,
    )
    settings = SparseAutoencoderTrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        resample_every=max(1, args.steps // 10),
        logging_steps=args.steps,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=args.seed,
    )
    total = sum(map(len, seen))
    stream = ActivationStream(
        lambda start: seen[start:], args.batch_size, max(total, 2 * args.batch_size), reuse=10_000, seed=args.seed
    )
    trainer = SparseAutoencoderTrainer(SparseAutoencoder(config), settings, stream)
    trainer.train()
    sae = trainer.model.eval().cpu()
    return sae, reconstruction_metrics(sae, kept)


def attributions(
    model: Any, autoencoders: list[SparseAutoencoder], questions: list[Asked], kinds: Sequence[str]
) -> torch.Tensor:
    """What latents add to the log probability of the answers of every kind, [kinds, layers, d_sae]; means over answers.

    Gradient along a latent's direction times its activation, summed over tokens, and averaged over passes in which all
    latents are scaled down together (integrated gradients, as Marks et al. 2024, 2403.19647, take them): where all of
    them are there the answer is sure, and no single one of them is missed.
    """
    total = torch.zeros(len(kinds), len(autoencoders), autoencoders[0].W_dec.shape[0])
    for asked in questions:
        for share in SHARES:
            kept: list[tuple[torch.Tensor, torch.Tensor]] = []
            with contextlib.ExitStack() as stack:
                for sae in autoencoders:
                    stack.enter_context(replaced_output(model, sae.config.hook_name, scaled_down(sae, share, kept)))
                logits = answered(model, asked)
            log_likelihoods(logits, asked.labels).sum().backward()
            for layer, (sae, (latents, change)) in enumerate(zip(autoencoders, kept, strict=True)):
                effect = latents * (change.grad @ sae.W_dec.detach().T) / sae.activation_scale
                total[kinds.index(asked.kind), layer] += effect[asked.real].sum(0) / len(SHARES)
    answers = torch.tensor([sum(len(a.questions) for a in questions if a.kind == kind) for kind in kinds])
    return total / answers[:, None, None]


def scaled_down(sae: SparseAutoencoder, share: float, kept: list[Any]) -> Any:
    """What gives latents of a read a share of their activation; keeps them, and the change that gets a gradient."""

    def function(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = sae.encode(tensor)
            change = (share - 1) * (latents @ sae.W_dec) / sae.activation_scale
        change.requires_grad_()
        kept.append((latents, change))
        return tensor.detach() + change

    return function


def latents_of(kind: int, attributions: torch.Tensor, count: int) -> list[list[int]]:
    """The latents of all layers that add most to answers of a kind beyond what they add to those of any other kind.

    Args:
        attributions: [kinds, layers, d_sae]
        count: Of all layers together.

    Returns:
        Latents of every layer.
    """
    others = torch.cat([attributions[:kind], attributions[kind + 1 :]]).amax(0).clamp_min(0)
    best = (attributions[kind] - others).flatten().topk(count).indices
    layers, width = attributions.shape[1:]
    return [(best[best // width == layer] % width).tolist() for layer in range(layers)]


@torch.no_grad()
def recalled(model: Any, questions: list[Asked]) -> dict[str, dict[str, float]]:
    """By kind: `exact`, the share of answers whose every token is the most likely one; `nats`, -log p of a token."""
    found: dict[str, dict[str, list[float]]] = {}
    for asked in questions:
        logits = answered(model, asked)
        part = asked.labels[:, 1:] != IGNORED
        right = (logits[:, :-1].argmax(-1) == asked.labels[:, 1:]) | ~part
        entry = found.setdefault(asked.kind, {"exact": [], "nats": []})
        entry["exact"] += right.all(-1).double().tolist()
        entry["nats"] += (-log_likelihoods(logits, asked.labels).sum(-1) / part.sum(-1)).tolist()
    return {kind: {name: sum(v) / len(v) for name, v in entry.items()} for kind, entry in found.items()}


@contextlib.contextmanager
def ablated(
    model: Any, autoencoders: list[SparseAutoencoder], latents: list[list[int]], keep_error: bool = True
) -> Iterator[None]:
    """Inside, latents of every layer's read are zero."""
    with contextlib.ExitStack() as stack:
        for sae, chosen in zip(autoencoders, latents, strict=True):
            stack.enter_context(intervene(model, None, sae, Edit(chosen, "ablate"), keep_error=keep_error))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--adapter", required=True, help="folder of an episodic memory adapter")
    add("--kinds", nargs="+", default=["city", "colour", "pet_name"], help="categories of senri_hf.tasks' values")
    add("--people", type=int, default=48, help="to train on")
    add("--test-people", type=int, default=16)
    add("--expansion-factor", type=float, default=2)
    add("--k", type=int, default=16)
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=512, help="activations of a step")
    add("--lr", type=float, default=2e-3)
    add("--latents", type=int, default=32, help="latents of a kind, for every layer there is")
    add("--controls", type=int, default=1, help="random groups for every kind")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/memory-reads"))
    args = parser.parse_args()

    began = time.process_time()
    set_seed(args.seed)
    base, tokenizer = senri_hf.load_base(args.model, progress=False)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    places = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()
              if name.endswith("memory_adapter.senri_block.default")]  # fmt: skip
    if not places:
        raise SystemExit(f"{args.adapter} is no memory adapter with readers")

    people = remembered(model, tokenizer, args.kinds, args.people, "train", args.seed)
    found = reads(model, places, people)
    autoencoders, measured, densities = [], {}, []
    for index, place in enumerate(places):
        of_place = [outputs[index] for outputs in found]
        sae, quality = train(place, of_place, args)
        with torch.no_grad():
            densities.append((sae.encode(torch.cat(of_place)) > 0).double().mean(0))
        autoencoders.append(sae)
        measured[place] = {name: value for name, value in quality.items() if name != "density"}
        sae.save_pretrained(args.output / place)
        print(place, measured[place], flush=True)

    attributed, count = attributions(model, autoencoders, people), args.latents * len(places)
    chosen = {kind: latents_of(index, attributed, count) for index, kind in enumerate(args.kinds)}
    every = [sorted({latent for groups in chosen.values() for latent in groups[layer]}) for layer in range(len(places))]
    conditions: dict[str, list[list[int]]] = {"nothing": [[] for _ in places]}
    conditions |= {f"{kind} latents": chosen[kind] for kind in args.kinds}
    for number in range(args.controls):
        for kind in args.kinds:
            conditions[f"random, like {kind} ({number})" if args.controls > 1 else f"random, like {kind}"] = [
                control_latents(density, latents, 1, seed=args.seed + number, exclude=excluded)[0]
                for density, latents, excluded in zip(densities, chosen[kind], every, strict=True)
            ]
    recall: dict[str, dict[str, Any]] = {}
    for split, whose in TESTED.items():
        test = remembered(model, tokenizer, args.kinds, args.test_people, split, args.seed + 1)
        recall[whose] = {}
        for name, latents in conditions.items():
            with ablated(model, autoencoders, latents):
                recall[whose][name] = recalled(model, test)
            shown = {k: (round(v["exact"], 2), round(v["nats"], 2)) for k, v in recall[whose][name].items()}
            print(f"{name:28s}", shown, flush=True)
        with torch.no_grad(), model.disable_adapter():
            recall[whose]["no memory"] = recalled(model, test)
    result: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "autoencoders": measured,
        "recall": recall,
        "latents": {name: dict(zip(places, latents, strict=True)) for name, latents in conditions.items()},
        "cpu_seconds": time.process_time() - began,
    }
    (args.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    for split, whose in TESTED.items():
        plots.matrix(
            [[entry[kind]["exact"] for kind in args.kinds] for entry in recall[whose].values()],
            list(recall[whose]),
            [kind.replace("_", " ") for kind in args.kinds],
            args.output / f"recall-{split}.png",
            label=f"answers recalled, {whose}",
            x_label="asked for",
            y_label="ablated in what is read",
        )
    print(f"{args.output}")


if __name__ == "__main__":
    main()
