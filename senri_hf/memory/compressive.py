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

from ..configuration.compressive import UPDATE_RULES, check_bounds, check_choice
from . import compressive_kernels
from .compressive_scan import scan


# Tokens of all heads and rows that a processor takes at once: in heads of 64 every tensor of theirs is 2 MB.
TOKENS_AT_ONCE = 2**13
# Numbers in the matrices that chunks taken at once find: 16 MB on a processor.
NUMBERS_AT_ONCE, NUMBERS_AT_ONCE_ON_GPU = 2**22, 2**27


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
        clamps = {name: getattr(self, name) for name in ("max_delta", "max_memory", "max_norm")}
        check_bounds(self.eps, self.decay, **clamps)
        if self.decay is not None and self.name in ("corrected_delta", "gated_delta"):
            raise ValueError(f"decay={self.decay!r} was given, but update_rule={self.name!r} takes none")
        for name, value in clamps.items():
            if value is not None and self.name == "gated_delta":
                raise ValueError(f"{name}={value!r} was given, but update_rule='gated_delta' has no clamps")

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

    held: Tensor  # [N, G, C] k z as the token finds z
    match: Tensor  # [N, G, C] q z
    weight: Tensor | None  # [N, G, C] with which k goes into z; None for 1
    after: Tensor  # [G, d_k] z after the last token


def elu_features(projected: Tensor) -> Tensor:
    """sigma(x) = ELU(x) + 1, in float32: positive features, so that reads are weighted means."""
    return torch.nn.functional.elu(projected.float()) + 1


def unit_features(projected: Tensor) -> Tensor:
    """SiLU, then L2 norm 1, in float32: the features of Gated DeltaNet."""
    return unit_length(torch.nn.functional.silu(projected.float()))


