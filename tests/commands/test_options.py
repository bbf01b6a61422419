"""Options as a whole: how many there are, help, files of options, options given again."""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_lines import refused, without_ray

import lunar_tune
from lunar_tune.cli.commands import Command
from lunar_tune.cli.main import COMMANDS, command_of
from lunar_tune.cli.search import SearchOptions
from lunar_tune.cli.search import search as COMMAND
from lunar_tune.config.fields import flag_of, help_of, options_again, options_of, permissions_in
from lunar_tune.config.options import SearchConfig
from lunar_tune.errors import Problems
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.yaml_files import write_yaml

PACKAGE = Path(str(lunar_tune.__file__)).parent
MOST_OPTIONS, MOST_LINES = 65, 48
# A value of every option of a search, other than its default.
VALUES: dict[str, Any] = {
    "model": "qwen2.5-7b",
    "model_path": "knows it",
    "dtype": "float16",
    "device": "cpu",
    "chat_template": "published",
    "system_prompt": "Say it: --now",
    "trust_remote_code": True,
    "data": "my file.json",
    "edge": "all of it",
    "forget_edge": ("A_B", "C_D"),
    "factual_data": "none",
    "reference_prompts": "harmful",
    "reference_check": "never",
    "refusals": "no.txt",
    "retain_data": "mini",
    "retain_rows": 7,
    "evaluation_rows": 9,
    "holdout": True,
    "text": False,
    "method": "npo",
    "solver": "lora",
    "fix": ("layer=2", "epochs=3"),
    "seed": 4,
    "max_new_tokens": 8,
    "rouge_tokenizer": "words",
    "metrics": ("forget_mrr", "retain_mrr"),
    "embedding_model": "encoder",
    "engine": "plain",
    "memory_budget": 7.5,
    "cache_limit": 0.0,
    "num_trials": 7,
    "stop": "never",
    "minimise": "forget_mrr",
    "constrain": ("retain_mrr>=0.5", "forget_rouge1<=1"),
    "then": "retain_mrr",
    "space": "own.yaml",
    "range": ("coefficient=-1:4",),
    "sampler": "tpe",
    "start_from": ("a", "none"),
    "layer_prior": "auto",
    "time_budget": 1.5,
    "trial_timeout": 60.0,
    "finetune": "never",
    "output": Path("else where"),
    "tracking_uri": "http://host:5000",
    "gpus_per_trial": 0.5,
    "concurrency": 2,
    "address": "auto",
    "in_process": True,
}


def read(*arguments: str) -> tuple[SearchOptions, Mapping[str, str]]:
    """Return what the command is given by arguments, with the origins."""
    seen: list[tuple[SearchOptions, Mapping[str, str]]] = []

    def search(options: SearchOptions, _: Problems) -> None:
        seen.append((options, options.given))

    result = without_ray(Command(search), *arguments)
    assert result.exit_code == 0, result.output
    return seen.pop()


def stored(options: SearchOptions) -> dict[str, Any]:
    """Return the values that are kept of a search."""
    kept = [name for name, said in options_of(SearchConfig).items() if said.stored]
    return {name: getattr(options, name) for name in kept}


def arguments_of(values: dict[str, Any]) -> list[str]:
    """Return options as they are typed, by the rules of a user and not of the package."""
    typed: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            typed.append(flag if value else f"--no-{flag[2:]}")
        elif name == "metrics":
            typed += [flag, ",".join(value)]
        else:
            texts = value if isinstance(value, tuple) else (value,)
            typed += [part for text in texts for part in (flag, str(text))]
    return typed


def test_there_are_few_options() -> None:
    among = [options_of(command_of(command).options).items() for command in COMMANDS]
    flags = {name for options in among for name, said in options if not said.positional}
    assert len(flags) <= MOST_OPTIONS, f"{len(flags)}: {', '.join(sorted(flags))}"


def test_every_option_is_one_thing_in_all_commands() -> None:
    declared: Counter[str] = Counter()
    for file in set(PACKAGE.rglob("*.py")) - {PACKAGE / "api.py"}:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                said = ast.unparse(node.value)
                if re.match(r"(?!same_)\w*option\(", said) and "positional=True" not in said:
                    declared[ast.unparse(node.target)] += 1
    assert len(declared) > len(VALUES) / 2
    assert {name: count for name, count in declared.items() if count > 1} == {}


