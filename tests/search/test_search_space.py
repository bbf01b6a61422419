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
@pytest.mark.parametrize("model", CATALOG)
def test_every_catalogue_model_has_a_space_for_every_solver(model: str, solver: str) -> None:
    n_layers = CATALOG[model].n_layers
    parameters = LunarMethod(LunarSettings(solver=solver)).parameters
    space = load(None, model=model, variant=solver, parameters=parameters, n_layers=n_layers)

    assert tuple(space.parameters) == parameters
    assert space.starting_points
    for point in space.starting_points:
        space.check(point)
    expected = (0, n_layers - 1) if model == TINY else _depth_bounds(n_layers)
    assert bounds_of(space.parameters["layer"]) == expected


def _depth_bounds(n_layers: int) -> tuple[int, int]:
    """0.3 and 0.9 of the way from the first block to the last, as the shipped files say."""
    return round(0.3 * (n_layers - 1)), round(0.9 * (n_layers - 1))


def test_every_shipped_space_but_the_default_is_of_a_model_of_the_catalogue() -> None:
    assert "default" in shipped_spaces()
    assert {*shipped_spaces()} - {"default"} <= {*CATALOG}


def test_known_settings_of_public_code_are_tried_first() -> None:
    points = {
        model: load(None, model=model, n_layers=CATALOG[model].n_layers).starting_points[0]
        for model in ("llama2-7b", "llama3-8b", "gemma-7b")
    }

    assert points["llama2-7b"] == {"layer": 22, "coefficient": 2.0, "learning_rate": 0.01}
    assert points["llama3-8b"] == {"layer": 22, "coefficient": 2.0, "learning_rate": 0.005}
    assert points["gemma-7b"] == {"layer": 18, "coefficient": 2.0, "learning_rate": 0.01}


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_method_that_no_shipped_space_knows_begins_where_one_with_its_parameters_begins(
    variant: str,
) -> None:
    new, known = (
        load(None, method=method, variant=variant, parameters=("learning_rate",))
        for method in ("new", "ga")
    )
    assert (new.parameters, new.starting_points) == (known.parameters, known.starting_points)
    with pytest.raises(SearchSpaceError, match="has no section new"):
        load(None, method="new", variant=variant, parameters=("temperature",))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n_layers", range(2, 101))
def test_the_default_fits_every_depth(n_layers: int, solver: str) -> None:
    parameters = LunarMethod(LunarSettings(solver=solver)).parameters
    space = load(None, variant=solver, parameters=parameters, n_layers=n_layers)

    low, high = bounds_of(space.parameters["layer"])
    assert (low, high) == _depth_bounds(n_layers)
    assert 0 <= low <= high <= n_layers - 1
    assert space.origin == f"default by depth ({n_layers} blocks)"
    for point in space.starting_points:
        space.check(point)


def test_the_default_scales_the_published_layer_to_the_published_layer() -> None:
    layers = [point["layer"] for point in load(None, n_layers=32).starting_points]

    assert layers == [22, 16]  # what public code uses on models of 32 blocks


