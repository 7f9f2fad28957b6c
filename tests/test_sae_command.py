"""`senri-hf sae`."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BuiltIn, tiny_model
from sparse import Letters, autoencoder

from senri_hf import SparseAutoencoder
from senri_hf.commands.main import build_parser, main
from senri_hf.interpretability import module_activations, peak_activations


def test_the_command_trains_resumes_measures_shows_and_exchanges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_for = []

    def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
        asked_for.append(arguments.model)
        return tiny_model("llama"), Letters()

    monkeypatch.setattr("senri_hf.commands.sae.load", load)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    other.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 9)
    sizes = ["--piece", "16", "--rows", "4"]
    of_text = ["--text", str(other), *sizes]
    train = ["sae", "train", "--model", "tiny", "--module", "model.layers.1", "--expansion-factor", "2", "--k", "4",
             "--batch-size", "64", "--buffer-size", "400", "--save-every", "4", *sizes]  # fmt: skip
    train += ["--text", str(text), "--output", str(tmp_path / "sae")]
    assert main([*train, "--steps", "4"]) == 0
    assert main([*train, "--steps", "8", "--resume"]) == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert sae.config.hook_name == "model.layers.1" and sae.W_dec.shape == (64, 32)
    training = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert training["log"][-1]["step"] == 8 and training["cpu_seconds"] > 0 and training["seconds"] > 0
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--output", str(tmp_path / "found.json"), *of_text]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["l0"] > 0 and len(found["density"]) == 64 and "kl_recovered" in found
    assert (
        main(["sae", "contexts", str(tmp_path / "sae"), "--latents", "3", "--top", "2", "--pieces", "9", *of_text]) == 0
    )
    assert "latent 3, active at" in capsys.readouterr().out
    assert main(["sae", "export", str(tmp_path / "sae"), str(tmp_path / "lens")]) == 0
    assert main(["sae", "import", str(tmp_path / "lens"), str(tmp_path / "back")]) == 0
    x = torch.randn(5, 32)
    torch.testing.assert_close(
        SparseAutoencoder.from_pretrained(tmp_path / "back").eval().encode(x),
        sae.eval().encode(x),
        rtol=1e-4,
        atol=1e-4,
    )
    capsys.readouterr()
    (tmp_path / "copy.txt").write_text(text.read_text())
    monkeypatch.chdir(tmp_path)
    for seen in (str(text), "text.txt", "copy.txt"):  # the same text by any name
        for action, own in (("evaluate", []), ("doses", ["--measured-tokens", "16"])):
            assert main(["sae", action, str(tmp_path / "sae"), "--text", str(other), seen, *sizes, *own]) == 2
            assert "the autoencoder was trained on it" in capsys.readouterr().err
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--text", str(other), "--piece", "6000"]) == 2
    assert "shorter than one piece of 6000 tokens" in capsys.readouterr().err
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--text", "no-such-book"]) == 2
    assert "no-such-book" in capsys.readouterr().err
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--pieces", "0", *of_text]) == 2
    assert "--pieces 0" in capsys.readouterr().err
    assert set(asked_for) == {"tiny"}
    for action in ("evaluate", "contexts", "doses"):
        given = ["--measured-tokens", "16"] if action == "doses" else []
        assert main(["sae", action, str(tmp_path / "sae"), "--model", "another", *of_text, *given]) == 2
        assert "--model another was given, but the autoencoder was trained on tiny" in capsys.readouterr().err
    sae.config.model_name = None
    sae.save_pretrained(tmp_path / "nameless")
    assert main(["sae", "contexts", str(tmp_path / "nameless"), *of_text]) == 2
    assert "give --model" in capsys.readouterr().err
    given = ["--model", "another", "--pieces", "2", "--count", "1", *of_text]
    assert main(["sae", "contexts", str(tmp_path / "nameless"), *given]) == 0 and asked_for[-1] == "another"


def test_the_command_trains_on_what_a_built_in_memory_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BuiltIn("senri", "built_in", "default").model()
    monkeypatch.setattr("senri_hf.commands.sae.load", lambda arguments: (model, Letters()))
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    (tmp_path / "other.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 9)
    sizes = ["--piece", "32", "--rows", "4"]
    of_text = ["--text", str(tmp_path / "other.txt"), *sizes]
    train = ["sae", "train", "--module", "model.layers.0.memory", "--output", str(tmp_path / "sae"), "--steps", "3"]
    assert main([*train, "--k", "4", "--batch-size", "64", "--buffer-size", "400", "--text", str(text), *sizes]) == 0
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--output", str(tmp_path / "found.json"), *of_text]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["l0"] > 0 and found["kl_zero"] > 0


def test_a_folder_in_use_is_resumed_with_the_same_settings_or_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("senri_hf.commands.sae.load", lambda arguments: (tiny_model("llama"), Letters()))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    train = ["sae", "train", "--module", "model.layers.1", "--k", "4", "--batch-size", "64", "--buffer-size", "400",
             "--piece", "16", "--save-every", "2", "--text", "text.txt", "--output", "sae"]  # fmt: skip
    assert main([*train, "--steps", "2"]) == 0
    held = {path: path.read_bytes() for path in Path("sae").rglob("*") if path.is_file()}
    Path("text.txt").rename("moved.txt")
    Path("text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    refusals = {
        "in use: go on with --resume": [],
        "k=4, not 5": ["--resume", "--text", "moved.txt", "--k", "5"],
        "variant='batchtopk', not 'topk'": ["--resume", "--variant", "topk"],
        "text={": ["--resume"],  # another text by the same name
    }
    for message, changes in refusals.items():
        assert main([*train, *changes]) == 2
        assert message in capsys.readouterr().err
    Path("elsewhere").mkdir()
    Path("elsewhere/notes.txt").touch()
    assert main([*train, "--resume", "--output", "elsewhere"]) == 2
    assert "elsewhere has no settings.json" in capsys.readouterr().err
    assert held == {path: path.read_bytes() for path in Path("sae").rglob("*") if path.is_file()}
    Path("moved.txt").rename("text.txt")
    assert main([*train, "--steps", "4", "--resume"]) == 0
    assert json.loads(Path("sae/settings.json").read_text())["steps"] == 4


def test_what_is_measured_on_by_default_is_not_trained_on() -> None:
    parsed = {
        action: vars(build_parser().parse_args(["sae", action, *more]))
        for action, more in {
            "train": ["--module", "m", "--output", "o"],
            "evaluate": ["o"],
            "contexts": ["o"],
            "doses": ["o"],
        }.items()
    }
    trained = set(parsed.pop("train")["text"])
    assert len(parsed) == 3 and all(trained.isdisjoint(of["text"]) for of in parsed.values())


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """An autoencoder's folder, of a tiny model, and the arguments that say which text is held out."""
    monkeypatch.setattr("senri_hf.commands.sae.load", lambda arguments: (tiny_model("llama"), Letters()))
    letters = torch.randint(97, 123, (700,)).tolist()
    text = "".join(map(chr, letters))
    (tmp_path / "other.txt").write_text(text)
    sae = autoencoder(hook_name="model.layers.1", model_name="tiny", skip_positions=1)
    read = [{"input_ids": torch.tensor(Letters()(text)["input_ids"][:688]).view(43, 16)}]
    (x,) = module_activations(tiny_model("llama"), "model.layers.1", read, skip_positions=1)
    with torch.no_grad():  # active at 0.3% to 12% of the tokens
        for latent, share in enumerate(torch.linspace(0.003, 0.12, 48)):
            pre_activations = (x * sae.activation_scale - sae.b_dec) @ sae.W_enc[:, latent]
            sae.b_enc[latent] = -pre_activations.quantile(1 - share)
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae", ["--text", str(tmp_path / "other.txt"), "--piece", "16"]


