"""Text in, text out: a chat over a memory cache, whose context is always what the chat template makes of it."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .memory import MemoryCache
from .memory.decoder import find_decoder


# For a tokenizer that has no chat template.
PLAIN_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
    {{- message['role'] | capitalize + ': ' + message['content'] + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""
PLAIN_STOP = "\nUser:"
# What a decoder puts where the bytes of a character are not all there yet.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class TurnInfo:
    """What one turn of a chat cost and left.

    Attributes:
        tokens_read: Tokens of the message and of the template around it that were not in context yet.
        tokens_generated: Tokens of the reply, its end included.
        tokens_written: Tokens that the memory took in; 0 when it was read only.
        memory_bytes: Size of the memory after the turn, without the context.
        seconds: Time that the turn took.
    """

    tokens_read: int
    tokens_generated: int
    tokens_written: int
    memory_bytes: int
    seconds: float

    @property
    def seconds_per_token(self) -> float:
        """Seconds of the whole turn per generated token."""
        return self.seconds / max(1, self.tokens_generated)


class MemoryChat:
    """A conversation with a model that has a memory, one person at a time.

    The context holds the ids that the model's own chat template gives for the conversation, end of the last turn
    included, and a turn feeds only what is new. Where the model's own reply reads differently once it is part of the
    template (other tokens for the same text, thoughts that the template leaves out), the context and the memory are
    taken back to the first difference. A tokenizer without chat template gets "User: …" and "Assistant: …" lines, and a
    reply then ends where the model begins a line of the user.

    Args:
        model: Any model; one without a memory of its own remembers without training.
        tokenizer: Its tokenizer.
        memory: The memory to go on with; a new one when None. Change it yourself (`decay`, `load_state_dict`, …) only
            between conversations.

    Raises:
        ValueError: when the model can have no memory, or the memory has several rows or an open conversation.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, memory: MemoryCache | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.memory = MemoryCache.for_model(model) if memory is None else memory
        self.memory.tokenizer = tokenizer
        if self.memory.rows not in (None, 1):
            raise ValueError(
                f"The memory holds {self.memory.rows} rows, but a chat is of one person. Pick a row with "
                "memory.select_rows([i])"
            )
        if self.memory.get_seq_length() > 0:
            raise ValueError(
                f"The memory has an open conversation of {self.memory.get_seq_length()} tokens that this chat knows "
                "nothing of. End it first with memory.clear_context()"
            )
        self._plain = tokenizer.chat_template is None
        self._forget_conversation()

    def _forget_conversation(self) -> None:
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []  # in context
        self._updates: list[bool] = []  # whether memory was updated, for every message of the user
        self._start: MemoryCache | None = None  # the memory as the conversation began

    @property
    def history(self) -> list[dict[str, str]]:
        """The messages of this conversation, as chat templates take them."""
        return [dict(message) for message in self._messages]

    @property
    def context_ids(self) -> list[int]:
        """The token ids that are in context."""
        return list(self._ids)

    def new_conversation(self) -> None:
        """End the conversation: the context is cleared, and the memory is read from now on."""
        self.memory.clear_context()
        self._forget_conversation()

    def reset(self) -> None:
        """Forget everything: the conversation and the memory."""
        self.memory.reset_memory()
        self._forget_conversation()

    def say(
        self,
        text: str,
        *,
        update_memory: bool = True,
        max_new_tokens: int = 256,
        streamer: Callable[[str], None] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[str, TurnInfo]:
        """Add a message of the user to the conversation and get the model's reply.

        Greedy unless `generate_kwargs` say otherwise. When anything is raised on the way, a KeyboardInterrupt or an
        error of `streamer` included, the chat and its memory are as they were before.

        Args:
            text: The message.
            update_memory: Whether memory takes in this turn; when False it is read and not changed.
            max_new_tokens: The longest reply, in tokens.
            streamer: Called with every piece of the reply as it comes; the pieces make up the reply.
            generate_kwargs: Anything else for `generate()`: `do_sample=True, temperature=0.7`, `stopping_criteria`, ….

        Returns:
            The reply, and what the turn cost.

        Raises:
            ValueError: for arguments that make no sense in a chat, for a conversation that outgrows the model's
                context, and when the memory's context was changed outside of this chat.
        """
        self._check_arguments(text, max_new_tokens, generate_kwargs)
        self._check_context()
        begun, before = time.perf_counter(), self.memory.snapshot()
        earlier = self._messages, self._ids, self._updates, self._start
        if self._start is None:
            self._start = before
        seen = self.memory.tokens_seen.sum().item()
        try:
            self._messages = [*self._messages, {"role": "user", "content": text}]
            prompt = self._render(self._messages, reply_follows=True)
            self._check_room(len(prompt), max_new_tokens)
            self._go_back(prompt)
            read = len(prompt) - len(self._ids)
            self._updates = [*self._updates, update_memory]
            with self._updating(update_memory):
                reply, generated = self._generate(prompt, max_new_tokens, streamer, generate_kwargs)
            self._messages = [*self._messages, {"role": "assistant", "content": reply}]
            closed = self._render(self._messages, reply_follows=False)
            self._go_back(closed)
            self._feed(closed[len(self._ids) :], update_memory and self._writes_replies)
        except BaseException:
            self.memory.restore(before)
            self._messages, self._ids, self._updates, self._start = earlier
            raise
        return reply, TurnInfo(
            tokens_read=read,
            tokens_generated=generated,
            tokens_written=int(self.memory.tokens_seen.sum().item() - seen),
            memory_bytes=self.memory.nbytes,
            seconds=time.perf_counter() - begun,
        )

    def _generate(
        self, prompt: list[int], max_new_tokens: int, streamer: Callable[[str], None] | None, kwargs: dict[str, Any]
    ) -> tuple[str, int]:
        """Generate the reply to `prompt`, whose beginning is in context; returns it and its number of tokens."""
        ids = torch.tensor([prompt], device=self.model.device)
        stream = ReplyStream(self._text, streamer)
        stopping = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        if self._plain:
            stopping.append(StopAtNextMessage(self._decode, len(prompt)))
        model: Any = self.model
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.memory,
            max_new_tokens=max_new_tokens,
            streamer=stream,
            stopping_criteria=stopping,
            **{"do_sample": False, **kwargs},
        )
        sequence = output[0].tolist()
        held = self.memory.get_seq_length()
        if held != len(sequence) - 1:  # the last token was generated and not fed
            raise ValueError(
                f"generate() left {held} tokens in context for a conversation of {len(sequence)}: with these "
                f"settings it feeds a conversation more than once. Leave them out: {sorted(kwargs)}"
            )
        self._ids = sequence[:-1]
        generated = sequence[len(prompt) :]
        reply = self._text(generated)
        stream.flush(reply)
        return reply, len(generated)

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up would change text that was streamed already.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _text(self, ids: list[int], *, complete: bool = True) -> str:
        """The text of generated ids: of a reply, or when not `complete` as much of it as later tokens cannot change."""
        text = self._decode(ids)
        if self._plain:
            text = text.partition(PLAIN_STOP)[0].removeprefix(" ")
        if complete:
            return text
        text = text.rstrip(INCOMPLETE)
        if self._plain:
            held = (n for n in range(len(PLAIN_STOP) - 1, 0, -1) if text.endswith(PLAIN_STOP[:n]))
            text = text[: len(text) - next(held, 0)]
        return text

    def _render(self, messages: list[dict[str, str]], *, reply_follows: bool) -> list[int]:
        """The ids that the chat template gives for messages."""
        encoded: Any = self.tokenizer.apply_chat_template(
            messages,
            chat_template=PLAIN_TEMPLATE if self._plain else None,
            add_generation_prompt=reply_follows,
            return_dict=True,
        )
        return list(encoded["input_ids"])

    def _go_back(self, ids: list[int]) -> None:
        """Take context and memory back until what is in context begins `ids`."""
        kept = shared_prefix(self._ids, ids)
        if kept == len(self._ids):
            return
        try:
            self.memory.forget(last=len(self._ids) - kept)
            self._ids = self._ids[:kept]
        except (ValueError, RuntimeError):  # too far back for the memory, or for sliding attention
            assert self._start is not None
            self.memory.restore(self._start)
            self._ids = []
            self._feed_turns(ids)

    def _feed_turns(self, ids: list[int]) -> None:
        """Feed the turns of this conversation again, as they stand in `ids`, each with its own memory update."""
        for turn, update in enumerate(self._updates):
            question, answered = self._messages[: 2 * turn + 1], self._messages[: 2 * turn + 2]
            answer = shared_prefix(ids, self._render(question, reply_follows=True))
            closed = self._render(answered, reply_follows=False)
            end = len(closed)
            if ids[:end] != closed:
                # The reply reads differently by now: this turn's is what no next message can change.
                said = self._messages[len(answered)]["content"]
                other = {"role": "user", "content": "b" if said.lstrip().startswith("a") else "a"}
                end = shared_prefix(ids, self._render([*answered, other], reply_follows=True))
            self._feed(ids[len(self._ids) : answer], update)
            self._feed(ids[len(self._ids) : end], update and self._writes_replies)

    @torch.no_grad()
    def _feed(self, ids: list[int], update_memory: bool) -> None:
        """Put ids into context."""
        if not ids:
            return
        with self._updating(update_memory):
            # Only the decoder: nobody asks for logits here.
            find_decoder(self.model)(
                input_ids=torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(self._ids) + len(ids), dtype=torch.long, device=self.model.device),
                past_key_values=self.memory,
                use_cache=True,
            )
        self._ids = [*self._ids, *ids]

    def _updating(self, update_memory: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if update_memory else self.memory.read_only()

    @property
    def _writes_replies(self) -> bool:
        return all(layer.writes_generated for layer in self.memory.memory_layers)

    def _check_arguments(self, text: str, max_new_tokens: int, kwargs: dict[str, Any]) -> None:
        if not isinstance(text, str):
            raise ValueError(f"say({text!r}) was called, but a message is a text (str)")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens!r} was given, but it must be a whole number of at least 1"
            )
        for name in ("num_beams", "num_return_sequences"):
            if kwargs.get(name) not in (None, 1):
                raise ValueError(
                    f"{name}={kwargs[name]!r} was given, but a chat has one reply, streamed as it comes. Leave "
                    f"{name} out, or call generate() with memory.fork(n)"
                )
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} was given, but assisted decoding would read the whole conversation again: transformers "
                    f"takes no context of earlier turns there. Leave {name} out"
                )
        ours = sorted(
            kwargs.keys() & {"inputs", "input_ids", "attention_mask", "past_key_values", "return_dict_in_generate"}
        )
        if ours:
            raise ValueError(f"{', '.join(ours)} was given, but the chat itself says what is fed. Leave it out")

    def _check_context(self) -> None:
        held = self.memory.get_seq_length()
        if held == 0:
            # Cleared by memory.clear_context() is a new conversation too.
            self._forget_conversation()
        elif held != len(self._ids):
            raise ValueError(
                f"The memory's context holds {held} tokens, but this chat put {len(self._ids)} there: something else "
                "was read into it. Call chat.new_conversation(), and keep other texts to a memory.fork(1)"
            )

    def _check_room(self, tokens: int, max_new_tokens: int) -> None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and tokens + max_new_tokens > limit:
            raise ValueError(
                f"The conversation has {tokens} tokens and the reply may have {max_new_tokens}, but the model's "
                f"context holds {limit}. Call chat.new_conversation(): the memory stays; or lower max_new_tokens"
            )


