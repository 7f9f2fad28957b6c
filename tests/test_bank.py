"""Banks, chapters and their router: the fast forms against their definitions, values and gradients."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from senri_hf import BankConfig
from senri_hf.configuration.bank import CAUSAL_STRATEGIES, ROUTING_STRATEGIES
from senri_hf.memory.bank import MemoryBank
from senri_hf.memory.bank_layer import BankLayer
from senri_hf.memory.bank_quantized import dequantize, fake_quantize, pack, quantize, unpack
from senri_hf.memory.bank_reader import BankAttention, LowRankProjection
from senri_hf.memory.bank_reference import read_bank
from senri_hf.memory.bank_reference import router_losses as defined_losses
from senri_hf.memory.bank_router import choose, router_losses
from senri_hf.memory.chapter_attention import Groups


HIDDEN, HEADS = 12, 3
CHAPTERS: dict[str, Any] = {"num_memory_tokens": 33, "use_chapters": True, "num_chapters": 8, "top_k_chapters": 3}
SMALL: dict[str, Any] = {
    "num_memory_tokens": 10,
    "routing_window_size": 4,
    "memory_init_std": 1.0,
    "wo_init_zero": False,
}
BANKS: dict[str, dict[str, Any]] = {
    "standard": {},
    "narrow": {"memory_dim": 5},
    "factorized": {"use_low_rank_memory": True, "memory_rank": 4},
    "reduced_dim": {"use_low_rank_memory": True, "memory_rank": 8, "low_rank_mode": "reduced_dim"},
    "low_rank_projections": {"use_low_rank_projections": True, "projection_rank": 5},
    "int8": {"quantize_memory": True},
}
READS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chapters": CHAPTERS,
    "one_chapter": {**CHAPTERS, "top_k_chapters": 1},
    "shared_chapters": {**CHAPTERS, "num_shared_chapters": 2, "routed_scaling_factor": 1.7},
    "not_normalized": {**CHAPTERS, "normalize_router_weights": False},
    "all_chapters": {**CHAPTERS, "top_k_chapters": 8},
}


def built(seed: int = 0, **settings: Any) -> tuple[BankConfig, MemoryBank, BankAttention]:
    """A bank and its attention in float64, every weight random."""
    config = BankConfig(**{**SMALL, **settings})
    config.check_bank()
    torch.manual_seed(seed)
    bank = MemoryBank(config, HIDDEN).double()
    attention = BankAttention(config, HIDDEN, HEADS, init_std=0.5).double()
    return config, bank, attention


def projections(attention: BankAttention) -> dict[str, Tensor]:
    weights = {}
    for name in "qkvo":
        projection: Any = getattr(attention, f"{name}_proj")
        low_rank = isinstance(projection, LowRankProjection)
        weights[name] = projection.up.weight @ projection.down.weight if low_rank else projection.weight
    return weights


def reference(
    attention: BankAttention, bank: MemoryBank, x: Tensor, real: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """What the definition reads, row by row."""
    router = None if attention.router is None else attention.router.weight
    rows = bank().all()
    return torch.stack(
        [
            read_bank(
                row, rows, projections(attention), attention.num_heads, attention.config, router,
                real=None if real is None else real[i],
                **{name: value[i] if isinstance(value, (Tensor, list)) else value for name, value in kwargs.items()},
            )
            for i, row in enumerate(x)
        ]
    )  # fmt: skip


def gradients(output: Tensor, *modules: torch.nn.Module) -> dict[str, Tensor]:
    parameters = {f"{type(m).__name__}.{name}": p for m in modules for name, p in m.named_parameters()}
    probe = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((output * probe).sum(), list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def assert_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8), f"{what}: {(ours - theirs).abs().max()}"


@pytest.mark.parametrize("rows_and_length", [(1, 1), (2, 19)], ids=["one token", "many tokens"])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", BANKS)
def test_reads_are_those_of_the_definition(kind: str, read: str, rows_and_length: tuple[int, int]) -> None:
    """Values, and gradients of every weight, of every bank and way to read it."""
    config, bank, attention = built(**{**BANKS[kind], **READS[read]})
    x = torch.randn(*rows_and_length, HIDDEN, dtype=torch.float64)
    real = torch.ones(rows_and_length, dtype=torch.bool)
    ours, record = attention(x, bank(), real)
    theirs = reference(attention, bank, x)
    assert_equal(ours, theirs, "what is read")
    assert (record is None) == (not config.use_chapters)
    grads, expected = gradients(ours, bank, attention), gradients(theirs, bank, attention)
    assert grads.keys() == expected.keys() and any("MemoryBank" in name for name in grads)
    for name, gradient in grads.items():
        assert gradient.layout == torch.strided
        assert_equal(gradient, expected[name], f"gradient of {name}")
    if rows_and_length[0] > 1:
        assert expected["MemoryBank.tokens.weight"].abs().max() > 0


@pytest.mark.parametrize("absorbs", [False, True])
@pytest.mark.parametrize("read", ["whole", "chapters"])
@pytest.mark.parametrize("kind", ["standard", "low_rank_projections"])
def test_both_orders_of_projection_give_the_same(
    kind: str, read: str, absorbs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows, or of queries and of what was read; each is taken where it is cheaper."""
    _, bank, attention = built(**{**BANKS[kind], **READS[read]})
    monkeypatch.setattr(attention, "absorbs", lambda *_: absorbs)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    ours, _ = attention(x, bank(), torch.ones(2, 9, dtype=torch.bool))
    theirs = reference(attention, bank, x)
    assert_equal(ours, theirs, "what is read")
    expected = gradients(theirs, bank, attention)
    for name, gradient in gradients(ours, bank, attention).items():
        assert_equal(gradient, expected[name], f"gradient of {name}")


