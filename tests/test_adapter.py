"""A memory adapter is an ordinary PEFT adapter: added, saved, loaded, switched, removed and copied as all are."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, HIDDEN, MEMORY_LAYERS, SMALL, assert_close, perturb, remembering, tiny_model, tokens
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from senri_hf import MemoryAdapterConfig, MemoryCache
from senri_hf.adapters import MemoryTuner
from senri_hf.adapters.decoder import attention_weights, find_decoder_layers
from senri_hf.adapters.episodic import EpisodicAdapterConfig
from senri_hf.adapters.layer import MemoryAdapterLayer
from senri_hf.memory import file
from senri_hf.memory.attention_layer import AttentionMemoryLayer
from senri_hf.memory.decoder import find_decoder


IDS = tokens(1, 7, seed=9)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def settings(**changes: Any) -> MemoryAdapterConfig:
    """A small memory's config."""
    return MemoryAdapterConfig(**{"layers_to_transform": MEMORY_LAYERS, **SMALL["episodic"], **changes})


def adapted(base: PreTrainedModel, seed: int = 0, **changes: Any) -> PeftModel:
    """A model with an adapter as some training could leave it."""
    return perturb(get_peft_model(base, settings(**changes)).eval(), seed)


@torch.no_grad()
def plain(model: nn.Module) -> Tensor:
    """Logits without a memory."""
    return model(input_ids=IDS).logits