def test_a_file_becomes_parameters_and_points(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    space = load(path)

    assert space.origin == str(path)
    assert space.describe() == [
        ("layer", "10 … 24"),
        ("coefficient", "0.5 … 6"),
        ("learning_rate", "0.0001 … 0.03 (log)"),
    ]
    (point,) = space.starting_points
    assert point == {"layer": 18, "coefficient": 2.0, "learning_rate": 0.01}
    assert isinstance(point["coefficient"], float)
    assert pickle.loads(pickle.dumps(space)) == space


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
    text = GOOD.replace("low: 0.5, high: 6.0", "low: 2, high: 2").replace(
        "layer: 18", "layer: 18.0"
    )
    space = load(written(tmp_path, text))

    assert dict(space.describe())["coefficient"] == "2 (fixed)"
    assert space.to_dict()["parameters"]["coefficient"] == {"type": "fixed", "value": 2.0}
    assert repr(space.starting_points[0]["layer"]) == "18"


def test_the_dictionary_reads_back_as_the_same_space(tmp_path: Path) -> None:
    space = load(written(tmp_path, GOOD))
    plain = space.to_dict()
    section = {key: plain[key] for key in ("parameters", "starting_points")}
    again = load(written(tmp_path, write_yaml({"lunar": {"adamw": section}})))

    assert again == space


BAD_PARAMETERS = [
    (
        "layer: {type: int, low: 24, high: 10}",
        "layer: `low <= high` must hold, but got (low=24, high=10)",
    ),
    ("layer: {type: int, low: 10.0, high: 24}", "layer.low: is 10.0; it should be a valid integer"),
    ("layer: {type: int, low: 10, high: 28}", "layer: holds 10 … 28; the model has blocks 0 to 27"),
    ("layer: {type: choice, values: [3, 40]}", "layer: holds 3, 40; the model has blocks 0 to 27"),
    ("layer: {type: choice, values: [3, 4.5, 6]}", "layer: holds 3, 4.5, 6; layers are whole"),
    ("layer: {type: fixed, value: 99}", "layer: holds 99 (fixed); the model has blocks 0 to 27"),
    ("layer: {type: int, low: -1, high: 3}", "layer: holds -1 … 3; the model has blocks 0 to 27"),
    ("layer: {type: float, low: 1, high: 3}", "layers are whole numbers, use type int"),
    (
        "layer: {type: depth, low: 0.3, high: 24}",
        "layer.high: is 24; it should be less than",
    ),
    ("layer: {type: depth, low: 0.9, high: 0.3}", "layer: `low <= high` must hold"),
    (
        "coefficient: {type: depth, low: 0, high: 1}",
        "is the text 'depth'. There are: int, float, choice, fixed.",
    ),
    (
        'coefficient: {type: float, low: "0.5", high: 6}',
        "is the text '0.5'; a number is needed",
    ),
    ("coefficient: {type: float, low: half, high: 6}", "is the text 'half'; a number is needed"),
    ("coefficient: {type: float, low: .nan, high: 6}", "low: is nan; a finite number is needed"),
    ("coefficient: {type: float, low: 0, high: .inf}", "high: is inf; a finite number is needed"),
    ("coefficient: {type: float, low: true, high: 6}", "low: is true; a number is needed"),
    ("coefficient: {type: float, low: 0.5}", "coefficient.high: is missing"),
    (
        "coefficient: {type: float, low: 0, high: 6, logs: true}",
        "coefficient.logs: is unknown. Did you mean 'log'?",
    ),
    ("coefficient: {type: flaot, low: 0, high: 6}", "is the text 'flaot'. Did you mean 'float'?"),
    ("coefficient: {low: 0, high: 6}", "coefficient.type: is empty. There are: int, float"),
    ("coefficient: {type: [float], low: 0}", "coefficient.type: is ['float']"),
    ("coefficient: 2.0", "coefficient: is 2.0; write {type: …}; for one value {type: fixed"),
    ("coefficient:", "coefficient: is empty; write {type: …}"),
    ("coefficient: {type: choice, values: []}", "values: is []; List should have at least 1 item"),
    ("coefficient: {type: choice, values: 3}", "values: is 3; it should be a valid list"),
    (
        "coefficient: {type: choice, values: [1, 1.0]}",
        "values [1, 1.0] repeat one; write each once",
    ),
    (
        'coefficient: {type: choice, values: [1, "2"]}',
        "values[1]: is the text '2'; a number is needed",
    ),
    ("coefficient: {type: fixed, value: x}", "value: is the text 'x'; a number is needed"),
    (
        "learning_rate: {type: float, low: 0, high: 1, log: true}",
        "`low > 0` must hold for `log=True`",
    ),
    (
        "learning_rate: {type: float, low: 1e-4, high: 1, log: yes}",
        "log: is the text 'yes'; it",
    ),
    ("learning_rate: {type: float, low: 0, high: 1}", "learning_rate must be more than 0"),
    (
        "learning_rate: {type: fixed, value: -1}",
        "holds -1 (fixed); learning_rate must be more than 0",
    ),
]


@pytest.mark.parametrize(("line", "fragment"), BAD_PARAMETERS)
def test_a_bad_parameter_is_named_with_file_and_key(
    tmp_path: Path, line: str, fragment: str
) -> None:
    name = line.partition(":")[0]
    kept = [
        text.strip()
        for text in GOOD.splitlines()
        if "{type" in text and not text.strip().startswith(name)
    ]
    body = "\n".join(f"      {text}" for text in [line, *kept])
    message = message_of(tmp_path, f"lunar:\n  adamw:\n    parameters:\n{body}\n")

    assert str(tmp_path / "space.yaml") in message
    assert f"lunar.adamw.parameters.{name}" in message
    assert fragment in message
    assert "things are wrong" not in message


BAD_POINTS = [
    ("[1]", "starting_points[1]: is 1; write {layer: …, coefficient: …, learning_rate: …}"),
    ("{layer: 18, coefficient: 2}", "starting_points[1].learning_rate: is missing"),
    ("{layer: 18, coefficient: 2, learning_rate: 0.01, ridge: 1}", "[1].ridge: is unknown"),
    ("{layer: 9, coefficient: 2, learning_rate: 0.01}", "[1].layer: is 9, outside 10 … 24"),
    ("{layer: 0.65, coefficient: 2, learning_rate: 0.01}", "[1].layer: is 0.65; a whole number"),
    (
        "{layer: 18, coefficient: '2', learning_rate: 0.01}",
        "is the text '2'; a number is needed",
    ),
    ("{layer: 18, coefficient: .nan, learning_rate: 0.01}", "is nan; a finite number is needed"),
    (
        "{layer: 18, coefficient: 2, learning_rate: 0.0300001}",
        "is 0.0300001, outside 0.0001 … 0.03",
    ),
]


@pytest.mark.parametrize(("point", "fragment"), BAD_POINTS)
def test_a_bad_starting_point_is_named(tmp_path: Path, point: str, fragment: str) -> None:
    point = point.removeprefix("[").removesuffix("]")

    assert fragment in message_of(tmp_path, f"{GOOD}      - {point}\n")


def test_a_block_number_under_depth_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("{type: int, low: 10, high: 24}", "{type: depth, low: 0.3, high: 0.9}")

    message = message_of(tmp_path, text)
    assert "[0].layer: is 18, outside 0.3 … 0.9 of the model's depth" in message


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("other: {adamw: {}}", "has no section lunar.adamw. Did you mean 'other.adamw'?"),
        (
            GOOD.replace("adamw:", "adam:"),
            "has no section lunar.adamw. Did you mean 'lunar.adam'?",
        ),
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
    ],
)
def test_a_bad_section_is_named(tmp_path: Path, text: str, fragment: str) -> None:
    assert fragment in message_of(tmp_path, text)


