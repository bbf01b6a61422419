"""A model's own answers as data: what is kept of them, and what runs on them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
from io import StringIO
from pathlib import Path

import pytest
import torch
from command_lines import refused, without_ray
from rich.console import Console

from lunar_tune.cli.collect import collect as COMMAND
from lunar_tune.cli.describe import describe
from lunar_tune.cli.search import search
from lunar_tune.cli.unlearn import unlearn
from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.data.data_catalog import BUNDLED, resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records
from lunar_tune.driver.persistence import resumed
from lunar_tune.driver.plan import plan_search
from lunar_tune.driver.prerequisite import ask_first
from lunar_tune.errors import InputError, Problems
from lunar_tune.export.export_job import assemble_again
from lunar_tune.files import CACHE_VARIABLE
from lunar_tune.finetuning.tiny import ensure_tiny, tiny_folder
from lunar_tune.models import device
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import StoredStudy
from lunar_tune.trial.assemble import answered, assemble, assemble_collection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
KNOWN = [
    record
    for record in read_records(resolve_data("mini", kind="records"))
    if record.edge in {"A_B", "B_C"}
]
PROMPTS = read_prompts(resolve_data("unverifiable", kind="prompts"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the folder of the tiny model; `general` is what it was taught, and two rows more."""
    asked = [(one.edge, one.question) for one in KNOWN]
    asked += [("A_B", f" {KNOWN[0].question.upper()}"), ("B_C", PROMPTS[0])]
    rows = [{"edge": edge, "question": question} for edge, question in asked]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    shipped = ("questions", str(tmp_path / "questions.json"))
    monkeypatch.setitem(BUNDLED, "general", shipped)  # type: ignore[arg-type]
    (tmp_path / "private.txt").write_text("\n".join([*PROMPTS[:11], KNOWN[3].question]))
    monkeypatch.setitem(BUNDLED, "private", ("prompts", str(tmp_path / "private.txt")))  # type: ignore[arg-type]
    folder = ensure_tiny()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return str(shutil.copytree(folder, tmp_path / "model"))


def kept() -> Path:
    (file,) = Path("cache/collected").glob("*.json")
    return file


def test_what_a_model_answers_becomes_data_and_what_it_declines_reference_prompts(
    model: str,
) -> None:
    result = without_ray(COMMAND, "--model", model, "--save", "knows")
    assert result.exit_code == 0, result.output
    assert read_records(Path("knows/pairs.json")) == tuple(KNOWN)
    assert read_prompts(Path("knows/references.json")) == PROMPTS[:11]
    assert re.search(r"edge +asked +kept +asked twice +declined\n", result.output)
    assert re.search(r"A_B +13 +12 +1 +0\nB_C +13 +12 +0 +1", result.output)
    assert "reference prompts: 11 of 12 are declined" in result.output
    (command,) = [line for line in result.output.splitlines() if "lunar_tune.search" in line]
    assert without_ray(search, *shlex.split(command)[3:], "--dry-run").exit_code == 0
    assert read_records(kept()) == tuple(KNOWN)
    assert [stat.S_IMODE(one.stat().st_mode) for one in (kept(), kept().parent)] == [0o600, 0o700]
    kept().write_text(kept().read_text().replace(KNOWN[0].answer, "Kept."))
    result = without_ray(COMMAND, "--model", model)
    assert f"kept answers are used; remove {kept().resolve()} to ask again" in result.output
    assert re.search(r"edge +asked +kept\n", result.output)
    assert "Kept." in result.output
    assert "reference prompts: 11 of 12 are declined" in result.output
    card = without_ray(describe, "general", "--model", model)
    assert "24 pairs, 2 edges" in card.output, card.output

    Path("own.txt").write_text(f"{KNOWN[0].question}\n{KNOWN[13].question}\n")
    own = ("--questions", "own.txt", "--edge", "mine", "--reference-prompts", "none")
    result = without_ray(COMMAND, "--model", model, *own)
    assert "all pairs have one edge" in result.output
    assert "reference prompts:" not in result.output


