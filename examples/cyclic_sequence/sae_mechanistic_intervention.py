"""Change single latents of a module of the transformer and see what it says next.

    python examples/cyclic_sequence/sae_mechanistic_intervention.py

Changes are made at the last symbol of a window. A dose of 1 is the largest activation that a latent has there in the
sequence, so that doses to 1 take no latent to where it never is; `--strength` is the dose that latents are judged by
(beyond 1 the latents of the true phase, which stay on, can be outweighed). A latent's flip rate is the share of phases
at which the predicted next symbol becomes another. The best latents are found on the true windows and tried again on
contexts that training never saw. Beside each of them stand all other latents that are ever active at the last symbol,
at the same dose of their own, and random directions with changes as large. Setting all latents to those of another
phase says how much of the count they hold.

Writes `results.json` and a figure into `--output`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train_cyclic import write_results
from train_sae import task_of, unseen_rows
from transformers import AutoModelForCausalLM

from senri_hf import SparseAutoencoder
from senri_hf.interpretability import Edit, dose_response, intervene, module_activations, plots


DOSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LAST = {"positions": [-1]}
# The share of phases that makes a latent count as one that flips them.
HALF = 0.5


class Subject:
    """A model and the autoencoder of one of its modules, changed at the last symbol of contexts."""

    def __init__(self, model: Any, sae: SparseAutoencoder) -> None:
        self.model, self.sae, self.place = model, sae, sae.config.hook_name

    def said(self, given: torch.Tensor) -> torch.Tensor:
        """The predicted next symbol of contexts [n, T]."""
        return self.model(given).logits[:, -1].argmax(-1)

    def activations(self, given: torch.Tensor) -> torch.Tensor:
        """The module's output at the last symbol of contexts, [n, d_in]."""
        (activations,) = module_activations(self.model, self.place, [{"input_ids": given}])
        return activations.view(*given.shape, -1)[:, -1]

    def latents(self, given: torch.Tensor) -> torch.Tensor:
        """Latents at the last symbol of contexts, [n, d_sae]."""
        return self.sae.encode(self.activations(given))

    def flips(
        self, given: torch.Tensor, edit: Edit, direction_seed: int | None = None, usual: torch.Tensor | None = None
    ) -> float:
        """The share of contexts after which something else is said with the edit than `usual`, what is said without."""
        usual = self.said(given) if usual is None else usual
        with intervene(self.model, self.place, self.sae, edit, direction_seed=direction_seed, **LAST):
            return float((self.said(given) != usual).double().mean())

    def followed(self, given: torch.Tensor, shifts: int) -> float:
        """How often the model says what follows another context, given that one's latents, where that differs."""
        usual, latents = self.said(given), self.latents(given)
        follows = []
        for shift in range(1, shifts):
            # What stands at the other columns is not put in: those are not edited.
            other = latents.roll(-shift, 0)[:, None].expand(-1, given.shape[1], -1)
            with intervene(self.model, self.place, self.sae, Edit(range(other.shape[-1]), "patch", other), **LAST):
                patched = self.said(given)
            wanted = usual.roll(-shift)
            follows.append((patched == wanted)[wanted != usual])
        return float(torch.cat(follows).double().mean())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, largest, and the share of those that are at least `HALF`."""
    count = max(1, len(values))
    return {
        "count": len(values),
        "mean": sum(values) / count,
        "most": max(values, default=0.0),
        "half": sum(value >= HALF for value in values) / count,
    }


def beside_controls(
    subject: Subject,
    sorts: dict[str, torch.Tensor],
    best: Sequence[int],
    others: Sequence[int],
    unit: torch.Tensor,
    dose: float,
    directions: int,
) -> list[dict[str, Any]]:
    """Flip rates of the best latents at a dose, and of their controls, by sort of contexts."""

    def at(which: int) -> Edit:
        return Edit(which, "clamp", dose * float(unit[which]))

    found: list[dict[str, Any]] = [{} for _ in best]
    for name, given in sorts.items():
        usual = subject.said(given)
        of_others = spread([subject.flips(given, at(other), usual=usual) for other in others])
        for entry, latent in zip(found, best, strict=True):
            entry[name] = {
                "flips": subject.flips(given, at(latent), usual=usual),
                "other_latents": of_others,
                "directions": spread([subject.flips(given, at(latent), seed, usual) for seed in range(directions)]),
            }
    return found


def generated(subject: Subject, task: Any, windows: torch.Tensor, edit: Edit, length: int) -> dict[str, Any]:
    """What is said for a while under an edit, and after it."""
    with intervene(subject.model, subject.place, subject.sae, edit, **LAST):
        rollouts = subject.model.rollout(windows, length)[:, windows.shape[1] - 1 :].tolist()
    last = torch.tensor(rollouts)[:, -windows.shape[1] :]
    afterwards = subject.model.rollout(last, 2 * task.period).tolist()
    return {
        "example": "".join(map(str, rollouts[0][1:])),
        "forbidden_per_symbol": sum(map(task.forbidden, rollouts)) / (len(rollouts) * length),
        "exact_cycle_under_it": sum(task.settled(rollout[1:]) == 0 for rollout in rollouts) / len(rollouts),
        "exact_cycle_after_it": sum(task.settled(rollout) is not None for rollout in afterwards) / len(afterwards),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/cyclic"), help="folder that train_cyclic.py wrote")
    add("--sae", type=Path, default=Path("checkpoints/cyclic-sae"), help="folder that train_sae.py wrote")
    add(
        "--strength", type=float, default=2.0, help="dose: multiple of a latent's largest activation at the last symbol"
    )
    add("--candidates", type=int, default=3, help="best latents to look at closely")
    add("--controls", type=int, default=100, help="random directions for each of them")
    add("--length", type=int, default=36, help="symbols to generate under intervention")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic-intervention"))
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    subject = Subject(model, SparseAutoencoder.from_pretrained(args.sae).eval())
    task, settings = task_of(args.model)
    windows = torch.tensor(task.windows(settings["block"]))
    unseen = torch.tensor(unseen_rows(task, settings))
    sorts = {"windows": windows, "unseen": unseen}
    latents = subject.latents(windows)
    density, largest = (latents > 0).double().mean(0), latents.amax(0)

    def clamped(latent: int, dose: float) -> Edit:
        return Edit(latent, "clamp", dose * float(largest[latent]))

    living = (density > 0).nonzero()[:, 0].tolist()
    rates: list[dict[str, Any]] = []
    for latent in living:
        rate = {"latent": latent, "largest": float(largest[latent])}
        rate["ablated"] = subject.flips(windows, Edit(latent, "ablate"))
        rate |= {str(dose): subject.flips(windows, clamped(latent, dose)) for dose in {1.0, args.strength}}
        rates.append(rate)
    rates.sort(key=lambda rate: (-rate[str(args.strength)], -rate["1.0"]))
    best = [rate["latent"] for rate in rates[: args.candidates]]

    usual = subject.said(windows)
    response = dose_response(
        model,
        subject.place,
        subject.sae,
        {f"latent {latent}": [latent] for latent in best},
        lambda: float((subject.said(windows) != usual).double().mean()),
        sorted({*DOSES, args.strength}),
        mode="clamp",
        unit=largest,
        controls=min(args.controls, 20),
        density=density,
        seed=args.seed,
        **LAST,
    )
    centred = subject.activations(windows)
    centred = centred - centred.mean(0)
    others = [other for other in living if other not in best]
    by_dose = {
        str(dose): beside_controls(subject, sorts, best, others, largest, dose, args.controls)
        for dose in (1.0, args.strength)
    }
    looked_at = []
    for index, latent in enumerate(best):
        edit = clamped(latent, args.strength)
        change = (args.strength * largest[latent] - latents[:, latent]).abs() / subject.sae.activation_scale
        looked_at.append(
            {
                "latent": latent,
                "doses": {dose: of_dose[index] for dose, of_dose in by_dose.items()},
                "change": float((change / centred.norm(dim=-1)).mean()),
                "generated": generated(subject, task, windows, edit, args.length),
            }
        )
    found = {
        "phases": task.period,
        "module": subject.place,
        "latents": len(density),
        "active_at_the_last_symbol": len(living),
        "best": looked_at,
        "rates": rates,
        "patch_followed": {name: subject.followed(given, task.period) for name, given in sorts.items()},
        "dose_response": response,
    }
    write_results(args, found)
    plots.dose_responses(
        response,
        args.output / "dose_response.png",
        y_label="share of phases that flip",
        x_label="multiple of the largest activation at the last symbol",
        usual=1.0,
    )
    for entry in looked_at:
        print(f"latent {entry['latent']}", json.dumps(entry["doses"], indent=1))
    print("followed", found["patch_followed"])
    print(f"{args.output}")


if __name__ == "__main__":
    main()