def test_all_mistakes_of_a_file_come_in_one_message(tmp_path: Path) -> None:
    text = """
    lunar:
      adamw:
        parameters:
          layer: {type: int, low: 10, high: 40}
          coefficient: {type: float, low: "0.5", high: 6.0}
          rate: {type: float, low: 1e-4, high: 3e-2}
        starting_points:
          - {layer: 9, coefficient: 1, rate: 1}
      closed_form:
        parameters: {ridge: {type: choice, values: [1, 1]}}
    """
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


def test_starting_points_may_be_left_out(tmp_path: Path) -> None:
    text = GOOD.partition("    starting_points")[0]

    assert load(written(tmp_path, text)).starting_points == ()


def test_values_from_elsewhere_are_checked_all_at_once(tmp_path: Path) -> None:
    space = load(written(tmp_path, GOOD))

    space.check({"layer": 10, "coefficient": 6, "learning_rate": 0.03})
    with pytest.raises(SearchSpaceError) as caught:
        space.check({"layer": True, "coefficient": float("inf"), "learn_rate": 1})
    message = str(caught.value)
    assert "layer: is true; a number is needed" in message
    assert "coefficient: is inf; a finite number is needed" in message
    assert "learning_rate: is missing" in message
    assert "learn_rate: is unknown. Did you mean 'learning_rate'?" in message


NUMBERS = st.floats(-1e6, 1e6)
KINDS = st.one_of(
    st.tuples(st.integers(-99, 99), st.integers(0, 99)).map(
        lambda pair: IntDistribution(pair[0], pair[0] + pair[1])
    ),
    st.tuples(NUMBERS, NUMBERS)
    .filter(lambda pair: pair[0] < pair[1])
    .map(lambda pair: FloatDistribution(pair[0], pair[1])),
    st.tuples(st.floats(1e-9, 1e3), st.floats(1.001, 1e6)).map(
        lambda pair: FloatDistribution(pair[0], pair[0] * pair[1], log=True)
    ),
    st.lists(st.integers(-99, 99) | NUMBERS, min_size=1, max_size=5, unique=True).map(
        lambda values: CategoricalDistribution(tuple(values))
    ),
    (st.integers(-99, 99) | NUMBERS).map(lambda value: FloatDistribution(value, value)),
)


@settings(max_examples=60, deadline=None)
@given(kinds=st.dictionaries(st.sampled_from("abcd"), KINDS, min_size=1), seed=st.integers(0, 99))
def test_whatever_optuna_samples_is_admitted(kinds: dict[str, Parameter], seed: int) -> None:
    space = SearchSpace("m", "v", kinds, (), "test")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(5):
        trial = study.ask(dict(space.parameters))
        space.check(trial.params)
        study.tell(trial, 0.0)


@settings(max_examples=100, deadline=None)
@given(kind=KINDS)
def test_bounds_are_admitted_and_what_lies_beyond_is_not(kind: Parameter) -> None:
    low, high = bounds_of(kind)

    assert admitted(kind, low) == low
    assert admitted(kind, high) == high
    for outside in (low - 1, high + 1):
        with pytest.raises(ValueError, match="is "):
            admitted(kind, outside)


@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("method", ["ga", "rmu"])
def test_a_model_whose_file_lacks_a_method_takes_it_from_the_default(
    method: str, variant: str
) -> None:
    parameters = {"ga": (), "rmu": ("layer", "coefficient")}[method]
    made = a_method(method, variant, (*parameters, "learning_rate"))
    space = load_space(None, made, model_name="qwen2.5-7b", n_layers=28)
    text = (search_spaces_dir() / "default.yaml").read_text(encoding="utf-8")
    section = read_yaml(text)[method][variant]
    low, high = bounds_of(space.parameters["learning_rate"])
    written = section["parameters"]["learning_rate"]
    assert (low, high) == (float(written["low"]), float(written["high"]))
    if method == "rmu":  # depths .1 and .6 of 27: blocks 3 and 16
        assert bounds_of(space.parameters["layer"]) == (3, 16)


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
