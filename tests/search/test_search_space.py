"""Search spaces: shipped ones fit every model, bad files are refused whole, samples admitted."""

from __future__ import annotations

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lunar_tune.config.run_options import TINY
from lunar_tune.errors import SearchSpaceError
from lunar_tune.files import search_spaces_dir, shipped_spaces
from lunar_tune.methods.lunar import SOLVERS, LunarMethod, LunarSettings
from lunar_tune.models.catalog import CATALOG
from lunar_tune.search.space import Parameter, SearchSpace, admitted, bounds_of
from lunar_tune.search.space_sources import load_space
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
    *,
    model: str = "someone/else",
    variant: str = "adamw",
    method: str = "lunar",
    parameters: tuple[str, ...] = ADAMW,
    n_layers: int = 28,
) -> SearchSpace:
    made = a_method(method, variant, parameters)
    file = None if path is None else str(path)
    return load_space(file, made, model_name=model, n_layers=n_layers)


def a_method(name: str, variant: str, parameters: tuple[str, ...], *optional: str) -> Any:
    """Return what a space asks of a method."""
    facts = {"name": name, "variant": variant, "parameters": parameters}
    return SimpleNamespace(**facts, optional_parameters=optional)


def written(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(folder: Path, text: str, **options: Any) -> str:
    with pytest.raises(SearchSpaceError) as caught:
        load(written(folder, text), **options)
    return str(caught.value)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_model_of_the_catalogue_and_every_depth_has_a_space(solver: str) -> None:
    parameters = LunarMethod(LunarSettings(solver=solver)).parameters
    models = {model: entry.n_layers for model, entry in CATALOG.items()}
    for model, n_layers in [*models.items(), *(("someone/else", n) for n in range(2, 101))]:
        space = load(None, model=model, variant=solver, parameters=parameters, n_layers=n_layers)
        assert tuple(space.parameters) == parameters
        low, high = (0, n_layers - 1) if model == TINY else _depth_bounds(n_layers)
        assert bounds_of(space.parameters["layer"]) == (low, high)
        assert 0 <= low <= high <= n_layers - 1
        assert space.starting_points
        for point in space.starting_points:
            space.check(point)
    assert space.origin == "default by depth (100 blocks)"


def _depth_bounds(n_layers: int) -> tuple[int, int]:
    """0.3 and 0.9 of the way from the first block to the last, as the shipped files say."""
    return round(0.3 * (n_layers - 1)), round(0.9 * (n_layers - 1))


def test_known_settings_of_public_code_are_tried_first() -> None:
    settings = {"llama2-7b": (22, 0.01), "llama3-8b": (22, 0.005), "gemma-7b": (18, 0.01)}
    for model, (layer, rate) in settings.items():
        (first, *_) = load(None, model=model, n_layers=CATALOG[model].n_layers).starting_points
        assert first == {"layer": layer, "coefficient": 2.0, "learning_rate": rate}
    # The default scales the published layer, 22 of 32 blocks.
    assert [point["layer"] for point in load(None, n_layers=32).starting_points] == [22, 16]
    assert "default" in shipped_spaces()
    assert {*shipped_spaces()} - {"default"} <= {*CATALOG}


def test_a_method_that_no_shipped_space_knows_begins_where_one_with_its_parameters_begins() -> None:
    options: dict[str, Any] = {"variant": "lora", "parameters": ("learning_rate",)}
    new, known = (load(None, method=method, **options) for method in ("new", "ga"))
    assert (new.parameters, new.starting_points) == (known.parameters, known.starting_points)
    with pytest.raises(SearchSpaceError, match="has no section new"):
        load(None, method="new", variant="lora", parameters=("temperature",))


def test_a_file_becomes_parameters_and_points(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    space = load(path)

    assert space.origin == str(path)
    described = {"layer": "10 … 24", "coefficient": "0.5 … 6"}
    described["learning_rate"] = "0.0001 … 0.03 (log)"
    assert dict(space.describe()) == described
    (point,) = space.starting_points
    assert point == {"layer": 18, "coefficient": 2.0, "learning_rate": 0.01}
    assert isinstance(point["coefficient"], float)
    assert pickle.loads(pickle.dumps(space)) == space
    plain = space.to_dict()
    section = {key: plain[key] for key in ("parameters", "starting_points")}
    assert load(written(tmp_path, write_yaml({"lunar": {"adamw": section}}))) == space
    text = GOOD.partition("    starting_points")[0]
    assert load(written(tmp_path, text)).starting_points == ()


def test_a_shipped_name_and_a_path_are_both_understood(tmp_path: Path) -> None:
    assert bounds_of(load("tiny", n_layers=4).parameters["layer"]) == (0, 3)
    assert bounds_of(load(written(tmp_path, GOOD)).parameters["layer"]) == (10, 24)
    with pytest.raises(SearchSpaceError, match=r"--space tniy: .*Did you mean 'tiny'\?.*default"):
        load("tniy")
    with pytest.raises(SearchSpaceError, match="cannot be looked at"):
        load("x" * 5000)
    with pytest.raises(SearchSpaceError, match="Is a directory"):
        load(tmp_path)


def test_every_kind_becomes_its_distribution(tmp_path: Path) -> None:
    text = """
    m:
      v:
        parameters:
          layer: {type: depth, low: 0, high: 1}
          f: {type: float, low: -1, high: 1}
          c: {type: choice, values: [1e-4, 1, 2.5]}
          x: {type: fixed, value: 20}
          y: {type: fixed, value: 1e-4}
        starting_points:
          - {layer: 0.5, f: 0, c: 1.0, x: 20, y: 0.0001}
    """
    names = ("layer", "f", "c", "x", "y")
    space = load(written(tmp_path, text), method="m", variant="v", parameters=names, n_layers=5)

    assert space.parameters == {
        "layer": IntDistribution(0, 4),
        "f": FloatDistribution(-1.0, 1.0),
        "c": CategoricalDistribution((1e-4, 1, 2.5)),
        "x": IntDistribution(20, 20),
        "y": FloatDistribution(1e-4, 1e-4),
    }
    assert space.starting_points == ({"layer": 2, "f": 0.0, "c": 1, "x": 20, "y": 1e-4},)
    assert dict(space.describe())["c"] == "0.0001, 1, 2.5"
    assert dict(space.describe())["x"] == "20 (fixed)"


def test_equal_bounds_are_a_fixed_value_and_whole_numbers_may_have_a_point(tmp_path: Path) -> None:
    text = GOOD.replace("low: 0.5, high: 6.0", "low: 2, high: 2")
    space = load(written(tmp_path, text.replace("layer: 18", "layer: 18.0")))
    assert dict(space.describe())["coefficient"] == "2 (fixed)"
    assert space.to_dict()["parameters"]["coefficient"] == {"type": "fixed", "value": 2.0}
    assert repr(space.starting_points[0]["layer"]) == "18"


BAD_PARAMETERS = [
    ("layer: {type: int, low: 24, high: 10}", "layer: `low <= high` must hold, but got (low=24"),
    ("layer: {type: int, low: 10.0, high: 24}", "layer.low: is 10.0; it should be a valid int"),
    ("layer: {type: int, low: 10, high: 28}", "layer: holds 10 … 28; the model has blocks 0 to 27"),
    ("layer: {type: choice, values: [3, 40]}", "layer: holds 3, 40; the model has blocks 0 to 27"),
    ("layer: {type: choice, values: [3, 4.5, 6]}", "layer: holds 3, 4.5, 6; layers are whole"),
    ("layer: {type: fixed, value: 99}", "layer: holds 99 (fixed); the model has blocks 0 to 27"),
    ("layer: {type: float, low: 1, high: 3}", "layers are whole numbers, use type int"),
    ("layer: {type: depth, low: 0.3, high: 24}", "layer.high: is 24; it should be less than"),
    ("layer: {type: depth, low: 0.9, high: 0.3}", "layer: `low <= high` must hold"),
    ("coefficient: {type: depth, low: 0, high: 1}", "There are: int, float, choice, fixed."),
    ("coefficient: {type: float, low: half, high: 6}", "is the text 'half'; a number is needed"),
    ("coefficient: {type: float, low: .nan, high: 6}", "low: is nan; a finite number is needed"),
    ("coefficient: {type: float, low: 0, high: .inf}", "high: is inf; a finite number is needed"),
    ("coefficient: {type: float, low: true, high: 6}", "low: is true; a number is needed"),
    ("coefficient: {type: float, low: 0.5}", "coefficient.high: is missing"),
    ("coefficient: {type: float, low: 0, high: 6, logs: true}", "Did you mean 'log'?"),
    ("coefficient: {type: flaot, low: 0, high: 6}", "is the text 'flaot'. Did you mean 'float'?"),
    ("coefficient: {low: 0, high: 6}", "coefficient.type: is empty. There are: int, float"),
    ("coefficient: {type: [float], low: 0}", "coefficient.type: is ['float']"),
    ("coefficient: 2.0", "coefficient: is 2.0; write {type: …}; for one value {type: fixed"),
    ("coefficient:", "coefficient: is empty; write {type: …}"),
    ("coefficient: {type: choice, values: []}", "values: is []; List should have at least 1 item"),
    ("coefficient: {type: choice, values: 3}", "values: is 3; it should be a valid list"),
    ("coefficient: {type: choice, values: [1, 1.0]}", "values [1, 1.0] repeat one; write each"),
    ("coefficient: {type: choice, values: [1, x]}", "values[1]: is the text 'x'; a number is"),
    ("coefficient: {type: fixed, value: x}", "value: is the text 'x'; a number is needed"),
    ("learning_rate: {type: float, low: 0, high: 1, log: true}", "`low > 0` must hold for `log"),
    ("learning_rate: {type: float, low: 1e-4, high: 1, log: yes}", "log: is the text 'yes'; it"),
    ("learning_rate: {type: fixed, value: -1}", "learning_rate must be more than 0"),
]


@pytest.mark.parametrize(("line", "fragment"), BAD_PARAMETERS)
def test_a_bad_parameter_is_named_with_file_and_key(
    tmp_path: Path, line: str, fragment: str
) -> None:
    name = line.partition(":")[0]
    lines = [f"      {line}" if f" {name}: {{type" in one else one for one in GOOD.splitlines()]
    message = message_of(tmp_path, "\n".join(lines[:-2]))
    assert f"{tmp_path / 'space.yaml'}: lunar.adamw.parameters.{name}" in message
    assert fragment in message
    assert "things are wrong" not in message


BAD_POINTS = [
    ("1", "starting_points[1]: is 1; write {layer: …, coefficient: …, learning_rate: …}"),
    ("{layer: 18, coefficient: 2}", "starting_points[1].learning_rate: is missing"),
    ("{layer: 18, coefficient: 2, learning_rate: 0.01, ridge: 1}", "[1].ridge: is unknown"),
    ("{layer: 9, coefficient: 2, learning_rate: 0.01}", "[1].layer: is 9, outside 10 … 24"),
    ("{layer: 0.65, coefficient: 2, learning_rate: 0.01}", "[1].layer: is 0.65; a whole number"),
    ("{layer: 18, coefficient: '2', learning_rate: 0.01}", "is the text '2'; a number is needed"),
    ("{layer: 18, coefficient: .nan, learning_rate: 0.01}", "is nan; a finite number is needed"),
    ("{layer: 18, coefficient: 2, learning_rate: 0.031}", "is 0.031, outside 0.0001 … 0.03"),
]


@pytest.mark.parametrize(("point", "fragment"), BAD_POINTS)
def test_a_bad_starting_point_is_named(tmp_path: Path, point: str, fragment: str) -> None:
    assert fragment in message_of(tmp_path, f"{GOOD}      - {point}\n")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("other: {adamw: {}}", "has no section lunar.adamw. Did you mean 'other.adamw'?"),
        ("lunar:", "lunar: is empty; a section for each variant is needed"),
        ("lunar: {adamw: }", "lunar.adamw: is empty; it needs parameters and starting_points"),
        ("lunar: {adamw: {parameters: }}", "lunar.adamw.parameters: is empty; write each"),
        ("lunar: {adamw: {parameters: {}}}", "lunar.adamw.parameters: is {}; write each"),
        (GOOD.replace("starting_", "start_"), "lunar.adamw.start_points: is unknown. Did you mean"),
        (GOOD + "    more: 1\n", "lunar.adamw.more: is unknown"),
        (GOOD.partition("      - ")[0], "starting_points: is empty; a list is needed, [] for none"),
        (GOOD.replace("learning_rate", "ridge"), "parameters.learning_rate: is missing; a trial"),
        (GOOD.replace("learning_rate", "ridge"), "parameters.ridge: is unknown to the method."),
        (GOOD + GOOD, 'found duplicate key "lunar"'),
        (
            GOOD.replace("{type: int, low: 10, high: 24}", "{type: depth, low: 0.3, high: 0.9}"),
            "[0].layer: is 18, outside 0.3 … 0.9",
        ),
    ],
)
def test_a_bad_section_is_named(tmp_path: Path, text: str, fragment: str) -> None:
    assert fragment in message_of(tmp_path, text)


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