def test_doses_of_the_latents_that_contexts_shows_are_measured_in_other_text(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder, of_text = trained
    assert main(["sae", "contexts", str(folder), *of_text, "--output", str(tmp_path / "contexts.json")]) == 0
    shown = {entry["latent"]: entry for entry in json.loads((tmp_path / "contexts.json").read_text())}
    capsys.readouterr()
    doses = ["sae", "doses", str(folder), *of_text, "--measured", "3", "--measured-tokens", "12", "--controls", "2"]
    assert main([*doses, "--count", "2", "--output", str(tmp_path / "doses.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "doses.json").read_text())
    assert found["mode"] == "clamp" and found["doses"] == [0, 0.25, 0.5, 1, 2]
    groups = found["groups"]
    assert list(groups) == [f"latent {latent}" for latent in list(shown)[:2]]
    for name, group in groups.items():
        of_latent = shown[group["latents"][0]]
        assert group["density"] == pytest.approx(of_latent["density"])
        assert group["unit"] == pytest.approx(of_latent["contexts"][0]["value"], abs=1e-3)
        assert 1 <= len(group["promoted"]) == len(group["tokens"]) <= 5
        assert 0 < group["positions"] <= 3 * 11 and group["base"] < 0
        lines = [group["values"], *group["controls"], *group["directions"]]
        assert len(lines) == 5 and all(len(values) == 5 for values in lines)
        assert f"{name}, active at" in printed and f"{group['values'][-1]:9.3f}" in printed
    assert (tmp_path / "doses.png").read_bytes().startswith(b"\x89PNG")
    named = list(groups.values())[1]["latents"]
    again = [*doses, "--latents", *map(str, named), "--doses", "1", "--output", str(tmp_path / "one.json")]
    assert main(again) == 0
    (alone,) = json.loads((tmp_path / "one.json").read_text())["groups"].values()
    assert alone["latents"] == named and alone["values"] == pytest.approx(list(groups.values())[1]["values"][3:4])


def test_what_doses_promote_followed_in_no_piece_that_is_measured(
    trained: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, of_text = trained
    seen: dict[str, Any] = {}

    def promotion_doses(*given: Any, **_: Any) -> Any:
        seen["promoted"], seen["batches"] = given[3], given[4]
        return {"doses": [], "groups": {}}

    monkeypatch.setattr("senri_hf.interpretability.promotion_doses", promotion_doses)
    assert (
        main(["sae", "doses", str(folder), *of_text, "--measured", "30", "--count", "20", "--measured-tokens", "16"])
        == 0
    )
    text = Path(of_text[1]).read_text()
    pieces = [piece for piece in torch.tensor(Letters()(text)["input_ids"]).split(16) if len(piece) == 16]
    measured = {tuple(row) for batch in seen["batches"] for row in batch["input_ids"].tolist()}
    assert len(measured) == 30
    others = [piece for piece in pieces if tuple(piece.tolist()) not in measured]
    sae = SparseAutoencoder.from_pretrained(folder).eval()
    batches = [{"input_ids": torch.stack(others)}]
    peaks = peak_activations(tiny_model("llama"), "model.layers.1", sae, batches, top=5 + len(others))
    every = [{"input_ids": torch.stack(pieces)}]
    shown = peak_activations(tiny_model("llama"), "model.layers.1", sae, every).sample(20)
    followed = {latent: peaks.followers(latent)[:5] for latent in shown}
    # The rarest latent is active too rarely, and passed over.
    assert seen["promoted"] == {latent: tokens for latent, tokens in followed.items() if len(tokens) >= 3}
    assert 1 < len(seen["promoted"]) < len(shown) == 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--measured", "0"], "--measured 0"),
        (["--measured", "99"], "some of 43 pieces are for contexts"),
        (["--measured-tokens", "17"], "--measured-tokens 17 of pieces with --piece 16"),
        (["--top", "2"], "--top 2 was given, but it is at least 3"),
        (["--count", "0"], "--count 0"),
        (["--controls", "0"], "--controls 0"),
        (["--latents", "48"], "latents 0 to 47"),
        (["--latents", "0", "--pieces", "4"], "Latents 0 are active in fewer than 3 pieces"),
        (["--output", "doses.png"], "a .json is due"),
    ],
)
def test_doses_refuse_what_is_of_no_use(
    trained: tuple[Path, list[str]], given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, of_text = trained
    assert main(["sae", "doses", str(folder), *of_text, "--measured", "2", "--measured-tokens", "16", *given]) == 2
    assert message in capsys.readouterr().err
