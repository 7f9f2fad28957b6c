"""A run from its file: model, tokenizer, data, arguments and trainer, and the folder that it leaves."""

import json
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters import add_lora, load_lora
from ..adapters.bank import BankAdapterConfig
from ..bases import KNOWN_BASES, converted_folder, load_base
from ..configuration import BankConfig
from ..configuration.memory_transformer import MemoryTransformerConfig
from ..configuration.run import ARCHITECTURE, OPTIMIZERS, RunConfig
from ..files import write_text
from .arguments import MemoryTrainingArguments
from .data import RowCollator, encode_chats, load_rows, pack_texts
from .language_model import LanguageModelTrainer, load_base_parameters


EFFECTIVE = "effective_config.yaml"
FINAL = "final_model"
BASE = "base"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run:
    """What a run is made of."""

    config: RunConfig
    model: Any
    tokenizer: PreTrainedTokenizerBase


def prepare(config: RunConfig) -> Run:
    """The model of a run, new memory and LoRA included, and its tokenizer."""
    torch.manual_seed(config.training.seed)
    if config.model.base_model_name is None:
        tokenizer = own_tokenizer(config)
        return Run(config, new_model(config, tokenizer), tokenizer)
    base, tokenizer = load_base_of(config)
    return Run(config, adapted(config, base), tokenizer)


def load_checkpoint(checkpoint: str | Path, config: RunConfig | None = None) -> Run:
    """A trained model from its folder: a final model, a checkpoint of a run, or what `senri-hf merge` wrote.

    Args:
        config: The run's settings; those beside the checkpoint when None.

    Raises:
        OSError: when there is no such folder, or no settings beside it.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise OSError(f"There is no checkpoint {folder}: expected a folder that senri-hf train or merge wrote")
    if config is None:
        settings = settings_file(folder)
        if settings is None:
            raise OSError(f"{folder} has no {EFFECTIVE} in or above it; give the run's settings with --config")
        config = RunConfig.load(settings)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if config.model.base_model_name is None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder if has_tokenizer else folder.parent / FINAL)
        return Run(config, attending(config, model).eval(), tokenizer)
    is_adapter = (folder / "adapter_config.json").is_file()
    if (folder / BASE).is_dir():  # a base that LoRA was merged into
        config.model = replace(config.model, base_model_name=str(folder / BASE))
    elif not is_adapter and (folder / "config.json").is_file():  # a base that was trained, and nothing added to it
        config.model = replace(config.model, base_model_name=str(folder))
    elif not is_adapter:
        raise OSError(f"{folder} holds neither an adapter nor a model: expected what senri-hf train or merge wrote")
    base, tokenizer = load_base_of(config)
    if has_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if is_adapter:
        base = PeftModel.from_pretrained(base, str(folder))
        # What an earlier run in the same place left stays out.
        if config.memory.has_memory and config.memory.has_lora and (folder / "lora").is_dir():
            load_lora(base, folder / "lora")
        if not config.model.freeze_base_model:
            load_base_parameters(base, folder)
    return Run(config, base.eval(), tokenizer)


def settings_file(checkpoint: str | Path) -> Path | None:
    """The settings of the run that wrote a checkpoint, in its folder or the one above; None where there are none."""
    folder = Path(checkpoint)
    places = (place / EFFECTIVE for place in (folder, folder.parent))
    return next((place for place in places if place.is_file()), None)


def load_base_of(config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model, checked against the sizes that were given, and its tokenizer."""
    model, section = config.model, config.training
    assert model.base_model_name is not None
    base: Any
    tokenizer: Any
    base, tokenizer = load_base(model.base_model_name, progress=False)
    sizes = base.config.get_text_config(decoder=True)
    for name, real in own_architecture(sizes).items():
        if name in config.given and getattr(model, name) != real:
            raise ValueError(
                f"{name}={getattr(model, name)} was given, but base_model_name={model.base_model_name!r} has "
                f"{'no such setting' if real is None else real}; a model that exists has its own architecture, leave "
                "it out"
            )
    longest = getattr(sizes, "max_position_embeddings", None)
    if longest is not None and section.max_length > longest:
        raise ValueError(
            f"max_length={section.max_length} was given, but the base model reads at most {longest} tokens"
        )
    if "attention_dropout" in config.given:
        sizes.attention_dropout = model.attention_dropout
        for module in base.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = model.attention_dropout
    if model.tokenizer_name is not None:
        tokenizer = tokenizer_named(model.tokenizer_name)
    return attending(config, base), with_padding(tokenizer)


