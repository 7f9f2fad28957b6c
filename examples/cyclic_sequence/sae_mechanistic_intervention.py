"""Change single latents of the transformer's layer and see what it says next.

    python examples/cyclic_sequence/sae_mechanistic_intervention.py

Every latent that is active in the sequence is tried: set to zero, and set to `--strength` times its largest activation,
at the last symbol of the window, at all phases. A latent's flip rate is the share of phases at which the predicted next
symbol becomes another. The best ones are shown beside random controls, over rising strengths, and what the model goes
on to say under them is compared with the cycle.

Writes `results.json` and a figure into `--output`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from train_sae import task_of
from transformers import AutoModelForCausalLM

from senri_hf import SparseAutoencoder
from senri_hf.interpretability import Edit, dose_response, intervene, module_activations, plots


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/cyclic"), help="folder that train_cyclic.py wrote")
    add("--sae", type=Path, default=Path("checkpoints/cyclic-sae"), help="folder that train_sae.py wrote")
    add("--strength", type=float, default=2.0, help="multiple of a latent's largest activation that it is set to")
    add("--candidates", type=int, default=3, help="best latents to look at closely")
    add("--controls", type=int, default=10, help="random latents for each of them")
    add("--length", type=int, default=36, help="symbols to generate under intervention")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic-intervention"))
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    sae = SparseAutoencoder.from_pretrained(args.sae).eval()
    task, settings = task_of(args.model)
    windows = torch.tensor(task.windows(settings["block"]))
    place = sae.config.hook_name
    (activations,) = module_activations(model, place, [{"input_ids": windows}])
    latents = sae.encode(activations)
    density, largest = (latents > 0).double().mean(0), latents.amax(0)
    usual = model(windows).logits[:, -1].argmax(-1)

    def flips() -> float:
        return float((model(windows).logits[:, -1].argmax(-1) != usual).double().mean())

    last = {"positions": [-1]}
    rates: list[dict[str, Any]] = []
    for latent in (density > 0).nonzero()[:, 0].tolist():
        with intervene(model, place, sae, Edit(latent, "ablate"), **last):
            ablated = flips()
        with intervene(model, place, sae, Edit(latent, "clamp", args.strength * float(largest[latent])), **last):
            clamped = flips()
        rates.append({"latent": latent, "ablated": ablated, "clamped": clamped, "largest": float(largest[latent])})
    rates.sort(key=lambda rate: -max(rate["ablated"], rate["clamped"]))
    best = rates[: args.candidates]

    # Doses in the same units for all latents: multiples of the largest activation of the best.
    strongest = max(rate["largest"] for rate in best)
    doses = [strongest * share for share in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)]
    found = dose_response(
        model,
        place,
        sae,
        {f"latent {rate['latent']}": [rate["latent"]] for rate in best},
        flips,
        doses,
        mode="clamp",
        controls=args.controls,
        density=density,
        seed=args.seed,
        **last,
    )
    said = {}
    for rate in best:
        edit = Edit(rate["latent"], "clamp", args.strength * rate["largest"])
        with intervene(model, place, sae, edit, **last):
            rollouts = model.rollout(windows, args.length)[:, windows.shape[1] :].tolist()
        afterwards = model.rollout(torch.tensor(rollouts)[:, -windows.shape[1] :], 2 * task.period).tolist()
        said[str(rate["latent"])] = {
            "example": "".join(map(str, rollouts[0])),
            "forbidden_per_symbol": sum(map(task.forbidden, rollouts)) / (len(rollouts) * (args.length - 1)),
            "exact_cycle_under_it": sum(task.settled(r) == 0 for r in rollouts) / len(rollouts),
            "exact_cycle_after_it": sum(task.settled(r) is not None for r in afterwards) / len(afterwards),
        }
    control = [value for group in found["groups"].values() for line in group["controls"] for value in line]
    result = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "phases": task.period,
        "module": place,
        "best_flip_rate": max(best[0]["ablated"], best[0]["clamped"]),
        "mean_flip_rate": sum(max(rate["ablated"], rate["clamped"]) for rate in rates) / len(rates),
        "random_flip_rate": sum(control) / len(control),
        "latents": rates,
        "dose_response": found,
        "rollouts": said,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    plots.dose_responses(found, args.output / "dose_response.png", y_label="share of phases that flip")
    print(json.dumps({name: result[name] for name in ("best_flip_rate", "mean_flip_rate", "random_flip_rate")}))
    print(f"{args.output}")


if __name__ == "__main__":
    main()
