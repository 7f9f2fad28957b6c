"""The memory transformer: what its settings make, that it never looks ahead, and that decoding is the full forward."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_close, held_storage, tokens
from torch import Tensor
from transformers import AutoConfig, DynamicCache, Trainer, TrainingArguments

from senri_hf import MemoryCache
from senri_hf.configuration.bank import CAUSAL_STRATEGIES
from senri_hf.configuration.memory_transformer import MemoryTransformerConfig
from senri_hf.memory.bank_layer import BankLayer
from senri_hf.memory.bank_reader import MemoryLinear
from senri_hf.memory.layer import ROLLBACK_TOKENS
from senri_hf.memory.router_loss import take_router_loss
from senri_hf.modeling import (
    MemoryTransformerForCausalLM,
    MemoryTransformerForSequenceClassification,
    MemoryTransformerModel,
)
from senri_hf.modeling.memory_transformer import MemoryPass


SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0, "num_memory_tokens": 24, "routing_window_size": 5,
    "memory_init_std": 1.0,
}  # fmt: skip
CHAPTERS: dict[str, Any] = {"use_chapters": True, "num_chapters": 6, "top_k_chapters": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    name: {**CHAPTERS, "routing_strategy_train": name, "routing_strategy_inference": name} for name in CAUSAL_STRATEGIES
}
KINDS: dict[str, dict[str, Any]] = {
    "whole_bank": {},
    **STRATEGIES,
    "block_b": {**CHAPTERS, "memory_block_variant": "B"},
    "last_layer_only": {**CHAPTERS, "memory_layer_placement": "last_k", "memory_layer_k": 1},
    "reduced_dim": {**CHAPTERS, "use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_rank": 16},
    "no_positions": {"use_rope": False, "use_rms_norm": False},
    "vanilla": {"vanilla_mode": True},
}


def build(seed: int = 0, **settings: Any) -> MemoryTransformerForCausalLM:
    """A model as training could leave it: memory changes its logits."""
    torch.manual_seed(seed)
    model = MemoryTransformerForCausalLM(MemoryTransformerConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


every_kind = pytest.mark.parametrize("kind", KINDS)
every_strategy = pytest.mark.parametrize("strategy", CAUSAL_STRATEGIES)


def in_pieces(model: MemoryTransformerForCausalLM, ids: Tensor, cache: Any, pieces: Sequence[int]) -> Tensor:
    logits, start = [], 0
    for length in pieces:
        logits.append(model(ids[:, start : start + length], past_key_values=cache, use_cache=True).logits)
        start += length
    return torch.cat(logits, dim=1)


@every_kind
@pytest.mark.parametrize("pieces", [[1] * 90, [70, 3, 17]], ids=["token by token", "pieces"])
@pytest.mark.parametrize("kind_of_cache", ["plain", "empty", "memory"])
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(kind: str, pieces: list[int], kind_of_cache: str) -> None:
    """With transformers' own caches, to which routing state is added, and with ours."""
    model, ids = build(**KINDS[kind]), tokens(2, 90)
    whole = model(ids, use_cache=False).logits
    caches = {
        "plain": lambda: DynamicCache(config=model.config),
        "empty": DynamicCache,
        "memory": lambda: MemoryCache.for_model(model),
    }
    assert_close(in_pieces(model, ids, caches[kind_of_cache](), pieces), whole, "logits")


@every_strategy
@torch.no_grad()
def test_decoding_is_the_full_forward(strategy: str) -> None:
    """Greedy choices and their scores; for "hybrid" the full forward is told where the prompt ends."""
    model, ids = build(**STRATEGIES[strategy]), tokens(2, 9)
    ids[1, :3] = 0
    mask = (ids != 0).long()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    full = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], dim=1)
    positions = (full.cumsum(1) - 1).clamp_min(0)
    kwargs = {"attention_mask": full, "position_ids": positions, "use_cache": False}
    logits = model(out.sequences, prompt_lengths=mask.sum(1), **kwargs).logits
    assert_close(torch.stack(out.logits, dim=1), logits[:, 8:-1], "logits")
    if strategy == "hybrid":
        assert not torch.allclose(logits, model(out.sequences, **kwargs).logits, atol=1e-2)


