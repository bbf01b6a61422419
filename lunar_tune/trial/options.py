"""What a run is told, as one frozen object with a default for everything.

Covers: the options that a single run and a search share.
Does not cover: reading files and checking them against each other (`assemble`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lunar_tune.evaluation.settings import DecodingSettings
from lunar_tune.methods.lunar_settings import LunarSettings
from lunar_tune.models.catalog import TINY
from lunar_tune.models.chat import OWN

__all__ = ["NONE", "RunOptions"]

NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Model, data and method of a run, as a user names them."""

    model: str = TINY
    """Catalogue name, hub id or folder."""
    model_path: str | None = None
    """Folder of fine-tuned weights: a checkpoint or a PEFT adapter."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "auto"
    """Number format of the weights."""
    device: str = "auto"
    """cpu, cuda or auto."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the checkpoint may run."""
    chat_template: str = OWN
    """own, published, or a Jinja file."""
    system_prompt: str | None = None
    """Text of a system turn before each question."""
    data: str | None = None
    """Shipped name or file of the pairs the model knows; None takes the model's own."""
    forget_edges: tuple[str, ...] = ()
    """Edges to forget; empty takes A_B."""
    retain_data: str | None = None
    """Shipped name or file of another retain set for the fit; evaluation keeps the data's own."""
    factual_data: str = "factual"
    """Shipped name or file of general knowledge, or none."""
    reference_prompts: str = "unverifiable"
    """Shipped name (unverifiable, harmful) or file of prompts that the model declines."""
    retain_rows: int | None = None
    """Size of the retain sample that trials are judged on, by edge; None takes all rows."""
    evaluation_rows: int | None = None
    """First rows of each set that are evaluated (the published code takes 200); None takes all."""
    method: str = "lunar"
    """Unlearning method."""
    lunar: LunarSettings = field(default_factory=LunarSettings)
    """Fixed settings of LUNAR."""
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    """How answers are generated."""
    rouge_tokenizer: str = "default"
    """Words that ROUGE counts: default ([a-z0-9], stemmed) or words (every script)."""
    seed: int = 0
    """Of everything random."""
