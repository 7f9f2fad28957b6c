"""Interventions: what they change, where, and that they change nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import HIDDEN, VOCABULARY, Subject, tiny_model, tokens
from sparse import autoencoder
from torch import Tensor, nn
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, PreTrainedModel

from senri_hf.interpretability import Edit, captured, find_module, intervene, module_activations


ARCHITECTURES = ["llama", "gemma3", "gpt_neox", "mamba"]
LAYER = "model.layers.1"
SUBJECT = Subject("llama", "episodic", "default")


def layer_of(arch: str) -> str:
    return {"gpt_neox": "gpt_neox.layers.1", "mamba": "backbone.layers.1"}.get(arch, LAYER)


def model_of(arch: str) -> PreTrainedModel:
    if arch != "mamba":
        return tiny_model(arch)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": 3}
    model = MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=False)).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


def outputs(model: PreTrainedModel, module: str, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad(), captured(model, module) as seen:
        model(ids, **kwargs)
    return seen[0]


def greedy(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | kwargs
    return model.generate(ids, **kwargs)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


IDS = tokens(2, 7)
# Strong enough to change what the tiny models say.
LOUD = Edit([3, 11, 20], "add", 40.0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "edit",
    [
        Edit([2, 9], "scale", 3.0),
        Edit(9, "clamp", 5.0),
        Edit([2, 9], "add", -1.5),
        Edit([2, 9], "clamp", torch.tensor([5.0, 0.5])),
        Edit([2, 9], "ablate"),
        Edit([2, 9], "patch", torch.rand(5, 2)),
        Edit([2, 9], "patch", torch.rand(2, 7, 2)),
    ],
    ids=lambda edit: edit.mode if isinstance(edit, Edit) else None,
)
def test_an_edit_adds_the_decoded_change_and_leaves_the_error(arch: str, edit: Edit) -> None:
    model, sae, layer = model_of(arch), autoencoder(), layer_of(arch)
    before = outputs(model, layer, IDS)
    f = sae.encode(before)
    g = f.clone()
    for column, latent in enumerate(edit.indices):
        if edit.mode == "patch":
            value = edit.value if edit.value.dim() == 3 else edit.value[None].expand(2, -1, -1)
            g[:, : value.shape[1], latent] = value[:, :7, column]
        else:
            old = f[..., latent]
            value = 0.0 if edit.value is None else edit.value
            value = value[column] if isinstance(value, Tensor) else value
            by_mode = {"scale": old * value, "clamp": 0 * old + value, "add": old + value, "ablate": 0 * old}
            g[..., latent] = by_mode[edit.mode]
    with intervene(model, layer, sae, edit):
        after = outputs(model, layer, IDS)
    torch.testing.assert_close(after, before + sae.decode(g) - sae.decode(f), rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, before)
    with intervene(model, layer, sae, edit, keep_error=False):
        torch.testing.assert_close(outputs(model, layer, IDS), sae.decode(g), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(model, layer, IDS), before)


def test_an_edit_that_changes_nothing_leaves_every_logit_as_it_is(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        plain = llama(IDS).logits
        with intervene(llama, LAYER, autoencoder(), Edit([1, 2], "scale", 1.0)):
            assert torch.equal(llama(IDS).logits, plain)
        with intervene(llama, LAYER, autoencoder(), LOUD, positions=[]):
            assert torch.equal(llama(IDS).logits, plain)


def test_edits_are_applied_in_their_order(llama: PreTrainedModel) -> None:
    sae = autoencoder()
    both = [Edit([4], "clamp", 2.0), Edit([4, 5], "scale", 3.0)]
    with intervene(llama, LAYER, sae, both):
        together = outputs(llama, LAYER, IDS)
    with intervene(llama, LAYER, sae, [Edit([4], "clamp", 6.0), Edit(5, "scale", 3.0)]):
        torch.testing.assert_close(outputs(llama, LAYER, IDS), together)


@pytest.mark.parametrize(
    ("positions", "changed"),
    [
        ("all", range(7)),
        ("prompt", range(7)),
        ("generated", []),
        ([2, 5], [2, 5]),
        ([-1], [6]),
        (torch.tensor([[0, 1, 0, 0, 0, 0, 1]] * 2).bool(), [1, 6]),
    ],
)
def test_only_the_chosen_positions_are_edited(llama: PreTrainedModel, positions: Any, changed: Any) -> None:
    before = outputs(llama, LAYER, IDS)
    with intervene(llama, LAYER, autoencoder(), LOUD, positions=positions):
        after = outputs(llama, LAYER, IDS)
    differs = (before != after).any(-1)
    assert differs.tolist() == [[column in changed for column in range(7)]] * 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", [-1], [3, 8]])
def test_generation_says_the_same_with_and_without_a_cache(arch: str, positions: Any) -> None:
    model, sae, layer = model_of(arch), autoencoder(), layer_of(arch)
    plain = greedy(model, IDS)
    with intervene(model, layer, sae, LOUD, positions=positions):
        cached, uncached = greedy(model, IDS), greedy(model, IDS, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(greedy(model, IDS), plain)


def test_generation_is_a_loop_of_edited_forward_passes(llama: PreTrainedModel) -> None:
    sae, ids = autoencoder(), IDS
    with intervene(llama, LAYER, sae, LOUD), torch.no_grad():
        said = greedy(llama, IDS)
        for _ in range(8):
            ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said, ids)


@pytest.mark.parametrize("skip", [0, 1])
def test_a_cache_that_does_not_say_its_length_is_counted_and_a_filled_one_refused(skip: int) -> None:
    model, layer, sae = model_of("mamba"), layer_of("mamba"), autoencoder(skip_positions=skip)
    ids = torch.cat([IDS, IDS[:, :2]], dim=1)
    for positions in ("generated", [-1], [7], "prompt"):
        with intervene(model, layer, sae, LOUD, positions=positions, prompt_length=7):
            whole = outputs(model, layer, ids)
        with intervene(model, layer, sae, LOUD, positions=positions), torch.no_grad(), captured(model, layer) as seen:
            first = model(ids[:, :7], use_cache=True)  # which makes the cache itself
            later = model(ids[:, 7:], cache_params=first.cache_params, use_cache=True)
        torch.testing.assert_close(torch.cat(seen, dim=1), whole, rtol=1e-3, atol=1e-2)  # an edit adds 40
    refused = pytest.raises(ValueError, match="does not say how long it is")
    with refused, intervene(model, layer, sae, LOUD, positions=positions), torch.no_grad():
        model(IDS[:, :1], cache_params=later.cache_params)


WAYS = ["static", "chunked", "left_padded", "beams", "several", "lookup"]


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", [-1]], ids=str)
@pytest.mark.parametrize("kind", WAYS)
def test_every_way_to_generate_is_edited_alike(llama: PreTrainedModel, kind: str, positions: Any) -> None:
    sae, ids = autoencoder(), IDS
    settings: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "chunked": {"prefill_chunk_size": 3},
        "beams": {"num_beams": 3},
        "several": {"num_return_sequences": 2, "num_beams": 2},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }.get(kind, {})
    if kind == "left_padded":
        ids = torch.nn.functional.pad(IDS, (2, 0))
        settings = {"attention_mask": (torch.arange(9) >= 2).long().expand(2, -1)}
    if kind == "lookup":
        ids = IDS[:1]
    other = settings | {"use_cache": False} if kind in ("beams", "several", "left_padded") else {}
    with intervene(llama, LAYER, sae, LOUD, positions=positions, prompt_length=ids.shape[1]):
        edited = greedy(llama, ids, **settings)
        assert torch.equal(edited, greedy(llama, ids, **other))
    assert not torch.equal(edited, greedy(llama, ids, **settings))


def test_padding_is_counted_as_columns_and_changes_no_other_row(llama: PreTrainedModel) -> None:
    sae = autoencoder()
    plain, other = greedy(llama, IDS), greedy(llama, IDS[1:])
    with intervene(llama, LAYER, sae, LOUD, rows=[True, False]):
        edited = greedy(llama, IDS)
    refused = pytest.raises(ValueError, match="The rows are of 3 rows, but the batch has 2")
    with refused, intervene(llama, LAYER, sae, LOUD, rows=[True, False, False]):
        greedy(llama, IDS)
    assert torch.equal(edited[1:], other) and not torch.equal(edited[0], plain[0])
    # Every row of a batch of prompts keeps its own prompt.
    with intervene(llama, LAYER, sae, LOUD):
        together = greedy(llama, IDS)
        alone = torch.cat([greedy(llama, IDS[row : row + 1]) for row in range(2)])
    assert torch.equal(together, alone) and torch.equal(together[:, :7], IDS)


@pytest.mark.parametrize(
    "chosen", [{"rows": [True, False]}, {"positions": torch.tensor([[True], [False]]).expand(2, 7)}]
)
def test_rows_and_masks_follow_the_copies_that_beams_make(llama: PreTrainedModel, chosen: dict[str, Any]) -> None:
    sae = autoencoder()
    plain = greedy(llama, IDS, num_beams=3)
    with intervene(llama, LAYER, sae, LOUD, **chosen):
        edited = greedy(llama, IDS, num_beams=3)
    everywhere = "all" if "rows" in chosen else "prompt"
    with intervene(llama, LAYER, sae, LOUD, positions=everywhere):
        alone = greedy(llama, IDS[:1], num_beams=3)
    assert torch.equal(edited[1], plain[1]) and not torch.equal(edited[0], plain[0])
    assert torch.equal(edited[:1], alone)


def test_a_new_prompt_begins_a_new_text_and_a_filled_cache_goes_on(llama: PreTrainedModel) -> None:
    sae = autoencoder()
    with intervene(llama, LAYER, sae, LOUD, positions=[-1]), torch.no_grad():
        first, second = outputs(llama, LAYER, IDS), outputs(llama, LAYER, IDS[:, :4])
        cache = DynamicCache(config=llama.config)
        llama(IDS[:, :5], past_key_values=cache)
        later = llama(IDS[:, 5:], past_key_values=cache).logits
    plain = outputs(llama, LAYER, IDS)
    assert (first != plain).any(-1)[0].tolist() == [False] * 6 + [True]
    assert (second != plain[:, :4]).any(-1)[0].tolist() == [False] * 3 + [True]
    edited = torch.zeros(2, 7, dtype=torch.bool)
    edited[:, 4] = True
    with intervene(llama, LAYER, sae, LOUD, positions=edited), torch.no_grad():
        torch.testing.assert_close(later, llama(IDS).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_skipped_positions_are_never_edited(llama: PreTrainedModel) -> None:
    before = outputs(llama, LAYER, IDS)
    with intervene(llama, LAYER, autoencoder(skip_positions=2), LOUD):
        after = outputs(llama, LAYER, IDS)
    assert (before != after).any(-1)[0].tolist() == [False] * 2 + [True] * 5
    ids, mask = torch.nn.functional.pad(IDS, (3, 0)), torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    before = outputs(llama, LAYER, ids, attention_mask=mask)
    with intervene(llama, LAYER, autoencoder(skip_positions=2), LOUD):
        padded = outputs(llama, LAYER, ids, attention_mask=mask)
        assert torch.equal(greedy(llama, ids, attention_mask=mask)[:, 3:], greedy(llama, IDS))
    assert (before != padded).any(-1)[0].tolist() == [False] * 5 + [True] * 5


def test_modules_that_return_tuples_and_a_half_precision_model_are_edited() -> None:
    model = tiny_model("llama").bfloat16()
    for module in ("model.layers.1.self_attn", "model.layers.1.mlp", "model.embed_tokens"):
        before = outputs(model, module, IDS)
        with intervene(model, module, autoencoder(), LOUD):
            after = outputs(model, module, IDS)
        assert after.dtype == torch.bfloat16 and not torch.equal(after, before)


class Flat(nn.Module):
    """Takes the tokens of all rows as one list, as experts do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1))


