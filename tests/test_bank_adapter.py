"""A bank beside the layers of a model that exists: with any cache, packed, with LoRA, saved, quantized."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, MEMORY_LAYERS, SMALL, Subject, assert_close, perturb, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import senri_hf
from senri_hf import MemoryAdapterConfig, MemoryCache
from senri_hf.adapters import quantize_bank
from senri_hf.adapters.bank import BankBlock
from senri_hf.configuration.bank import CAUSAL_STRATEGIES
from senri_hf.memory.router_loss import take_router_loss, with_router_loss


BANK = Subject("llama", "bank", "default")


def routed(strategy: str) -> dict[str, Any]:
    return {"routing_strategy_train": strategy, "routing_strategy_inference": strategy}


def blocks(model: torch.nn.Module) -> list[BankBlock]:
    return [module for module in model.modules() if isinstance(module, BankBlock)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_any_cache_carries_what_tokens_are_routed_by(arch: str) -> None:
    """`generate()` without a memory cache gives the text of the full forward."""
    model, ids = Subject(arch, "bank", "default").model(), tokens(2, 9)
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    text = model.generate(input_ids=ids, **kwargs)
    assert torch.equal(text, model.generate(input_ids=ids, use_cache=False, **kwargs))
    assert text[:, 9:].unique().numel() >= 4


@pytest.mark.parametrize("strategy", CAUSAL_STRATEGIES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_a_cache_that_the_model_makes_itself_carries_it_too(arch: str, strategy: str) -> None:
    """Pass by pass, as it is returned."""
    model, ids = Subject(arch, "bank", "default").build(**routed(strategy), routing_window_size=4), tokens(2, 12)
    whole = model(input_ids=ids, use_cache=False, prompt_lengths=torch.tensor([6, 6])).logits
    logits, cache = [], None
    for part in (ids[:, :6], *ids[:, 6:].split(1, dim=1)):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), whole, "logits")


@pytest.mark.parametrize("strategy", CAUSAL_STRATEGIES)
@pytest.mark.parametrize("way", ["beams", "prompt lookup", "static cache", "memory", "prompt lookup with memory"])
@torch.no_grad()
def test_every_way_to_generate_gives_the_text_of_the_full_forward(strategy: str, way: str) -> None:
    model, ids = BANK.build(**routed(strategy)), tokens(1, 9)
    ids = torch.cat([ids, ids[:, :5]], dim=1)
    plain: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    lookup = {"prompt_lookup_num_tokens": 3}
    ways: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 3},
        "prompt lookup": lookup,
        "memory": {"past_key_values": MemoryCache.for_model(model)},
        "prompt lookup with memory": {**lookup, "past_key_values": MemoryCache.for_model(model)},
        "static cache": {"cache_implementation": "static"},
    }
    mask = torch.ones_like(ids)
    ours = model.generate(input_ids=ids, attention_mask=mask, **plain, **ways[way])
    same = {"num_beams": 3} if way == "beams" else {}
    assert torch.equal(ours, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **plain, **same))


@pytest.mark.parametrize(
    "way", ["plain", "no cache", "static cache", "memory", "one token left", "one token left with memory"]
)
@torch.no_grad()
def test_hybrid_routing_is_told_where_the_prompt_ends(way: str) -> None:
    """By any cache, in any pieces: decoding is the full forward that is told its length, not that of prefix routing."""
    model, ids = BANK.build(**routed("hybrid"), routing_window_size=2), tokens(2, 9)
    ids[1, :3] = 0
    mask = (ids != 0).long()
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
        "memory": {"past_key_values": MemoryCache.for_model(model)},
        "one token left": {"prefill_chunk_size": 4},
        "one token left with memory": {"prefill_chunk_size": 8, "past_key_values": MemoryCache.for_model(model)},
    }
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True, **ways[way],
    )  # fmt: skip
    full = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
    positions = (full.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": out.sequences, "attention_mask": full, "position_ids": positions, "use_cache": False}
    told = model(**given, prompt_lengths=mask.sum(1)).logits
    assert_close(torch.stack(out.logits, dim=1), told[:, 8:-1], "logits")
    assert not torch.allclose(told, model(**given).logits, atol=1e-2)


@torch.no_grad()
def test_packed_documents_do_not_leak() -> None:
    """As a trainer packs them: no cache, positions that restart."""
    model, first, second = BANK.model(), tokens(1, 8, seed=3), tokens(1, 6, seed=4)
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None]
    ids = torch.cat([first, second], dim=1)
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert_close(together[:, :8], model(input_ids=first).logits, "first document")
    assert_close(together[:, 8:], model(input_ids=second).logits, "second document")


@torch.no_grad()
def test_a_padded_row_is_as_alone_without_a_cache() -> None:
    model, long, short = BANK.model(), tokens(1, 12, seed=1), tokens(1, 7, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close(logits[1:, 5:], model(input_ids=short).logits, "logits")


@pytest.mark.parametrize(("sharing", "held"), [("shared", 1), ("per_layer", 2), ("every_k_layers", 2)])
def test_a_shared_bank_is_held_once_and_saved_once(sharing: str, held: int, tmp_path: Path) -> None:
    """And read by every layer: it gets a gradient from all of them."""
    model = BANK.build(memory_sharing=sharing, memory_sharing_k=1)
    assert sum(block.bank is not None for block in blocks(model)) == held
    model.save_pretrained(tmp_path)
    loaded, ids = PeftModel.from_pretrained(tiny_model("llama"), tmp_path), tokens(1, 7)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    copied = copy.deepcopy(model)
    copied(input_ids=ids).logits.sum().backward()
    for block in blocks(copied):
        assert block.bank is None or block.bank.tokens.weight.grad is not None
    assert all(block.bank is None or block.bank.tokens.weight.grad is None for block in blocks(model))


def test_a_new_adapter_trains_and_the_base_does_not() -> None:
    """With gradient checkpointing of the base as without."""
    ids, found = tokens(2, 9), []
    for checkpointing in (False, True):
        model = BANK.build().train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all("senri_block" in name for name in found[0])
    assert len(found[0]) == sum("senri_block" in name for name, _ in model.named_parameters())
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name)


def test_losses_of_routers_reach_the_loss() -> None:
    """Through the base model's own forward in training; what nobody took waits."""
    model, ids = BANK.build(load_balance_coefficient=5.0), tokens(2, 9)
    plain = model(input_ids=ids, labels=ids).loss
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    assert take_router_loss(model) is None
    model(input_ids=ids)
    waiting = take_router_loss(model)
    assert waiting is not None and waiting > 5
    assert_close(loss, plain + waiting, "loss")
    with model.disable_adapter():
        assert_close(model(input_ids=ids, labels=ids).loss, model.eval()(input_ids=ids, labels=ids).loss, "disabled")


