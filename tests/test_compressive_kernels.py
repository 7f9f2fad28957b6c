"""The compressive mechanism by fla's kernels: on a GPU the kernels, elsewhere what their documentation says of them."""

from typing import Any

import pytest
import torch
from test_compressive import D_K, RULES, Stream, by_chunks
from torch import Tensor

from senri_hf.memory import compressive_kernels
from senri_hf.memory.compressive import UpdateRule, elu_features, read_and_write, unit_features


SERVED = {name: rule for name, rule in RULES.items() if rule.removes and rule.decay is None and not rule.is_clamped}
served_rule = pytest.mark.parametrize("rule", SERVED.values(), ids=SERVED)


def as_documented(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` of fla: q, k, v [B, T, H, d], g and beta [B, T, H], states [B, H, d_k, d_v]."""
    assert kwargs == {"output_final_state": True} and q.shape == k.shape and g.shape == beta.shape == q.shape[:3]
    state, reads = initial_state, []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - held)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        reads.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(reads, 1), state


@served_rule
@pytest.mark.parametrize("begun", [False, True], ids=["empty", "begun"])
@pytest.mark.parametrize("length", [2, 65])
def test_what_is_asked_of_the_kernels_is_the_rule(
    rule: UpdateRule, begun: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, reads before the write and slots that are chosen among included."""
    stream = Stream.random(rule, length, begun)
    expected, leaves = stream.run(rule, lambda **i: by_chunks(with_norm=True, **i))
    monkeypatch.setattr(compressive_kernels, "kernel", lambda: as_documented)
    monkeypatch.setattr(compressive_kernels, "serve", lambda *args: True)
    found, their_leaves = stream.run(rule, lambda **i: by_chunks(with_norm=True, **i))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator) for t in expected]
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)), inputs)
        for outputs, inputs in ((expected, leaves), (found, their_leaves))
    ]
    # Where nothing is held nothing is taken away: the gradients of an empty memory's own entries differ.
    kept = slice(0 if begun else 2, None)
    gradients = [of[kept] for of in gradients]
    for a, b in [*zip(found, expected, strict=True), *zip(*reversed(gradients), strict=True)]:
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-6, f"{(a - b).norm() / b.norm():.2g}"


def test_on_a_processor_nothing_is_asked_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressive_kernels, "kernel", lambda: as_documented)
    assert not compressive_kernels.serve(torch.zeros(1, 9, D_K), torch.zeros(1, 9, D_K), UpdateRule("gated_delta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@served_rule
@pytest.mark.parametrize("length", [64, 200])
def test_the_kernels_compute_the_rule(rule: UpdateRule, length: int) -> None:
    """fla on a GPU against the form in PyTorch on a processor; tensor cores round to 10 bits of mantissa."""
    pytest.importorskip("fla")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, length, 64, generator=generator) for _ in range(3))
    gated = rule.name == "gated_delta"
    features = unit_features if gated else elu_features
    gates = (torch.rand(4, length, generator=generator), -0.1 * torch.rand(4, length)) if gated else (None, None)
    outputs = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).requires_grad_() for tensor in (q, k, v)]
        empty = torch.zeros(4, 64, 64, device=device), torch.zeros(4, 64, device=device)
        moved = [None if gate is None else gate.to(device) for gate in gates]
        inputs = features(leaves[0]), features(leaves[1]), leaves[2]
        assert compressive_kernels.serve(inputs[1], inputs[2], rule) == (device == "cuda")
        reads, memory, _ = read_and_write(*empty, *inputs, rule, *moved)
        gradients = torch.autograd.grad(reads.values.square().sum() + memory.square().sum(), leaves)
        outputs.append([t.cpu() for t in (reads.values, memory, *gradients)])
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * ours.norm()