def test_gradients_of_all_that_read_a_bank_add_up() -> None:
    """Of much of it and of little."""
    _, bank, attention = built(**CHAPTERS)
    much, little = torch.randn(2, 19, HIDDEN, dtype=torch.float64), torch.randn(1, 1, HIDDEN, dtype=torch.float64)

    def read(texts: tuple[Tensor, ...]) -> Tensor:
        opened = bank()
        reads = [attention(x, opened, torch.ones(x.shape[:2], dtype=torch.bool))[0] for x in texts]
        return torch.cat([each.flatten(0, 1) for each in reads])

    for texts in ((much, little), (little, much), (little, little)):
        expected = gradients(torch.cat([reference(attention, bank, x).flatten(0, 1) for x in texts]), bank, attention)
        for name, gradient in gradients(read(texts), bank, attention).items():
            assert_equal(gradient, expected[name], f"gradient of {name}")


def test_a_projection_that_is_more_than_its_weight_is_called() -> None:
    """A quantized one, or one with a LoRA, is never passed by."""
    _, _, attention = built(**CHAPTERS)
    assert attention.absorbs(10**6, 1, 1)
    attention.v_proj = torch.nn.Sequential(attention.v_proj)
    assert not attention.absorbs(10**6, 1, 1)


@pytest.mark.parametrize(
    ("strategy", "packed"),
    [(s, packed) for s in ROUTING_STRATEGIES for packed in (False, True) if not packed or s != "hybrid"],
)
def test_tokens_are_routed_by_what_their_strategy_says(strategy: str, packed: bool) -> None:
    """Past padding, and never across the documents of a packed row."""
    _, bank, attention = built(**CHAPTERS, routing_strategy_train=strategy)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    real = torch.ones(2, 17, dtype=torch.bool)
    kwargs: dict[str, Any] = {}
    if packed:
        starts = torch.zeros(2, 17, dtype=torch.bool)
        starts[0, [0, 3, 11]], starts[1, [0, 8]] = True, True
        kwargs["starts"] = starts
    else:
        real[0, :5], real[1, 14:] = False, False
    prompts = torch.tensor([4, 9])
    ours, _ = attention(x, bank(), real, prompt_lengths=prompts, **kwargs)
    theirs = reference(attention, bank, x, real, strategy=strategy, prompt_length=prompts.tolist(), **kwargs)
    assert_equal(ours[real], theirs[real], "what is read")
    expected = gradients(theirs * real[..., None], bank, attention)
    for name, gradient in gradients(ours * real[..., None], bank, attention).items():
        assert_equal(gradient, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("pieces", [[1] * 17, [5, 1, 11], [3, 3, 1, 1, 9]], ids=str)
@pytest.mark.parametrize("strategy", CAUSAL_STRATEGIES)
def test_pieces_are_routed_as_the_whole(strategy: str, pieces: list[int]) -> None:
    """Through the state that the cache layer keeps, gradients included."""
    config, bank, attention = built(**CHAPTERS, routing_strategy_train=strategy)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    real = torch.ones(2, 17, dtype=torch.bool)
    real[0, :5], real[1, 7:9] = False, False
    prompts = torch.tensor([4, 9])
    whole, _ = attention(x, bank(), real, prompt_lengths=prompts)
    layer, reads, start = BankLayer(config), [], 0
    for length in pieces:
        part = slice(start, start + length)
        reads.append(attention(x[:, part], bank(), real[:, part], layer, prompt_lengths=prompts)[0])
        start += length
    split = torch.cat(reads, dim=1)
    assert_equal(split[real], whole[real], "what is read")
    assert layer.tokens_seen is not None and layer.tokens_seen.tolist() == [12, 15]
    expected = gradients(whole * real[..., None], bank, attention)
    for name, gradient in gradients(split * real[..., None], bank, attention).items():
        assert_equal(gradient, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("strategy", CAUSAL_STRATEGIES)
@torch.no_grad()
def test_a_causal_strategy_never_reads_the_future(strategy: str) -> None:
    """And the one that looks ahead does."""
    _, bank, attention = built(**CHAPTERS, routing_strategy_train=strategy)
    x, real = torch.randn(1, 12, HIDDEN, dtype=torch.float64), torch.ones(1, 12, dtype=torch.bool)
    other = x.clone()
    other[:, 8] += 5
    a, b = (attention(v, bank(), real)[0] for v in (x, other))
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8], b[:, 8])
    ahead = copy.deepcopy(attention)
    ahead.config = replace(ahead.config, routing_strategy_train="sequence")
    assert not torch.allclose(ahead(x, bank(), real)[0][:, :8], ahead(other, bank(), real)[0][:, :8])


