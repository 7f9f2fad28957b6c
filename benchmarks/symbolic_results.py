"""The page `docs/symbolic_results.md`, from what `symbolic.py` found."""

import re
import statistics
from pathlib import Path
from typing import Any


FIGURES = {
    "train": ("training.png", "attention.png"),
    "sae": ("training.png", "density.png", "cycle.png"),
    "edit": ("dose_response.png",),
    "variants": ("frontier.png",),
    "lorenz": ("training.png", "autocorrelation.png"),
    "memory": ("recall-train.png", "recall-validation.png", "doses.png"),
    "smollm2": ("density.png", "doses.png"),
}


# The runs that a seed of the cyclic sequence has, those of another module, and those of another transformer.
CYCLIC, OF_MODULE, OF_TRANSFORMER = {"train", "sae", "edit", "check"}, {"sae", "edit"}, {"train", "sae"}
CONTROLS = ("other_latents", "directions")
# The most wrong symbols in a context that the transformer is trained on.
TRAINED_WRONG = 3
SEEN_KINDS = [f"{wrong} wrong" for wrong in range(1, TRAINED_WRONG + 1)]
UNSEEN_KIND = f"{TRAINED_WRONG + 1} wrong"
# What autoencoders of the cyclic sequence are measured on.
MEASURED = {"unseen": "unseen contexts", "new": "contexts new to it alone", "windows": "the windows, trained on"}
# What would be read as markup in a table.
MARKUP = re.compile(r"([\\`*_<>|\[\]])")


def render(found: dict[str, Any]) -> list[str]:
    """The lines of the page; of the cyclic sequence those seeds are shown of which every example was run."""
    cyclic = {seed: of_seed for seed, of_seed in found.get("cyclic", {}).items() if of_seed.keys() >= CYCLIC}
    found = {**found, "cyclic": cyclic}
    first: dict[str, Any] = next(iter(cyclic.values()), {})
    for part, runs in (("modules", OF_MODULE), ("transformers", OF_TRANSFORMER)):
        others = found.get(part, {})
        found[part] = {name: of for name, of in others.items() if first and of.keys() >= runs}
    if not first:
        found.pop("sizes", None)
    lines = [
        "# Symbols, sparse autoencoders, interventions: results",
        "",
        "Written by `python benchmarks/symbolic.py` from `symbolic.json`; the commands are those of the examples.",
    ]
    if cyclic:
        lines += ["", *summary(list(cyclic.values()))]
    for part, title, section in (
        ("cyclic", "The cyclic sequence", cyclic_section),
        ("modules", "Other modules", lambda modules: modules_section(first, modules)),
        ("sizes", "Autoencoders of other sizes", lambda sizes: sizes_section(first, sizes)),
        ("transformers", "Other transformers", lambda others: transformers_section(first, others)),
        ("variants", "Variants of autoencoders", variants_section),
        ("lorenz", "The Lorenz system in three symbols", lorenz_section),
        ("language_model", "A layer of SmolLM2-135M, on real text", language_model_section),
        ("saelens", "The same autoencoder in SAELens", saelens_section),
        ("memory", "What a memory adapter reads", memory_section),
    ):
        lines += ["", f"## {title}", "", *(section(found[part]) if found.get(part) else ["Not run yet."])]
    return lines


