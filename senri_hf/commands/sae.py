"""`senri-hf sae`: train a sparse autoencoder on a model's layer, measure it, read and dose its latents, exchange it."""

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..configuration.sparse_autoencoder import VARIANTS
from ..files import write_json


if TYPE_CHECKING:
    from torch import Tensor


# What is read where nothing else is said. What is measured on is another book: pieces of one book share its people and
# places.
TRAINING_TEXT = ("doctor-moreau", "dubliners", "brother-jacob")
HELD_OUT_TEXT = ("heart-of-darkness",)
# Latents that are shown where none are named; the first of them are dosed.
SAMPLE = 20
# Multiples of a latent's largest activation: nothing, what it reaches, and more than that.
DOSES = (0.0, 0.25, 0.5, 1.0, 2.0)
# What followed in fewer places says little of what a latent promotes.
LEAST_CONTEXTS = 3
# What training writes beside the autoencoder: before its first step, and after its last.
SETTINGS, TRAINING = "settings.json", "training.json"
# Arguments that are no settings of a training, and those that may change when it is resumed.
NO_SETTINGS, CHANGEABLE = ("run", "output", "resume"), ("steps", "save_every")
Item = TypeVar("Item")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `sae` and its actions to the command line."""
    parser = commands.add_parser("sae", help="sparse autoencoders of a model's activations")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    train = actions.add_parser("train", help="train one on real text")
    add_text(train, TRAINING_TEXT)
    add = train.add_argument
    add("--model", default="smollm2-135m-instruct", help="a base model by name, a folder, or a Hub id")
    add("--module", required=True, help="module whose output it is for, such as model.layers.8")
    add("--output", type=Path, required=True, help="folder to write")
    add("--variant", choices=VARIANTS, default="batchtopk")
    add("--expansion-factor", type=float, default=4, help="latents per dimension")
    add("--k", type=int, default=32, help="active latents, for topk and batchtopk")
    add("--sparsity-coefficient", type=float, default=1.0, help="penalty, for relu, jumprelu and gated")
    add("--skip-positions", type=int, default=1, help="first tokens of a piece that it is not for: attention sinks")
    add("--steps", type=int, default=500)
    add("--batch-size", type=int, default=1024, help="activations of a step")
    add("--buffer-size", type=int, default=80_000, help="activations held in memory to be shuffled")
    add("--reuse", type=int, default=7, help="how often each activation is used before the text is read on")
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add(
        "--resume",
        action="store_true",
        help="go on at the last checkpoint in the folder, if there is one; only --steps and --save-every may be others",
    )
    train.set_defaults(run=run_train)

    measure = actions.add_parser("evaluate", help="measure one on text that training did not see")
    add_look(measure, pieces=64)
    measure.set_defaults(run=run_evaluate)

    contexts = actions.add_parser("contexts", help="show where latents are most active")
    add_look(contexts, pieces=None)
    contexts.add_argument("--latents", type=int, nargs="*", help="which; a sample of the living ones when not said")
    contexts.add_argument("--count", type=int, default=SAMPLE, help="latents in the sample")
    contexts.add_argument("--top", type=int, default=5, help="contexts of each")
    contexts.set_defaults(run=run_contexts)

    doses = actions.add_parser("doses", help="show what rising doses of latents make the model say, beside random ones")
    add_look(doses, pieces=None)
    add = doses.add_argument
    add("--latents", type=int, nargs="+", help="which; the first ones of the sample of `contexts` when not said")
    add("--count", type=int, default=4, help="latents of the sample")
    add("--top", type=int, default=5, help="contexts of each: the tokens after them are those that it is to promote")
    add("--doses", type=float, nargs="+", default=[*DOSES], help="multiples of a latent's largest activation")
    add("--controls", type=int, default=3, help="random latents, and random directions, beside each")
    add("--measured", type=int, default=8, help="pieces to measure on, drawn at random; no context is of these")
    add("--measured-tokens", type=int, default=128, help="tokens of each of them, from its beginning")
    add("--seed", type=int, default=0, help="of the controls")
    doses.set_defaults(run=run_doses)

    for name, what in (("export", "write one in SAELens' format"), ("import", "read one in SAELens' format")):
        exchange = actions.add_parser(name, help=what)
        exchange.add_argument("source", type=Path)
        exchange.add_argument("target", type=Path)
        exchange.set_defaults(run=run_export if name == "export" else run_import)


def add_look(parser: argparse.ArgumentParser, pieces: int | None) -> None:
    """The arguments of what looks at an autoencoder: which, of which model, in which text, and the file to write."""
    add = parser.add_argument
    add("sae", type=Path, help="its folder")
    add_text(parser, HELD_OUT_TEXT)
    add("--model", help="the model that it was trained on, where it does not say so itself")
    add("--pieces", type=int, default=pieces, help=f"pieces to read, drawn at random; {pieces or 'all'} when not said")
    add("--output", type=Path, help="JSON file to write")


def add_text(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The arguments that say how which text is read."""
    add = parser.add_argument
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--text", nargs="+", default=[*default], help="names of senri_hf.tasks.text, or text files")
    add("--piece", type=int, default=256, help="tokens that are read together")
    add("--rows", type=int, default=8, help="pieces in a batch")