def test_the_values_of_this_file_are_those_of_every_option() -> None:
    assert set(VALUES) == set(stored(SearchOptions()))
    assert all(value != getattr(SearchConfig(), name) for name, value in VALUES.items())


def test_the_help_is_short() -> None:
    shown = without_ray(COMMAND, "--help", columns=80).stdout.splitlines()
    assert len(shown) <= MOST_LINES
    assert max(map(len, shown)) <= 80
    assert "--help-all shows every option." in shown
    text = without_ray(COMMAND, "--help-all").stdout
    assert "Exit codes: 0" in text
    switches = {"--holdout", "--no-holdout", "--text", "--no-text"} & set(text.split())
    assert switches == {"--holdout", "--no-text"}, "the form that changes something"


@pytest.mark.parametrize("name", COMMANDS)
def test_all_of_the_help_names_every_option(name: str) -> None:
    command = command_of(name)
    words = without_ray(command, "--help-all").stdout.replace("│", " ").split()
    for field, said in options_of(command.options).items():
        flag = flag_of(field)
        forms = {field.upper()} if said.positional else {flag, f"--no-{flag[2:]}"}
        assert forms & set(words), field
        assert said.group in " ".join(words)
        assert help_of(command.options, field).split()[0] in words


@pytest.mark.parametrize("name", VALUES)
def test_an_option_is_read_as_it_is_typed(name: str) -> None:
    values = {name: VALUES[name]}
    options, given = read(*arguments_of(values))
    assert given == {name: "command line"}
    assert stored(options) == stored(SearchOptions()) | values
    assert options_again(options, given) == tuple(arguments_of(values))


def test_a_file_gives_what_flags_give_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    plain = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in (VALUES | {"output": "else where"}).items()
    }
    file.write_text(write_yaml(plain))
    asked = permissions_in(SearchConfig, VALUES)
    permitted = arguments_of(asked)
    assert f"{file}: holds {shlex.join(permitted)}. " in refused(COMMAND, "--config", file)
    options, given = read("--config", str(file), *permitted)
    assert stored(options) == VALUES
    assert {given[name] for name in VALUES.keys() - asked} == {str(file)}

    winning = (*permitted, "--seed", "9", "--text", "--no-holdout", "--fix", "layer=1")
    options, given = read("--config", str(file), *winning)
    won = {"seed": 9, "text": True, "holdout": False, "fix": ("layer=1",)}
    assert stored(options) == VALUES | won
    assert {given[name] for name in won} == {"command line"}


def test_what_is_wrong_in_a_file_is_one_message_with_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("num_trial: 3\nseed: many\ndata: mini\n")
    message = refused(COMMAND, "--config", file, "--dry-run")
    assert "2 things are wrong" in message
    assert f"{file}: num_trial is not an option. Did you mean 'num_trials'?" in message
    assert f"{file}: seed is 'many'; a whole number is needed." in message
    assert "nosuch.yaml" in refused(COMMAND, "--config", tmp_path / "nosuch.yaml")


def test_a_searchs_own_file_gives_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    config = SearchConfig(**VALUES, name="first")
    given = dict.fromkeys(VALUES, "command line") | {"name": "command line"}
    file.write_text(configuration_document(config, given=given, derived={}, resolved={"a": 1}))
    permitted = arguments_of(permissions_in(SearchConfig, VALUES))
    assert f"{file}: holds {shlex.join(permitted)}. " in refused(COMMAND, "--config", file)
    options, _ = read("--config", str(file), *permitted)
    assert stored(options) == VALUES
    assert options.name is None, "another search has another name"


def test_only_what_was_given_is_given_again_and_no_password() -> None:
    typed = ("--seed", "1", "--seed", "2", "--name", "n", "--force", "--dry-run")
    options, given = read("--model", "tiny", "--retain-rows", "none", *typed)
    assert options_again(options, given) == ("--seed", "2")
    assert stored(read(*options_again(SearchConfig(**VALUES), VALUES))[0]) == VALUES
    config = SearchConfig(tracking_uri="http://me:s3cret@x@host:5000")
    again = options_again(config, {"tracking_uri"})
    assert again == ("--tracking-uri", "http://me:***@host:5000")