def summary(runs: list[dict[str, Any]]) -> list[str]:
    """What was to be shown and what was measured, the worst of the seeds."""
    rows: list[list[str]] = []

    def row(name: str, aim: str, form: str, values: list[float], *, least: float | None = None,
            most: float | None = None) -> None:  # fmt: skip
        worst = min(values) if least is not None else max(values)
        met = worst >= least if least is not None else worst <= most if most is not None else None
        rows.append([name, aim, format(worst, form), "" if met is None else "yes" if met else "no"])

    def unseen(kinds: Any, name: str) -> list[float]:
        return [entry[name] for run in runs for kind, entry in run["check"]["unseen"].items() if kinds(kind)]

    train = [run["train"] for run in runs]
    phases, strength = train[0]["phases"], runs[0]["edit"]["settings"]["strength"]
    row("loss above the Bayes floor, nats per symbol", "0.001", ".5f", [t["above_floor"] for t in train], most=1e-3)
    row("phases with the right next symbol", f"{phases} of {phases}", "", [t["phases_right"] for t in train],
        least=phases)  # fmt: skip
    for what, kinds in (
        (f"1 to {TRAINED_WRONG} wrong symbols", lambda kind: kind in SEEN_KINDS),
        (f"{TRAINED_WRONG + 1} wrong symbols, as none in training has", lambda kind: kind == UNSEEN_KIND),
        ("random symbols, or a single one all along", lambda kind: not kind.endswith(" wrong")),
    ):
        row(f"back in the exact cycle from unseen contexts: {what}", "all", ".1%", unseen(kinds, "returned"), least=1)
        row(f"forbidden steps per symbol said there: {what}", "", ".5f", unseen(kinds, "forbidden_per_symbol"))
    sae = [run["sae"] for run in runs]
    place = sae[0]["settings"]["module"]
    row(f"explained variance of `{place}`, unseen contexts", "0.998", ".4f",
        [s["unseen"]["explained_variance"] for s in sae], least=0.998)  # fmt: skip
    row("the same: the windows (all are trained on)", "0.998", ".4f",
        [s["windows"]["explained_variance"] for s in sae], least=0.998)  # fmt: skip
    row("the same: contexts new to the autoencoder alone", "0.998", ".4f",
        [s["new"]["explained_variance"] for s in sae], least=0.998)  # fmt: skip
    row("latents active (L0), unseen contexts", "4.6", ".2f", [s["unseen"]["l0"] for s in sae], most=4.6)
    row(f"dead latents, of {sae[0]['latents']} for a width of {sae[0]['width']}: active neither at what they were "
        "trained on nor at these contexts", "5%", ".1%",
        [s["dead"] for s in sae], most=0.05)  # fmt: skip
    row("latents active at none of these contexts, dead ones among them", "", ".1%",
        [s["unmeasured"] for s in sae])  # fmt: skip
    for dose in (1.0, strength):
        for sort, name in (("windows", "phases"), ("unseen", "unseen contexts")):
            of_dose = [best_at(run["edit"], str(dose))[sort] for run in runs]
            row(f"{name} that the best latent flips, dose {dose:g}", "50%", ".1%", [d["flips"] for d in of_dose],
                least=0.5)  # fmt: skip
            row("the same: another latent, mean", "", ".1%", [d["other_latents"]["mean"] for d in of_dose])
            row("the same: a random direction, mean", "", ".1%", [d["directions"]["mean"] for d in of_dose])
    return [
        f"The cyclic sequence in short, the worst of {len(runs)} seeds. Unseen contexts have wrong symbols; neither "
        "the transformer nor the autoencoder was trained on them.",
        "",
        *table(["", "aim", "measured", "met"], rows),
    ]


def best_at(edit: dict[str, Any], dose: str) -> dict[str, Any]:
    """What was found of the latent that flips most phases at a dose."""
    found = [entry["doses"][dose] for entry in edit["best"]]
    return max(found, key=lambda of_latent: of_latent["windows"]["flips"])


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def figures(*names: str) -> list[str]:
    shown = [(name, figure) for name in names for figure in FIGURES[name]]
    return ["", *(f"![{name}: {Path(figure).stem}](symbolic-{name}-{figure})" for name, figure in shown)]


def cyclic_section(runs: dict[str, Any]) -> list[str]:
    rows = []

    def row(name: str, keys: list[str], form: str = ".4g") -> None:
        cells = []
        for found in runs.values():
            for key in keys:
                found = found[key]
            cells.append(format(found, form))
        rows.append([name, *cells])

    first = next(iter(runs.values()))
    row("loss above the Bayes floor, nats per symbol", ["train", "above_floor"], ".5f")
    row(f"phases with the right next symbol, of {first['train']['phases']}", ["train", "phases_right"])
    for where, name in MEASURED.items():
        row(f"autoencoder, {name}: explained variance", ["sae", where, "explained_variance"], ".4f")
        row(f"autoencoder, {name}: L0", ["sae", where, "l0"], ".2f")
        row(f"autoencoder, {name}: never active", ["sae", where, "dead"], ".1%")
        row(f"autoencoder, {name}: divergence recovered", ["sae", where, "kl_recovered"], ".4f")
    row("autoencoder: latents active at none of these", ["sae", "unmeasured"], ".1%")
    row("autoencoder: dead latents, active at nothing that they were trained on either", ["sae", "dead"], ".1%")
    for sort, name in (("windows", "the windows"), ("unseen", "unseen contexts")):
        row(f"all latents set to those of another of {name}: what follows that one is said",
            ["edit", "patch_followed", sort], ".1%")  # fmt: skip
    lines = table(["", *(f"seed {seed}" for seed in runs)], rows)
    extent = first["sae"]["extent"]
    lines += [
        "",
        f"The windows give {extent['windows']['different']} different activations, of which "
        f"{extent['windows']['components']} principal components hold 99.8%; the unseen contexts "
        f"{extent['unseen']['different']}, nearly all of them at the last symbol, of which "
        f"{extent['unseen']['components']} do. The transformer was trained on nearly all beginnings that end earlier; "
        "with those that only the autoencoder was not trained on they are "
        f"{extent['new']['different']}, of which {extent['new']['components']} do.",
        "",
        *contexts_table({seed: run["check"] for seed, run in runs.items()}),
    ]
    return [*lines, "", *interventions(runs), *figures("train", "sae", "edit")]


