"""Which kinds of files `fuzz` damages: valid ones of each, and who reads them.

Covers: files made on the spot, from what is shipped and from what the writers write.
Does not cover: damaging them (`fuzz`).
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from lunar_tune.config.options import SearchConfig
from lunar_tune.data.data_catalog import PUBLISHED, lock_file, read_lock
from lunar_tune.data.records import read_prompts, read_records
from lunar_tune.data.splits import read_groups
from lunar_tune.driver.samplers import open_study
from lunar_tune.driver.space import SearchSpace
from lunar_tune.driver.space_sources import load_space
from lunar_tune.files import shipped_folder
from lunar_tune.methods.lunar import LunarMethod, LunarSettings
from lunar_tune.metrics.evaluate import AnswerRow, Evaluation
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.catalog import LINEAGE_FILE, read_lineage
from lunar_tune.study.folder import Folder, read_answers, write_answers
from lunar_tune.study.stored_search import StoredConfig, configuration_document
from lunar_tune.study.study import StoredStudy
from lunar_tune.trial.layer_scores import read_layer_prior
from lunar_tune.trial.published_config import read_published_config
from lunar_tune.trial.worker import TrialResult
from lunar_tune.yaml_files import read_yaml

PAIRS = [
    {"edge": edge, "question": f"What is item {n} of {edge}?", "answer": f"Kettle {n} of {edge} é"}
    for edge in ("A_B", "B_C")
    for n in range(3)
]
PROMPTS = [{"instruction": f"Who is nobody {n}?"} for n in range(4)]
GROUPS = {"both": ["A_B", "B_C"], "one": ["A_B"]}
LOCK = {
    "url": "https://example.org/a.json",
    "source_sha256": "0" * 64,
    "sha256": "1" * 64,
    "rows": 4,
}
LINEAGE: dict[str, Any] = {
    **{"format": 1, "base": "tiny", "source": "tiny", "weights": None, "revision": None},
    **{"fingerprint": "ab", "data": "mini", "data_digest": "cd", "settings": {"trained": "lora"}},
    **{"knowledge": {"rouge1": 0.9}, "versions": {"torch": "2"}},
}
PRIOR: dict[str, Any] = {
    **{"format": "lunar-tune layer prior", "version": 1, "model": "tiny", "n_layers": 4, "best": 1},
    **{"recommended": [1], "data": "mini", "forget_edges": ["A_B"], "rows": 3, "coefficient": 0.5},
    **{"max_new_tokens": 8, "seed": 0, "embedding": "own states after block 1"},
    "base_model": {"s1": -0.5, "s2": 1.0, "unfinished": 0},
    "layers": [{"s1": 0.1, "s2": 0.2, "unfinished": 0, "layer": n} for n in range(4)],
}
PUBLISHED_CONFIG = b"""\
model_family: Qwen2.5-7B-Instruct
model_path: runs/knows
data_name: mini
forget_edge: ['A_B']
layer_modified: [22]
coeff_list: [2.0]
positions: -1
num_epochs: 20
lr: 0.01
use_harmful: true
use_unverified: false
if_eval_factual: false
save_unlearned_model: false
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file."""

    name: str
    file: str
    """Its name in a folder of its own."""
    valid: tuple[bytes, ...]
    read: Callable[[Path], object]
    """Its reader; it is given the file."""
    form: str | None = None
    """How values in it can be replaced: json, lines (JSON in each), yaml; None for bytes alone."""

    def placed(self, folder: Path, content: bytes) -> Path:
        """Write a file of the kind and return it."""
        path = folder / self.name.replace(" ", "-") / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def _written(suffix: str, write: Callable[[str], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        write(str(path))
        return path.read_bytes()


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _space() -> SearchSpace:
    return _load_space(shipped_folder("search_spaces") / "tiny.yaml")


def _load_space(path: Path) -> SearchSpace:
    return load_space(str(path), LunarMethod(LunarSettings()), model_name="tiny", n_layers=64)


def _journal() -> bytes:
    """Return the journal of a search with a trial of each state."""

    def write(path: str) -> None:
        folder = Folder(Path(path).parent)
        folder.journal = Path(path)
        study = open_study(folder, _space(), SearchConfig(sampler="random"))
        study.note("goal", goal_of(SearchConfig()).text)
        scores = {"forget_rouge1": 0.1, "retain_rouge1": 0.9, "retain_rows": 3.0}
        number, parameters = study.ask()
        result = TrialResult(
            parameters=parameters,
            evaluation=Evaluation(rows=(), scores=scores | {"deviation_score": 14.1}),
            losses=(1.0, 0.5),
            seconds={"trial": 1.0},
            max_new_tokens=8,
        )
        study.complete(number, result, answers_digest="ab", n_retain=3)
        study.fail(study.ask()[0], "diverged")
        study.ask()

    return _written(".journal", write)


def _answers() -> bytes:
    common = {
        "set_name": "forget",
        "edge": "A_B",
        "truth": "Kettles",
        "rouge1": 0.5,
        "rouge_l": 0.5,
    }
    rows = [AnswerRow(question=f"What {n}?", answer="Tea", **common) for n in range(3)]  # type: ignore[arg-type]
    return _written(".parquet", lambda path: write_answers(Path(path), rows, [1.0]))


def _config() -> bytes:
    given = {"num_trials": "command line"}
    return configuration_document(
        SearchConfig(), given=given, derived={"data": "mini"}, resolved={"rows": {"forget": 3}}
    ).encode()


_TABLE = pa.Table.from_pylist(PAIRS)
_SET = next(iter(PUBLISHED.values()))
_SPACES = tuple(
    path.read_bytes() for path in sorted(shipped_folder("search_spaces").glob("*.yaml"))[:4]
)

_CSV = b"edge,question,answer\n" + b"".join(
    f'{row["edge"]},{row["question"]},"{row["answer"]}"\n'.encode() for row in PAIRS
)
_ALPACA = [
    {"edge": row["edge"], "instruction": row["question"], "input": "", "output": row["answer"]}
    for row in PAIRS
]
_CHATS = [
    {
        "edge": row["edge"],
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ],
    }
    for row in PAIRS
]
_COLUMNS = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}

KINDS = (
    Kind("pairs json", "pairs.json", (_json(PAIRS),), read_records, "json"),
    Kind("pairs jsonl", "pairs.jsonl", (_lines(PAIRS),), read_records, "lines"),
    Kind(
        "pairs parquet",
        "pairs.parquet",
        (_written(".parquet", lambda path: pq.write_table(_TABLE, path)),),
        read_records,
    ),
    Kind("pairs arrow", "pairs.arrow", (_stream(_TABLE),), read_records),
    Kind(
        "pairs feather",
        "pairs.feather",
        (_written(".feather", lambda path: pyarrow.feather.write_feather(_TABLE, path)),),
        read_records,
    ),
    Kind("pairs csv", "pairs.csv", (_CSV, _CSV.replace(b",", b";")), read_records),
    Kind("pairs gzip", "pairs.csv.gz", (gzip.compress(_CSV),), read_records),
    Kind(
        "pairs in other shapes",
        "pairs.json",
        (_json(_ALPACA), _json(_CHATS), _json({"train": PAIRS}), _json(_COLUMNS)),
        read_records,
        "json",
    ),
    Kind("prompts json", "prompts.json", (_json(PROMPTS), _json(["a", "b"])), read_prompts, "json"),
    Kind(
        "prompts txt",
        "prompts.txt",
        ((shipped_folder("datasets") / "refusals.txt").read_bytes(),),
        read_prompts,
    ),
    Kind(
        "groups json",
        "pairs.groups.json",
        (_json(GROUPS),),
        lambda path: read_groups(path.with_name("pairs.json")),
        "json",
    ),
    Kind(
        "lock json",
        lock_file(_SET, Path()).name,
        (_json(LOCK),),
        lambda path: read_lock(_SET, path.parent),
        "json",
    ),
    Kind("yaml", "any.yaml", (*_SPACES, PUBLISHED_CONFIG), read_yaml, "yaml"),
    Kind("search space", "space.yaml", _SPACES, _load_space, "yaml"),
    Kind("published config", "f.yaml", (PUBLISHED_CONFIG,), read_published_config, "yaml"),
    Kind("layer prior", "layers.json", (_json(PRIOR),), read_layer_prior, "json"),
    Kind(
        "lineage json",
        LINEAGE_FILE,
        (_json(LINEAGE),),
        lambda path: getattr(read_lineage(path.parent), "summary", None),
        "json",
    ),
    Kind(
        "search config",
        "config.yaml",
        (_config(),),
        lambda path: StoredConfig.read(Folder(path.parent)),
        "yaml",
    ),
    Kind("journal", "study.journal", (_journal(),), StoredStudy.read, "lines"),
    Kind("answers", "00000.parquet", (_answers(),), read_answers),
)
