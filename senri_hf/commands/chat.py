"""`senri-hf chat`: talk to a model with a memory, in a terminal or through a pipe."""

import argparse
import contextlib
import difflib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..chat import MemoryChat

DEFAULT_MODEL = "smollm2-135m-instruct"
NO_ADAPTER = "none"
ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "name_recall" / "adapters"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `chat` to the command line."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model that has a memory",
        description="Talk to a model that has a memory. Inside, /help lists what can be done; Ctrl-C stops a reply.",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME",
        help="base model: a known name, a folder or a Hub name (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", metavar="FOLDER",
        help="memory adapter, a folder or a Hub name (default: the one that comes with a known base model; without "
        "any, as with 'none', the model remembers without training)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="FOLDER",
        help="memory to go on with, begun anew when the folder is not there; /save writes it",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number,
        default=256,
        metavar="N",
        help="longest reply, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T",
        help="sample with this temperature; 0 takes the likeliest token (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def whole_number(text: str) -> int:
    """A number of tokens."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, but it must be a whole number of at least 1")
    return int(text)


def temperature(text: str) -> float:
    """A sampling temperature."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} was given, but it must be a number of at least 0")
    return value


def shipped_adapter(name: str) -> Path | None:
    """The folder of the adapter that a checkout of the repository has for a known base model, None without one."""
    from ..bases import base_names

    folder = ADAPTERS / name
    return folder if name in base_names() and (folder / "adapter_config.json").is_file() else None


def find_adapter(name: str, adapter: str | None) -> str | None:
    """The adapter to use with a base model, None for none; OSError where the one named is not there."""
    if adapter == NO_ADAPTER:
        return None
    if adapter is None:
        shipped = shipped_adapter(name)
        return None if shipped is None else str(shipped)
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"--adapter {adapter} holds no adapter_config.json: an adapter is a folder that model.save_pretrained wrote"
        )
    return adapter


def load_model(name: str, adapter: str | None) -> tuple["PreTrainedModel", Any]:
    """A base model with a memory adapter, if one is named, and its tokenizer.

    Raises:
        OSError, ValueError: when one of them cannot be had, or they do not fit.
    """
    from ..bases import load_base

    base, tokenizer = load_base(name, progress=sys.stderr.isatty())
    if adapter is None:
        return base.eval(), tokenizer
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own doing
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            model: Any = PeftModel.from_pretrained(base, adapter)
        except (RuntimeError, UserWarning) as error:  # shapes that differ, weights that are not there
            raise ValueError(f"the adapter {adapter} does not fit the model {name!r}: {str(error)[:500]}") from error
    return model.eval(), tokenizer


def run(arguments: argparse.Namespace) -> int:
    """Load what is asked for and chat until the end of the input."""
    adapter = find_adapter(arguments.model, arguments.adapter)
    from ..chat import MemoryChat
    from ..memory import MemoryCache

    model, tokenizer = load_model(arguments.model, adapter)
    memory = None
    if arguments.memory is not None and Path(arguments.memory).exists():
        memory = MemoryCache.from_pretrained(arguments.memory, model=model)
    session = Session(
        MemoryChat(model, tokenizer, memory), arguments.max_new_tokens, arguments.temperature, arguments.memory
    )
    kind = "without training" if adapter is None else f"with the memory adapter {adapter}"
    note(f"{arguments.model} remembers {kind}. /help lists what can be done.")
    if arguments.memory is not None and memory is None:
        note(f"There is no memory at {arguments.memory} yet: a new one begins, and /save writes it there.")
    session.run()
    return 0


def note(text: str) -> None:
    """Say something about the chat that is no part of it."""
    print(text, file=sys.stderr, flush=True)


