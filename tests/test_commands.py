"""The command line: what every command does, and what is said when it cannot."""

import contextlib
import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from chatting import chat_model, word_tokenizer
from models import remembering, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

from senri_hf.commands import chat as chat_command
from senri_hf.commands.main import main


Output = pytest.CaptureFixture[str]
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that name a tiny base model and its adapter."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer = word_tokenizer()
    model = chat_model(tokenizer)
    model.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "base")
    remembering(model).save_pretrained(root / "memory")
    model.unload().save_pretrained(root / "base")
    return ["--model", str(root / "base"), "--adapter", str(root / "adapter")]


@pytest.fixture
def saved(folders: list[str]) -> Path:
    """A memory of the tiny model."""
    return Path(folders[1]).parent / "memory"


@pytest.fixture
def talk(folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Output) -> Talk:
    """Chat through a pipe; returns the exit code, what was printed, and what was noted."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", *folders, "--max-new-tokens", "6", *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def replies(out: str) -> list[str]:
    return out.splitlines()


def test_messages_are_answered_in_one_conversation(talk: Talk) -> None:
    code, out, err = talk("hello", "", "hello", "/quit", "hello")
    assert code == 0
    first, second = replies(out)
    assert first and second and first != second
    assert (
        len(re.findall(r"\[\d+ tokens read, \d generated, \d+ for memory \([\d,]+ bytes\), [\d.]+ s per token\]", err))
        == 2
    )


def test_clear_ends_the_conversation_and_keeps_the_memory(talk: Talk) -> None:
    _, out, _ = talk("hello", "/clear", "/memory", "hello", "/reset", "/memory", "hello")
    first, *rest = replies(out)
    assert re.search(r"tokens seen per row: \[[1-9]\d*\]", rest[0])
    assert "empty" not in rest[1] and "buffer slots used" in rest[1]
    assert rest[3] != first
    assert "tokens seen per row: []" in rest[4] and rest[5].endswith("empty")
    assert rest[-1] == first


def test_facts_off_reads_only(talk: Talk) -> None:
    _, out, err = talk("/facts off", "hello", "/clear", "hello", "/facts on", "hello")
    first, second, _ = replies(out)
    assert first == second
    assert re.findall(r"(\d+) for memory", err)[:2] == ["0", "0"] and int(re.findall(r"(\d+) for memory", err)[2]) > 0
    assert "read only" in err and "Memory updates are on" in err
    assert "takes on or off (now on)" in talk("/facts maybe")[2]


def test_save_and_load(talk: Talk, tmp_path: Path, folders: list[str]) -> None:
    folder = tmp_path / "alice"
    _, out, err = talk("hello", f"/save {folder}", "/clear", "hello", "/reset", f"/load {folder}", "hello")
    first, told, loaded = replies(out)
    assert told == loaded != first and f"Saved to {folder}" in err
    _, out, err = talk("hello", options=("--memory", str(folder)))
    assert replies(out) == [told] and "There is no memory" not in err


def test_what_was_loaded_is_what_save_writes(talk: Talk, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    talk("hello", f"/save {first}", f"/save {second}")
    kept = (first / "memory.safetensors").read_bytes()
    lines = (f"/load {second}", f"/load {tmp_path / 'nowhere'}", "hello", "/save")
    assert f"Saved to {second}." in talk(*lines, options=("--memory", str(first)))[2]
    assert (first / "memory.safetensors").read_bytes() == kept != (second / "memory.safetensors").read_bytes()


def test_a_memory_that_is_not_there_begins_anew(talk: Talk, tmp_path: Path) -> None:
    folder = str(tmp_path / "bob")
    code, _, err = talk("hello", "/save", options=("--memory", folder))
    assert code == 0 and "a new one begins" in err
    assert main(["memory", "show", folder]) == 0
    assert "/save needs a path" in talk("/save")[2]


def test_a_failed_load_keeps_the_memory(talk: Talk, tmp_path: Path, saved: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "memory.safetensors").write_bytes((saved / "memory.safetensors").read_bytes()[:-9])
    _, expected, _ = talk("hello", "hello")
    for path in (damaged, tmp_path / "nowhere", ""):
        code, out, err = talk("hello", f"/load {path}", "hello")
        assert code == 0 and out == expected and "Error" in err
        assert "The memory in use stays" in err or not path


def test_decay_lets_conversations_pass(talk: Talk) -> None:
    def strength(*lines: str) -> float:
        return float(re.findall(r"mean strength ([\d.e-]+)", talk("hello", *lines, "/memory")[1])[0])

    assert strength("/decay 10") == pytest.approx(strength("/clear") * 0.95**10, rel=0.02)
    assert talk("hello", "/decay 10", "hello")[1] != talk("hello", "hello")[1]
    for wrong in ("", "-1", "ten"):
        assert "whole number" in talk(f"/decay {wrong}")[2]


def test_chat_remembers_without_training(talk: Talk, tmp_path: Path) -> None:
    """With no adapter: told what is remembered, and when; saved and gone on with."""
    lines = (
        "hello my name is Alice",
        "/memory",
        "/clear",
        "/memory",
        f"/save {tmp_path / 'plain'}",
        "/facts",
        "/decay 2",
    )
    code, out, err = talk(*lines, options=("--adapter", "none"))
    assert code == 0 and "remembers without training" in err and "/facts: it takes on or off (now on)" in err
    before, after = out.split("bytes in")[1:]
    assert "nothing" in before and "is taken in when it ends" in before
    assert re.search(r"'[^']*\w[^']*' [\d.]+ \(1 ago\)", after) and "when it ends" not in after
    said = re.findall(r"'([^']*)' [\d.]+ \(1 ago\)", after)
    assert all(re.sub(r"<\w+>|\\n| ", "", text) for text in said)
    _, out, err = talk("hello", options=("--adapter", "none", "--memory", str(tmp_path / "plain")))
    assert replies(out) and "Error" not in err


def test_help_and_unknown_commands(talk: Talk) -> None:
    _, out, _ = talk("/help")
    for name in (
        "/clear",
        "/memory",
        "/save PATH",
        "/load PATH",
        "/decay N",
        "/reset",
        "/facts off|on",
        "/help",
        "/quit",
    ):
        assert f"\n{name} " in f"\n{out}"
    _, out, err = talk("/sav x", "/help save", "/help nothing", "/clear now")
    assert "no command /sav. The nearest is /save" in err and "no command /nothing" in err
    assert "takes nothing, but 'now'" in err and out.startswith("/save PATH")


def test_temperature_samples(talk: Talk) -> None:
    torch.manual_seed(1)
    assert talk("hello", options=("--temperature", "9"))[1] != talk("hello")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "at least 0"),
        (("--max-new-tokens", "0"), "at least 1"),
        (("--unknown",), "unrecognized"),
    ],
)
def test_wrong_options(talk: Talk, capsys: Output, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        talk("hello", options=options)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_expected_errors_are_told_without_a_traceback(
    folders: list[str], saved: Path, tmp_path: Path, capsys: Output
) -> None:
    base, adapter = folders[1], folders[3]
    for arguments, message in (
        (["--model", str(tmp_path / "none"), "--adapter", adapter], "cannot load the base model"),
        (["--model", base, "--adapter", str(tmp_path)], "adapter_config.json"),
        (["--model", base, "--adapter", str(tmp_path / "none")], "adapter_config.json"),
        ([*folders, "--memory", str(tmp_path)], "has no memory.safetensors"),
    ):
        assert main(["chat", *arguments]) == 2
        error = capsys.readouterr().err
        assert "senri-hf: error:" in error and message in error and "Traceback" not in error


def test_an_adapter_of_another_model_is_refused(folders: list[str], tmp_path: Path, capsys: Output) -> None:
    tokenizer = word_tokenizer()
    other = chat_model(tokenizer, model={"hidden_size": 64})
    other.save_pretrained(tmp_path / "other")
    assert main(["chat", *folders[:2], "--adapter", str(tmp_path / "other")]) == 2
    assert "does not fit the model" in capsys.readouterr().err
    shutil.copytree(folders[3], tmp_path / "part")
    weights = tmp_path / "part" / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as reader:
        kept = {name: reader.get_tensor(name) for name in sorted(reader.keys())[1:]}
    save_file(kept, weights)
    assert main(["chat", *folders[:2], "--adapter", str(tmp_path / "part")]) == 2
    assert "missing adapter keys" in capsys.readouterr().err


def test_shipped_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chat_command, "ADAPTERS", tmp_path)
    name = "smollm2-135m-instruct"
    assert chat_command.shipped_adapter(name) is None and chat_command.find_adapter(name, None) is None
    for folder in (tmp_path / name, tmp_path / "unknown"):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    assert chat_command.shipped_adapter(name) == tmp_path / name
    assert chat_command.shipped_adapter("unknown") is None
    assert chat_command.find_adapter(name, None) == str(tmp_path / name)
    assert chat_command.find_adapter(name, "none") is None


def test_memory_show(saved: Path, folders: list[str], capsys: Output) -> None:
    for path in (saved, saved / "memory.safetensors"):
        assert main(["memory", "show", str(path)]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"model +.*llama, 3 layers of 32", shown)
        assert re.search(r"tokens seen +40\n", shown) and re.search(r"rows +1\n", shown)
        assert re.search(r"parent +none", shown)
        assert re.search(
            r"layer 2 \(default, episodic_memory\): buffer \d+ of 12 slots, mean strength [\d.]+; store", shown
        )
    with safe_open(saved / "memory.safetensors", framework="pt") as reader:
        size = sum(reader.get_tensor(name).nbytes for name in reader.keys())  # noqa: SIM118
    assert f"{size:,}" in shown


def test_memory_show_of_memory_without_training(tmp_path: Path, capsys: Output) -> None:
    remembering(tiny_model("llama"), rows=2).save_pretrained(tmp_path / "plain")
    assert main(["memory", "show", str(tmp_path / "plain")]) == 0
    (line,) = re.findall("layer .*", capsys.readouterr().out)
    assert re.fullmatch(
        r"layer 0 \(attention, attention_memory\): \d+ of 48 slots, mean surprise [\d.]+ nats, "
        r"conversations per row: \[2, 2\]",
        line,
    )


def test_memory_show_tells_the_parent(talk: Talk, saved: Path, tmp_path: Path, capsys: Output) -> None:
    talk("hello", f"/save {tmp_path / 'child'}", options=("--memory", str(saved)))
    main(["memory", "show", str(saved)])
    (parent,) = re.findall(r"id +(\w+)", capsys.readouterr().out)
    main(["memory", "show", str(tmp_path / "child")])
    assert re.search(rf"parent +{parent}", capsys.readouterr().out)


def test_memory_show_of_damaged_files(saved: Path, tmp_path: Path, capsys: Output) -> None:
    file = saved / "memory.safetensors"
    with safe_open(file, framework="pt") as reader:
        tensors, metadata = {name: reader.get_tensor(name) for name in reader.keys()}, reader.metadata()  # noqa: SIM118

    def cut(path: Path) -> None:
        path.write_bytes(file.read_bytes()[:-9])

    def flip(path: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    def garbage(path: Path) -> None:
        path.write_bytes(b"no tensors")

    def undescribed(path: Path) -> None:
        save_file(tensors, path)

    def wrong_words(path: Path) -> None:
        save_file(tensors, path, metadata={**metadata, "senri_hf": "{"})

    for number, (damage, message) in enumerate(
        (
            (cut, "damaged"),
            (flip, "checksum"),
            (garbage, "damaged"),
            (undescribed, "no memory"),
            (wrong_words, "damaged"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        damage(folder / "memory.safetensors")
        assert main(["memory", "show", str(folder)]) == 2
        assert message in capsys.readouterr().err, damage.__name__
    assert main(["memory", "show", str(tmp_path)]) == 2
    assert "has no memory.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["memory"], ["unknown"]])
def test_a_command_is_needed(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and "usage: senri-hf" in capsys.readouterr().err


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        command = [sys.executable, "-m", "senri_hf.commands.main", *arguments]
        # A test run in the background of a shell ignores interrupts, which its children would inherit.
        heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=heeded
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Read until a pattern has come, and forget what came up to its end."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]

    def interrupt_until(self, pattern: str) -> None:
        """Interrupt until a pattern has come: one that comes as the prompt is being set up is noticed at the next."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, seconds=1)
        raise AssertionError(f"{pattern!r} did not come: {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_in_a_terminal_ctrl_c_stops_the_reply_and_keeps_the_session(folders: list[str]) -> None:
    terminal = Terminal(["chat", *folders, "--max-new-tokens", "3900"])
    try:
        terminal.wait_for("/help lists")
        terminal.wait_for("> ")
        terminal.interrupt_until("Ctrl-D leaves")
        terminal.type("hello\n")
        terminal.wait_for(r"word\d+ word\d+")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for(r"\[stopped, (\d+) tokens read, \d+ generated")
        terminal.type("/clear\n")
        terminal.wait_for("A new conversation")
        terminal.type("/memory\n")
        terminal.wait_for(r"tokens seen per row: \[[1-9]")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