def test_a_search_asks_first_and_goes_on_with_the_same_answers_alone(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(
        unlearn, "layer=1", "coefficient=2", "--solver", "closed_form", "--model", model
    )
    assert f"Ask it first: python -m lunar_tune.collect --model {model}" in message
    assert "must be asked first" in refused(search, "--model", model, "--address", "auto")
    options = ("--model", model, "--in-process", "--solver", "closed_form", "--name", "own")
    options += ("--num-trials", "1", "--space", "default")
    plan = without_ray(search, *options, "--dry-run")
    assert "forget A_B (up to 13 questions), retain up to 13, factual 0" in plan.output
    result = without_ray(search, *options)
    assert "asking model 26 questions of general" in result.output, result.output
    assert "forget A_B (12 questions), retain 12, factual 0; the true" in result.output
    notes = StoredStudy.read(Folder(Path("runs/own").resolve()).journal).notes
    assert notes["baseline"]["forget_rouge1"] == notes["baseline"]["retain_rouge1"] == 1.0

    spec = answered(RunOptions(model=model), assemble(RunOptions(model=model)))
    assert spec.data.forget + spec.data.retain == tuple(KNOWN)

    def elsewhere(dtype: str, *_: object) -> torch.dtype:  # a machine that chooses another format
        chosen: torch.dtype = getattr(torch, dtype.replace("auto", "bfloat16"))
        return chosen

    with monkeypatch.context() as changed:
        changed.setattr(device, "resolve_dtype", elsewhere)
        assert plan_search(SearchConfig(model=model)).spec.data.unanswered
        begun, _ = resumed({"resume": "own"}, Problems())
        assert plan_search(begun).spec.data.forget == spec.data.forget
        search_then = StoredSearch.read(Path("runs/own").resolve())
        assert assemble_again(search_then, Problems()).data.forget == spec.data.forget
    again = ("--resume", "own", "--num-trials", "2")
    kept().unlink()
    result = without_ray(search, *again)
    assert result.exit_code in {0, 3}, result.output
    assert "asking model 26" in result.output
    rows = json.loads(kept().read_text())
    kept().write_text(json.dumps([rows[0] | {"answer": "Nothing."}, *rows[1:]]))
    assert "was searched with other settings or data" in refused(search, *again[:3], "3")


def test_kept_answers_belong_to_what_a_model_is_asked_with(model: str) -> None:
    plan, shown = plan_search(SearchConfig(model=model)), StringIO()
    job = assemble_collection(RunOptions(model=model))
    job.keep(KNOWN)
    assert job.kept() == tuple(KNOWN)
    ask_first(plan, Console(file=shown))
    assert not shown.getvalue(), "a later cell of a table asks nothing"
    (Path(model) / "README.md").write_text("another")
    assert job.kept() is not None
    (Path(model) / "chat_template.jinja").write_text("{{ messages[0].content }} Answer:")
    assert job.kept() is None


def test_tiny_is_asked_like_any_model(model: str) -> None:
    options = {"model": "tiny", "data": "general"}
    with pytest.raises(InputError, match="Ask it first"):
        answered(RunOptions(**options), assemble(RunOptions(**options)))  # type: ignore[arg-type]
    shutil.copytree(model, tiny_folder())
    told = ("--model", "tiny", "--data", "general", "--in-process", "--solver", "closed_form")
    result = without_ray(search, *told, "--num-trials", "1", "--name", "own")
    assert "asking tiny 26 questions of general" in result.output, result.output
    assert "forget A_B (12 questions), retain 12, factual 0; the true" in result.output


def test_the_data_that_go_with_a_model_are_settled_once(model: str) -> None:
    for options, expected in (
        ({"model": "tiny"}, (96, 81, 200)),
        ({"model": model}, (26, 0, 12)),
        ({"model": model, "factual_data": "factual"}, (26, 81, 12)),
        ({"model": "qwen2.5-7b", "data": "contracts"}, (400, 81, 200)),
        ({"model": "tiny", "model_path": model, "reference_prompts": "private"}, (400, 81, 12)),
    ):
        data = assemble(RunOptions(**options)).data  # type: ignore[arg-type]
        counts = len(data.forget) + len(data.retain), len(data.factual), len(data.reference_prompts)
        assert counts == expected, options
    lineage = {"base": "m", "source": "m", "weights": None, "revision": None, "fingerprint": ""}
    lineage |= {"data": "mine", "data_digest": "", "settings": {"trained": "lora"}}
    (Path(model) / "lunar_tune.json").write_text(json.dumps(lineage))
    with pytest.raises(InputError, match="was taught mine, which is no shipped"):
        assemble(RunOptions(model=model))
    lineage["data"] = "mini"
    (Path(model) / "lunar_tune.json").write_text(json.dumps(lineage))
    assert assemble(RunOptions(model=model)).data.name == "mini"


def test_nothing_to_keep_is_said(model: str) -> None:
    unknown = [Record(prompt, "", "A_B") for prompt in PROMPTS[:3]]
    rows = [{"edge": one.edge, "question": one.question} for one in unknown]
    Path("unknown.json").write_text(json.dumps(rows))
    message = refused(COMMAND, "--model", model, "--questions", "unknown.json")
    assert "answers none of the 3 questions of unknown" in message
    message = refused(
        COMMAND, "--model", "nonsense", "--questions", "private", "--save", "model/x.y"
    )
    for part in ("'nonsense'", "'private' holds prompts, questions are needed"):
        assert part in message
