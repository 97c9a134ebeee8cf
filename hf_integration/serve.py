"""transformers' own OpenAI-compatible server, every request of it defended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from hf_integration.attached import attach
from hf_integration.calls import force
from hf_integration.protecting import hears, protect
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import ConfigError, SmoothGuardError, explain

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health", "/load_model", "/reset")
"""What is served. Others are not: `/v1/systemone` asks the model's forward about pictures, past `generate`, and nobody knows what a
later version adds."""
_BYPASSES = ("--continuous-batching", "--cb-")


def serve(model: str, defense: Choice, options: Sequence[str] = ()) -> None:
    """Runs `transformers serve MODEL OPTIONS` in this process until it is stopped, with the defence forced on.

    A request cannot switch it off, by whatever generation config it brings. Raises ConfigError where the server is missing and for
    options that bypass `generate`, SystemExit for those it does not know and when it is stopped.
    """
    for option in options:
        if option.startswith(_BYPASSES):
            raise ConfigError(
                f"{option} bypasses generate(), and with it the defence; expected none of {', '.join(_BYPASSES)}*"
            )
    try:
        import typer
        from transformers.cli.serve import Serve
        from transformers.cli.serving.server import build_server  # noqa: F401
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ConfigError(
            f"transformers' server is missing ({error}); expected a transformers that has `transformers serve`"
        ) from error
    if not is_serve_available():
        raise ConfigError("transformers' server needs more packages; pip install 'lmms-smoothguard[serve]'")
    command = typer.Typer(add_completion=False)
    command.command(name="serve")(Serve)
    with _defended(defense):
        command([model, *options])


@contextlib.contextmanager
def _defended(defense: Choice) -> Iterator[None]:
    """Forces the defence, shows it the processor of every model that is loaded, and takes routes that bypass it out."""
    from transformers.cli.serving import server
    from transformers.cli.serving.model_manager import ModelManager

    build, load = server.build_server, ModelManager.load_model_and_processor

    def build_defended(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        _keep_routes(app)
        app.add_exception_handler(SmoothGuardError, _refused)
        with contextlib.suppress(ImportError):
            from soundfile import LibsndfileError

            app.add_exception_handler(LibsndfileError, _unreadable)
        return app

    def load_attached(self: Any, *args: Any, **kwargs: Any) -> Any:
        model, processor = load(self, *args, **kwargs)
        attach(model, processor)
        if hears(processor):
            protect(processor)
        return model, processor

    force(defense)
    server.build_server, ModelManager.load_model_and_processor = build_defended, load_attached
    try:
        yield
    finally:
        server.build_server, ModelManager.load_model_and_processor = build, load
        force(None)


def _keep_routes(app: Any) -> None:
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]


async def _refused(request: Any, error: Exception) -> Any:
    return _told(explain(error), "undefendable")


async def _unreadable(request: Any, error: Exception) -> Any:
    return _told(f"a sound of the request cannot be read ({error}); expected a whole WAV or FLAC file", "unreadable")


def _told(message: str, code: str) -> Any:
    from fastapi.responses import JSONResponse

    told = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": told}, 400)
