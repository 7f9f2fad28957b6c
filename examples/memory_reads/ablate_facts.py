"""Find what a memory adapter reads for one kind of fact, take it out, and see which recall goes.

    python examples/memory_reads/ablate_facts.py --adapter examples/name_recall/adapters/smollm2-135m-instruct

People tell facts of several kinds (cities, colours, names of pets), one a conversation, and ask for each of them in a
new one. Sparse autoencoders are trained on what the adapter's readers add to the residual stream at the replies, one
for each layer. A kind's latents are those that add more to the log probability of its answers than to that of any
other kind's: the strongest, until they hold `--share` of what all of them add. They are found with people to train on,
and ablated with others: people whose facts are drawn from the same values and phrasings, and people whose values and
phrasings never occurred there.

The control are random latents of the same layers that are no kind's, drawn until their lengths at the kind's answers
add up to those of the kind's own, some times anew. The latents that tell a kind best are ablated by
themselves too, together and one by one. What is scored is whether every token of the answer is the most likely one
after the beginning of the reply, and the probability of its tokens. Changes are made at the reply only: the question is
read as it is. Rising shares of a kind's latents are taken out too, with what the autoencoders do not explain left as it
is, beside as much of random latents and of random directions.

Writes the autoencoders, `results.json` and three figures into `--output`; parts that are there are not run again.
"""

import argparse
import contextlib
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from asking import Asked, answered, log_likelihoods, reads, recalled, remembered
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import set_seed

import senri_hf
from senri_hf.files import whole, write_json
from senri_hf.interpretability import (
    ActivationStream,
    Edit,
    SparseAutoencoder,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainingArguments,
    intervene,
    plots,
    reconstruction_metrics,
)
from senri_hf.interpretability.hooks import replaced_output


# Share of latents at which gradients are taken: with all of them the answer is sure, and no single one is missed.
SHARE = 0.5
# Latents of a kind that are shown; they are active at so much larger a share of its answers than of any other kind's.
PORTRAITS, TELLING = 3, 0.5
LATENTS, DOSES_FIGURE = "latents.safetensors", "doses.png"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# By split of the data, the people that are tested.
TESTED = {"train": "other people", "validation": "other people, unseen values and phrasings"}
# Shares of the activation of latents that are taken out, with the people that the first of `TESTED` names; beyond 1
# they take away what they added.
DOSES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
# Seeds of the people that are tested are so much larger than those of the people to train on.
TEST_SEEDS = 1000

Recall = dict[str, dict[str, float]]


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
    found = []
    for sae, added in zip(autoencoders, of_places, strict=True):
        latents = torch.zeros(*asked.labels.shape, sae.W_dec.shape[0])
        latents[asked.real] = sae.encode(added)
        found.append((latents * asked.predicting[..., None]).amax(1))
    return torch.stack(found, dim=1)