def test_the_strategy_is_that_of_training_while_training() -> None:
    _, _, attention = built(**CHAPTERS, routing_strategy_train="token", routing_strategy_inference="rolling")
    assert attention.train().strategy == "token" and attention.eval().strategy == "rolling"


@torch.no_grad()
def test_tokens_are_taken_back() -> None:
    """As if they had never come; further back than is kept is refused."""
    config, bank, attention = built(**CHAPTERS, routing_strategy_train="rolling")
    x, real = torch.randn(1, 200, HIDDEN, dtype=torch.float64), torch.ones(1, 200, dtype=torch.bool)
    layer, clean = BankLayer(config), BankLayer(config)
    for part in (slice(0, 120), slice(120, 121), slice(121, 170), slice(170, 180)):
        attention(x[:, part], bank(), real[:, part], layer)
    attention(x[:, :130], bank(), real[:, :130], clean)
    layer.rollback(50)
    again, expected = (attention(x[:, 180:], bank(), real[:, 180:], each)[0] for each in (layer, clean))
    assert_equal(again, expected, "what is read after taking back")
    assert layer.tokens_seen is not None and layer.tokens_seen.tolist() == [150]
    with pytest.raises(ValueError, match=r"500 tokens are to be taken back.*snapshot"):
        layer.rollback(500)