NUMBERS = st.integers(-99, 99) | st.floats(-1e6, 1e6)
WHOLE, REAL = st.integers(-99, 99), st.floats(-1e6, 1e6)
RATES = st.tuples(st.floats(1e-9, 1e3), st.floats(1.001, 1e6))
KINDS = st.one_of(
    st.tuples(WHOLE, WHOLE).map(lambda ends: IntDistribution(min(ends), max(ends))),
    st.tuples(REAL, REAL).map(lambda ends: FloatDistribution(min(ends), max(ends))),
    RATES.map(lambda ends: FloatDistribution(ends[0], ends[0] * ends[1], log=True)),
    st.lists(NUMBERS, min_size=1, max_size=5, unique=True).map(CategoricalDistribution),
    NUMBERS.map(lambda value: FloatDistribution(value, value)),
)


@settings(max_examples=60, deadline=None)
@given(kinds=st.dictionaries(st.sampled_from("abcd"), KINDS, min_size=1), seed=st.integers(0, 99))
def test_whatever_optuna_samples_is_admitted(kinds: dict[str, Parameter], seed: int) -> None:
    space = SearchSpace("m", "v", kinds, (), "test")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(5):
        space.check(study.ask(dict(space.parameters)).params)


@settings(max_examples=100, deadline=None)
@given(kind=KINDS)
def test_bounds_are_admitted_and_what_lies_beyond_is_not(kind: Parameter) -> None:
    low, high = bounds_of(kind)

    assert admitted(kind, low) == low
    assert admitted(kind, high) == high
    for outside in (low - 1, high + 1):
        with pytest.raises(ValueError, match="is "):
            admitted(kind, outside)


