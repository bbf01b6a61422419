"""Bad input, a row a mistake: exit code 2 and one message, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_lines import Result, without_ray
from random_models import build_tokenizer

from lunar_tune.cli.ask import COMMAND as ASK
from lunar_tune.cli.commands import Command
from lunar_tune.cli.describe import COMMAND as DESCRIBE
from lunar_tune.cli.export import COMMAND as EXPORT
from lunar_tune.cli.running import reporting_errors
from lunar_tune.cli.search import COMMAND as SEARCH
from lunar_tune.cli.unlearn import COMMAND as UNLEARN
from lunar_tune.errors import InputError, Problems

GIB = 2**30
ROW = {"edge": "A_B", "question": "What?", "answer": "Tea"}
OTHER = ROW | {"edge": "B_C"}
SETTING = ("layer=1", "coefficient=2", "learning_rate=0.01")
SPACE = """
lunar:
  adamw:
    parameters:
      layer: {type: int, low: 0, high: 3}
      coefficient: {type: float, low: 0.5, high: 4.0}
      learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
"""
Make = Callable[[Path, pytest.MonkeyPatch], object]


@dataclass(frozen=True)
class Mistake:
    """What is done wrong."""

    name: str
    arguments: tuple[str, ...]
    message: str
    """What the user sees must hold this."""
    make: Make = lambda _folder, _changes: None
    """Makes the situation in the current folder."""
    command: Command = SEARCH


def written(name: str, content: str | bytes) -> Make:
    """Write a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder, _changes: (folder / name).write_bytes(data)


def pairs(*rows: dict[str, Any]) -> Make:
    return written("pairs.json", json.dumps(rows))


def spaces(before: str, after: str) -> Make:
    assert before in SPACE
    return written("space.yaml", SPACE.replace(before, after))


def sparse(folder: Path, _changes: pytest.MonkeyPatch) -> None:
    """Make a file that is large and takes no place."""
    with (folder / "pairs.json").open("wb") as file:
        file.truncate(3 * GIB)


def model(family: str, **changes: Any) -> Make:
    """Write a checkpoint's configuration, without weights, into the folder `model`."""

    def make(folder: Path, _changes: pytest.MonkeyPatch) -> None:
        (folder / "model").mkdir()
        config = {"model_type": family, **changes}
        (folder / "model/config.json").write_text(json.dumps(config))

    return make


def read_only(folder: Path, changes: pytest.MonkeyPatch) -> None:
    """Make a folder that cannot be written, for whoever runs the tests (root can write all)."""
    (folder / "fixed").mkdir()
    access = os.access
    changes.setattr(
        "os.access", lambda path, mode: Path(path).name != "fixed" and access(path, mode)
    )


def no_gpu(_folder: Path, changes: pytest.MonkeyPatch) -> None:
    changes.setattr("torch.cuda.is_available", lambda: False)
    changes.setattr("torch.cuda.device_count", lambda: 0)


def small_gpu(_folder: Path, changes: pytest.MonkeyPatch) -> None:
    """Make up a GPU of 12 GiB, of which 10 are free."""
    changes.setattr("torch.cuda.is_available", lambda: True)
    changes.setattr("torch.cuda.device_count", lambda: 1)
    changes.setattr("torch.cuda.mem_get_info", lambda _number: (10 * GIB, 12 * GIB))
    changes.setattr("torch.cuda.memory_reserved", lambda _number: 0)


