"""How surprising tokens are to the model that reads them."""

from typing import Any

import torch
from torch import Tensor


LOGITS_AT_ONCE = 256


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """The model's logits, in float32, of its last hidden states [..., D]."""
    # The head is looked up now: adapters and resizing put other modules there.
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config(decoder=True)
    for name, scaled in (("logit_scale", logits.mul), ("logits_scaling", logits.div)):
        factor = getattr(config, name, None)
        if factor is not None:
            logits = scaled(factor)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


@torch.no_grad()
def token_surprise(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """-log p in nats of ids [B, T] under the model, each from the hidden state [B, T, D] of the token before it.

    The logits of a few hundred tokens are held at once.
    """
    pieces = zip(hidden.flatten(0, 1).split(LOGITS_AT_ONCE), ids.flatten().split(LOGITS_AT_ONCE), strict=True)
    surprise = []
    for source, target in pieces:
        logits = logits_of(model, source)
        surprise.append(logits.logsumexp(-1) - logits.gather(-1, target[:, None])[:, 0])
    return torch.cat(surprise).view(ids.shape)