class Session:
    """An interactive chat: lines of the user, among them commands.

    Args:
        chat: What is talked to.
        max_new_tokens: The longest reply.
        temperature: 0 for greedy replies.
        folder: Where `/save` writes to when it is given no path.
    """

    def __init__(self, chat: "MemoryChat", max_new_tokens: int, temperature: float, folder: str | None = None) -> None:
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        self.folder = folder
        self.update_memory = True
        self.is_open = True
        self.stop = threading.Event()
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/clear": ("", "end this conversation: the context is cleared, the memory stays", self.clear),
            "/memory": ("", "what is remembered, and how full the memory is", self.show_memory),
            "/save": ("PATH", "save the memory as a folder", self.save),
            "/load": ("PATH", "go on with a saved memory, in a new conversation", self.load),
            "/decay": ("N", "end this conversation and let N more pass in which nothing is said", self.decay),
            "/reset": ("", "forget everything, the memory too", self.reset),
            "/facts": ("off|on", "stop, or go on, to take into memory what is said", self.facts),
            "/help": ("", "this list", self.help),
            "/quit": ("", "leave; the memory is kept only where it was saved", self.quit),
        }

    def run(self) -> None:
        """Read lines until the end of the input or `/quit`."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # lines can be edited and called back
        while self.is_open:
            try:
                line = input("> ") if interactive else input()
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n/quit or Ctrl-D leaves.")
                continue
            if line.strip():
                self.answer(line.strip())

    def answer(self, line: str) -> None:
        """Carry out a command, or say a line to the model; an error a person can mend is told and changes nothing."""
        name, _, argument = line.partition(" ")
        try:
            if not name.startswith("/"):
                self.say(line)
            elif name in self.commands:
                self.commands[name][2](argument.strip())
            else:
                (nearest,) = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.0)
                note(f"There is no command {name}. The nearest is {nearest}; /help lists all.")
        except (OSError, ValueError) as error:
            note(f"Error: {error}")

    def say(self, text: str) -> None:
        """Say something to the model and print its reply as it comes."""
        from transformers import StoppingCriteriaList

        self.stop.clear()
        shown = False

        def show(piece: str) -> None:
            nonlocal shown
            shown = True
            print(piece, end="", flush=True)

        try:
            with interrupts(self.stop):
                _, info = self.chat.say(
                    text,
                    update_memory=self.update_memory,
                    max_new_tokens=self.max_new_tokens,
                    streamer=show,
                    stopping_criteria=StoppingCriteriaList([stop_when(self.stop)]),
                    **self.sampling,
                )
        except KeyboardInterrupt:
            print()
            note("Interrupted: this message was taken back.")
            return
        except BaseException:
            if shown:
                print()
            raise
        print()
        note(
            f"[{'stopped, ' if self.stop.is_set() else ''}{info.tokens_read} tokens read, {info.tokens_generated} "
            f"generated, {info.tokens_written} for memory ({info.memory_bytes:,} bytes), "
            f"{info.seconds_per_token:.3f} s per token]"
        )

    def clear(self, argument: str) -> None:
        """End the conversation."""
        no_argument("/clear", argument)
        self.chat.new_conversation()
        note("A new conversation. The memory stays.")

    def show_memory(self, argument: str) -> None:
        """Print how full the memory is."""
        no_argument("/memory", argument)
        print(self.chat.memory.summary(), flush=True)

    def save(self, argument: str) -> None:
        """Save the memory; the path is kept for the next time."""
        path = argument or self.folder
        if not path:
            raise ValueError("/save needs a path: /save PATH")
        self.chat.memory.save_pretrained(path)
        self.folder = path
        note(f"Saved to {path}.")

    def load(self, argument: str) -> None:
        """Go on with a saved memory, and save to its path from now on; one that cannot be loaded changes nothing."""
        from ..chat import MemoryChat
        from ..memory import MemoryCache

        if not argument:
            raise ValueError("/load needs a path: /load PATH")
        try:
            memory = MemoryCache.from_pretrained(argument, model=self.chat.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}. The memory in use stays") from error
        self.chat = MemoryChat(self.chat.model, self.chat.tokenizer, memory)
        self.folder = argument
        note(f"Loaded {argument}, in a new conversation.")

    def decay(self, argument: str) -> None:
        """Let conversations pass."""
        if not argument.isdigit():
            raise ValueError(f"/decay {argument} was given, but it takes a whole number of conversations: /decay 10")
        self.chat.new_conversation()
        self.chat.memory.decay(int(argument))
        note(f"{int(argument)} conversations passed. A new conversation.")

    def reset(self, argument: str) -> None:
        """Forget everything."""
        no_argument("/reset", argument)
        self.chat.reset()
        note("Everything is forgotten.")

    def facts(self, argument: str) -> None:
        """Choose whether memory takes in what is said."""
        if argument not in ("on", "off"):
            given = f"{argument} was given, but it" if argument else "it"
            raise ValueError(f"/facts: {given} takes on or off (now {self._facts()})")
        self.update_memory = argument == "on"
        note(f"Memory updates are {self._facts()}.")

    def _facts(self) -> str:
        return "on" if self.update_memory else "off: memory is read only"

    def help(self, argument: str) -> None:
        """List the commands, or tell one."""
        wanted = [f"/{argument.removeprefix('/')}"] if argument else list(self.commands)
        if wanted[0] not in self.commands:
            raise ValueError(f"there is no command {wanted[0]}; /help lists all")
        for name in wanted:
            takes, what, _ = self.commands[name]
            print(f"{name} {takes}".ljust(16), what)
        sys.stdout.flush()

    def quit(self, argument: str) -> None:
        """Leave."""
        no_argument("/quit", argument)
        self.is_open = False


def no_argument(name: str, argument: str) -> None:
    """ValueError when a command that takes nothing was given something."""
    if argument:
        raise ValueError(f"{name} takes nothing, but {argument!r} was given")


@contextlib.contextmanager
def interrupts(stop: threading.Event) -> Iterator[None]:
    """Inside, a first Ctrl-C sets `stop`, so that a reply ends after a whole token; a second one interrupts it."""

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop_when(stop: threading.Event) -> Callable[..., Any]:
    """A stopping criterion of `generate()` that holds once `stop` is set."""
    import torch

    def stops(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    return stops
