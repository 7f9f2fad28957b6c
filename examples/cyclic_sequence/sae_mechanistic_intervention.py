"""Change single latents of the transformer's layer and see what it says next.

    python examples/cyclic_sequence/sae_mechanistic_intervention.py

Every latent is set to zero, and to `--strength` times the largest activation that it has in the sequence (more than it
ever is, since the latents of the true phase stay on), at the last symbol of the window, at all phases. A latent's flip
rate is the share of phases at which the predicted next symbol becomes another. The best latents are shown
over rising strengths, beside random latents at theirs and beside random directions at changes as large; they are found
on the true windows and tried again on contexts that training never saw. Setting all latents to those of another phase
says how much of the count they hold.

Writes `results.json` and a figure into `--output`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from train_cyclic import contexts, write_results
from train_sae import task_of
from transformers import AutoModelForCausalLM

from senri_hf import SparseAutoencoder
from senri_hf.interpretability import Edit, dose_response, intervene, module_activations, plots


DOSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LAST = {"positions": [-1]}


class Subject:
    """A model and the autoencoder of one of its modules, changed at the last symbol of contexts."""

    def __init__(self, model: Any, sae: SparseAutoencoder) -> None:
        self.model, self.sae, self.place = model, sae, sae.config.hook_name

    def said(self, given: torch.Tensor) -> torch.Tensor:
        """The predicted next symbol of contexts [n, T]."""
        return self.model(given).logits[:, -1].argmax(-1)

    def latents(self, given: torch.Tensor) -> torch.Tensor:
        """Latents of contexts, [n, T, d_sae]."""
        (activations,) = module_activations(self.model, self.place, [{"input_ids": given}])
        return self.sae.encode(activations).view(*given.shape, -1)

    def flips(self, given: torch.Tensor, edit: Edit) -> float:
        """The share of contexts after which something else is said with the edit."""
        usual = self.said(given)
        with intervene(self.model, self.place, self.sae, edit, **LAST):
            return float((self.said(given) != usual).double().mean())

    def followed(self, given: torch.Tensor) -> float:
        """How often the model says what follows another window, given that one's latents, where that differs."""
        usual, latents = self.said(given), self.latents(given)
        follows = []
        for shift in range(1, len(given)):
            other = latents.roll(-shift, 0)
            with intervene(self.model, self.place, self.sae, Edit(range(other.shape[-1]), "patch", other), **LAST):
                patched = self.said(given)
            wanted = usual.roll(-shift)
            follows.append((patched == wanted)[wanted != usual])
        return float(torch.cat(follows).double().mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/cyclic"), help="folder that train_cyclic.py wrote")
    add("--sae", type=Path, default=Path("checkpoints/cyclic-sae"), help="folder that train_sae.py wrote")
    add("--strength", type=float, default=2.0, help="multiple of a latent's largest activation that it is set to")
    add("--candidates", type=int, default=3, help="best latents to look at closely")
    add("--controls", type=int, default=20, help="random latents, and random directions, for each of them")
    add("--length", type=int, default=36, help="symbols to generate under intervention")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic-intervention"))
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    subject = Subject(model, SparseAutoencoder.from_pretrained(args.sae).eval())
    task, settings = task_of(args.model)
    windows = torch.tensor(task.windows(settings["block"]))
    unseen = torch.tensor(contexts(task, settings["block"], settings["held_out"])[1][1])
    latents = subject.latents(windows).flatten(0, 1)
    density, largest = (latents > 0).double().mean(0), latents.amax(0)

    def full(latent: int) -> Edit:
        return Edit(latent, "clamp", args.strength * float(largest[latent]))

    rates: list[dict[str, Any]] = []
    for latent in (density > 0).nonzero()[:, 0].tolist():
        ablated, clamped = (subject.flips(windows, edit) for edit in (Edit(latent, "ablate"), full(latent)))
        rates.append({"latent": latent, "ablated": ablated, "clamped": clamped, "largest": float(largest[latent])})
    rates.sort(key=lambda rate: -max(rate["ablated"], rate["clamped"]))
    best = [rate["latent"] for rate in rates[: args.candidates]]

    usual = subject.said(windows)
    doses = sorted({*DOSES, args.strength})
    found = dose_response(
        model,
        subject.place,
        subject.sae,
        {f"latent {latent}": [latent] for latent in best},
        lambda: float((subject.said(windows) != usual).double().mean()),
        doses,
        mode="clamp",
        unit=largest,
        controls=args.controls,
        density=density,
        seed=args.seed,
        **LAST,
    )
    said = {}
    for latent in best:
        with intervene(model, subject.place, subject.sae, full(latent), **LAST):
            rollouts = model.rollout(windows, args.length)[:, windows.shape[1] :].tolist()
        afterwards = model.rollout(torch.tensor(rollouts)[:, -windows.shape[1] :], 2 * task.period).tolist()
        said[str(latent)] = {
            "example": "".join(map(str, rollouts[0])),
            "forbidden_per_symbol": sum(map(task.forbidden, rollouts)) / (len(rollouts) * (args.length - 1)),
            "exact_cycle_under_it": sum(task.settled(r) == 0 for r in rollouts) / len(rollouts),
            "exact_cycle_after_it": sum(task.settled(r) is not None for r in afterwards) / len(afterwards),
        }
    at = doses.index(args.strength)
    first = found["groups"][f"latent {best[0]}"]
    random_latents, random_directions = ([line[at] for line in first[kind]] for kind in ("controls", "directions"))
    summary = {
        "best_flip_rate": max(rates[0]["ablated"], rates[0]["clamped"]),
        "best_flip_rate_unseen": max(subject.flips(unseen, e) for e in (Edit(best[0], "ablate"), full(best[0]))),
        "random_latents_mean": sum(random_latents) / len(random_latents),
        "random_latents_most": max(random_latents),
        "random_directions_mean": sum(random_directions) / len(random_directions),
        "patch_followed": subject.followed(windows),
    }
    found_in_all = {"phases": task.period, "module": subject.place, **summary}
    write_results(args, found_in_all | {"latents": rates, "dose_response": found, "rollouts": said})
    plots.dose_responses(
        found,
        args.output / "dose_response.png",
        y_label="share of phases that flip",
        x_label="multiple of the latent's largest activation",
    )
    print(json.dumps(summary, indent=1))
    print(f"{args.output}")


if __name__ == "__main__":
    main()
