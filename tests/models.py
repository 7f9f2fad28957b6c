"""What the laws are tested on: tiny random models of every architecture, with every mechanism and its settings.

A new architecture, mechanism or setting joins all tests by an entry in the tables here.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from senri_hf import MemoryAdapterConfig, MemoryCache, pythia_layers, senri_layers
from senri_hf.adapters.mechanisms import MECHANISMS
from senri_hf.memory.owner import owners


VOCABULARY = 97
PAD, BOS, EOS = 0, 1, 2
HIDDEN = 32
MEMORY_LAYERS = [0, 2]

GROUPED = {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**GROUPED, "head_dim": 8}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
}

# Small, so that short texts complete segments, fill the slots and evict from them.
SMALL: dict[str, dict[str, Any]] = {
    "episodic": {"buffer_slots": 12, "store_slots": 6, "segment_length": 5, "predictor_rank": 8},
    "bank": {
        "num_memory_tokens": 24,
        "memory_init_std": 1.0,
        "use_chapters": True,
        "num_chapters": 6,
        "top_k_chapters": 2,
        "routing_window_size": 5,
    },
    "compressive": {"memory_slot_tokens": 7},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "episodic": {
        "default": {},
        "committed_segments": {"read_scope": "committed_segments"},
        "nll": {"surprise": "nll"},
        "zero": {"init": "zero"},
        "no_store": {"store_slots": 0},
    },
    "bank": {
        "default": {},
        "whole": {"use_chapters": False},
        "token": {"routing_strategy_inference": "token"},
        "rolling": {"routing_strategy_train": "rolling", "routing_strategy_inference": "rolling"},
        "per_layer": {"memory_sharing": "per_layer"},
        "block_b": {"memory_block_variant": "B"},
    },
    "compressive": {
        "default": {},
        "tokens": {"read_scope": "tokens"},
        "slots": {"read_scope": "tokens", "update_rule": "delta", "num_memories": 3},
        "gated slots": {"num_memories": 3},
        "segments": {"read_scope": "tokens", "update_rule": "corrected_delta", "memory_segment_length": 5},
        "zero": {"init": "zero", "activation": "silu", "memory_head_dim": 8},
    },
}


def tiny_model(arch: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of an architecture whose greedy text is varied."""
    config_class, model_class, own = ARCHITECTURES[arch]
    torch.manual_seed(seed)
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "tie_word_embeddings": False,
            **own,
            **settings,
        }
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
        model.get_input_embeddings().weight.normal_(std=0.1)
    return model


