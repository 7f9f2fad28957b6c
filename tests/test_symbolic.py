"""The symbolic transformer: what every transformers model keeps, and what is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from senri_hf import SymbolicTransformerConfig, SymbolicTransformerForCausalLM, SymbolicTransformerModel


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention_only": {"use_mlp": False, "use_layer_norm": False},
    "tied": {"tie_word_embeddings": True},
}


def build(seed: int = 0, **settings: Any) -> SymbolicTransformerForCausalLM:
    """A random model whose greedy text is varied."""
    torch.manual_seed(seed)
    config = SymbolicTransformerConfig(
        **{"vocab_size": 7, "hidden_size": 32, "max_position_embeddings": 40, "initializer_range": 0.5, **settings}
    )
    return SymbolicTransformerForCausalLM(config).eval()


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> SymbolicTransformerForCausalLM:
    return build(**VARIANTS[request.param])


IDS = torch.tensor([[1, 5, 2, 6, 3, 3, 4], [2, 2, 6, 1, 5, 4, 1]])


def greedy(model: SymbolicTransformerForCausalLM, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=0, **kwargs)


def test_auto_classes_know_it_and_it_survives_saving(model: SymbolicTransformerForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SymbolicTransformerForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is SymbolicTransformerConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is SymbolicTransformerModel
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


def test_generation_with_a_cache_says_what_it_says_without(model: SymbolicTransformerForCausalLM) -> None:
    assert torch.equal(greedy(model, IDS), greedy(model, IDS, use_cache=False))
    assert len(set(greedy(model, IDS).flatten().tolist())) > 2


def test_generation_is_the_same_with_a_static_cache_beams_and_prompt_lookup() -> None:
    model = build()
    assert torch.equal(greedy(model, IDS), greedy(model, IDS, cache_implementation="static"))
    assert torch.equal(greedy(model, IDS[:1]), greedy(model, IDS[:1], prompt_lookup_num_tokens=3))
    beams = greedy(model, IDS, num_beams=3)
    assert torch.equal(beams, greedy(model, IDS, num_beams=3, use_cache=False))


def test_a_text_read_in_pieces_gives_the_same_logits(model: SymbolicTransformerForCausalLM) -> None:
    whole = model(IDS).logits
    cache, pieces = None, []
    for piece in IDS.split([3, 1, 3], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: SymbolicTransformerForCausalLM, side: str) -> None:
    padding = torch.zeros(2, 3, dtype=torch.long)
    real = torch.ones_like(IDS)
    parts = [(padding, padding), (IDS, real)] if side == "left" else [(IDS, real), (padding, padding)]
    ids, mask = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    logits = model(ids, attention_mask=mask).logits[mask.bool()].view(2, 7, -1)
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    if side == "left":
        assert torch.equal(greedy(model, ids, attention_mask=mask)[:, 3:], greedy(model, IDS))


def test_attention_implementations_agree() -> None:
    model = build()
    logits = model(IDS).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IDS).logits, logits)


def test_hidden_states_and_attentions_are_those_of_their_layers() -> None:
    model = build()
    model.set_attn_implementation("eager")
    seen: dict[str, Any] = {}
    for name in ("model.embeddings", "model.layers.0", "model.layers.1.self_attn", "model.norm"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _module, _args, output, name=name: seen.__setitem__(name, output))
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert torch.equal(output.hidden_states[0], seen["model.embeddings"])
    assert torch.equal(output.hidden_states[1], seen["model.layers.0"])
    assert torch.equal(output.hidden_states[2], seen["model.norm"])
    assert torch.equal(output.attentions[1], seen["model.layers.1.self_attn"][1])
    weights = output.attentions[0]
    assert torch.equal(weights, weights.tril()) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 7))


def test_scores_are_scaled_by_the_head_size() -> None:
    model = build(num_attention_heads=2)
    model.set_attn_implementation("eager")
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(
        model.model.embeddings(model.model.embed_tokens(IDS), torch.arange(7))
    )
    queries, keys = (
        projection(hidden).unflatten(-1, (2, 16)).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    scores = (queries @ keys.transpose(2, 3) / 4).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    torch.testing.assert_close(model(IDS, output_attentions=True).attentions[0], scores.softmax(-1))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(hidden_dropout=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients[0][:4])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_labels_are_shifted_unless_they_are_given_shifted() -> None:
    model = build()
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = model(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, model(IDS, labels=shifted, shift_labels=shifted).loss)
    logits = model(IDS).logits[:, :-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))


def test_it_runs_in_bfloat16_and_keeps_the_logits_that_are_asked_for() -> None:
    model = build()
    assert torch.equal(model(IDS, logits_to_keep=2).logits, model(IDS).logits[:, -2:])
    half = build().to(torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16
    assert greedy(half, IDS).shape == (2, 27)


def test_a_static_cache_beyond_the_positions_is_refused_but_padding_takes_none() -> None:
    model = build(max_position_embeddings=7)
    ids, settings = IDS[:, :5], {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0}
    said = model.generate(ids, max_new_tokens=2, **settings)
    with pytest.raises(ValueError, match=r"8 symbols were given, but max_position_embeddings=7"):
        model.generate(ids, max_new_tokens=4, **settings)
    padded, mask = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=2, **settings)[:, 4:], said)


def test_more_symbols_than_positions_are_refused_but_padding_takes_none() -> None:
    model = build(max_position_embeddings=7)
    with pytest.raises(ValueError, match=r"8 symbols were given, but max_position_embeddings=7.*rollout"):
        model(torch.ones(1, 8, dtype=torch.long))
    ids, mask = torch.nn.functional.pad(IDS, (3, 0)), torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    assert model(ids, attention_mask=mask).logits.shape == (2, 10, 7)
    static = StaticCache(config=model.config, max_cache_len=7)
    assert model(IDS, past_key_values=static).logits.shape == (2, 7, 7)


def test_a_rollout_sees_its_window_only_and_goes_on_for_ever() -> None:
    model = build(max_position_embeddings=5)
    out = model.rollout(IDS, 30)
    assert out.shape == (2, 37) and torch.equal(out[:, :7], IDS)
    for end in range(7, 37):
        assert torch.equal(model(out[:, end - 5 : end]).logits[:, -1].argmax(-1), out[:, end])
    short = model.rollout(IDS[:, :2], 3)
    assert torch.equal(short, model.generate(IDS[:, :2], max_new_tokens=3, do_sample=False, pad_token_id=0))
    torch.manual_seed(0)
    assert not torch.equal(model.rollout(IDS, 30, do_sample=True), out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30.*num_attention_heads=4"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SymbolicTransformerConfig(**settings)


def test_one_of_ids_and_embeddings_is_wanted() -> None:
    model = build()
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model(IDS, inputs_embeds=embeds)