def texts(sources: Sequence[str]) -> dict[str, str]:
    """Texts by their names in `senri_hf.tasks.text`, or the whole paths of their files."""
    from ..tasks.text import TEXT_SOURCES, ordinary_text

    found = {}
    for source in sources:
        if source in TEXT_SOURCES:
            found[source] = "\n\n".join(ordinary_text(source))
        elif Path(source).is_file():
            found[str(Path(source).resolve())] = Path(source).read_text(encoding="utf-8")
        else:
            raise ValueError(f"--text {source!r} is neither a file nor one of {', '.join(TEXT_SOURCES)}")
    return found


def digests(of: dict[str, str]) -> dict[str, str]:
    """What tells a text from any other, whatever its name."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in of.items()}


def pieces(of: dict[str, str], tokenizer: Any, length: int) -> "list[Tensor]":
    """Texts as ids, in pieces [length]; what is left at the end of each is shorter, and left out."""
    import torch

    cut: list[Tensor] = []
    for text in of.values():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        cut += [piece for piece in ids.split(length) if len(piece) == length]
    if not cut:
        raise ValueError(f"--text {' '.join(of)} is shorter than one piece of {length} tokens")
    return cut


def drawn(of: list[Item], count: int | None, option: str = "--pieces") -> list[Item]:
    """So many pieces, always the same ones, in the order of the text; all when None.

    Args:
        option: Where the count is said.
    """
    if count is not None and count < 1:
        raise ValueError(f"{option} {count} was given, but at least one piece has to be read")
    if count is None or count >= len(of):
        return of
    return [of[index] for index in sorted(random.Random(0).sample(range(len(of)), count))]


def batches(of: "list[Tensor]", rows: int) -> "list[dict[str, Tensor]]":
    """Pieces as arguments of a model."""
    import torch

    return [{"input_ids": torch.stack(of[start : start + rows])} for start in range(0, len(of), rows)]


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from ..bases import load_base

    return load_base(arguments.model, dtype=arguments.dtype)


def run_train(arguments: argparse.Namespace) -> int:
    """Train an autoencoder; an interrupted run goes on with `--resume`."""
    import torch
    from transformers import set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from ..configuration.sparse_autoencoder import SparseAutoencoderConfig
    from ..interpretability import (
        ActivationStream,
        SparseAutoencoder,
        SparseAutoencoderTrainer,
        SparseAutoencoderTrainingArguments,
        module_activations,
    )

    began = time.perf_counter(), time.process_time()
    read = texts(arguments.text)
    settings = {name: value for name, value in vars(arguments).items() if name not in (*NO_SETTINGS, "text")}
    settings["text"] = digests(read)
    check_folder(arguments.output, settings, arguments.resume)
    model, tokenizer = load(arguments)
    set_seed(arguments.seed)
    training = pieces(read, tokenizer, arguments.piece)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(arguments.seed))
    shuffled = batches([training[index] for index in order.tolist()], arguments.rows)

    def source(start: int) -> "Iterator[Tensor]":
        skip = arguments.skip_positions
        return module_activations(model, arguments.module, shuffled, skip_positions=skip, start=start)

    stream = ActivationStream(source, arguments.batch_size, arguments.buffer_size, arguments.reuse, arguments.seed)
    config = SparseAutoencoderConfig(
        d_in=next(iter(source(0))).shape[-1],
        expansion_factor=arguments.expansion_factor,
        variant=arguments.variant,
        k=arguments.k,
        sparsity_coefficient=arguments.sparsity_coefficient,
        skip_positions=arguments.skip_positions,
        model_name=arguments.model,
        hook_name=arguments.module,
    )
    training_arguments = SparseAutoencoderTrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        learning_rate=arguments.lr,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        sparsity_warmup_steps=arguments.steps // 10,
        logging_steps=max(1, arguments.steps // 50),
        save_steps=arguments.save_every,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=False,
        seed=arguments.seed,
    )
    # The time to load the model and to read the text counts as well.
    setup = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    trainer = SparseAutoencoderTrainer(SparseAutoencoder(config), training_arguments, stream)
    write_json(arguments.output / SETTINGS, settings)
    # In a folder that is not resumed there is none.
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(arguments.output)))
    trainer.save_model()
    found = {name: setup[name] + taken for name, taken in trainer.elapsed().items()}
    write_json(arguments.output / TRAINING, {**found, "log": trainer.state.log_history})
    print(f"{arguments.output}")
    return 0


def check_folder(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """ValueError when a folder is in use and is not to be resumed, or is of another training than settings say."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise ValueError(f"{folder} is in use: go on with --resume, or name another folder")
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} has no {SETTINGS}: there is no training in it that could be resumed")
    before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    names = [name for name in settings if name not in CHANGEABLE and settings[name] != before.get(name)]
    if names:
        changed = ", ".join(f"{name}={before.get(name)!r}, not {settings[name]!r}" for name in names)
        raise ValueError(f"{folder} holds a training with {changed}: name another folder")


