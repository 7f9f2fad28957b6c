"""`senri-hf generate`: text from a trained model."""

import argparse
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `generate` to the command line."""
    parser = commands.add_parser("generate", help="continue a prompt, or answer it, with a trained model")
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="what train or merge wrote")
    parser.add_argument("--prompt", required=True, help="text to continue; a question for an instruction-tuned model")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.set_defaults(run=run_generate)


def run_generate(arguments: argparse.Namespace) -> int:
    """Print the new text."""
    import torch

    from ..training import run as runs

    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens} was given, but it must be at least 1")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature {arguments.temperature} was given, but it must not be negative")
    run = runs.load_checkpoint(arguments.checkpoint)
    chats = run.config.training.training_mode == "instruction_finetuning"
    inputs: Any
    if chats:
        messages = [{"role": "user", "content": arguments.prompt}]
        inputs = run.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = run.tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    sampling: dict[str, Any] = {"do_sample": arguments.temperature > 0}
    if arguments.temperature:
        sampling["temperature"] = arguments.temperature
    with torch.no_grad():
        output = run.model.generate(**inputs.to(run.model.device), max_new_tokens=arguments.max_new_tokens, **sampling)
    print(run.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return 0