@every_strategy
@pytest.mark.parametrize("way", ["beams", "prompt lookup", "assistant", "static cache", "returned sequences"])
@torch.no_grad()
def test_every_way_to_generate_gives_the_text_of_the_full_forward(strategy: str, way: str) -> None:
    """Caches are reordered, cropped and repeated."""
    model, ids = build(**STRATEGIES[strategy]), tokens(1, 9)
    ids = torch.cat([ids, ids[:, :5]], dim=1)
    plain: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ways: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": build(seed=0, **STRATEGIES[strategy])},
        "static cache": {"cache_implementation": "static"},
        "returned sequences": {"num_beams": 2, "num_return_sequences": 2},
    }
    mask = torch.ones_like(ids)
    ours = model.generate(ids, attention_mask=mask, **plain, **ways[way])
    greedy = "num_beams" not in ways[way]
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **plain, **({} if greedy else ways[way]))
    assert torch.equal(ours, expected)


@every_kind
@torch.no_grad()
def test_a_padded_row_is_as_alone(kind: str) -> None:
    """Left and right, with a cache and without."""
    model = build(**KINDS[kind])
    long, short = tokens(1, 12, seed=1), tokens(1, 7, seed=2)
    alone = model(short).logits
    for left in (True, False):
        padding = torch.zeros(1, 5, dtype=torch.long)
        row = torch.cat([padding, short] if left else [short, padding], dim=1)
        ids = torch.cat([long, row])
        mask = (ids != 0).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for use_cache in (True, False):
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
            assert_close(logits[1:][:, mask[1].bool()], alone, "logits")


@every_kind
@torch.no_grad()
def test_packed_documents_do_not_leak(kind: str) -> None:
    """Neither through attention nor through what tokens are routed by."""
    model, first, second = build(**KINDS[kind]), tokens(1, 8, seed=3), tokens(1, 6, seed=4)
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None]
    together = model(
        torch.cat([first, second], dim=1), position_ids=positions
    ).logits  # asks for a cache, which rows of documents have none of
    assert_close(together[:, :8], model(first).logits, "first document")
    assert_close(together[:, 8:], model(second).logits, "second document")


@every_kind
@torch.no_grad()
def test_a_token_never_reads_the_future(kind: str) -> None:
    model, ids = build(**KINDS[kind]), tokens(1, 20)
    other = ids.clone()
    other[0, 11] = 3 + (ids[0, 11] + 1) % 90
    a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.equal(a[:, 11], b[:, 11])


@every_kind
def test_gradients_are_the_same_with_checkpointing(kind: str) -> None:
    """Of layers, reentrant or not, of reads, of both, of none; router losses included."""
    ids = tokens(2, 10)
    found: dict[tuple[bool | None, bool], dict[str, Tensor]] = {}
    for reentrant in (None, False, True):
        for reads in (False, True):
            model = build(**KINDS[kind], memory_gradient_checkpointing=reads, load_balance_coefficient=1.0).train()
            if reentrant is not None:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model(ids, labels=ids).loss.backward()
            found[reentrant, reads] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plain = found[None, False]
    for way, gradients in found.items():
        assert gradients.keys() == plain.keys()
        for name, gradient in gradients.items():
            assert_close(gradient, plain[name], f"{name} {way}")
    if kind != "vanilla":
        assert any("memory_banks" in name for name in plain)