def test_router_losses_are_those_of_the_definition() -> None:
    """Padding counts nowhere."""
    _, _, attention = built(**CHAPTERS)
    assert attention.router is not None
    logits = torch.randn(20, 8, dtype=torch.float64)
    real = torch.rand(20) < 0.7
    expected = defined_losses(logits[real], 3)
    _, record = choose(logits, real, attention.config)
    for name, loss in expected.items():
        assert_equal(getattr(router_losses([record, record]), name), loss, name)
    assert_equal(record.usage.sum(), torch.ones((), dtype=torch.float64), "usage")
    even, _ = choose(torch.zeros(64, 8, dtype=torch.float64), torch.ones(64, dtype=torch.bool), attention.config)
    assert even.weight.shape == (64, 3)
    _, nothing = choose(logits, torch.zeros(20, dtype=torch.bool), attention.config)
    assert all(value.isfinite().all() for value in (*nothing, *router_losses([nothing])))


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("strategy", ["token", "prefix"])
def test_no_tensor_of_every_token_and_its_rows_is_made(strategy: str) -> None:
    """Neither [rows, tokens] nor [tokens, rows read, width], forwards and backwards."""
    tokens, hidden, rows, chapters = 512, 16, 16384, 128
    config = BankConfig(
        num_memory_tokens=rows, use_chapters=True, num_chapters=chapters, top_k_chapters=4,
        routing_strategy_train=strategy, memory_gradient_checkpointing=False, wo_init_zero=False,
    )  # fmt: skip
    bank, attention = MemoryBank(config, hidden), BankAttention(config, hidden, 2)
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    with Sizes() as sizes:
        read, _ = attention(x, bank(), torch.ones(1, tokens, dtype=torch.bool))
        read.sum().backward()
    read_by_all = tokens * config.top_k_chapters * config.tokens_per_chapter * hidden
    assert sizes.largest < min(rows * tokens, read_by_all) / 2
    assert sizes.largest <= max(4 * rows * hidden, 1 << 20)


def test_only_the_chapters_that_are_read_are_computed() -> None:
    """Of a factorized bank, and of a quantized one: no tensor is as large as its floats."""
    for settings in (BANKS["factorized"], {"quantize_memory": True, "quantized_storage": True}):
        config = BankConfig(
            num_memory_tokens=1 << 14, use_chapters=True, num_chapters=256, top_k_chapters=2, **settings
        )
        bank, attention = MemoryBank(config, 64), BankAttention(config, 64, 2)
        with Sizes() as sizes, torch.no_grad():
            attention(torch.randn(1, 3, 64), bank(), torch.ones(1, 3, dtype=torch.bool))
        assert sizes.largest < config.bank_rows * 64 / 10


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [7, 8])
def test_few_bits_hold_rows(bits: int, width: int) -> None:
    """As closely as they can, and just as training sees them."""
    rows = torch.randn(50, width) * torch.logspace(-3, 2, 50)[:, None]
    codes, scale = quantize(rows, bits)
    held = dequantize(codes, scale, bits, width)
    step = rows.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7)
    assert ((held - rows).abs() <= 0.55 * step).all()
    assert torch.equal(held, fake_quantize(rows, bits))
    zeros = torch.zeros(2, width)
    assert torch.equal(dequantize(*quantize(zeros, bits), bits, width), zeros)


def test_packed_codes_come_back() -> None:
    codes = torch.randint(-7, 8, (3, 5, 9)).to(torch.int8)
    packed = pack(codes)
    assert packed.shape == (3, 5, 5) and torch.equal(unpack(packed)[..., :9], codes)


@pytest.mark.parametrize(("bits", "times"), [(8, 3.9), (4, 7.0)])
@pytest.mark.parametrize("kind", ["standard", "factorized"])
@torch.no_grad()
def test_a_quantized_bank_is_small_and_reads_what_training_read(kind: str, bits: int, times: float) -> None:
    """The copy that holds codes gives the reads of the bank that learned to be quantized."""
    settings = {**CHAPTERS, **BANKS[kind], "quantize_memory": True, "memory_quant_bits": bits, "memory_rank": 128}
    config = BankConfig(**settings, wo_init_zero=False)
    bank, attention = MemoryBank(config, 128), BankAttention(config, 128, 2)
    x, real = torch.randn(2, 6, 128), torch.ones(2, 6, dtype=torch.bool)
    before, floats = attention(x, bank(), real)[0], bank.nbytes
    stored = copy.deepcopy(bank)
    stored.store_quantized(bits)
    assert torch.equal(attention(x, stored(), real)[0], before)
    assert floats / stored.nbytes >= times
    assert not list(stored.parameters())
    with pytest.raises(ValueError, match="already"):
        stored.store_quantized(bits)
    loaded = MemoryBank(replace(config, quantized_storage=True), 128)
    loaded.load_state_dict(stored.state_dict())
    assert torch.equal(attention(x, loaded(), real)[0], before)


