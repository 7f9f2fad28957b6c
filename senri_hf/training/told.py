"""What told conversations leave in memory, computed once a text."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..adapters.episodic import EpisodicBlock
from ..adapters.layer import MemoryAdapterLayer
from ..memory import EpisodicLayer, MemoryCache
from ..memory.decoder import find_decoder
from ..memory.episodic_layer import Tokens
from .skipping import DecoderLayers


Text = tuple[int, ...]  # a conversation's ids

ROWS_AT_ONCE = 32
# Tokens that texts have to begin with alike to be read together after that beginning, which is then read once: those
# of a chat template, or of a system's message.
BEGINNING = 8


class ToldStates:
    """Layer inputs of conversations that were read with a blank memory, kept by the conversation's ids.

    They do not change while the base model is frozen, so every text is read once. Nor do those of the first layer with
    memory, whatever memory holds, nor the base model's predictions of what is to stay as it is: with them a pass with
    memory begins at that layer (`from_below`), and one without has only predictions left to make (`as_without`).

    Attributes:
        dtype: In which states that are written are kept.

    Raises:
        ValueError: when more than memory is trained, or a memory's surprise is the model's own (`surprise="nll"`),
            which is not kept.
    """

    dtype = torch.bfloat16

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
        self.places = [adapter.layer_idx for adapter in self.layers]
        self.stack = DecoderLayers(self.decoder, {a.layer_idx: layer for a, layer in self.layers.items()})
        self.states: dict[tuple[int, ...], list[Tensor]] = {}  # for every layer with memory [T, D]
        # Of conversations with tokens that are to stay as they are, in the model's own dtype: what comes to the first
        # layer with memory, and what the last layer makes of it, [T, D].
        self.kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def blocks(self) -> list[tuple[int, EpisodicBlock]]:
        """The blocks that write, each with its layer's place in what `layer_inputs` and `states_of` return."""
        return [
            (index, cast(EpisodicBlock, block))
            for index, adapter in enumerate(self.layers)
            for block in adapter.blocks.values()
        ]

    def read(self, conversations: list[dict[str, Any]]) -> None:
        """Read the conversations without a label that were not read before."""
        told, kept = set(), set()
        for conversation in conversations:
            texts = texts_of(conversation["input_ids"], conversation["attention_mask"])
            if not conversation["learns"]:
                told |= set(texts) - self.states.keys()
            marked = conversation["keep"].any(1).tolist() if conversation["keeps"] else []
            kept |= {text for text, keeps in zip(texts, marked, strict=False) if keeps} - self.kept.keys()
        for text, found in self._read(kept, len(self.stack.layers)):
            self.kept[text] = found[min(self.places)].clone(), found[len(self.stack.layers)].clone()
            self.states[text] = [found[place].to(self.dtype, copy=True) for place in self.places]
        for text, found in self._read(told - kept - {()}, max(self.places)):
            self.states[text] = [found[place].to(self.dtype, copy=True) for place in self.places]

    def layer_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """The inputs [B, T, D] of all layers with memory, read with a blank one."""
        texts = texts_of(input_ids, attention_mask)
        found = dict(self._read(set(texts) - {()}, max(self.places)))
        return [
            spread([found[text][place] for text in texts if text], attention_mask, adapter.hidden_size)
            for place, adapter in zip(self.places, self.layers, strict=True)
        ]

    def below(self, conversations: list[dict[str, Any]]) -> list[Tensor | None]:
        """What comes to the first layer with memory of every conversation with a label, [B, T, D]; None of others."""
        first = min(self.places)
        learned = [
            texts_of(conversation["input_ids"], conversation["attention_mask"]) if conversation["learns"] else []
            for conversation in conversations
        ]
        found = dict(self._read({text for texts in learned for text in texts} - {()}, first))
        size = next(iter(self.layers)).hidden_size
        return [
            spread([found[text][first] for text in texts if text], conversation["attention_mask"], size)
            if conversation["learns"]
            else None
            for texts, conversation in zip(learned, conversations, strict=True)
        ]

    def from_below(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's pass begins with these states [B, T, D] at the first layer with memory."""
        return self.stack.skipped(0, min(self.places), states)

    def kept_below(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What comes to the first layer with memory, [B, T, D], of a conversation whose rows stay as they are."""
        return self._kept(0, input_ids, attention_mask)

    def as_without(self, input_ids: Tensor, attention_mask: Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's pass of a conversation whose rows stay as they are gives what the base model predicts."""
        return self.stack.skipped(0, len(self.stack.layers), self._kept(1, input_ids, attention_mask))

    def _kept(self, part: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        held = [self.kept[text][part] for text in texts_of(input_ids, attention_mask)]
        return spread(held, attention_mask, held[0].shape[-1])

    @torch.no_grad()
    def _read(self, texts: set[Text], stop: int) -> Iterator[tuple[Text, dict[int, Tensor]]]:
        """Every text with the inputs [T, D] of the layers with memory that come before or at `stop`.

        Layers from there on are skipped; with all of them, what the last one makes of a text stands at their number.
        """
        device = next(self.decoder.parameters()).device
        places = [place for place in (*self.places, len(self.stack.layers)) if place <= stop]
        for group in alike(texts):
            for start in range(0, len(group), ROWS_AT_ONCE):
                rows = group[start : start + ROWS_AT_ONCE]
                found = self._pass([torch.tensor(row, device=device) for row in rows], places, stop)
                for index, row in enumerate(rows):
                    yield row, {place: states[index, : len(row)] for place, states in found.items()}

    def _pass(self, texts: list[Tensor], places: list[int], stop: int) -> dict[int, Tensor]:
        """The inputs [B, T, D] of the layers at `places` of texts that may begin alike; there they are read once."""
        begun = beginning(texts)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        ids = pad_sequence(texts, batch_first=True)
        skipped = contextlib.nullcontext() if self.stack.in_tuples is None else self.stack.skipped(stop, None)
        with skipped, self.stack.seen(places) as found:
            cache = DynamicCache(config=cast(PreTrainedModel, self.decoder).config) if begun else None
            if cache is not None:
                self.decoder(input_ids=ids[:1, :begun], past_key_values=cache, use_cache=True)
                if cache.get_seq_length() == begun and all(isinstance(layer, DynamicLayer) for layer in cache.layers):
                    cache.batch_repeat_interleave(len(texts))
                else:  # a model that keeps no cache here, or something of which nothing is known
                    cache, begun = None, 0
            before = {place: states.expand(len(texts), -1, -1) for place, states in found.items()} if begun else {}
            self.decoder(
                input_ids=ids[:, begun:], attention_mask=mask, past_key_values=cache, use_cache=cache is not None
            )
        return {place: torch.cat([before[place], found[place]], dim=1) if begun else found[place] for place in places}

    def states_of(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """For every layer [B, T, D] of a conversation whose rows were `read` before, and which are real, [B, T]."""
        rows = texts_of(input_ids, attention_mask)
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
                asked = encoded.new_zeros(*real.shape, 0)  # the conversation ends here and asked for nothing
                tokens = Tokens(encoded, torch.zeros_like(encoded[..., 0]), asked, asked, real)
                block.write_predicted(layer, tokens, all_real=True, whole=True)  # padding comes last and is not written


def texts_of(input_ids: Tensor, attention_mask: Tensor) -> list[Text]:
    """The real ids of every row."""
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]


def spread(rows: list[Tensor], attention_mask: Tensor, size: int) -> Tensor:
    """States of rows that have real tokens, [T, D] of these each, as [B, T, D]; zero at padding."""
    states = rows[0].new_zeros(*attention_mask.shape, size)
    states[attention_mask.bool()] = torch.cat(rows)
    return states


def alike(texts: set[Text]) -> list[list[Text]]:
    """Texts in groups of such as begin alike, and one of all others, the shortest first in each."""
    groups: dict[Text, list[Text]] = {}
    for text in texts:
        groups.setdefault(text[:BEGINNING], []).append(text)
    alone = [text for group in groups.values() if len(group) == 1 for text in group]
    together = [group for group in groups.values() if len(group) > 1]
    return [sorted(group, key=lambda text: (len(text), text)) for group in (*together, alone) if group]


def beginning(texts: list[Tensor]) -> int:
    """How many tokens texts begin with alike, fewer than any of them has; 0 for fewer than are worth a pass."""
    shortest = min(map(len, texts)) - 1
    first = torch.stack([text[:shortest] for text in texts])
    alike = int((first == first[0]).all(0).long().cumprod(0).sum())
    return alike if alike >= BEGINNING and len(texts) > 1 else 0