class ReplyStream(BaseStreamer):
    """Hands the text of generated tokens on as soon as later tokens cannot change it.

    Args:
        text: The text of ids; called with `complete=False` while more is to come.
        receive: Called with every piece, or None.
    """

    def __init__(self, text: Callable[..., str], receive: Callable[[str], None] | None) -> None:
        self.text = text
        self.receive = receive
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.is_prompt:  # `generate()` begins with it
            self.is_prompt = False
        elif self.receive is not None:
            self.ids.extend(value.flatten().tolist())
            self.flush(self.text(self.ids, complete=False))

    def end(self) -> None:
        """Nothing: the end of the text is known when the whole sequence is (see `flush`)."""

    def flush(self, text: str) -> None:
        """Hand on what `text` has beyond what was handed on before."""
        if self.receive is not None and len(text) > len(self.shown):
            piece, self.shown = text[len(self.shown) :], text
            self.receive(piece)


class StopAtNextMessage(StoppingCriteria):
    """Ends a reply where the model, without a template of its own, goes on to write the user's next message."""

    def __init__(self, decode: Callable[[list[int]], str], prompt_length: int) -> None:
        self.decode = decode
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stops = [PLAIN_STOP in self.decode(row[self.prompt_length :].tolist()) for row in input_ids]
        return torch.tensor(stops, device=input_ids.device)


def shared_prefix(first: list[int], second: list[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
