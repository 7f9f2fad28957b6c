"""The compressive mechanism: its chunk form against the formulas, and what is known of its rules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import assert_close
from torch import Tensor

from senri_hf.memory import compressive_reference as reference
from senri_hf.memory.compressive import (
    NUMBERS_AT_ONCE,
    UpdateRule,
    elu_features,
    read,
    read_and_write,
    unit_features,
    write_together,
)


RULES = {
    "additive": UpdateRule("additive"),
    "delta": UpdateRule("delta"),
    "corrected_delta": UpdateRule("corrected_delta"),
    "gated_delta": UpdateRule("gated_delta"),
    "delta that decays": UpdateRule("delta", decay=0.9),
    "additive that decays": UpdateRule("additive", decay=0.97, eps=1e-6),
    "clamped delta": UpdateRule("delta", max_delta=0.5, max_memory=0.4, max_norm=3.0, decay=0.9),
    "clamped corrected_delta": UpdateRule("corrected_delta", max_delta=1.0),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
chunked_rule = pytest.mark.parametrize("rule", [r for r in RULES.values() if not r.is_clamped], ids=str)
D_K, D_V = 8, 6


@dataclass
class Stream:
    """A memory and tokens for it: two heads, or as many as `heads`."""

    memory: Tensor
    normaliser: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    strength: Tensor | None
    log_decay: Tensor | None

    @classmethod
    def random(cls, rule: UpdateRule, length: int, begun: bool = True, heads: int = 2, seed: int = 0) -> "Stream":
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(heads, *shape, generator=generator)

        gates = (randn(length).sigmoid(), -0.3 * randn(length).exp()) if rule.name == "gated_delta" else (None, None)
        memory, normaliser = randn(D_K, D_V), 3 * elu_features(randn(D_K))
        if not begun:
            memory, normaliser = torch.zeros_like(memory), torch.zeros_like(normaliser)
        return cls(memory, normaliser, randn(length, D_K), randn(length, D_K), randn(length, D_V), *gates)

    def run(self, rule: UpdateRule, function: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        """What a function makes of it, and the leaves that it depends on."""
        leaves = {name: t.clone().requires_grad_() for name, t in vars(self).items() if t is not None}
        features = unit_features if rule.name == "gated_delta" else elu_features
        inputs = {**leaves, **{name: features(leaves[name]) for name in ("queries", "keys")}}
        return function(rule=rule, **inputs), list(leaves.values())


def by_chunks(**inputs: Any) -> list[Tensor]:
    reads, memory, normaliser = read_and_write(**inputs)
    return [reads.values, memory, normaliser]


def by_formulas(rule: UpdateRule, **inputs: Tensor) -> list[Tensor]:
    heads = range(inputs["memory"].shape[0])
    done = [reference.read_and_write(rule=rule, **{name: t[head] for name, t in inputs.items()}) for head in heads]
    return [torch.stack(parts) for parts in zip(*done, strict=True)]


@every_rule
@pytest.mark.parametrize("begun", [False, True], ids=["empty", "begun"])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 131])
def test_chunks_give_the_values_and_gradients_of_the_formulas(rule: UpdateRule, begun: bool, length: int) -> None:
    """Reads, memory and normaliser, and the gradients of all of them with respect to everything, to 1e-5."""
    stream = Stream.random(rule, length, begun)
    if rule.name == "gated_delta":  # its normaliser counts keys only where slots are chosen among
        ours, our_leaves = stream.run(rule, lambda **i: by_chunks(with_norm=True, **i))
    else:
        ours, our_leaves = stream.run(rule, by_chunks)
    theirs, their_leaves = stream.run(rule, by_formulas)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in theirs]
    gradients = [
        torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)), leaves, materialize_grads=True
        )
        for outputs, leaves in ((ours, our_leaves), (theirs, their_leaves))
    ]
    for a, b in [*zip(ours, theirs, strict=True), *zip(*gradients, strict=True)]:
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7, f"{(a - b).norm() / b.norm():.2g}"


@chunked_rule
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_length_of_a_chunk_changes_nothing(rule: UpdateRule, chunk: int) -> None:
    stream = Stream.random(rule, 53)
    for ours, theirs in zip(
        stream.run(rule, lambda **i: by_chunks(chunk=chunk, **i))[0], stream.run(rule, by_chunks)[0], strict=True
    ):
        assert_close(ours, theirs, tolerance=2e-6)


@every_rule
def test_a_token_that_is_not_written_reads_and_changes_nothing(rule: UpdateRule) -> None:
    """Its key, value and log_decay are zero; the memory goes on as if it had not been there."""
    stream = Stream.random(rule, 20)
    features = unit_features if rule.name == "gated_delta" else elu_features
    queries, keys = features(stream.queries), features(stream.keys)
    written = torch.ones(20, dtype=torch.bool)
    written[[0, 3, 4, 5, 11, 19]] = False
    gates = [stream.strength, stream.log_decay]
    masked = read_and_write(
        stream.memory,
        stream.normaliser,
        queries,
        keys * written[:, None],
        stream.values * written[:, None],
        rule,
        *(None if g is None else g * written for g in gates),
    )
    without = read_and_write(
        stream.memory,
        stream.normaliser,
        queries[:, written],
        keys[:, written],
        stream.values[:, written],
        rule,
        *(None if g is None else g[:, written] for g in gates),
    )
    assert_close(masked[0].values[:, written], without[0].values, "reads", tolerance=1e-6)
    assert_close(masked[1], without[1], "memory", tolerance=1e-6)
    assert_close(masked[2], without[2], "normaliser", tolerance=1e-6)


@chunked_rule
def test_a_later_token_changes_nothing_before_it(rule: UpdateRule) -> None:
    """Bit for bit, at every place of a chunk."""
    stream = Stream.random(rule, 70)
    expected = stream.run(rule, by_chunks)[0][0]
    for place in (0, 1, 40, 63, 64, 69):
        other = Stream.random(rule, 70)
        other.keys[:, place], other.values[:, place] = 9.0, -9.0
        read_there = other.run(rule, by_chunks)[0][0]
        stop = place if rule.reads_after_write else place + 1
        assert torch.equal(read_there[:, :stop], expected[:, :stop])
        assert place == 69 or not torch.equal(read_there[:, stop:], expected[:, stop:])


@chunked_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_stream_stays_finite(rule: UpdateRule, dtype: torch.dtype) -> None:
    """100,000 tokens, also with inputs in bfloat16; every read of a normalised rule stays within what was written."""
    stream, features = Stream.random(rule, 100_000, begun=False, heads=1), elu_features
    if rule.name == "gated_delta":
        features = unit_features
    tensors = [t.to(dtype) for t in (stream.queries, stream.keys, stream.values)]
    reads, memory, normaliser = read_and_write(
        stream.memory,
        stream.normaliser,
        features(tensors[0]),
        features(tensors[1]),
        tensors[2],
        rule,
        stream.strength,
        stream.log_decay,
    )
    for tensor in (reads.values, memory, normaliser):
        assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
    assert reads.values.abs().max() < 10


# What is true of the rules.


def settled(name: str, values: list[Tensor], times: int) -> list[Tensor]:
    """What one key reads after each value was written to it `times` times."""
    rule = UpdateRule(name)
    features = unit_features if name == "gated_delta" else elu_features
    key = features(torch.randn(1, D_K, generator=torch.Generator().manual_seed(3)))
    memory, normaliser, found = torch.zeros(D_K, D_V), torch.zeros(D_K), []
    for value in values:
        gates = (torch.ones(times), torch.zeros(times)) if name == "gated_delta" else (None, None)
        _, memory, normaliser = read_and_write(
            memory, normaliser, key.expand(times, -1), key.expand(times, -1), value.expand(times, -1), rule, *gates
        )
        found.append(read(memory, normaliser, key, rule).values[0])
    return found


@pytest.mark.parametrize(("name", "share"), [("additive", 1.0), ("gated_delta", 1.0), ("corrected_delta", 1.0)])
@pytest.mark.parametrize("times", [1, 2, 20])
def test_a_pair_written_again_and_again_reads_as_it_is(name: str, share: float, times: int) -> None:
    value = torch.randn(D_V)
    assert_close(settled(name, [value], times)[0], share * value, tolerance=1e-5)


def test_a_pair_written_again_with_the_delta_rule_reads_at_half() -> None:
    """The normaliser counts every write, the delta rule only what is new: v once, v/2 from the second write on."""
    value = torch.randn(D_V)
    assert_close(settled("delta", [value], 1)[0], value, tolerance=1e-5)
    for times in (2, 20, 300):
        assert_close(settled("delta", [value], times)[0], value / 2, tolerance=1e-5)


@pytest.mark.parametrize("name", ["gated_delta", "corrected_delta"])
def test_another_value_at_the_same_key_is_read_at_once(name: str) -> None:
    """And the old one is gone; the additive rule reads their mean."""
    first, second = torch.randn(2, D_V)
    assert_close(settled(name, [first, second], 1)[1], second, tolerance=1e-5)
    assert_close(settled("additive", [first, second], 1)[1], (first + second) / 2, tolerance=1e-5)


def test_the_delta_rule_changes_what_repetition_leaves() -> None:
    """Twenty identical writes: the additive memory is twenty times one write, the delta rule's stays near it."""
    key, value = elu_features(torch.randn(1, D_K)), torch.randn(1, D_V)
    sizes = {}
    for name in ("additive", "delta"):
        empty = torch.zeros(D_K, D_V), torch.zeros(D_K)
        _, memory, _ = read_and_write(
            *empty, key.expand(20, -1), key.expand(20, -1), value.expand(20, -1), UpdateRule(name)
        )
        sizes[name] = memory.norm() / torch.outer(key[0], value[0]).norm()
    assert sizes["additive"] == pytest.approx(20, rel=1e-4)
    assert 5 < sizes["delta"] < 15