def unit_length(projected: Tensor) -> Tensor:
    """L2 norm 1, in float32."""
    return torch.nn.functional.normalize(projected.float(), dim=-1, eps=1e-6)


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
    chunk: int | None = None,
) -> tuple[Reads, Tensor, Tensor]:
    """Read with every token's query, then write its key and value. Exact for any length of a chunk.

    `*` stands for any leading dimensions. A token that is not to be written has a zero key, value and log_decay.

    Args:
        memory: [*, d_k, d_v] before the first token. normaliser: [*, d_k].
        queries, keys: [*, T, d_k] features. values: [*, T, d_v].
        strength, log_decay: [*, T] of `"gated_delta"`: b in (0, 1) and log a <= 0; None with the others.
        with_norm: Whether `Reads.norm` is wanted; not with a decay.
        chunk: Tokens of a chunk; what is fastest for heads of this size when None.

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
        gates = strength, log_decay
        chunk = chunk or fitting_chunk(keys.shape[-1])
        if compressive_kernels.serve(keys, values, rule):
            return by_kernel(memory, normaliser, queries, keys, values, rule, *gates, with_norm, chunk)
        length, found = keys.shape[-2], []
        piece = chunk * chunks_at_once(memory, chunk)
        for start in range(0, length, piece):
            part = slice(start, start + piece)
            q, k, v = (tensor[..., part, :] for tensor in (queries, keys, values))
            b, log_a = (None if gate is None else gate[..., part] for gate in gates)
            reads, memory, normaliser = chunkwise(memory, normaliser, q, k, v, rule, b, log_a, with_norm, chunk)
            found.append(reads)
        if len(found) == 1:
            return found[0], memory, normaliser
        norms = torch.cat([reads.norm for reads in found], -1) if with_norm else None  # type: ignore[misc]
        values, match = torch.cat([reads.values for reads in found], -2), torch.cat([r.match for r in found], -1)
        return Reads(values, match, norms), memory, normaliser


def chunks_at_once(memory: Tensor, chunk: int) -> int:
    """How many chunks of `chunk` tokens a piece has, which is computed in parallel.

    On a processor as many as stay in its cache, and nowhere so many that the matrices [*, d_k, d_v] that they find are
    what takes the space.
    """
    most = NUMBERS_AT_ONCE_ON_GPU if memory.is_cuda else NUMBERS_AT_ONCE
    heads = max(1, memory[..., 0, 0].numel())
    chunks = most // max(1, memory.numel())
    return max(1, chunks if memory.is_cuda else min(chunks, TOKENS_AT_ONCE // (chunk * heads)))


def fitting_chunk(size: int) -> int:
    """Tokens of a chunk: products within one grow with it, and those with a matrix [size, size] get fewer."""
    return 16 if size <= 32 else 32 if size <= 128 else 64


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
    """`read_and_write` with one unit-triangular inverse per chunk; of all that, only U = A - B M runs chunk by chunk.

    In a chunk, with n = k z, b = 1 / n and C[t, s] the product of decays after s and up to the read of t:

        (I + diag(b) tril(K K^T * C, -1)) U = V - diag(b) (decayed K) M
        O = (decayed Q) M + tril(Q K^T * C, -1) U        M = (decayed) M + (decayed K)^T U

    `"gated_delta"` has its strength in the place of b, and its diagonal in the triangle of Q K^T.
    """
    length = keys.shape[-2]
    chunk = min(chunk, length)
    q, k, v = (in_chunks(tensor, chunk) for tensor in (queries, keys, values))
    reading = q @ k.transpose(-1, -2)  # [N, G, C, C]
    similar = k @ k.transpose(-1, -2) if rule.removes or with_norm else None
    z, heads = normaliser.reshape(-1, normaliser.shape[-1]), memory.shape[:-2]
    found: Normalised | None = None
    if not rule.is_normalised and with_norm:
        assert similar is not None
        found = summed(z, q, k, k, similar, reading.tril(-1))
    fading = Fading.of(rule, k, log_decay, chunk) if rule.fades else None
    k_out, carry, scale = k, None, 1.0 if rule.decay is None else 1 - rule.decay
    if fading is not None:
        reading = reading * fading.between
        similar = None if similar is None else similar * fading.between
        k_out, carry = k * fading.rest, fading.carry
    # What is multiplied by the decays is 0 after t already, and the inverse looks at what is below its diagonal only.
    inside = reading if rule.name == "gated_delta" else reading.tril(-1)

    if rule.name == "corrected_delta":
        assert similar is not None
        found = corrected(z, q, k, similar.tril(-1), inside)
    elif rule.is_normalised:
        found = summed(z, q, k, k_out, similar, inside, fading, scale)

    new, old = v if scale == 1.0 else scale * v, None
    if rule.removes:
        if rule.name == "gated_delta":
            assert strength is not None
            removal = in_chunks(strength.float()[..., None], chunk)  # [N, G, C, 1]
        else:
            assert found is not None
            removal = scale * inverse(found.held, rule.eps)[..., None]
        at_once = None if chunk == 1 else unit_inverse(removal * similar)  # type: ignore[operator]
        weight = removal if fading is None else removal * fading.seen
        new = weighted(at_once, removal if rule.name == "gated_delta" else None, new)
        old = weighted(at_once, weight, k)
    entering, updates, memory = scan(memory.reshape(-1, *memory.shape[-2:]), k_out, new, old, carry)
    read = q @ entering if fading is None else fading.seen * (q @ entering)
    read = torch.baddbmm(*(tensor.flatten(0, 1) for tensor in (read, inside, updates))).view_as(read)

    if rule.is_normalised:
        assert found is not None
        read = read * inverse(found.match, rule.eps)[..., None]
    values = in_order(read, heads, length)
    reads, after = described(values, z, found, k if with_norm else None)
    return reads, memory.view(*heads, *memory.shape[1:]), after.view(normaliser.shape)


@dataclass(frozen=True)
class Fading:
    """What decays leave within chunks."""

    between: Tensor  # [N, G, C, C] of what s wrote when t reads, 0 for later s
    seen: Tensor  # [N, G, C, 1] of the memory that the chunk finds, when t reads
    rest: Tensor  # [N, G, C, 1] of what s wrote, after the chunk
    carry: Tensor  # [N, G, 1, 1] of the memory that the chunk finds, after it

    @classmethod
    def of(cls, rule: UpdateRule, k: Tensor, log_decay: Tensor | None, chunk: int) -> "Fading":
        """For keys [N, G, C, d_k] in chunks; log_decay [*, T] is that of `"gated_delta"`."""
        if rule.decay is not None:  # a token that is not written lets nothing fade; features are positive
            logs = torch.where(k.amax(-1) > 0, torch.log(k.new_tensor(rule.decay)), 0.0)
        else:
            assert log_decay is not None
            logs = in_chunks(log_decay.float()[..., None], chunk)[..., 0]
        total = logs.cumsum(-1)  # [N, G, C] log of the decay up to and including t
        seen = total if rule.reads_after_write else total - logs
        # After t the exponent can be positive: it is dropped before it can overflow.
        later = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).triu(1)
        between = (seen[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
        rest = (total[..., -1:] - total).exp()
        return cls(between, seen.exp()[..., None], rest[..., None], total[..., -1:, None].exp())


def weighted(mixing: Tensor | None, weight: Tensor | None, columns: Tensor) -> Tensor:
    """mixing diag(weight) columns, of [N, G, C, C], [N, G, C, 1] and [N, G, C, d]; None stands for 1."""
    if mixing is None:
        return columns if weight is None else weight * columns
    return (mixing if weight is None else mixing * weight.transpose(-1, -2)) @ columns


def unit_inverse(lower: Tensor) -> Tensor:
    """The inverse of I + tril(lower, -1), [*, C, C]; what stands elsewhere in `lower` is not looked at.

    Solving for the identity and multiplying takes half the time of solving for as many columns as a head has.
    """
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """[*, T, d] to [N, G, C, d]: N chunks of G heads of all rows, zero after the last token."""
    pad = -tensor.shape[-2] % chunk
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, pad)) if pad else tensor
    chunks = padded.unflatten(-2, (-1, chunk)).movedim(-3, 0)
    return chunks.reshape(len(chunks), -1, *chunks.shape[-2:])


def in_order(chunks: Tensor, heads: torch.Size, length: int) -> Tensor:
    """[N, G, C, d] to [*, T, d], with `heads` for *."""
    apart = chunks.reshape(len(chunks), *heads, *chunks.shape[-2:])
    return apart.movedim(0, -3).flatten(-3, -2)[..., :length, :]


def described(values: Tensor, normaliser: Tensor, found: Normalised | None, k: Tensor | None) -> tuple[Reads, Tensor]:
    """Reads from their values [*, T, d_v], and the normaliser after the last token.

    Args:
        normaliser: [G, d_k] before the first.
        found: What the normaliser says of the tokens; None with a rule that has none.
        k: Their keys in chunks [N, G, C, d_k], where `Reads.norm` is wanted.
    """
    if found is None:
        return Reads(values, values.new_zeros(values.shape[:-1]), None), normaliser
    heads, length = values.shape[:-2], values.shape[-2]
    match = in_order(found.match[..., None], heads, length)[..., 0]
    norm = None if k is None else in_order(norms(normaliser, found, k)[..., None], heads, length)[..., 0]
    return Reads(values, match, norm), found.after


def by_kernel(
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
    """`read_and_write` by a kernel for M = a M + b k^T (v - a k M) that is read after each write.

    The normalised rules are that with b = 1 / n and the value n v, n = k z; they read before the write, and so the
    kernel gets every query one token early.
    """
    length, heads = keys.shape[-2], memory.shape[:-2]
    z, found = normaliser.reshape(-1, normaliser.shape[-1]), None
    q, k = in_chunks(queries, chunk), in_chunks(keys, chunk)
    if rule.is_normalised or with_norm:
        similar, reading = ((part @ k.transpose(-1, -2)).tril(-1) for part in (k, q))
        if rule.name == "corrected_delta":
            found = corrected(z, q, k, similar, reading)
        else:
            found = summed(z, q, k, k, similar, reading)
    if rule.name == "gated_delta":
        assert strength is not None and log_decay is not None
        read, memory = compressive_kernels.run(memory, queries, keys, values, strength, log_decay)
    else:
        assert found is not None
        # Where nothing is held there is nothing to take away: any strength will do, if the value fits it.
        held, match = (in_order(part[..., None], heads, length)[..., 0] for part in (found.held, found.match))
        held = held.where(held > rule.eps, 1.0)
        early = torch.nn.functional.pad(queries[..., 1:, :], (0, 0, 0, 1))
        first = queries[..., :1, :] @ memory
        late, memory = compressive_kernels.run(
            memory, early, keys, values * held[..., None], 1 / held, torch.zeros_like(held)
        )
        read = torch.cat([first, late[..., :-1, :]], dim=-2) * inverse(match, rule.eps)[..., None]
    reads, after = described(read, z, found, k if with_norm else None)
    return reads, memory, after.view(normaliser.shape)


def inverse(total: Tensor, eps: float) -> Tensor:
    """1 / total, and 0 where total <= eps: nothing is held there."""
    held = total > eps
    return torch.where(held, 1 / total.where(held, 1.0), 0.0)


def summed(
    normaliser: Tensor,
    q: Tensor,
    k: Tensor,
    k_out: Tensor,
    similar: Tensor | None,
    inside: Tensor,
    fading: Fading | None = None,
    scale: float = 1.0,
) -> Normalised:
    """The normaliser that every key is added to.

    Args:
        normaliser: [G, d_k] before the first chunk.
        q, k, k_out: [N, G, C, d_k], the last as they are left after the chunk.
        similar, inside: [N, G, C, C] products of keys with keys (where what is held at keys is wanted) and queries with
            keys, of the latter nothing but what is read.
        fading: None where nothing fades. scale: With which keys go in.
    """
    increments = scale * k_out.sum(-2, keepdim=True).transpose(-1, -2)  # [N, G, d_k, 1]
    if fading is None:
        entering = torch.cat([normaliser[None, ..., None], increments]).cumsum(0)
        entering, after = entering[:-1], entering[-1]
    else:
        ones = increments.new_ones(*increments.shape[:2], 1, 1)
        entering, _, after = scan(normaliser[..., None], increments.transpose(-1, -2), ones, None, fading.carry)

    def at(columns: Tensor, products: Tensor) -> Tensor:
        before = columns @ entering if fading is None else fading.seen * (columns @ entering)
        return before[..., 0] + scale * products.sum(-1)

    match = at(q, inside)
    return Normalised(match if similar is None else at(k, similar.tril(-1)), match, None, after[..., 0])


def corrected(normaliser: Tensor, q: Tensor, k: Tensor, similar: Tensor, inside: Tensor) -> Normalised:
    """The normaliser that takes a key in by g = clip(1 - k z / |k|^2, 0, 1) (ARMT, eq. 7).

    Features are positive, so g <= 1 by itself, and g = max(0, c - L g) with L strictly lower. Once it is known which
    tokens are at 0, z goes through the chunks as a matrix does that takes away what it holds.

    Args:
        normaliser: [G, d_k] before the first chunk.
        q, k: [N, G, C, d_k]. similar, inside: [N, G, C, C] strictly lower products of keys and queries with keys.
    """
    square = k.square().sum(-1)
    per_square = inverse(square, 0.0)
    lower = similar * per_square[..., None]
    with torch.no_grad():
        active = above_zero(normaliser, k, lower, per_square).to(k.dtype)[..., None]
    solved = unit_inverse(active * lower)
    old = weighted(solved, active * per_square[..., None], k)
    entering, weight, after = scan(normaliser[..., None], k, solved @ active, old, None)
    held, match = (columns @ entering + products @ weight for columns, products in ((k, similar), (q, inside)))
    return Normalised(held[..., 0], match[..., 0], weight[..., 0], after[..., 0])


def above_zero(normaliser: Tensor, k: Tensor, lower: Tensor, per_square: Tensor) -> Tensor:
    """[N, G, C] which tokens have a g > 0 in g = max(0, c - L g), chunk after chunk.

    By Newton's method, of which every step settles at least one more token and most settle nearly all.
    """
    identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    z, found = normaliser[..., None], []
    for keys, below, per in zip(k, lower, per_square, strict=True):
        start = (per > 0).to(k.dtype) - per * (keys @ z)[..., 0]
        active = start > 0
        if bool(active.any()):
            for _ in range(k.shape[-2]):  # enough; rounding may let a token at the border of 0 change sides for ever
                weight = solve_weights(identity, active, below, start)
                again = start - (below @ weight[..., None])[..., 0] > 0
                if torch.equal(again, active):
                    break
                active = again
            z = z + keys.transpose(-1, -2) @ weight[..., None]
        found.append(active)
    return torch.stack(found)


def solve_weights(identity: Tensor, active: Tensor, lower: Tensor, start: Tensor) -> Tensor:
    """g = start - lower g where active and 0 elsewhere, [*, C]."""
    triangle = identity + active[..., None] * lower
    solved = torch.linalg.solve_triangular(triangle, (active * start)[..., None], upper=False, unitriangular=True)
    return solved[..., 0]


def norms(normaliser: Tensor, found: Normalised, k: Tensor) -> Tensor:
    """|z| as every token finds it, [N, G, C]: |z + w k|^2 = |z|^2 + 2 w k z + w^2 |k|^2."""
    weight = 1.0 if found.weight is None else found.weight
    growth = (2 * weight * found.held + weight * weight * k.square().sum(-1)).cumsum(-1)
    within = torch.nn.functional.pad(growth[..., :-1], (1, 0))
    grown = torch.cat([normaliser.square().sum(-1)[None, :, None], growth[..., -1:]]).cumsum(0)
    return root(grown[:-1] + within)


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