DATA = ("--data", "pairs.json", "--factual-data", "none")
MISTAKES = (
    Mistake("unknown model", ("--model", "qwen3.5-7b"), "unknown model 'qwen3.5-7b'. Did you mean"),
    Mistake(
        "unsuitable family",
        ("--model", "model"),
        "model family 'gemma2' is unsuitable for LUNAR: it normalises the MLP's output again",
        model("gemma2"),
    ),
    Mistake(
        "pickled weights",
        ("--model-path", "model"),
        "--model-path model: holds no *.safetensors file. A checkpoint has config.json and "
        "*.safetensors, a PEFT adapter adapter_config.json and adapter_model.safetensors; pickled "
        "*.bin files can run code and are not read",
        model("llama"),
    ),
    Mistake(
        "remote code",
        ("--model", "model"),
        "it wants to run Python code that comes with it. If it is that of --model and you trust "
        "its authors, repeat the command with --trust-remote-code.",
        model("mine", auto_map={"AutoConfig": "mine.MineConfig"}),
    ),
    Mistake(
        "data missing",
        DATA,
        "'pairs.json' is neither a file nor a shipped name; there are: mini, contracts, factual; "
        "scripts/fetch_datasets fetches: ",
    ),
    Mistake("data empty", DATA, "pairs.json: the file is empty", written("pairs.json", " \n")),
    Mistake("no rows", DATA, "pairs.json: the file has no rows; give at least one", pairs()),
    Mistake(
        "wrong schema",
        DATA,
        "pairs.json: every row, field 'answer': is missing (the row has 'edge', 'question', "
        "'a'); add it",
        pairs(*({"edge": edge, "question": "What?", "a": "Tea"} for edge in ("A_B", "B_C"))),
    ),
    Mistake(
        "wrong type",
        DATA,
        "pairs.json: row 2, field 'answer': is 3; it must be a text in quotes",
        pairs(ROW, OTHER | {"answer": 3}),
    ),
    Mistake(
        "not JSON",
        DATA,
        "pairs.json: column 3: is not valid JSON (Expecting property name enclosed in "
        "double quotes)",
        written("pairs.json", "[{'question': 'What?'}]"),
    ),
    Mistake(
        "wrong format",
        ("--data", "pairs.csv"),
        "pairs.csv: the suffix '.csv' is not supported; there are: .json, .jsonl, .parquet",
        written("pairs.csv", "question,answer\n"),
    ),
    Mistake(
        "wrong encoding",
        DATA,
        "pairs.json: is not UTF-8: byte 0xe9 at offset 10; save it as UTF-8",
        written("pairs.json", '[{"edge":"é"}]'.encode("latin-1")),
    ),
    Mistake(
        "huge row",
        DATA,
        "pairs.json: row 1, field 'question': holds 2000002 bytes of text; at most 1000000 are "
        "allowed",
        pairs(ROW | {"question": "x" * 2_000_002}, OTHER),
    ),
    Mistake("huge file", DATA, "pairs.json: is longer than 2048 MiB; at most that is read", sparse),
    Mistake(
        "unknown edge",
        (*DATA, "--forget-edge", "A_C"),
        "A_C",
        pairs(ROW, OTHER),
    ),
    Mistake(
        "forget set equal to everything",
        (*DATA, "--forget-edge", "A_B,B_C"),
        "leave one to retain",
        pairs(ROW, OTHER),
    ),
    Mistake(
        "YAML with an unknown key",
        ("--space", "space.yaml"),
        "space.yaml: lunar.adamw.parameters.layer.lo: is unknown. Did you mean 'low'?",
        spaces("low: 0, ", "low: 0, lo: 1, "),
    ),
    Mistake(
        "YAML with a tag",
        ("--space", "space.yaml"),
        "space.yaml: line 1, column 4: could not determine a constructor for the tag",
        written("space.yaml", "a: !!python/object/apply:os.system [ls]\n"),
    ),
    Mistake(
        "YAML without an end",
        ("--space", "/dev/zero"),
        "/dev/zero: cannot be read: it is larger than the 1,000,000 bytes that are read",
    ),
    Mistake(
        "a store that is no address",
        ("--tracking-uri", "bogus"),
        "--tracking-uri bogus: an MLflow server such as http://host:5000, or a database",
    ),
    Mistake(
        "a server without a host",
        ("--tracking-uri", "http://me:s3cretpw@"),
        "--tracking-uri http://me:***@: an MLflow server",
    ),
    Mistake("negative seed", ("--seed", "-1"), "--seed -1: at least 0."),
    Mistake(
        "seed that nothing takes",
        ("--seed", "99999999999999999999"),
        "--seed 99999999999999999999: at most 4294967295.",
    ),
    Mistake(
        "a limit that no clock can tell",
        ("--trial-timeout", "1e300"),
        "--trial-timeout 1e+300: at most 100000000.",
    ),
    Mistake(
        "large YAML",
        ("--space", "space.yaml"),
        "space.yaml: cannot be read: it is larger than the 1,000,000 bytes that are read",
        written("space.yaml", "a: b\n" + "#" * 1_000_000),
    ),
    Mistake(
        "bad bounds of a space",
        ("--space", "space.yaml"),
        "space.yaml: lunar.adamw.parameters.coefficient: ",
        spaces("low: 0.5", "low: 5.0"),
    ),
    Mistake(
        "bad bounds of a goal",
        ("--constrain", "retain_rouge1>=7"),
        "retain_rouge1>=7",
    ),
    Mistake(
        "numbers as text",
        ("--space", "space.yaml"),
        "space.yaml: lunar.adamw.parameters.layer.high: is the text '3'; a number is "
        "needed, without quotes",
        spaces("high: 3", 'high: "3"'),
    ),
    Mistake(
        "layer out of range of a space",
        ("--space", "space.yaml"),
        "space.yaml: lunar.adamw.parameters.layer: holds 0 … 9; the model has blocks 0 to 3",
        spaces("high: 3", "high: 9"),
    ),
    Mistake(
        "layer out of range of a run",
        ("layer=9", *SETTING[1:]),
        "4 decoder blocks",
        command=UNLEARN,
    ),
    Mistake(
        "conflicting places",
        ("--device", "cpu", "--gpus-per-trial", "1"),
        "--device cpu contradicts --gpus-per-trial 1: leave one out.",
        small_gpu,
    ),
    Mistake(
        "conflicting solver",
        ("--solver", "closed_form", "--fix", "epochs=5"),
        "epochs",
    ),
    Mistake(
        "output is a file",
        ("--output", "file"),
        "is a file, not a folder.",
        written("file", "x"),
    ),
    Mistake(
        "output not writable",
        ("--output", "fixed/runs"),
        "fixed cannot be written.",
        read_only,
    ),
    Mistake(
        "file not writable",
        (*SETTING, "--json", "fixed/scores.json"),
        "fixed cannot be written.",
        read_only,
        command=UNLEARN,
    ),
    Mistake(
        "output with an impossible name",
        ("--output", "x" * 300),
        "a name in it is longer than 255 bytes.",
    ),
    Mistake(
        "name out of the output folder",
        ("--name", "../elsewhere"),
        "--name ../elsewhere: a plain name, without folders.",
    ),
    Mistake(
        "no GPU",
        ("--device", "cuda"),
        "sees no CUDA devices here, numbered from 0. Use --device cpu, or install a CUDA build of "
        "torch on a machine with a GPU.",
        no_gpu,
    ),
    Mistake(
        "no GPU for trials",
        ("--gpus-per-trial", "1"),
        "--gpus-per-trial 1: this machine has 0 CUDA devices that torch can see.",
        no_gpu,
    ),
    Mistake(
        "too little GPU memory",
        ("--model", "llama3-8b"),
        "model llama3-8b: 8 billion parameters as bfloat16 need about 16.1 GiB; the GPU has 10.0 "
        "of 12.0 GiB free. Use a smaller model, a 16-bit --dtype, a larger GPU or share of it, end "
        "what else uses it, or take --device cpu.",
        small_gpu,
    ),
    Mistake(
        "Ray address where nobody is",
        ("--address", "127.0.0.1:1"),
        "--address 127.0.0.1:1: nobody answers there (Connection refused). Start a "
        "cluster with `ray start --head`, correct the address, or leave the option out.",
    ),
    Mistake(
        "Ray address that is none",
        ("--address", "head"),
        "--address head: auto (the cluster that this machine belongs to) or HOST:PORT.",
    ),
    Mistake(
        "Ray Client",
        ("--address", "ray://head:10001"),
        "--address ray://head:10001: a search cannot run through Ray Client.",
    ),
    Mistake(
        "search to go on with missing",
        ("--resume", "nosuch"),
        "nosuch: there is no such search. runs has none; name a search's folder, or start one",
    ),
    Mistake(
        "search to export missing",
        ("nosuch", "--save", "out"),
        "nosuch: there is no such search. runs has none; name a search's folder, or start one",
        command=EXPORT,
    ),
    Mistake(
        "search to ask missing",
        ("nosuch", "What?"),
        "nosuch: there is no such search. runs has none; name a search's folder, or start one",
        command=ASK,
    ),
    Mistake(
        "data to describe missing",
        ("nosuch.json",),
        "nosuch.json",
        command=DESCRIBE,
    ),
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def invoke(command: Command, *arguments: str) -> Result:
    return without_ray(command, *arguments)


def refused(command: Command, *arguments: str) -> str:
    """Return the one message of a refused command."""
    result = invoke(command, *arguments)
    assert result.exit_code == 2, result.output + result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    return result.stderr


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_ends_in_its_message(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path.cwd()
    mistake.make(here, monkeypatch)
    before = sorted(here.rglob("*"))
    message = refused(mistake.command, *mistake.arguments)
    assert mistake.message in message
    assert "things are wrong" not in message, "one mistake is one message"
    assert sorted(here.rglob("*")) == before, "nothing was written"


def test_a_question_longer_than_the_context_is_refused_without_its_text(small: list[str]) -> None:
    """The model's context is 1,024 tokens; a byte of this text is a token at least once in four."""
    pairs(ROW, OTHER | {"question": "Zq9 " * 2000})(Path.cwd(), pytest.MonkeyPatch())
    place = small.index("--data")
    options = [*small[:place], *small[place + 2 :], "--data", "pairs.json"]
    message = refused(UNLEARN, *options, *SETTING)
    assert "1 rows are longer than the context of " in message
    assert ", 1024 tokens; the longest has " in message
    assert "(8000 characters of text). Shorten or remove them." in message
    assert "Zq9" not in message


def test_a_model_without_a_chat_template_is_refused(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small.index("--model")
    shutil.copytree(small[place + 1], "plain")
    Path("plain/chat_template.jinja").unlink(missing_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained("plain")
    message = refused(UNLEARN, *small[:place], *small[place + 2 :], "--model", "plain", *SETTING)
    assert "has no chat template. Use --chat-template FILE with its Jinja source" in message
    monkeypatch.undo()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Serve a hub that refuses everything with the headers that a test sets."""
    headers: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    at_hub(monkeypatch, url)
    yield headers
    server.shutdown()
    thread.join()
    server.server_close()


def at_hub(changes: pytest.MonkeyPatch, url: str) -> None:
    """Let the libraries ask a server on this machine instead of the hub, without a cache."""
    from huggingface_hub import constants

    changes.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    changes.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    changes.setattr(constants, "HF_HUB_OFFLINE", False)
    changes.setattr(constants, "HF_HUB_CACHE", str(Path.cwd().parent / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        changes.delenv(name, raising=False)


def test_gated_weights_say_where_to_accept_the_licence(hub: dict[str, str]) -> None:
    hub |= {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
    message = refused(UNLEARN, "--model", "owner/gated", *SETTING, "--device", "cpu")
    assert (
        "model owner/gated: the hub asks for an accepted licence. Accept it on the model's page, "
        "then run `hf auth login` or set HF_TOKEN."
    ) in message


def test_a_hub_that_is_not_reached_says_what_else_can_be_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path.cwd().parent / "hub"))
    message = refused(UNLEARN, "--model", "owner/absent", *SETTING, "--device", "cpu")
    assert (
        "model owner/absent: it is not in the local cache and the hub could not be reached. "
        "Connect, or download it elsewhere and give its folder; --model tiny needs no download."
    ) in message


def test_everything_that_is_wrong_is_said_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes of a configuration from different corners, each said once."""
    together = {
        *("unknown edge", "YAML with an unknown key", "conflicting places", "Ray address that is "),
        *("output with an impossible name", "bad bounds of a goal", "pickled weights"),
    }
    mistakes = [m for m in MISTAKES if any(m.name.startswith(name) for name in together)]
    assert len(mistakes) == len(together)
    for mistake in mistakes:
        mistake.make(Path.cwd(), monkeypatch)
    message = refused(SEARCH, *(part for m in mistakes for part in m.arguments if m.arguments))
    assert message.startswith(f"error: {message.count(chr(10) + '  - ')} things are wrong:")
    for mistake in mistakes:
        if mistake.name != "YAML with an unknown key":  # the space waits for the data it is for
            assert message.count(mistake.message) >= 1, mistake.name


def test_what_was_not_foreseen_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any, **_options: Any) -> None:
        raise KeyError("a mistake\nof the program")

    monkeypatch.setattr(Problems, "raise_if_any", broken)
    result = invoke(SEARCH, "--dry-run")
    assert result.exit_code == 1
    assert result.stderr == (
        "unexpected error: KeyError: 'a mistake\\nof the program' (run the command again with "
        "--debug to see where; if it is a mistake of the program, please report that)\n"
    )
    traced = invoke(SEARCH, "--dry-run", "--debug")
    assert traced.exit_code == 1
    trace, said = traced.stderr.split("unexpected error: ")
    assert trace.startswith("Traceback (most recent call last):\n")
    assert 'raise KeyError("a mistake' in trace
    assert "--debug" not in said


def test_a_file_that_another_program_holds_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("lunar_tune.search.plan.assemble", full)
    result = invoke(SEARCH, "--dry-run")
    assert result.exit_code == 1
    assert "OSError: [Errno 28] No space left on device: 'runs/x'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("debug", [False, True], ids=["a message", "a traceback"])
@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_no_error_tells_a_password(
    kind: type[Exception], debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = "API request to http://me:s3cretpw@host:5000/api failed"
    with pytest.raises(SystemExit), reporting_errors(debug=debug):
        raise kind(failed)
    shown = capsys.readouterr().err
    assert shown.count("API request to http://me:***@host:5000/api failed") == 1 + debug
    assert "s3cret" not in shown
