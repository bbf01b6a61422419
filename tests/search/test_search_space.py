"""Search spaces: shipped ones fit every model, bad files are refused whole; what is narrowed."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Real
from optuna.distributions import IntDistribution as Whole

from lunar_tune.config.options import TINY, SearchConfig, read_assignments
from lunar_tune.driver.plan import plan_search
from lunar_tune.driver.samplers import open_study
from lunar_tune.driver.space import Parameter, SearchSpace, admitted, bounds_of
from lunar_tune.driver.space_sources import load_space, narrowed
from lunar_tune.errors import InputError, SearchSpaceError
from lunar_tune.files import shipped_folder, shipped_spaces
from lunar_tune.methods.contract import configure_method
from lunar_tune.methods.lunar import SOLVERS, LunarMethod, LunarSettings
from lunar_tune.models.catalog import CATALOG
from lunar_tune.study.folder import Folder
from lunar_tune.trial.assemble import configured
from lunar_tune.yaml_files import read_yaml, write_yaml

ADAMW = ("layer", "coefficient", "learning_rate")
GOOD = """
lunar:
  adamw:
    parameters:
      layer: {type: int, low: 10, high: 24}
      coefficient: {type: float, low: 0.5, high: 6.0}
      learning_rate: {type: float, low: 1e-4, high: 3e-2, log: true}
    starting_points:
      - {layer: 18, coefficient: 2, learning_rate: 1e-2}
