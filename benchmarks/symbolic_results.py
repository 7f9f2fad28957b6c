"""The page `docs/symbolic_results.md`, from what `symbolic.py` found."""

from pathlib import Path
from typing import Any


FIGURES = {
    "train": ("training.png", "attention.png"),
    "sae": ("training.png", "density.png", "cycle.png"),
    "edit": ("dose_response.png",),
    "variants": ("frontier.png",),
    "lorenz": ("training.png", "autocorrelation.png"),
    "memory": ("recall-train.png", "recall-validation.png"),
    "smollm2": ("density.png",),
}


def render(found: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = ["# Symbols, sparse autoencoders, interventions: results", ""]
    lines += [
        "Written by `python benchmarks/symbolic.py` from `symbolic.json`; the commands are those of the examples."
    ]
    lines += ["", *summary(found)]
    for part, title, section in (
        ("cyclic", "The cyclic sequence", cyclic_section),
        ("variants", "Variants of autoencoders", variants_section),
        ("lorenz", "The Lorenz system in three symbols", lorenz_section),
        ("language_model", "A layer of SmolLM2-135M, on real text", language_model_section),
        ("saelens", "The same autoencoder in SAELens", saelens_section),
        ("memory", "What a memory adapter reads", memory_section),
    ):
        lines += ["", f"## {title}", "", *(section(found[part]) if found.get(part) else ["Not run yet."])]
    return lines


def summary(found: dict[str, Any]) -> list[str]:
    """What was to be shown and what was measured, the worst of the seeds where there are several."""
    runs = list(found.get("cyclic", {}).values())
    if not runs:
        return []
    windows = [run["sae"]["windows"] for run in runs]
    flips, unseen = [run["edit"]["best_flip_rate"] for run in runs], [run["train"]["unseen"] for run in runs]
    returned = min(kind["returned"] for run in unseen for kind in run.values())
    forbidden = max(kind["forbidden_per_symbol"] for run in unseen for kind in run.values())
    rows = [
        ["loss above the Bayes floor", "0.001", f"{max(run['train']['above_floor'] for run in runs):.5f}"],
        ["phases with the right next symbol", "18 of 18", f"{min(run['train']['phases_right'] for run in runs)}"],
        ["back in the cycle from contexts that training never saw", "all", f"{returned:.1%}"],
        ["forbidden steps per symbol there", "0", f"{forbidden:.5f}"],
        ["explained variance", "0.998", f"{min(entry['explained_variance'] for entry in windows):.4f}"],
        ["latents active (L0)", "4.6", f"{max(entry['l0'] for entry in windows):.2f}"],
        ["dead latents", "5%", f"{max(entry['dead'] for entry in windows):.1%}"],
        ["phases that the best latent flips", "50%", f"{min(flips):.1%}"],
        ["phases that random latents flip, mean", "few", f"{max(r['edit']['random_latents_mean'] for r in runs):.1%}"],
    ]
    return [f"The cyclic sequence in short, the worst of {len(runs)} seeds:", "", *table(["", "aim", "measured"], rows)]


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def figures(*names: str) -> list[str]:
    shown = [(name, figure) for name in names for figure in FIGURES[name]]
    return ["", *(f"![{name}: {Path(figure).stem}](symbolic-{name}-{figure})" for name, figure in shown)]


def cyclic_section(runs: dict[str, Any]) -> list[str]:
    rows = []

    def row(name: str, keys: str, form: str = ".4g") -> None:
        cells = []
        for found in runs.values():
            for key in keys.split("/"):
                found = found[key]
            cells.append(format(found, form))
        rows.append([name, *cells])

    row("loss above the Bayes floor, nats per symbol", "train/above_floor", ".5f")
    row("phases with the right next symbol, of 18", "train/phases_right")
    first = next(iter(runs.values()))
    for kind in first["check"]["kinds"]:
        row(f"back in the cycle: {kind}", f"check/kinds/{kind}/returned", ".1%")
        row(f"forbidden steps per symbol: {kind}", f"check/kinds/{kind}/forbidden_per_symbol", ".5f")
    for where, name in (("windows", "the windows"), ("unseen", "unseen contexts")):
        row(f"autoencoder, {name}: explained variance", f"sae/{where}/explained_variance")
        row(f"autoencoder, {name}: L0", f"sae/{where}/l0")
        row(f"autoencoder, {name}: never active", f"sae/{where}/dead", ".1%")
        row(f"autoencoder, {name}: divergence recovered", f"sae/{where}/kl_recovered")
    strength = first["edit"]["settings"]["strength"]
    row(f"phases that the best latent flips at {strength} times its largest activation", "edit/best_flip_rate", ".1%")
    row("the same, unseen contexts with one wrong symbol", "edit/best_flip_rate_unseen", ".1%")
    row(f"random latents at {strength} times theirs: mean of 20", "edit/random_latents_mean", ".1%")
    row("random latents: the strongest of 20", "edit/random_latents_most", ".1%")
    row("random directions, changes as large as the best latent's: mean of 20", "edit/random_directions_mean", ".1%")
    row("all latents set to those of another phase: what follows that one is said", "edit/patch_followed", ".1%")
    lines = table(["", *(f"seed {seed}" for seed in runs)], rows)
    return [*lines, "", *controls([run["edit"] for run in runs.values()]), *figures("train", "sae", "edit")]


def controls(edits: list[dict[str, Any]]) -> list[str]:
    """What the random latents and directions say, in words."""
    rates = [[max(latent["ablated"], latent["clamped"]) for latent in edit["latents"]] for edit in edits]
    strong = ", ".join(str(sum(rate >= 0.5 for rate in of_seed)) for of_seed in rates)
    some = ", ".join(str(sum(rate > 0 for rate in of_seed)) for of_seed in rates)
    means = [edit["random_latents_mean"] for edit in edits]
    directions = [edit["random_directions_mean"] for edit in edits]
    strongest = max(edit["random_latents_most"] for edit in edits)
    return [
        f"What the controls say. Of {len(rates[0])} latents {strong} (by seed) flip at least half of the phases, "
        f"{some} flip any at all. Random latents are drawn from all but the three best, so that a draw can be one of "
        f"those that count as well: the strongest draw reaches {strongest:.1%} in one seed. A random latent flips "
        f"{min(means):.0%} to {max(means):.0%} of the phases in the mean, a random direction {min(directions):.0%} to "
        f"{max(directions):.0%}: which latent it is decides, not how large the change is. The best latents make the "
        "model say one symbol for as long as they are held (`rollouts` in `symbolic.json`); a third of the phases says "
        "that symbol anyway, so that two thirds is all that such a latent can flip.",
        "",
        "Figures of seed 0:",
    ]


def variants_section(found: dict[str, Any]) -> list[str]:
    settings = found["settings"]
    lines = [
        f"`python examples/cyclic_sequence/compare_variants.py`, the model of seed 0, {settings['steps']} steps.",
        "",
    ]
    rows = []
    for variant, entries in found["variants"].items():
        for entry in entries:
            name = next(iter(entry))
            cells = [f"{entry['l0']:.2f}", f"{entry['explained_variance']:.4f}", f"{entry['dead']:.0%}"]
            rows.append([variant, f"{name.replace('_', ' ')} {entry[name]}", *cells])
    lines += table(["variant", "", "L0", "explained variance", "dead"], rows)
    return [
        *lines,
        "",
        "Dead latents: the windows give 135 different activations, in little more than ten dimensions, which few "
        "active latents explain without the others. Fewer are dead where more may be active, and after a longer "
        "training: the autoencoder of the section above (topk, k 4) has none after eight times as many steps.",
        *figures("variants"),
    ]


def lorenz_section(found: dict[str, Any]) -> list[str]:
    settings, jumps = found["settings"], found["jumps"]
    lines = [
        "`python examples/lorenz_sequence/train_lorenz.py`; loss on trajectories that training never saw, "
        f"{settings['block']} symbols of context.",
        "",
    ]
    chains = [[f"Markov chain of order {order}", f"{loss:.4f}"] for order, loss in found["markov_loss"].items()]
    lines += table(["", "nats per symbol"], [["transformer", f"{found['loss']:.4f}"], *chains])
    lines += [
        "",
        "Furthest that the autocorrelation of what is generated is from that of the test trajectories, at lags to "
        f"{settings['lags']}, and how often it jumps from wing to wing without a passage:",
        "",
    ]
    rows = [["test trajectories", "", f"{jumps['test trajectories']:.4%}"]]
    for name, value in found["furthest"].items():
        rows.append([name, f"{value:.3f}", f"{jumps[name]:.4%}" if name in jumps else ""])
    return lines + table(["", "furthest", "jumps"], rows) + figures("lorenz")


def language_model_section(found: dict[str, Any]) -> list[str]:
    lines = [
        f"`{found['command']}`, {found['cpu_seconds'] / 60:.1f} minutes of processor time; measured on text that "
        "training never saw.",
        "",
    ]
    measured = found["measured"]
    rows = [[name.replace("_", " "), f"{value:,.4g}"] for name, value in measured.items() if name != "dead"]
    lines += table(["", ""], [*rows, ["dead latents", f"{measured['dead']:.2%}"]])
    lines += ["", "Where some latents are most active:", ""]
    rows = []
    for entry in found["contexts"]:
        shown = [f"{c['before']}**{c['token'].strip()}**{c['after']}" for c in entry["contexts"][:3]]
        text = " … ".join(" ".join(part.split()) for part in shown).replace("|", "\\|")
        rows.append([str(entry["latent"]), f"{entry['density']:.2%}", text])
    return lines + table(["latent", "active at", "contexts"], rows) + figures("smollm2")


def saelens_section(found: dict[str, Any]) -> list[str]:
    lines = [
        f"Exported, and read by sae-lens {found['version']} as `{found['architecture']}` of `{found['hook_name']}`; "
        f"{found['activations']:,} activations.",
        "",
    ]
    names = ("l0", "explained_variance")
    rows = [[n.replace("_", " "), f"{found[n]['ours']:.6g}", f"{found[n]['theirs']:.6g}"] for n in names]
    return [
        *lines,
        *table(["", "ours", "theirs"], rows),
        "",
        f"No latent is further apart than {found['furthest_latent']:.1e} (the largest is "
        f"{found['largest_latent']:.3g}), no reconstruction than {found['furthest_reconstruction']:.1e}.",
    ]


def memory_section(found: dict[str, Any]) -> list[str]:
    settings, readers = found["settings"], [place.split(".memory")[0] for place in found["readers"]]
    kinds = [kind.replace("_", " ") for kind in settings["kinds"]]
    lines = [
        f"`python examples/memory_reads/ablate_facts.py --adapter {settings['adapter']}`: autoencoders of what the "
        f"{len(readers)} readers add at replies to {settings['people']} people, tested with {settings['test_people']} "
        f"others of each sort; {found['cpu_seconds'] / 60:.1f} minutes of processor time.",
        "",
        "The latents that tell a kind best, by the people to train on, and at which answers of others they are active "
        f"(share of the answers about a {', a '.join(kinds)}):",
        "",
    ]
    rows = []
    tested = found["tested"]
    for kind in settings["kinds"]:
        for index, entry in enumerate(next(iter(tested.values()))["latents"][kind]):
            cells = [f"{kind.replace('_', ' ')}: {readers[entry['layer']]}, latent {entry['latent']}"]
            for of_whom in tested.values():
                seen = of_whom["latents"][kind][index]
                cells += [", ".join(f"{share:.0%}" for share in seen["active"]), ", ".join(seen["answers"])]
            rows.append(cells)
    columns = [cell for whose in tested for cell in (whose, "most at")]
    lines += table(["latent", *columns], rows)
    counts = ", ".join(f"{sum(of_layers)} of a {kind}" for kind, of_layers in zip(kinds, found["chosen"], strict=True))
    lines += [
        "",
        "Ablated are all latents that add more to the log probability of a kind's answers than to that of any other "
        f"kind's (gradient times activation): {counts}. What is read then is what the autoencoders make of it without "
        "these latents. Answers of which every token is the most likely one, and nats per token of the answer:",
    ]
    for whose, of_whom in tested.items():
        rows = []
        for name, entry in of_whom["recall"].items():
            rows.append([name, *(f"{of['exact']:.0%} · {of['nats']:.2f}" for of in entry.values())])
        lines += ["", f"{whose.capitalize()}:", "", *table(["ablated", *kinds], rows)]
    lines += ["", *fallen(settings["kinds"], {whose: of_whom["recall"] for whose, of_whom in tested.items()})]
    lines += ["", "The autoencoders, on what is read for people that they were not trained with:", ""]
    rows = []
    for place, reader in zip(found["readers"], readers, strict=True):
        row = [f"`{reader}`"]
        for entry in (of_whom["autoencoders"][place] for of_whom in tested.values()):
            row += [f"{entry['explained_variance']:.3f}", f"{entry['l0']:.1f}", f"{entry['dead']:.0%}"]
        rows.append(row)
    measures = [f"{name}, {whose}" for whose in tested for name in ("explained variance", "L0", "dead")]
    return lines + table(["reader", *measures], rows) + figures("memory")


def fallen(kinds: list[str], recalls: dict[str, dict[str, Any]]) -> list[str]:
    """How far recall of a kind falls with its own latents ablated, with those of others, and with random ones."""
    rows = []
    for whose, recall in recalls.items():
        for name, form in (("a kind's latents", "{} latents"), ("as many random latents", "random, like {}")):
            cells = [f"{name}, {whose}"]
            for same in (True, False):
                pairs = [(a, b) for a in kinds for b in kinds if (a == b) == same]
                changes = [(recall["nothing"][b], recall[form.format(a)][b]) for a, b in pairs]
                lost = sum(before["exact"] - after["exact"] for before, after in changes) / len(changes)
                nats = sum(after["nats"] - before["nats"] for before, after in changes) / len(changes)
                cells.append(f"{100 * lost:.0f} points, {nats:+.2f} nats")
            rows.append(cells)
    return [
        "In the mean over kinds:",
        "",
        *table(["ablated", "recall lost of that kind", "of the others"], rows),
        "",
        "A part of the recall goes, not all of it: what an answer needs is also in latents that several kinds share. "
        "With values that the autoencoders never saw the latents still fire for their kind, but less of what is read "
        "is explained, and the ablation is hardly selective: recall of other kinds falls too. Most latents that are "
        "ever active belong to one of the kinds, so those drawn at random are mostly other kinds', whose recall they "
        "take. One seed, and few people: a point of recall is not sure.",
    ]