@pytest.mark.parametrize("name", ["additive", "delta", "corrected_delta"])
def test_a_segment_is_written_as_its_tokens_would_be_one_by_one_into_the_same_memory(name: str) -> None:
    rule, stream = UpdateRule(name), Stream.random(UpdateRule(name), 9, heads=1)
    keys = elu_features(stream.keys)
    memory, normaliser = write_together(stream.memory, stream.normaliser, keys, stream.values, rule)
    expected_memory, expected_normaliser = stream.memory, stream.normaliser
    for t in range(9):
        _, one, z = read_and_write(
            stream.memory, stream.normaliser, keys[:, :1], keys[:, t : t + 1], stream.values[:, t : t + 1], rule
        )
        expected_memory = expected_memory + one - stream.memory
        expected_normaliser = expected_normaliser + z - stream.normaliser
    assert_close(memory, expected_memory, tolerance=1e-5)
    assert_close(normaliser, expected_normaliser, tolerance=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hebbian"}, r"update_rule='hebbian'.*'delta'"),
        ({"name": "delta", "decay": 1.0}, r"decay=1\.0"),
        ({"name": "gated_delta", "decay": 0.5}, r"decay=0\.5.*takes none"),
        ({"name": "delta", "max_norm": 0}, "max_norm=0"),
        ({"name": "gated_delta", "max_delta": 1.0}, r"max_delta=1\.0.*no clamps"),
        ({"name": "delta", "eps": -1.0}, r"eps=-1\.0"),
    ],
)
def test_a_rule_that_does_not_exist_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateRule(**settings)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # Dynamo itself does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # and looks there
@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_compiled_chunks_give_the_same_values_and_gradients(name: str) -> None:
    """As one graph, over several chunks."""
    rule, stream = RULES[name], Stream.random(RULES[name], 70)
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: by_chunks(**inputs), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(*(of(rule, stream, run) for run in (by_chunks, lambda **i: compiled(i))), strict=True):
        assert_close(ours, theirs, tolerance=1e-6)
    torch._dynamo.reset()


def of(rule: UpdateRule, stream: Stream, run: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Outputs, and the gradients of their sum."""
    outputs, leaves = stream.run(rule, run)
    loss = sum((output.square().sum() for output in outputs), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@torch.no_grad()
@pytest.mark.parametrize(("heads", "length"), [(1, 8192), (8, 4096)])
def test_reading_takes_no_more_space_for_longer_texts(heads: int, length: int) -> None:
    """What pieces find is dropped: of large heads a matrix for every chunk of the text would be most of the space."""
    size, largest = 256, 0

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().nbytes() > largest:
                largest = out.untyped_storage().nbytes()
            return out

    stream = [torch.randn(heads, length, size).abs() for _ in range(3)]
    with Largest():
        read_and_write(torch.zeros(heads, size, size), torch.zeros(heads, size), *stream, UpdateRule("delta"))
    assert largest <= max(4 * NUMBERS_AT_ONCE + 4 * size * size * heads, stream[0].nbytes)
