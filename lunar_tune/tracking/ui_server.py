"""MLflow's UI behind an address that nobody can guess: what `tracking.ui` runs as a process.

http://127.0.0.1:PORT/TOKEN/#/experiments/…

Whoever has the address sees runs and may keep views, nothing else: MLflow's server also reads and
writes files, deletes, and calls other services. Unlike a cookie, a path is told to no other port
of this machine, whose server another user may run.
"""

from __future__ import annotations

import hmac
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STORE, ROOT, TOKEN = "LUNAR_TUNE_UI_STORE", "LUNAR_TUNE_UI_ROOT", "LUNAR_TUNE_UI_TOKEN"
"""What the process is told in its environment, which other users cannot read: the store's URI, the
folder of its artifacts, and the token."""
NO_FILES = (
    "answers that lie in files are shown of a sqlite store alone: start mlflow server for this one"
)
"""What is said of a store in another database, whose folder of artifacts is `os.devnull`."""
_API = "(?:ajax-)?api/[23].0/mlflow"
_OFFERED = {  # what its pages ask for; the proxy has no target, since no variable names one
    "GET": rf"|health|version|static-files/.+|get-artifact|{_API}/(?:"
    "server-info|ui-telemetry|artifacts/list|experiments/(?:get|get-by-name|search)|runs/get|"
    "metrics/get-history(?:-bulk|-bulk-interval)?|model-versions/search|gateway-proxy)",
    "POST": rf"graphql|{_API}/(?:experiments/(?:search|search-datasets|set-experiment-tag)|"
    "runs/(?:search|set-tag|delete-tag)|(?:datasets|logged-models|traces)/search)",
}
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::[0-9]+)?", re.IGNORECASE)
_ANSWERS = {
    "host": "this is reached as 127.0.0.1 or localhost alone, through a tunnel too (ssh -L)",
    "address": "this is not the whole address: open the one that lunar-tune compare has printed",
    "origin": "this request comes from another page",
    "offer": "lunar-tune compare does not offer this: start mlflow server for all of MLflow",
}


class Guard:
    """Lets requests through to an app that name the token, and ask for what is offered."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with status 403 and a line that says why."""
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        _, given, rest = [*scope["path"].split("/", 2), "", ""][:3]
        problem = None
        # A page of another site may have told its name to be this machine's. The port may be that
        # of a tunnel to another machine.
        if _HOST.fullmatch(host) is None:
            problem = "host"
        elif not hmac.compare_digest(given.encode(), self._token.encode()):
            problem = "address"
        elif origin not in (None, f"http://{host}"):
            problem = "origin"
        elif re.fullmatch(_OFFERED.get(scope["method"], r"\b\B"), rest) is None:
            problem = "offer"
        if problem is not None:
            await PlainTextResponse(_ANSWERS[problem] + "\n", 403)(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["referrer-policy"] = "no-referrer"
            await send(message)

        inner = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}
        await self._app(inner, receive, answer)


def mlflow_app(store: str, root: Path) -> ASGIApp:
    """Return MLflow's app on a store; of local files it reads those below a folder alone.

    Where a file really lies counts, so no link leads out of the folder, nor does the folder itself.
    """
    import uvicorn  # noqa: F401  MLflow takes itself for a server where this is loaded
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
    from mlflow.server import constants, fastapi_app
    from mlflow.store.artifact import artifact_repository_registry as repositories
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = store
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = str(root)

    refusal = NO_FILES if str(root) == os.devnull else f"only files below {root} are shown"

    class BelowRoot(LocalArtifactRepository):
        """Reads local files."""

        def get_local_path(self, artifact_path: str) -> str:
            self.check(artifact_path)
            return str(super().get_local_path(artifact_path))

        def list_artifacts(self, path: str | None = None) -> Any:
            self.check(path or "")
            return super().list_artifacts(path)  # type: ignore[no-untyped-call]

        def check(self, path: str) -> None:
            if not Path(self.artifact_dir, path).resolve().is_relative_to(root):
                raise MlflowException(refusal, PERMISSION_DENIED)

    for scheme in ("", "file"):
        repositories._artifact_repository_registry.register(scheme, BelowRoot)
    app: ASGIApp = fastapi_app.app
    return app


def main() -> None:
    """Serve on the socket whose number is the argument, until a signal or the end of the input."""
    import uvicorn

    def leave_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    listening = socket.socket(fileno=int(sys.argv[1]))
    app = mlflow_app(os.environ[STORE], Path(os.environ[ROOT]))
    guard = Guard(app, os.environ.pop(TOKEN))
    config = uvicorn.Config(guard, access_log=False, lifespan="off", ws="none")
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