def own_architecture(sizes: Any) -> dict[str, Any]:
    """What the config of a model says of its sizes, positions and norms, under the names of a run's settings."""
    rope = getattr(sizes, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # some have others for layers with a window
    return {
        **{ours: getattr(sizes, theirs, None) for ours, theirs in ARCHITECTURE.items()},
        "use_rope": bool(rope),
        "rope_theta": rope.get("rope_theta"),
        "use_rms_norm": hasattr(sizes, "rms_norm_eps"),
    }


def attending(config: RunConfig, model: Any) -> Any:
    """The model with the attention that `use_flash_attention` asks for."""
    model.set_attn_implementation(attention_implementation(config))
    return model


def attention_implementation(config: RunConfig) -> str:
    """FlashAttention 2 where it is installed and there is a GPU, else PyTorch's own fused attention; or eager.

    FlashAttention 2 keeps packed documents apart in batches of one row only: rows that are packed get PyTorch's.
    """
    if not config.model.use_flash_attention:
        return "eager"
    from transformers.utils import is_flash_attn_2_available

    is_packed = config.training.training_mode == "pretraining"
    is_served = torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if is_served and not is_packed else "sdpa"


def adapted(config: RunConfig, base: Any) -> Any:
    """The base model with the memory and the LoRA of a run; what is not trained is frozen."""
    memory, model = config.memory, config.model
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=memory.lora_rank,
        lora_alpha=memory.lora_alpha,
        lora_dropout=memory.lora_dropout,
        target_modules=list(memory.lora_targets),
    )
    peft_model: Any = base.requires_grad_(False)
    if memory.has_memory:
        settings = {f.name: getattr(memory, f.name) for f in fields(BankConfig)}
        if settings["memory_dropout"] is None:
            settings["memory_dropout"] = model.dropout
        count = base.config.get_text_config(decoder=True).num_hidden_layers
        peft_model = get_peft_model(
            base,
            BankAdapterConfig(
                task_type="CAUSAL_LM",
                layers_to_transform=memory.layers(count),
                memory_block_variant=memory.memory_block_variant,
                **settings,
            ),
        )
        if memory.has_lora:
            add_lora(peft_model, lora)
    elif memory.has_lora:
        peft_model = get_peft_model(base, lora)
    if not model.freeze_base_model:
        peft_model.requires_grad_(True)
    return peft_model


