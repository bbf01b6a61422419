"""A search's results: its report, and its charts for a notebook."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lunar_tune.errors import InputError
from lunar_tune.report.report import LayerCurve, Report
from lunar_tune.study.folder import RUNS
from lunar_tune.study.rows import parameter_importance
from lunar_tune.study.stored_search import StoredSearch

if TYPE_CHECKING:
    from altair import ConcatChart

__all__ = ["SearchResults", "load_search"]


def load_search(search: str | Path, *, runs: str | Path = RUNS) -> SearchResults:
    """Read a search, finished or still running.

    Args:
        search: Its folder, or its name.
        runs: Where names are looked up.

    Raises:
        InputError: There is no such search, or it has not judged the base model yet.

    Example:
        >>> results = load_search("runs/NAME")  # doctest: +SKIP
        >>> results.trials.sort_values("forget_rouge1")
    """
    return SearchResults.read(search, runs=runs)


class SearchResults(StoredSearch):
    """A search as it stands on disk, with its report and charts."""

    @cached_property
    def report(self) -> Report:
        """What tables, pictures and pages are made of."""
        notes = self.study.notes
        tags = notes["tags"]
        return Report(
            title=self.title,
            facts=notes.get("facts", tags),
            goal=self.goal,
            baseline=self.baseline,
            rows=self.rows,
            best=self.best,
            confirmed=self.confirmed,
            held_out=self.held_out,
            baseline_in_full=self.baseline_in_full,
            ending=notes.get("ending"),
            log_scale=self.study.log_scale,
            listed=self.study.listed,
            importance=functools.cache(self._importance),
            layers=self._layers(),
        )

    def trade_off(self) -> ConcatChart:
        """Draw what is forgotten against what is kept: every trial, the bounds, the best."""
        return self._draw("trade_off")

    def history(self) -> ConcatChart:
        """Draw the best feasible score so far, over the trials and over time."""
        return self._draw("history")

    def layer_coefficient(self) -> ConcatChart:
        """Draw the map of layer and coefficient.

        Raises:
            InputError: They were not both searched.
        """
        return self._draw("layer_coefficient")

    def sensitivity(self, parameter: str | None = None) -> ConcatChart:
        """Draw the scores against a parameter: the learning rate, or what is in its place.

        Raises:
            InputError: No two completed trials differ in it.
        """
        from lunar_tune.report.parameter_charts import sensitivity

        return sensitivity(self.report, parameter)

    def parameters(self) -> ConcatChart:
        """Draw the objective against each parameter that varies.

        Raises:
            InputError: Completed trials differ in fewer than two parameters.
        """
        return self._draw("parameters")

    def importance(self) -> ConcatChart:
        """Draw how much each parameter decides.

        Raises:
            InputError: Too few trials are completed, or their scores do not differ.
        """
        return self._draw("importance")

    def layers(self) -> ConcatChart:
        """Draw the similarities that chose the layers.

        Raises:
            InputError: The search was not told to score layers.
        """
        return self._draw("layers")

    def _draw(self, name: str) -> ConcatChart:
        from lunar_tune.report.charts import CHARTS  # loads Altair

        return CHARTS[name].draw(self.report)

    def _importance(self) -> dict[str, dict[str, float]]:
        """Return what decides the scores that pictures show; of those that there is something.

        It takes seconds where there are hundreds of trials (`parameter_importance`).
        """
        shares = {
            name: parameter_importance(self.rows, self.study.distributions, name)
            for name in self.goal.shown
        }
        return {name: share for name, share in shares.items() if share is not None}

    def _layers(self) -> LayerCurve | None:
        """Return the scored layers, from the study or from the file that was given."""
        document = json.loads(self.study.notes.get("layer_prior") or "null")
        if document is None and self.folder.config.is_file():
            with suppress(InputError):  # one that cannot be read has no part in the scores
                document = self.config.resolved.get("layer_prior")
        return LayerCurve.read(document) if document is not None else None