def contexts_table(checks: dict[str, Any]) -> list[str]:
    """What becomes of contexts of every kind, by seed."""
    forms = {"right": ".1%", "returned": ".1%", "forbidden_per_symbol": ".5f", "forbidden_first": ".1%",
             "forbidden_avoidable": ".5f"}  # fmt: skip
    first, rows = next(iter(checks.values())), []
    for known, name in (("unseen", "{}"), ("known", "{}, trained on")):
        for kind, entry in first[known].items():
            cells = [", ".join(format(check[known][kind][key], form) for check in checks.values())
                     for key, form in forms.items()]  # fmt: skip
            rows.append([name.format(kind), f"{entry['contexts']}", *cells])
    columns = ["contexts", "", "next symbol right", "back in the exact cycle", "forbidden steps per symbol said"]
    return [
        "What the model says after contexts that training never saw, by seed. Wrong are the symbols in which a context "
        "differs from the nearest true window; right is what may follow that. A step is forbidden that goes to a "
        "symbol which never follows, the one from the last symbol given to the first one said included. After a wrong "
        "last symbol the way back to the cycle can be of that sort itself: avoidable are all others.",
        "",
        *table([*columns, "first symbol said forbidden", "avoidable per symbol said"], rows),
    ]


def interventions(runs: dict[str, Any]) -> list[str]:
    """The best latents of every seed, each beside its controls."""
    edits = {seed: run["edit"] for seed, run in runs.items()}
    first = next(iter(edits.values()))
    settings, strength = first["settings"], first["settings"]["strength"]
    doses, rows = (1.0, strength), []
    for seed, edit in edits.items():
        for entry in edit["best"]:
            for dose in doses:
                cells = [f"seed {seed}, latent {entry['latent']}", f"{dose:g}"]
                for sort in ("windows", "unseen"):
                    found = entry["doses"][str(dose)][sort]
                    cells.append(f"{found['flips']:.0%}")
                    cells += [f"{found[name]['mean']:.0%}, to {found[name]['most']:.0%}" for name in CONTROLS]
                rows.append(cells)
    columns = ["", "dose", *(f"{sort}: {what}" for sort in ("windows", "unseen")
                             for what in ("flips", "other latents", "directions"))]  # fmt: skip
    best = [entry["doses"] for edit in edits.values() for entry in edit["best"]]
    half = [sum(of_latent[str(dose)]["windows"]["flips"] >= 0.5 for of_latent in best) for dose in doses]
    living = ", ".join(str(edit["active_at_the_last_symbol"]) for edit in edits.values())
    at_strength = [edit["best"][0]["doses"][str(strength)]["windows"]["other_latents"] for edit in edits.values()]
    others = ", ".join(f"{round(c['half'] * c['count'])} of {c['count']}" for c in at_strength)
    ablated = max(rate["ablated"] for edit in edits.values() for rate in edit["rates"])
    change = [entry["change"] for edit in edits.values() for entry in edit["best"]]
    symbols = next(iter(runs.values()))["train"]["settings"]["symbols"]
    return [
        "A latent is set to a multiple of the largest activation that it has at the last symbol of a window, at that "
        f"symbol. Of {first['latents']} latents {living} (by seed) are ever active there; the {settings['candidates']} "
        f"of them that flip most phases at dose {strength:g} are shown, each beside all others at the same dose of "
        f"their own, and {settings['controls']} random directions with changes as large (mean and largest):",
        "",
        *table(columns, rows),
        "",
        f"At dose 1, within what a latent ever does, {half[0]} of {len(best)} of the best latents flip half of the "
        f"phases; at dose {strength:g} {half[1]} do. The latents of the true phase stay on, and have to be outweighed. "
        f"Of the others {others} (by seed) flip half of the phases at dose {strength:g}. At that dose the change is "
        f"{min(change):.1f} to {max(change):.1f} times as long as the activation is far from the mean. To set a single "
        f"latent to zero flips at most {ablated:.0%} of the phases. One that always makes the same symbol said flips "
        f"{1 - 1 / symbols:.0%}: one in {symbols} phases says that symbol anyway.",
        "",
        "Figures of seed 0:",
    ]


