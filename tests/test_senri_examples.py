"""The examples of Senri: what they compute is what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch


PAGE = "<html><h1>題</h1><p>名前はまだ無い。どこで<em>生れた</em>か\n とんと見当がつかぬ。</p><p>短い。</p></html>"


def test_the_text_is_what_stands_in_paragraphs(load: Any, tmp_path: Path) -> None:
    japanese = load("senri_japanese/japanese.py")
    for name in ("ch01.ja.html", "ch10.ja.html"):
        (tmp_path / name).write_text(PAGE.replace("名前", name), encoding="utf-8")
    text, held_out = japanese.split(tmp_path)
    assert text == "ch01.ja.htmlはまだ無い。どこで生れたか とんと見当がつかぬ。" and "ch10" in held_out
    with pytest.raises(FileNotFoundError, match="apt-get install debian-reference-ja"):
        japanese.split(tmp_path / "nothing")


def test_no_text_is_unknown_to_a_tokenizer_of_bytes(load: Any) -> None:
    japanese = load("senri_japanese/japanese.py")
    tokenizer = japanese.train_tokenizer(["名前はまだ無い。"], 300)
    for text in (*load("senri_japanese/verify.py").TEXTS, "\x00\x7f", " \n\t"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token is None and tokenizer.pad_token == tokenizer.eos_token


def test_a_segment_is_read_with_what_earlier_ones_left(load: Any) -> None:
    """Carried memory changes later segments and not the first; a model without memory reads each by itself."""
    pretrain = load("senri_japanese/pretrain.py")
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    ids = torch.randint(0, 50, (2, 3 * pretrain.SEGMENT))
    layers = pretrain.senri_layers(1) + pretrain.pythia_layers(1)
    model = pretrain.SenriForCausalLM(pretrain.SenriConfig(layers=layers, **config)).eval()
    carried, empty = (torch.stack(pretrain.segment_losses(model, ids, carried=c)) for c in (True, False))
    assert carried[0] == empty[0] and not torch.equal(carried[1:], empty[1:])
    carried[1].backward()
    plain = pretrain.SenriForCausalLM(pretrain.SenriConfig(layers=pretrain.pythia_layers(2), **config)).eval()
    first = plain(ids[:, -pretrain.SEGMENT :], labels=ids[:, -pretrain.SEGMENT :], use_cache=False).loss
    torch.testing.assert_close(pretrain.segment_losses(plain, ids, carried=True)[-1], first)


def test_a_question_is_about_what_was_told(load: Any) -> None:
    reversal = load("reversal_curse/experiment.py")
    backward = torch.tensor([True, False] * 4)
    told, asked = reversal.draw(8, 4, torch.Generator().manual_seed(0), backward)
    assert told.shape == (8, 8) and asked.shape == (8, 4, 2)
    for row, pairs in enumerate(told.view(8, 4, 2).tolist()):
        assert sorted(pairs) == sorted(pair[::-1] if backward[row] else pair for pair in asked[row].tolist())
        assert all(person < reversal.PEOPLE <= thing for person, thing in pairs)


@torch.no_grad()
def test_what_is_told_reaches_the_answer_through_memory_alone(load: Any) -> None:
    reversal = load("reversal_curse/experiment.py")
    model = reversal.build(0, memory=True).eval()
    told, asked = reversal.draw(4, 4, torch.Generator().manual_seed(0), torch.zeros(4, dtype=torch.bool))
    other, _ = reversal.draw(4, 4, torch.Generator().manual_seed(1), torch.zeros(4, dtype=torch.bool))
    logits = reversal.answers(model, told, asked, apart=True)
    assert logits.shape == (16, reversal.VOCABULARY)
    assert not torch.equal(logits, reversal.answers(model, other, asked, apart=True))
    plain = reversal.build(0, memory=False).eval()
    alone = reversal.answers(plain, None, asked, apart=False)
    assert torch.equal(alone, plain(asked.flatten(1), use_cache=False).logits[:, ::2].flatten(0, 1))
    assert 0 <= reversal.read_backward(model)["right"] <= 1


def test_a_passkey_run_goes_on_where_it_stopped(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passkey = load("passkey.py")
    for name, value in {"CURRICULUM": (24, 48), "TOKENS": 96, "ASKED": {4096: 1}, "DEPTHS": (0.0, 0.7)}.items():
        monkeypatch.setattr(passkey, name, value)
    output, folder = tmp_path / "passkey.json", tmp_path / "checkpoints"
    command = ["passkey.py", "--steps", "4", "--lengths", "4096", "--checkpoints", folder, "--output", output]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    passkey.main()
    found = json.loads(output.read_text())
    (run,) = found.values()
    assert run["training"]["steps"] == 4 and output.with_suffix(".png").stat().st_size
    assert run["carried"]["4096"]["bytes of memory of a row"] == [2 * 2 * (32 * 32 + 32) * 4]
    monkeypatch.setattr(passkey, "ask", None)  # nothing is asked again
    output.with_suffix(".png").unlink()
    passkey.main()
    assert json.loads(output.read_text()) == found and output.with_suffix(".png").exists()


@torch.no_grad()
def test_a_passkey_is_asked_for_through_memory_alone(load: Any) -> None:
    """What is told before the last piece changes the answers where memory is carried, and there alone."""
    passkey = load("passkey.py")
    torch.manual_seed(0)
    model = passkey.build().eval()
    heard = []
    model.lm_head.register_forward_hook(lambda module, args, out: heard.append(out))
    for seed in (0, 0, 1):
        for carried in (True, False):
            passkey.ask(model, 2 * passkey.PIECE, 1, seed, carried=carried)
    first, again, other = (heard[1 + 3 * i] for i in range(3))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(heard[1], heard[2]) and heard[1].shape == heard[2].shape


def test_the_page_says_what_the_files_say(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = load("senri_results.py")
    committed = (page.DOCS / "senri_results.md").read_text(encoding="utf-8")
    assert "\n".join(page.render()) + "\n" == committed
    recall = page.stored("compressive")["recall"]
    better, default = (page.percent(recall[rule]["16"]) for rule in ("gated_delta", "delta"))
    readme, guide = ((page.DOCS.parent / name).read_text(encoding="utf-8") for name in ("README.md", "docs/senri.md"))
    assert f"{better} against {default}" in " ".join(readme.split())
    assert f"finds {better} of 16 pairs again where `delta` finds {default}" in " ".join(guide.split())
    monkeypatch.setattr(page, "DOCS", tmp_path)
    assert page.render().count("Not run yet.") == 8