@torch.no_grad()
def reading(model: PreTrainedModel | PeftModel, memory: MemoryCache | dict[str, Tensor]) -> Tensor:
    """Logits with a memory, or with one of this state; the memory stays as it is."""
    if isinstance(memory, dict):
        state, memory = memory, MemoryCache.for_model(model)
        memory.load_state_dict(state)
    return model(input_ids=IDS, past_key_values=memory.snapshot()).logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's tensors by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks_of(model: nn.Module) -> int:
    """How many hooks a model's modules have."""
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names in the same order and the same bits."""
    return list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@dataclass
class Trained:
    """An adapter in a folder, its base model in another, and what it answers from a memory."""

    arch: str
    base_folder: Path
    folder: Path
    memory: dict[str, Tensor]
    logits: Tensor
    base_logits: Tensor

    def base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base_folder)


@pytest.fixture(scope="module")
def make_trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """The trained adapter of an architecture, made once."""
    made: dict[str, Trained] = {}

    def make(arch: str) -> Trained:
        if arch not in made:
            root = tmp_path_factory.mktemp(arch)
            tiny_model(arch).save_pretrained(root / "base")
            base = AutoModelForCausalLM.from_pretrained(root / "base")
            base_logits = plain(base)
            model = adapted(base)
            model.save_pretrained(root / "adapter")
            memory = remembering(model)
            made[arch] = Trained(
                arch, root / "base", root / "adapter", memory.state_dict(), reading(model, memory), base_logits
            )
            assert not torch.allclose(made[arch].logits, base_logits)
        return made[arch]

    return make


@pytest.fixture
def trained(make_trained: Callable[[str], Trained], arch: str) -> Trained:
    return make_trained(arch)


@pytest.fixture
def llama(make_trained: Callable[[str], Trained]) -> Trained:
    return make_trained("llama")


# Added and removed.


@every_architecture
def test_base_weights_and_names_stay_as_they_were(arch: str) -> None:
    base = tiny_model(arch)
    before = state_of(base)
    model = get_peft_model(base, settings())
    after = model.state_dict()
    assert all(torch.equal(after[f"base_model.model.{name}"], tensor) for name, tensor in before.items())
    added = after.keys() - {f"base_model.model.{name}" for name in before}
    assert added and all(".memory_adapter.senri_block.default." in name for name in added)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


@every_architecture
def test_unload_gives_the_base_model_back(arch: str) -> None:
    base = tiny_model(arch)
    plain(base)
    before, hooks, logits = state_of(base), hooks_of(base), plain(base)
    model = adapted(base)
    reading(model, remembering(model))
    assert hooks_of(base) > hooks
    unloaded = model.unload()
    assert unloaded is base
    assert identical(base.state_dict(), before)
    assert hooks_of(base) == hooks
    assert not any(hasattr(module, name) for module in base.modules() for name in ("memory_adapter", "memory_context"))
    assert not hasattr(base, "peft_config")
    assert torch.equal(plain(base), logits)
    again = adapted(base)
    assert not torch.equal(reading(again, remembering(again)), logits)
    again.unload()
    assert hooks_of(base) == hooks


def test_unload_without_any_adapter_left() -> None:
    base = tiny_model("llama")
    before, hooks = state_of(base), hooks_of(base)
    model = get_peft_model(base, settings())
    model.delete_adapter("default")
    assert torch.equal(plain(model.base_model), plain(tiny_model("llama")))
    assert identical(model.unload().state_dict(), before)
    assert hooks_of(base) == hooks


# Saved and loaded.


@every_architecture
def test_a_saved_adapter_holds_nothing_of_the_base(trained: Trained) -> None:
    assert {file.name for file in trained.folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    weights = load_file(trained.folder / "adapter_model.safetensors")
    assert weights and all(".memory_adapter.senri_block." in name and "default" not in name for name in weights)
    assert not any(name.endswith(("base_weight", "base_bias")) for name in weights)
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == MEMORY_LAYERS
    assert config["peft_type"] == "SENRI"
    assert not config.get("target_modules")
    assert not any(name in json.dumps(config) for name in ("model.layers", "gpt_neox.layers"))
    loaded = PeftConfig.from_pretrained(str(trained.folder))
    assert isinstance(loaded, MemoryAdapterConfig)
    assert loaded.buffer_slots == SMALL["episodic"]["buffer_slots"]


def into_added(trained: Trained) -> PeftModel:
    """Weights put into an adapter that was added anew."""
    model = get_peft_model(trained.base(), settings()).eval()
    loaded = set_peft_model_state_dict(model, load_peft_weights(str(trained.folder), device="cpu"))
    assert not loaded.unexpected_keys
    return model


def by_transformers(trained: Trained, **kwargs: Any) -> PreTrainedModel:
    model = trained.base()
    model.load_adapter(str(trained.folder), **kwargs)
    return model.eval()


LOADERS: dict[str, Callable[[Trained], Any]] = {
    "PeftModel": lambda t: PeftModel.from_pretrained(t.base(), t.folder),
    "PeftModel, other name": lambda t: PeftModel.from_pretrained(t.base(), t.folder, adapter_name="other"),
    "PeftModel, low memory": lambda t: PeftModel.from_pretrained(t.base(), t.folder, low_cpu_mem_usage=True),
    "PeftModel, to train on": lambda t: PeftModel.from_pretrained(t.base(), t.folder, is_trainable=True).eval(),
    "AutoPeftModel": lambda t: AutoPeftModelForCausalLM.from_pretrained(t.folder),
    "AutoModel": lambda t: AutoModelForCausalLM.from_pretrained(t.folder),
    "load_adapter": by_transformers,
    "load_adapter, other name": lambda t: by_transformers(t, adapter_name="mine"),
    "set_peft_model_state_dict": into_added,
}
TRAINABLE = ("PeftModel, to train on", "set_peft_model_state_dict")


@every_architecture
@pytest.mark.parametrize("way", LOADERS)
def test_every_way_to_load_gives_the_same_answer(trained: Trained, way: str) -> None:
    model = LOADERS[way](trained)
    assert torch.equal(reading(model, trained.memory), trained.logits)
    assert torch.equal(plain(model), trained.base_logits)
    assert any(p.requires_grad for p in model.parameters()) == (way in TRAINABLE)


@every_architecture
def test_transformers_own_adapter_methods(trained: Trained, tmp_path: Path) -> None:
    model = trained.base()
    model.add_adapter(settings(), adapter_name="fresh")
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        model.load_adapter(str(trained.folder), adapter_name="mine")
    model.eval()
    state = {key.replace("default.", "mine.", 1): tensor for key, tensor in trained.memory.items()}
    memory = MemoryCache.for_model(model)
    memory.load_state_dict(dict(state) | {key.replace("mine", "fresh", 1): tensor for key, tensor in state.items()})
    model.set_adapter("mine")
    assert torch.equal(reading(model, memory), trained.logits)
    model.disable_adapters()
    assert torch.equal(reading(model, memory), trained.base_logits)
    model.enable_adapters()
    assert torch.equal(reading(model, memory), trained.logits)
    model.set_adapter("fresh")
    assert torch.equal(reading(model, memory), trained.base_logits)  # gates are still closed
    model.set_adapter(["fresh", "mine"])
    assert torch.equal(reading(model, memory), trained.logits)
    model.delete_adapter("fresh")
    model.set_adapter("mine")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    theirs = load_file(trained.folder / "adapter_model.safetensors")
    assert saved.keys() == theirs.keys() and all(torch.equal(saved[name], theirs[name]) for name in saved)
    model.delete_adapter("mine")
    assert torch.equal(plain(model), trained.base_logits)
    assert not any("senri_block" in name for name in model.state_dict())


def test_a_model_for_causal_lm_generates_from_memory(llama: Trained) -> None:
    model = adapted(llama.base(), task_type="CAUSAL_LM")
    assert type(model).__name__ == "PeftModelForCausalLM"
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    out = model.generate(input_ids=IDS, past_key_values=remembering(model), **arguments)
    same = model.base_model.model.generate(input_ids=IDS, past_key_values=remembering(model), **arguments)
    assert torch.equal(out, same)


@every_architecture
def test_modules_to_save_are_saved_and_loaded(trained: Trained, tmp_path: Path) -> None:
    model = adapted(trained.base(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    memory = remembering(model)
    model.save_pretrained(tmp_path)
    extra = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "memory_adapter" not in name]
    assert extra == ["base_model.model.lm_head.weight"]
    loaded = PeftModel.from_pretrained(trained.base(), tmp_path)
    assert torch.equal(reading(loaded, memory.state_dict()), reading(model, memory))
    with model.disable_adapter():
        assert torch.equal(reading(model, memory), trained.base_logits)


def test_the_models_own_surprise_is_that_of_its_trained_head(llama: Trained) -> None:
    def surprise(scale: float, **changes: Any) -> Tensor:
        model = get_peft_model(llama.base(), settings(surprise="nll", **changes)).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
        return remembering(model).state_dict()["default.2.surprise_mean"]

    assert torch.equal(surprise(1.5, modules_to_save=["lm_head"]), surprise(1.5))
    assert not torch.equal(surprise(1.5), surprise(1.0))


# Several adapters.


def two_adapters(**changes: Any) -> PeftModel:
    """A model with the adapters `a`, which is active, and `b`."""
    model = get_peft_model(tiny_model("llama"), settings(**changes), adapter_name="a")
    model.add_adapter("b", settings(**changes))
    return perturb(model.eval())


def seen(memory: MemoryCache) -> dict[str, list[int]]:
    """Tokens that the memories of each adapter took in, layer by layer."""
    counts: dict[str, list[int]] = {}
    for layer in memory.memory_layers:
        counts.setdefault(layer.adapter_name, []).append(0 if layer.tokens_seen is None else int(layer.tokens_seen))
    return counts


def test_adapters_hold_memories_of_their_own_in_one_cache() -> None:
    model = two_adapters()
    memory = MemoryCache.for_model(model)
    assert seen(memory) == {"a": [0, 0], "b": [0, 0]}
    with torch.no_grad():
        model(input_ids=tokens(1, 11), past_key_values=memory)
        memory.clear_context()
        assert seen(memory) == {"a": [11, 11], "b": [0, 0]}
        model.set_adapter("b")
        model(input_ids=tokens(1, 5), past_key_values=memory)
        memory.clear_context()
        assert seen(memory) == {"a": [11, 11], "b": [5, 5]}
        model.base_model.set_adapter(["a", "b"])
        model(input_ids=tokens(1, 3), past_key_values=memory)
    assert seen(memory) == {"a": [14, 14], "b": [8, 8]}


@torch.no_grad()
def test_active_adapters_add_what_each_of_them_reads() -> None:
    model = two_adapters(layers_to_transform=[2])
    model.base_model.set_adapter(["a", "b"])
    memory = remembering(model)
    outputs: list[Tensor] = []
    layer = find_decoder_layers(model.base_model.model)[2]
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    for names in (["a", "b"], ["a"], ["b"]):
        model.base_model.set_adapter(names)
        reading(model, memory)
    with model.disable_adapter():
        reading(model, memory)
    handle.remove()
    both, a, b, none = outputs
    assert not torch.allclose(a, b)
    assert_close(both, none + (a - none) + (b - none))


@every_architecture
def test_disabled_adapters_are_the_base_model_inside_the_context_only(trained: Trained) -> None:
    model = LOADERS["PeftModel"](trained)
    with model.disable_adapter():
        assert torch.equal(reading(model, trained.memory), trained.base_logits)
    assert torch.equal(reading(model, trained.memory), trained.logits)


def test_a_deleted_adapter_is_gone_and_the_others_stay() -> None:
    model = two_adapters()
    model.set_adapter("b")
    memory = remembering(model)
    before = reading(model, memory)
    model.delete_adapter("a")
    assert list(model.peft_config) == ["b"]
    assert not any(".senri_block.a." in name for name in model.state_dict())
    assert torch.equal(reading(model, memory), before)
    assert {layer.adapter_name for layer in MemoryCache.for_model(model).memory_layers} == {"b"}


def test_deleting_the_active_adapter_activates_another() -> None:
    model = two_adapters()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    memory = remembering(model)
    assert seen(memory) == {"b": [40, 40]}


def test_adapters_of_different_layers_stand_beside_each_other(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), settings(layers_to_transform=[0]), adapter_name="a")
    model.add_adapter("b", settings(layers_to_transform=[2, 1]))
    perturb(model.eval())
    model.base_model.set_adapter(["a", "b"])
    memory = remembering(model)
    assert seen(memory) == {"a": [40], "b": [40, 40]}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a", adapter_name="a")
    loaded.load_adapter(tmp_path / "b", "b")
    loaded.base_model.set_adapter(["a", "b"])
    assert torch.equal(reading(loaded, memory.state_dict()), reading(model, memory))


def test_deleting_the_active_adapter_activates_one_of_other_layers() -> None:
    model = get_peft_model(tiny_model("llama"), settings(layers_to_transform=[0]), adapter_name="a")
    model.add_adapter("b", settings(layers_to_transform=[1]))
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and model.active_adapter == "b"
    assert seen(remembering(model.eval())) == {"b": [40]}


def test_a_cache_of_before_an_adapter_was_added_says_so() -> None:
    model = adapted(tiny_model("llama"))
    memory = MemoryCache.for_model(model)
    model.add_adapter("b", settings())
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"no layer 0 for the adapter 'b'.*MemoryCache\.for_model"):
        reading(model, memory)


def test_adding_an_adapter_leaves_what_is_trained_as_it_is() -> None:
    model = get_peft_model(tiny_model("llama"), settings(), adapter_name="a")
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter("b", settings())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    model.set_adapter("b")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name.replace(".a.", ".b.") for name in before
    }


# Copies.


def pickled(model: PeftModel) -> PeftModel:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@every_architecture
@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
def test_a_copy_is_a_model_of_its_own(trained: Trained, make_copy: Callable[[PeftModel], PeftModel]) -> None:
    model = LOADERS["PeftModel"](trained)
    reading(model, trained.memory)
    other = make_copy(model)
    contexts = [find_decoder(m.base_model.model).memory_context for m in (model, other)]
    assert contexts[0] is not contexts[1]
    for m, context in zip((model, other), contexts, strict=True):
        assert all(x.context is context for x in m.modules() if isinstance(x, MemoryAdapterLayer))
    assert torch.equal(reading(other, trained.memory), trained.logits)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(reading(model, trained.memory), trained.logits)
    hooks = hooks_of(model)
    assert hooks_of(other.unload()) < hooks == hooks_of(model)
    assert torch.equal(reading(model, trained.memory), trained.logits)


# What is not possible, and what is wrong.


@pytest.mark.parametrize(
    "attempt",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.merge_adapter(),
        lambda model: model.base_model.model.model.layers[0].memory_adapter.merge(),
    ],
)
def test_merging_is_refused_with_a_reason(attempt: Callable[[PeftModel], Any]) -> None:
    model = adapted(tiny_model("llama"))
    before = state_of(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*what was remembered.*unload\(\)"):
        attempt(model)
    assert identical(model.state_dict(), before)


def test_adding_adapters_up_is_refused_with_a_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"cannot be combined.*set_adapter"):
        two_adapters().base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mechanism", "telepathy"),
        ("init", "ones"),
        ("surprise", "boo"),
        ("read_scope", "all"),
        ("buffer_slots", 0),
        ("store_slots", -1),
        ("segment_length", 2.5),
        ("decay_rate", 1.5),
        ("num_heads", 3),
        ("novelty_threshold", "high"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}"):
        MemoryAdapterConfig(**{name: value})


def test_a_setting_that_the_mechanism_has_not_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"store_slot=3 was given.*did you mean 'store_slots'"):
        MemoryAdapterConfig(store_slot=3)


def test_the_config_is_that_of_its_mechanism() -> None:
    """It is pickled, copied and loaded as what it is, and takes no other mechanism's name."""
    config = MemoryAdapterConfig(store_slots=3)
    assert type(config) is EpisodicAdapterConfig is type(pickle.loads(pickle.dumps(config)))
    assert copy.deepcopy(config) == config
    with pytest.raises(ValueError, match="'telepathy' was given to EpisodicAdapterConfig"):
        EpisodicAdapterConfig(mechanism="telepathy")