def test_quantization_is_learned_straight_through() -> None:
    """The gradient of a quantized bank is that of the rows that it reads, as if they were the bank's own."""
    _, bank, attention = built(**BANKS["int8"])
    x, real = torch.randn(1, 5, HIDDEN, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    ours = gradients(attention(x, bank(), real)[0], bank)
    plain = MemoryBank(BankConfig(**SMALL), HIDDEN).double()
    with torch.no_grad():
        plain.tokens.weight.copy_(bank().all())
    assert_equal(
        ours["MemoryBank.tokens.weight"],
        gradients(attention(x, plain(), real)[0], plain)["MemoryBank.tokens.weight"],
        "gradient",
    )


@pytest.mark.parametrize("kind", ["standard", "low_rank_projections"])
def test_a_new_memory_adds_nothing(kind: str) -> None:
    """Its output starts at zero, and is zero again after a reset."""
    _, bank, attention = built(**{**BANKS[kind], "wo_init_zero": True})
    x, real = torch.randn(1, 5, HIDDEN, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    for module in attention.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not attention(x, bank(), real)[0].any()


def test_tiles_hold_every_pair_once() -> None:
    """Whatever chapters are read how often."""
    choice = torch.cat([torch.zeros(40, 2).long() + torch.tensor([0, 5]), torch.randint(0, 9, (30, 2))])
    groups = Groups.of(choice)
    for size in (1, 4, 16):
        chapter, pair, real = groups.tiles(size)
        assert sorted(pair[real].tolist()) == list(range(choice.numel()))
        expected = choice.flatten()[groups.order][pair]
        assert ((groups.chapters[chapter][:, None] == expected) | ~real).all()


WRONG: dict[str, Any] = {
    "num_memory_tokens": 0,
    "memory_dim": "wide",
    "memory_num_heads": -1,
    "memory_sharing": "per_layers",
    "memory_sharing_k": 0,
    "memory_dropout": 1.5,
    "use_low_rank_memory": 1,
    "memory_rank": 0,
    "low_rank_mode": "factorised",
    "projection_rank": 2.5,
    "num_chapters": True,
    "top_k_chapters": 0,
    "num_shared_chapters": -1,
    "routed_scaling_factor": -1.0,
    "routing_strategy_train": "rollin",
    "routing_strategy_inference": "window",
    "routing_window_size": 0,
    "load_balance_coefficient": -0.1,
    "memory_quant_bits": 2,
    "memory_init_std": float("nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_with_its_value(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={WRONG[name]!r} was given, but {name} must be"):
        BankConfig(**{name: WRONG[name]}).check_bank()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_chapters": True, "num_chapters": 2000}, "num_chapters=2000.*num_memory_tokens=1024"),
        ({"use_chapters": True, "num_chapters": 10}, "top_k_chapters=20 was given, but only 10"),
        ({**CHAPTERS, "top_k_chapters": 1, "normalize_router_weights": True}, "router never learn"),
        ({"use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_dim": 3}, "memory_dim=3"),
        ({"quantized_storage": True}, "without quantize_memory"),
        ({"routing_strategy_train": "rollin"}, "did you mean 'rolling'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BankConfig(**settings).check_bank()


def test_heads_divide_the_width() -> None:
    """The model's number where it does, else fewer; what is asked for must."""
    reduced: dict[str, Any] = {"use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_rank": 64}
    assert BankAttention(BankConfig(**reduced), 768, 12).num_heads == 8
    assert BankAttention(BankConfig(memory_num_heads=4), 768, 12).num_heads == 4
    with pytest.raises(ValueError, match=r"memory_num_heads=5.*width 768"):
        BankAttention(BankConfig(memory_num_heads=5), 768, 12)
