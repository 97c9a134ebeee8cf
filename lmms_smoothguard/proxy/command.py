"""`smoothguard proxy`: the command line."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from lmms_smoothguard.blackbox.pictures import Sight
from lmms_smoothguard.config import SmoothGuardConfig, parse_scalar
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.proxy.settings import MEGABYTE, ProxySettings

_USUAL = ProxySettings(upstream="http://engine", defense=SmoothGuardConfig(noise_space="pixel", seed=None))
_DEFENSE, _BOUNDS, _SERVER = "The defence", "Bounds", "The server"


def proxy(
    upstream: Annotated[
        str, typer.Argument(help="Address of an OpenAI-compatible engine, such as http://127.0.0.1:8000")
    ],
    seen_as: Annotated[
        str,
        typer.Option(
            rich_help_panel=_DEFENSE,
            help="How the model sees pictures, which are brought to it before the noise: pixels of the shorter side, such as 336 for "
            "LLaVA-1.5; WIDTHxHEIGHT, such as 384x384, where it squeezes them; 'keep' where it takes their own size, such as Qwen-VL.",
        ),
    ],
    num_samples: Annotated[int, typer.Option(rich_help_panel=_DEFENSE, help="N, copies asked for every answer.")] = 10,
    sigma: Annotated[float, typer.Option(rich_help_panel=_DEFENSE, help="Noise, in [0, 1] intensities.")] = 0.1,
    audio_sigma: Annotated[
        float | None,
        typer.Option(rich_help_panel=_DEFENSE, help="Noise of sounds, in amplitude; without it they are refused."),
    ] = None,
    include_clean: Annotated[bool, typer.Option(rich_help_panel=_DEFENSE, help="Copy 0 has no noise.")] = True,
    aggregator: Annotated[str, typer.Option(rich_help_panel=_DEFENSE)] = "kmeans",
    embedder: Annotated[str, typer.Option(rich_help_panel=_DEFENSE)] = "lexical",
    early_stop: Annotated[
        str, typer.Option(rich_help_panel=_DEFENSE, help="off, exact, or an error rate such as 0.01.")
    ] = "exact",
    quorum: Annotated[
        int | None, typer.Option(rich_help_panel=_DEFENSE, help="Answers that must come; more than half by default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=_DEFENSE, help="For measurements alone: known noise can be attacked.")
    ] = None,
    timeout: Annotated[float, typer.Option(rich_help_panel=_BOUNDS, help="Seconds of an attempt.")] = _USUAL.timeout,
    retries: Annotated[int, typer.Option(rich_help_panel=_BOUNDS, help="Further attempts at a copy.")] = _USUAL.retries,
    most_requests: Annotated[
        int, typer.Option(rich_help_panel=_BOUNDS, help="Requests in work; beyond them 503.")
    ] = _USUAL.most_requests,
    most_upstream: Annotated[
        int, typer.Option(rich_help_panel=_BOUNDS, help="Copies in work at the engine; others wait.")
    ] = _USUAL.most_upstream,
    most_megabytes: Annotated[
        int, typer.Option(min=1, rich_help_panel=_BOUNDS, help="Of a request.")
    ] = _USUAL.most_bytes // MEGABYTE,
    most_pixels: Annotated[
        int, typer.Option(rich_help_panel=_BOUNDS, help="Of a request's pictures together.")
    ] = _USUAL.most_pixels,
    most_pixels_in_work: Annotated[
        int, typer.Option(rich_help_panel=_BOUNDS, help="Of all requests in work; beyond them 503.")
    ] = _USUAL.most_pixels_in_work,
    most_media: Annotated[
        int, typer.Option(rich_help_panel=_BOUNDS, help="Pictures and sounds in a request.")
    ] = _USUAL.most_media,
    remote: Annotated[
        bool,
        typer.Option(
            "--remote", rich_help_panel=_BOUNDS, help="Fetch pictures by http(s), from public networks alone."
        ),
    ] = False,
    extra_field: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_BOUNDS, help="A field of requests to let through; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, rich_help_panel=_SERVER)] = 8100,
    grace: Annotated[
        int,
        typer.Option(
            min=0, rich_help_panel=_SERVER, help="Seconds that requests in work get when the server is stopped."
        ),
    ] = 30,
) -> None:
    """Serve a defended OpenAI-compatible endpoint before any engine: vLLM, SGLang, transformers, a hosted API."""
    defense = SmoothGuardConfig(
        num_samples=num_samples, sigma=sigma, noise_space="pixel", include_clean=include_clean, aggregator=aggregator,
        embedder=embedder, early_stop=parse_scalar(early_stop), seed=seed,
    )  # fmt: skip
    settings = ProxySettings(
        upstream=upstream, defense=defense, sight=Sight.parse(seen_as), audio_sigma=audio_sigma, quorum=quorum,
        timeout=timeout, retries=retries, most_requests=most_requests, most_upstream=most_upstream,
        most_bytes=most_megabytes * MEGABYTE, most_pixels=most_pixels, most_pixels_in_work=most_pixels_in_work, most_media=most_media,
        remote=remote, extra_fields=tuple(extra_field or ()),
    )  # fmt: skip
    run(settings, host, port, grace)


def _without_queries(record: logging.LogRecord) -> bool:
    """Takes the query out of a line of the access log: keys may stand there."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, version, status = record.args
        record.args = (client, method, str(path).partition("?")[0], version, status)
    return True


def run(settings: ProxySettings, host: str, port: int, grace: int) -> None:
    """Serves until it is told to stop. Raises ConfigError without the extra `proxy`."""
    try:
        import uvicorn

        from lmms_smoothguard.proxy.app import make_app
    except ImportError as error:
        raise ConfigError(f"the proxy needs {error.name}; pip install 'lmms-smoothguard[proxy]'") from error
    if settings.defense.seed is not None:
        typer.secho(
            f"seed {settings.defense.seed}: the noise is known to whoever knows it; for measurements only", fg="yellow"
        )
    logging.getLogger("uvicorn.access").addFilter(_without_queries)
    connections = 4 * settings.most_requests + 16  # open ones, whatever they send or wait for; beyond them 503
    uvicorn.run(
        make_app(settings), host=host, port=port, timeout_graceful_shutdown=grace, limit_concurrency=connections, log_level="info"
    )  # fmt: skip
