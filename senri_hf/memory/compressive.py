"""The compressive mechanism: an associative matrix per head, written by one of four rules, as functions on tensors.

Everything here works on whole chunks of tokens. `compressive_reference` says the same token by token.

The delta rule's chunk form is that of DeltaNet (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length", eq. 8-11), with a decay that of Gated DeltaNet (Yang et al. 2025, eq. 8-9); the normalised
reads are those of Infini-attention (Munkhdalai et al. 2024, eq. 3-5), the corrected normaliser that of ARMT (Rodkin et
al. 2024, eq. 6-7).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..configuration.compressive import UPDATE_RULES, check_choice


CHUNK = 64


@dataclass(frozen=True)
class UpdateRule:
    """How one head's memory M [d_k, d_v] and its normaliser z [d_k] take in a key k, a value v.

    With features k, q and u = v - r, where r = k M / (k z) is what memory already holds at k (0 while k z <= eps):

    - `"additive"`: M += k^T v, z += k.
    - `"delta"`: M += k^T u, z += k.
    - `"corrected_delta"`: M += k^T u, z += clip(1 - k z / |k|^2, 0, 1) k.
    - `"gated_delta"`: M = a M + b k^T (v - a k M), with a decay a and a strength b for every token; read after the
      write, and not normalised.

    Attributes:
        name: One of the above.
        eps: A read is 0 where q z <= eps.
        decay: g in (0, 1) makes it M = g M + (1 - g) k^T u and z = g z + (1 - g) k; None for none. Not with
            `"corrected_delta"`, nor with `"gated_delta"`, which has a decay of its own.
        max_delta: The entries of what is added to M are clamped to [-max_delta, max_delta]; None for no clamp.
        max_memory: The entries of M are clamped to [-max_memory, max_memory].
        max_norm: M is scaled down to this Frobenius norm where it exceeds it.
    """

    name: str
    eps: float = 0.0
    decay: float | None = None
    max_delta: float | None = None
    max_memory: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        check_choice("update_rule", self.name, UPDATE_RULES)
        if self.eps < 0:
            raise ValueError(f"eps={self.eps!r} was given, but eps must be at least 0")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay={self.decay!r} was given, but decay must be a number between 0 and 1, or None")
        if self.decay is not None and self.name in ("corrected_delta", "gated_delta"):
            raise ValueError(f"decay={self.decay!r} was given, but update_rule={self.name!r} takes none")
        for name in ("max_delta", "max_memory", "max_norm"):
            value = getattr(self, name)
            if value is not None and self.name == "gated_delta":
                raise ValueError(f"{name}={value!r} was given, but update_rule='gated_delta' has no clamps")
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} was given, but {name} must be more than 0, or None for no clamp")

    @property
    def is_normalised(self) -> bool:
        """Whether reads are divided by q z."""
        return self.name != "gated_delta"

    @property
    def reads_after_write(self) -> bool:
        """Whether a token reads what it wrote itself."""
        return self.name == "gated_delta"

    @property
    def removes(self) -> bool:
        """Whether a write takes away what memory holds at its key."""
        return self.name != "additive"

    @property
    def fades(self) -> bool:
        """Whether anything decays."""
        return self.name == "gated_delta" or self.decay is not None

    @property
    def is_clamped(self) -> bool:
        """Whether a clamp makes a step depend on more than products of those before: no chunk form then."""
        return not self.max_delta == self.max_memory == self.max_norm == None  # noqa: E711


class Reads(NamedTuple):
    """What queries read, and how well they fit what was written; all as the query's token finds the memory."""

    values: Tensor  # [*, T, d_v]
    match: Tensor  # [*, T] q z
    norm: Tensor | None  # [*, T] |z|, where it was asked for


class Normalised(NamedTuple):
    """What the normaliser says of a chunk's tokens."""

    held: Tensor  # [*, N, C] k z as the token finds z
    match: Tensor  # [*, N, C] q z
    weight: Tensor | None  # [*, N, C] with which k goes into z; None for 1
    after: Tensor  # [*, d_k] z after the last token


def elu_features(projected: Tensor) -> Tensor:
    """sigma(x) = ELU(x) + 1, in float32: positive features, so that reads are weighted means."""
    return torch.nn.functional.elu(projected.float()) + 1


def unit_features(projected: Tensor) -> Tensor:
    """SiLU, then L2 norm 1, in float32: the features of Gated DeltaNet."""
    return torch.nn.functional.normalize(torch.nn.functional.silu(projected.float()), dim=-1, eps=1e-6)