def opened(arguments: argparse.Namespace, held_out: bool) -> "tuple[Any, Any, Any, list[Tensor]]":
    """An autoencoder, its model, the tokenizer, and pieces of text to look at it with.

    Args:
        held_out: Whether text that it was trained on is refused.
    """
    from ..interpretability import SparseAutoencoder

    sae = SparseAutoencoder.from_pretrained(arguments.sae).eval()
    read = texts(arguments.text)
    if held_out:
        check_held_out(arguments.sae, read)
    arguments.model = model_name(sae, arguments.model)
    model, tokenizer = load(arguments)
    return sae, model, tokenizer, drawn(pieces(read, tokenizer, arguments.piece), arguments.pieces)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measure an autoencoder on text that training did not see."""
    from ..interpretability import module_activations, prediction_metrics, reconstruction_metrics

    sae, model, _, read = opened(arguments, held_out=True)
    held_out = batches(read, arguments.rows)
    place, skip = hook_name(sae), sae.config.skip_positions
    found = reconstruction_metrics(sae, module_activations(model, place, held_out, skip_positions=skip))
    density = found.pop("density")
    found |= prediction_metrics(model, place, sae, held_out)
    found["density"] = density.tolist()
    if arguments.output:
        write_json(arguments.output, found)
    for name, value in found.items():
        if name != "density":
            print(f"{name:26s} {value:,.4f}" if isinstance(value, float) else f"{name:26s} {value:,}")
    return 0


def run_contexts(arguments: argparse.Namespace) -> int:
    """Show the text around the tokens at which latents are most active."""
    from ..interpretability import top_contexts

    sae, model, tokenizer, read = opened(arguments, held_out=False)
    shown = top_contexts(
        model,
        tokenizer,
        hook_name(sae),
        sae,
        batches(read, arguments.rows),
        latents=arguments.latents,
        count=arguments.count,
        top=arguments.top,
    )
    if arguments.output:
        write_json(arguments.output, shown)
    for entry in shown:
        print(f"latent {entry['latent']}, active at {100 * entry['density']:.2f}% of tokens")
        for context in entry["contexts"]:
            print(f"  {context['value']:7.2f}  {context['before']}[[{context['token']}]]{context['after']}")
    return 0


def run_doses(arguments: argparse.Namespace) -> int:
    """Show what rising doses of latents make the model say, beside random latents and random directions."""
    from ..interpretability import peak_activations, plots, promotion_doses
    from ..interpretability.sparse_autoencoder import check_latents

    check_doses(arguments)
    sae, model, tokenizer, read = opened(arguments, held_out=True)
    check_latents(arguments.latents or (), sae)
    rows = drawn([*range(len(read))], arguments.measured, "--measured")
    if len(rows) == len(read):
        raise ValueError(f"--measured {arguments.measured} was given, but some of {len(read)} pieces are for contexts")
    # Latents are chosen over all pieces, as `contexts` does. Of the places where one is most active as many can be
    # among the measured pieces as there are of these.
    top = arguments.top + len(rows)
    peaks = peak_activations(model, hook_name(sae), sae, batches(read, arguments.rows), top=top)
    chosen = peaks.sample(SAMPLE) if arguments.latents is None else arguments.latents
    followed = {latent: peaks.followers(latent, without=rows)[: arguments.top] for latent in chosen}
    promoted = {latent: tokens for latent, tokens in followed.items() if len(tokens) >= LEAST_CONTEXTS}
    few = [latent for latent in followed if latent not in promoted]
    if few and (arguments.latents or not promoted):
        raise ValueError(
            f"Latents {', '.join(map(str, few))} are active in fewer than {LEAST_CONTEXTS} pieces before a token that "
            "could be promoted: name others, or more text"
        )
    if not promoted:
        raise ValueError("No latent is active, and at less than a tenth of the tokens: name some with --latents")
    if arguments.latents is None:
        promoted = dict([*promoted.items()][: arguments.count])
    shown = promotion_doses(
        model,
        hook_name(sae),
        sae,
        promoted,
        batches([read[row][: arguments.measured_tokens] for row in rows], arguments.rows),
        sorted({*arguments.doses}),
        unit=peaks.values[:, 0],
        density=peaks.density,
        controls=arguments.controls,
        seed=arguments.seed,
    )
    for group in shown["groups"].values():
        group["promoted"] = [tokenizer.decode([token]) for token in group["tokens"]]
    if arguments.output:
        # The figure first: where the file is, both are.
        plots.dose_responses(
            shown,
            arguments.output.with_suffix(".png"),
            y_label="log probability of what follows it, nats",
            x_label="multiple of the largest activation",
            usual=1.0,
        )
        write_json(arguments.output, shown)
    show_doses(shown)
    return 0


def check_doses(arguments: argparse.Namespace) -> None:
    """ValueError for settings of no use, OSError where no figure can be drawn: before anything is measured."""
    from ..interpretability import plots

    for name, least in (("count", 1), ("controls", 1), ("top", LEAST_CONTEXTS), ("measured_tokens", 2)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(arguments, name)} was given, but it is at least {least}")
    if arguments.measured_tokens > arguments.piece:
        raise ValueError(f"--measured-tokens {arguments.measured_tokens} of pieces with --piece {arguments.piece}")
    if arguments.output:
        if arguments.output.suffix != ".json":
            raise ValueError(
                f"--output {arguments.output} was given, but a .json is due; the .png is written beside it"
            )
        try:
            plots.figure()
        except ImportError as error:
            raise OSError(f"{error}; or leave --output out") from error


def show_doses(found: dict[str, Any]) -> None:
    """Print what doses do."""
    for name, group in found["groups"].items():
        print(
            f"{name}, active at {100 * group['density']:.2f}% of tokens, to {group['unit']:.2f}. Log probability of "
            f"{', '.join(map(repr, group['promoted']))}: {group['base']:.3f} nats"
        )
        lines = {"dose": found["doses"], "the latent": group["values"]}
        for what, control in (("random latents", "controls"), ("random directions", "directions")):
            lines[f"{what}, mean"] = [statistics.fmean(at_dose) for at_dose in zip(*group[control], strict=True)]
        for what, values in lines.items():
            print(f"  {what:24s}" + "".join(f"{value:9.3f}" for value in values))


def check_held_out(folder: Path, read: dict[str, str]) -> None:
    """ValueError when an autoencoder was trained on a text, by whatever name it goes."""
    path = folder / SETTINGS
    trained = json.loads(path.read_text(encoding="utf-8"))["text"] if path.is_file() else {}
    seen = [name for name, digest in digests(read).items() if digest in trained.values()]
    if seen:
        raise ValueError(f"--text {' '.join(seen)} was given, but the autoencoder was trained on it: name another text")


def model_name(sae: Any, given: str | None) -> str:
    """The model that an autoencoder is for.

    Raises:
        ValueError: when it says so and another one is given, or when neither is.
    """
    own = sae.config.model_name
    if own is None and given is None:
        raise ValueError("The autoencoder does not say which model it is for (config.model_name is None): give --model")
    if own is not None and given is not None and own != given and Path(own).resolve() != Path(given).resolve():
        raise ValueError(
            f"--model {given} was given, but the autoencoder was trained on {own}. If that is the same model in "
            "another place, change model_name in the autoencoder's config.json"
        )
    return str(own if given is None else given)


def hook_name(sae: Any) -> str:
    """The module that an autoencoder is for."""
    if sae.config.hook_name is None:
        raise ValueError("The autoencoder does not say which module it is for (config.hook_name is None)")
    return str(sae.config.hook_name)


def run_export(arguments: argparse.Namespace) -> int:
    """Write an autoencoder in SAELens' format."""
    from ..interpretability import SparseAutoencoder, export_saelens

    print(export_saelens(SparseAutoencoder.from_pretrained(arguments.source), arguments.target))
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Read an autoencoder in SAELens' format and write it in ours."""
    from ..interpretability import import_saelens

    import_saelens(arguments.source).save_pretrained(arguments.target)
    print(arguments.target)
    return 0
