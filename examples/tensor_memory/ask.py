"""Answers questions from a memory that another process left; `windows.py` runs it."""

import torch
from safetensors.torch import load_file
from settings import FOLDER
from transformers import AutoModelForCausalLM

from senri_hf import MemoryCache
from senri_hf.files import write_json


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model").eval()
    memory = MemoryCache.from_pretrained(FOLDER / "memory", model=model)
    questions = load_file(FOLDER / "questions.safetensors")
    empty = MemoryCache.for_model(model)
    found = {}
    with torch.no_grad():
        for name, held in (("in another process", memory), ("there, with an empty memory", empty)):
            answers = model(questions["asked"], past_key_values=held).logits[:, :-1].argmax(-1)
            labels = questions["labels"][:, 1:]
            found[name] = (answers == labels)[labels >= 0].float().mean().item()
    write_json(FOLDER / "answers.json", found)