@torch.no_grad()
def test_memory_is_read_and_a_new_one_adds_nothing() -> None:
    """After construction, a reset of all weights, and saving."""
    trained, ids = build(**CHAPTERS), tokens(1, 9)
    other = copy.deepcopy(trained)
    other.model.memory_banks[0].tokens.weight.normal_()
    assert not torch.allclose(trained(ids).logits, other(ids).logits, atol=1e-2)
    fresh = MemoryTransformerForCausalLM(MemoryTransformerConfig(**{**SMALL, **CHAPTERS})).eval()
    fresh.init_weights()
    before = fresh(ids).logits
    for layer in fresh.model.layers:
        assert not layer.memory_attn.o_proj.weight.any()
    fresh.model.memory_banks[0].tokens.weight.normal_()
    assert torch.equal(fresh(ids).logits, before)
    assert MemoryTransformerConfig(**SMALL, wo_init_zero=False).wo_init_zero is False
    nonzero = MemoryTransformerForCausalLM(MemoryTransformerConfig(**SMALL, wo_init_zero=False))
    assert nonzero.model.layers[0].memory_attn.o_proj.weight.std() > 0.01


@every_kind
@torch.no_grad()
def test_a_saved_model_is_the_same(kind: str, tmp_path: Path) -> None:
    model, ids = build(**KINDS[kind]), tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded, report = MemoryTransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = MemoryTransformerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float().flatten(), model(ids).logits.flatten(), dim=0) > 0.95


@torch.no_grad()
def test_a_quantized_copy_is_saved_small_and_reads_the_same(tmp_path: Path) -> None:
    """Whatever dtype it is loaded in."""
    model, ids = build(**CHAPTERS, quantize_memory=True, memory_quant_bits=4, num_memory_tokens=600), tokens(1, 9)
    expected = model(ids).logits
    model.quantize_memory()
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = MemoryTransformerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.model.memory_banks[0].nbytes * 7 < 600 * 32 * 4
    half = MemoryTransformerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    table, same = half.model.memory_banks[0].tokens, model.model.memory_banks[0].tokens
    assert torch.equal(table().all(), same().all())
    with pytest.raises(ValueError, match=r"quantize_memory.*memory_quant_bits"):
        build().quantize_memory(bits=3)
    vanilla = build(vanilla_mode=True)
    with pytest.raises(ValueError, match="has no bank"):
        vanilla.quantize_memory(4)
    assert not vanilla.config.quantized_storage


def test_losses_of_routers_reach_the_loss() -> None:
    """In training and not in evaluation, weighed by its share where a batch is accumulated, and once only."""
    ids = tokens(2, 10)
    model = build(**CHAPTERS, load_balance_coefficient=0.3, use_z_loss=True, use_auxiliary_loss=True).train()
    out = model(ids, labels=ids)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.router_loss > 0.1
    assert_close(out.loss, plain + out.router_loss, "loss")
    items = torch.tensor(36)
    assert_close(model(ids, labels=ids, num_items_in_batch=items).loss, (plain + out.router_loss) / 2, "half a batch")
    assert take_router_loss(model) is None
    model.model(ids)  # as a trainer that computes the loss from hidden states does
    copy.deepcopy(model)
    waiting = take_router_loss(model)
    assert waiting is not None and waiting.requires_grad and take_router_loss(model) is None
    assert_close(model.eval()(ids, labels=ids).loss, plain, "loss in evaluation")
    assert build(**CHAPTERS, use_load_balance_loss=False).train()(ids, labels=ids).router_loss is None


