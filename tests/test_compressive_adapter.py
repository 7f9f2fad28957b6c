"""The compressive adapter: what it starts from."""

import pytest
import torch
from models import ARCHITECTURES, HIDDEN, MEMORY_LAYERS, Subject, assert_close, remembering, tiny_model, tokens
from peft import get_peft_model
from torch import Tensor

from senri_hf import MemoryAdapterConfig, MemoryCache
from senri_hf.adapters.compressive import CompressiveBlock
from senri_hf.adapters.decoder import attention_weights, find_decoder_layers
from senri_hf.memory.compressive import unit_length


COMPRESSIVE = Subject("llama", "compressive", "default")


def blocks(model: torch.nn.Module) -> list[CompressiveBlock]:
    return [module for module in model.modules() if isinstance(module, CompressiveBlock)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_reads_start_as_the_layers_own_attention(arch: str) -> None:
    """Heads, queries, keys and values, norms of heads included, whatever the sizes; and nothing is added."""
    sizes = {"num_attention_heads": 8} if "head_dim" in ARCHITECTURES[arch][2] else {}  # wider than the model then
    base = tiny_model(arch, **sizes)
    for module in base.modules():  # norms of heads that do something
        if "norm" in type(module).__name__.lower() and module.weight.shape == (8,):
            module.weight.copy_(torch.linspace(0.5, 2.0, 8))
    config = MemoryAdapterConfig(mechanism="compressive", layers_to_transform=MEMORY_LAYERS)
    model = get_peft_model(base, config).eval()
    x, ids = torch.randn(5, HIDDEN), tokens(1, 9)
    for block, index in zip(blocks(model), MEMORY_LAYERS, strict=True):
        attention = attention_weights(find_decoder_layers(base)[index])

        def heads(weight: Tensor, norm: torch.nn.Module | None, size: int = attention.head_dim) -> Tensor:
            parts = (x @ weight.T).unflatten(-1, (-1, size))
            return parts if norm is None else norm(parts)

        assert (block.shape.heads, block.shape.key_dim) == (attention.num_heads, attention.head_dim)
        shared = attention.num_heads // attention.num_key_value_heads
        ours = {name: getattr(block, f"{name}_proj")(x).unflatten(-1, (block.shape.heads, -1)) for name in "qkv"}
        keys = heads(attention.k, attention.k_norm).repeat_interleave(shared, -2)
        values = heads(attention.v, None).repeat_interleave(shared, -2)
        assert_close(unit_length(ours["q"]), unit_length(heads(attention.q, attention.q_norm)), "queries")
        assert_close(unit_length(ours["k"]), unit_length(keys), "keys")
        assert_close(ours["v"], values, "values")
        taps = torch.randn(1, block.conv1d.in_channels, 4)
        assert torch.equal(block.conv1d(taps)[..., 0], taps[..., -1])
    expected = model(ids, use_cache=False).logits
    memory = remembering(model)
    assert torch.equal(model(ids, past_key_values=memory).logits, expected)


@pytest.mark.parametrize(("settings", "output"), [({}, True), ({"update_rule": "delta"}, False)])
def test_an_adapter_that_adds_nothing_learns_at_once(settings: dict[str, str], output: bool) -> None:
    """By its gate where there is one, and by its output elsewhere."""
    model = COMPRESSIVE.fresh(**settings)
    assert all(bool(block.o_proj.weight.any()) == output for block in blocks(model))
    memory = remembering(model)
    model(tokens(1, 6, seed=3), past_key_values=memory).logits.square().mean().backward()
    for block in blocks(model):
        learning = block.g_proj.weight if output else block.o_proj.weight
        assert learning.grad is not None and learning.grad.abs().max() > 0


@torch.no_grad()
def test_activation_is_what_follows_the_convolution() -> None:
    ids, reads = tokens(1, 9), []
    for activation in ("silu", "none"):
        model = COMPRESSIVE.build(activation=activation)
        memory = remembering(model)
        reads.append(model(ids, past_key_values=memory).logits)
    assert not torch.allclose(*reads, atol=1e-2)


def test_heads_of_another_size_than_attentions_own_are_refused() -> None:
    with pytest.raises(ValueError, match=r"memory_head_dim=16.*are of 8.*init='zero'"):
        COMPRESSIVE.fresh(memory_head_dim=16)
    model = COMPRESSIVE.fresh(memory_head_dim=16, init="zero")
    assert MemoryCache.for_model(model) is not None
    assert blocks(model)[0].shape.heads == HIDDEN // 16
    assert blocks(COMPRESSIVE.fresh(memory_head_dim=None, init="zero"))[0].shape.heads == 4
