"""What language models have in common once their decoder has run: the head, the loss of next tokens, the output."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple


class CausalLanguageModel:
    """A decoder with a language model's head: put it before a family's `PreTrainedModel` and `GenerationMixin`.

    Args:
        config: Of the family.
        model: The decoder, an instance of `decoder_class`; made from the config when None.
    """

    decoder_class: ClassVar[type[nn.Module]]
    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan: Any = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan: Any = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    config: Any
    loss_function: Any
    post_init: Any

    def __init__(self, config: Any, model: nn.Module | None = None) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model: Any = self.decoder_class(config) if model is None else model
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of next tokens, and their loss where `labels` [B, T] are given (-100 is left out).

        Arguments that are not named here are the decoder's.

        Args:
            logits_to_keep: How many of the last columns get logits, or which; all of them when None or 0.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return CausalLMOutputWithPast(**self.predictions(outputs, labels, logits_to_keep, **kwargs))

    def predictions(
        self,
        outputs: BaseModelOutputWithPast,
        labels: Tensor | None,
        logits_to_keep: int | Tensor | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The fields of a language model's output, from its decoder's."""
        assert outputs.last_hidden_state is not None
        kept = 0 if logits_to_keep is None else logits_to_keep
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, kept))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return {
            "loss": loss,
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }


class RememberingLanguageModel(CausalLanguageModel):
    """A language model whose decoder writes a memory, and can be told not to."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        update_memory: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of next tokens, and their loss where `labels` [B, T] are given (-100 is left out).

        Arguments that are not named here are the decoder's.

        Args:
            logits_to_keep: How many of the last columns get logits, or which; all of them when None or 0.
            update_memory: Whether the tokens are written into memory; None for True.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            update_memory=update_memory is not False,
            **kwargs,
        )
        return CausalLMOutputWithPast(**self.predictions(outputs, labels, logits_to_keep, **kwargs))