def test_losses_of_routers_reach_a_loss_in_a_tuple() -> None:
    model, ids = BANK.build(load_balance_coefficient=5.0).train(), tokens(2, 9)
    expected = model(input_ids=ids, labels=ids).loss
    assert expected > model.eval()(input_ids=ids, labels=ids).loss + 1
    assert_close(model.train()(input_ids=ids, labels=ids, return_dict=False)[0], expected, "loss")


def test_losses_of_routers_are_weighed_by_the_labels_of_a_pass() -> None:
    """Of whole rows as of tokens, of which a row's first is predicted by none."""
    classes, values = torch.tensor([0, 2, -100, 1]), torch.zeros(4, 3)
    for labels, items, share in ((tokens(2, 10), 36, 0.5), (classes, 6, 0.5), (values, 24, 0.5), (classes, None, 1.0)):
        told = None if items is None else torch.tensor(items)
        assert_close(with_router_loss(torch.tensor(1.0), torch.tensor(4.0), labels, told), torch.tensor(1 + 4 * share))
    assert with_router_loss(torch.tensor(1.0), None, classes) == 1


def test_memory_and_lora_are_one_model(tmp_path: Path) -> None:
    """Trained together by a plain Trainer, saved and loaded together."""
    model = BANK.fresh()
    model = senri_hf.add_lora(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert not any("memory_adapter" in n and "lora" in n for n, _ in model.named_parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=0.05,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_" in n for n in changed) and any("senri_block" in n for n in changed)
    assert all("lora_" in n or "senri_block" in n for n in changed)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    senri_hf.adapters.load_lora(loaded, tmp_path / "adapter" / "lora")
    ids = tokens(1, 7)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_quantized_copy_is_saved_and_loaded(bits: int, tmp_path: Path) -> None:
    """It reads what the bank that learned to be quantized read."""
    model, ids = BANK.build(quantize_memory=True, memory_quant_bits=bits), tokens(1, 7)
    expected = model(input_ids=ids).logits
    quantize_bank(model, bits)
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not any("bank" in name for name, p in loaded.named_parameters())
    with pytest.raises(ValueError, match="no bank"):
        quantize_bank(tiny_model("llama"), bits)


def test_routing_that_looks_ahead_is_refused() -> None:
    """As in a model of its own, unless it is allowed by name."""
    with pytest.warns(UserWarning, match="the future included"):
        model = BANK.build(**routed("sequence"))
    ids = tokens(1, 6)
    for call in (lambda: model(input_ids=ids), lambda: model.generate(input_ids=ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match="routes every token by the mean of the whole sequence"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        allowed = BANK.build(**routed("sequence"), allow_lookahead_routing=True)
    assert allowed(input_ids=ids, labels=ids).loss.isfinite()


def test_two_banks_may_act_at_once() -> None:
    """Each reads its own."""
    model, ids = BANK.build(), tokens(1, 6)
    one = model(input_ids=ids).logits
    model.add_adapter(
        "second", MemoryAdapterConfig(mechanism="bank", layers_to_transform=MEMORY_LAYERS, **SMALL["bank"])
    )
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, one)
        for block in blocks(model):
            for parameter in block.parameters():
                parameter.add_(0.1)
        assert not torch.allclose(model(input_ids=ids).logits, one, atol=1e-3)


@torch.no_grad()
def test_a_bank_and_a_memory_of_what_was_said_act_at_once() -> None:
    """Weights and state beside each other: what was said is known in the next conversation, and can be forgotten."""
    model, told, ids = BANK.fresh(), tokens(1, 30, seed=7), tokens(1, 9)
    said = MemoryAdapterConfig(mechanism="episodic", layers_to_transform=MEMORY_LAYERS, **SMALL["episodic"])
    model.add_adapter("said", said)
    model.base_model.set_adapter(["default", "said"])
    perturb(model)
    memory = MemoryCache.for_model(model)
    model(input_ids=told, past_key_values=memory)
    memory.clear_context()
    after = model(input_ids=ids, past_key_values=memory).logits
    memory.reset_memory()
    memory.clear_context()
    blank = model(input_ids=ids, past_key_values=memory).logits
    assert not torch.allclose(after, blank, atol=1e-2)
    model.base_model.set_adapter(["default"])
    assert_close(model(input_ids=ids).logits, blank, "the bank alone")
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids).logits, blank, atol=1e-2)


def test_a_wrong_setting_is_named() -> None:
    for settings, message in (
        ({"memory_block_variant": "C"}, "memory_block_variant='C'"),
        ({"num_memory_token": 3}, "did you mean 'num_memory_tokens'"),
        ({"normalize_router_weights": "maybe"}, "normalize_router_weights='maybe' .* must be true, false or null"),
        ({"memory_layer_placement": "every_n"}, "did you mean 'layers_to_transform'"),
        ({"store_slots": 3}, "mechanism='bank' has no setting 'store_slots'"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryAdapterConfig(mechanism="bank", **settings)


@torch.no_grad()
def test_bfloat16_bases_are_read_in_float32() -> None:
    """The adapter's own weights stay what PEFT makes them."""
    model, ids = BANK.build(), tokens(1, 7)
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if "senri_block" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    ours, theirs = half(input_ids=ids).logits.float(), model(input_ids=ids).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.95


def model_with_a_bank(strategy: str) -> Any:
    torch.manual_seed(0)
    config = senri_hf.MemoryTransformerConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_memory_tokens=32, wo_init_zero=False, use_chapters=True, num_chapters=8, top_k_chapters=2,
        routing_strategy_inference=strategy, routing_window_size=2,
    )  # fmt: skip
    return senri_hf.MemoryTransformerForCausalLM(config).eval()


@pytest.mark.parametrize("cache", ["plain", "memory"])
@pytest.mark.parametrize("strategy", CAUSAL_STRATEGIES)
@torch.no_grad()
def test_a_bank_in_a_model_with_a_bank_keeps_a_routing_state_of_its_own(strategy: str, cache: str) -> None:
    """Under PEFT's default name as under any other: decoding is the full forward."""
    settings = {**SMALL["bank"], **routed(strategy)}
    config = MemoryAdapterConfig(mechanism="bank", layers_to_transform=[1], **settings)
    model, ids = perturb(get_peft_model(model_with_a_bank(strategy), config).eval()), tokens(1, 9)
    memory = MemoryCache.for_model(model)
    assert len({(layer.layer_idx, layer.adapter_name) for layer in memory.memory_layers}) == len(memory.memory_layers)
    plain = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(input_ids=ids, **plain, **({"past_key_values": memory} if cache == "memory" else {}))
    assert torch.equal(ours, model.generate(input_ids=ids, use_cache=False, **plain))


def test_no_adapter_is_called_as_the_memory_of_a_model_itself() -> None:
    model = BANK.fresh()
    with pytest.raises(ValueError, match=r"'built_in'.*another name"):
        model.add_adapter("built_in", model.peft_config["default"])


@pytest.mark.parametrize("way", ["nothing", "inputs", "embeddings", "an assistant"])
@pytest.mark.parametrize("home", ["model", "adapter"])
@pytest.mark.filterwarnings("ignore:.*assistant.*")
@torch.no_grad()
def test_hybrid_routing_is_told_of_every_kind_of_prompt(home: str, way: str) -> None:
    """None at all included, and where the model that proposes tokens has no memory: as without a cache."""
    model = model_with_a_bank("hybrid") if home == "model" else BANK.build(**routed("hybrid"), routing_window_size=2)
    ids = tokens(2, 7) % 97
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    embeddings = model.get_input_embeddings()(ids)
    ways: dict[str, dict[str, Any]] = {
        "nothing": {"bos_token_id": 1},
        "inputs": {"inputs": ids, "input_ids": None, "attention_mask": torch.ones_like(ids)},
        "embeddings": {"input_ids": None, "inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)},
        "an assistant": {"inputs": ids[:1], "attention_mask": torch.ones_like(ids[:1])},
    }
    assistant = tiny_model("llama", vocab_size=model.config.vocab_size) if way == "an assistant" else None
    ours = model.generate(**ways[way], **plain, assistant_model=assistant)
    assert torch.equal(ours, model.generate(**ways[way], **plain, use_cache=False))


@pytest.mark.filterwarnings("ignore:.*Adapters.*")
def test_generate_is_told_of_memory_only_while_there_is_one() -> None:
    """Copied and pickled with its model, described as the model's own, and gone with the adapter."""
    model, ids = BANK.fresh(), tokens(1, 5)
    base = model.get_base_model()
    assert base.generate.__doc__ == type(base).generate.__doc__
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert other.generate.args == (other,)
    kept = base.generate
    base = model.unload()
    assert "generate" not in vars(base)
    plain = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(kept(**plain), base.generate(**plain))


@torch.no_grad()
def test_a_lora_may_be_on_everything_in_a_model_with_a_bank() -> None:
    """The router included."""
    base, ids = model_with_a_bank("prefix"), tokens(1, 6)
    expected = base(ids).logits
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    assert_close(model(ids).logits, expected, "logits")
    assert any("router" in name and "lora_A" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_a_bank_in_a_model_with_a_bank_leaves_it_the_length_of_prompts() -> None:
    """Both are routed by it; a model that knows nothing of it is not given it."""
    base, ids, lengths = model_with_a_bank("hybrid"), tokens(1, 12), torch.tensor([4])
    expected = base(input_ids=ids, prompt_lengths=lengths).logits
    assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-4)
    adapter = MemoryAdapterConfig(mechanism="bank", layers_to_transform=[1], **SMALL["bank"])  # adds nothing yet
    assert torch.equal(get_peft_model(base, adapter)(input_ids=ids, prompt_lengths=lengths).logits, expected)
