"""What other libraries do with our models: TRL trains it, lm-eval scores it. Each test needs its library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BuiltIn, Subject
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from senri_hf import MemoryTransformerConfig
from senri_hf.commands.main import main
from senri_hf.training import RouterLossMixin


WORDS = ["the", "dog", "cat", "sees", "a", "bird", "and", "runs", "home", "again"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("variant", ["gated", "memory only"])
def test_trl_trains_it(variant: str, packing: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """SFTTrainer calls the base model alone; packed documents come with positions that begin again."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = BuiltIn("senri", "built_in", variant).fresh()
    calls: list[dict[str, Any]] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    texts = [" ".join(WORDS[i % 5 :][: 3 + i % 4]) for i in range(24)]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, packing=packing, max_length=16, logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=True, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_dict({"text": texts})
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() > 1)
    if packing:
        positions = calls[0]["position_ids"]
        assert positions.shape[0] == 1 and int((positions == 0).sum()) > 1


def bank_model(home: str) -> Any:
    """A model with a routed bank whose router loss is at least 5: one of its own, or beside one that exists."""
    settings: dict[str, Any] = {
        "num_memory_tokens": 24, "use_chapters": True, "num_chapters": 6, "top_k_chapters": 2,
        "load_balance_coefficient": 5.0,
    }  # fmt: skip
    if home == "adapter":
        return Subject("llama", "bank", "default").build(load_balance_coefficient=5.0)
    config = MemoryTransformerConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("home", ["built in", "adapter"])
def test_trl_trains_the_routers_of_a_bank(home: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """SFTTrainer computes its loss from hidden states and leaves out theirs, which the mixin adds, once."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class BankSFTTrainer(RouterLossMixin, trl.SFTTrainer):
        pass

    data = Dataset.from_dict({"text": [" ".join(WORDS[i % 5 :]) for i in range(16)]})
    first: dict[str, float] = {}
    for trainer_class in (trl.SFTTrainer, BankSFTTrainer):
        model = bank_model(home)
        settings = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, max_length=16, logging_steps=1,
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = trainer_class(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        routers = [p for n, p in model.named_parameters() if "router" in n]
        before = [p.detach().clone() for p in routers]
        trainer.train()
        first[trainer_class.__name__] = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
        assert routers and not any(torch.equal(p, old) for p, old in zip(routers, before, strict=True))
    plain = first["SFTTrainer"]
    assert plain < 10
    assert plain + 4.9 < first["BankSFTTrainer"] < plain + 9  # of the coefficient 5, as often as a batch comes


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: Any) -> None:
    """Every question gets the choice that the model itself finds likelier."""
    pytest.importorskip("lm_eval")
    model = BuiltIn("senri", "built_in", "default").build()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = []
    for text in ("the dog sees", "a bird and the cat", "the cat runs"):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            scores = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits[0, -1].log_softmax(-1)
        choices = ["home", "again"]
        best = int(scores[[tokenizer.convert_tokens_to_ids(choice) for choice in choices]].argmax())
        rows.append({"text": text, "choices": choices, "label": best})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "likelier.yaml").write_text(
        f"""task: likelier
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    command = ["eval", "--checkpoint", str(tmp_path / "model"), "--include-path", str(tmp_path / "tasks")]
    out = tmp_path / "scores.json"
    assert main([*command, "--tasks", "likelier", "--batch-size", "2", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["likelier"]["acc,none"] == 1.0
    assert main([*command, "--tasks", "likelier,no_such_task"]) == 2
    assert "no_such_task" in capsys.readouterr().err


def test_eval_says_what_is_missing(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--checkpoint", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "senri_hf[eval]" in capsys.readouterr().err
