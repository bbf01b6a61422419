"""MLflow's UI behind a secret address: what passes the guard, and what does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lunar_tune.tracking.address import URI_VARIABLE, default_tracking_uri
from lunar_tune.tracking.store import opened_store
from lunar_tune.tracking.ui_server import Guard, mlflow_app

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's warnings
HOST = "127.0.0.1:5000"
API = "ajax-api/2.0/mlflow"


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Return a client of an app that answers everything with its path, behind a guard."""

    def path_asked(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{request.url.path}?{request.url.query}")

    inner = Starlette(routes=[Route("/{rest:path}", path_asked, methods=["GET", "POST", "DELETE"])])
    return TestClient(Guard(inner, "s3cret"), base_url=f"http://{HOST}")


@pytest.mark.parametrize("host", [HOST, "localhost:5000", "localhost:8080", "127.0.0.1"])
def test_who_has_the_address_sees_runs_and_keeps_views(client: TestClient, host: str) -> None:
    """The token goes no further: not to MLflow, nor, as a referrer, to other sites."""
    said = {"host": host}
    seen = client.get(f"/s3cret/{API}/artifacts/list?run_id=1", headers=said)
    assert (seen.status_code, seen.text) == (200, f"/{API}/artifacts/list?run_id=1")
    assert seen.headers["referrer-policy"] == "no-referrer"
    for asked in ("", "static-files/static/js/main.js", "get-artifact?path=a%2Fb&run_uuid=1"):
        assert client.get(f"/s3cret/{asked}", headers=said).status_code == 200
    said["origin"] = f"http://{host}"  # as a page of its own says
    for asked in ("experiments/set-experiment-tag", "runs/search", "runs/set-tag"):
        assert client.post(f"/s3cret/{API}/{asked}", headers=said).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/", "/health", f"/{API}/experiments/search", "/s3cre/", "/s3cret%00/", "/%C3%A9/"],
)
def test_nothing_is_answered_without_the_token(client: TestClient, path: str) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        answer = client.request(method, path, headers={"cookie": "token=s3cret"})
        assert answer.status_code == 403
    assert client.get(f"{path}?token=s3cret").text.startswith("this is not the whole address")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:5000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost:5000@evil.example"},
        {"host": "localhost.evil.example:5000"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:5001"},
        {"origin": "null"},
    ],
)
def test_a_page_of_another_site_cannot_ask_even_with_the_token(
    client: TestClient, headers: dict[str, str]
) -> None:
    """A name that was rebound to this machine, another port of it, a frame without an origin."""
    for asked in (client.get, client.post):
        assert asked(f"/s3cret/{API}/runs/search", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}/experiments/create"),
        ("POST", f"{API}/experiments/delete"),
        ("POST", f"{API}/runs/delete"),
        ("POST", f"{API}/upload-artifact?run_uuid=1&path=a"),
        ("POST", f"{API}/gateway-proxy"),
        ("GET", f"{API}/logged-models/m-1/artifacts/files?artifact_file_path=a"),
        ("GET", f"{API}/get-trace-artifact?request_id=1"),
        ("GET", "model-versions/get-artifact?path=a&name=m&version=1"),
        ("GET", "api/2.0/mlflow-artifacts/artifacts/a"),
        ("PUT", "api/2.0/mlflow-artifacts/artifacts/a"),
        ("POST", "ajax-api/3.0/mlflow/assistant/chat"),
        ("POST", "ajax-api/3.0/jobs"),
        ("POST", "gateway/chat/mlflow/invocations"),
        ("POST", "v1/traces"),
        ("GET", "static-files"),
        ("GET", f"x/{API}/runs/get"),
        ("GET", f"{API}/runs/get/../delete"),
        ("GET", f"{API}/runs%2Fget%0A"),
        ("DELETE", f"{API}/runs/get"),
        ("OPTIONS", f"{API}/runs/get"),
    ],
)
def test_what_reads_files_writes_or_runs_code_is_not_offered(
    client: TestClient, method: str, path: str
) -> None:
    answer = client.request(method, f"/s3cret/{path}", headers={"origin": f"http://{HOST}"})
    assert answer.status_code == 403
    assert answer.text == (
        "lunar-tune compare does not offer this: start mlflow server for all of MLflow\n"
    )


@pytest.fixture(scope="module")
def mlflow(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Callable[[Path], Path]
) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """Give MLflow's app on a store, and its runs by where their artifacts lie.

    Each has a `file`, that of `own` a link to a secret one, and the whole of `linked` is a link.
    """
    from mlflow.server import constants
    from mlflow.store.artifact import artifact_repository_registry

    folder = tmp_path_factory.mktemp("ui").resolve()
    root = folder / "mlartifacts"
    beside, around = folder / "mlartifacts-of-others", root / ".." / "elsewhere"
    uri, runs = default_tracking_uri(folder), {}
    empty_store(folder / "mlflow.db")
    with opened_store(uri) as client:
        for place in (root / "own", root / "linked", beside, around, folder / "secret"):
            experiment = client.create_experiment(place.name, artifact_location=str(place))
            run = client.create_run(experiment).info.run_id
            runs[place.name], artifacts = run, place / run / "artifacts"
            artifacts.mkdir(parents=True)
            (artifacts / "file").write_text("own" if place.name == "own" else "a secret")
    own, secret = (root / "own" / runs["own"] / "artifacts", artifacts)
    (own / "link").symlink_to(secret / "file")
    (own / "folder").symlink_to(secret)
    shutil.rmtree(linked := root / "linked" / runs["linked"] / "artifacts")
    linked.symlink_to(secret)
    registered = artifact_repository_registry._artifact_repository_registry
    known = registered.get_registered_artifact_repositories()
    with pytest.MonkeyPatch.context() as changes:
        changes.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        changes.setenv(URI_VARIABLE, "")  # which MLflow's server sets; a search heeds it
        changes.delenv(URI_VARIABLE)
        changes.setattr("mlflow.server.handlers._tracking_store", None)
        for scheme in ("", "file"):
            changes.setitem(known, scheme, known[scheme])
        for name in (constants.BACKEND_STORE_URI_ENV_VAR, constants.ARTIFACT_ROOT_ENV_VAR):
            changes.setenv(name, "")
        yield TestClient(mlflow_app(uri, root), base_url=f"http://{HOST}"), runs


@pytest.mark.parametrize(
    ("place", "path"),
    [
        *(("own", "link"), ("own", "folder/file"), ("linked", "file"), ("secret", "file")),
        *(("mlartifacts-of-others", "file"), ("elsewhere", "file")),
    ],
)
def test_artifacts_are_shown_from_the_stores_own_folder_alone(
    mlflow: tuple[TestClient, dict[str, str]], place: str, path: str
) -> None:
    client, runs = mlflow
    own = client.get(f"/get-artifact?path=file&run_uuid={runs['own']}")
    assert (own.status_code, own.text) == (200, "own")
    answer = client.get(f"/get-artifact?path={path}&run_uuid={runs[place]}")
    assert answer.status_code == 403
    assert "only files below" in answer.text
    folder = f"run_id={runs[place]}&path={'folder' if place == 'own' else ''}"
    assert client.get(f"/{API}/artifacts/list?{folder}").status_code == 403
    given = f'runId: "{runs[place]}"' + ' path: "folder"' * (place == "own")
    query = f"{{mlflowListArtifacts(input: {{{given}}}) {{files {{path}}}}}}"
    said = client.post("/graphql", json={"query": query, "operationName": None}).text
    assert "only files below" in said, said