@torch.no_grad()
def profile(
    autoencoders: list[SparseAutoencoder],
    kinds: Sequence[str],
    questions: list[Asked],
    found: list[list[torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Where latents are active, by kind, where the tokens of its answers are predicted; each [kinds, layers, d_sae].

    Returns:
        `shares`: of the answers at which each is active; `sizes`: the mean length of what each adds to what is read.
    """
    active: list[list[torch.Tensor]] = [[] for _ in kinds]
    sizes, tokens = torch.zeros(len(kinds), len(autoencoders), autoencoders[0].W_dec.shape[0]), torch.zeros(len(kinds))
    for asked, of_places in zip(questions, found, strict=True):
        kind, predicting = kinds.index(asked.kind), asked.predicting[asked.real]
        active[kind].append(largest(autoencoders, asked, of_places) > 0)
        tokens[kind] += predicting.sum()
        for layer, (sae, added) in enumerate(zip(autoencoders, of_places, strict=True)):
            sizes[kind, layer] += sae.encode(added[predicting]).sum(0) / sae.activation_scale
    shares = torch.stack([torch.cat(of_kind).double().mean(0) for of_kind in active])
    return {"shares": shares, "sizes": sizes / tokens[:, None, None]}


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
        log_likelihoods(logits, asked.following[:, asked.columns]).sum().backward()
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


def beyond_others(values: torch.Tensor) -> torch.Tensor:
    """By how much the values [kinds, ...] of a kind are above the largest of the others', and above 0."""
    others = torch.stack([torch.cat([values[:kind], values[kind + 1 :]]).amax(0) for kind in range(len(values))])
    return values - others.clamp_min(0)


def latents_of_kinds(attributed: torch.Tensor, share: float) -> list[list[list[int]]]:
    """By kind and layer the latents that add more to its answers than to any other's: those that hold most of that.

    Args:
        attributed: [kinds, layers, d_sae], see `attributions`.
        share: Of what all such latents of a kind add beyond the other kinds, what those returned hold.
    """
    chosen = []
    for of_kind in beyond_others(attributed).clamp_min(0):
        ordered = of_kind.flatten().sort(descending=True)
        count = int((ordered.values.cumsum(0) < share * ordered.values.sum()).sum()) + 1
        kept = torch.zeros_like(of_kind, dtype=torch.bool).flatten()
        kept[ordered.indices[:count]] = True
        kept = kept.view_as(of_kind) & (of_kind > 0)
        chosen.append([of_layer.nonzero()[:, 0].tolist() for of_layer in kept])
    return chosen


def as_much_random(
    sizes: torch.Tensor, latents: list[list[int]], belonging: list[list[int]], seed: int
) -> list[list[int]]:
    """Random latents, drawn layer by layer until they add as much to what is read as `latents`, or there are no more.

    Args:
        sizes: What latents add at the answers of a kind, [layers, d_sae].
        belonging: By layer latents that are some kind's, of which none is drawn.
    """
    rng, drawn = random.Random(seed), []
    for of_layer, chosen, taken in zip(sizes, latents, belonging, strict=True):
        free = [latent for latent in (of_layer > 0).nonzero()[:, 0].tolist() if latent not in set(taken)]
        rng.shuffle(free)
        wanted = of_layer[chosen].sum()
        short = (of_layer[free].cumsum(0) < wanted).sum() if free else 0
        drawn.append(free[: int(short) + 1] if wanted > 0 else [])
    return drawn


@torch.no_grad()
def taken_out(
    autoencoders: list[SparseAutoencoder], latents: list[list[int]], questions: list[Asked], found: list[Any]
) -> dict[str, float]:
    """By kind the length of what latents add where answers are predicted, as a share of the length of what is read."""
    sums: dict[str, tuple[float, float]] = {}
    for asked, of_places in zip(questions, found, strict=True):
        predicting = asked.predicting[asked.real]
        gone, whole = sums.get(asked.kind, (0.0, 0.0))
        for sae, chosen, added in zip(autoencoders, latents, of_places, strict=True):
            left = sae.encode(added[predicting])[:, chosen] @ sae.W_dec[chosen] / sae.activation_scale
            gone += float(left.norm(dim=-1).sum())
            whole += float(added[predicting].norm(dim=-1).sum())
        sums[asked.kind] = gone, whole
    return {kind: gone / whole for kind, (gone, whole) in sums.items()}


def telling(profiled: dict[str, torch.Tensor], kind: int) -> list[tuple[int, int]]:
    """Layer and index of the latents that tell a kind best, of those that add to its answers most.

    They are active at far more of its answers than of any other kind's; where no latent is, those come first that are
    so most.
    """
    difference = beyond_others(profiled["shares"])[kind].flatten()
    added = beyond_others(profiled["attributed"])[kind].flatten()
    tells = difference >= min(TELLING, float(difference.topk(PORTRAITS).values[-1]))
    best = added.masked_fill(~tells, -torch.inf).topk(PORTRAITS).indices.tolist()
    return [divmod(index, profiled["shares"].shape[-1]) for index in best]


def by_layer(latents: Sequence[tuple[int, int]], layers: int) -> list[list[int]]:
    """Latents, named by layer and index, as a list for every layer."""
    return [[latent for at, latent in latents if at == layer] for layer in range(layers)]


@contextlib.contextmanager
def ablated(model: Any, autoencoders: list[SparseAutoencoder], latents: list[list[int]]) -> Iterator[None]:
    """Inside, what is read is what autoencoders make of it, with latents of every layer zero."""
    with contextlib.ExitStack() as stack:
        for sae, chosen in zip(autoencoders, latents, strict=True):
            stack.enter_context(intervene(model, None, sae, Edit(chosen, "ablate"), keep_error=False))
        yield


@contextlib.contextmanager
def weakened(
    model: Any, autoencoders: list[SparseAutoencoder], latents: list[list[int]], dose: float, direction: int | None
) -> Iterator[None]:
    """Inside, latents of every layer have lost a share of their activation, and the rest of what is read is as it is.

    Args:
        direction: Seed of random directions in which changes as large are made instead.
    """
    with contextlib.ExitStack() as stack:
        for sae, chosen in zip(autoencoders, latents, strict=True):
            edit = Edit(chosen, "scale", 1 - dose)
            stack.enter_context(intervene(model, None, sae, edit, direction_seed=direction))
        yield


@contextlib.contextmanager
def nothing_read(model: Any, places: Sequence[str]) -> Iterator[None]:
    """Inside, readers add nothing."""
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(replaced_output(model, place, torch.zeros_like))
        yield


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--adapter", type=Path, required=True, help="folder of an episodic memory adapter")
    add("--kinds", nargs="+", default=["city", "colour", "pet_name"], help="categories of senri_hf.tasks' values")
    add("--people", type=int, default=48, help="to train on")
    add("--test-people", type=int, default=16)
    add("--expansion-factor", type=float, default=2)
    add("--k", type=int, default=16)
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=256, help="activations of a step")
    add("--lr", type=float, default=2e-3)
    add(
        "--share", type=float, default=0.95, help="of what latents add to a kind's answers alone, that its latents hold"
    )
    add("--controls", type=int, default=3, help="random groups for every group of latents")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/memory-reads"))
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments as `results.json` has them, and the adapter's weights by their hash."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    weights = (args.adapter / ADAPTER_WEIGHTS).read_bytes()
    return settings | {"adapter_sha256": hashlib.sha256(weights).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    began = time.process_time()
    set_seed(args.seed)
    base, tokenizer = senri_hf.load_base(args.model, progress=False)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    places = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()
              if name.endswith("memory_adapter.senri_block.default")]  # fmt: skip
    if not places:
        raise SystemExit(f"{args.adapter} is no memory adapter with readers")
    parts, settings = args.output / "parts", settings_of(args)
    parts.mkdir(parents=True, exist_ok=True)
    if not (parts / "settings.json").exists():
        write_json(parts / "settings.json", settings)
    if json.loads((parts / "settings.json").read_text()) != settings:
        raise SystemExit(f"{args.output} has parts of a run with other settings: name another folder, or remove it")
    if not (parts / LATENTS).exists():
        find(model, tokenizer, places, args, parts)
        write_json(parts / "people.json", {"cpu_seconds": time.process_time() - began})
    for split in TESTED:
        if not (parts / f"{split}.json").exists():
            began = time.process_time()
            found = test(model, tokenizer, places, args, parts, split)
            write_json(parts / f"{split}.json", found | {"cpu_seconds": time.process_time() - began})
    every = {name: json.loads((parts / f"{name}.json").read_text()) for name in ("people", *TESTED)}
    profiled = load_file(parts / LATENTS)
    result: dict[str, Any] = {
        "settings": settings,
        "readers": places,
        "living": int((profiled["shares"] > 0).any(0).sum()),
        "chosen": [
            [len(of_layer) for of_layer in kind] for kind in latents_of_kinds(profiled["attributed"], args.share)
        ],
        "tested": {whose: every[split] for split, whose in TESTED.items()},
        "cpu_seconds": sum(part["cpu_seconds"] for part in every.values()),
    }
    write_json(args.output / "results.json", result)
    for split, whose in TESTED.items():
        draw([every[split]], args.kinds, args.output / f"recall-{split}.png", whose)
    draw_doses([every[next(iter(TESTED))]["doses"]], args.output / DOSES_FIGURE)
    print(f"{args.output}")


def find(model: Any, tokenizer: Any, places: Sequence[str], args: argparse.Namespace, parts: Path) -> None:
    """Train the autoencoders, and find what their latents are active at and add to."""
    people = remembered(model, tokenizer, args.kinds, args.people, "train", args.seed)
    found = reads(model, places, people)
    autoencoders = []
    for index, place in enumerate(places):
        autoencoders.append(train(place, torch.cat([of_places[index] for of_places in found]), args))
        autoencoders[-1].save_pretrained(args.output / place)
    profiled = profile(autoencoders, args.kinds, people, found)
    profiled["attributed"] = attributions(model, autoencoders, people, args.kinds)
    with whole(parts / LATENTS) as scratch:
        save_file(profiled, scratch)


def test(
    model: Any, tokenizer: Any, places: Sequence[str], args: argparse.Namespace, parts: Path, split: str
) -> dict[str, Any]:
    """Recall of people of a split with latents ablated, and how the autoencoders do on what is read for them."""
    profiled = load_file(parts / LATENTS)
    autoencoders = [SparseAutoencoder.from_pretrained(args.output / place).eval() for place in places]
    asked = remembered(model, tokenizer, args.kinds, args.test_people, split, TEST_SEEDS + args.seed)
    seen = reads(model, places, asked)
    quality = {}
    for index, (place, sae) in enumerate(zip(places, autoencoders, strict=True)):
        measured = reconstruction_metrics(sae, [of_places[index] for of_places in seen])
        quality[place] = {name: value for name, value in measured.items() if name != "density"}

    def without(latents: list[list[int]]) -> dict[str, Any]:
        with ablated(model, autoencoders, latents):
            recall = recalled(model, asked)
        return {
            "recall": recall,
            "latents": sum(map(len, latents)),
            "taken_out": taken_out(autoencoders, latents, asked, seen),
        }

    recall = {"the memory as it is": recalled(model, asked), "nothing": without([[] for _ in places])["recall"]}
    with nothing_read(model, places):
        recall["all that is read"] = recalled(model, asked)
    of_kinds = latents_of_kinds(profiled["attributed"], args.share)
    portrayed = [telling(profiled, kind) for kind in range(len(args.kinds))]
    belonging = [sorted({latent for group in [*of_kinds, *(by_layer(best, len(places)) for best in portrayed)]
                         for latent in group[layer]}) for layer in range(len(places))]  # fmt: skip
    kinds = {}
    for index, kind in enumerate(args.kinds):
        kinds[kind] = beside_random(
            without, of_kinds[index], portrayed[index], profiled["sizes"][index], belonging, args
        )
        print(f"{split}: {kind} ablated", flush=True)
    first = split == next(iter(TESTED))
    return {
        "recall": recall,
        "kinds": kinds,
        "doses": doses(model, autoencoders, asked, of_kinds, profiled["sizes"], belonging, args) if first else None,
        "autoencoders": quality,
        "portraits": portraits(autoencoders, args.kinds, portrayed, asked, seen),
    }


def beside_random(
    without: Callable[[list[list[int]]], dict[str, Any]],
    chosen: list[list[int]],
    portrayed: list[tuple[int, int]],
    sizes: torch.Tensor,
    belonging: list[list[int]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """What goes with a kind's latents, with those that tell it best, and with each of these, beside random ones."""
    best = by_layer(portrayed, len(sizes))
    seeds = [args.seed * args.controls + number for number in range(args.controls)]
    return {
        "latents": without(chosen),
        "random": [without(as_much_random(sizes, chosen, belonging, seed)) for seed in seeds],
        "portraits": without(best),
        "portraits_random": [without(as_much_random(sizes, best, belonging, seed)) for seed in seeds],
        "single": [without(by_layer([one], len(sizes))) for one in portrayed],
    }


def doses(
    model: Any,
    autoencoders: list[SparseAutoencoder],
    asked: list[Asked],
    of_kinds: list[list[list[int]]],
    sizes: torch.Tensor,
    belonging: list[list[int]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Recall with rising shares of latents taken out, by the kind they are of, as `plots.dose_responses` takes it.

    `values` is the recall of the latents' own kind, `others` that of the other kinds in the mean.
    """
    found: dict[str, Any] = {"doses": [0.0, *DOSES], "groups": {}}
    whole_recall = recalled(model, asked)
    for index, kind in enumerate(args.kinds):
        drawn = as_much_random(sizes[index], of_kinds[index], belonging, args.seed)
        mine = [of_kind for of_kind in asked if of_kind.kind == kind]
        several: dict[str, list[Recall]] = {}
        for name, latents, direction, questions in (
            ("own", of_kinds[index], None, asked),
            ("random", drawn, None, mine),
            ("direction", of_kinds[index], args.seed, mine),
        ):
            several[name] = [whole_recall]
            for dose in DOSES:
                with weakened(model, autoencoders, latents, dose, direction):
                    several[name].append(recalled(model, questions))
        own = {name: [recall[kind]["exact"] for recall in recalls] for name, recalls in several.items()}
        others = [other for other in args.kinds if other != kind]
        found["groups"][f"latents of a {named(kind)}"] = {
            "values": own["own"],
            "others": [sum(recall[other]["exact"] for other in others) / len(others) for recall in several["own"]],
            "controls": [own["random"]],
            "directions": [own["direction"]],
        }
        print(f"doses: {kind}", flush=True)
    return found


def portraits(
    autoencoders: list[SparseAutoencoder],
    kinds: Sequence[str],
    portrayed: list[list[tuple[int, int]]],
    asked: list[Asked],
    seen: list[list[torch.Tensor]],
) -> dict[str, list[dict[str, Any]]]:
    """When the latents that tell a kind best are active, and at which answers most."""
    shares = profile(autoencoders, kinds, asked, seen)["shares"]
    answers = [
        (question.answer, of_person)
        for of_kind, of_places in zip(asked, seen, strict=True)
        for question, of_person in zip(of_kind.questions, largest(autoencoders, of_kind, of_places), strict=True)
    ]
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind, best in zip(kinds, portrayed, strict=True):
        for layer, latent in best:
            strengths = sorted(((float(of[layer, latent]), answer) for answer, of in answers), reverse=True)
            most = [answer for strength, answer in strengths[:5] if strength > 0]
            active = shares[:, layer, latent].tolist()
            shown[kind].append({"layer": layer, "latent": latent, "active": active, "answers": most})
    return shown


def draw(found: Sequence[dict[str, Any]], kinds: Sequence[str], path: Path, whose: str) -> None:
    """Recall by what is ablated and what is asked for, as a figure.

    Args:
        found: What `test` found, of one run or of several, whose mean is drawn.
    """

    def mean(recalls: Sequence[Recall]) -> list[float]:
        return [sum(recall[kind]["exact"] for recall in recalls) / len(recalls) for kind in kinds]

    def group(kind: str, name: str) -> list[Recall]:
        groups = [of_seed["kinds"][kind][name] for of_seed in found]
        return [one["recall"] for group in groups for one in (group if isinstance(group, list) else [group])]

    rows = {"nothing": mean([of_seed["recall"]["nothing"] for of_seed in found])}
    rows |= {f"latents of a {named(kind)}": mean(group(kind, "latents")) for kind in kinds}
    rows |= {f"random, as much as of a {named(kind)}": mean(group(kind, "random")) for kind in kinds}
    rows["all that is read"] = mean([of_seed["recall"]["all that is read"] for of_seed in found])
    plots.matrix(
        list(rows.values()),
        list(rows),
        [named(kind) for kind in kinds],
        path,
        label="answers recalled",
        title=whose,
        x_label="asked for",
        y_label="ablated in what is read",
    )


def draw_doses(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall against the share of a kind's latents that is taken out, as a figure: the mean of several runs."""

    def mean(several: Sequence[Sequence[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*several, strict=True)]

    groups: dict[str, dict[str, Any]] = {}
    for name in found[0]["groups"]:
        of_runs = [run["groups"][name] for run in found]
        groups[name] = {
            "values": mean([group["values"] for group in of_runs]),
            "others": mean([group["others"] for group in of_runs]),
            "controls": [values for group in of_runs for values in group["controls"]],
            "directions": [values for group in of_runs for values in group["directions"]],
        }
        groups[name]["base"] = groups[name]["values"][0]
    plots.dose_responses(
        {"doses": found[0]["doses"], "groups": groups},
        path,
        y_label="answers of that kind recalled",
        x_label="share of their activation taken out",
        others="the other kinds' answers",
    )


def named(kind: str) -> str:
    """A kind in words."""
    return kind.replace("_", " ")


if __name__ == "__main__":
    main()
