"""Find what a memory adapter reads for one kind of fact, take it out, and see which recall goes.

    python examples/memory_reads/ablate_facts.py --adapter examples/name_recall/adapters/smollm2-135m-instruct

People tell facts of several kinds (cities, colours, names of pets), one a conversation, and ask for each of them in a
new one. Sparse autoencoders are trained on what the adapter's readers add to the residual stream at the replies, one
for each layer. A kind's latents are those that add more to the log probability of its answers than to that of any
other kind's. They are found with people to train on, and ablated with others: people whose facts are drawn from the
same values and phrasings, and people whose values and phrasings never occurred there. As many random latents that are
active about as often are the control. What is scored is whether every token of the answer is the most likely one after
the beginning of the reply, and the probability of its tokens. Changes are made at the reply only: the question is read
as it is.

Writes the autoencoders, `results.json` and two figures into `--output`; parts that are there are not run again.
"""

import argparse
import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
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
# Share of latents at which gradients are taken: with all of them the answer is sure, and no single one is missed.
SHARE = 0.5
# Latents of a kind that are shown.
PORTRAITS = 3
LATENTS = "latents.safetensors"
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


def train(place: str, activations: torch.Tensor, args: argparse.Namespace) -> SparseAutoencoder:
    """An autoencoder of what one reader adds."""
    config = senri_hf.SparseAutoencoderConfig(
        d_in=activations.shape[-1],
        expansion_factor=args.expansion_factor,
        variant="batchtopk",
        k=args.k,
        dead_after=5000,
        threshold_rate=0.05,  # training is short
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
    stream = ActivationStream(
        lambda start: [activations][start:],
        args.batch_size,
        max(len(activations), 2 * args.batch_size),
        reuse=args.steps,
        seed=args.seed,
    )
    trainer = SparseAutoencoderTrainer(SparseAutoencoder(config), settings, stream)
    trainer.train()
    sae: SparseAutoencoder = trainer.model.eval().cpu()
    return sae


@torch.no_grad()
def largest(autoencoders: list[SparseAutoencoder], asked: Asked, of_places: list[torch.Tensor]) -> torch.Tensor:
    """The largest activation of latents where the tokens of answers are predicted, [people, layers, d_sae].

    Args:
        of_places: What readers added at the replies, as `reads` has it.
    """
    predicted = torch.nn.functional.pad(asked.labels[:, 1:] != IGNORED, (0, 1))
    found = []
    for sae, added in zip(autoencoders, of_places, strict=True):
        latents = torch.zeros(*asked.labels.shape, sae.W_dec.shape[0])
        latents[asked.real] = sae.encode(added)
        found.append((latents * predicted[..., None]).amax(1))
    return torch.stack(found, dim=1)


def activity(
    autoencoders: list[SparseAutoencoder],
    kinds: Sequence[str],
    questions: list[Asked],
    found: list[list[torch.Tensor]],
) -> torch.Tensor:
    """The share of the answers of every kind at which each latent is active, [kinds, layers, d_sae]."""
    shares: list[list[torch.Tensor]] = [[] for _ in kinds]
    for asked, of_places in zip(questions, found, strict=True):
        shares[kinds.index(asked.kind)].append(largest(autoencoders, asked, of_places) > 0)
    return torch.stack([torch.cat(of_kind).double().mean(0) for of_kind in shares])


def attributions(
    model: Any, autoencoders: list[SparseAutoencoder], questions: list[Asked], kinds: Sequence[str]
) -> torch.Tensor:
    """What latents add to the log probability of the answers of every kind, [kinds, layers, d_sae]; means over answers.

    Gradient along a latent's direction times its activation, summed over tokens, in a pass in which all latents are
    scaled down together: one point of integrated gradients, as Marks et al. 2024, 2403.19647, take them.
    """
    total = torch.zeros(len(kinds), len(autoencoders), autoencoders[0].W_dec.shape[0])
    for asked in questions:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        with contextlib.ExitStack() as stack:
            for sae in autoencoders:
                stack.enter_context(replaced_output(model, sae.config.hook_name, scaled_down(sae, kept)))
            logits = answered(model, asked)
        log_likelihoods(logits, asked.labels).sum().backward()
        for layer, (sae, (latents, change)) in enumerate(zip(autoencoders, kept, strict=True)):
            effect = latents * (change.grad @ sae.W_dec.detach().T) / sae.activation_scale
            total[kinds.index(asked.kind), layer] += effect[asked.real].sum(0)
    answers = torch.tensor([sum(len(a.questions) for a in questions if a.kind == kind) for kind in kinds])
    return total / answers[:, None, None]


def scaled_down(sae: SparseAutoencoder, kept: list[Any]) -> Any:
    """What gives latents of a read `SHARE` of their activation; keeps them, and the change that gets a gradient."""

    def function(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = sae.encode(tensor)
            change = (SHARE - 1) * (latents @ sae.W_dec) / sae.activation_scale
        change.requires_grad_()
        kept.append((latents, change))
        return tensor.detach() + change

    return function


def latents_of(kind: int, attributed: torch.Tensor) -> list[list[int]]:
    """The latents of every layer that add more to a kind's answers than to those of any other.

    Args:
        attributed: [kinds, layers, d_sae], see `attributions`.
    """
    others = torch.cat([attributed[:kind], attributed[kind + 1 :]]).amax(0).clamp_min(0)
    of_kind = attributed[kind] > others
    return [of_layer.nonzero()[:, 0].tolist() for of_layer in of_kind]


def as_many_random(density: torch.Tensor, latents: list[int], seed: int) -> list[int]:
    """Other latents, as many and active about as often; fewer where no more of them are alive."""
    others = int((density > 0).sum()) - int((density[latents] > 0).sum())
    like = latents[:others]
    return control_latents(density, like, 1, seed=seed, exclude=latents)[0] if like else []


def portraits(
    kind: int, shares: torch.Tensor, tested: torch.Tensor, answers: list[tuple[str, torch.Tensor]]
) -> list[dict[str, Any]]:
    """The latents that tell a kind best from the others: when they are active for other people, at which answers most.

    Args:
        shares: Of the people that latents are chosen by, [kinds, layers, d_sae].
        tested: The same of others.
        answers: Of others, each with its `largest`.
    """
    others = torch.cat([shares[:kind], shares[kind + 1 :]]).amax(0)
    shown = []
    for index in (shares[kind] - others).flatten().topk(PORTRAITS).indices.tolist():
        layer, latent = divmod(index, shares.shape[-1])
        strengths = sorted(((float(of[layer, latent]), answer) for answer, of in answers), reverse=True)
        most = [answer for strength, answer in strengths[:5] if strength > 0]
        shown.append({"layer": layer, "latent": latent, "active": tested[:, layer, latent].tolist(), "answers": most})
    return shown


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
def ablated(model: Any, autoencoders: list[SparseAutoencoder], latents: list[list[int]]) -> Iterator[None]:
    """Inside, what is read is what autoencoders make of it, with latents of every layer zero."""
    with contextlib.ExitStack() as stack:
        for sae, chosen in zip(autoencoders, latents, strict=True):
            stack.enter_context(intervene(model, None, sae, Edit(chosen, "ablate"), keep_error=False))
        yield


@contextlib.contextmanager
def nothing_read(model: Any, places: Sequence[str]) -> Iterator[None]:
    """Inside, readers add nothing."""
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(replaced_output(model, place, torch.zeros_like))
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
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=256, help="activations of a step")
    add("--lr", type=float, default=2e-3)
    add("--controls", type=int, default=1, help="random groups for every kind")
    add(
        "--tested",
        nargs="*",
        choices=TESTED,
        default=list(TESTED),
        help="people to test; the others wait for another run",
    )
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
    parts = args.output / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del settings["tested"]
    if not (parts / "settings.json").exists():
        write(parts / "settings.json", settings)
    if json.loads((parts / "settings.json").read_text()) != settings:
        raise SystemExit(f"{args.output} has parts of a run with other settings: name another folder, or remove it")
    if not (parts / LATENTS).exists():
        find(model, tokenizer, places, args, parts)
        write(parts / "people.json", {"cpu_seconds": time.process_time() - began})
    for split in args.tested:
        if not (parts / f"{split}.json").exists():
            began = time.process_time()
            found = test(model, tokenizer, places, args, parts, split)
            write(parts / f"{split}.json", found | {"cpu_seconds": time.process_time() - began})
    names = ["people", *TESTED]
    if not all((parts / f"{name}.json").exists() for name in names):
        return
    every = {name: json.loads((parts / f"{name}.json").read_text()) for name in names}
    tensors = load_file(parts / LATENTS)
    result: dict[str, Any] = {
        "settings": settings,
        "readers": places,
        "attributed": tensors["attributed"].clamp_min(0).sum(-1).tolist(),
        "chosen": [
            [len(of_layer) for of_layer in latents_of(i, tensors["attributed"])] for i in range(len(args.kinds))
        ],
        "tested": {whose: every[split] for split, whose in TESTED.items()},
        "cpu_seconds": sum(part["cpu_seconds"] for part in every.values()),
    }
    write(args.output / "results.json", result)
    for split, whose in TESTED.items():
        plots.matrix(
            [[entry[kind]["exact"] for kind in args.kinds] for entry in every[split]["recall"].values()],
            list(every[split]["recall"]),
            [kind.replace("_", " ") for kind in args.kinds],
            args.output / f"recall-{split}.png",
            label=f"answers recalled, {whose}",
            x_label="asked for",
            y_label="ablated in what is read",
        )
    print(f"{args.output}")


def find(model: Any, tokenizer: Any, places: Sequence[str], args: argparse.Namespace, parts: Path) -> None:
    """Train the autoencoders, and find what their latents are active at and add to."""
    people = remembered(model, tokenizer, args.kinds, args.people, "train", args.seed)
    found = reads(model, places, people)
    autoencoders = []
    for index, place in enumerate(places):
        autoencoders.append(train(place, torch.cat([of_places[index] for of_places in found]), args))
        autoencoders[-1].save_pretrained(args.output / place)
    with torch.no_grad():
        density = [(sae.encode(torch.cat(of_place)) > 0).double().mean(0)
                   for sae, of_place in zip(autoencoders, zip(*found, strict=True), strict=True)]  # fmt: skip
    tensors = {
        "shares": activity(autoencoders, args.kinds, people, found),
        "attributed": attributions(model, autoencoders, people, args.kinds),
        "density": torch.stack(density),
    }
    save_file(tensors, parts / f"{LATENTS}.tmp")
    (parts / f"{LATENTS}.tmp").replace(parts / LATENTS)


def test(
    model: Any, tokenizer: Any, places: Sequence[str], args: argparse.Namespace, parts: Path, split: str
) -> dict[str, Any]:
    """Recall of people of a split with latents ablated, and how the autoencoders do on what is read for them."""
    tensors = load_file(parts / LATENTS)
    autoencoders = [SparseAutoencoder.from_pretrained(args.output / place).eval() for place in places]
    chosen = [latents_of(index, tensors["attributed"]) for index in range(len(args.kinds))]
    conditions: dict[str, list[list[int]]] = {"nothing": [[] for _ in places]}
    conditions |= {f"{kind} latents": latents for kind, latents in zip(args.kinds, chosen, strict=True)}
    for number, (kind, latents) in itertools.product(range(args.controls), zip(args.kinds, chosen, strict=True)):
        name = f"random, like {kind}" + (f" ({number + 1})" if args.controls > 1 else "")
        conditions[name] = [
            as_many_random(of_layer, of_kind, args.seed + number)
            for of_layer, of_kind in zip(tensors["density"], latents, strict=True)
        ]
    asked = remembered(model, tokenizer, args.kinds, args.test_people, split, args.seed + 1)
    seen = reads(model, places, asked)
    measured = {}
    for index, (place, sae) in enumerate(zip(places, autoencoders, strict=True)):
        quality = reconstruction_metrics(sae, [of_places[index] for of_places in seen])
        measured[place] = {name: value for name, value in quality.items() if name != "density"}
    shares = activity(autoencoders, args.kinds, asked, seen)
    answers = [
        (question.answer, of_person)
        for of_kind, of_places in zip(asked, seen, strict=True)
        for question, of_person in zip(of_kind.questions, largest(autoencoders, of_kind, of_places), strict=True)
    ]
    recall = {"the memory as it is": recalled(model, asked)}
    for name, latents in conditions.items():
        with ablated(model, autoencoders, latents):
            recall[name] = recalled(model, asked)
        shown = {kind: (round(of["exact"], 2), round(of["nats"], 2)) for kind, of in recall[name].items()}
        print(f"{name:28s}", shown, flush=True)
    with nothing_read(model, places):
        recall["all that is read"] = recalled(model, asked)
    portrayed = {kind: portraits(i, tensors["shares"], shares, answers) for i, kind in enumerate(args.kinds)}
    return {"recall": recall, "autoencoders": measured, "latents": portrayed}


def write(path: Path, found: Any) -> None:
    """Write JSON, under another name first."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(path)


if __name__ == "__main__":
    main()
