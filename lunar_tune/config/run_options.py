"""What a run is told, as one frozen object with a default for everything.

Covers: the options that a single run and a search share.
Does not cover: reading files and checking them against each other (`assemble`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.gradient_settings import GradientSettings
from lunar_tune.config.lunar_settings import LunarSettings
from lunar_tune.errors import InputError

__all__ = ["NONE", "OWN", "TINY", "EngineSettings", "RunOptions"]

NONE, OWN, TINY = "none", "own", "tiny"
VERIFY_VARIABLE = "LUNAR_TUNE_VERIFY_WEIGHTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a trial keeps from others and what it skips; none of it changes a feasible score."""

    reuse: bool = True
    """Whether prompts go on from kept streams and drafts are checked; False decodes plainly."""
    early_exit: bool = False
    """Whether an answer ends when it has said every word of the truth. Its ROUGE recall is 1 then,
    whatever follows; an answer that is to be read should go on."""
    retain_floor: float | None = None
    """Least retain ROUGE-1: a trial that has missed it for certain asks no more. None asks all."""
    checks: int = 4
    """Looks at a gradient fit while it goes on, where there is a floor; one that has lost the
    retain set ends early. 0 never looks."""
    verify_weights: bool = field(default_factory=lambda: bool(os.environ.get(VERIFY_VARIABLE)))
    """Whether a trial ends with a look at every weight, whether it is what it was before. The
    environment variable `LUNAR_TUNE_VERIFY_WEIGHTS` switches it on as well."""
    memory_budget: float | None = None
    """GiB of a GPU that weights, streams and batches share; None takes all that is free."""
    cache_limit: float | None = None
    """GiB that activations on disk may take; 0 keeps none there, None is a quarter of the disk's
    free space, at most 100."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing."""
        if self.checks < 0:
            raise InputError(f"--checks {self.checks}: 0 or more.")
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            raise InputError(f"--memory-budget {self.memory_budget}: a positive number of GiB.")
        if self.cache_limit is not None and not 0 <= self.cache_limit < math.inf:
            raise InputError(f"--cache-limit {self.cache_limit}: 0 or more GiB.")


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
    refusals: str = "refusals"
    """Shipped name or file of answers that decline; dpo prefers them."""
    retain_rows: int | None = None
    """Size of the retain sample that trials are judged on, by edge; None takes all rows."""
    evaluation_rows: int | None = None
    """First rows of each set that are evaluated (the published code takes 200); None takes all."""
    holdout: bool = False
    """Whether trials are judged on one half of every edge, and full evaluations on the other."""
    method: str = "lunar"
    """Unlearning method."""
    lunar: LunarSettings = field(default_factory=LunarSettings)
    """Fixed settings of LUNAR."""
    gradient: GradientSettings = field(default_factory=GradientSettings)
    """Fixed settings of the gradient methods."""
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    """How answers are generated."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What a trial keeps from others and what it skips."""
    rouge_tokenizer: str = "default"
    """Words that ROUGE counts: default ([a-z0-9], stemmed) or words (every script)."""
    metrics: tuple[str, ...] = ()
    """Scores to report beside ROUGE, by name (`metrics.names`)."""
    embedding_model: str | None = None
    """Hub id or folder of a sentence-embedding model; None takes the model's own states."""
    seed: int = 0
    """Of everything random."""
    text: bool = True
    """Whether questions and answers may be written down and shown; scores are without them too."""