def modules_section(first: dict[str, Any], modules: dict[str, Any]) -> list[str]:
    """The first seed's autoencoder, and what its latents change, beside those of other modules."""
    rows, strength = [], str(first["edit"]["settings"]["strength"])
    for run in (first, *modules.values()):
        sae, edit = run["sae"], run["edit"]
        flips = [best_at(edit, dose)["windows"]["flips"] for dose in ("1.0", strength)]
        rows.append(
            [
                f"`{edit['module']}`",
                str(sae["latents"]),
                str(sae["extent"]["new"]["components"]),
                *(f"{sae[where]['explained_variance']:.4f}" for where in MEASURED),
                f"{sae['dead']:.0%}",
                *(f"{share:.0%}" for share in (*flips, edit["patch_followed"]["windows"])),
            ]
        )
    columns = ["module", "latents", "components that hold 99.8%"]
    columns += [f"explained variance, {name}" for name in MEASURED.values()]
    columns += ["dead", "phases flipped, dose 1", f"dose {float(strength):g}", "all latents patched: followed"]
    return [
        "`python examples/cyclic_sequence/train_sae.py --module … --expansion-factor …` (the number of latents says "
        "which) with the model of seed 0, and the interventions with that autoencoder. Principal components are those "
        "of the activations that are new to the autoencoder. Shown are phases that its best latent flips, and how "
        "often the model says what follows another window whose latents it is given.",
        "",
        *table(columns, rows),
    ]


