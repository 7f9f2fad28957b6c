"""Tokenizers and templates to chat with tiny models: every way in which a reply can read differently in a template."""

from typing import Any

from models import VOCABULARY, Subject, subjects
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from senri_hf.bases import GEMMA_CHAT_TEMPLATE


SPECIAL = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<eos>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
# As templates of reasoning models do: only the last reply stays as it was, and the generation prompt says more.
FORGETFUL = (
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{{ message['content'][3:] if message['role'] == 'assistant' and not loop.last else message['content'] }}"
    "{{ '<eos>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n-' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "gemma": GEMMA_CHAT_TEMPLATE, "forgetful": FORGETFUL, "plain": None}
WORDS = [
    "assistant",
    "user",
    "User",
    "Assistant",
    "model",
    *":\n-",
    "hello",
    "my",
    "name",
    "is",
    "Alice",
    "what",
    "and",
    "me",
]


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes with a few merges: most of what a random model says is no text, or other tokens when it is read again."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "s"), ("l", "l"), ("m", "y"), ("u", "s"), ("e", "r"), ("us", "er"), ("n", "a")]
    vocabulary = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, template)


def word_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Words between spaces and newlines: what is said reads as the same tokens again."""
    vocabulary = [*SPECIAL, *WORDS, "<unk>"]
    vocabulary += [f"word{i}" for i in range(VOCABULARY - len(vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    return wrapped(tokenizer, template)


def wrapped(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    fast.chat_template = template
    return fast


def chat_model(
    tokenizer: PreTrainedTokenizerFast, arch: str = "llama", model: Any = None, **settings: Any
) -> PeftModel:
    """A tiny model with a memory that changes its logits, with the vocabulary of a tokenizer."""
    subject = subjects(arch, ["default"])[0]
    assert isinstance(subject, Subject)
    return subject.build(model={"vocab_size": len(tokenizer), **(model or {})}, **settings)