@pytest.mark.parametrize(
    ("method", "layers"),
    [("ga", None), ("rmu", (3, 16))],  # depths .1 and .6 of 27
)
def test_a_model_whose_file_lacks_a_method_takes_it_from_the_default(
    method: str, layers: tuple[int, int] | None
) -> None:
    names = ("learning_rate",) if layers is None else ("layer", "coefficient", "learning_rate")
    options: dict[str, Any] = {"model": "qwen2.5-7b", "method": method, "parameters": names}
    text = (search_spaces_dir() / "default.yaml").read_text(encoding="utf-8")
    for variant, section in read_yaml(text)[method].items():
        space = load(None, variant=variant, **options)
        ends = section["parameters"]["learning_rate"]
        rates = bounds_of(space.parameters["learning_rate"])
        assert rates == (float(ends["low"]), float(ends["high"]))
        assert layers is None or bounds_of(space.parameters["layer"]) == layers


def test_a_space_may_search_settings_beside_the_learning_rate(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "npo:\n  lora:\n    parameters:\n"
        "      learning_rate: {type: float, low: 1e-5, high: 1e-3, log: true}\n"
        "      beta: {type: choice, values: [0.1, 0.5]}\n"
    )

    def read(optional: str) -> SearchSpace:
        made = a_method("npo", "lora", ("learning_rate",), optional)
        return load_space(str(file), made, model_name="tiny", n_layers=4)

    assert set(read("beta").parameters) == {"learning_rate", "beta"}
    with pytest.raises(SearchSpaceError, match="beta: is unknown to the method"):
        read("rank")


