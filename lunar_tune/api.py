"""What `import lunar_tune as lt` offers: searching, single runs, one's own metrics and methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lunar_tune.config.fields import (
    Option,
    check_values,
    from_document,
    option,
    options_of,
    same_option,
    shared_options,
    takes_options,
)
from lunar_tune.config.options import METHOD, PLACE, Reused, RunOptions, SearchConfig
from lunar_tune.display import screen
from lunar_tune.errors import InputError, Problems
from lunar_tune.metrics.goal import ANSWERS, METRICS, WHOLE_ANSWERS, Metric
from lunar_tune.report import charts, parameter_charts
from lunar_tune.report.progress import working
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import RUNS

if TYPE_CHECKING:
    import pandas as pd

    from lunar_tune.export.proof import Exported
    from lunar_tune.methods.contract import Method
    from lunar_tune.metrics.evaluate import AnswerRow
    from lunar_tune.trial.single import SingleRun

Told = TypeVar("Told")
Score = TypeVar("Score", bound="Callable[[Sequence[AnswerRow]], float]")
OwnMethod = TypeVar("OwnMethod", bound="type[Method]")
SETS = ("forget", "retain", "factual")


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchOptions(SearchConfig):
    """What `search` takes: the options of the command, but for where trials run."""

    in_process: bool = field(default=True, init=False)
    backend: Literal["in-process", "ray"] | None = option(None, group=PLACE, common=True)
    """in-process (one trial after another, in this process) or ray (on this machine's GPUs, or a
    cluster's). Default: in-process; where a search is resumed, what it ran on."""
    quiet: bool = same_option(Reused, "quiet", common=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class UnlearnOptions(RunOptions):
    """What `unlearn` takes: a setting, and the options of a run."""

    layer: int | Sequence[int] | None = option(None, group=METHOD, common=True)
    """Decoder block to edit, or several."""
    coefficient: float | Sequence[float] | None = option(None, group=METHOD, common=True)
    """How far activations are moved, for each layer or one for all."""
    learning_rate: float | None = option(None, group=METHOD, common=True)
    """Learning rate of the methods that train."""
    ridge: float | None = option(None, group=METHOD, common=True)
    """Strength of the ridge regression of lunar's closed form. Default: 0.01."""
    baseline: bool = option(True, group=PLACE, common=True)
    """Evaluate the base model too."""
    save: Path | None = same_option(Reused, "save")
    """Folder for the unlearned model as a Hugging Face checkpoint."""
    quiet: bool = same_option(Reused, "quiet", common=True)


SETTING = ("layer", "coefficient", "learning_rate", "ridge")


class Search(SearchResults):
    """A search, finished or still running: its tables and charts, and its model as files."""

    plot_trade_off = charts.trade_off
    plot_history = charts.history
    plot_layer_coefficient = parameter_charts.layer_coefficient
    plot_sensitivity = parameter_charts.sensitivity
    plot_parameters = parameter_charts.parameters
    plot_importance = parameter_charts.importance
    plot_layers = charts.layers

    def ask(
        self,
        *questions: str,
        trial: int | None = None,
        max_new_tokens: int = 128,
        trust_remote_code: bool | None = None,
    ) -> pd.DataFrame:
        """Ask the base model and the unlearned model questions, and return a row for each.

        A search keeps no weights: the model is loaded and unlearned again, once for all questions.
        An InputError says that there is no such trial, or that its model or data are gone.

        Args:
            *questions: Any, also such as are not in the data.
            trial: Number of the trial; None is the confirmed best.
            max_new_tokens: Token budget of an answer.
            trust_remote_code: Whether code of the checkpoint may run; a search that ran it is
                refused with None.
        """
        import pandas as pd

        from lunar_tune.export.export_job import assemble_again
        from lunar_tune.trial.assemble import materialise
        from lunar_tune.trial.single import asking

        problems, row = Problems(), self.trial(trial)
        spec = assemble_again(self, problems, trust_remote_code=trust_remote_code)
        problems.raise_if_any()
        epochs = len(row.losses) or None
        spec = materialise(spec, screen())
        with asking(spec, row.parameters, epochs=epochs, max_new_tokens=max_new_tokens) as ask:
            answered = pd.DataFrame(map(dataclasses.asdict, ask(questions)))
        return answered.rename(columns={"truth": "true_answer", "set_name": "set"})

    def export(
        self,
        save: str | Path,
        *,
        format: str = "checkpoint",
        trial: int | None = None,
        device: str | None = None,
        trust_remote_code: bool | None = None,
        quiet: bool = False,
    ) -> Exported:
        """Write a trial's unlearned model as files that load without lunar-tune, and prove it.

        An InputError says all that cannot be done; a LunarTuneError, that what was written does not
        give what the search reported.

        Args:
            save: Folder to write, empty or missing.
            format: checkpoint (a whole model), adapter (PEFT LoRA) or adapter:RANK.
            trial: Number of the trial; None is the confirmed best.
            device: cpu, cuda or auto; None is the search's.
            trust_remote_code: As for `ask`.
            quiet: Whether to show nothing meanwhile.
        """
        from lunar_tune.export.export_job import ExportJob
        from lunar_tune.export.writing import export

        job = ExportJob.plan(
            self.folder.path,
            Path(save),
            number=trial,
            form=format,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        exported = export(job, screen(quiet=quiet))
        exported.raise_if_unproven()
        return exported


@takes_options(SearchOptions)
def search(**options: Any) -> Search:
    """Search for the setting that forgets most while the model keeps the rest.

    It takes the options of the command `lunar-tune search` as keywords: numbers, texts, paths,
    lists where several values may be given, and a dictionary for `fix`; an InputError says all that
    is wrong. An interruption ends the search as Ctrl-C does on a terminal: what was computed is
    returned, and `resume` continues the search.

    Example:
        >>> found = lt.search(model="tiny", num_trials=12)  # doctest: +SKIP
        >>> found = lt.search(resume=found.folder.name, num_trials=24)
    """
    problems = Problems()
    told = _told(SearchOptions, options, problems)
    given = dict.fromkeys(options, "Python")
    config = shared_options(told, SearchConfig)
    if told.backend is not None or told.resume is None:
        config = dataclasses.replace(config, in_process=told.backend != "ray")
        given["in_process"] = "Python"
    console = screen(quiet=told.quiet)
    with working(console, "reading data and search space") as doing:
        from lunar_tune.driver.run import start_search

        _, folder = start_search(
            config, given, console=console, problems=problems, doing=doing, show_commands=False
        )
    if folder is None:
        raise AssertionError("a search that was run has a folder")
    return Search.read(folder.path)


def load(search: str | Path, *, output: str | Path = RUNS) -> Search:
    """Read a search, finished or still running, by its folder or its name in the folder `output`.

    An InputError says that there is no such search, or that it has not judged the base model yet.
    """
    return Search.read(search, runs=output)


@takes_options(UnlearnOptions)
def unlearn(**options: Any) -> SingleRun:
    """Unlearn once, with one setting, and return scores and answers.

    Parameters of a method that have no keyword are given as `fix={"name": value}`. An InputError
    says all that cannot be done, a TrialError that the fit failed, for example by divergence.

    Example:
        >>> run = lt.unlearn(layer=1, coefficient=2.0, learning_rate=3e-3)  # doctest: +SKIP
        >>> run.scores["forget_rouge1"], run.scores["retain_rouge1"]
    """
    from lunar_tune.trial.single import unlearn as run_once

    problems = Problems()
    told = _told(UnlearnOptions, options, problems)
    given = ((name, getattr(told, name)) for name in SETTING)
    return run_once(
        shared_options(told, RunOptions),
        {name: value for name, value in given if value is not None},
        baseline=told.baseline,
        save_to=told.save,
        console=screen(quiet=told.quiet),
        problems=problems,
    )


def metric(
    *,
    lower_is_better: bool,
    sets: Sequence[str] = (),
    low: float = 0.0,
    high: float = 1.0,
    name: str | None = None,
) -> Callable[[Score], Score]:
    """Register a function of answers as a metric that a search can report, minimise or constrain.

    An InputError says that the name is that of a metric of the package, or tells of no set.

    Args:
        lower_is_better: Which end is good.
        sets: Whose answers it is given: forget, retain, factual. Default: the name's first word.
        low: Its least value.
        high: Its greatest value.
        name: By which it is asked for. Default: the function's.

    Example:
        >>> @lt.metric(lower_is_better=False)  # doctest: +SKIP
        ... def forget_refusals(rows):
        ...     return sum("not know" in row.answer for row in rows) / len(rows)
        >>> lt.search(metrics=["forget_refusals"])
    """

    def register(score: Score) -> Score:
        called = name or score.__name__
        judged = (sets,) if isinstance(sets, str) else tuple(sets)
        judged = judged or tuple(one for one in SETS if called.startswith(f"{one}_"))
        if not judged or not set(judged) <= {*SETS}:
            raise InputError(
                f"metric {called!r}: sets is {list(judged)}; name some of {', '.join(SETS)}, or "
                "begin its name with one."
            )
        entry = Metric(
            name=called,
            sets=judged,
            low=float(low),
            high=float(high),
            lower_is_better=lower_is_better,
            needs=frozenset({ANSWERS, WHOLE_ANSWERS}),
            compute=score,
        )
        METRICS.add(called, entry)
        return score

    return register


def method(kind: OwnMethod) -> OwnMethod:
    """Register a class that extends `lt.Method` under its `name`, no method's yet; a decorator."""
    from lunar_tune.methods.contract import METHODS

    METHODS.add(kind.name, kind)
    return kind


def _told(owner: type[Told], values: Mapping[str, Any], problems: Problems) -> Told:
    """Return keywords as an instance of options, or raise an InputError; note wrong ranges."""
    known = options_of(owner)
    plain = {name: _plain(value, known.get(name)) for name, value in values.items()}
    told = owner(**from_document(owner, plain))
    check_values(told, problems)
    return told


def _plain(value: Any, said: Option | None = None) -> Any:
    """Return a value as a file of options holds it: paths and assignments are texts."""
    if isinstance(value, Mapping):
        sign = ":" if said is not None and ":" in (said.metavar or "") else ","
        parts = {key: one if isinstance(one, list | tuple) else [one] for key, one in value.items()}
        return [f"{key}={sign.join(map(str, some))}" for key, some in parts.items()]
    if isinstance(value, list | tuple | AbstractSet):
        return [_plain(one) for one in value]
    if isinstance(value, PurePath):
        return str(value)
    return value.item() if hasattr(value, "item") else value  # a number of numpy's