def test_losses_of_routers_reach_the_loss_of_a_classifier(tmp_path: Path) -> None:
    """Once, whatever it returns; a trainer that accumulates passes takes the mean of both."""
    torch.manual_seed(0)
    config = MemoryTransformerConfig(**SMALL, **CHAPTERS, num_labels=3, load_balance_coefficient=5.0)
    model, ids, labels = MemoryTransformerForSequenceClassification(config).train(), tokens(4, 10), torch.arange(4) % 3
    out = model(ids, labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits, labels)
    assert take_router_loss(model) is None
    model.model(ids)
    waiting = take_router_loss(model)
    assert waiting is not None and waiting > 1
    assert_close(out.loss, plain + waiting, "loss")
    assert_close(model(ids, labels=labels, return_dict=False)[0], out.loss, "loss in a tuple")
    assert_close(model.eval()(ids, labels=labels).loss, plain, "loss in evaluation")
    model.train()(ids)  # a pass whose router loss nobody takes
    assert_close(model.eval()(ids, labels=labels).loss, plain, "loss in evaluation after it")
    expected = model.train()(ids[:1], labels=labels[:1]).loss.item()
    rows = [{"input_ids": ids[0], "labels": labels[0]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(logged - expected) < 1e-3


def test_what_routers_did_is_in_the_output() -> None:
    out = build(**CHAPTERS)(tokens(2, 10))
    assert out.router_usage.shape == (6,) and abs(out.router_usage.sum().item() - 1) < 1e-5
    assert 0 < out.router_entropy < torch.tensor(6.0).log()
    assert build()(tokens(2, 10)).router_usage is None


PLACEMENTS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"memory_layer_placement": "first_k", "memory_layer_k": 2}, [0, 1]),
    ({"memory_layer_placement": "last_k", "memory_layer_k": 2}, [4, 5]),
    ({"memory_layer_placement": "every_n", "memory_layer_n": 4}, [0, 4]),
    ({"memory_layer_placement": "custom", "memory_layer_indices": [5, 1]}, [1, 5]),
    ({"vanilla_mode": True}, []),
]


@pytest.mark.parametrize(("settings", "expected"), PLACEMENTS)
def test_memory_is_where_it_is_placed(settings: dict[str, Any], expected: list[int]) -> None:
    config = MemoryTransformerConfig(**{**SMALL, "num_hidden_layers": 6, **settings})
    model = MemoryTransformerModel(config)
    assert [i for i, layer in enumerate(model.layers) if layer.has_memory] == expected
    assert len(model.memory_banks) == bool(expected)


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ({"memory_sharing": "shared"}, [0, 0, 0]),
        ({"memory_sharing": "per_layer"}, [0, 1, 2]),
        ({"memory_sharing": "every_k_layers", "memory_sharing_k": 2}, [0, 0, 1]),
    ],
)
def test_layers_share_banks(sharing: dict[str, Any], expected: list[int]) -> None:
    """Counted over memory layers, wherever they are placed."""
    placed = {"memory_layer_placement": "every_n", "memory_layer_n": 2, "num_hidden_layers": 6}
    model = MemoryTransformerModel(MemoryTransformerConfig(**{**SMALL, **placed, **sharing}))
    assert [model.bank_of_layer[layer] for layer in (0, 2, 4)] == expected
    assert len(model.memory_banks) == max(expected) + 1


