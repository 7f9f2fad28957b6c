"""The examples of symbols, autoencoders and interventions: their commands run, and find what they say they find."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from chatting import byte_tokenizer
from models import Subject, tiny_model

from senri_hf import SymbolicTransformerConfig, SymbolicTransformerForCausalLM


pytest.importorskip("matplotlib")

Load = Callable[[str], ModuleType]


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_the_cyclic_sequence_from_training_to_interventions(load: Load, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("train", "sae", "edit", "check", "variants")}

    def run(script: str, name: str, *arguments: str) -> dict[str, Any]:
        load(f"cyclic_sequence/{script}.py").main([*arguments, "--output", str(folders[name])])
        return results(folders[name])

    tiny = ["--symbols", "2", "--hold", "3", "--block", "5", "--hidden-size", "16", "--num-heads", "2", "--steps", "4"]
    trained = run("train_cyclic", "train", *tiny, "--rollout-length", "9")
    assert trained["phases"] == 6 and trained["loss"] > trained["bayes_floor"]
    model = ["--model", str(folders["train"])]
    small = ["--steps", "6", "--batch-size", "64"]
    sae = run("train_sae", "sae", *model, *small)
    assert (
        sae["latents"] == 8 and sae["width"] == 16 and 0 < sae["unseen"]["l0"] <= 4 and sae["unseen"]["activations"] > 0
    )
    # As many different activations as beginnings of windows.
    assert sae["extent"]["windows"]["different"] == sum(min(2 * length, 6) for length in range(1, 6))
    of_sae = [*model, "--sae", str(folders["sae"])]
    edit = run("sae_mechanistic_intervention", "edit", *of_sae, "--controls", "3", "--candidates", "2", "--length", "9")
    assert len(edit["best"]) == 2 and len(edit["rates"]) == edit["active_at_the_last_symbol"]
    for entry in edit["best"]:  # every one has its controls, at both doses, on both sorts of contexts
        assert set(entry["doses"]) == {"1.0", "2.0"}
        for of_dose in entry["doses"].values():
            for found in of_dose.values():
                assert found["directions"]["count"] == 3
                assert found["other_latents"]["count"] == len(edit["rates"]) - 2
    checked = run("check_hallucinations", "check", *model, "--count", "4", "--length", "9")
    assert {"1 wrong", "random symbols"} <= set(checked["unseen"]) and set(checked["known"]) > {"true windows"}
    kinds = ["--variants", "topk", "relu", "--k", "2", "--sparsity-coefficients", "0.1"]
    variants = run("compare_variants", "variants", *model, *small, *kinds)["variants"]
    assert set(variants) == {"topk", "relu"} and variants["topk"][0]["unseen"]["l0"] <= 2
    figures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.png")}
    of_sae_figures = {f"sae/{name}.png" for name in ("training", "density", "cycle")}
    assert figures == of_sae_figures | {"train/training.png", "train/attention.png", "edit/dose_response.png",
                                        "variants/frontier.png"}  # fmt: skip


def test_no_context_is_tested_that_training_has(load: Load) -> None:
    train = load("cyclic_sequence/train_cyclic.py")
    task = train.CyclicSequence()
    training, testing = train.contexts(task, 10, 0.2)
    items = [item for of_wrong in training.values() for item in of_wrong]
    trained = {tuple(context) for context, _ in items} | {tuple(window) for window in task.windows(10)}
    assert all(follows in train.nearest_follows(task, context) for context, follows in items[::50])
    assert not training[4] and training[1] and training[2] and training[3]
    for wrong, unseen in testing.items():
        assert len(unseen) >= 50 and not trained & set(map(tuple, unseen))
        nearest = [min(sum(a != b for a, b in zip(context, window, strict=True)) for window in task.windows(10))
                   for context in unseen[::50]]  # fmt: skip
        assert set(nearest) == {wrong}


def test_no_activation_counts_as_unseen_that_is_of_something_trained_on(load: Load) -> None:
    load("cyclic_sequence/train_cyclic.py")
    train = load("cyclic_sequence/train_sae.py")
    task, settings = train.CyclicSequence(), {"block": 10, "held_out": 0.2}
    of_sae = train.beginnings(train.rows_of(task, settings)) | train.beginnings(task.windows(10))
    of_both = train.beginnings(train.known_rows(task, settings))
    assert of_sae < of_both
    judged = train.judged_contexts(task, settings)
    for name, known, least in (("unseen", of_both, 500), ("new", of_sae, 1000)):
        rows, new = judged[name].rows, judged[name].new
        counted = [tuple(rows[row][: place + 1]) for row, place in new.nonzero().tolist()]
        assert len(counted) == len(set(counted)) > least and not known & set(counted)
    assert judged["windows"].new.sum() == len(train.beginnings(task.windows(10)))


def test_every_different_activation_is_trained_on_once_and_a_fifth_are_of_the_windows(load: Load) -> None:
    load("cyclic_sequence/train_cyclic.py")
    train = load("cyclic_sequence/train_sae.py")
    task, settings = train.CyclicSequence(), {"block": 10, "held_out": 0.2}
    torch.manual_seed(0)
    config = SymbolicTransformerConfig(hidden_size=16, num_attention_heads=1, initializer_range=0.5)
    model, module = SymbolicTransformerForCausalLM(config).eval(), "model.layers.0"
    windows = train.beginnings(task.windows(10))
    different = windows | train.beginnings(train.rows_of(task, settings))
    both = train.training_activations(model, module, task, settings, "both")
    alone = train.training_activations(model, module, task, settings, "windows")
    assert len(both.unique(dim=0)) == len(different) and len(alone) == len(alone.unique(dim=0)) == len(windows)
    of_windows = len(both) - (len(different) - len(windows))
    assert of_windows % len(windows) == 0 and of_windows / len(both) == pytest.approx(train.WINDOWS, abs=0.01)


@pytest.mark.parametrize("share", ["0", "1", "-0.5"])
def test_nothing_held_out_is_refused_at_once(
    load: Load, share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load("cyclic_sequence/train_cyclic.py").main(["--held-out", share, "--output", str(tmp_path / "out")])
    assert "a share above 0 and below 1 is due" in capsys.readouterr().err and not (tmp_path / "out").exists()


class Says:
    """Goes on with given symbols."""

    def __init__(self, *symbols: int) -> None:
        self.symbols = torch.tensor(symbols)

    def rollout(self, given: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([given, self.symbols[:length].expand(len(given), -1)], dim=1)


def test_the_step_to_the_first_symbol_said_is_judged_too(load: Load) -> None:
    train = load("cyclic_sequence/train_cyclic.py")
    task = train.CyclicSequence(3, 2)
    true = train.judged(Says(1, 2, 2, 0, 0, 1, 1, 2), task, torch.tensor([[0, 0, 1]]), 8)
    assert true["forbidden_per_symbol"] == 0 and true["right"] == true["returned"] == 1
    jumped = train.judged(Says(0, 0, 1, 1, 2, 2, 0, 0), task, torch.tensor([[0, 0, 1]]), 8)
    assert jumped["forbidden_first"] == 1 and jumped["forbidden_later"] == 0 and jumped["right"] == 0
    assert jumped["forbidden_per_symbol"] == jumped["forbidden_avoidable"] == 1 / 8
    # The last symbol of this context is wrong, and the step from it to what follows the true one is forbidden.
    assert train.nearest_follows(task, [2, 2, 0, 2]) == {1}
    back = train.judged(Says(1, 1, 2, 2, 0, 0, 1, 1), task, torch.tensor([[2, 2, 0, 2]]), 8)
    assert back["right"] == back["returned"] == back["forbidden_first"] == 1 and back["forbidden_per_symbol"] == 1 / 8
    assert back["forbidden_later"] == back["forbidden_avoidable"] == 0


def test_the_lorenz_system(load: Load, tmp_path: Path) -> None:
    sizes = ["--trajectories", "4", "--test-trajectories", "2", "--length", "40", "--block", "8", "--lags", "5"]
    model = ["--hidden-size", "16", "--num-heads", "2", "--steps", "3"]
    load("lorenz_sequence/train_lorenz.py").main([*sizes, *model, "--output", str(tmp_path)])
    found = results(tmp_path)
    assert set(found["markov_loss"]) == {"1", "2", "4", "8"} and found["loss"] > 0
    best = min(found["markov_loss"], key=lambda order: found["markov_loss"][order])
    chains = {f"Markov chain of order {order}" for order in ("1", best)}
    for compared in ("furthest", "jumps", "autocorrelation"):
        assert {name for name in found[compared] if name.startswith("Markov")} == chains
    assert {path.name for path in tmp_path.glob("*.png")} == {"training.png", "autocorrelation.png"}


@pytest.mark.parametrize("order", [1, 3])
def test_a_chain_goes_on_by_its_last_symbols(load: Load, order: int) -> None:
    lorenz = load("lorenz_sequence/train_lorenz.py")
    cycle = np.resize([0, 1, 2, 2] if order == 3 else [0, 1, 2], (2, 400))
    chain = lorenz.markov_chain(cycle, order)
    assert chain.shape == (3**order, 3)
    sure = (chain > 0.9).astype(float)  # what was never seen is left at thirds
    said = lorenz.chain_sample(sure, cycle[:, :order], 50, seed=0)
    assert np.array_equal(said, cycle[:, order : order + 50])


def test_what_an_adapter_reads_is_ablated_beside_random_latents(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, tokenizer = load("memory_reads/ablate_facts.py"), byte_tokenizer()
    vocabulary = {"vocab_size": len(tokenizer)}
    Subject("llama", "episodic", "default").build(model=vocabulary).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(facts.senri_hf, "load_base", lambda *_, **__: (tiny_model("llama", **vocabulary), tokenizer))
    adapter = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    people = ["--kinds", "city", "pet_name", "--people", "3", "--test-people", "2", "--controls", "2"]
    arguments = [*adapter, *people, "--k", "4", "--steps", "12", "--batch-size", "16"]
    facts.main(arguments)
    found = results(tmp_path / "out")
    assert len(found["tested"]) == 2
    for tested in found["tested"].values():
        for kind in ("city", "pet_name"):
            groups = tested["kinds"][kind]
            assert len(groups["random"]) == len(groups["portraits_random"]) == 2 and len(groups["single"]) == 3
            assert groups["latents"]["latents"] == sum(found["chosen"][("city", "pet_name").index(kind)])
            assert set(groups["latents"]["recall"]) == {"city", "pet_name"}
            assert len(tested["portraits"][kind]) == 3
        assert tested["recall"]["nothing"]["city"]["nats"] > 0
    doses = found["tested"]["other people"]["doses"]
    assert set(doses["groups"]) == {"latents of a city", "latents of a pet name"}
    for group in doses["groups"].values():
        several = [group["values"], group["others"], *group["controls"], *group["directions"]]
        assert len(several) == 4 and {len(values) for values in several} == {len(doses["doses"])} == {7}
    figures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert figures == {"recall-train.png", "recall-validation.png", "doses.png"}
    with pytest.raises(SystemExit, match="other settings"):
        facts.main([*arguments, "--seed", "7"])


def test_controls_are_no_kinds_and_as_large(load: Load) -> None:
    facts = load("memory_reads/ablate_facts.py")
    attributed = torch.zeros(2, 2, 50)
    attributed[0, 0, :4] = torch.tensor([4.0, 3.0, 2.0, 0.1])
    attributed[1, 0, 3:6] = 1.0
    attributed[1, 1, 7] = -5.0
    city, colour = facts.latents_of_kinds(attributed, 0.9)
    assert city == [[0, 1, 2], []] and colour == [[3, 4, 5], []]
    assert facts.latents_of_kinds(attributed, 0.5)[0] == [[0, 1], []]
    sizes = torch.zeros(2, 50)
    sizes[0, :40] = 1.0
    belonging = [[*range(6)], []]
    draws = [facts.as_much_random(sizes, city, belonging, seed) for seed in range(5)]
    for drawn in draws:
        assert len(drawn[0]) == 3 and not set(drawn[0]) & set(belonging[0]) and max(drawn[0]) < 40 and not drawn[1]
    assert len({tuple(drawn[0]) for drawn in draws}) > 1
    sizes[0, 6:] /= 2  # smaller ones: as many more of them
    assert len(facts.as_much_random(sizes, city, belonging, 0)[0]) == 6
    sizes[0, 8:] = 0  # too few: all there are
    assert sorted(facts.as_much_random(sizes, city, belonging, 0)[0]) == [6, 7]


def test_latents_that_tell_a_kind_are_active_at_its_answers_and_add_to_them(load: Load) -> None:
    facts = load("memory_reads/ablate_facts.py")
    shares, attributed = torch.zeros(2, 1, 9), torch.zeros(2, 1, 9)
    shares[0, 0] = torch.tensor([1.0, 0.9, 0.9, 0.8, 1.0, 0.1, 0.0, 0.0, 0.0])
    shares[1, 0, 4] = 1.0  # active at everybody's answers, though it adds most to one kind's
    attributed[0, 0] = torch.tensor([0.1, 0.4, 0.3, 0.2, 9.0, 5.0, 0.0, 0.0, 0.0])
    assert facts.telling({"shares": shares, "attributed": attributed}, 0) == [(0, 1), (0, 2), (0, 3)]


def test_the_page_of_results_is_what_its_figures_say(load: Load) -> None:
    page = load("symbolic_results.py")
    docs = Path(page.__file__).parents[1] / "docs"
    lines = page.render(json.loads((docs / "symbolic.json").read_text(encoding="utf-8")))
    assert (docs / "symbolic_results.md").read_text(encoding="utf-8") == "\n".join(lines) + "\n"
    shown = [line.split("(")[1].rstrip(")") for line in lines if line.startswith("![")]
    assert shown and all((docs / name).exists() for name in shown)


def test_a_context_keeps_the_space_before_its_token_and_has_no_other_markup(load: Load) -> None:
    marked = load("symbolic_results.py").marked
    assert marked({"before": "the", "token": " huts", "after": " yonder"}) == "the <b>huts</b> yonder"
    assert marked({"before": "I saw M", "token": "'", "after": "ling *|_"}) == "I saw M<b>'</b>ling \\*\\|\\_"
    assert marked({"before": "end.", "token": "\n\n", "after": "A"}) == "end. <b>␣</b> A"


def test_doses_stand_in_the_page_beside_the_means_of_their_controls(load: Load) -> None:
    group = {"base": -3.0, "promoted": [" sea", "\n", "a_b"], "positions": 90, "values": [-3.0, -1.5],
             "controls": [[-3.0, -2.0], [-3.0, -4.0]], "directions": [[-3.0, -3.5]]}  # fmt: skip
    found = {"doses": [0.0, 1.0], "groups": {"latent 7": group}}
    lines = load("symbolic_results.py").promotion_table(found, {"measured": 8, "controls": 2})
    assert lines[-5:] == [
        "|  | as it is | dose 0 | dose 1 |",
        "| --- | --- | --- | --- |",
        "| latent 7: “sea”, “␣”, “a\\_b” | -3.000 | -3.000 | -1.500 |",
        "| random latents, mean | -3.000 | -3.000 | -3.000 |",
        "| random directions, mean | -3.000 | -3.000 | -3.500 |",
    ]


def test_the_measured_autoencoder_is_that_of_the_documented_command(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("symbolic.py")
    docs = Path(benchmark.__file__).parents[1] / "docs" / "symbolic.md"
    shown = next(
        line for line in docs.read_text(encoding="utf-8").splitlines() if line.startswith("senri-hf sae train")
    )
    documented = vars(benchmark.build_parser().parse_args(shown.split("#")[0].split()[1:]))
    settings = benchmark.settings_of_the_command()["train"]
    assert settings == {name: documented[name] for name in settings}
    # Where a default is another one, so is the folder.
    folder = benchmark.language_model_folder()
    monkeypatch.setattr("senri_hf.commands.sae.HELD_OUT_TEXT", ("dubliners",))
    assert benchmark.language_model_folder() != folder


def test_results_of_other_settings_are_not_taken(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("symbolic.py")
    runs = {name: benchmark.Run("train", "train_cyclic", *arguments)
            for name, arguments in {"0": (), "1": ("--steps", "7")}.items()}  # fmt: skip
    assert runs["0"].folder != runs["1"].folder
    made: list[int] = []

    def result(run: Any) -> dict[str, Any]:
        made.append(run.settings["steps"])
        return {"settings": {**run.settings, "output": "elsewhere"}}

    monkeypatch.setattr(benchmark.Run, "result", result)
    monkeypatch.setattr(benchmark, "store", lambda found: None)
    found: dict[str, Any] = {}
    benchmark.collect(found, "cyclic", runs, {"1"})
    assert made == [7] and set(found["cyclic"]) == {"1"}
    benchmark.collect(found, "cyclic", runs)
    assert made == [7, 3000]
    found["cyclic"]["1"]["settings"]["lr"] = 5.0
    benchmark.collect(found, "cyclic", runs)
    assert made == [7, 3000, 7]
