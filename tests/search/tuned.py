"""Tuned settings made up by hand.

Covers: one entry with values to choose. Does not cover: entries of real searches.
"""

from __future__ import annotations

from typing import Any

from lunar_tune.search.tuned.tuned_settings import TunedSetting

DIGESTS = {"forget": "f0", "retain": "1e5", "factual": "aa"}  # one would be a number in YAML 1.2


def tuned_setting(
    data: str = "mini",
    edges: tuple[str, ...] = ("A_B",),
    *,
    forget: float = 0.25,
    retain: float = 0.9,
    date: str = "2026-11-20",
    digests: dict[str, str] | None = None,
    **changes: Any,
) -> TunedSetting:
    """Return an entry for LUNAR by AdamW."""
    values: dict[str, Any] = {
        "data": data,
        "forget_edges": edges,
        "method": "lunar",
        "variant": "adamw",
        "parameters": {"layer": 2, "coefficient": 1.5, "learning_rate": 1e-05 * 300},
        "minimise": "forget_rouge1",
        "constraints": ("retain_rouge1>=0.8",),
        "scores": {"forget_rouge1": forget, "retain_rouge1": retain},
        "provenance": {
            "search": "1e5",
            "date": date,
            "trials": 12,
            "seed": 3,
            "confirmed_in_full": True,
            "max_new_tokens": 512,
            "digests": digests or DIGESTS,
            "source": "owner/model",
            "weights": None,
            "revision": None,
            "lineage": None,
            "version": "0.1.0",
        },
    }
    return TunedSetting.model_validate(values | changes)
