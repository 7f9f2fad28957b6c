"""How much of a model's attention goes to what memory holds, watched in one of its layers.

Attention kernels do not hand out where attention went. In one layer it is worked out beside them, from the queries and
keys that they are given; where attention is written out, its softmax is read.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


QUERIES_AT_ONCE = 256


class AttentionMass(TorchFunctionMode):
    """While it is entered, takes note of the attention that columns get.

    Args:
        tokens: T, that are in the pass. columns: M + ctx + T, that they attend to. memory: M, the first of them.
    """

    def __init__(self, tokens: int, columns: int, memory: int) -> None:
        super().__init__()
        self.tokens, self.columns, self.memory = tokens, columns, memory
        self.found: Tensor | None = None  # [B, T, M] float32, mean over heads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is nn.functional.scaled_dot_product_attention:
            found = self.of_kernel(*args, **kwargs)
            self.found = self.found if found is None else found
        elif function in (nn.functional.softmax, torch.softmax, Tensor.softmax) and self.is_attention(result):
            self.found = result.detach()[..., : self.memory].float().mean(1)
        return result

    def is_attention(self, weights: Tensor) -> bool:
        """Whether these are [B, H, T, M + ctx + T], or a column more for a learned sink."""
        return weights.dim() == 4 and weights.shape[2] == self.tokens and weights.shape[3] - self.columns in (0, 1)

    @torch.no_grad()
    def of_kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        if query.dim() != 4 or key.shape[2] != self.columns or is_causal:
            return None
        if attn_mask is not None and attn_mask.dim() != 4:
            return None
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        found = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            scores = (query[:, :, part] @ key.transpose(2, 3)).float() * scale
            if attn_mask is not None:
                mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, part]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            found.append(scores.softmax(-1)[..., : self.memory].mean(1))
        read = torch.cat(found, dim=1)
        # Of a single token the heads that share keys may come as if they were tokens.
        return read if read.shape[1] == self.tokens else read.mean(1, keepdim=True)


# The watch that is on in each thread: at most one.
_on = threading.local()


def start_watching(watch: AttentionMass) -> None:
    stop_watching()  # of a pass that was interrupted in between
    _on.watch = watch
    watch.__enter__()


def stop_watching() -> Tensor | None:
    """End the watch that is on, if one is; what it found."""
    watch, _on.watch = getattr(_on, "watch", None), None
    if watch is None:
        return None
    watch.__exit__(None, None, None)
    return watch.found


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules in which attention fills the layers of a cache, in their order; none where modules do not say so."""
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            found.setdefault(index, module)
    return [found[index] for index in sorted(found)]