"""


def load(
    path: Path | str | None,
    *optional: str,
    model: str = "someone/else",
    variant: str = "adamw",
    method: str = "lunar",
    parameters: tuple[str, ...] = ADAMW,
    n_layers: int = 28,
) -> SearchSpace:
    """Load a space for a method with such parameters, and others that may be searched, too."""
    facts = {"name": method, "variant": variant, "parameters": parameters}
    made: Any = SimpleNamespace(**facts, optional_parameters=optional)
    return load_space(path and str(path), made, model_name=model, n_layers=n_layers)


def written(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(folder: Path, text: str) -> str:
    with pytest.raises(SearchSpaceError) as caught:
        load(written(folder, text))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_model_of_the_catalogue_and_every_depth_has_a_space(solver: str) -> None:
    """From .45 of the way from the first block on to the last, as the shipped files say."""
    parameters = LunarMethod(LunarSettings(solver=solver)).parameters
    models = {model: entry.n_layers for model, entry in CATALOG.items()}
    for model, n_layers in [*models.items(), *(("someone/else", n) for n in range(2, 101))]:
        space = load(None, model=model, variant=solver, parameters=parameters, n_layers=n_layers)
        assert tuple(space.parameters) == parameters
        last = n_layers - 1
        depths = (0, last) if model == TINY else (round(0.45 * last), last)
        assert bounds_of(space.parameters["layer"]) == depths
        assert space.starting_points
        for point in space.starting_points:
            space.check(point)
    assert space.origin == "default by depth (100 blocks)"


def test_known_settings_of_public_code_are_tried_first() -> None:
    known = {"llama2-7b": (22, 0.01), "llama3-8b": (22, 0.005), "gemma-7b": (18, 0.01)}
    for model, (layer, rate) in known.items():
        (first, *_) = load(None, model=model, n_layers=CATALOG[model].n_layers).starting_points
        assert first == {"layer": layer, "coefficient": 2.0, "learning_rate": rate}
    # The default scales the published layer, 22 of 32 blocks.
    assert [point["layer"] for point in load(None, n_layers=32).starting_points] == [22, 16, 29]
    assert {*shipped_spaces()} <= {"default", *CATALOG}


def test_a_method_that_a_models_file_lacks_has_the_section_of_the_default() -> None:
    """And one that no shipped space knows begins where one with its parameters begins."""
    rate = ("learning_rate",)
    sections = read_yaml(shipped_folder("search_spaces") / "default.yaml")
    depths = (3, 16)  # .1 and .6 of 27
    for method, layers in {"ga": None, "rmu": depths}.items():
        names = rate if layers is None else ADAMW
        for variant, section in sections[method].items():
            options: dict[str, Any] = {"method": method, "variant": variant, "parameters": names}
            space = load(None, model="qwen2.5-7b", **options)
            ends = section["parameters"]["learning_rate"]
            bounds = (float(ends["low"]), float(ends["high"]))
            assert bounds_of(space.parameters["learning_rate"]) == bounds
            assert layers is None or bounds_of(space.parameters["layer"]) == layers

    new, known = (
        load(None, method=name, variant="lora", parameters=rate) for name in ("new", "ga")
    )
    assert (new.parameters, new.starting_points) == (known.parameters, known.starting_points)
    with pytest.raises(SearchSpaceError, match="has no section new"):
        load(None, method="new", variant="lora", parameters=("temperature",))


def test_a_shipped_name_and_a_path_are_both_understood(tmp_path: Path) -> None:
    assert bounds_of(load("tiny", n_layers=4).parameters["layer"]) == (0, 3)
    assert bounds_of(load(written(tmp_path, GOOD)).parameters["layer"]) == (10, 24)
    said = r"--space tniy: .*Did you mean 'tiny'\?.*default"
    for wrong, why in (
        ("tniy", said),
        ("x" * 5000, "cannot be read"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(SearchSpaceError, match=why):
            load(wrong)


def test_every_kind_becomes_its_distribution(tmp_path: Path) -> None:
    text = """
    m:
      v:
        parameters:
          layer: {type: depth, low: 0, high: 1}
          f: {type: float, low: -1, high: 1}
          c: {type: choice, values: [1e-4, 1, 2.5]}
          x: {type: fixed, value: 20}
          y: {type: float, low: 1e-4, high: 1e-4}
          z: {type: float, low: 1e-4, high: 3e-2, log: true}
        starting_points:
          - {layer: 0.5, f: 0, c: 1.0, x: 20.0, y: 0.0001, z: 1e-3}
    """
    names = ("layer", "f", "c", "x", "y")
    options: dict[str, Any] = {"method": "m", "variant": "v", "parameters": names, "n_layers": 5}
    path = written(tmp_path, text)
    space = load(path, "z", **options)
    assert space.origin == str(path)
    assert space.parameters == {
        "layer": Whole(0, 4),
        "f": Real(-1.0, 1.0),
        "c": Choice((1e-4, 1, 2.5)),
        "x": Whole(20, 20),
        "y": Real(1e-4, 1e-4),
        "z": Real(1e-4, 3e-2, log=True),
    }
    (point,) = space.starting_points
    assert point == {"layer": 2, "f": 0.0, "c": 1, "x": 20, "y": 1e-4, "z": 1e-3}
    assert repr(point["x"]) == "20"
    described = {"c": "0.0001, 1, 2.5", "x": "20 (fixed)", "y": "0.0001 (fixed)"}
    described |= {"layer": "0 … 4", "f": "-1 … 1", "z": "0.0001 … 0.03 (log)"}
    assert dict(space.describe()) == described
    with pytest.raises(SearchSpaceError, match="z: is unknown to the method"):
        load(path, **options)
    assert pickle.loads(pickle.dumps(space)) == space
    plain = space.to_dict()
    section = {key: plain[key] for key in ("parameters", "starting_points")}
    assert load(written(tmp_path, write_yaml({"m": {"v": section}})), "z", **options) == space
    text = text.partition("        starting_points")[0]
    assert load(written(tmp_path, text), "z", **options).starting_points == ()


def with_parameter(line: str) -> str:
    """Return the file without starting points and with another line for a parameter."""
    name = line.partition(":")[0]
    lines = [f"      {line}" if f" {name}: {{type" in one else one for one in GOOD.splitlines()]
    return "\n".join(lines[:-2])


def with_point(point: str) -> str:
    return f"{GOOD}      - {point}\n"


BAD = [
    (with_parameter(line), f": lunar.adamw.parameters.{fragment}")
    for line, fragment in (
        ("layer: {type: int, low: 24, high: 10}", "layer: `low <= high` must hold, but got"),
        ("layer: {type: int, low: 10.0, high: 24}", "layer.low: is 10.0; it should be a valid"),
        ("layer: {type: int, low: 10, high: 28}", "layer: holds 10 … 28; the model has blocks"),
        ("layer: {type: choice, values: [3, 4.5]}", "layer: holds 3, 4.5; layers are whole"),
        ("layer: {type: float, low: 1, high: 3}", "layer: holds 1 … 3; layers are whole num"),
        ("layer: {type: depth, low: 0.3, high: 24}", "layer.high: is 24; it should be less"),
        ("coefficient: {type: depth, low: 0, high: 1}", "coefficient.type: is the text 'depth"),
        ("coefficient: {type: float, low: half}", "coefficient.low: is the text 'half'; a num"),
        ("coefficient: {type: float, low: 0, high: .inf}", "coefficient.high: is inf; a finit"),
        ("coefficient: {low: 0, high: 6}", "coefficient.type: is empty. There are: int, float"),
        ("coefficient: 2.0", "coefficient: is 2.0; write {type: …}; for one value {type: fix"),
        ("coefficient: {type: choice, values: [1, 1.0]}", "coefficient: values [1, 1.0] rep"),
        ("coefficient: {type: choice, values: [1, x]}", "coefficient.values[1]: is the text"),
        ("learning_rate: {type: float, low: 0, high: 1, log: true}", "learning_rate: `low > 0"),
        ("learning_rate: {type: fixed, value: -1}", "learning_rate: holds -1 (fixed); lear"),
    )
] + [
    (with_point("1"), "[1]: is 1; write {layer: …, coefficient: …, learning_rate: …}"),
    (with_point("{layer: 18, coefficient: 2}"), "[1].learning_rate: is missing"),
    (with_point("{layer: 9, coefficient: 2, learning_rate: 0.01}"), "is 9, outside 10 … 24"),
    (with_point("{layer: 18, coefficient: '2', learning_rate: 0.01}"), "is the text '2'; a"),
    ("other: {adamw: {}}", "has no section lunar.adamw. Did you mean 'other.adamw'?"),
    ("lunar:", "lunar: is empty; a section for each variant is needed"),
    ("lunar: {adamw: }", "lunar.adamw: is empty; it needs parameters and starting_points"),
    ("lunar: {adamw: {parameters: {}}}", "lunar.adamw.parameters: is {}; write each"),
    (GOOD.replace("starting_", "start_"), "lunar.adamw.start_points: is unknown. Did you mean"),
    (GOOD.partition("      - ")[0], "starting_points: is empty; a list is needed, [] for none"),
    (GOOD + GOOD, 'found duplicate key "lunar"'),
    (GOOD.replace("int, low: 10, high: 24", "depth, low: .3, high: .9"), "is 18, outside 0.3 … 0"),
]


@pytest.mark.parametrize(("text", "fragment"), BAD, ids=[said for _, said in BAD])
def test_what_is_wrong_in_a_file_has_its_place(tmp_path: Path, text: str, fragment: str) -> None:
    message = message_of(tmp_path, text)
    assert str(tmp_path / "space.yaml") in message
    assert fragment in message


def test_all_mistakes_of_a_file_come_in_one_message(tmp_path: Path) -> None:
    text = GOOD.replace("high: 24", "high: 40").replace("low: 0.5", "low: half")
    text = text.replace("learning_rate", "rate").replace("rate: 1e-2", "rate: 1")
    text += "  closed_form:\n    parameters: {ridge: {type: choice, values: [1, 1]}}\n"
    message = message_of(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'space.yaml'}: 6 things are wrong:\n  - ")
    for fragment in (
        "lunar.adamw.parameters.layer: holds 10 … 40",
        "lunar.adamw.parameters.coefficient.low: is the text",
        "lunar.adamw.parameters.rate: is unknown",
        "lunar.adamw.parameters.learning_rate: is missing",
        "lunar.adamw.starting_points[0].rate: is 1, outside",
        "lunar.closed_form.parameters.ridge: values [1, 1] repeat one",
    ):
        assert fragment in message


def test_values_from_elsewhere_are_checked_all_at_once(tmp_path: Path) -> None:
    space = load(written(tmp_path, GOOD))
    space.check({"layer": 10, "coefficient": 6, "learning_rate": 0.03})
    with pytest.raises(SearchSpaceError) as caught:
        space.check({"layer": True, "coefficient": float("inf"), "learn_rate": 1})
    for part in (
        "layer: is true; a number is needed",
        "coefficient: is inf; a finite number is needed",
        "learning_rate: is missing",
        "learn_rate: is unknown. Did you mean 'learning_rate'?",
    ):
        assert part in str(caught.value)


INTEGERS, FLOATS = st.integers(-99, 99), st.floats(-1e6, 1e6)
NUMBERS = INTEGERS | FLOATS
RATES = st.tuples(st.floats(1e-9, 1e3), st.floats(1.001, 1e6))
KINDS = st.one_of(
    st.tuples(INTEGERS, INTEGERS).map(lambda ends: Whole(min(ends), max(ends))),
    st.tuples(FLOATS, FLOATS).map(lambda ends: Real(min(ends), max(ends))),
    RATES.map(lambda ends: Real(ends[0], ends[0] * ends[1], log=True)),
    st.lists(NUMBERS, min_size=1, max_size=5, unique=True).map(Choice),
    NUMBERS.map(lambda value: Real(value, value)),
)


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, seed=st.integers(0, 99))
def test_what_optuna_samples_is_admitted_and_what_lies_beyond_is_not(
    kind: Parameter, seed: int
) -> None:
    low, high = bounds_of(kind)
    assert (admitted(kind, low), admitted(kind, high)) == (low, high)
    for outside in (low - 1, high + 1):
        with pytest.raises(ValueError, match="is "):
            admitted(kind, outside)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    space = SearchSpace("m", "v", {"a": kind}, (), "test")
    for _ in range(5):
        space.check(study.ask(dict(space.parameters)).params)


# Parameters of a space that are fixed or narrowed on the command line

OWN: Mapping[str, Parameter] = {
    "layer": Whole(0, 3),
    "coefficient": Real(0.5, 8.0),
    "learning_rate": Real(1e-4, 3e-2, log=True),
}
POINT = {"layer": 1, "coefficient": 1.0, "learning_rate": 0.003}
NPO: Mapping[str, Parameter] = {"learning_rate": Real(1e-5, 1e-2, log=True)}


def narrow(
    kinds: Mapping[str, Parameter] = OWN,
    point: Mapping[str, Any] | None = None,
    *,
    fix: tuple[str, ...] = (),
    ranges: tuple[str, ...] = (),
    method: str = "lunar",
) -> SearchSpace:
    points = (point,) if point is not None else ()
    made, _ = configure_method(method, solver=None, fixed=read_assignments(fix))
    space = SearchSpace(method, made.variant, dict(kinds), points, "a test")
    return narrowed(space, made, SearchConfig(fix=fix, range=ranges), n_layers=4)


def test_a_parameter_of_any_kind_can_be_fixed() -> None:
    kinds = (*OWN.values(), Choice((1, 2, 3)), Whole(3, 3))
    for name, kind in itertools.product(OWN, kinds):
        fixed = Whole(2, 2) if name == "layer" else Real(2, 2)
        space = narrow({**OWN, name: kind}, fix=(f"{name}=2",))
        assert space.parameters == {**OWN, name: fixed}


def test_a_parameter_of_any_kind_can_be_narrowed() -> None:
    for name, kind, text, expected in (
        ("layer", Whole(0, 1), "1:3", Whole(1, 3)),
        ("layer", Whole(0, 3), "2:2", Whole(2, 2)),
        ("layer", Choice((0, 2, 3)), "1:3", Choice((2, 3))),
        ("coefficient", Real(0.5, 8), "-1:4", Real(-1, 4)),
        ("coefficient", Whole(1, 1), "1:4", Real(1, 4)),
        ("learning_rate", Real(1e-4, 0.03, log=True), "1e-3:0.01", Real(1e-3, 0.01, log=True)),
        ("learning-rate", Real(1e-4, 0.03, log=True), "1e-3:0.01", Real(1e-3, 0.01, log=True)),
    ):
        space = narrow({**OWN, name.replace("-", "_"): kind}, ranges=(f"{name}={text}",))
        assert space.parameters == {**OWN, name.replace("-", "_"): expected}


def test_what_has_no_meaning_is_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ranges": ("layer=2:4",)}, "layer 4: the model has blocks 0 to 3"),
        ({"fix": ("layer=1.5",)}, "--fix layer=1.5: is 1.5; a whole number is needed"),
        ({"fix": ("coefficient=much",)}, "a number is needed"),
        ({"fix": ("learning_rate=0",)}, "a positive number"),
        ({"ranges": ("coefficient=1:inf",)}, "a finite number is needed"),
        ({"ranges": ("learning_rate=0:1",)}, "`low > 0` must hold for `log=True`"),
        ({"ranges": ("ridge=0.1:1",)}, "searches no ridge. There are: batch_size"),
        ({"fix": ("layer=2",), "ranges": ("layer=0:1",)}, "layer is named twice"),
        ({"ranges": ("layer=0:1", "layer=2:3")}, "--range layer=2:3: layer is named twice"),
        ({"kinds": {"ridge": Choice((1, 4))}, "ranges": ("ridge=2:3",)}, "holds none of 1, 4"),
        ({"kinds": NPO, "ranges": ("dropout=0:1",), "method": "npo"}, "must be less than 1"),
        ({"fix": ("coefficient=much",), "ranges": ("ridge=1:2", "layer=0.5:1")}, "3 things are"),
    ]
    for options, part in wrong:
        with pytest.raises(InputError) as caught:
            narrow(**options)
        assert part in str(caught.value)


def test_a_setting_that_is_fixed_is_searched_no_more() -> None:
    kinds = {**NPO, "rank": Whole(2, 16), "beta": Real(0.1, 1)}
    point = {"learning_rate": 1e-3, "rank": 4, "beta": 0.5}
    space = narrow(kinds, point, fix=("rank=8",), method="npo")
    assert space.parameters == {name: kind for name, kind in kinds.items() if name != "rank"}
    assert space.starting_points == ({"learning_rate": 1e-3, "beta": 0.5},)
    space = narrow(point=POINT, fix=("layer=3",), ranges=("coefficient=4:8",))
    assert space.starting_points == (POINT | {"layer": 3},)


def test_a_setting_that_the_space_does_not_search_is_searched_in_a_range() -> None:
    """A setting of whole numbers has a whole range; starting points begin in its middle."""
    point = {"learning_rate": 1e-3}
    space = narrow(NPO, point, ranges=("rank=2:16", "beta=0.1:0.5"), method="npo")
    added = {"rank": Whole(2, 16), "beta": Real(0.1, 0.5)}
    assert space.parameters == {**NPO, **added}
    assert space.starting_points == ({**point, "rank": 9, "beta": pytest.approx(0.3)},)


def test_a_plan_searches_what_is_left_and_a_study_asks_for_nothing_else(tmp_path: Path) -> None:
    own = {"fix": ("layer=2", "epochs=3"), "range": ("coefficient=0.5:2",)}
    plan = plan_search(SearchConfig(output=tmp_path, sampler="random", **own))
    assert plan.facts["  layer"] == "2 (fixed)"
    assert plan.facts["  coefficient"] == "0.5 … 2"
    assert plan.spec.layers == (2,)
    assert configured(plan.config)[1] == {"layer": 2}
    assert plan.spec.method.settings.epochs == 3  # type: ignore[attr-defined]
    study = open_study(Folder(tmp_path), plan.space, plan.config)
    asked = [study.ask()[1] for _ in range(12)]
    assert asked[0] == {"layer": 2, "coefficient": 0.9, "learning_rate": 0.003}
    assert {one["layer"] for one in asked} == {2}
    assert all(0.5 <= one["coefficient"] <= 2 for one in asked)
    assert len({one["coefficient"] for one in asked}) == 12

    plan = plan_search(SearchConfig(output=tmp_path, range=("coefficient=4:8",)))
    assert plan.space.starting_points == ()
    assert "coefficient: is 0.9, outside 4 … 8" in plan.facts["starting points"]