def test_the_second_variant_has_a_second_mlp_in_memory_layers_only() -> None:
    model = build(memory_block_variant="B", memory_layer_placement="first_k", memory_layer_k=1)
    assert [hasattr(layer, "post_memory_mlp") for layer in model.model.layers] == [True, False, False]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"memory_layer_placement": "custom", "memory_layer_indices": [3]}, r"memory_layer_indices=\[3\].*0 to 2"),
    ({"memory_layer_placement": "custom"}, "memory_layer_indices=None"),
    ({"memory_layer_indices": [1]}, "read with 'custom' only"),
    ({"memory_layer_placement": "last_k"}, "memory_layer_k=5 .*only 3 layers"),
    ({"memory_layer_placement": "frist_k"}, "did you mean 'first_k'"),
    ({"memory_block_variant": "C"}, "^memory_block_variant=.C. was given"),
    ({"memory_layer_n": 0}, "memory_layer_n=0"),
    ({"dropout": 2.0}, "dropout=2.0"),
    ({"num_memory_token": 7}, "did you mean 'num_memory_tokens'"),
    *(
        ({name: 4}, f"{name} is no setting of MemoryTransformerConfig; did you mean .*{meant}")
        for name, meant in (
            ("hidden_dim", "'hidden_size'"),
            ("num_heads", "'num_attention_heads'"),
            ("num_layers", "'num_hidden_layers'"),
            ("intermediate_dim", "'intermediate_size'"),
            ("max_seq_len", "'max_position_embeddings'"),
            ("norm_eps", "'rms_norm_eps'"),
            ("memory_size", "'num_memory_tokens'"),
            ("num_memory", "'num_memory_tokens'"),
            ("top_k", "'top_k_chapters'"),
            ("use_memory_adapter", "'vanilla_mode'"),
            ("use_lora", "LoraConfig"),
            ("tokens_per_chapter", "'num_chapters'"),
        )
    ),
    ({"something_else": 4}, "something_else is no setting of MemoryTransformerConfig$"),
    *(
        ({name: 4}, f"{name} is no setting of MemoryTransformerConfig")
        for name in ("bank_rows", "memory_layers", "routing_strategies", "looks_ahead", "check_bank", "to_dict")
    ),
    *(
        ({name: 0}, f"^{name}=0 was given")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    ),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 was given, but it must divide num_attention_heads"),
    ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor=inf"),
    ({"num_memory_tokens": 0}, "num_memory_tokens=0"),
    ({"num_memory_tokens": "many"}, "^Field .num_memory_tokens. expected int, got str"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryTransformerConfig(**{**SMALL, **settings})


def test_what_transformers_reads_or_others_wrote_is_no_wrong_setting(tmp_path: Path) -> None:
    """Names of PreTrainedConfig may be given; a file may hold those of other libraries, but no wrong ones."""
    config = MemoryTransformerConfig(
        **SMALL, num_labels=3, torch_dtype="bfloat16", rope_theta=5.0, attn_implementation="eager", name_or_path="here"
    )
    config.other_library_version = "1.0"
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, num_labels=4)
    assert loaded.other_library_version == "1.0" and loaded.rope_parameters["rope_theta"] == 5.0
    assert (config.num_labels, loaded.num_labels, loaded.dtype) == (3, 4, torch.bfloat16)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_memory_tokens"', '"num_memory_token"'))
    with pytest.raises(ValueError, match="did you mean 'num_memory_tokens'"):
        AutoConfig.from_pretrained(tmp_path)


def looking_ahead(**settings: Any) -> MemoryTransformerConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MemoryTransformerConfig(
            **SMALL,
            **CHAPTERS,
            routing_strategy_train="sequence",
            routing_strategy_inference="sequence",
            **settings,
        )


def test_routing_that_looks_ahead_is_refused_where_next_tokens_are_predicted() -> None:
    """With the reason: in the loss, in logits, in generation, and in a trainer's own pass through the decoder."""
    with pytest.warns(UserWarning, match="the future included"):
        MemoryTransformerConfig(**SMALL, **CHAPTERS, routing_strategy_train="sequence")
    ids, model = tokens(1, 6), MemoryTransformerForCausalLM(looking_ahead())
    for call in (
        lambda: model(ids, labels=ids),
        lambda: model.eval()(ids),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model.model(ids),
    ):
        with pytest.raises(ValueError, match="routes every token by the mean of the whole sequence"):
            call()
    allowed = MemoryTransformerForCausalLM(looking_ahead(allow_lookahead_routing=True)).eval()
    assert allowed(ids, labels=ids).loss.isfinite()
    assert allowed.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 8)
    classifier = MemoryTransformerForSequenceClassification(looking_ahead(num_labels=3)).eval()
    assert classifier(ids).logits.shape == (1, 3)