@pytest.mark.parametrize("layers", [[3], [-1], [0, 0], [], ["0"], [0, 99], 7, [True]])
def test_layers_that_the_model_has_not_are_refused(layers: Any) -> None:
    base = tiny_model("llama")
    before, hooks = state_of(base), hooks_of(base)
    with pytest.raises(ValueError, match=r"layers_to_transform=.* from 0 to 2"):
        get_peft_model(base, settings(layers_to_transform=layers))
    assert identical(base.state_dict(), before)
    assert hooks_of(base) == hooks


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, [2]), (1, [1]), ([2, 0], [0, 2])], ids=["default", "one", "out of order"]
)
def test_layers_are_resolved_to_indices(layers: Any, expected: list[int]) -> None:
    model = get_peft_model(tiny_model("llama"), settings(layers_to_transform=layers))
    assert model.peft_config["default"].layers_to_transform == expected
    assert [x.layer_idx for x in model.modules() if isinstance(x, MemoryAdapterLayer)] == expected


def test_layers_can_be_named(tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), layers_pattern="model.layers")
    memory = remembering(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(reading(loaded, memory.state_dict()), reading(model, memory))
    with pytest.raises(ValueError, match=r"layers_pattern='model\.blocks'.*'model\.layers'"):
        get_peft_model(tiny_model("llama"), settings(layers_pattern="model.blocks"))


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=HIDDEN, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def test_an_attention_of_unknown_layout_is_refused_with_what_to_do() -> None:
    base = tiny_gpt2()
    hooks = hooks_of(base)
    with pytest.raises(ValueError, match=r"GPT2Block.*not known.*init='zero'"):
        get_peft_model(base, settings())
    assert hooks_of(base) == hooks
    assert not any(hasattr(module, "memory_adapter") for module in base.modules())


def test_random_projections_need_no_known_attention(tmp_path: Path) -> None:
    base_logits = plain(tiny_gpt2())
    model = get_peft_model(tiny_gpt2(), settings(init="zero")).eval()
    assert torch.equal(reading(model, remembering(model)), base_logits)
    perturb(model)
    memory = remembering(model)
    logits = reading(model, memory)
    assert not torch.allclose(logits, base_logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert torch.equal(reading(loaded, memory.state_dict()), logits)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads=5 .*32"):
        get_peft_model(tiny_model("llama"), settings(init="zero", num_heads=5))


def test_a_model_without_an_adapter_remembers_without_training() -> None:
    (layer,) = MemoryCache.for_model(tiny_model("llama")).memory_layers
    assert isinstance(layer, AttentionMemoryLayer)


@every_architecture
def test_memory_starts_as_the_layers_own_attention(arch: str) -> None:
    base = tiny_model(arch)
    layer = find_decoder_layers(base)[1]
    attention = attention_weights(layer)
    hidden = torch.randn(1, 4, HIDDEN)
    q, k, v = (
        nn.functional.linear(hidden, getattr(attention, name), attention.biases.get(name)) for name in ("q", "k", "v")
    )
    if arch == "gpt_neox":
        fused = layer.attention.query_key_value(hidden).unflatten(-1, (attention.num_heads, 3, -1))
        expected = [fused[..., part, :].flatten(-2) for part in range(3)]
    else:
        expected = [getattr(layer.self_attn, f"{name}_proj")(hidden) for name in "qkv"]
    for ours, theirs in zip((q, k, v), expected, strict=True):
        assert_close(ours, theirs)


def test_the_status_of_an_adapter_is_that_of_any(llama: Trained) -> None:
    model = LOADERS["PeftModel"](llama)
    assert isinstance(model.base_model, MemoryTuner)
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert [layer.name for layer in model.get_layer_status()] == [
        f"model.model.layers.{index}.memory_adapter" for index in MEMORY_LAYERS
    ]


# Several memories.


def several(names: dict[str, int]) -> PeftModel:
    """A model with adapters added in this order, each as its seed makes it, all of them in use."""
    model = get_peft_model(tiny_model("llama"), settings(), adapter_name=next(iter(names)))
    for name in list(names)[1:]:
        model.add_adapter(name, settings(surprise="nll") if name == "nats" else settings())
    for name, seed in names.items():
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f"senri_block.{name}." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.base_model.set_adapter(list(names))
    return model.eval()


def test_a_memory_of_several_adapters_loads_with_all_of_them(tmp_path: Path) -> None:
    """In whatever order they were added; another one under either name is refused."""
    memory = remembering(several({"home": 1, "nats": 2}))
    memory.save_pretrained(tmp_path)
    other = MemoryCache.from_pretrained(tmp_path, model=several({"home": 1, "nats": 2}))
    assert identical(other.state_dict(), memory.state_dict())
    for names in ({"home": 3, "nats": 2}, {"home": 1, "nats": 3}):
        with pytest.raises(ValueError, match="memory adapter: the memory was made with another one"):
            MemoryCache.from_pretrained(tmp_path, model=several(names))
    for names in ({"home": 1}, {"home": 1, "work": 2}):
        with pytest.raises(ValueError, match=r"memory adapter: .*different names"):
            MemoryCache.from_pretrained(tmp_path, model=several(names))


def test_a_memory_fits_whatever_the_order_in_which_adapters_were_added(tmp_path: Path) -> None:
    memory = remembering(several({"home": 1, "work": 2, "nats": 3}))
    memory.save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("llama"), settings(surprise="nll"), adapter_name="nats")
    for name in ("work", "home"):
        model.add_adapter(name, settings())
    model.load_state_dict(several({"home": 1, "work": 2, "nats": 3}).state_dict())
    loaded = MemoryCache.from_pretrained(tmp_path, model=model)
    assert loaded.state_dict().keys() == memory.state_dict().keys()
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_memory_of_one_adapter_loads_without_the_others(tmp_path: Path) -> None:
    """Of those that were there, only the one that it is of counts; alone, it may be called anything."""
    model = several({"home": 1, "work": 2})
    model.base_model.set_adapter(["home"])
    memory = remembering(model)
    memory.save_pretrained(tmp_path)
    for names in ({"home": 1}, {"default": 1}, {"home": 1, "work": 3}, {"work": 3, "home": 1}):
        loaded = MemoryCache.from_pretrained(tmp_path, model=several(names))
        assert len(loaded.state_dict()) == len(memory.state_dict())
    for names in ({"home": 3}, {"work": 2}, {"work": 1, "home": 2}):
        with pytest.raises(ValueError, match="memory adapter: the memory was made with another one"):
            MemoryCache.from_pretrained(tmp_path, model=several(names))


@pytest.mark.parametrize("names", [{"home": 1}, {"home": 1, "work": 2}], ids=["one", "two"])
def test_a_memory_of_the_first_format_still_loads(
    names: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has one sample of all adapters' weights."""
    memory = remembering(several(names))
    fingerprint = memory.model_fingerprint
    samples = fingerprint["memory_weights"].values()
    merged = {name: values for sample in samples for name, values in sample.items()}
    memory.model_fingerprint = {**fingerprint, "memory_weights": merged}
    with monkeypatch.context() as earlier:
        earlier.setattr(file, "FORMAT_VERSION", 1)
        earlier.setattr(file, "card", lambda description: "")
        memory.save_pretrained(tmp_path)
    loaded = MemoryCache.from_pretrained(tmp_path, model=several(names))
    assert identical(loaded.state_dict(), memory.state_dict())
    with pytest.raises(ValueError, match="memory adapter: the memory was made with another one"):
        MemoryCache.from_pretrained(tmp_path, model=several(dict.fromkeys(names, 5)))
