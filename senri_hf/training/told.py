"""What told conversations leave in memory, computed once a text."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..adapters.episodic import EpisodicBlock
from ..adapters.layer import MemoryAdapterLayer
from ..memory import EpisodicLayer, MemoryCache
from ..memory.decoder import find_decoder
from ..memory.episodic_layer import Tokens


ROWS_AT_ONCE = 32


class ToldStates:
    """Layer inputs of conversations that were read with a blank memory, kept in bfloat16 by the conversation's ids.

    They do not change while the base model is frozen, so every text is read once.

    Raises:
        ValueError: when more than memory is trained, or a memory's surprise is the model's own (`surprise="nll"`),
            which is not kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder = find_decoder(model)  # the LM head is not needed
        self.layers = {
            adapter: layer
            for layer in model.modules()
            for adapter in layer.children()
            if isinstance(adapter, MemoryAdapterLayer)
        }
        ours = {id(parameter) for adapter in self.layers for parameter in adapter.parameters()}
        others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
        if others:
            raise ValueError(
                f"reuse_told_states=True needs everything but memory to be frozen, but {others[0]} and "
                f"{len(others) - 1} more parameters are trained; leave it out"
            )
        blocks = [block for adapter in self.layers for block in adapter.blocks.values()]
        if not all(isinstance(block, EpisodicBlock) and block.predictor is not None for block in blocks):
            raise ValueError(
                "reuse_told_states=True works with mechanism='episodic' and surprise='predictor' only; use one or the "
                "other"
            )
        self.states: dict[tuple[int, ...], list[Tensor]] = {}  # for every layer [T, D]

    def read(self, conversations: list[dict[str, Any]]) -> None:
        """Read the conversations without a label that were not read before."""
        new = {}
        for conversation in conversations:
            if not conversation["learns"]:
                rows = zip(conversation["input_ids"], conversation["attention_mask"], strict=True)
                for ids in (row[mask.bool()].tolist() for row, mask in rows):
                    if ids and tuple(ids) not in self.states:
                        new[tuple(ids)] = ids
        texts = sorted(new.values(), key=len)
        device = conversations[0]["input_ids"].device
        for start in range(0, len(texts), ROWS_AT_ONCE):
            self._read([torch.tensor(ids, device=device) for ids in texts[start : start + ROWS_AT_ONCE]])

    @property
    def blocks(self) -> list[tuple[int, EpisodicBlock]]:
        """The blocks that write, each with its layer's place in what `layer_inputs` and `states_of` return."""
        return [
            (index, cast(EpisodicBlock, block))
            for index, adapter in enumerate(self.layers)
            for block in adapter.blocks.values()
        ]

    @torch.no_grad()
    def layer_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """The inputs [B, T, D] of all layers with memory, read with a blank one."""
        inputs: dict[MemoryAdapterLayer, Tensor] = {}

        def note(adapter: MemoryAdapterLayer) -> Any:
            def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs[adapter] = args[0] if args else kwargs["hidden_states"]

            return hook

        handles = [layer.register_forward_pre_hook(note(a), with_kwargs=True) for a, layer in self.layers.items()]
        try:
            self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [inputs[adapter] for adapter in self.layers]

    def _read(self, texts: list[Tensor]) -> None:
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        inputs = self.layer_inputs(pad_sequence(texts, batch_first=True), mask)
        for row, text in enumerate(texts):
            self.states[tuple(text.tolist())] = [states[row, : len(text)].bfloat16() for states in inputs]

    def states_of(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """For every layer [B, T, D] of a conversation whose rows were `read` before, and which are real, [B, T]."""
        rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
        real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        states = []
        for index, adapter in enumerate(self.layers):
            empty = torch.zeros(0, adapter.hidden_size, device=input_ids.device)
            held = [self.states[row][index].float() if row else empty for row in rows]
            states.append(pad_sequence(held, batch_first=True))
        return states, real

    def write(self, memory: MemoryCache, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Write a conversation, ids and mask [B, T], into the memory; every row was `read` before."""
        states, real = self.states_of(input_ids, attention_mask)
        for index, adapter in enumerate(self.layers):
            for name, block in adapter.blocks.items():
                layer = memory.memory_layer(adapter.layer_idx, name)
                assert isinstance(layer, EpisodicLayer) and isinstance(block, EpisodicBlock)
                encoded = block.encode(states[index])
                access = encoded.new_zeros(*real.shape, layer.config.store_slots)
                asked = encoded.new_zeros(*real.shape, 0)  # the conversation ends here and asked for nothing
                tokens = Tokens(encoded, torch.zeros_like(encoded[..., 0]), access, asked, real)
                block.write_predicted(layer, tokens, all_real=False)