def test_dropout_is_where_the_settings_put_it() -> None:
    """The memory's own is the model's where it has none."""
    attention = build(dropout=0.1).model.layers[0].memory_attn
    assert attention.dropout.p == 0.1
    assert build(dropout=0.1, memory_dropout=0.4).model.layers[0].memory_attn.dropout.p == 0.4
    model, ids = build(dropout=0.5).train(), tokens(1, 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_routing_state_has_a_fixed_size_and_ends_with_the_conversation() -> None:
    """What stays is how much was read."""
    model = build(**STRATEGIES["rolling"])
    memory, sizes, held = MemoryCache.for_model(model), [], []  # type: ignore[var-annotated]
    with torch.no_grad():
        for _ in range(3):
            model(tokens(2, 70), past_key_values=memory)
            sizes.append(memory.nbytes)
            held.append(sum(held_storage(layer) for layer in memory.memory_layers))
            # The state twice, and the tokens that may be taken back: numbers and whether they are real and counted.
            journal = 2 * ROLLBACK_TOKENS * 2 * (32 * 4 + 2) * len(memory.memory_layers)
            assert memory.nbytes <= held[-1] <= memory.nbytes + journal
    assert len(set(sizes)) == len(set(held)) == 1 and memory.tokens_seen.tolist() == [210, 210]
    memory.clear_context()
    assert memory.nbytes < sizes[0] / 10 and memory.tokens_seen.tolist() == [210, 210]
    assert all(isinstance(layer, BankLayer) for layer in memory.memory_layers)
    assert "tokens that route" not in memory.summary()


@pytest.mark.parametrize("pieces", [[16], [8, 8], [9, 7]])
@torch.no_grad()
def test_ends_that_follow_one_another_in_a_text_are_text(pieces: list[int]) -> None:
    """As in a pass without a cache."""
    model, ids = build(**CHAPTERS, eos_token_id=2), tokens(1, 16)
    ids[:, 7:10] = 2
    memory = MemoryCache.for_model(model)
    assert_close(in_pieces(model, ids, memory, pieces), model(ids, use_cache=False).logits, "logits")
    assert memory.tokens_seen.tolist() == [16]


@torch.no_grad()
def test_a_conversation_is_routed_by_its_own_tokens_only() -> None:
    """After the context was cleared it is as in a new cache, and a saved memory goes on counting."""
    model, ids = build(**STRATEGIES["prefix"]), tokens(1, 9, seed=5)
    memory = MemoryCache.for_model(model)
    model(tokens(1, 30), past_key_values=memory)
    memory.clear_context()
    assert_close(model(ids, past_key_values=memory).logits, model(ids).logits, "logits")
    other = MemoryCache.for_model(model)
    other.load_state_dict(memory.state_dict())
    assert other.tokens_seen.tolist() == [39]
    with pytest.raises(ValueError, match=r"tokens is torch\.float32"):
        other.load_state_dict({name: t.float() for name, t in memory.state_dict().items()})


@pytest.mark.parametrize("stored", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("length", [9, 1])
@pytest.mark.parametrize("kind", ["whole_bank", "prefix", "low_rank"])
@torch.no_grad()
def test_an_offloaded_model_reads_the_same(kind: str, length: int, stored: bool) -> None:
    """Its weights are there within the forward of the module that has them only."""
    from accelerate import cpu_offload

    settings = {**KINDS, "low_rank": {"use_low_rank_projections": True, "projection_rank": 8}}[kind]
    model, ids = build(**settings, num_memory_tokens=240), tokens(1, length)
    if stored:
        model.quantize_memory(8)
    expected = model(ids, use_cache=False).logits
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert_close(model(ids, use_cache=False).logits, expected, "logits")


@torch.no_grad()
def test_layers_may_be_on_another_device_than_the_bank() -> None:
    """What was found out of a pass follows them, and what they read does."""
    model = build()
    attention = model.model.layers[0].memory_attn
    layer, bank = model.model.layers[0].to("meta"), model.model.memory_banks[0]()
    memory_pass = MemoryPass(torch.ones(1, 5, dtype=torch.bool), None, torch.tensor([3]))
    hidden, _ = layer.read_memory(torch.zeros(1, 5, 32, device="meta"), bank, memory_pass, None)
    assert hidden.device.type == "meta" and attention.q_proj.weight.is_meta
    moved = memory_pass.to(torch.device("meta"))
    assert moved.real.is_meta and moved.starts is None and moved.prompt_lengths.is_meta


def test_lora_reaches_memory_projections() -> None:
    """A LoRA on a projection of memory is read, not passed by."""
    from peft import LoraConfig, get_peft_model

    model, ids = build(), tokens(1, 3)
    plain = model(ids).logits
    lora = get_peft_model(model, LoraConfig(target_modules=r".*memory_attn\.(k|v)_proj", init_lora_weights=False))
    assert not torch.allclose(lora(ids).logits, plain, atol=1e-3)
    assert isinstance(model.model.layers[0].memory_attn.q_proj, MemoryLinear)


VOCABULARY_OF_LEAK = 8


def leak_text(rows: int, generator: torch.Generator) -> Tensor:
    """Seven tokens that say nothing, and an eighth that is uniform over 8 symbols."""
    start = torch.arange(9, 16).expand(rows, -1)
    return torch.cat([start, torch.randint(1, 9, (rows, 1), generator=generator)], dim=1)


def reveal_loss(strategy: str, steps: int = 150, **settings: Any) -> float:
    """Loss on the eighth token after training on it, on new sequences."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MemoryTransformerConfig(
            **{**SMALL, "vocab_size": 16, "num_hidden_layers": 2, "num_memory_tokens": 64, "memory_init_std": 0.5,
             "routing_window_size": 4},
            use_chapters=True, num_chapters=16, top_k_chapters=2, wo_init_zero=False,
            routing_strategy_train=strategy, routing_strategy_inference=strategy, load_balance_coefficient=0.001,
            memory_gradient_checkpointing=False, **settings,
        )  # fmt: skip
    model = MemoryTransformerForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    generator = torch.Generator().manual_seed(1)

    def loss_of(rows: int) -> Tensor:
        ids = leak_text(rows, generator)
        # The prompt of hybrid routing ends before, so that its second way to route has to keep the secret too.
        prompt = torch.full((rows,), 3) if strategy == "hybrid" else None
        return torch.nn.functional.cross_entropy(
            model(ids, use_cache=False, prompt_lengths=prompt).logits[:, 6], ids[:, 7]
        )

    for _ in range(steps):
        loss = loss_of(64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return loss_of(4096).item()


@every_strategy
def test_no_causal_strategy_knows_a_token_before_it_is_read(strategy: str) -> None:
    """Its loss stays at that of a guess among eight, ln 8 = 2.079."""
    assert abs(reveal_loss(strategy) - torch.tensor(8.0).log().item()) < 0.02


def test_routing_by_the_whole_sequence_does_know_it() -> None:
    """So the test above can fail, and the name is refused for a reason."""
    assert reveal_loss("sequence", allow_lookahead_routing=True) < 1.5


@pytest.mark.parametrize("kind", ["whole_bank", "prefix"])
def test_a_trainer_trains_it(kind: str, tmp_path: Path) -> None:
    """Memory included, with its losses."""
    model = build(**KINDS[kind])
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), f"{name} was not trained"


@pytest.mark.parametrize("kind", ["whole_bank", "prefix"])
def test_a_trainer_evaluates_it_with_metrics(kind: str, tmp_path: Path) -> None:
    """What routers did is no prediction."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        model=build(**KINDS[kind]),
        args=arguments,
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"shape": float(prediction.predictions.ndim)},
    )
    assert trainer.evaluate()["eval_shape"] == 3


@pytest.mark.parametrize("kind", ["whole_bank", "prefix", "block_b"])
def test_mixed_precision_trains(kind: str) -> None:
    """Under autocast, close to float32, with gradients in the weights' own type."""
    model, ids = build(**KINDS[kind]).train(), tokens(2, 12)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.item() - expected.item()) < 0.15 * expected.item()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