def read_and_write(
    memory: Tensor,
    normaliser: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: UpdateRule,
    strength: Tensor | None = None,
    log_decay: Tensor | None = None,
    with_norm: bool = False,
    chunk: int = CHUNK,
) -> tuple[Reads, Tensor, Tensor]:
    """Read with every token's query, then write its key and value. Exact for any chunk length.

    `*` stands for any leading dimensions. A token that is not to be written has a zero key, value and log_decay.

    Args:
        memory: [*, d_k, d_v] before the first token. normaliser: [*, d_k].
        queries, keys: [*, T, d_k] features. values: [*, T, d_v].
        strength, log_decay: [*, T] of `"gated_delta"`: b in (0, 1) and log a <= 0; None with the others.
        with_norm: Whether `Reads.norm` is wanted; not with a decay.

    Returns:
        The reads, and memory and normaliser after the last token, all in float32. With `"gated_delta"` the normaliser
        is the sum of keys, which tells what a slot was written with.
    """
    with torch.autocast(memory.device.type, enabled=False):
        memory, normaliser = memory.float(), normaliser.float()
        queries, keys, values = queries.float(), keys.float(), values.float()
        if keys.shape[-2] == 0:
            none = queries.new_zeros(queries.shape[:-1])
            return Reads(values, none, none), memory, normaliser
        if rule.is_clamped:
            return stepwise(memory, normaliser, queries, keys, values, rule)
        return chunkwise(memory, normaliser, queries, keys, values, rule, strength, log_decay, with_norm, chunk)


