"""Logs: structured, to stderr, one line an event; what libraries log comes out the same way.

    log = structlog.get_logger(__name__)
    log.info("endpoint attached", endpoint=str(key), ips=["10.64.0.5"], ms=2.1)

Values whose name says that they are secret are never written, nor are passwords inside URLs.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

SECRET_NAME = re.compile(r"password|passwd|secret|token|credential|authorization", re.IGNORECASE)
SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
HIDDEN = "***"


def configure(level: str, style: str) -> None:
    """Send all logs of ``level`` and above to stderr; ``style`` is ``console`` or ``json``."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        hide_secrets,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderer(style)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    # Its debug lines are one for every file descriptor event.
    logging.getLogger("asyncio").setLevel(max(number, logging.INFO))


def _renderer(style: str) -> list[structlog.typing.Processor]:
    if style == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]


def hide_secrets(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor; see the module's docstring."""
    for name, value in event.items():
        if SECRET_NAME.search(name):
            event[name] = HIDDEN
        elif isinstance(value, str) and "@" in value:
            event[name] = masked(value)
    return event


def masked(text: str) -> str:
    """``text`` without the user and password of URLs in it."""
    return SECRET_IN_URL.sub(HIDDEN, text)