LEAVES = st.none() | st.booleans() | st.integers(-3, 40) | st.floats(width=16) | st.text(max_size=5)
KEYS = st.sampled_from(["type", "low", "high", "log", "step", "value", "values", "x"])
DESCRIBED = st.dictionaries(KEYS, LEAVES | st.lists(LEAVES, max_size=3), max_size=5)
TYPED = st.builds(
    lambda kind, rest: {**rest, "type": kind},
    st.sampled_from(["int", "float", "choice", "fixed", "none"]),
    DESCRIBED,
)
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | DESCRIBED, max_leaves=6)


@given(
    parameters=ANYTHING | st.fixed_dictionaries(dict.fromkeys(ADAMW, TYPED | ANYTHING)),
    points=ANYTHING | st.lists(st.dictionaries(st.sampled_from(ADAMW), LEAVES), max_size=2),
)
@settings(deadline=None)
def test_any_section_is_a_space_or_is_refused_by_file_name(parameters: Any, points: Any) -> None:
    section = {"parameters": parameters, "starting_points": points}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_text(write_yaml({"lunar": {"adamw": section}}), encoding="utf-8")
        try:
            space = load(path)
        except SearchSpaceError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 the other outcome is as good
        else:
            assert set(space.parameters) == set(ADAMW)
            assert set(space.values_of("layer")) <= set(range(28))