def chunkwise(
    memory: Tensor,
    normaliser: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: UpdateRule,
    strength: Tensor | None,
    log_decay: Tensor | None,
    with_norm: bool,
    chunk: int,
) -> tuple[Reads, Tensor, Tensor]:
    """`read_and_write` with one unit-triangular solve per chunk; of all that, only U = A - B M runs chunk by chunk.

    In a chunk, with n = k z, b = 1 / n and C[t, s] the product of decays after s and up to the read of t:

        (I + diag(b) tril(K K^T * C, -1)) U = V - diag(b) (decayed K) M
        O = (decayed Q) M + tril(Q K^T * C, -1) U        M = (decayed) M + (decayed K)^T U

    `"gated_delta"` has its strength in the place of b, and its diagonal in the triangle of Q K^T.
    """
    length = keys.shape[-2]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(tensor: Tensor) -> Tensor:
        """[*, T, d] to [*, N, C, d]."""
        return torch.nn.functional.pad(tensor, (0, 0, 0, pad)).unflatten(-2, (-1, chunk))

    q, k, v = chunks(queries), chunks(keys), chunks(values)
    similar, reading = k @ k.transpose(-1, -2), q @ k.transpose(-1, -2)  # [*, N, C, C]
    q_in, k_in, k_out = q, k, k
    carry: Tensor | None = None  # [*, N, 1, 1] what a chunk leaves of the memory that it finds
    if rule.fades:
        if rule.decay is not None:  # a token that is not written lets nothing fade; features are positive
            logs = torch.where(k.amax(-1) > 0, torch.log(k.new_tensor(rule.decay)), 0.0)
            v = v * (1 - rule.decay)
        else:
            assert log_decay is not None
            logs = chunks(log_decay.float()[..., None])[..., 0]
        total = logs.cumsum(-1)  # [*, N, C] log of the decay up to and including t
        seen = total if rule.reads_after_write else total - logs
        # After t the exponent can be positive: it is dropped before it can overflow.
        later = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).triu(1)
        between = (seen[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
        similar, reading = similar * between, reading * between
        q_in, k_in = q * seen.exp()[..., None], k * seen.exp()[..., None]
        k_out = k * (total[..., -1:] - total).exp()[..., None]
        carry = total[..., -1, None, None].exp()
    similar = similar.tril(-1)
    inside = reading.tril(0 if rule.reads_after_write else -1)

    scale = 1.0 if rule.decay is None else 1 - rule.decay
    found: Normalised | None = None
    if rule.name == "corrected_delta":
        found = corrected(normaliser, q, k, similar, inside)
    elif rule.is_normalised:
        found = summed(normaliser, q_in, k_in, k_out * scale, similar * scale, inside * scale, carry)
    elif with_norm:
        plain = (k @ k.transpose(-1, -2)).tril(-1), (q @ k.transpose(-1, -2)).tril(-1)
        found = summed(normaliser, q, k, k, *plain, None)

    if rule.name == "gated_delta":
        assert strength is not None
        removal = chunks(strength.float()[..., None])  # [*, N, C, 1]
        v = v * removal
    elif found is not None and rule.removes:
        removal = scale * inverse(found.held, rule.eps)[..., None]
    if rule.removes:
        lower = torch.eye(chunk, dtype=k.dtype, device=k.device) + removal * similar if chunk > 1 else None
        both = torch.cat([v, removal * k_in], dim=-1)
        if lower is not None:
            both = torch.linalg.solve_triangular(lower, both, upper=False, unitriangular=True)
        new, old = both.split([v.shape[-1], k.shape[-1]], dim=-1)

    reads = []
    for index in range(k.shape[-3]):
        if rule.removes:
            held, entering = (torch.cat([old[..., index, :, :], q_in[..., index, :, :]], dim=-2) @ memory).split(
                chunk, dim=-2
            )
            update = new[..., index, :, :] - held
        else:
            entering, update = q_in[..., index, :, :] @ memory, v[..., index, :, :]
        reads.append(entering + inside[..., index, :, :] @ update)
        added = k_out[..., index, :, :].transpose(-1, -2) @ update
        memory = added + (memory if carry is None else carry[..., index, :, :] * memory)
    read = torch.stack(reads, dim=-3)

    if found is None:
        none = read.new_zeros(read.shape[:-1]).flatten(-2)[..., :length]
        return Reads(read.flatten(-3, -2)[..., :length, :], none, None), memory, normaliser
    if rule.is_normalised:
        read = read * inverse(found.match, rule.eps)[..., None]
    norm = norms(normaliser, found, k).flatten(-2)[..., :length] if with_norm else None
    return (
        Reads(read.flatten(-3, -2)[..., :length, :], found.match.flatten(-2)[..., :length], norm),
        memory,
        found.after,
    )


def inverse(total: Tensor, eps: float) -> Tensor:
    """1 / total, and 0 where total <= eps: nothing is held there."""
    held = total > eps
    return torch.where(held, 1 / total.where(held, 1.0), 0.0)


def summed(
    normaliser: Tensor,
    q_in: Tensor,
    k_in: Tensor,
    k_out: Tensor,
    similar: Tensor,
    reading: Tensor,
    carry: Tensor | None,
) -> Normalised:
    """The normaliser that every key is added to, for chunks [*, N, C, d_k] and their strictly lower products."""
    increments = k_out.sum(-2)  # [*, N, d_k]
    if carry is None:
        after = normaliser[..., None, :] + increments.cumsum(-2)
        entering = torch.cat([normaliser[..., None, :], after[..., :-1, :]], dim=-2)
        normaliser = after[..., -1, :]
    else:
        found = []
        for index in range(increments.shape[-2]):
            found.append(normaliser)
            normaliser = carry[..., index, :, 0] * normaliser + increments[..., index, :]
        entering = torch.stack(found, dim=-2)
    held = (k_in @ entering[..., None])[..., 0] + similar.sum(-1)
    match = (q_in @ entering[..., None])[..., 0] + reading.sum(-1)
    return Normalised(held, match, None, normaliser)


def corrected(normaliser: Tensor, q: Tensor, k: Tensor, similar: Tensor, reading: Tensor) -> Normalised:
    """The normaliser that takes a key in by g = clip(1 - k z / |k|^2, 0, 1) (ARMT, eq. 7), chunk after chunk.

    Features are positive, so g <= 1 by itself, and g = max(0, c - L g) with L strictly lower: which tokens are at 0 is
    found by Newton's method, of which every step settles at least one more token and most settle nearly all; g then
    follows from one triangular solve.
    """
    square = k.square().sum(-1)
    per_square = inverse(square, 0.0)
    lower = similar * per_square[..., None]
    identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    weights, held, match = [], [], []
    for index in range(k.shape[-3]):
        k_now, q_now, below = k[..., index, :, :], q[..., index, :, :], lower[..., index, :, :]
        entering = (k_now @ normaliser[..., None])[..., 0]
        start = (square[..., index, :] > 0).to(k.dtype) - entering * per_square[..., index, :]
        with torch.no_grad():
            active = start > 0
            for _ in range(k.shape[-2]):  # enough; rounding may let a token at the border of 0 change sides for ever
                weight = solve_weights(identity, active, below, start)
                again = start - (below @ weight[..., None])[..., 0] > 0
                if torch.equal(again, active):
                    break
                active = again
        weight = solve_weights(identity, active, below, start)
        weights.append(weight)
        held.append(entering + (similar[..., index, :, :] @ weight[..., None])[..., 0])
        match.append(((q_now @ normaliser[..., None]) + reading[..., index, :, :] @ weight[..., None])[..., 0])
        normaliser = normaliser + (weight[..., None] * k_now).sum(-2)
    return Normalised(torch.stack(held, -2), torch.stack(match, -2), torch.stack(weights, -2), normaliser)


def solve_weights(identity: Tensor, active: Tensor, lower: Tensor, start: Tensor) -> Tensor:
    """g = start - lower g where active and 0 elsewhere, [*, C]."""
    triangle = identity + active[..., None] * lower
    solved = torch.linalg.solve_triangular(triangle, (active * start)[..., None], upper=False, unitriangular=True)
    return solved[..., 0]


def norms(normaliser: Tensor, found: Normalised, k: Tensor) -> Tensor:
    """|z| as every token finds it, [*, N, C]: |z + w k|^2 = |z|^2 + 2 w k z + w^2 |k|^2."""
    weight = 1.0 if found.weight is None else found.weight
    growth = 2 * weight * found.held + weight * weight * k.square().sum(-1)
    grown = growth.flatten(-2).cumsum(-1).unflatten(-1, growth.shape[-2:])
    return root(normaliser.square().sum(-1)[..., None, None] + grown - growth)


def root(square: Tensor) -> Tensor:
    """The square root, and 0 with a gradient of 0 where nothing is."""
    there = square > 0
    return torch.where(there, square.where(there, 1.0).sqrt(), 0.0)


def stepwise(
    memory: Tensor, normaliser: Tensor, queries: Tensor, keys: Tensor, values: Tensor, rule: UpdateRule
) -> tuple[Reads, Tensor, Tensor]:
    """`read_and_write` token after token, for clamps: they let no step be taken together with the next."""
    reads, matches = [], []
    for q, k, v in zip(queries.unbind(-2), keys.unbind(-2), values.unbind(-2), strict=True):
        match, held = (q * normaliser).sum(-1), (k * normaliser).sum(-1)
        reads.append((q[..., None, :] @ memory)[..., 0, :] * inverse(match, rule.eps)[..., None])
        matches.append(match)
        if rule.removes:
            v = v - (k[..., None, :] @ memory)[..., 0, :] * inverse(held, rule.eps)[..., None]
        weighted, fade = k, 1.0
        if rule.name == "corrected_delta":
            weighted = (1 - held * inverse(k.square().sum(-1), 0.0)).clamp(0, 1)[..., None] * k
        if rule.decay is not None:
            v, weighted, fade = v * (1 - rule.decay), k * (1 - rule.decay), rule.decay
        written = k.amax(-1, keepdim=True) > 0
        after = clamp(fade * memory, k[..., :, None] * v[..., None, :], rule)
        memory = torch.where(written[..., None], after, memory)
        normaliser = torch.where(written, fade * normaliser + weighted, normaliser)
    return Reads(torch.stack(reads, -2), torch.stack(matches, -1), None), memory, normaliser


def clamp(memory: Tensor, added: Tensor, rule: UpdateRule) -> Tensor:
    """The sum of both [*, d_k, d_v], kept within the rule's bounds."""
    if rule.max_delta is not None:
        added = added.clamp(-rule.max_delta, rule.max_delta)
    memory = memory + added
    if rule.max_memory is not None:
        memory = memory.clamp(-rule.max_memory, rule.max_memory)
    if rule.max_norm is not None:
        norm = memory.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(memory.dtype).tiny).sqrt()
        memory = memory * (rule.max_norm / norm).clamp_max(1)
    return memory


def read(memory: Tensor, normaliser: Tensor, queries: Tensor, rule: UpdateRule) -> Reads:
    """Read without writing: every query [*, T, d_k] finds the same memory."""
    with torch.autocast(memory.device.type, enabled=False):
        queries = queries.float()
        match = (queries @ normaliser[..., None])[..., 0]
        values = queries @ memory
        if rule.is_normalised:
            values = values * inverse(match, rule.eps)[..., None]
        return Reads(values, match, root(normaliser.square().sum(-1))[..., None].expand_as(match))


def read_backwards(memory: Tensor, values: Tensor) -> Tensor:
    """v Mᵀ: under which keys values [*, T, d_v] are held, [*, T, d_k], in float32."""
    with torch.autocast(memory.device.type, enabled=False):
        return values.float() @ memory.transpose(-1, -2)


def write_together(
    memory: Tensor, normaliser: Tensor, keys: Tensor, values: Tensor, rule: UpdateRule
) -> tuple[Tensor, Tensor]:
    """Take in the tokens of a segment, keys [*, T, d_k] and values [*, T, d_v], all of which find the same memory."""
    with torch.autocast(memory.device.type, enabled=False):
        keys, values = keys.float(), values.float()
        held = (keys @ normaliser[..., None])[..., 0]
        if rule.removes:
            values = values - keys @ memory * inverse(held, rule.eps)[..., None]
        weighted = keys
        if rule.name == "corrected_delta":
            weight = (1 - held * inverse(keys.square().sum(-1), 0.0)).clamp(0, 1)
            weighted = weight[..., None] * keys
        return memory + keys.transpose(-1, -2) @ values, normaliser + weighted.sum(-2)