@dataclass(frozen=True)
class Subject:
    """An architecture with a mechanism and settings."""

    arch: str
    mechanism: str
    variant: str

    def __str__(self) -> str:
        return f"{self.arch}-{self.mechanism}-{self.variant}"

    @property
    def settings(self) -> dict[str, Any]:
        """What goes to the adapter's config."""
        return {**SMALL[self.mechanism], **SETTINGS[self.mechanism][self.variant]}

    @property
    def remembers(self) -> bool:
        """Whether what it reads is what was said; a bank is weights, and only what routes it is in the cache."""
        return self.mechanism != "bank"

    @property
    def reads_own_conversation(self) -> bool:
        """Whether a token reads what its own conversation wrote."""
        return self.settings.get("read_scope") in ("committed_segments", "tokens")

    @property
    def reads_nothing_for(self) -> int:
        """Tokens at the start of a first conversation that read nothing, though they could read it."""
        if self.mechanism == "episodic":
            return self.settings["segment_length"]
        if self.settings.get("update_rule", "gated_delta") == "gated_delta":
            return 0  # a token reads what it wrote itself
        return self.settings.get("memory_segment_length", 1)

    def fresh(self, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> PeftModel:
        """The model with an adapter as it is before any training."""
        base = tiny_model(self.arch, **(model or {}))
        torch.manual_seed(seed + 1)
        config = MemoryAdapterConfig(
            mechanism=self.mechanism, layers_to_transform=MEMORY_LAYERS, **{**self.settings, **settings}
        )
        return get_peft_model(base, config).eval()

    def plain(self, **settings: Any) -> PreTrainedModel:
        """The model without an adapter."""
        return tiny_model(self.arch, **settings)

    def build(self, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> PeftModel:
        """The model with an adapter as some training could leave it: what it reads changes the logits."""
        # The norms after Gemma's layers make much of little.
        return perturb(self.fresh(seed, model, **settings), seed, 0.15 if self.arch == "gemma3" else 0.5)

    @functools.cache  # noqa: B019
    def model(self) -> PeftModel:
        """A built model that tests share and must not change."""
        return self.build()


def perturb(model: PeftModel, seed: int = 0, strength: float = 0.5) -> PeftModel:
    """Move every weight of the memory, gates and outputs that start at zero included."""
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for owner in owners(model):
            for parameter in owner.parameters():  # type: ignore[attr-defined]
                scale = strength if parameter.dim() < 2 or not parameter.any() else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def senri(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings of a Senri model."""
    return {"layers": layers, "num_attention_heads": 4}


def tensor_memory(*layers: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Settings of a tensor memory model, of heads that write by the delta rule unless they say otherwise."""
    heads = [[{"eps": 1e-6, "use_delta_rule": True, **head} for head in layer] for layer in layers]
    return {"layers": heads, "bias": True, "normalize_qkv": False, **settings}


# Models that have their memory built in: what makes the tiny one of a family with each of its settings.
BUILT_IN: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "tensor_memory": {
        "default": lambda: tensor_memory([{"dim": 8}] * 4, [{"dim": 8}] * 4),
        "mixed": lambda: tensor_memory(
            [
                {"dim": 8, "decay": 0.5},
                {"dim": 12, "use_delta_rule": False},
                {"dim": 8, "decay": 0.5},
                {"dim": 6, "use_delta_rule": False, "decay": 0.9},
            ],
            [{"dim": 8}, {"dim": 16, "decay": 0.97}],
            intermediate_size=[48, 64],
            bias=[True, False],
        ),
        "clamped": lambda: tensor_memory(
            [{"dim": 8, "max_norm": 2.0, "decay": 0.9}, {"dim": 8, "max_delta": 0.5, "max_memory": 1.5}],
            [{"dim": 8, "use_delta_rule": False, "max_memory": 2.0}, {"dim": 8}],
            bias=False,
            normalize_qkv=True,
        ),
    },
    "senri": {
        "default": lambda: senri(senri_layers(1) + pythia_layers(1) + senri_layers(1)),
        "gated": lambda: senri(senri_layers(1, update_rule="gated_delta", memory_head_dim=8) + pythia_layers(2)),
        "slots": lambda: senri(
            pythia_layers(2) + senri_layers(1, num_memories=3, memory_head_dim=8, memory_slot_tokens=7)
        ),
        "segments": lambda: senri(
            senri_layers(2, update_rule="corrected_delta", memory_segment_length=5) + pythia_layers(1)
        ),
        "memory only": lambda: senri(
            senri_layers(1, use_delta_rule=False)
            + senri_layers(2, update_rule="gated_delta", memory_head_dim=8, num_memories=2, memory_slot_tokens=7)
        ),
    },
}


@dataclass(frozen=True)
class BuiltIn(Subject):
    """A family whose memory is built in, with settings: no adapter, and a first conversation reads itself."""

    def fresh(self, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> Any:
        torch.manual_seed(seed)
        special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 64}
        own = BUILT_IN[self.arch][self.variant]()
        config = AutoConfig.for_model(self.arch, **{**special, **sizes, **own, **(model or {}), **settings})
        return AutoModelForCausalLM.from_config(config).eval()

    def build(self, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> Any:
        built = self.fresh(seed, model, **settings)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.4)
            # Where they are the head too, strong ones say the same token again and again.
            built.get_input_embeddings().weight.normal_(std=0.1 if built.config.tie_word_embeddings else 0.5)
        return built

    @property
    def reads_own_conversation(self) -> bool:
        return True

    @property
    def settings(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class WithoutTraining(Subject):
    """An architecture as it is: its memory is keys and values that its own attention reads."""

    def fresh(self, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> Any:
        return tiny_model(self.arch, seed, **(model or {}))

    def build(self, seed: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> Any:
        return self.fresh(seed, model)

    @property
    def settings(self) -> dict[str, Any]:
        return {}


WITHOUT_TRAINING = [WithoutTraining(arch, "attention", "default") for arch in ARCHITECTURES]
# So small that short texts fill it.
FEW_SLOTS = {"slots": 24, "sinks": 2}
BUILT_IN_SUBJECTS = [BuiltIn(family, "built_in", variant) for family in BUILT_IN for variant in BUILT_IN[family]]


def subjects(arch: str, variants: Iterable[str] | None = None) -> list[Subject]:
    """An architecture with every mechanism and all of its settings, or some of them."""
    return [
        Subject(arch, mechanism, variant)
        for mechanism in MECHANISMS
        for variant in (SETTINGS[mechanism] if variants is None else variants)
        if variant in SETTINGS[mechanism]
    ]


# One architecture with everything, every other one with a mechanism's defaults.
SUBJECTS = subjects("llama") + [
    subject for arch in ARCHITECTURES if arch != "llama" for subject in subjects(arch, ["default"])
]
LLAMA = subjects("llama")
DEFAULTS = subjects("llama", ["default"])
REMEMBERING = [subject for subject in LLAMA if subject.remembers]


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [rows, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows [1, T] of different lengths as a batch with its mask and positions."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = (torch.full((len(rows), longest), fill) for fill in (PAD, 0))
    for index, row in enumerate(rows):
        columns = slice(longest - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[index, columns], mask[index, columns] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def feed(
    model: PeftModel, memory: MemoryCache, ids: Tensor, pieces: Sequence[int] | None = None, **kwargs: Any
) -> Tensor:
    """Logits of ids read in pieces of the given lengths, repeated as needed; whole when None."""
    if pieces is None:
        return model(input_ids=ids, past_key_values=memory, **kwargs).logits
    logits, start, turn = [], 0, 0
    while start < ids.shape[1]:
        stop = start + pieces[turn % len(pieces)]
        logits.append(model(input_ids=ids[:, start:stop], past_key_values=memory, **kwargs).logits)
        start, turn = stop, turn + 1
    return torch.cat(logits, dim=1)


def talk(
    model: PeftModel, memory: MemoryCache, conversations: Iterable[Tensor], pieces: Sequence[int] | None = None
) -> list[Tensor]:
    """Logits of conversations read one after another; the context is cleared after each."""
    logits = []
    for ids in conversations:
        logits.append(feed(model, memory, ids, pieces))
        memory.clear_context()
    return logits


def blank(model: Any, **settings: Any) -> MemoryCache:
    """A new memory; of a model without one of its own a small one without training."""
    return MemoryCache.for_model(model, **settings if owners(model) else {**FEW_SLOTS, **settings})


@torch.no_grad()
def remembering(
    model: Any, rows: int = 1, seed: int = 0, lengths: Sequence[int] = (23, 17), **settings: Any
) -> MemoryCache:
    """A memory of some conversations, with the context cleared."""
    memory = blank(model, **settings)
    talk(model, memory, [tokens(rows, length, seed + i) for i, length in enumerate(lengths)])
    return memory


def greedy(model: PeftModel, ids: Tensor, memory: MemoryCache, new: int = 12, **kwargs: Any) -> Tensor:
    """The new tokens of greedy decoding, [rows, new]; no token ends it unless given."""
    kwargs = {"eos_token_id": None, "attention_mask": torch.ones_like(ids), "do_sample": False} | kwargs
    out = model.generate(input_ids=ids, past_key_values=memory, max_new_tokens=new, **kwargs)
    return out[:, ids.shape[1] :]


def held_tensors(thing: Any) -> list[Tensor]:
    """All tensors that a memory layer or a cache keeps alive, wherever it keeps them; those of no model."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in seen or isinstance(thing, (torch.nn.Module, type)):
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(thing)
    return found


def held_storage(thing: Any) -> int:
    """Bytes of all of them, rollback included, whether they are counted or not."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_tensors(thing)}
    return sum(storages.values())


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = 2e-4) -> None:
    """Equal to float tolerance, relative to the largest value."""
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} and {list(theirs.shape)}"
    if ours.numel():
        error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
        assert error < tolerance, f"{what} differs by {error:.2g}"


def live_tensors(memory: MemoryCache | dict[str, Tensor]) -> dict[str, Tensor]:
    """What a memory holds; of a single row without the slots that stand empty because another row had more."""
    tensors = memory.state_dict() if isinstance(memory, MemoryCache) else memory
    live = tensors.get("attention.0.live")
    if live is None or live.shape[0] > 1:
        return tensors
    width, columns = live.shape[1], live[0].nonzero()[:, 0]

    def kept(tensor: Tensor) -> Tensor:
        axis = 2 if tensor.dim() == 4 else 1
        return tensor.index_select(axis, columns) if tensor.dim() > 1 and tensor.shape[axis] == width else tensor

    return {name: kept(tensor) for name, tensor in tensors.items()}


def assert_same_memory(ours: MemoryCache | dict[str, Tensor], theirs: MemoryCache | dict[str, Tensor]) -> None:
    """Equal integers, and floats equal to tolerance."""
    a, b = live_tensors(ours), live_tensors(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if tensor.is_floating_point():
            assert_close(tensor, b[name], name)
        else:
            assert torch.equal(tensor, b[name]), f"{name}: {tensor.tolist()} and {b[name].tolist()}"


def assert_identical_memory(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{name} changed"