def new_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A memory transformer of the sizes that were given."""
    model, memory = config.model, config.memory
    if len(tokenizer) > model.vocab_size:
        raise ValueError(f"vocab_size={model.vocab_size} was given, but the tokenizer has {len(tokenizer)} tokens")
    settings = {f.name: getattr(memory, f.name) for f in fields(BankConfig)}
    placed = {
        name: getattr(memory, name)
        for name in (
            "memory_layer_placement",
            "memory_layer_k",
            "memory_layer_n",
            "memory_layer_indices",
            "memory_block_variant",
        )
    }
    return AutoModelForCausalLM.from_config(
        MemoryTransformerConfig(
            **settings,
            **placed,
            vanilla_mode=not memory.has_memory,
            hidden_size=model.hidden_dim,
            num_attention_heads=model.num_heads,
            num_hidden_layers=model.num_layers,
            intermediate_size=model.intermediate_dim,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_seq_len,
            use_rope=model.use_rope,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            dropout=model.dropout,
            attention_dropout=model.attention_dropout,
            rms_norm_eps=model.norm_eps,
            use_rms_norm=model.use_rms_norm,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        attn_implementation=attention_implementation(config),
    )


def own_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model: the one that is named, else one trained on the run's text."""
    if config.model.tokenizer_name is not None:
        return with_padding(tokenizer_named(config.model.tokenizer_name))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    training = config.training
    if training.training_mode != "pretraining":
        raise ValueError("instruction_finetuning needs a tokenizer with a chat template: set tokenizer_name")
    rows = load_rows(dataset_name(config), training.dataset_subset, training.dataset_split)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.model.vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row[training.text_field] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tokenizer_named(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model that the package knows, of a folder or of a Hub id."""
    known = KNOWN_BASES.get(name)
    tokenizer: Any = AutoTokenizer.from_pretrained(converted_folder(known, progress=False) if known else name)
    if known is not None and known.chat_template and tokenizer.chat_template is None:
        tokenizer.chat_template = known.chat_template
    return tokenizer


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads with its end token where it has no padding token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dataset_name(config: RunConfig) -> str:
    """The data set, or a ValueError that says how to name one."""
    if config.training.dataset_name is None:
        raise ValueError(
            "dataset_name was not given: name a file (.txt, .jsonl, .parquet, …), a data set on the Hub, ordinary_text "
            "or recall"
        )
    return config.training.dataset_name


def encoded(run: Run, split: str) -> list[dict[str, list[int]]]:
    """A split as rows of tokens, as the training mode has them."""
    training = run.config.training
    rows = load_rows(dataset_name(run.config), training.dataset_subset, split)
    encode = pack_texts if training.training_mode == "pretraining" else encode_chats
    result = encode(rows, run.tokenizer, training.text_field, training.max_length)
    if not result:
        raise ValueError(
            f"The split {split!r} of {training.dataset_name} gives no row of max_length={training.max_length} tokens; "
            "lower max_length, or use more data"
        )
    return result


def collator(run: Run) -> RowCollator:
    """What makes batches of the rows."""
    pad: Any = run.tokenizer.pad_token_id
    hybrid = run.config.memory.has_memory and "hybrid" in run.config.memory.routing_strategies
    return RowCollator(pad, with_prompt_lengths=hybrid)


def arguments(config: RunConfig) -> MemoryTrainingArguments:
    """The training arguments of a run.

    Raises:
        ValueError: when it was started with another number of processes than `num_gpus`, or otherwise than
            `distributed_strategy` says.
    """
    section = config.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "num_gpus" in config.given and processes != section.num_gpus:
        raise ValueError(
            f"num_gpus={section.num_gpus} was given, but there are {processes} process(es): start the run with "
            f"accelerate launch --num_processes {section.num_gpus} -m senri_hf.commands.main train …"
        )
    sharding: dict[str, Any] = {}
    if shards(config):
        sharding = {
            "fsdp": True,
            "fsdp_config": {"version": 2, "reshard_after_forward": section.fsdp_sharding_strategy == "FULL_SHARD"},
        }
    evaluates = section.eval_split is not None
    return MemoryTrainingArguments(
        output_dir=section.output_dir,
        memory_lr=section.memory_lr,
        lora_lr=section.lora_lr,
        base_model_lr=section.base_model_lr,
        learning_rate=section.base_model_lr,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        max_steps=section.max_steps,
        warmup_steps=section.warmup_steps,
        optim=OPTIMIZERS.get(section.optimizer, section.optimizer),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        lr_scheduler_type=section.scheduler,
        min_lr_ratio=section.min_lr_ratio,
        bf16=section.mixed_precision == "bf16",
        fp16=section.mixed_precision == "fp16",
        activation_checkpointing=section.gradient_checkpointing,
        save_steps=section.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=section.eval_steps,
        save_total_limit=section.save_total_limit,
        load_best_model_at_end=section.save_best_model,
        metric_for_best_model="eval_loss" if section.save_best_model else None,
        greater_is_better=False if section.save_best_model else None,
        logging_steps=section.logging_steps,
        report_to=["wandb"] if section.log_to_wandb else [],
        run_name=section.wandb_run_name,
        seed=section.seed,
        prediction_loss_only=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        **sharding,
    )


def shards(config: RunConfig) -> bool:
    """Whether FSDP is asked for, in the settings or by `accelerate launch --use_fsdp`."""
    memory, asked = config.memory, config.training.distributed_strategy
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if launched and asked == "ddp" and "distributed_strategy" in config.given:
        raise ValueError(
            "distributed_strategy=ddp was given, but the run was started with accelerate launch --use_fsdp"
        )
    if not launched and asked != "fsdp":
        return False
    if config.model.base_model_name is not None and memory.has_memory and memory.memory_sharing != "per_layer":
        raise ValueError(
            f"memory_sharing={memory.memory_sharing} was given with FSDP, which frees the weights of a layer once "
            "it is done, those of a bank that other layers read included; use memory_sharing=per_layer, or ddp"
        )
    return True


def trainer_of(run: Run) -> LanguageModelTrainer:
    """The trainer of a run, with its data."""
    section = run.config.training
    callbacks: list[Any] = []
    if section.early_stopping:
        callbacks.append(EarlyStoppingCallback(section.early_stopping_patience, section.early_stopping_threshold))
    trainer = LanguageModelTrainer(
        model=run.model,
        args=arguments(run.config),
        train_dataset=encoded(run, section.dataset_split),
        eval_dataset=None if section.eval_split is None else encoded(run, section.eval_split),
        data_collator=collator(run),
        processing_class=run.tokenizer,
        callbacks=callbacks,
    )
    # However it was launched: what is written beside the run is what was in force.
    section.num_gpus = trainer.args.world_size
    section.distributed_strategy = "fsdp" if trainer.is_fsdp_enabled else "ddp"
    return trainer


def wrapped_in(trainer: LanguageModelTrainer) -> str:
    """How the processes of a run that was trained shared its model, as a line."""
    parameters = list(trainer.model_wrapped.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
    return (
        f"{trainer.args.world_size} process(es) trained a {type(trainer.model_wrapped).__name__}, {sharded} of "
        f"{len(parameters)} parameters sharded"
    )


def checkpoint_to_resume(folder: Path) -> Path:
    """The checkpoint to go on from: `folder` itself, or the latest one in the folder of a run.

    One that was being written when its run was killed is passed by.

    Raises:
        OSError: when there is none.
    """
    if not folder.is_dir():
        raise OSError(f"resume_from_checkpoint={folder} was given, but there is no such folder")
    if is_whole(folder):
        return folder
    whole = [place for place in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_whole(place)]
    if not whole:
        raise OSError(
            f"resume_from_checkpoint={folder} was given, but it neither is a whole checkpoint nor holds one; name the "
            "folder of a run, whose latest whole checkpoint is taken, or begin anew"
        )
    return max(whole, key=lambda place: int(place.name.rpartition("-")[2]))


def check_unused(folder: Path) -> None:
    """ValueError where the folder of a run that begins anew holds checkpoints of another."""
    if any(is_whole(place) for place in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(
            f"output_dir={folder} holds checkpoints of an earlier run; go on from them with --resume {folder}, name "
            "another output_dir, or remove them"
        )


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint was written: a `Trainer` writes its own state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def save(run: Run, trainer: LanguageModelTrainer) -> Path:
    """Write the final model, in `save_precision`, with its tokenizer and settings; returns its folder."""
    folder = Path(run.config.training.output_dir) / FINAL
    scratch = folder.with_name(f".{FINAL}")
    if trainer.args.should_save:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed while it wrote
    precision = run.config.training.save_precision
    if precision is not None:
        trainer.accelerator.unwrap_model(trainer.model).to(DTYPES[precision])
    trainer.save_model(str(scratch))
    if trainer.args.should_save:
        write_effective(run.config, scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    return folder


def write_effective(config: RunConfig, folder: Path) -> None:
    """Write the settings that are in force into a folder."""
    write_text(folder / EFFECTIVE, config.effective())