def transformers_section(first: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """The first seed's transformer and autoencoder beside those of other transformers."""
    rows = []
    for name, run in {"one head, MLPs": first, **others}.items():
        sae, train = run["sae"], run["train"]
        rows.append(
            [
                name,
                f"{train['above_floor']:.5f}",
                str(sae["extent"]["new"]["components"]),
                *(f"{sae[where]['explained_variance']:.4f}" for where in MEASURED),
                f"{sae['dead']:.0%}",
            ]
        )
    columns = ["transformer", "loss above the floor", "components that hold 99.8%"]
    columns += [f"explained variance, {name}" for name in MEASURED.values()]
    return [
        "`python examples/cyclic_sequence/train_cyclic.py` with `--num-heads 4` or `--no-mlp`, and an autoencoder of "
        "the same module, beside those of seed 0. Principal components are those of the activations that are new to "
        "the autoencoder.",
        "",
        *table([*columns, "dead"], rows),
    ]


def sizes_section(first: dict[str, Any], sizes: dict[str, Any]) -> list[str]:
    """The first seed's autoencoder beside those of other sizes."""
    found = [first["sae"], *sizes.values()]
    settings = found[0]["settings"]
    rows = []
    for entry in sorted(found, key=lambda entry: int(entry["latents"])):
        of = {where: entry[where] for where in MEASURED}
        rows.append(
            [
                f"{entry['latents']} for a width of {entry['width']}",
                *(f"{of[where]['explained_variance']:.4f}" for where in of),
                *(f"{of[where]['l0']:.2f}" for where in of),
                f"{entry['dead']:.0%}",
            ]
        )
    columns = ["latents", *(f"explained variance, {name}" for name in MEASURED.values())]
    columns += [*(f"L0, {name}" for name in MEASURED.values()), "dead"]
    return [
        f"`python examples/cyclic_sequence/train_sae.py --expansion-factor …`, {settings['variant']} with k "
        f"{settings['k']}, {settings['steps']} steps, seed {settings['seed']}. Dead are latents that are active "
        "neither at what they were trained on nor at what they are measured on.",
        "",
        *table(columns, rows),
    ]


def variants_section(found: dict[str, Any]) -> list[str]:
    settings = found["settings"]
    lines = [
        f"`python examples/cyclic_sequence/compare_variants.py`, the model of seed 0, {settings['steps']} steps; on "
        "contexts that training never saw, and on the windows.",
        "",
    ]
    rows = []
    for variant, entries in found["variants"].items():
        for entry in entries:
            name = next(iter(entry))
            cells = [f"{entry[where]['l0']:.2f}" for where in ("unseen", "windows")]
            cells += [f"{entry[where]['explained_variance']:.4f}" for where in ("unseen", "windows")]
            rows.append([variant, f"{name.replace('_', ' ')} {entry[name]}", *cells, f"{entry['unseen']['dead']:.0%}"])
    columns = ["variant", "", "L0", "L0, the windows", "explained variance", "the windows", "never active"]
    return [*lines, *table(columns, rows), *figures("variants")]


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
    lines += table(["", "furthest", "jumps"], rows)
    chains_jumps = {name: share for name, share in jumps.items() if name.startswith("Markov chain")}
    ratios = [
        f"{jumps['transformer'] / share:.2g} times that of the {name}" for name, share in chains_jumps.items() if share
    ]
    if jumps["transformer"] and not jumps["test trajectories"] and ratios:
        lines += [
            "",
            f"The system never jumps. The transformer does: its rate is {' and '.join(ratios)}.",
        ]
    return lines + figures("lorenz")


def language_model_section(found: dict[str, Any]) -> list[str]:
    lines = [
        f"`{found['command']}`: {found['cpu_seconds'] / 60:.1f} minutes of processor time ({found['seconds'] / 60:.1f} "
        "on the clock, of a machine that had other work), the model's loading included; measured on a book that "
        "training never saw.",
        "",
    ]
    measured = found["measured"]
    rows = [[name.replace("_", " "), f"{value:,.4g}"] for name, value in measured.items() if name != "dead"]
    lines += table(["", ""], [*rows, ["dead latents", f"{measured['dead']:.2%}"]])
    lines += ["", "Where some latents are most active in that book:", ""]
    rows = []
    for entry in found["contexts"]:
        text = " … ".join(" ".join(marked(context).split()) for context in entry["contexts"][:3])
        rows.append([str(entry["latent"]), f"{entry['density']:.2%}", text])
    lines += [*table(["latent", "active at", "contexts"], rows), ""]
    return lines + promotion_table(found["doses"], found["settings"]["doses"]) + figures("smollm2")


def promotion_table(found: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What rising doses of latents do to the tokens that followed where they are most active, beside the controls."""
    rows = []
    for name, group in found["groups"].items():
        tokens = ", ".join(f"“{plain(' '.join(token.split())) or '␣'}”" for token in group["promoted"])
        base = f"{group['base']:.3f}"
        for shown, several in (
            (f"{name}: {tokens}", [group["values"]]),
            ("random latents, mean", group["controls"]),
            ("random directions, mean", group["directions"]),
        ):
            at_doses = [f"{statistics.fmean(at_dose):.3f}" for at_dose in zip(*several, strict=True)]
            rows.append([shown, base, *at_doses])
    positions = [group["positions"] for group in found["groups"].values()]
    return [
        "What single latents make more likely: the tokens that followed where a latent is most active, as the next "
        f"token at {min(positions):,} to {max(positions):,} places of {settings['measured']} other pieces, where the "
        "latent is not active by itself. Log probability of these tokens together, in nats, with the latent set to a "
        f"multiple of its largest activation all over the text; beside {settings['controls']} random latents that are "
        f"active about as often, at the same multiples of theirs, and {settings['controls']} random directions with "
        "changes as large. Beyond 1 it is set to what it never reaches:",
        "",
        *table(["", "as it is", *(f"dose {dose:g}" for dose in found["doses"])], rows),
    ]


def marked(context: dict[str, Any]) -> str:
    """A context as markdown, its token in bold, by tags: between letters and marks, asterisks would stay asterisks."""
    before, token, after = (plain(context[name]) for name in ("before", "token", "after"))
    word = token.strip()
    if not word:
        return f"{before} <b>␣</b> {after}"
    return before + token.replace(word, f"<b>{word}</b>") + after


def plain(text: str) -> str:
    """Text as markdown that shows it as it is."""
    return MARKUP.sub(r"\\\1", text)


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
    runs = list(found.values())
    first, settings = runs[0], runs[0]["settings"]
    readers = [place.split(".memory")[0] for place in first["readers"]]
    kinds = {kind: kind.replace("_", " ") for kind in settings["kinds"]}
    minutes = sum(run["cpu_seconds"] for run in runs) / 60
    lines = [
        f"`python examples/memory_reads/ablate_facts.py --adapter {settings['adapter']} --seed …`, "
        f"{len(runs)} {'seed' if len(runs) == 1 else 'seeds'}: "
        f"autoencoders of what the {len(readers)} readers add at replies to {settings['people']} people, tested with "
        f"{settings['test_people']} others of each sort; {minutes:.0f} minutes of processor time in all. Means over "
        "seeds, and over random draws; ± is the standard deviation over these.",
        "",
        *the_latents(runs, kinds),
    ]
    for whose in first["tested"]:
        lines += ["", f"### {whose[0].upper()}{whose[1:]}", "", *recall_table(runs, whose, kinds), ""]
        lines += fallen(runs, whose, list(kinds))
    lines += ["", "### Rising doses", "", *doses_table([next(iter(run["tested"].values()))["doses"] for run in runs])]
    lines += ["", "### The latents that tell a kind best", "", *portraits(first, readers, kinds)]
    lines += ["", "### The autoencoders", "", "On what is read for people that they were not trained with, seed 0:", ""]
    rows = []
    for place, reader in zip(first["readers"], readers, strict=True):
        row = [f"`{reader}`"]
        for entry in (of_whom["autoencoders"][place] for of_whom in first["tested"].values()):
            row += [f"{entry['explained_variance']:.3f}", f"{entry['l0']:.1f}", f"{entry['dead']:.0%}"]
        rows.append(row)
    measures = [f"{name}, {whose}" for whose in first["tested"] for name in ("explained variance", "L0", "dead")]
    return lines + table(["reader", *measures], rows) + figures("memory")


def the_latents(runs: list[dict[str, Any]], kinds: dict[str, str]) -> list[str]:
    """Which latents are a kind's, and what the control is."""
    settings = runs[0]["settings"]
    counts = [
        f"{', '.join(str(sum(run['chosen'][index])) for run in runs)} of a {kind}"
        for index, kind in enumerate(kinds.values())
    ]
    living = ", ".join(str(run["living"]) for run in runs)
    return [
        "A kind's latents add more to the log probability of its answers than to that of any other kind's (gradient "
        f"times activation): the strongest, until they hold {settings['share']:.0%} of what all such latents add "
        f"beyond the others. By seed they are {'; '.join(counts)}; {living} latents are ever active where answers are "
        "predicted. The control are random latents of the same layers that are no kind's, drawn until their lengths at "
        f"the kind's answers add up to those of the kind's own, {settings['controls']} draws for every seed. They "
        "point in more directions, so that less of what is read goes with them: the tables say how much. Random "
        "directions with changes as large stand below, beside rising doses. What is read then is what the autoencoders "
        "make of it without these latents.",
    ]


def entries(run: dict[str, Any], whose: str, kind: str, name: str) -> list[dict[str, Any]]:
    """What was found with a group of latents of a kind ablated, in every draw."""
    group = run["tested"][whose]["kinds"][kind][name]
    return group if isinstance(group, list) else [group]


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return f"{format(statistics.fmean(values), form)}{deviation}"


def recall_table(runs: list[dict[str, Any]], whose: str, kinds: dict[str, str]) -> list[str]:
    """Recall of every kind by what is ablated."""
    rows = []

    def row(name: str, recalls: list[dict[str, Any]], taken_out: list[float] | None = None) -> None:
        cells = [
            f"{spread([100 * recall[kind]['exact'] for recall in recalls], '.0f')}% · "
            f"{spread([recall[kind]['nats'] for recall in recalls], '.2f')}"
            for kind in kinds
        ]
        rows.append([name, "" if taken_out is None else f"{statistics.fmean(taken_out):.0%}", *cells])

    def usual(name: str) -> list[dict[str, Any]]:
        return [run["tested"][whose]["recall"][name] for run in runs]

    row("the memory as it is", usual("the memory as it is"))
    row("nothing", usual("nothing"), [0.0])
    for name, form in (
        ("latents", "latents of a {}"),
        ("random", "random, as much as of a {}"),
        ("portraits", "the best latents of a {}"),
        ("portraits_random", "random, as much as the best of a {}"),
    ):
        for kind, named in kinds.items():
            found = [entry for run in runs for entry in entries(run, whose, kind, name)]
            taken = [entry["taken_out"][kind] for entry in found]
            row(form.format(named), [entry["recall"] for entry in found], taken)
    row("all that is read", usual("all that is read"), [1.0])
    return [
        "Answers of which every token is the most likely one, and nats per token of the answer; beside what is ablated "
        "how much of what is read at that kind's answers goes with it, by length:",
        "",
        *table(["ablated", "taken out", *kinds.values()], rows),
    ]


def fallen(runs: list[dict[str, Any]], whose: str, kinds: list[str]) -> list[str]:
    """How far recall of a kind falls with its own latents ablated, and that of others, beside random ones."""
    rows = []
    for name, shown in (
        ("latents", "a kind's latents"),
        ("random", "random ones, as much"),
        ("portraits", "a kind's best latents"),
        ("portraits_random", "random ones, as much"),
        ("single", "a single one of the best"),
    ):
        changes: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for run in runs:
            nothing = run["tested"][whose]["recall"]["nothing"]
            for ablated in kinds:
                for entry in entries(run, whose, ablated, name):
                    for asked in kinds:
                        before, after = nothing[asked], entry["recall"][asked]
                        lost = 100 * (before["exact"] - after["exact"]), after["nats"] - before["nats"]
                        changes[asked == ablated].append(lost)
        cells = [
            f"{spread([points for points, _ in changes[own]], '.0f')} points, "
            f"{spread([nats for _, nats in changes[own]], '.2f')} nats"
            for own in (True, False)
        ]
        rows.append([shown, *cells])
    return [
        "In the mean over kinds, beside what the autoencoders make of all that is read:",
        "",
        *table(["ablated", "recall lost of that kind", "of the others"], rows),
    ]


def doses_table(found: list[dict[str, Any]]) -> list[str]:
    """Recall by the share of a kind's latents that is taken out, beside random ones and random directions."""
    rows = []
    for name in found[0]["groups"]:
        groups = [run["groups"][name] for run in found]
        for shown, several in (
            (name, [group["values"] for group in groups]),
            ("the same: the other kinds' answers", [group["others"] for group in groups]),
            ("random ones, as much", [values for group in groups for values in group["controls"]]),
            ("random directions, as far", [values for group in groups for values in group["directions"]]),
        ):
            rows.append([shown, *(f"{statistics.fmean(at_dose):.0%}" for at_dose in zip(*several, strict=True))])
    return [
        "Answers of the kind recalled with so large a share of the activation of its latents taken out, of other "
        "people; beyond 100% they take away what they added. What the autoencoders do not explain is left as it is, so "
        "that less goes than above:",
        "",
        *table(["taken out of", *(f"{dose:.0%}" for dose in found[0]["doses"])], rows),
    ]


def portraits(run: dict[str, Any], readers: list[str], kinds: dict[str, str]) -> list[str]:
    """The latents that tell a kind best, and what goes with each of them."""
    rows = []
    for kind, named in kinds.items():
        for index, entry in enumerate(next(iter(run["tested"].values()))["portraits"][kind]):
            cells = [f"{named}: {readers[entry['layer']]}, latent {entry['latent']}"]
            for of_whom in run["tested"].values():
                seen = of_whom["portraits"][kind][index]
                before, after = of_whom["recall"]["nothing"], of_whom["kinds"][kind]["single"][index]["recall"]
                rises = [after[asked]["nats"] - before[asked]["nats"] for asked in kinds]
                cells += [
                    ", ".join(f"{share:.0%}" for share in seen["active"]),
                    ", ".join(seen["answers"]),
                    ", ".join(f"{rise:+.2f}" for rise in rises),
                ]
            rows.append(cells)
    columns = [cell for whose in run["tested"] for cell in (whose, "most at", "alone ablated, nats")]
    return [
        "By the people to train on those latents that are active at far more of a kind's answers than of any other's, "
        "and add most to them; seed 0. At which answers of others they are active (share of the answers about a "
        f"{', a '.join(kinds.values())}), at which most, and by how much answers of these kinds become less likely "
        "when the latent alone is ablated:",
        "",
        *table(["latent", *columns], rows),
    ]