class Rows(nn.Module):
    """What `Flat` gives, by rows again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.flat = Flat(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x).view_as(x)


def test_modules_that_return_all_tokens_as_one_list_are_read_and_edited() -> None:
    model, sae, module = tiny_model("llama"), autoencoder(), "model.layers.1.mlp"
    batch = {"input_ids": IDS, "attention_mask": (torch.arange(7) >= torch.tensor([[0], [3]])).long()}
    chosen = {"positions": [2, -1], "rows": [False, True]}
    read = list(module_activations(model, module, [batch]))
    with intervene(model, module, sae, LOUD, **chosen):
        said = outputs(model, "lm_head", IDS)
    model.model.layers[1].mlp = Rows(model.model.layers[1].mlp)
    flat = list(module_activations(model, module + ".flat", [batch]))
    torch.testing.assert_close(flat, read)
    with intervene(model, module + ".flat", sae, LOUD, **chosen):
        torch.testing.assert_close(outputs(model, "lm_head", IDS), said)
    refused = pytest.raises(ValueError, match=r"returned \[97, 32\] where \[2, 7, d\] was expected")
    with refused, captured(model, "model.embed_tokens"):
        model.model.embed_tokens.register_forward_hook(lambda *_: torch.zeros(97, 32))
        list(module_activations(model, "model.embed_tokens", [batch]))


def test_gradients_pass_through_an_intervention(llama: PreTrainedModel) -> None:
    embeds = llama.get_input_embeddings()(IDS).detach().requires_grad_()
    with intervene(llama, LAYER, autoencoder(), Edit([3], "scale", 2.0)):
        llama(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.abs().sum() > 0)


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_random_direction_gets_a_change_as_long(llama: PreTrainedModel, keep_error: bool) -> None:
    sae, settings = autoencoder(), {"positions": [2, 3], "keep_error": keep_error}
    before = outputs(llama, LAYER, IDS)
    with intervene(llama, LAYER, sae, LOUD, **settings):
        own = outputs(llama, LAYER, IDS) - before
    with intervene(llama, LAYER, sae, LOUD, direction_seed=4, **settings):
        turned = outputs(llama, LAYER, IDS) - before
    torch.testing.assert_close(turned.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(turned[:, 2:4], own[:, 2:4], dim=-1)
    assert not turned[:, :2].any() and float(cosine.abs().max()) < 0.9


def test_a_context_manager_leaves_no_hook_behind_even_after_an_error(llama: PreTrainedModel) -> None:
    def hooks(module: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    before = hooks(llama)
    with pytest.raises(ValueError, match="d_in=5"), intervene(llama, LAYER, autoencoder(5), LOUD):
        llama(IDS)
    assert hooks(llama) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Edit(0, "amplify", 2.0), "mode='amplify'.*'scale'"),
        (lambda: Edit(0, "scale"), "needs a number as value, not None"),
        (lambda: Edit(0, "ablate", 1.0), "takes no value"),
        (lambda: Edit(0, "clamp", torch.rand(2)), r"a value \[2\] for 1 latents"),
        (lambda: Edit(0, "patch", 1.0), "needs a tensor"),
        (lambda: Edit([0, 1], "patch", torch.rand(3, 1)), "values for 1 latents, but 2 are named"),
    ],
)
def test_an_edit_of_no_use_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "edit", "settings", "message"),
    [
        ("model.layers.9", LOUD, {}, r"no module 'model.layers.9'. Similar ones: model.layers"),
        (None, LOUD, {}, "does not know its own"),
        (LAYER, Edit(48, "ablate"), {}, "Latent 48 was named, but the autoencoder has latents 0 to 47"),
        (LAYER, LOUD, {"positions": "last"}, "positions='last'"),
        (LAYER, LOUD, {"positions": 3}, "positions=3 was given, but they are"),
        (LAYER, LOUD, {"positions": [1.5]}, r"positions=\[1.5\]"),
        (LAYER, LOUD, {"positions": [True, False]}, r"positions=\[True, False\]"),
        (LAYER, LOUD, {"positions": None}, "positions=None"),
        (LAYER, LOUD, {"positions": torch.ones(2, 7)}, "a bool tensor"),
        (LAYER, LOUD, {"rows": [0]}, r"rows=\[0\] was given, but a bool for every row"),
    ],
)
def test_an_intervention_of_no_use_is_refused(
    llama: PreTrainedModel, module: Any, edit: Edit, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), intervene(llama, module, autoencoder(), edit, **settings):
        pass


def test_a_column_before_the_text_is_refused(llama: PreTrainedModel) -> None:
    with intervene(llama, LAYER, autoencoder(), LOUD, positions=[-7]):
        llama(IDS)
    refused = pytest.raises(ValueError, match=r"positions=\[-8\] were given, but the prompt has 7 columns only")
    with refused, intervene(llama, LAYER, autoencoder(), LOUD, positions=[-8]):
        llama(IDS)


def test_modules_are_found_with_and_without_pefts_prefix() -> None:
    model = SUBJECT.model()
    assert find_module(model, LAYER) is find_module(model, f"base_model.model.{LAYER}")
    module = find_module(model, LAYER)
    assert find_module(model, module) is module
