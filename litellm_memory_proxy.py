#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "litellm>=1.106.0,<2",
#   "httpx>=0.27,<1",
#   "pyyaml>=6.0",
#   "backoff",
#   "fastapi",
#   "mcp",
#   "orjson",
#   "redis",
#   "soundfile",
# ]
# # The last six are LiteLLM's: its SDK imports them without asking for them (see LITELLM_UNDECLARED).
# ///
"""A local proxy that gives every AI client a memory of its own.

It stands between AI clients (PyCharm AI Assistant, Claude Code, VS Code, Codex, scripts) and the models, tells
the clients apart by their request headers, and sends each one's memory id on as ``x-sm-user-id``, so that a memory
service in front of the model keeps one isolated memory per client.

    python litellm_memory_proxy.py --mode sdk       LiteLLM's SDK in this process, cookies kept
    python litellm_memory_proxy.py --mode binary    raw forwarding to the LiteLLM proxy server
    python litellm_memory_proxy.py --mode both      the two side by side, on two ports

The way of one request, downwards and back (no room calls back up):

    client ──► HTTP front ──► application ──► sdk backend ──► asyncio bridge ──► LiteLLM ──► session ──► provider
               one thread     authenticate,   params, frames   one loop, one                 cookies
               a connection   route, record      │ failover    thread
                                         └──► binary backend ──► LiteLLM server (our child, or elsewhere) ──► provider
                                              pooled sockets, bytes in, bytes out

Which thread does what: each client connection has a handler thread that reads the request, waits, and writes the
answer. In sdk mode the one loop thread runs every LiteLLM call; a handler thread waits on a queue for what it sends,
and while it waits the loop thread writes what a stream goes on with, as far as that never blocks.
In binary mode the handler thread does the forwarding itself. One more thread watches over the LiteLLM server, and one
counts and logs the requests that have ended. The main thread waits for signals: it stops the program, or reads the
config again and replaces what serves.

The rooms, bottom up; each uses only those above it in this list:

    constants · errors · configuration · memory routing · logs and metrics · circuit breaker · wire ·
    asyncio bridge · session · sdk backend · binary backend · failover · application · HTTP front ·
    program · load · parity · command line

POSIX only (Linux, macOS, WSL). Meant for loopback and small trusted networks: it is no edge server.
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import signal
import sys
import tempfile


def start_over() -> None:
    """Let this process begin anew with what Python has compiled of this script; returns where that is not to be.

    Of a script Python keeps the syntax tree for as long as it runs: 18 of a binary front's 45 MB. The process id,
    Python's options, the environment and the end of the command line stay. It comes before the imports, whose 0.1 s
    would be spent twice; for --help, which is short, it would not pay.

    Only where Python was started with this file: who calls it (a debugger, coverage, runpy, `COMPILED`) has a frame of
    its own.
    """
    options, script = sys.orig_argv[1 : -len(sys.argv)], sys._getframe(1)
    called = script.f_back or sys.orig_argv[1:] != [*options, *sys.argv]
    if called or {"-h", "--help"} & set(sys.argv):
        return
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as code:
        marshal.dump(script.f_code, code)
        code.seek(0)
        kept = fcntl.fcntl(code, fcntl.F_DUPFD, 3)  # over the exec, and beside 0 to 2, one of which may be closed
        ours = [COMPILED, str(kept), sys.path[0], __file__]
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # so that Ctrl-C shows no traceback of Python's start
        os.execv(sys.executable, [sys.executable, *options, "-c", *ours, *sys.argv])


COMPILED = (
    "import marshal, sys; _, code, sys.path[0], __file__, *sys.argv = sys.argv; "
    "code = open(int(code), 'rb'); script = marshal.load(code); code.close(); exec(script)"
)

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it waits until `Signals` can see to it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C shows no traceback of what is being loaded
    start_over()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

import argparse
import enum
import errno
import fnmatch
import gc
import hmac
import http.client
import http.server
import io
import ipaddress
import json
import logging
import math
import random
import re
import resource
import select
import shutil
import socket
import socketserver
import ssl
import stat
import string
import struct
import subprocess
import threading
import time
import warnings
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, chain, groupby
from logging.handlers import RotatingFileHandler
from operator import attrgetter
from pathlib import Path
from queue import SimpleQueue
from traceback import walk_tb
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit
from weakref import WeakSet

import yaml

if TYPE_CHECKING:  # both are imported where they are used: binary mode stays small and starts at once
    import asyncio
    from concurrent.futures import Future

    import httpx

# ── constants ────────────────────────────────────────────────────────────────────────────────────────────────────
# Each with its unit and the reason for its value. What a user may want to change is in config.yaml instead.

DEFAULT_PORT = 8764
DEFAULT_SDK_PORT = 8765  # the sdk front under --mode both
DEFAULT_LITELLM_PORT = 4000  # LiteLLM's own default

MAX_HEAD_BYTES = 64 * 1024  # request line and header section; nginx allows 32 KiB, Node 16 KiB: cookies grow
MAX_HEADER_FIELDS = 200  # http.client and gunicorn stop at 100; gateways in front of us add their own
MAX_BODY_BYTES = 64 * 1024 * 1024  # a 1M-token prompt with pictures is about 30 MB
MAX_MEMBERS = 10_000  # of a compressed body; bgzip makes one of each 64 KiB, an attacker one of each 20 bytes
MAX_FORM_PARTS = 1000  # Starlette, under LiteLLM's server, takes as many; a transcription has a dozen fields
MAX_PART_HEAD_BYTES = 4 * 1024  # of a part of a form; a file name of 255 bytes takes 765 where each is %-encoded
MAX_CONNECTIONS = 1024  # one thread each; `allow_open_files` sees to their sockets
SPARE_FILES = 256  # open files besides the connections of clients, and one to LiteLLM's server for each
RECEIVE_BYTES = 64 * 1024  # one recv: the default socket buffer of Linux gives no more in one go

HEAD_SECONDS = 30.0  # from the first byte of a request head to its last
BODY_SECONDS = 60.0  # between two reads of a request body; nginx's client_body_timeout
IDLE_SECONDS = 75.0  # keep-alive between two requests; nginx's keepalive_timeout
SEND_SECONDS = 300.0  # between two writes that a slow client accepts: a stream paused for a coffee goes on
ACCEPT_SECONDS = 0.1  # between two looks of the accepting thread at whether to stop
LINGER_SECONDS = 2.0  # how long a refused client may go on sending before its connection is dropped (RFC 9112 §9.6)
MAX_REFUSED = 64  # connections at once that are one too many, and may do so
DRAIN_SECONDS = 30.0  # how long requests in flight may take to end once the program was told to stop
AGAIN_SECONDS = 0.5  # a Ctrl-C this long after the first ends them; one sooner is the same, handed on by a wrapper
LAST_CALL_SECONDS = 0.25  # after an answer, at a stop, for the next request of a client that was not told of the stop
TAKEN_SECONDS = 0.05  # within which a thread that has read a request gets to say so: longer than it waits for its turn
CONTINUE_SECONDS = 1.0  # wait for the server's 100 (Continue) before the body is sent anyway (RFC 9110 §10.1.1)

REQUEST_SECONDS = 600.0  # an answer of a model: the OpenAI and Anthropic SDKs' own default
CONNECT_SECONDS = 10.0  # a TCP connection to the LiteLLM server
LITELLM_RETRIES = 2  # LiteLLM's default number of retries, each with the whole request timeout

STREAM_HIGH_BYTES = 256 * 1024  # a stream that is this far ahead of its client is held back ...
STREAM_LOW_BYTES = 64 * 1024  # ... until the client has caught up to here
HOLD_SECONDS = 10.0  # a stream of mere signs of life is held back; a connection cut at its start is cut before that
WRITE_BYTES = 64 * 1024  # so much of a stream that lies ready goes out in one send
TURN_SECONDS = 0.005  # after which a stream that has more ready lets the others have their turn

TALKING_SECONDS = 0.5  # between two looks at a client whose next request already waits
STALE_SECONDS = 0.5  # a pooled connection that closes this soon after a request had been closed before it
SOON_SECONDS = 0.05  # the server's answer is waited for alone so long, and then along with the client's going away
REMEMBERED_HEADS = 128  # what follows from a request head is worked out once: a client repeats it but for the length

POOL_IDLE_SECONDS = 4.0  # uvicorn, under LiteLLM's server, closes idle connections after 5 s
POOL_SIZE = 256  # idle connections kept to the LiteLLM server

FAILURE_THRESHOLD = 5  # failures of the SDK's side in a row that open the circuit breaker
RESET_SECONDS = 30.0  # before an open circuit breaker lets one request try again
WATCH_SECONDS = 0.5  # between two looks at the files under --watch, and at a switch that is under way
PROBE_SECONDS = 1.0  # between two looks at a LiteLLM server that could not be reached
GLANCE_SECONDS = 0.05  # /health waits this long for a look at such a server: it is to answer within 0.1 s

LAST_WORDS = 40  # lines of the LiteLLM server's output that are shown when it dies
CHILD_READY_SECONDS = 180.0  # LiteLLM's server takes 8 to 30 s; a cold laptop disk several times that
CHILD_STOP_SECONDS = 10.0  # between SIGTERM and SIGKILL
CHILD_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before each restart; the last one repeats
CHILD_STABLE_SECONDS = 60.0  # a child that ran this long starts again with the first pause
RETRY_AFTER_SECONDS = 5  # what a client is told to wait while the LiteLLM server is down

MAX_LOGGED = 500  # characters of a path in a log line, or of an example in load's table
MAX_MESSAGE = 20_000  # characters of an error message
MAX_KEPT_BYTES = 5 * MAX_MESSAGE  # of an error's body that comes in pieces: more than is shown, which `Redactor` cuts
MAX_KEY = 2000  # characters of a key that is known by its shape alone
MAX_LABELS = 100  # distinct memory ids or models in the metrics; the rest is "other"
MAX_DURATIONS = 10_000  # kept for the percentiles of the last ...
WINDOW_SECONDS = 600.0
LOG_FILE_BYTES = 10 * 1024 * 1024  # of --log-file, before it is rotated ...
LOG_FILES = 5  # ... to one of this many older ones
MAX_LOG_LINES = 10_000  # waiting to be written
LOG_PAUSE_SECONDS = 0.02  # between two writes: nobody sees it, and under load one write takes many lines
LOG_FLUSH_SECONDS = 1.0  # at the end, for whoever reads our output
PROGRESS_SECONDS = 2.0  # between two lines that say how far something is
MAX_MODEL = 200  # characters of a model's name in log and metrics
MAX_MODEL_NAME = 2048  # the most that an ARN of AWS has; LiteLLM takes 4 s over one of a megabyte, and remembers it
MAX_COST = 1e6  # US dollars of one call; a larger figure is none
MAX_TOKENS = 10**12  # of one call; a larger figure is none
SETTLED_AT_ONCE = 200  # requests that have ended and are not counted yet; some two milliseconds
# A thread may hold the interpreter for so long beside the SDK's loop: at 200 streams /health waits a fifth of what it
# does with the default of 0.005. Forwarding alone keeps the default: with less, 16 clients get a third fewer answers.
SWITCH_SECONDS = 0.001
# When the garbage collector looks: at young objects as usual, at all of them seldom. With Python's own 700, 10, 10 it
# went through all of 500 running streams 11 times in 35 s, 0.1 to 0.4 s each; with more than 700, what LiteLLM leaves
# behind of a stream lies about for longer, its conversation included.
COLLECT_AFTER = (700, 10, 300)
OWN = "own"  # the backend, in log and metrics, of the endpoints that are our own
NONE = "-"  # stands there for a memory id or a model where there is none

# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────
# One family of errors, each with its HTTP status, and the shapes they take in the dialects. Nothing here knows
# sockets or imports litellm: LiteLLM's exceptions are known by the names of their classes.

OPENAI, RESPONSES, ANTHROPIC, OLLAMA = "openai", "responses", "anthropic", "ollama"
DIALECTS = {"messages": ANTHROPIC, "responses": RESPONSES}  # the first part of a path → its dialect, if not OpenAI's
SHARED_PATHS = ("models", "files", "skills")  # OpenAI and Anthropic have them both

# Status → error type (https://docs.anthropic.com/en/api/errors; OpenAI's types, as its API sends them).
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OPENAI_TYPES = {status: ANTHROPIC_TYPES[status] for status in (401, 403, 408, 429, 504)}

# LiteLLM exception class → status. Most are not here: each has the status of its nearest base class that is.
LITELLM_STATUS = {
    "AuthenticationError": 401,
    "PermissionDeniedError": 403,
    "NotFoundError": 404,
    "Timeout": 504,  # LiteLLM says 408, which tells a client that its own request was slow
    "UnprocessableEntityError": 422,
    "RateLimitError": 429,
    "RouterRateLimitError": 429,  # every deployment of the name is cooling down
    "BudgetExceededError": 429,
    "PaymentRequiredError": 402,
    "BadRequestError": 400,
    "ServiceUnavailableError": 503,
    "BadGatewayError": 502,
    "APIConnectionError": 502,
    "APIError": 500,
}

# What a broken connection is called by the libraries under LiteLLM (httpx, aiohttp, the sockets) → status.
CONNECTION_STATUS = {
    **dict.fromkeys(("TimeoutException", "TimeoutError", "ServerTimeoutError"), 504),
    **dict.fromkeys(("TransportError", "ClientError", "ConnectionError", "gaierror", "SSLError"), 502),
}

# What botocore (`bedrock/`) and google-auth (`vertex_ai/`) raise where nobody has logged in on this machine → status.
LOGIN_STATUS = {"NoCredentialsError": 401, "DefaultCredentialsError": 401}


# Whose doing an error is. UNSURE: nothing was sent yet; had another backend an answer, it was this one's. RESTING:
# nobody's right now; nothing was sent, since LiteLLM's Router has all deployments of the name in cooldown.
CLIENT, PROVIDER, BACKEND, UNSURE, RESTING = "client", "provider", "backend", "unsure", "resting"


class ProxyError(Exception):
    """An answer other than success, for the client.

    Args:
        status: the HTTP status code.
        message: one sentence for a person, in the error body.
        headers: further response headers, such as ``Allow`` or ``Retry-After``.
        kind: the error type of the dialect, where the provider named one; else it follows from the status.
        param: the field of the request that is at fault (OpenAI dialect).
        code: a machine-readable reason.
        blame: ``CLIENT``, ``PROVIDER``, ``BACKEND``, ``UNSURE`` or ``RESTING``; of the last three, another backend may
            do better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        blame: str = CLIENT,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, list(headers)
        self.kind, self.param, self.code, self.blame = kind, param, code, blame

    def redact(self, redact: Redactor) -> ProxyError:
        """Take the secrets out of everything that the client will see; returns itself."""
        self.message = redact.cut(self.message)
        self.kind, self.param, self.code = (text and redact.cut(text) for text in (self.kind, self.param, self.code))
        return self

    def body(self, dialect: str) -> dict[str, Any]:
        """The error body in the given dialect; that of ``RESPONSES`` is OpenAI's."""
        if dialect == OLLAMA:
            return {"error": self.message}
        default = "api_error" if self.status >= 500 else "invalid_request_error"
        if dialect == ANTHROPIC:
            usual = ANTHROPIC_TYPES.get(self.status, default)
            kind = self.kind if self.kind in ANTHROPIC_TYPES.values() else usual  # clients know no others
            details = {"details": {"error_code": self.code}} if self.code else {}
            return {"type": "error", "error": {"type": kind, "message": self.message, **details}}
        kind = self.kind or OPENAI_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client went away: whatever was done for it is stopped, and nobody is answered."""


class StartError(Exception):
    """The program cannot start; the message is the one line that says why."""


def dialect_of(path: str, *, anthropic: bool = False) -> str:
    """The dialect in which errors on this path are answered.

    Args:
        anthropic: the client speaks Anthropic's where both vendors have the path.
    """
    found = re.match(r"(?:/openai)?(?:/v1)?/([a-z]+)(?:/|$)", path)
    name = found[1] if found else ""
    if name == "api":
        return OLLAMA
    return ANTHROPIC if anthropic and name in SHARED_PATHS else DIALECTS.get(name, OPENAI)


def class_status(error: BaseException, table: Mapping[str, int]) -> int | None:
    """The status of an exception's class, or of its nearest base class that the table has."""
    return next((table[base.__name__] for base in type(error).__mro__ if base.__name__ in table), None)


def connection_status(error: BaseException | None) -> int | None:
    """502 or 504 where a broken connection stands in the exception's chain of causes, else None."""
    return cause_status(error, CONNECTION_STATUS)


def cause_status(error: BaseException | None, table: Mapping[str, int]) -> int | None:
    """The status of the first exception in the chain of causes that the table has, else None."""
    statuses = (class_status(cause, table) for cause in causes(error))
    return next((status for status in statuses if status), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes; LiteLLM's chains may be circles."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def forget_frames(error: BaseException) -> None:
    """Take an exception and its causes apart: by their frames they hold each other, and all of the call, in circles."""
    for cause in list(causes(error)):
        cause.__traceback__ = cause.__cause__ = cause.__context__ = None


def json_value(data: bytes | str, otherwise: Any = None) -> Any:
    """The value of a JSON text; ``otherwise`` where it is none, as for the b"" of a call without an error."""
    try:
        return json.loads(data) if data else otherwise
    except (ValueError, RecursionError):
        return otherwise


def provider_error(body: bytes) -> dict[str, Any]:
    """The error object (``message``, ``type``, ``code``, ``param``) in a provider's answer; {} where there is none.

    Clients match the wording of providers' errors (Claude Code does), so it is handed on as it was.
    """
    document = json_value(body)
    if isinstance(document, list) and document:  # Gemini's streams wrap it once more
        document = document[0]
    if isinstance(document, dict) and document.get("type") == "response.failed":
        document = document.get("response")
    error = document.get("error", document) if isinstance(document, dict) else {}
    if error is document and error.get("type") == "error":  # the type of an event, and not of its error
        error = {**error, "type": None}
    if isinstance(error, str):
        return {"message": error}
    return with_cause(error) if isinstance(error, dict) and isinstance(error.get("message"), str) else {}


def with_cause(error: dict[str, Any]) -> dict[str, Any]:
    """The error object, its message with what OpenRouter keeps apart: the words of the provider behind it."""
    more = error.get("metadata")
    cause = more.get("raw") if isinstance(more, dict) else None
    return {**error, "message": f"{error['message']}: {cause}"} if cause and isinstance(cause, str) else error


def plain_message(error: BaseException) -> str:
    """LiteLLM's message, as `plain_text`."""
    return plain_text(str(getattr(error, "message", "") or error))


def plain_text(text: str) -> str:
    """A message without the traceback that LiteLLM's sometimes carry, and without its router's footnotes."""
    footnotes = r"Traceback \(most recent call last\)|LiteLLM: model group |Deployment Info: |Handle with "
    return re.split(footnotes, text, maxsplit=1)[0].strip()


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────
# Functions from a file to one frozen `Config`. YAML and the environment are read here and nowhere else. Validation
# gathers every problem with its key path before it gives up.

# The settings of LiteLLM's sections that this program reads itself: check, rule in words. `type`: True is an int.
Rule = tuple[Callable[[Any], bool], str]
SECONDS: Rule = (lambda n: type(n) in (int, float) and 0 < n < 1e9, "a number of seconds")
RETRIES: Rule = (lambda n: type(n) is int and n >= 0, "a whole number")
COUNT: Rule = (lambda n: type(n) is int and n > 0, "a whole number from 1")
PORT: Rule = (lambda n: type(n) is int and 0 <= n < 65536, "a port")
WAIT: Rule = (lambda value: not value or is_wait(value), SECONDS[1])  # LiteLLM takes it as a text too, and 0 for none
KEY: Rule = (lambda key: isinstance(key, str) and key != "", "a string (a number only in quotes)")
MAPPING: Rule = (lambda value: isinstance(value, dict), "a mapping")
SETTINGS: Mapping[str, Rule] = {
    "litellm_settings.request_timeout": SECONDS,
    "litellm_settings.num_retries": RETRIES,
    "router_settings.timeout": SECONDS,
    "router_settings.stream_timeout": SECONDS,
    "router_settings.num_retries": RETRIES,
    "router_settings.model_group_alias": MAPPING,
    "general_settings.master_key": KEY,
    "general_settings.experimental": MAPPING,
    "general_settings.experimental.use_sdk_proxy": (lambda value: type(value) is bool, "true or false"),
    "general_settings.experimental.circuit_breaker": MAPPING,
    "general_settings.experimental.circuit_breaker.failure_threshold": COUNT,
    "general_settings.experimental.circuit_breaker.reset_seconds": SECONDS,
    "general_settings.experimental.sdk_proxy_port": PORT,
    "general_settings.experimental.binary_proxy_port": PORT,
}
MODEL_SETTINGS: Mapping[str, Rule] = {"litellm_params.timeout": WAIT, "litellm_params.stream_timeout": WAIT}
# What HTTP itself needs, and the id that stands in our answer and in the log.
TAKEN_HEADERS = frozenset(
    "connection content-length content-type host te trailer transfer-encoding upgrade x-request-id".split()
)

MEMORY_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")
CONVERSATION_ID = re.compile(r"[\x21-\x7e]{1,256}")
FIELD_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.1: a token
ID_RULE = f"memory id ({MEMORY_ID.pattern})"
SECTIONS = ("litellm_settings", "router_settings", "general_settings", "environment_variables")
TOP_LEVEL_KEYS = ("model_list", "credential_list", "user_id_mappings", "include", *SECTIONS)
MISSPELT = 0.85  # so alike, for `difflib`, are a key and its misspelling; LiteLLM's other keys are below 0.8
MAPPING_KEYS = ("custom_header", "header_patterns", "default_user_id", "inject_header", "conversation")
CONVERSATION_KEYS = ("from_headers", "inject_header")
PATTERN_KEYS = ("header", "pattern", "user_id")
SECRET_KEY = re.compile(
    r"(?i)((api|master|access|private|subscription)[_-]?key|secret|token|password|credential(?!_name)|authorization)"
)
AUTH_SCHEME = re.compile(r"(?i)(bearer|basic) +")
MIN_SECRET_LENGTH = 6  # shorter values ("x", "none") would be redacted out of ordinary words
MAX_VALUES = 1_000_000  # of a config with its YAML aliases written out; ten lines of aliases can be 10 ** 10 values
# Such as $NAME, ${NAME}, os.environ.NAME, os.env/NAME: it is none to LiteLLM.
NEARLY_A_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|(?i:(?!os\.environ/)os\.env\w*[./\[(].*)")
MAX_SHOWN = 60  # characters of a wrong value in a message
IN_QUOTES = "a text with special characters is written in quotes"
YAML_HINTS = {  # words of PyYAML's → what to do
    r"'\t'": "indent with spaces, not with tabs",
    "escape character": r"in double quotes \ is written \\, in single quotes as it is",
    "mapping values": f"is the line indented like its neighbours? {IN_QUOTES}",
    "<block end>": f"is the line indented like its neighbours? {IN_QUOTES}",
    **dict.fromkeys((" alias", " for the tag", "block scalar", "start any token"), IN_QUOTES),
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong in the config: ``where`` is its key path; a warning does not stop the start.

    ``line`` counts from 1; what stands nowhere in a file (one that is missing) has none.
    """

    where: str
    message: str
    warning: bool = False
    file: str = ""
    line: int | None = None

    @property
    def place(self) -> str:
        """Its file, line and key path, as far as it has them."""
        return ": ".join(filter(None, (f"{self.file}:{self.line}" if self.line else self.file, self.where)))

    def at(self, mark: yaml.Mark) -> Problem:
        """The same problem at a place that YAML knows; it counts lines from 0."""
        return replace(self, file=str(mark.name), line=mark.line + 1)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class ConfigError(StartError):
    """The config cannot be used; ``problems`` has every reason."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True)
class HeaderPattern:
    """A request header whose value, where the pattern is found in it, names the memory, and the mode if it has one.

    ``where`` is its key path.
    """

    header: str
    pattern: str
    user_id: str
    regex: re.Pattern[str]
    where: str
    mode: str | None = None


@dataclass(frozen=True)
class Mappings:
    """``user_id_mappings``: how request headers become a memory id, and a conversation id where that is wanted.

    ``conversation_from`` are the headers of which the first that is there gives the conversation id, which is sent on
    in ``conversation_header``.
    """

    custom_header: str | None = "x-memory-user-id"
    patterns: tuple[HeaderPattern, ...] = ()
    default_user_id: str = "default-dev"
    inject_header: str = "x-sm-user-id"
    conversation_from: tuple[str, ...] = ()
    conversation_header: str | None = None


@dataclass(frozen=True)
class Config:
    """What config.yaml says, with the environment filled in.

    ``document`` is LiteLLM's part, ready for its Router; models whose keys are missing are not in its ``model_list``
    but in ``missing_keys``: model name → the variables to set, in words. ``secrets`` are the values, those of the
    environment among them, that no log or error may show. ``environment`` is the process's with what ``.env`` and
    ``environment_variables`` add; ``server_part`` is a text of all that LiteLLM reads, to tell whether it has changed;
    ``written`` is the document with its includes and without the environment.
    """

    path: str
    document: Mapping[str, Any]
    model_names: tuple[str, ...]
    missing_keys: Mapping[str, str]
    mappings: Mappings
    secrets: frozenset[str]
    environment: Mapping[str, str]
    server_part: str
    warnings: tuple[Problem, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)

    def section(self, name: str) -> dict[str, Any]:
        """A top-level section as a dict; an absent or empty one is {}."""
        return self.document.get(name) or {}

    @property
    def master_key(self) -> str | None:
        """The key that clients must show, or None; LiteLLM's server reads the same two places."""
        key = self.section("general_settings").get("master_key") or self.environment.get("LITELLM_MASTER_KEY")
        return str(key) if key else None

    @property
    def experimental(self) -> dict[str, Any]:
        """``general_settings.experimental``, this program's own corner of LiteLLM's section."""
        return self.section("general_settings").get("experimental") or {}

    @property
    def aliases(self) -> dict[str, Any]:
        """``router_settings.model_group_alias``: name → the model's, or ``{"model": …, "hidden": …}``."""
        return self.section("router_settings").get("model_group_alias") or {}

    @property
    def breaker(self) -> tuple[int, float]:
        """How many failures in a row open the circuit breaker, and how many seconds it then waits."""
        given = self.experimental.get("circuit_breaker") or {}
        return given.get("failure_threshold") or FAILURE_THRESHOLD, given.get("reset_seconds") or RESET_SECONDS

    @property
    def request_seconds(self) -> float:
        """How long a model may take to answer, or to send its next byte."""
        configured = self.section("litellm_settings").get("request_timeout")
        return float(configured or self.section("router_settings").get("timeout") or REQUEST_SECONDS)

    @property
    def silent_seconds(self) -> float:
        """How long LiteLLM's server may say nothing: all attempts at the most patient model, whole or streamed."""
        router, general = self.section("router_settings"), self.section("litellm_settings")
        models = [entry["litellm_params"] for _, entry in sound_models(self.document)]
        waits = [float(params.get(name) or 0) for params in (router, *models) for name in ("timeout", "stream_timeout")]
        given = (params.get("num_retries") for params in (router, general))
        usual = next((retries for retries in given if retries is not None), LITELLM_RETRIES)
        attempts: int = 1 + max([usual, *filter(RETRIES[0], (params.get("num_retries") for params in models))])
        return max([self.request_seconds, *waits]) * attempts


@dataclass(frozen=True)
class Reading:
    """A config as far as it could be read; where a problem is no mere warning, ``config`` is only to be looked at.

    ``deployments`` are (name, what it calls, whether its keys are there); ``root`` knows the lines (see `locate`).
    """

    config: Config
    problems: tuple[Problem, ...]
    deployments: tuple[tuple[str, str, str], ...]
    root: yaml.MappingNode


def load_config(path: str, environment: Mapping[str, str] | None = None) -> Config:
    """Read, resolve and validate a config file; nothing outside the result changes.

    Args:
        environment: in which ``os.environ/NAME`` is looked up; None: the process's own.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or has problems that are no mere warnings.
    """
    reading = read_config(path, environment)
    errors = [problem for problem in reading.problems if not problem.warning]
    if errors:
        raise ConfigError(errors)
    return reading.config


def read_config(path: str, environment: Mapping[str, str] | None = None) -> Reading:
    """Read and resolve a config file, and find every problem in it.

    Raises:
        ConfigError: the file is missing, or is no YAML mapping.
    """
    problems: list[Problem] = []
    root = read_nodes(path, problems)
    document = values_of(root)
    given = os.environ if environment is None else environment
    environment = {**dotenv_values(path, problems), **given}
    environment.update(environment_variables(document.get("environment_variables"), environment, problems))
    missing: list[tuple[str, str]] = []
    resolved = resolve(document, "", environment, missing, problems)
    missing.extend(missing_of_credentials(resolved, missing, problems))
    models, missing_keys = check_models(resolved, missing, problems)
    mappings = check_mappings(resolved.get("user_id_mappings"), problems)
    check_sections(resolved, problems)
    # The start names the models that lack keys in its own words: their problems are for `check` alone.
    unset, keyless = unset_variables(missing)
    problems.extend(unset)
    # Equal names alone are LiteLLM's load balancing.
    entries = ((where, (entry["model_name"], entry["litellm_params"])) for where, entry in sound_models(document))
    problems.extend(repeated(entries, "is the same deployment as"))
    problems.extend(header_warnings(resolved, mappings.inject_header))
    located = locate([*problems, *keyless], root)
    rows = deployments(resolved, missing)
    config = Config(
        path=path,
        document={**resolved, "model_list": models},
        model_names=tuple(dict.fromkeys(name for name, _, _ in rows)),
        missing_keys=missing_keys,
        mappings=mappings,
        secrets=secrets_of([resolved, environment]),
        environment=environment,
        server_part=what_the_server_reads(resolved, environment),
        warnings=tuple(problem for problem in located[: len(problems)] if problem.warning),
        written=document,
    )
    return Reading(config, tuple(located), tuple(rows), root)


def unset_variables(missing: list[tuple[str, str]]) -> tuple[list[Problem], list[Problem]]:
    """A problem for each variable that is not set, and apart from them those of the models."""
    apart: tuple[list[Problem], list[Problem]] = ([], [])
    for where, name in missing:
        if not name:
            apart[0].append(Problem(where, "os.environ/ must be followed by the name of a variable"))
            continue
        # Without its key the proxy would stand open, which is not what a config that names one asks for.
        harmless = where != "general_settings.master_key"
        problem = Problem(where, f"{name} is not set in the environment", warning=harmless)
        apart[where.startswith("model_list[")].append(problem)
    return apart


def environment_variables(section: Any, environment: Mapping[str, str], problems: list[Problem]) -> dict[str, str]:
    """``environment_variables``, which win over the environment, as in LiteLLM's server."""
    found: dict[str, str] = {}
    for name, value in section.items() if isinstance(section, dict) else ():  # `check_sections` says what is wrong
        resolved = resolve(value, "environment_variables", environment, [], [])
        if "\0" in f"{name}{resolved}" or "=" in str(name) or not name:
            problems.append(Problem(f"environment_variables.{name}", "cannot be set in an environment"))
        elif resolved is not None:
            found[str(name)] = str(resolved)
    return found


def dotenv_path(config_path: str) -> Path:
    """The ``.env`` that counts: the one beside the config, else the first from the working directory upwards."""
    folders = [Path(config_path).parent]
    with contextlib.suppress(OSError):  # the working directory has been removed
        folders += [Path.cwd(), *Path.cwd().parents]
    return next((path for path in (folder / ".env" for folder in folders) if path.is_file()), folders[0] / ".env")


def dotenv_values(config_path: str, problems: list[Problem]) -> dict[str, str]:
    """What ``.env`` says, but for the lines that say nothing; python-dotenv comes with LiteLLM."""
    try:
        import dotenv
        from dotenv.parser import parse_stream
    except ImportError:
        return {}
    path = dotenv_path(config_path)
    try:
        with path.open(encoding="utf-8") as file:
            parts = list(parse_stream(file))
    except (FileNotFoundError, IsADirectoryError):  # the latter: a virtual environment
        return {}
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError([Problem("", f"cannot be read: {error}", file=str(path))]) from None
    for text, line in (part.original for part in parts if part.error):  # python-dotenv would not name the file
        line += text[: -len(text.lstrip())].count("\n")
        problems.append(Problem("", "is no NAME=VALUE, and is ignored", True, str(path), line))
    values = dotenv.dotenv_values(stream=io.StringIO("".join(part.original.string for part in parts if not part.error)))
    return {name: value for name, value in values.items() if value is not None and "\0" not in name + value}


def what_the_server_reads(document: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """All of a config that LiteLLM's server reads: without our own sections."""
    kept = {key: value for key, value in document.items() if key != "user_id_mappings"}
    general = kept.get("general_settings")
    if isinstance(general, dict):
        kept["general_settings"] = {key: value for key, value in general.items() if key != "experimental"}
    return repr([kept, dict(environment)])


def save_copy(config: Config, path: Path) -> str:
    """Write an accepted config for LiteLLM's server, for its owner's eyes only; returns the path to read it from.

    The copy must lie beside the config, where LiteLLM looks for the callbacks that a config names; where it cannot be
    written, the config itself has to do.
    """
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            yaml.safe_dump(dict(config.written), file, sort_keys=False, allow_unicode=True)
    except OSError:
        return config.path
    return str(path)


def apply_environment(new: Config, old: Config | None = None) -> None:
    """Make the process's environment the config's: LiteLLM looks there for keys that the config does not name."""
    for name in (old.environment.keys() if old else set()) - new.environment.keys():
        os.environ.pop(name, None)
    os.environ.update(new.environment)
    os.environ["LITELLM_RUST"] = "false"  # else LiteLLM may use a client of its own, past every session in Python


class Constructor(yaml.constructor.SafeConstructor):
    """Makes the values of YAML nodes; raises a `yaml.YAMLError` with its line for what is no value at all."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(node, yaml.ScalarNode):
                str(value).encode()  # half a surrogate pair, or a number of 5000 digits, would fail where it is used
        except (ValueError, OverflowError, AttributeError, KeyError):  # the last two: !!timestamp and !!bool of a word
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"this is no valid {kind}", node.start_mark) from None
        return value


def read_nodes(
    path: str, problems: list[Problem], text: str | None = None, above: tuple[str, ...] = ()
) -> yaml.MappingNode:
    """A YAML mapping, with LiteLLM's ``include`` files merged in: lists are appended, other keys are set.

    What is wrong with an included file is added to the problems.

    Args:
        text: what the file is to say, where it is not yet written.
        above: the files that include this one.

    Raises:
        ConfigError: the file itself cannot be read.
    """
    root, included = read_file(path, problems, text)
    pairs = {str(key.value): (key, value) for key, value in root.value}
    above = (*above, os.path.normpath(path))
    for file, line in included:
        if os.path.normpath(file) in above:
            problems.append(Problem("include", f"{file} includes itself", file=path, line=line))
            continue
        try:
            more = read_nodes(file, problems, above=above)
        except ConfigError as error:
            by = f"(included by {path}:{line})"
            problems.extend(replace(said, message=f"{said.message} {by}") for said in error.problems)
            continue
        for key, value in more.value:
            there = pairs.get(str(key.value), (None, None))[1]
            if isinstance(there, yaml.SequenceNode) and isinstance(value, yaml.SequenceNode):
                value = yaml.SequenceNode(there.tag, there.value + value.value, there.start_mark)
            pairs[str(key.value)] = (key, value)
    root.value = list(pairs.values())
    return root


def read_file(
    path: str, problems: list[Problem], text: str | None = None
) -> tuple[yaml.MappingNode, list[tuple[str, int]]]:
    """One file's mapping, and the files that it includes with the lines that name them; raises ConfigError."""
    included: list[tuple[str, int]] = []
    try:
        loader = yaml.SafeLoader(read_text(path) if text is None else text)
        loader.name = path  # so that each node knows its file
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            message = "is not a YAML mapping (expected model_list: and others)"
            raise ConfigError([Problem("", message, file=path)])
        problems.extend(repeated_keys(root, "", set()))
        Constructor().flatten_mapping(root)
        include = [pair for pair in root.value if pair[0].value == "include"]
        for key, value in include[-1:]:
            names = Constructor().construct_document(value)
            if isinstance(names, list):
                lines = (item.start_mark.line + 1 for item in value.value)
                included = [(str(Path(path).parent / str(name)), line) for name, line in zip(names, lines, strict=True)]
            elif names:
                problems.append(Problem("include", "must be a list of files").at(key.start_mark))
    except (yaml.MarkedYAMLError, RecursionError) as error:
        raise ConfigError([syntax_problem(path, error)]) from None
    root.value = [pair for pair in root.value if pair not in include]
    return root, included


def read_text(path: str) -> str:
    """A file's text; raises ConfigError."""
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe might never end, and is read but once
            raise OSError(0, "is no regular file")
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([Problem("YAML", "is not UTF-8", file=path, line=line)]) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        message = getattr(error, "strerror", None) or str(error)
        raise ConfigError([Problem("", message, file=path)]) from None
    control = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if control:
        line = text.count("\n", 0, control.start()) + 1
        raise ConfigError([Problem("YAML", f"has the character U+{ord(control[0]):04X}", file=path, line=line)])
    return text


def syntax_problem(path: str, error: yaml.MarkedYAMLError | RecursionError) -> Problem:
    """A YAML error without the piece of the file that PyYAML quotes: there may be a key in it."""
    if isinstance(error, RecursionError):
        return Problem("YAML", "an alias refers to itself, or the nesting is too deep", file=path)
    mark, began = error.problem_mark or error.context_mark, error.context_mark
    since = f" from line {began.line + 1}" if mark and began and began.line < mark.line else ""
    said = ", ".join(filter(None, (error.context and error.context + since, error.problem)))
    message = re.sub(r"(alias|anchor|tag) ['\"].*['\"]", r"\1", " ".join(said.split()))  # `password: *secret` is one
    message += next((f" ({hint})" for words, hint in YAML_HINTS.items() if words in message), "")
    return Problem("YAML", message).at(mark) if mark else Problem("YAML", message, file=path)


def values_of(root: yaml.MappingNode) -> dict[str, Any]:
    """The document of a YAML node; raises ConfigError."""
    file = str(root.start_mark.name)
    try:
        document: dict[str, Any] = Constructor().construct_document(root)
        size = unfolded(document, {})  # no later walk is deeper than this one
    except (yaml.MarkedYAMLError, RecursionError) as error:
        raise ConfigError([syntax_problem(file, error)]) from None
    if size > MAX_VALUES:
        raise ConfigError([Problem("YAML", f"its aliases unfold to more than {MAX_VALUES} values", file=file)])
    return document


def unfolded(value: Any, sizes: dict[int, int]) -> int:
    """How many values there are once every alias is written out; ``sizes`` are those that are known, by id."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        items = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(unfolded(item, sizes) for item in items)
    return sizes[id(value)]


def children(node: yaml.Node, where: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """What a YAML mapping or list has, in the file's order: key path, the node that stands for its place, value."""
    if isinstance(node, yaml.MappingNode):
        return [(f"{where}.{key.value}".lstrip("."), key, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(f"{where}[{index}]", item, item) for index, item in enumerate(node.value)]
    return []


def repeated_keys(node: yaml.Node, where: str, seen: set[int]) -> Iterator[Problem]:
    """A warning for each key that stands twice in one mapping; ``seen`` are the nodes that were looked at."""
    if id(node) in seen:
        return
    seen.add(id(node))
    first: dict[tuple[str, str], yaml.Mark] = {}
    for path, key, value in children(node, where):
        mark = key.start_mark
        before = first.setdefault((key.tag, path), mark)
        if before is not mark and key.tag != "tag:yaml.org,2002:merge":
            message = f"stands here again (first in line {before.line + 1}): only the last one counts"
            yield Problem(path, message, warning=True).at(mark)
        yield from repeated_keys(value, path, seen)


def places(node: yaml.Node, where: str = "") -> Iterator[tuple[str, yaml.Mark]]:
    """The place of each key path under a YAML node; of a key that stands twice the last one's, whose value counts."""
    for path, (key, value) in {path: (key, value) for path, key, value in children(node, where)}.items():
        yield path, key.start_mark
        yield from places(value, path)


def locate(problems: Iterable[Problem], root: yaml.MappingNode) -> list[Problem]:
    """The problems with file and line; one about a key that is not there has those of what it is missing from."""
    found = {"": root.start_mark, **dict(places(root))}

    def mark_of(where: str) -> yaml.Mark:
        while where not in found:
            where = re.sub(r"(^|\.|\[)[^.\[]*$", "", where)
        return found[where]

    return [problem if problem.file else problem.at(mark_of(problem.where)) for problem in problems]


def files_of(path: str) -> list[str]:
    """A config and the files that it includes, and that these include; one that cannot be read includes none."""
    files = [path]
    for file in files:  # it grows as they are read
        with contextlib.suppress(ConfigError):
            files.extend(dict.fromkeys(name for name, _ in read_file(file, [])[1] if name not in files))
    return files


def resolve(
    value: Any, where: str, environment: Mapping[str, str], missing: list[tuple[str, str]], problems: list[Problem]
) -> Any:
    """A copy of the value with every ``os.environ/NAME`` replaced, at any depth.

    Names that are not set become None and are added to ``missing`` as (key path, NAME), a name that is not there as "".
    A text that is nearly such a name, and a variable with a stray line end or space, are added to the problems.
    """
    more = (environment, missing, problems)
    if isinstance(value, dict):
        return {key: resolve(item, f"{where}.{key}".lstrip("."), *more) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, f"{where}[{index}]", *more) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if NEARLY_A_VARIABLE.fullmatch(value):
        problems.append(Problem(where, "is taken as it stands: a variable is written os.environ/NAME", warning=True))
    if not value.startswith("os.environ/"):
        return value
    name = value.removeprefix("os.environ/")
    found = environment.get(name)
    if not found:
        missing.append((where, name))
        return None
    if found != found.strip():
        problems.append(Problem(where, f"{name} begins or ends with white space", warning=True))
    return found


def missing_of_credentials(
    document: Mapping[str, Any], missing: Sequence[tuple[str, str]], problems: list[Problem]
) -> list[tuple[str, str]]:
    """What the deployments lack of the credentials that they name (LiteLLM's ``credential_list``), as in ``missing``.

    What a deployment says itself wins over its credential.
    """
    credentials = [(where, entry) for where, entry in items_at(document, "credential_list") if isinstance(entry, dict)]
    named = {str(entry.get("credential_name")): f"{where}.credential_values." for where, entry in credentials}
    lacking: list[tuple[str, str]] = []
    for model, entry in sound_models(document):
        params = entry["litellm_params"]
        name, where = params.get("litellm_credential_name"), f"{model}.litellm_params.litellm_credential_name"
        if name and str(name) not in named:
            problems.append(Problem(where, "is not in credential_list", warning=True))
        elif name:
            under = named[str(name)]
            unset = ((path.removeprefix(under), variable) for path, variable in missing if path.startswith(under))
            lacking.extend((where, variable) for key, variable in unset if key not in params)
    return lacking


def check_models(
    document: dict[str, Any], missing: list[tuple[str, str]], problems: list[Problem]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The deployments that can be called, and for each model name without any the variables that it lacks."""
    entries = items_at(document, "model_list")
    if not entries:
        problems.append(Problem("model_list", "must be a list with at least one model"))
    for where, entry in entries:
        problems.extend(model_problems(entry, where))
    lacking = [(entry, unset_below(where, missing)) for where, entry in sound_models(document)]
    usable = [entry for entry, names in lacking if not names]
    served = {entry["model_name"] for entry in usable}
    unserved: dict[str, dict[str, None]] = {}
    for entry, names in lacking:
        if entry["model_name"] not in served:
            unserved.setdefault(entry["model_name"], {}).update(dict.fromkeys(names))
    return usable, {name: " and ".join(names) for name, names in unserved.items()}


def sound_models(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Key path and entry of each deployment that has a name and a model."""
    return [(where, entry) for where, entry in items_at(document, "model_list") if not model_problems(entry, where)]


def unset_below(where: str, missing: Iterable[tuple[str, str]]) -> list[str]:
    """The variables that are missing below a key path, each once."""
    return list(dict.fromkeys(name for path, name in missing if name and path.startswith(f"{where}.")))


def deployments(document: Mapping[str, Any], missing: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """For each deployment that has a name and a model: both, and whether its keys are there."""
    rows: list[tuple[str, str, str]] = []
    for where, entry in sound_models(document):
        names, params = unset_below(where, missing), entry["litellm_params"]
        # Which keys LiteLLM finds in the environment by itself, only LiteLLM knows.
        there = "present" if any(secrets_in(params)) or params.get("litellm_credential_name") else "none named"
        rows.append((entry["model_name"], params["model"], f"missing: set {' and '.join(names)}" if names else there))
    return rows


def model_problems(entry: Any, where: str) -> list[Problem]:
    """What is wrong with one entry of model_list."""
    if not isinstance(entry, dict):
        return [Problem(where, "must be a mapping with model_name and litellm_params")]
    params = entry.get("litellm_params")
    called = params.get("model") if isinstance(params, dict) else "-"
    checks: tuple[tuple[str, Any, type, str], ...] = (
        ("model_name", entry.get("model_name"), str, no_text(entry.get("model_name"))),
        ("litellm_params", params, dict, "must be a mapping"),
        ("litellm_params.model", called, str, 'must name the model, such as "anthropic/claude-sonnet-4-5"'),
    )
    wrong = ((key, message) for key, value, kind, message in checks if not (isinstance(value, kind) and value))
    return [Problem(f"{where}.{key}", message) for key, message in wrong]


def check_mappings(section: Any, problems: list[Problem]) -> Mappings:
    """``user_id_mappings``, checked; what is absent or wrong has the default of `Mappings`."""
    where = "user_id_mappings"
    if section is None:
        message = f"is missing: all clients get the memory {Mappings.default_user_id}"
        problems.append(Problem(where, message, warning=True))
    elif not isinstance(section, dict):
        problems.append(Problem(where, f"must be a mapping, not {shown(section)}"))
    given = section if isinstance(section, dict) else {}
    problems.extend(unknown_keys(given, MAPPING_KEYS, where))
    values = {key: given[key] for key in ("custom_header", "default_user_id", "inject_header") if key in given}
    wrong = mapping_problems(values)
    problems.extend(Problem(f"{where}.{key}", message) for key, message in wrong.items())
    entries = given.get("header_patterns") or []
    if not isinstance(entries, list):
        problems.append(Problem(f"{where}.header_patterns", f"must be a list, not {shown(entries)}"))
        entries = []
    checked = (check_pattern(entry, f"{where}.header_patterns[{i}]", problems) for i, entry in enumerate(entries))
    patterns = tuple(pattern for pattern in checked if pattern)
    described = ((pattern.where, (pattern.header, pattern.pattern)) for pattern in patterns)
    problems.extend(repeated(described, "has the header and the pattern of"))
    right = {key: value for key, value in values.items() if key not in wrong}
    lowered = {key: value.lower() if "header" in key and value else value for key, value in right.items()}
    return Mappings(patterns=patterns, **lowered, **check_conversation(given, problems))


def check_conversation(section: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """``user_id_mappings.conversation`` as fields of `Mappings`; {} where it is absent or wrong."""
    where, given = "user_id_mappings.conversation", section.get("conversation")
    if given is None:
        return {}
    if not isinstance(given, dict):
        problems.append(Problem(where, f"must be a mapping with {' and '.join(CONVERSATION_KEYS)}, not {shown(given)}"))
        return {}
    wrong = unknown_keys(given, CONVERSATION_KEYS, where)
    sources: Any = given.get("from_headers")
    target: Any = given.get("inject_header") or ""
    if not (isinstance(sources, list) and sources and all(map(is_header_name, sources))):
        wrong.append(Problem(f"{where}.from_headers", f"must be a list of header names, not {shown(sources)}"))
    if not is_header_name(target) or target.lower() in TAKEN_HEADERS:
        wrong.append(Problem(f"{where}.inject_header", f"must be the name of a header of its own, not {shown(target)}"))
    elif target.lower() == str(section.get("inject_header", Mappings.inject_header)).lower():
        wrong.append(Problem(f"{where}.inject_header", "must differ from user_id_mappings.inject_header"))
    problems.extend(wrong)
    if wrong:
        return {}
    return {"conversation_from": tuple(map(str.lower, sources)), "conversation_header": target.lower()}


def is_header_name(value: Any) -> bool:
    """Whether this can be the name of a header field."""
    return isinstance(value, str) and FIELD_NAME.fullmatch(value) is not None


def mapping_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the single values of ``user_id_mappings``: key → message."""
    wrong: dict[str, str] = {}
    names = {key: values.get(key, getattr(Mappings(), key)) for key in ("custom_header", "inject_header")}
    for key, name in names.items():
        if not is_header_name(name):
            wrong[key] = f"must be a header name, not {shown(name)}"
        elif name.lower() in TAKEN_HEADERS:
            wrong[key] = f"cannot be {name}, which HTTP or this proxy needs itself"
    if not names["custom_header"]:  # that switches it off
        del wrong["custom_header"]
    elif str(names["custom_header"]).lower() == str(names["inject_header"]).lower():
        wrong["custom_header"] = "must differ from inject_header"
    default = values.get("default_user_id", "-")
    if not (isinstance(default, str) and MEMORY_ID.fullmatch(default)):
        wrong["default_user_id"] = f"must be a {ID_RULE}, not {shown(default)}"
    return wrong


def check_pattern(entry: Any, where: str, problems: list[Problem]) -> HeaderPattern | None:
    """One header pattern, compiled; None, with the problems added, where it cannot be used."""
    if not isinstance(entry, dict):
        problems.append(Problem(where, f"must be a mapping with {', '.join(PATTERN_KEYS)}, not {shown(entry)}"))
        return None
    wrong = unknown_keys(entry, (*PATTERN_KEYS, "mode"), where)
    if entry.get("mode") not in (None, "sdk", "binary"):
        wrong.append(Problem(f"{where}.mode", f"must be sdk or binary, not {shown(entry['mode'])}"))
    texts = {key: entry[key] for key in PATTERN_KEYS if isinstance(entry.get(key), str) and entry[key]}
    wrong.extend(Problem(f"{where}.{key}", no_text(entry.get(key))) for key in PATTERN_KEYS if key not in texts)
    if not FIELD_NAME.fullmatch(texts.get("header", "-")):
        wrong.append(Problem(f"{where}.header", f"must be a header name, not {shown(texts['header'])}"))
    regex, user_id = None, texts.get("user_id", "-")
    try:
        regex = re.compile(texts["pattern"], re.IGNORECASE) if "pattern" in texts else None
        if regex:
            regex.sub(user_id, "")  # parses the template, and so finds groups that the pattern has not
    except (re.error, ValueError, IndexError, RecursionError, OverflowError) as error:
        key, rule = ("user_id", "") if regex else ("pattern", "is no regular expression: ")
        wrong.append(Problem(f"{where}.{key}", f"{rule}{error}"))
    if "\\" not in user_id and not MEMORY_ID.fullmatch(user_id):
        wrong.append(Problem(f"{where}.user_id", f"must be a {ID_RULE}, not {shown(user_id)}"))
    problems.extend(wrong)
    if wrong or not regex:
        return None
    return HeaderPattern(texts["header"].lower(), texts["pattern"], user_id, regex, where, entry.get("mode"))


def repeated(items: Iterable[tuple[str, Any]], message: str) -> Iterator[Problem]:
    """A warning for each item that equals an earlier one; the message goes on with the key path of that one."""
    seen: list[tuple[str, Any]] = []
    for where, item in items:
        first = next((place for place, other in seen if other == item), None)
        if first:
            yield Problem(where, f"{message} {first}", warning=True)
        seen.append((where, item))


def shown(value: Any) -> str:
    """A wrong value for a message: short ones as they are, of all others only the kind."""
    text = repr(value) if value is None or isinstance(value, str | int | float) else ""
    kinds: Mapping[type, str] = {dict: "a mapping", list: "a list", str: "a text of this length"}
    return text if 0 < len(text) <= MAX_SHOWN else kinds.get(type(value), type(value).__name__)


def no_text(value: Any) -> str:
    """What is wrong with a value that should be a text, in words; YAML takes 5, yes and 2026-11-20 for other things."""
    quotes = "" if isinstance(value, str | dict | list | None) else ": in quotes it is one"
    return f"must be a non-empty string, not {shown(value)}{quotes}"


def unknown_keys(section: Any, known: Sequence[str], where: str, *, warning: bool = False) -> list[Problem]:
    """A problem for each key of this program's own sections that it does not know; none of what is no mapping."""
    keys = [key for key in section if key not in known] if isinstance(section, dict) else []
    return [Problem(f"{where}.{key}", f"is unknown (known: {', '.join(known)})", warning) for key in keys]


def value_at(document: Any, where: str) -> Any:
    """What a document has at a path of keys; None where that leads nowhere."""
    for key in where.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


def items_at(document: Any, where: str) -> list[tuple[str, Any]]:
    """Key path and value of each item of a list; [] where there is none."""
    found = value_at(document, where)
    return [(f"{where}[{index}]", item) for index, item in enumerate(found if isinstance(found, list) else ())]


def misspelt_sections(document: Mapping[str, Any]) -> Iterator[Problem]:
    """A warning for each top-level key that is nearly one that this program reads; LiteLLM knows many more."""
    from difflib import get_close_matches

    for key in map(str, document):
        for meant in get_close_matches(key, TOP_LEVEL_KEYS, 1, MISSPELT):
            if key != meant:
                yield Problem(key, f"is unknown: {meant} may be meant", warning=True)


def unknown_settings(document: Mapping[str, Any]) -> Iterator[Problem]:
    """A warning for each key that this program's corner of LiteLLM's sections does not know, or that belongs in it."""
    corner = "general_settings.experimental"
    names = [name.rpartition(".") for name in SETTINGS]
    for where in (corner, f"{corner}.circuit_breaker"):
        known = [key for path, _, key in names if path == where]
        yield from unknown_keys(value_at(document, where), known, where, warning=True)
    for beside in (f"general_settings.{key}" for path, _, key in names if path == corner):
        if value_at(document, beside) is not None:
            yield Problem(beside, f"is not read here, but in {corner}", warning=True)


def check_sections(document: Mapping[str, Any], problems: list[Problem]) -> None:
    """LiteLLM's sections must at least be mappings; what is in them is LiteLLM's business."""
    for name in SECTIONS:
        if not isinstance(document.get(name), dict | None):
            problems.append(Problem(name, "must be a mapping"))
    problems.extend(misspelt_sections(document))
    problems.extend(unknown_settings(document))
    problems.extend(broken_rules(document, SETTINGS))
    for where, model in items_at(document, "model_list"):
        problems.extend(broken_rules(model, MODEL_SETTINGS, f"{where}."))


def broken_rules(document: Any, settings: Mapping[str, Rule], above: str = "") -> Iterator[Problem]:
    """A problem for each of these settings that is there and is not what it must be."""
    for where, (fits, rule) in settings.items():
        value = value_at(document, where)
        if value is not None and not fits(value):
            told = "" if SECRET_KEY.search(where) else f", not {shown(value)}"
            yield Problem(f"{above}{where}", f"must be {rule}{told}")


def is_wait(value: Any) -> bool:
    """Whether `float`, which LiteLLM calls, makes a number of seconds of this."""
    try:
        return 0 <= float(value) < math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def header_warnings(document: Mapping[str, Any], inject_header: str) -> Iterator[Problem]:
    """A warning wherever the injected header would not arrive as it was injected, or not keep memories apart."""
    if value_at(document, "litellm_settings.cache"):
        message = "in binary mode LiteLLM's server answers any client with what another one's memory went into"
        yield Problem("litellm_settings.cache", message, warning=True)
    forwards = "general_settings.forward_client_headers_to_llm_api"
    if value_at(document, forwards) is not True:
        message = f"is not true: in binary mode LiteLLM's server drops {inject_header}, and with it the memory"
        yield Problem(forwards, message, warning=True)
    elif not inject_header.startswith("x-"):
        message = f"{inject_header!r} does not start with x-: LiteLLM's server drops it in binary mode"
        yield Problem("user_id_mappings.inject_header", message, warning=True)
    for where, model in items_at(document, "model_list"):
        fixed = value_at(model, "litellm_params.extra_headers")
        if isinstance(fixed, dict) and any(str(name).lower() == inject_header for name in fixed):
            message = f"sets {inject_header} itself, so that all clients of this model share one memory"
            yield Problem(f"{where}.litellm_params.extra_headers", message, warning=True)


def secrets_of(value: Any) -> frozenset[str]:
    """What must not be shown of a config or of an environment."""
    return frozenset(secret for secret in secrets_in(value) if len(secret) >= MIN_SECRET_LENGTH)


def secrets_in(value: Any, key: str = "") -> Iterator[str]:
    """Every string that stands under a key whose name says that it is secret."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from secrets_in(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from secrets_in(item, key)
    elif isinstance(value, str) and value and SECRET_KEY.search(key):
        yield value
        yield AUTH_SCHEME.sub("", value, count=1)  # a provider may quote what comes after it


# ── memory routing ───────────────────────────────────────────────────────────────────────────────────────────────
# Pure functions from request headers to a memory id. The order of precedence lives here and nowhere else: the custom
# header, then the first pattern that matches, then the default.


class Route(NamedTuple):
    """The memory of one request, and why.

    ``pattern`` is the one that matched; ``invalid`` are (pattern, id) pairs that matched with an unusable id;
    ``injected`` are the header fields that the memory service is to read.
    """

    user_id: str
    pattern: HeaderPattern | None = None
    custom: bool = False
    invalid: tuple[tuple[HeaderPattern, str], ...] = ()
    injected: tuple[tuple[str, str], ...] = ()


NO_ROUTE = Route("")


def route_request(headers: Headers, mappings: Mappings) -> Route:
    """The memory, and the conversation where that is wanted, of a request with these headers.

    Raises:
        ProxyError: 400, see `route_memory`.
    """
    route = route_memory(headers, mappings)
    injected = [(mappings.inject_header, route.user_id)]
    given = (value for name in mappings.conversation_from for value in headers.values(name))
    conversation = next((value for value in given if CONVERSATION_ID.fullmatch(value)), None)
    if mappings.conversation_header and conversation:
        injected.append((mappings.conversation_header, conversation))
    return route._replace(injected=tuple(injected))


def kept_back(mappings: Mappings) -> frozenset[str]:
    """The (lower-case) names of a client's header fields that are not sent on: ours stand in their place."""
    names = (mappings.inject_header, mappings.custom_header, mappings.conversation_header, "x-request-id")
    return frozenset(name for name in names if name)


def route_memory(headers: Headers, mappings: Mappings) -> Route:
    """The memory id for a request with these headers.

    Raises:
        ProxyError: 400, the custom header is there more than once or is no memory id (`MEMORY_ID`).
    """
    custom = [value for value in headers.values(mappings.custom_header) if value] if mappings.custom_header else []
    if custom:
        if len(custom) > 1 or not MEMORY_ID.fullmatch(custom[0]):
            rule = "one value of 1 to 128 characters A-Z a-z 0-9 . _ : @ -"
            raise ProxyError(400, f"{mappings.custom_header} must have {rule}", param=mappings.custom_header)
        return Route(custom[0], custom=True)
    invalid: list[tuple[HeaderPattern, str]] = []
    for pattern in mappings.patterns:
        for value in headers.values(pattern.header):
            match = pattern.regex.search(value)
            if match is None:
                continue
            user_id = match.expand(pattern.user_id)
            if MEMORY_ID.fullmatch(user_id):
                return Route(user_id, pattern, invalid=tuple(invalid))
            invalid.append((pattern, user_id))
    return Route(mappings.default_user_id, invalid=tuple(invalid))


def route_info(route: Route) -> dict[str, Any]:
    """The answer of ``GET /memory-routing/info``."""
    return {
        "user_id": route.user_id,
        "matched_pattern": route.pattern and {key: getattr(route.pattern, key) for key in PATTERN_KEYS},
        "custom_header_present": route.custom,
        "is_default": not (route.custom or route.pattern),
    }


# What `check` says of a pattern it has from header values that the pattern is tried on: samples from its parsed form,
# as they are and with each of these before and after them.
BEFORE = ("", "x", "1", "x ", "(x) ")
AFTER = ("", "x", "1", " x", "-1.0 (X; y)")
CHARACTERS = string.ascii_letters + string.digits + "".join(map(chr, range(0xA1, 0x100))) + string.punctuation + " "
HEADER_VALUE = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")  # what `Headers` lets through
# Looking around and back references: what such a pattern does not match cannot be told from samples.
UNJUDGED = re.compile(r"\(\?<?=|\(\?<?!(?!\))|\(\?P=|\(\?\(|\\[1-9]")
MAX_SAMPLES = 1000  # texts of one pattern, and characters of one text
REGEX_PARSER = ("re._parser", "re._compiler") if sys.version_info >= (3, 11) else ("sre_parse", "sre_compile")


def samples(regex: re.Pattern[str]) -> list[str]:
    """Texts that are built like a regular expression: every branch, repeats with the fewest turns and one more, some
    characters of each class. One choice at a time is varied; all others are the shortest. Anchors count for nothing.

    Raises whatever comes up where Python's own parser, which is no public part of it, is not as it was.
    """
    parser, compiler = map(import_module, REGEX_PARSER)
    tree = parser.parse(regex.pattern, regex.flags)

    def texts_of(items: Any) -> list[str]:
        choices = [sorted(choices_of(op, value), key=len) for op, value in items]
        if not all(choices):
            return []
        shortest = [texts[0] for texts in choices]
        varied = ("".join((*shortest[:i], text, *shortest[i + 1 :])) for i, t in enumerate(choices) for text in t[1:])
        texts = list(dict.fromkeys(("".join(shortest), *varied)))
        if max(len(texts), *map(len, texts)) > MAX_SAMPLES:
            raise ValueError("too many samples, or too long ones")
        return texts

    def choices_of(op: Any, value: Any) -> list[str]:
        match str(op), value:
            case "LITERAL", code:
                return [chr(code)]
            case "AT", _:
                return [""]
            case ("SUBPATTERN", (*_, items)) | ("ATOMIC_GROUP", items):
                return texts_of(items)
            case "BRANCH", (_, branches):
                return [text for items in branches for text in texts_of(items)]
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT", (least, most, items):
                if least > MAX_SAMPLES:
                    raise ValueError("too long")
                turns = [text * count for count in (least, min(least + 1, most)) for text in texts_of(items)]
                return turns if least else ["", *turns]
            case "ASSERT", (_, items):
                return ["", *texts_of(items)]
            case "ASSERT_NOT", (_, items):
                return [""] if items else []
        # All else stands for one character (a class, a dot): it is compiled by itself, and asked.
        one = compiler.compile(parser.SubPattern(tree.state, [(op, value)]), regex.flags)
        fitting = [character for character in CHARACTERS if one.fullmatch(character)]
        return [*fitting[:: max(1, len(fitting) // 8)], *fitting[-1:]]

    return texts_of(tree)


def header_values(regex: re.Pattern[str]) -> list[str] | None:
    """Header values in which the pattern is found, of all that were tried, the plainest first; None if none were."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they came when it was compiled
            texts = samples(regex)
    except Exception:  # see there
        return None
    tried = dict.fromkeys(f"{before}{text}{after}" for before in BEFORE for after in AFTER for text in texts)
    return [value for value in tried if HEADER_VALUE.fullmatch(value) and regex.search(value)]


def user_id_of(pattern: HeaderPattern, value: str) -> str:
    """The memory id that a pattern gives to a header value; "" where it gives none."""
    match = pattern.regex.search(value)
    user_id = match.expand(pattern.user_id) if match else ""
    return user_id if MEMORY_ID.fullmatch(user_id) else ""


def example_of(pattern: HeaderPattern) -> tuple[str, str] | None:
    """A header value that the pattern matches, and the memory id that it gets; None where none is known."""
    found = ((value, user_id_of(pattern, value)) for value in header_values(pattern.regex) or ())
    return min(found, key=lambda pair: (not pair[1], not pair[0]), default=None)


def pattern_warnings(mappings: Mappings) -> Iterator[Problem]:
    """A warning for each pattern that, as far as samples can tell, never decides: nothing that a header can hold
    matches it, or what does gets no memory id or goes to an earlier pattern with every text around it."""
    for index, pattern in enumerate(mappings.patterns):
        key, message = never_decides(pattern, mappings.patterns[:index], mappings.custom_header)
        if message:
            yield Problem(f"{pattern.where}.{key}", message, warning=True)


def never_decides(pattern: HeaderPattern, earlier: Sequence[HeaderPattern], custom: str | None) -> tuple[str, str]:
    """Which key of a pattern makes it useless and why, in words; both "" where it may be of use."""
    if pattern.header == custom:
        return "header", "can never match: custom_header takes every value of this header"
    values = None if UNJUDGED.search(pattern.pattern) else header_values(pattern.regex)
    if values is None:
        return "", ""
    if not values:
        return "pattern", "can never match: no value of a header can be like this"
    values = [value for value in values if user_id_of(pattern, value)]
    if not values:
        return "user_id", "can never be used: it gives no memory id for what the pattern matches"
    rivals = (other for other in earlier if other.header == pattern.header and not UNJUDGED.search(other.pattern))
    for other in rivals:
        if other.pattern != pattern.pattern and all(user_id_of(other, value) for value in values):
            return "pattern", f"can never match: {other.where.removeprefix('user_id_mappings.')} takes all of it"
    return "", ""


# ── logs and metrics ─────────────────────────────────────────────────────────────────────────────────────────────
# One line an event: readable on a terminal, else one JSON object. Every line goes through the redaction. Counters
# have one lock and bounded labels.

# What a key looks like where its value is not known: the name that leads to it is kept, the rest is not shown. What our
# guide says in the place of a key is none.
KEY_SHAPES = re.compile(
    r"""(?ix) ( \bbearer\s+
              | \b[a-z_-]{0,40}api[-_]?key (?: \\*["'] )? \s* (?: [:=] | ,\s*(?=b?["']) ) \s* (?: b? \\*["'] )?
              ) (?! anything\b | \$[A-Z] ) [^\s"',}@\\]+
            | (?<=://) [^\s/"'@]+ (?=@)
            | \bsk-[a-z0-9_-]{6,}"""
)
KEY_HINTS = ("bearer", "://", "key", "sk-")  # one of these is in every text that matches: few texts need the search
REDACTED = "[redacted]"


class Redactor:
    """Replaces secrets in texts: known ones by value, unknown ones by shape (``sk-…``, ``Bearer …``)."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in (secret, one_line(secret))}  # the log has it in one line
        longest_first = sorted(forms, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._reach = 2 * max([MAX_KEY, *map(len, longest_first)])  # twice: what is replaced brings more into view

    def __call__(self, text: str) -> str:
        """The text without its secrets."""
        if self._values:
            text = self._values.sub(REDACTED, text)
        folded = text.casefold()
        if not any(map(folded.__contains__, KEY_HINTS)):
            return text
        return KEY_SHAPES.sub(lambda match: (match[1] or "") + REDACTED, text)

    def cut(self, text: str, most: int = MAX_MESSAGE) -> str:
        """The beginning of a text of any length, at most so many characters, without its secrets or a part of one."""
        searched = text[: most + self._reach]
        clean = self(searched)
        if searched != text:  # a secret that goes on behind it was not found
            before, last, rest = clean.rpartition(REDACTED)
            clean = before + last + rest[: -self._reach]
        return clean[:most]


def within(value: Any, redact: Redact) -> Any:
    """A JSON value with its strings redacted: once it is written as JSON, a secret would look different."""
    if isinstance(value, dict):
        return {redact(str(key)): within(item, redact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [within(item, redact) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))


def timestamp(when: float | None = None) -> str:
    """A time since the Unix epoch in seconds, by default now, in UTC with milliseconds as RFC 3339 writes it."""
    second, milliseconds = divmod(int((time.time() if when is None else when) * 1000), 1000)
    return f"{date_and_time(second)}.{milliseconds:03d}Z"


@lru_cache(maxsize=2)  # of a second there are many lines
def date_and_time(second: int) -> str:
    """A whole second since the Unix epoch in UTC, as RFC 3339 writes it."""
    return datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def one_line(text: str) -> str:
    """The text without what could end or recolour a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", text)


@lru_cache(maxsize=1)
def home_core() -> int:
    """The core that this process runs on when it is first asked."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])  # proc(5): (39) processor


def stay_home() -> None:
    """Keep this thread, and all that it will start, on the `home_core`; on systems that let threads choose (Linux).

    Python runs one thread at a time, and changes it at every read and write that another one waits for. To a thread on
    another core that takes 30 to 50 µs, in which neither runs; on the same one next to nothing. Measured on 2 cores:
    with 16 clients 6,500 requests a second instead of 3,200 in binary mode, 170 instead of 110 in sdk mode.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a system without /proc, or a core that is gone
            os.sched_setaffinity(0, {home_core()})


json_text = json.JSONEncoder().encode  # of a string it is quick; `json.dumps` asks for its options first


class LogFile(RotatingFileHandler):
    """A rotated file; a disk that is full costs its lines and nothing else."""

    def handleError(self, _record: logging.LogRecord) -> None:
        """Say nothing: the standard handler prints a traceback on standard error."""


Redact = Callable[[str], str]  # takes the secrets out of a text; `str` is the one that leaves it as it is


class LogEvent(NamedTuple):
    """One event as it waits to be written; what it says of a request that has ended is formed only then."""

    time: float
    level: str
    component: str
    name: str
    fields: Mapping[str, Any]
    outcome: Outcome | None = None


class Log:
    """Writes events to one stream, a line each. Thread-safe.

    The lines are formed and written by a thread of their own, and those that nobody takes in time are dropped: neither
    the work nor a pipe that nobody reads holds up a request.

    Args:
        file: a path that gets every line too, as JSON, and is rotated.

    Attributes:
        gather: called by that thread before it writes, for events that are not formed yet.

    Raises:
        StartError: the file cannot be written.
    """

    def __init__(
        self, stream: Any, *, as_json: bool, redact: Redactor, level: int = logging.INFO, file: str | None = None
    ) -> None:
        self._stream, self._json, self.redact, self.level = stream, as_json, redact, level
        self._file: LogFile | None = None
        self._events: deque[LogEvent] = deque()
        self.gather: Callable[[], None] = lambda: None
        self._waiting = threading.Event()  # there are events
        self._dropped = 0
        if file:
            try:
                self._file = LogFile(file, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES, encoding="utf-8")
            except OSError as error:
                raise StartError(f"--log-file {file}: {error.strerror}") from None
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def event(self, level: str, component: str, event: str, *, outcome: Outcome | None = None, **fields: Any) -> None:
        """Write one event, with its fields or those of a request that has ended."""
        if getattr(logging, level) < self.level:
            return
        if len(self._events) >= MAX_LOG_LINES:
            self._dropped += 1
            return
        when = outcome.ended.at if outcome else time.time()
        self._events.append(LogEvent(when, level, component, event, fields, outcome))
        self.wake()

    def progress(self, component: str, message: str) -> contextlib.AbstractContextManager[None]:
        """Say every `PROGRESS_SECONDS`, as long as this lasts, that time goes by."""
        said = partial(self.event, "INFO", component, "starting")
        return meanwhile(PROGRESS_SECONDS, lambda passed: said(message=f"{message} ({passed} s)"))

    def wake(self) -> None:
        """There are events."""
        if not self._waiting.is_set():  # waking a thread costs more than an event
            self._waiting.set()

    def _write(self) -> None:
        """The writing thread."""
        stay_home()
        while self._waiting.wait():
            self._waiting.clear()
            try:
                self.gather()
            except Exception as error:  # a defect of ours must not end the log
                said = self.redact.cut(repr(error), MAX_LOGGED)
                self.event("ERROR", "log", "defect", error=said, where=where_raised(error))
            events = list(self._events)
            if self._file:
                for line in self._lines(events, event_as_json):
                    self._file.handle(logging.makeLogRecord({"msg": line}))
            dropped, self._dropped = self._dropped, 0
            lines = self._lines(events, event_as_json if self._json else event_readable)
            try:
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()
            except (OSError, ValueError):  # whoever read our output is gone; the proxy goes on
                pass
            for _ in events:  # only now: `flush` waits for them
                self._events.popleft()
            if dropped:
                self.event("WARNING", "log", "dropped", message=f"{dropped} lines that nobody read in time are lost")
            time.sleep(LOG_PAUSE_SECONDS)

    def flush(self, seconds: float = LOG_FLUSH_SECONDS) -> None:
        """Wait until every line is written, or for this long."""
        self.gather()
        deadline = time.monotonic() + seconds
        while self._events and time.monotonic() < deadline:
            time.sleep(0.005)

    def _lines(self, events: Sequence[LogEvent], form: Callable[[LogEvent, Redact], str]) -> list[str]:
        """A line for each event, without secrets."""
        lines = [form(event, str) for event in events]
        text = "\n".join(lines)
        # Without a backslash, JSON has every text as it is. Few lines have one, or a secret: all are searched at once.
        if "\\" in text or self.redact(text) != text:
            lines = [form(event, self.redact) for event in events]
        return lines


@contextlib.contextmanager
def meanwhile(every: float, remind: Callable[[int], None]) -> Iterator[None]:
    """Call this every so many seconds, as long as something lasts, from a thread; it gets the seconds that passed."""
    began, over = time.monotonic(), threading.Event()

    def wait() -> None:
        while not over.wait(every):
            remind(int(time.monotonic() - began))

    reminder = threading.Thread(target=wait, name="progress", daemon=True)
    reminder.start()
    try:
        yield
    finally:
        over.set()
        reminder.join()


def event_as_json(event: LogEvent, redact: Redact) -> str:
    """An event as a JSON object."""
    head = f'{{"timestamp": "{timestamp(event.time)}", "level": "{event.level}"'
    if event.outcome:
        return f'{head}, "component": "{event.component}", "event": "{event.name}", {event.outcome.as_json(redact)}}}'
    fields = within({"component": event.component, "event": event.name, **event.fields}, redact)
    return f"{head}, {json.dumps(fields)[1:]}"


def event_readable(event: LogEvent, redact: Redact) -> str:
    """An event for a person at a terminal."""
    if event.outcome:
        text = event.outcome.readable()
    else:
        known = {key: value for key, value in event.fields.items() if value is not None}
        message = known.pop("message", event.name)
        text = " ".join([f"{event.component}: {message}", *(f"{k}={v}" for k, v in known.items())])
    line = f"{datetime.fromtimestamp(event.time):%H:%M:%S} {event.level.lower():<8} {text}"
    return redact(one_line(line.encode("utf-8", "replace").decode()))


class LoggingHandler(logging.Handler):
    """Brings the records of Python's logging (LiteLLM, asyncio) into our log: one line each, no traceback.

    LiteLLM's quote what a provider has sent, be it megabytes: to redact all of it would stop everything for seconds.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage().partition("Traceback (most recent call last)")[0]
        except (TypeError, ValueError):  # arguments that do not fit: the library's mistake must not fail its call
            text = str(record.msg)
        level = logging.getLevelName(min(record.levelno // 10 * 10, logging.CRITICAL))  # there may be levels of its own
        self._log.event(level, record.name, "message", message=" ".join(self._log.redact.cut(text).split()))


def take_in_logging(log: Log) -> None:
    """Bring what libraries say by Python's logging and warnings into our log: it would stand beside it otherwise.

    So would the traceback of an exception that nobody can catch. A call of LiteLLM's that was cancelled as it began
    brings one where the garbage collector comes upon it in the midst of making a named tuple: KeyError '__import__'.
    """
    logging.getLogger().addHandler(LoggingHandler(log))
    logging.captureWarnings(True)
    sys.unraisablehook = lambda it: log.event("DEBUG", "python", "ignored", message=f"{it.object!r}: {it.exc_value!r}")


class Usage(NamedTuple):
    """What one call consumed: tokens in and out, and LiteLLM's figure of its cost; None where nobody said."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None

    @property
    def tokens(self) -> int | None:
        """Both together."""
        known = [count for count in self[:2] if count is not None]
        return sum(known) if known else None


@dataclass
class Tally:
    """What a backend learns of an answer while it goes out.

    Args:
        price: LiteLLM's cost in US dollars of a usage object, or None; asked where there is no ``known_cost``. What it
            raises means None: the request is counted all the same, and those that have ended beside it.
        hidden: the client did not ask for the usage, and is not shown it.
        error_status: of the error that ended a stream whose head was out.
        events: of a response's stream, so far.
    """

    price: Callable[[Mapping[str, Any]], float | None] = lambda _: None
    known_cost: float | None = None
    hidden: bool = False
    error_status: int | None = None
    events: int = 0
    _counted: dict[str, Any] = field(default_factory=dict)

    def add(self, usage: Any) -> None:
        """Take in a usage object of any dialect, as LiteLLM's class or as a dict; later figures win.

        It is a provider's word: what is no sensible figure is left out.
        """
        figures = usage.model_dump() if hasattr(usage, "model_dump") else usage
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if not str(name).endswith("_tokens") or (type(value) in (int, float) and 0 <= value < MAX_TOKENS):
                self._counted[str(name)] = value

    def usage(self) -> Usage:
        """The figures so far. Anthropic counts cached input tokens beside the others, OpenAI among them."""
        counted = {name: value for name, value in self._counted.items() if value is not None}
        if not counted:
            return Usage(cost_usd=self.known_cost)
        cached = sum(int(counted.get(f"cache_{kind}_input_tokens") or 0) for kind in ("read", "creation"))
        given = counted.get("prompt_tokens")
        tokens_in = given if given is not None else int(counted.get("input_tokens") or 0) + cached
        tokens_out = counted.get("completion_tokens", counted.get("output_tokens", 0))
        cost = self.known_cost
        if cost is None:
            with contextlib.suppress(Exception):  # LiteLLM's way of saying that it does not know the model
                cost = self.price(counted)
        return Usage(int(tokens_in), int(tokens_out or 0), cost)


NO_USAGE = Usage()


class Ended(NamedTuple):
    """A request that has ended, as its thread leaves it: what is said of it is worked out when no client waits.

    ``status`` is 499 where the client left; ``seconds`` and ``ttft`` (time to the first byte of the answer's body)
    count from the request's head, ``at`` from the Unix epoch; ``method`` is "" where the request could not be read.
    """

    at: float
    user_id: str
    model: str
    backend: str
    status: int
    seconds: float
    ttft: float | None = None
    request_id: str = ""
    method: str = ""
    path: str = ""


class Outcome(NamedTuple):
    """What log and metrics say of a request that has ended; names are as they may be shown."""

    ended: Ended
    user_id: str
    model: str
    usage: Usage = NO_USAGE
    memory_error: str | None = None

    def as_json(self, redact: Redact) -> str:
        """What stands in its log line as JSON: written out, since the encoder takes three times as long."""

        def text(value: str | None) -> str:
            return "null" if value is None else json_text(redact(value))

        def number(value: float | None) -> str:
            return "null" if value is None else str(value)

        ended, usage = self.ended, self.usage
        return (
            f'"request_id": {text(ended.request_id)}, '
            f'"user_id": {text(None if self.user_id == NONE else self.user_id)}, '
            f'"model": {text(None if self.model == NONE else self.model)}, '
            f'"backend": "{ended.backend}", "status": {ended.status}, '
            f'"method": {text(ended.method)}, "path": {text(ended.path)}, '
            f'"duration_ms": {round(ended.seconds * 1000, 1)}, '
            f'"ttft_ms": {number(None if ended.ttft is None else round(ended.ttft * 1000, 1))}, '
            f'"tokens": {number(usage.tokens)}, "input_tokens": {number(usage.input_tokens)}, '
            f'"output_tokens": {number(usage.output_tokens)}, "cost_usd": {number(usage.cost_usd)}, '
            f'"memory_error": {text(self.memory_error)}'
        )

    def readable(self) -> str:
        """Its log line for a person at a terminal; method and path stand for the model where none is known."""
        ended, usage = self.ended, self.usage
        streamed = ended.ttft is not None and ended.seconds - ended.ttft > 0.05  # less is the sending of a whole answer
        parts = (
            self.user_id,
            f"{ended.method} {ended.path}" if self.model == NONE else self.model,
            ended.backend,
            "client left" if ended.status == 499 else str(ended.status),
            f"{usage.input_tokens}+{usage.output_tokens} tokens" if usage.tokens is not None else "",
            f"{ended.seconds:.2f} s" + (f" (first byte after {ended.ttft:.2f} s)" if streamed else ""),
            f"id={ended.request_id}",
        )
        return "  ".join(part for part in parts if part)


def name_shown(name: str, redact: Redactor) -> str:
    """A memory id or a model's name as log and metrics show it."""
    return redact.cut(name.encode("utf-8", "replace").decode(), MAX_MODEL) or NONE


# What an answer's header fields tell beside the answer: the memory service of itself, with a prefix where LiteLLM's
# server passes it on; the server of the cost, where the prefix would make it that of another server behind it.
TOLD = re.compile(r"(?i)\r\n(?:llm_provider-(?=x-supermemory))?(x-supermemory-[^:]*|x-litellm-response-cost):([^\r]*)")


def stated_cost(text: str) -> float | None:
    """What LiteLLM's server says that a call cost, in US dollars; for streams it does not know yet."""
    try:
        cost = float(text)
    except ValueError:
        return None
    return cost if 0 < cost < MAX_COST else None


ERROR_KINDS = {  # status → kind, in the metrics; LiteLLM's and OpenAI's names where they have one
    400: "invalid_request",
    401: "authentication",
    403: "permission",
    404: "not_found",
    408: "slow_request",
    413: "request_too_large",
    429: "rate_limit",
    499: "client_gone",
    500: "internal",
    502: "connection",
    503: "unavailable",
    504: "timeout",
    529: "overloaded",
}

# Metric → its type and what it counts. In /metrics each name is prefixed with memory_proxy_, but for process_*.
FAMILIES = {
    "requests_total": ("counter", "Requests answered, by memory id, model, backend and status class."),
    "requests_in_flight": ("gauge", "Requests being served."),
    "request_duration_seconds": ("histogram", "From the request's head to the end of its answer."),
    "time_to_first_token_seconds": ("histogram", "From the request's head to the first byte of its answer's body."),
    "recent_duration_seconds": ("gauge", "Percentiles of the request duration over the last 10 minutes."),
    "recent_time_to_first_token_seconds": ("gauge", "Percentiles of the time to first token, last 10 minutes."),
    "tokens_total": ("counter", "Tokens in and out, where the answer said how many."),
    "cost_usd_total": ("counter", "Cost in US dollars, by LiteLLM's price list."),
    "errors_total": ("counter", "Requests that ended in an error, by kind."),
    "memory_errors_total": ("counter", "Answers without memory: the memory service failed (x-supermemory-error)."),
    "memory_degraded": ("gauge", "1 where the last answer of the memory service was such a failure."),
    "circuit_breaker_state": ("gauge", "0 closed, 1 half open, 2 open."),
    "circuit_breaker_trips_total": ("counter", "How often the circuit breaker has opened."),
    "cookies": ("gauge", "Cookies in the session's jar."),
    "pool_connections": ("gauge", "Connections to the LiteLLM server."),
    "litellm_server_restarts_total": ("counter", "How often the LiteLLM server had to be started again."),
    "client_connections": ("gauge", "Client connections that are open."),
    "process_cpu_seconds_total": ("counter", "User and system CPU time in seconds."),
    "process_resident_memory_bytes": ("gauge", "Resident memory size in bytes."),
    "process_open_fds": ("gauge", "Number of open file descriptors."),
    "process_start_time_seconds": ("gauge", "Start time of the process since the Unix epoch in seconds."),
}
LABELS = {  # of the metrics that are counted
    "requests_total": ("user_id", "model", "backend", "status"),
    "tokens_total": ("user_id", "model", "backend", "direction"),
    "cost_usd_total": ("user_id", "model", "backend"),
    "errors_total": ("kind",),
    "memory_errors_total": (),
}
BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
PERCENTILES = (50, 95, 99)

Labels = tuple[tuple[str, str], ...]
Figures = dict[str, dict[Labels, float]]  # metric → labels → value


class Histogram:
    """Counts of durations by `BUCKETS`, and the durations of the last ten minutes themselves."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0
        # A ring of (when, duration): it takes 160 KB at once, where a queue of as many tuples would grow to 1.3 MB.
        self._when = array("d", [-math.inf]) * MAX_DURATIONS
        self._durations = array("d", [0.0]) * MAX_DURATIONS
        self._next = 0

    def add(self, seconds: float, when: float) -> None:
        """Take in a duration that ended at this time of the monotonic clock."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds
        self._when[self._next], self._durations[self._next] = when, seconds
        self._next = (self._next + 1) % MAX_DURATIONS

    def recent(self) -> list[float]:
        """The durations of the last `WINDOW_SECONDS`, sorted."""
        since = time.monotonic() - WINDOW_SECONDS
        return sorted(seconds for at, seconds in zip(self._when, self._durations, strict=True) if at >= since)


def percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The nearest-rank percentile of sorted values; None of none."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None


class Metrics:
    """What was served and how it went; one lock, at most `MAX_LABELS` memory ids and models.

    Requests that have ended are counted and logged by the log's thread, or by who asks for the figures: one behind the
    other they take a third of what each takes alone, between two requests, and no client waits for it.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._lock = log, threading.Lock()
        self._counts: defaultdict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)  # by the values of `LABELS`
        self._histograms = {name: Histogram() for name, (kind, _) in FAMILIES.items() if kind == "histogram"}
        self._known: dict[str, set[str]] = {"user_id": set(), "model": set()}
        self._running: deque[None] = deque()  # as long as there are requests under way; it needs no lock
        self._ended: deque[tuple[Ended, Tally | None, str]] = deque()
        self._shown = lru_cache(maxsize=4 * MAX_LABELS)(lambda name: name_shown(name, log.redact))
        self._started = time.time()
        self._memory_failed = False
        self.sources: list[Callable[[], Figures]] = []  # figures that others keep, read when somebody asks
        log.gather = self.settle

    def begin(self) -> None:
        """A request has begun."""
        self._running.append(None)

    def end(self, ended: Ended, tally: Tally | None = None, lines: str = "") -> None:
        """A request that had begun has ended; its answer has told this, and had these lines of header fields."""
        self._running.pop()
        self._ended.append((ended, tally, lines))
        if len(self._ended) < SETTLED_AT_ONCE:
            self._log.wake()
        else:  # the log's thread is held up
            self.settle()

    def settle(self) -> None:
        """Count and log the requests that have ended."""
        with self._lock:
            outcomes = [self._outcome(*self._ended.popleft()) for _ in range(len(self._ended))]
            self._count_requests(outcomes)
            for outcome in outcomes:  # under the lock, so that `Log.flush` waits for them, and they keep their order
                quiet = outcome.ended.backend == OWN and outcome.ended.status < 400
                name = "client_gone" if outcome.ended.status == 499 else "answered"
                if outcome.ended.method:  # what could not be read has been logged as refused
                    self._log.event("DEBUG" if quiet else "INFO", "request", name, outcome=outcome)

    def _outcome(self, ended: Ended, tally: Tally | None, lines: str) -> Outcome:
        """What is to be said of a request; the memory service has perhaps shown itself in its answer's headers."""
        told = {name.lower(): value.strip(" \t") for name, value in TOLD.findall(lines)}
        cost = stated_cost(told.pop("x-litellm-response-cost", "0"))
        error = told.get("x-supermemory-error")
        if told:
            self._memory_failed = error is not None
            self._count("memory_errors_total", int(self._memory_failed))
        usage = tally.usage() if tally else Usage(cost_usd=cost)
        if len(ended.path) > MAX_LOGGED:
            ended = ended._replace(path=self._log.redact.cut(ended.path, MAX_LOGGED))
        return Outcome(ended, self._shown(ended.user_id), self._shown(ended.model), usage, error)

    def _count_requests(self, outcomes: Sequence[Outcome]) -> None:
        alike = Counter((each.user_id, each.model, each.ended.backend, each.ended.status) for each in outcomes)
        for (user_id, model, backend, status), number in alike.items():
            side = (self._bounded("user_id", user_id), self._bounded("model", model), backend)
            self._count("requests_total", number, *side, f"{status // 100}xx")
            if status >= 400:
                self._count("errors_total", number, ERROR_KINDS.get(status, f"http_{status // 100}xx"))
        now = time.monotonic()
        for ended, user_id, model, usage, _ in outcomes:
            if usage != NO_USAGE:
                side = (self._bounded("user_id", user_id), self._bounded("model", model), ended.backend)
                self._count("tokens_total", usage.input_tokens, *side, "in")
                self._count("tokens_total", usage.output_tokens, *side, "out")
                self._count("cost_usd_total", usage.cost_usd, *side)
            if ended.backend != OWN:
                self._histograms["request_duration_seconds"].add(ended.seconds, now)
                if ended.ttft is not None:
                    self._histograms["time_to_first_token_seconds"].add(ended.ttft, now)

    @property
    def memory_degraded(self) -> bool:
        """Whether the last answer of the memory service was a failure."""
        self.settle()
        return self._memory_failed

    def _bounded(self, name: str, value: str) -> str:
        """The value of a label, or ``other`` where it would be one too many."""
        known = self._known[name]
        if value not in known and len(known) >= MAX_LABELS:
            return "other"
        known.add(value)
        return value

    def _count(self, name: str, amount: float | None, *values: str) -> None:
        if amount is not None:
            self._counts[name][values] += amount  # type: ignore[assignment]

    def samples(self) -> Figures:
        """Every figure but the histograms'."""
        self.settle()
        with self._lock:
            found: Figures = {
                name: {tuple(zip(LABELS[name], values, strict=True)): count for values, count in counts.items()}
                for name, counts in self._counts.items()
            }
            recent = {name: histogram.recent() for name, histogram in self._histograms.items()}
            found["requests_in_flight"] = {(): len(self._running)}
            found["memory_degraded"] = {(): int(self._memory_failed)}
        for name, ordered in recent.items():
            values = ((("percentile", f"p{p}"), percentile(ordered, p)) for p in PERCENTILES)
            family = "recent_" + name.removeprefix("request_")
            found[family] = {(label,): value for label, value in values if value is not None}
        for source in self.sources:
            for name, rows in source().items():
                found.setdefault(name, {}).update(rows)
        found["process_start_time_seconds"] = {(): round(self._started, 3)}
        found.update({name: {(): value} for name, value in process_figures().items()})
        return found

    def snapshot(self) -> dict[str, Any]:
        """As JSON: metric → its value, or a list of rows with ``value`` and a key for each label."""
        figures: dict[str, Any] = {
            name: rows[()] if () in rows else [{**dict(labels), "value": value} for labels, value in rows.items()]
            for name, rows in self.samples().items()
        }
        with self._lock:
            for name, histogram in self._histograms.items():
                figures[name] = {"count": sum(histogram.counts), "sum": round(histogram.sum, 6)}
        return figures

    def prometheus(self) -> str:
        """In Prometheus' text exposition format 0.0.4."""
        samples = self.samples()
        with self._lock:
            for name, histogram in self._histograms.items():
                samples.update(histogram_samples(name, histogram))
        lines = []
        for family, (kind, help_text) in FAMILIES.items():
            name = family if family.startswith("process_") else f"memory_proxy_{family}"
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            rows = [(name + suffix, samples.get(family + suffix, {})) for suffix in suffixes]
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            lines += [sample_line(full, labels, value) for full, values in rows for labels, value in values.items()]
        return "\n".join(lines) + "\n"


def histogram_samples(name: str, histogram: Histogram) -> Figures:
    """A histogram as Prometheus wants it: the buckets cumulative, with their upper bounds."""
    bounds = (*(f"{bound:g}" for bound in BUCKETS), "+Inf")
    cumulative = accumulate(histogram.counts)
    return {
        f"{name}_bucket": {(("le", bound),): count for bound, count in zip(bounds, cumulative, strict=True)},
        f"{name}_sum": {(): histogram.sum},
        f"{name}_count": {(): sum(histogram.counts)},
    }


def sample_line(name: str, labels: Labels, value: float) -> str:
    """One line of Prometheus' text format."""
    escaped = ((key, text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, text in labels)
    within = ",".join(f'{key}="{text}"' for key, text in escaped)
    return f"{name}{{{within}}} {value}" if within else f"{name} {value}"


def process_figures() -> dict[str, float]:
    """What Prometheus' own clients tell of every process; what this system does not tell is left out."""
    figures: dict[str, float] = {"process_cpu_seconds_total": round(time.process_time(), 3)}
    with contextlib.suppress(OSError):
        figures["process_open_fds"] = sum(1 for _ in Path("/dev/fd").iterdir())
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        figures["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the most that it has been, in KiB or, on macOS, in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        figures["process_resident_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return figures


def where_raised(error: BaseException) -> str:
    """File and line of an exception, innermost last: a traceback that fits a log line."""
    frames = walk_tb(error.__traceback__)
    return " > ".join(f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in frames)


def defect(error: Exception, request_id: str, log: Log) -> ProxyError:
    """An exception that should not have been: the log gets what we need to mend it, the client a clean answer."""
    said = log.redact.cut(repr(error), MAX_LOGGED)
    log.event("ERROR", "application", "defect", request_id=request_id, error=said, where=where_raised(error))
    return ProxyError(500, "the proxy failed on this request; its log says how", blame=BACKEND)


# ── circuit breaker ──────────────────────────────────────────────────────────────────────────────────────────────
# Whether a backend that has failed is worth another try. The clock is handed in; it knows neither HTTP nor what it
# guards.


class State(enum.IntEnum):
    """Of a circuit breaker; the numbers are those of the metrics."""

    CLOSED = 0  # every request tries, until too many in a row have failed: OPEN
    HALF_OPEN = 1  # one request tries, and the state follows what it shows: CLOSED or OPEN
    OPEN = 2  # none does, until the time to wait is over: HALF_OPEN; a try out of turn that works: CLOSED


class CircuitBreaker:
    """Counts failures in a row, and lets nobody try for a while once there are too many. Thread-safe.

    Args:
        on_change: called with the old and the new state, outside the lock.
        clock: seconds, of any epoch.
    """

    def __init__(
        self, on_change: Callable[[State, State], None] = lambda *_: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_change, self._clock, self._lock = on_change, clock, threading.Lock()
        self._threshold, self._reset_seconds = FAILURE_THRESHOLD, RESET_SECONDS
        self.state = State.CLOSED
        self.failures = self.trips = 0
        self._epoch = 0  # grows with each change: what was begun in an earlier state counts no more
        self._opened = 0.0
        self._probing = False

    def configure(self, threshold: int, reset_seconds: float) -> None:
        """Set how many failures in a row open it, and how long it then waits before a try."""
        self._threshold, self._reset_seconds = threshold, reset_seconds

    def ticket(self, *, out_of_turn: bool = False) -> int | None:
        """For one try, to be given back with `report`; None where there is to be none, unless it is out of turn."""
        changed = None
        with self._lock:
            if self.state is State.OPEN and self._clock() - self._opened >= self._reset_seconds:
                changed = self._enter(State.HALF_OPEN)
            granted = self.state is State.CLOSED or (self.state is State.HALF_OPEN and not self._probing)
            self._probing |= granted and self.state is State.HALF_OPEN
            ticket = self._epoch if granted or out_of_turn else None
        if changed:
            self._on_change(*changed)
        return ticket

    def report(self, ticket: int | None, worked: bool | None) -> None:
        """A try has ended: it worked, it failed, or (None) it has shown neither."""
        changed = None
        with self._lock:
            if ticket != self._epoch:
                return
            self._probing = False
            if worked is None:
                return
            self.failures = 0 if worked else self.failures + 1
            if worked:
                changed = self._enter(State.CLOSED)
            elif self.state is State.HALF_OPEN or self.failures >= self._threshold:
                changed = self._enter(State.OPEN)
        if changed:
            self._on_change(*changed)

    def _enter(self, new: State) -> tuple[State, State] | None:
        old = self.state
        if new is old:
            return None
        self.state, self._epoch, self._probing = new, self._epoch + 1, False
        if new is State.OPEN:
            self._opened = self._clock()
            self.trips += old is State.CLOSED
        return old, new


# ── wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# HTTP/1.1 as bytes: requests, answers, header fields, message framing (RFC 9110, RFC 9112), server-sent events.
# Both sides use it, the front towards the client and the binary backend towards LiteLLM's server. What a lenient
# parser would guess at is refused here, since a second parser behind us might guess otherwise (request smuggling).

REQUEST_LINE = re.compile(rf"({FIELD_NAME.pattern}) ([\x21-\x7e\x80-\xff]+) HTTP/(\d)\.(\d)")
BASE_URL = re.compile(r"(?i)https?://[\x21-\x7e]+")
ABSOLUTE_TARGET = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)(/[^?#]*)?(\?[^#]*)?")
FIELD_LINES = re.compile(rf"(?:\r\n{FIELD_NAME.pattern}:[\t\x20-\x7e\x80-\xff]*)*")  # each behind its line break
FIELD = re.compile(r"\r\n([^:]+):([^\r]*)")  # of lines that `FIELD_LINES` has accepted
ANSWER_HEAD = re.compile(rf"HTTP/1\.([01]) ([1-9]\d\d)(?: ([\t\x20-\x7e\x80-\xff]*))?({FIELD_LINES.pattern})")
LENGTH_DIGITS = re.compile(rb"\r\ncontent-length:[\t ]*([0-9]{1,15})[\t ]*(?![^\r])", re.I)
LENGTH = re.compile("[0-9]{1,15}")  # Python refuses to read a number of more than 4,300 digits
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
BARE_LF = re.compile(rb"\n(?<!\r\n)")  # begins with a byte that can be searched for: 70 times faster
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

# RFC 9110 §7.6.1, with the two that older software still sends.
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    "transfer-encoding upgrade".split()
)
# What no Connection header can make hop-by-hop: without them a body would be taken for another request.
END_TO_END = frozenset("content-length content-type content-encoding host".split())
OURS = frozenset(["x-request-id", "x-proxy-backend"])  # of an answer that is passed on: the front's own stand there
# The fields of an answer that are not passed on as they are; what surrounds them is.
MINDED = re.compile(rf"(?i)\r\n({'|'.join(sorted(HOP_BY_HOP | OURS | {'content-length'}))}):([^\r]*)")
NO_BODY_STATUS = (204, 304)
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
BODILESS = 0  # framings besides a length in bytes
CHUNKED = -1
UNTIL_CLOSE = -2
BY_DIGITS = -3  # a length, which is not in what is remembered of the head


class Headers:
    """Header fields in the order they came, with their case and their duplicates; looked up in any case.

    Attributes:
        named: the values by name in lower case.
    """

    __slots__ = ("fields", "named")

    def __init__(self, fields: Iterable[tuple[str, str]]) -> None:
        self.fields = tuple(fields)
        self.named: dict[str, list[str]] = {}
        for name, value in self.fields:
            self.named.setdefault(name.lower(), []).append(value)

    @classmethod
    def parse(cls, lines: str) -> Headers:
        """From lines that `FIELD_LINES` has accepted."""
        return cls([(name, value.strip(" \t")) for name, value in FIELD.findall(lines)])

    @classmethod
    def mind(cls, lines: str) -> tuple[str, Headers]:
        """Of such lines, those that a proxy passes on, and the other fields: the hop-by-hop ones, ours, the length."""
        parts = MINDED.split(lines)
        fields = zip(parts[1::3], parts[2::3], strict=True)
        passed_on, minded = "".join(parts[::3]), cls([(name, value.strip(" \t")) for name, value in fields])
        if "connection" in minded.named:
            named = frozenset(minded.tokens("connection")) - HOP_BY_HOP - END_TO_END - {"close"}
            passed_on = field_lines(cls.parse(passed_on).end_to_end(named)) if named else passed_on
        return passed_on, minded

    def values(self, name: str) -> list[str]:
        """Every value of the fields of this (lower-case) name, in order."""
        return self.named.get(name, [])

    def get(self, name: str, default: str = "") -> str:
        """The values of this (lower-case) name as one list-valued field (RFC 9110 §5.3)."""
        return ", ".join(self.named[name]) if name in self.named else default

    def tokens(self, name: str) -> list[str]:
        """The comma-separated members of a field, in lower case."""
        if name not in self.named:
            return []
        return [token.strip(" \t").lower() for token in self.get(name).split(",") if token.strip(" \t")]

    def end_to_end(self, dropped: frozenset[str] = HOP_BY_HOP) -> list[tuple[str, str]]:
        """The fields that a proxy passes on: none of these (lower-case) names, nor what Connection makes hop-by-hop."""
        if "connection" in self.named:
            dropped |= set(self.tokens("connection")) - END_TO_END
        return [field for field in self.fields if field[0].lower() not in dropped]


def upgrades(headers: Headers) -> bool:
    """Whether a message asks for, or agrees to, a WebSocket on its connection (RFC 9110 §7.8).

    Other protocols are not offered here, and who asks for one (Java's own client wants HTTP/2) goes on without it.
    """
    return "upgrade" in headers.tokens("connection") and headers.tokens("upgrade") == ["websocket"]


class Peer(Protocol):
    """The client's end, as far as a backend may know it: present or gone, and able to take more of an answer."""

    def fileno(self) -> int:
        """The descriptor that becomes readable when the client goes away (or sends its next request)."""

    def state(self) -> str:
        """``"gone"``, ``"quiet"``, or ``"talking"`` where its next request is already there to read."""

    def interim(self, status: int, headers: Headers) -> None:
        """Send an interim response (RFC 9110 §15.2)."""

    def write_now(self, data: bytes) -> bytes | None:
        """Send the next piece of a body that the front has begun to write, without waiting.

        Returns None where all of it went out, else what the body's iterator has to give to the front: that writes the
        rest. Only for one who knows that the front waits for the next piece, and has written all that it got.
        """


class Body(Protocol):
    """A request body, read from the client when it is asked for and not before."""

    framing: int
    limit: int

    def read(self) -> bytes:
        """All of it; a second call gives the same bytes."""

    def pieces(self) -> Iterator[bytes]:
        """Its bytes as they come in."""


@dataclass(frozen=True, eq=False)
class Head:
    """A request's head, and what follows from it alone.

    From request to request a client's heads are the same, but for the length of the body. So they are parsed without it
    and remembered (`parse_head`), and others remember, by this very object, what they make of one.

    Args:
        target: in origin form, as the client sent it.
        framing: of the body, as `request_framing` says.
    """

    method: str
    target: str
    minor_version: int
    headers: Headers
    framing: int

    @cached_property
    def path(self) -> str:
        """The path of the target, percent-encoded as sent."""
        return self.target.partition("?")[0]

    @cached_property
    def is_form(self) -> bool:
        """Whether the body is a form, such as an upload, and not JSON."""
        given = self.headers.values("content-type")
        return len(given) == 1 and given[0].partition(";")[0].strip().lower() in FORM_TYPES

    @cached_property
    def request_id(self) -> str:
        """The client's ``x-request-id`` where it is one visible token, else ""."""
        given = self.headers.values("x-request-id")
        return given[0] if len(given) == 1 and REQUEST_ID.fullmatch(given[0]) else ""

    @cached_property
    def closes(self) -> bool:
        """Whether the client closes its connection after this request (RFC 9112 §9.3)."""
        wanted = self.headers.tokens("connection")
        return "close" in wanted or (self.minor_version == 0 and "keep-alive" not in wanted)

    @cached_property
    def expects_continue(self) -> bool:
        """Whether the client waits for a 100 before it sends the body; raises ProxyError 417 for any other wait."""
        expects = self.headers.tokens("expect")
        if expects and expects != ["100-continue"]:
            raise ProxyError(417, "Expect can only be 100-continue")
        return bool(expects)


@dataclass
class Request:
    """One request as it came in; ``model`` is the one that the body names, once a backend has read it."""

    head: Head
    body: Body
    peer: Peer
    id: str = ""
    model: str = ""

    @property
    def method(self) -> str:
        """``GET``, ``POST``, …"""
        return self.head.method

    @property
    def path(self) -> str:
        """The path of the target, percent-encoded as sent."""
        return self.head.path

    @property
    def headers(self) -> Headers:
        """The header fields."""
        return self.head.headers

    @property
    def dialect(self) -> str:
        """The one in which the client gets an error, see `dialect_of`."""
        return dialect_of(self.path, anthropic="anthropic-version" in self.headers.named)

    @property
    def query(self) -> dict[str, str]:
        """The parameters of the target's query; of a name that stands twice, the last."""
        return dict(parse_qsl(self.head.target.partition("?")[2], keep_blank_values=True))


@dataclass
class Response:
    """One answer on its way to the client.

    Args:
        passed_on: the lines of further header fields, as they came, each behind its CRLF.
        body: the bytes, or an iterator over them as they arrive; the front calls its ``close()`` at the end.
        length: of a streamed body, in bytes, where it is known.
        tunnel: of a 101, takes over the client's socket: sends the head, and what was read from the client too far
            the other way, and returns when either side has closed.
        bodiless: it has no body by its nature (HEAD, 204, 304), and its fields say all about its length.
        tally: what becomes known of it on the way.
        backend: the name of the one that answered, where it is not the one that was asked.
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | Iterator[bytes] = b""
    length: int | None = None
    reason: str | None = None
    passed_on: str = ""
    tunnel: Callable[[socket.socket, bytes, bytes], None] | None = None
    bodiless: bool = False
    tally: Tally | None = None
    backend: str | None = None

    def lines(self) -> str:
        """Its header fields, each behind its CRLF."""
        return self.passed_on + field_lines(self.headers)

    def discard(self) -> None:
        """Let go of an answer that nobody is to get."""
        if not isinstance(self.body, bytes):
            self.body.close()  # type: ignore[attr-defined]


JSON_CONTENT = ("Content-Type", "application/json")


def json_response(status: int, document: Any, headers: Iterable[tuple[str, str]] = ()) -> Response:
    """An answer with a JSON body."""
    return Response(status, [JSON_CONTENT, *headers], json.dumps(document).encode())


def parse_fields(lines: str) -> Headers:
    """Header fields from their lines, each behind a CRLF.

    Raises:
        ProxyError: 400 for anything outside RFC 9112 §5 (space before the colon, folding, control characters), 431.
    """
    if not FIELD_LINES.fullmatch(lines):
        raise ProxyError(400, "the request has a malformed header line")
    headers = Headers.parse(lines)
    if len(headers.fields) > MAX_HEADER_FIELDS:
        raise ProxyError(431, f"the request has more than {MAX_HEADER_FIELDS} header fields")
    return headers


def request_head(data: bytes) -> tuple[Head, int]:
    """A request's head from its bytes without the final empty line, and its body's length in bytes, or `CHUNKED`.

    Raises:
        ProxyError: 400 for a malformed head, 505 for another HTTP version, 431 for too many fields.
    """
    found = LENGTH_DIGITS.search(data)
    if found is None:
        head = parse_head(data)
        if head.framing == BY_DIGITS:
            raise bad_length()
        return head, head.framing
    begin, end = found.span(1)
    return parse_head(data[:begin] + data[end:]), int(data[begin:end])


@lru_cache(maxsize=REMEMBERED_HEADS)
def parse_head(head: bytes) -> Head:
    """See `request_head`; the digits of the Content-Length are not there."""
    text = head.decode("latin-1")
    line = text.partition("\r\n")[0]
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise ProxyError(400, "the request line is malformed")
    method, target, major, minor = match.groups()
    if major != "1":
        raise ProxyError(505, f"HTTP/{major}.{minor} is not spoken here, HTTP/1.1 is")
    headers = parse_fields(text[len(line) :])
    if len(headers.values("host")) != 1 and not (minor == "0" and not headers.values("host")):
        raise ProxyError(400, "the request must have exactly one Host header")
    absolute = ABSOLUTE_TARGET.fullmatch(target)
    if absolute:  # RFC 9112 §3.2.2: its host counts, whatever the Host header says
        target = (absolute[2] or "/") + (absolute[3] or "")
        headers = Headers((name, absolute[1] if name.lower() == "host" else value) for name, value in headers.fields)
    if method == "CONNECT":
        raise ProxyError(405, "CONNECT is refused: this is no tunnel", headers=[("Allow", "GET, HEAD, POST")])
    if not target.startswith("/") and target != "*":
        raise ProxyError(400, "the request target must be a path")
    return Head(method, target, int(minor), headers, request_framing(headers, int(minor)))


def request_framing(headers: Headers, minor_version: int) -> int:
    """The framing of a request body (RFC 9112 §6): `BODILESS`, `CHUNKED`, or `BY_DIGITS`.

    Raises:
        ProxyError: 400 where two parsers could disagree on where the body ends.
    """
    lengths, codings = headers.values("content-length"), headers.tokens("transfer-encoding")
    if codings:
        if lengths or codings != ["chunked"] or minor_version == 0:
            raise ProxyError(400, "Transfer-Encoding must be chunked, on HTTP/1.1, without a Content-Length")
        return CHUNKED
    if headers.values("transfer-encoding"):
        raise ProxyError(400, "Transfer-Encoding is empty")
    if not lengths:
        return BODILESS
    if lengths != [""]:
        raise bad_length()
    return BY_DIGITS


def bad_length() -> ProxyError:
    """The 400 of a Content-Length that is no number, or not the only one."""
    return ProxyError(400, "Content-Length must be one decimal number")


def response_framing(method: str, status: int, headers: Headers) -> int:
    """The framing of an answer's body (RFC 9112 §6.3): a length, `CHUNKED` or `UNTIL_CLOSE`."""
    if method == "HEAD" or status in NO_BODY_STATUS or status < 200:
        return BODILESS
    if "transfer-encoding" in headers.named:
        if headers.tokens("transfer-encoding") != ["chunked"]:
            raise ProxyError(502, "the LiteLLM server's answer has a transfer coding other than chunked")
        return CHUNKED
    if "content-length" not in headers.named:
        return UNTIL_CLOSE
    lengths = headers.named["content-length"]
    length = lengths[0]
    if lengths.count(length) != len(lengths) or not LENGTH.fullmatch(length):
        raise ProxyError(502, "the LiteLLM server's answer has a malformed Content-Length")
    return int(length)


def too_large(limit: int) -> ProxyError:
    """The 413 of a request body over this many bytes."""
    return ProxyError(413, f"the request body is over {limit / (1024 * 1024):g} MiB (--max-body-mb)")


class Reader:
    """Buffered input of one connection; what `receive` raises comes out of every method."""

    def __init__(self) -> None:
        self.buffer = b""  # what was received and not yet read

    def receive(self) -> bytes:
        """More bytes, waiting for them; b"" at the end of the input."""
        raise NotImplementedError

    def fill(self) -> bool:
        """Receive once; False at the end of the input."""
        data = self.receive()
        self.buffer += data
        return bool(data)

    def head(self) -> bytes | None:
        """The bytes up to an empty line, without it; None where the input ends before the first of them.

        Raises:
            ProxyError: 400 for bare line feeds and an unfinished head, 431 over `MAX_HEAD_BYTES`.
        """
        while True:
            if self.buffer.startswith(b"\r\n"):  # RFC 9112 §2.2 lets empty lines stand before a request
                self.buffer = EMPTY_LINES.sub(b"", self.buffer, count=1)
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if len(head) >= MAX_HEAD_BYTES:
                raise ProxyError(431, f"the request head is over {MAX_HEAD_BYTES // 1024} KiB")
            if end:
                self.buffer = rest
                return head
            if BARE_LF.search(self.buffer):
                raise ProxyError(400, "the request head has a line that does not end in CRLF")
            if not self.fill():
                if self.buffer:
                    raise ProxyError(400, "the request head is unfinished")
                return None

    def some(self, most: int) -> bytes:
        """At least one byte and at most ``most``; b"" at the end of the input."""
        if not self.buffer:
            self.fill()
        data, self.buffer = self.buffer[:most], self.buffer[most:]
        return data

    def line(self) -> bytes:
        """A line without its CRLF, of 4 KiB at most."""
        while True:
            line, end, rest = self.buffer.partition(b"\r\n")
            if end:
                self.buffer = rest
                return line
            if len(line) > 4096 or BARE_LF.search(line):
                raise ProxyError(400, "a chunk of the body is malformed")
            if not self.fill():
                raise ProxyError(400, "the body ends early")

    def body(self, framing: int) -> Iterator[bytes]:
        """The body's bytes as they come in, without its chunked coding; trailers are dropped (RFC 9110 §6.5.1).

        Raises:
            ProxyError: 400, the body ends early or its chunks or trailers are malformed; 431.
        """
        return self._chunks() if framing == CHUNKED else self._bytes(framing)

    def _bytes(self, framing: int) -> Iterator[bytes]:
        left = sys.maxsize if framing == UNTIL_CLOSE else framing
        while left:
            data = self.some(min(left, RECEIVE_BYTES))
            if not data:
                if framing == UNTIL_CLOSE:
                    return
                raise ProxyError(400, f"the body ends {left} bytes early")
            left -= len(data)
            yield data

    def _chunks(self) -> Iterator[bytes]:
        while True:
            match = CHUNK_LINE.fullmatch(self.line())
            if match is None:
                raise ProxyError(400, "a chunk of the body is malformed")
            size = int(match[1], 16)
            if size == 0:
                break
            yield from self._bytes(size)
            if self.line():
                raise ProxyError(400, "a chunk of the body is malformed")
        for _ in range(MAX_HEADER_FIELDS + 1):
            line = self.line().decode("latin-1")
            if not line:
                return
            if not FIELD_LINES.fullmatch(f"\r\n{line}"):
                raise ProxyError(400, "a trailer field of the body is malformed")
        raise ProxyError(431, f"the body has more than {MAX_HEADER_FIELDS} trailer fields")


def timeval(seconds: float) -> bytes:
    """A C ``struct timeval``, as socket options take it."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked coding (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text; raises ProxyError 400 for anything else."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProxyError(400, f"the request body is not valid JSON: {error}") from None


def json_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object in a text; {} where there is none."""
    document = json_value(data)
    return document if isinstance(document, dict) else {}


LAST_CHUNK = b"0\r\n\r\n"


def field_lines(fields: Iterable[tuple[str, str]]) -> str:
    """Header fields as lines, each behind its CRLF."""
    return "\r\n".join(["", *map(": ".join, fields)])


def head_bytes(first_line: str, lines: str) -> bytes:
    """A message head from its first line and those of its fields; what is not Latin-1 becomes a question mark."""
    return f"{first_line}{lines}\r\n\r\n".encode("latin-1", "replace")


def server_url(url: str, option: str, keys: str) -> tuple[SplitResult, int]:
    """The parts of the base URL that an option names, and its port; ``keys``: where the server's keys come from.

    Raises:
        StartError: the URL cannot be used; it is not shown where it may hold a secret.
    """
    if "@" in url:
        raise StartError(f"{option} takes no credentials: {keys}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not (BASE_URL.fullmatch(url) and parts.hostname) or parts.query or parts.fragment or port == 0:
        raise StartError(f"{option} must be http://HOST:PORT or https://…, not {url!r}")
    return parts, (443 if parts.scheme == "https" else 80) if port is None else port


def sse_event(data: str, event: str | None = None) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    prefix = f"event: {event}\n" if event else ""
    return f"{prefix}data: {data}\n\n".encode()


SSE_DONE = sse_event("[DONE]")
SSE_HEADERS = [
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),  # nginx in front of us must not collect events either
]


def json_line(document: Any) -> bytes:
    """One line of a stream of JSON lines (application/x-ndjson)."""
    return json.dumps(document).encode() + b"\n"


def sse_error(error: ProxyError, dialect: str, events: int = 0) -> bytes:
    """What ends a stream whose head, and so many events of a response, are already out; Ollama's are JSON lines."""
    body = error.body(dialect)
    if dialect == OLLAMA:
        return json_line(body)
    if dialect == RESPONSES:
        return b"".join(sse_event(json.dumps(end), end["type"]) for end in response_ends(body, events))
    return sse_event(json.dumps(body), None if dialect == OPENAI else "error")


def response_ends(body: dict[str, Any], events: int) -> list[dict[str, Any]]:
    """The two events by which a response fails after so many others, as OpenAI's API sends them.

    OpenAI's clients raise the first, Codex knows the second alone, and Vercel's AI SDK takes none without a number.
    """
    said = body["error"]
    cause = {"code": said["code"] or "server_error", "message": said["message"]}
    failed = {"object": "response", "status": "failed", "error": cause, "output": []}
    return [
        {**said, **body, "type": "error", "sequence_number": events},
        {"type": "response.failed", "response": failed, "sequence_number": events + 1},
    ]


# ── asyncio bridge ───────────────────────────────────────────────────────────────────────────────────────────────
# The only place where threads meet asyncio. One loop in one thread runs every LiteLLM call. What a call sends goes
# through its own channel: written by one task on the loop, read by one handler thread, held back between a high and a
# low mark. While that thread waits, what a turn of the loop brings goes to the client's socket at its end, as far as
# the socket takes it: a thread that wakes for each chunk takes the interpreter's lock from the loop each time.


class _End(NamedTuple):
    """The last item of a channel: what the task raised, or what it returned."""

    error: Exception | None
    last: Any


class Channel:
    """A task at work on the loop, and its items for one thread, which iterates over them.

    Bytes count towards the marks, each as one more; other items do not. Neither half needs a lock: ``_written`` is
    changed by the task alone, ``_read`` and ``_done`` by the thread alone. Between ``_written`` and ``_done`` is what
    has not gone out. Once the thread is done with all that was written, it waits: until the task writes more, the
    client's socket is the task's.

    Args:
        write_now: of the client, see `Peer`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, write_now: Callable[[bytes], bytes | None]) -> None:
        self.loop, self._write_now = loop, write_now
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._written = self._read = self._done = 0
        self._ready: list[bytes] = []  # what this turn of the loop has brought for the socket ...
        self._due = 0.0  # ... and when that turn should be over
        self._waiter: asyncio.Future[None] | None = None
        self._mark = 0  # the waiter waits until no more than this lies between
        self._over = False  # the thread has read the end ...
        self._error: Exception | None = None  # ... with what the task raised
        self.task: Future[None]

    # The task's half, on the loop.

    async def put(self, item: Any) -> None:
        """Hand an item over; waits while the reader is more than the high mark behind."""
        self.put_now(item)
        if self._written - self._done > STREAM_HIGH_BYTES:
            await self.until_left(STREAM_LOW_BYTES)
        elif self._ready and self.loop.time() > self._due:
            import asyncio

            await asyncio.sleep(0)  # the others' turn

    def put_now(self, item: Any) -> None:
        """Hand over an item that is small."""
        if not isinstance(item, bytes):
            self._items.put(item)
        elif self._written == self._done > 0:
            if not self._ready:
                self._due = self.loop.time() + TURN_SECONDS
                self.loop.call_soon(self._flush)
            self._ready.append(item)
        else:
            self._queue(item)

    def _queue(self, data: bytes) -> None:
        self._written += len(data) + 1
        self._items.put(data)

    def _flush(self) -> None:
        if self._ready:
            rest = self._write_now(b"".join(self._ready))
            self._ready.clear()
            if rest is not None:
                self._queue(rest)

    async def until_left(self, mark: int) -> None:
        """Wait until the reader is no more than so many bytes behind."""
        self._mark, self._waiter = mark, self.loop.create_future()
        try:
            if self._written - self._done > mark:  # else the reader caught up before it saw the waiter
                await self._waiter
        finally:
            self._waiter = None

    def end(self, error: Exception | None, last: Any) -> None:
        """Say that nothing more comes than this last item, unless it is None."""
        self._flush()
        self._items.put(_End(error, last))

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # The reader's half, in its thread.

    def first(self) -> Any:
        """The first item that is not read yet: the head of an answer, or the whole of it.

        Raises what the task raised where it failed, StopIteration where it has ended.
        """
        if not self._over and (item := self._take()) is not None:
            return item
        raise self._error or StopIteration

    def __iter__(self) -> Channel:
        return self

    def __next__(self) -> bytes:
        """At least one bytes item, and with it all that lie ready up to one write; those before have been written."""
        self._catch_up()
        data: bytes = self.first()
        parts, size = [data], len(data)
        while size < WRITE_BYTES and not self._items.empty() and (item := self._take()) is not None:
            parts.append(item)
            size += len(item)
        return b"".join(parts)

    def _take(self) -> Any:
        """The next item; at the end the last one, if there is one, or None."""
        item = self._items.get()
        if isinstance(item, _End):
            self._over, self._error = True, item.error
            return item.last
        if isinstance(item, bytes):
            self._read += len(item) + 1
        return item

    def _catch_up(self) -> None:
        self._done = self._read
        if self._waiter is not None and self._written - self._done <= self._mark:
            self.loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """Cancel the task where it is still at work, and wait until it has let go of everything."""
        if not self._over:
            self.task.cancel()
        while not self._over:
            self._take()
            self._catch_up()
        self._error = None  # its traceback leads here: a circle


class ClientWatch:
    """Cancels a task of the loop when its client goes away."""

    def __init__(self, loop: asyncio.AbstractEventLoop, peer: Peer, task: asyncio.Task[None]) -> None:
        self._loop, self._peer, self._task = loop, peer, task
        self._descriptor = peer.fileno()
        self._recheck: asyncio.TimerHandle | None = None
        self.gone = False

    def begin(self) -> None:
        """Watch from now on."""
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._look)

    def _look(self) -> None:
        state = self._peer.state()
        if state == "quiet":
            return
        self._loop.remove_reader(self._descriptor)
        if state == "talking":  # its next request stays unread, and the descriptor readable: ask now and then
            self._recheck = self._loop.call_later(TALKING_SECONDS, self._look)
        else:
            self.gone = True
            self._task.cancel()

    def end(self) -> None:
        """Watch no more."""
        if self._recheck:
            self._recheck.cancel()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)


class Bridge:
    """One event loop in a thread of its own, until `stop`; raises what keeps it from running."""

    def __init__(self, on_problem: Callable[[str], None]) -> None:
        import asyncio

        self._on_problem = on_problem
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._problem)
        self._thread = threading.Thread(target=self._run, name="asyncio bridge", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stay_home()
        self.loop.run_forever()
        self.loop.run_until_complete(self._finish())
        self.loop.close()

    async def _finish(self) -> None:
        import asyncio

        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()

    def _problem(self, _loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        self._on_problem(f"{context['message']}: {type(error).__name__ if error else ''} {error or ''}".strip())

    def run(self, coroutine: Any) -> Any:
        """Run one coroutine to its end, from a thread other than the loop's."""
        import asyncio

        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def call(self, produce: Callable[[Channel], Awaitable[Any]], peer: Peer) -> Channel:
        """Start a coroutine that puts its answer into a channel; it is cancelled when the client goes away.

        What it returns comes with the end: the thread wakes once for it, when the client's socket is its own again.
        """
        import asyncio

        channel = Channel(self.loop, peer.write_now)
        channel.task = asyncio.run_coroutine_threadsafe(self._guard(produce, channel, peer), self.loop)
        return channel

    async def _guard(self, produce: Callable[[Channel], Awaitable[Any]], channel: Channel, peer: Peer) -> None:
        """Run ``produce`` under watch of the client's socket, and end the channel whatever happens."""
        import asyncio

        watch = ClientWatch(self.loop, peer, cast("asyncio.Task[None]", asyncio.current_task()))
        error: Exception | None = None
        last: Any = None
        try:
            watch.begin()
            last = await produce(channel)
        except asyncio.CancelledError:
            error = ClientGone() if watch.gone else ProxyError(503, "the proxy is stopping")
        except ProxyError as failure:
            error = failure.with_traceback(None)  # which leads to all that the call had: a circle
        except Exception as failure:
            error = failure
        finally:
            watch.end()  # before the end is told: after it the socket may be closed
            channel.end(error, last)

    def stop(self) -> None:
        """Cancel what still runs and close the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DRAIN_SECONDS)


# ── session ──────────────────────────────────────────────────────────────────────────────────────────────────────
# The persistent HTTP session under LiteLLM: its cookies, and what it saw on the wire for each client request. LiteLLM
# pools its connections well but gives its clients a jar that keeps nothing (since 1.97), so the session takes hold one
# level lower, at the one method through which every request of an httpx transport goes out, LiteLLM's own included.

CHALLENGE_STATUS = (403, 429, 503)  # with a web page, or a header that says so; a provider's own JSON 429 is none
# With a byte order mark before them; Gemini's OpenAI API wraps an error object in a list.
SIGNS_OF_LIFE = re.compile(rb'(?:\xef\xbb\xbf)?(?:(?::[^\r\n]*|event: ?ping|data: ?\{"type": ?"ping"[^\r\n]*)?\r?\n)*')
OBJECT = re.compile(rb"\s*(?:[\[{]|\Z)")  # as far as it has come
ERROR_OBJECT = re.compile(rb'[\s\[]*\{\s*(?:"type"\s*:\s*"error"\s*,\s*)?"error"\s*:\s*[{"]')
FAILED_EVENT = re.compile(rb'\s*\{\s*"type"\s*:\s*"(?:error|response\.failed)"')  # of a response
ERROR_DATA = re.compile(rb"(?m)^data:((?:" + ERROR_OBJECT.pattern + rb"|" + FAILED_EVENT.pattern + rb").*\n?)")
PROOF_COOKIE = "memory-proxy-proof"
NO_HEADERS = Headers(())
MAX_COOKIES = 180  # of a domain; Chrome keeps as many
MAX_EXPIRES = 253402300799  # seconds since the epoch, the end of the year 9999: cookielib cannot write later ones


@dataclass
class Exchange:
    """What the session saw while it served one client request; of several attempts, the last.

    ``sent`` counts requests to providers, ``host`` is of the last. ``fault`` is the exception of a connection that
    failed; ``status``, else 0, and ``headers`` are of an answer that came, and ``body`` is its body where its status is
    an error's.
    ``alive``: some of the answer's body came; ``heard`` is its first piece behind a stream's comments and pings, with
    what follows where it is a JSON object. ``error_data`` is an event's data that is an error object, as far as it has
    come: LiteLLM blurs some of them, and swallows others.
    ``challenged``: the host in front of the provider wants a proof that this is a browser. ``betas`` is the client's
    ``anthropic-beta``. ``headers_to_add`` go with each request that has no such header, the config's say, for routes on
    which LiteLLM sends none of a client's.
    ``stream`` is the body that comes in. ``connected``: a new connection was made for the request. ``stand_in`` is the
    field of the client's body, if any, that stands for what was said before; ``lost``: LiteLLM had left it out.
    """

    betas: str = ""
    sent: int = 0
    host: str = ""
    status: int = 0
    headers: Headers = NO_HEADERS
    alive: bool = False
    heard: bytes = b""
    error_data: bytes | bytearray = b""
    body: bytes = b""
    fault: Exception | None = None
    challenged: bool = False
    headers_to_add: Mapping[str, str] = field(default_factory=dict)
    stream: Any = None
    connected: bool = False
    stand_in: str = ""
    lost: bool = False

    def begin(self, host: str) -> None:
        """A request goes out: what an earlier attempt saw is forgotten."""
        self.sent, self.host, self.status = self.sent + 1, host, 0
        self.alive = self.connected = self.challenged = self.lost = False
        self.headers, self.heard, self.error_data, self.body, self.fault = NO_HEADERS, b"", b"", b"", None

    def answered(self, response: httpx.Response) -> None:
        """An answer came in; of an error, the body has been read."""
        self.status, self.headers = response.status_code, Headers(response.headers.multi_items())
        self.body = response.content if response.status_code >= 400 else b""

    def hear(self, data: bytes) -> None:
        """A piece of the answer's body came in."""
        self.alive = True
        if not self.heard:
            self.heard = SIGNS_OF_LIFE.sub(b"", data, count=1)[:MAX_KEPT_BYTES]
        elif len(self.heard) < MAX_KEPT_BYTES and OBJECT.match(self.heard):  # no stream's event: an error, perhaps
            self.heard += data[: MAX_KEPT_BYTES - len(self.heard)]
        if self.error_data and not self.error_data.endswith(b"\n"):  # a failed response repeats what it was asked
            line, end, _ = data.partition(b"\n")
            self.error_data += line + end
        elif (b'"error"' in data or b'"response.failed"' in data) and (event := ERROR_DATA.search(data)):
            self.error_data = bytearray(event[1])

    async def close(self) -> None:
        """Close the connection of an answer that was not read to its end: LiteLLM leaves some of them open."""
        if self.stream is not None:
            await self.stream.aclose()
        self.stream = self.fault = None  # both lead back here: circles

    @property
    def error_object(self) -> bytes:
        """What came, where it is an error object in place of an answer."""
        return self.heard if ERROR_OBJECT.match(self.heard) else b""

    @property
    def failed(self) -> bool:
        """Whether the provider could not be reached, broke off, or answered with an error."""
        return self.fault is not None or self.status >= 400


EXCHANGE: ContextVar[Exchange] = ContextVar("exchange")  # LiteLLM's own requests, beside those of clients, have none


class Session:
    """Cookies for every HTTP request that LiteLLM makes, by the rules of `http.cookiejar`: domain, path, expiry.

    Args:
        cookie_file: where the cookies outlive a restart, those without an expiry too; None: nowhere.
    """

    def __init__(self, cookie_file: str | None, log: Log) -> None:
        from http.cookiejar import LWPCookieJar

        import httpx

        self._file, self._log = cookie_file, log
        self._writable = True  # the file, as far as we know: that it is not is said once
        self._jar = LWPCookieJar()
        self._cookies = httpx.Cookies(self._jar)
        self._watched = watched_body()
        self.fault: str | None = None  # why cookies do not survive, where a proof has shown it
        self._shared: Any = None  # the one aiohttp session under all of LiteLLM's transports
        self._used: WeakSet[Any] = WeakSet()  # httpx's own transports, to be closed at the end
        if cookie_file:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # cookielib's way of printing a traceback
                    self._jar.load(cookie_file, ignore_discard=True)
            except FileNotFoundError:
                pass  # the first start
            except (OSError, ValueError) as error:  # LoadError is an OSError
                self._jar.clear()
                message = f"{cookie_file} is unreadable, the jar is empty: {error}"
                log.event("WARNING", "session", "cookie_file", message=message)
        self._saved = self._jar.as_lwp_str(ignore_discard=True)

    @property
    def cookie_count(self) -> int:
        """How many cookies the jar holds."""
        return len(self._jar)

    def install(self, litellm_transport: type) -> None:
        """Make the classes of transports send through this session: LiteLLM's own over aiohttp, and httpx's two."""
        import httpx

        look_for_cookies_where_some_are_set()
        take_header_values_that_are_no_ascii()
        for transport in (litellm_transport, httpx.AsyncHTTPTransport, httpx.HTTPTransport):
            for name, wrap in (("handle_async_request", self._asynchronous), ("handle_request", self._synchronous)):
                if name in vars(transport):
                    setattr(transport, name, wrap(vars(transport)[name]))

    def _asynchronous(self, send: Callable[..., Awaitable[httpx.Response]]) -> Callable[..., Awaitable[httpx.Response]]:
        async def handle_async_request(transport: Any, request: httpx.Request) -> httpx.Response:
            async def attempt() -> httpx.Response:
                response = await send(transport, request)
                if response.status_code >= 400:
                    await response.aread()
                return response

            self._adopt(transport)
            return await self._answer(request, attempt)

        return handle_async_request

    def _synchronous(self, send: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
        def handle_request(transport: Any, request: httpx.Request) -> httpx.Response:
            async def attempt() -> httpx.Response:
                response = send(transport, request)
                if response.status_code >= 400:
                    response.read()
                return response

            return run_straight(self._answer(request, attempt))

        return handle_request

    def _adopt(self, transport: Any) -> None:
        """Make a transport of LiteLLM's use the one aiohttp session: connections are shared, and none is left open.

        LiteLLM makes a session for each of its clients, and drops some of those clients without closing them.
        """
        if not hasattr(transport, "client"):
            self._used.add(transport)
            return
        if self._shared is None or self._shared.closed:
            self._shared = transport.client() if callable(transport.client) else transport.client
            self._shared.trace_configs.append(connection_trace())
        transport.client, transport._owns_session = self._shared, False

    async def _answer(self, request: httpx.Request, attempt: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
        """The answer to one request; ``attempt`` sends it.

        A challenge that brings a cookie is met once, at once, with that cookie. One that stays is replaced by a 400
        in JSON, which LiteLLM does not retry, and marked in the exchange. So is a request without the conversation so
        far, which is not sent.
        """
        import httpx

        exchange = EXCHANGE.get(None) or Exchange()
        if exchange.stand_in and not json_object(request.content).get(exchange.stand_in):
            exchange.lost = True
            return refusal(request, f"LiteLLM has left out {exchange.stand_in}")
        for name, value in exchange.headers_to_add.items():
            request.headers.setdefault(name, value)
        if exchange.betas and "anthropic-version" in request.headers:
            request.headers["anthropic-beta"] = merge_tokens(request.headers.get("anthropic-beta", ""), exchange.betas)
        own = "cookie" in request.headers  # the config names a cookie itself
        if not own:
            self._set_cookie(request)
        for last in (False, True):
            response = await self._sent(request, attempt, exchange)
            exchange.answered(response)
            response.request = request
            self._keep_cookies(response)
            if not is_challenge(response):
                break
            if last or own or not isinstance(request.stream, httpx.ByteStream) or not self._set_cookie(request):
                exchange.challenged = True
                response = refusal(request, "Cloudflare challenge")
                break
        if response.status_code >= 400:  # else OpenAI's client asks twice more where LiteLLM does not tell it otherwise
            response.headers["x-should-retry"] = "false"
        response.stream = self._watched(response, exchange)
        return response

    @staticmethod
    async def _sent(
        request: httpx.Request, attempt: Callable[[], Awaitable[httpx.Response]], exchange: Exchange
    ) -> httpx.Response:
        """The answer to one request; a connection that turns out to be stale is replaced, once."""
        for last in (False, True):
            exchange.begin(request.url.netloc.decode())
            began = time.monotonic()
            try:
                return await attempt()
            except Exception as error:
                exchange.fault = error
                if last or exchange.connected or not was_stale(error, request, time.monotonic() - began):
                    raise
        raise AssertionError  # the second attempt returns or raises

    def _set_cookie(self, request: httpx.Request) -> bool:
        """Give a request the Cookie header that belongs to it, or none; returns whether that is another than before."""
        before = request.headers.pop("cookie", None)
        if self.cookie_count:  # most hosts hand out none, and the jar takes 2 % of a call to say so
            self._cookies.set_cookie_header(request)
        return bool(request.headers.get("cookie") != before)

    def _keep_cookies(self, response: httpx.Response) -> None:
        """Take the answer's cookies; the clients above keep jars of their own, and must see none: one is the truth."""
        if "set-cookie" not in response.headers:
            return
        self._cookies.extract_cookies(response)
        for cookie in list(self._jar):
            text = f"{cookie.name}{cookie.value}"
            if not (text.isascii() and text.isprintable()):  # no call to this host could be sent with it
                self._jar.clear(cookie.domain, cookie.path, cookie.name)
            elif cookie.expires and cookie.expires > MAX_EXPIRES:
                cookie.expires = MAX_EXPIRES
        for _, same in groupby(list(self._jar), lambda cookie: cookie.domain):
            for cookie in list(same)[:-MAX_COOKIES]:  # the oldest
                self._jar.clear(cookie.domain, cookie.path, cookie.name)
        del response.headers["set-cookie"]
        now = self._jar.as_lwp_str(ignore_discard=True)
        if now != self._saved:
            self._saved = now
            names = [f"{cookie.name}@{cookie.domain}" for cookie in self._jar]
            self._log.event("DEBUG", "session", "cookies", names=names)
            self._save()

    def _save(self) -> None:
        """Write the cookie file: whole or not at all, for its owner's eyes only."""
        if self._file is None:
            return
        part = f"{self._file}.{os.getpid()}"
        try:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            self._jar.save(part, ignore_discard=True)
            Path(part).replace(self._file)
            self._writable = True
        except OSError as error:
            with contextlib.suppress(OSError):  # a read-only disk refuses this too, though there is no such file
                Path(part).unlink()
            if self._writable:
                self._log.event("WARNING", "session", "cookie_file", message=f"{self._file} cannot be written: {error}")
            self._writable = False

    def forget(self, name: str) -> None:
        """Drop every cookie of this name."""
        for cookie in [cookie for cookie in self._jar if cookie.name == name]:
            self._jar.clear(cookie.domain, cookie.path, cookie.name)
        self._saved = self._jar.as_lwp_str(ignore_discard=True)
        self._save()

    async def aclose(self) -> None:
        """Close every connection."""
        if self._shared is not None:
            await self._shared.close()
        for transport in list(self._used):
            await transport.aclose()

    def health(self) -> dict[str, Any]:
        """The ``session_manager`` row of ``/health``."""
        status = "unhealthy" if self.fault else "healthy"
        return {"status": status, "cookie_count": self.cookie_count, **({"reason": self.fault} if self.fault else {})}


def look_for_cookies_where_some_are_set() -> None:
    """Spare httpx's clients the search of an answer without cookies for some: it takes 4 % of a call."""
    from httpx import Cookies

    extract = Cookies.extract_cookies

    def extract_cookies(self: httpx.Cookies, response: httpx.Response) -> None:
        if "set-cookie" in response.headers:
            extract(self, response)

    Cookies.extract_cookies = extract_cookies  # type: ignore[method-assign]


def take_header_values_that_are_no_ascii() -> None:
    """Have httpx's responses take them as text too: LiteLLM makes a response of aiohttp's, whose headers are text."""
    from httpx import Response

    begin = Response.__init__

    def begin_with_bytes(self: httpx.Response, status_code: int, *, headers: Any = None, **rest: Any) -> None:
        try:
            begin(self, status_code, headers=headers, **rest)
        except UnicodeEncodeError:
            encoded = [(name, value.encode("utf-8", "surrogateescape")) for name, value in headers.items()]
            begin(self, status_code, headers=encoded, **rest)

    Response.__init__ = begin_with_bytes  # type: ignore[method-assign]


def decompressed(response: httpx.Response) -> Any:
    """A compressed body, plain, for the exchange has to read it; the client above finds no coding in the head any more.

    Yields bytes, asynchronously where the body comes so.
    """
    import httpx

    packed = httpx.Response(200, headers=response.headers, stream=response.stream)
    del response.headers["content-encoding"]
    return packed.aiter_bytes() if isinstance(response.stream, httpx.AsyncByteStream) else packed.iter_bytes()


def watched_body() -> Callable[[Any, Exchange], Any]:
    """The class of bodies that tell the exchange what comes in, and the fault that ends them early."""
    import httpx

    class WatchedAnswer(httpx.AsyncByteStream, httpx.SyncByteStream):
        def __init__(self, response: httpx.Response, exchange: Exchange) -> None:
            self._response, self._stream, self._exchange = response, cast(Any, response.stream), exchange
            self._plain = decompressed(response) if "content-encoding" in response.headers else self._stream
            if isinstance(self._stream, httpx.AsyncByteStream):
                exchange.stream = self

        async def __aiter__(self) -> AsyncIterator[bytes]:
            with self._faults():
                async for data in self._plain:
                    self._exchange.hear(data)
                    yield data

        def __iter__(self) -> Iterator[bytes]:
            with self._faults():
                for data in self._plain:
                    self._exchange.hear(data)
                    yield data

        async def aclose(self) -> None:
            self._let_go()
            await self._stream.aclose()

        def close(self) -> None:
            self._let_go()
            self._stream.close()

        def _let_go(self) -> None:
            # httpx.Client has made it a circle of answer and stream: with the request's body, which may be megabytes,
            # that would lie about until the garbage collector comes by.
            self._response.stream = self._stream

        @contextlib.contextmanager
        def _faults(self) -> Iterator[None]:
            try:
                yield
            except Exception as error:
                self._exchange.fault = error
                raise

    return WatchedAnswer


def connection_trace() -> Any:
    """What makes an aiohttp session tell the exchange of the connection that is made for its request."""
    import aiohttp

    async def connected(*_: Any) -> None:
        if exchange := EXCHANGE.get(None):
            exchange.connected = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(connected)
    trace.freeze()
    return trace


def was_stale(error: Exception, request: httpx.Request, seconds: float) -> bool:
    """Whether a pooled connection had been closed before this request reached it, so that another may do."""
    import httpx

    said = "disconnected" in str(error) or isinstance(error.__cause__, ConnectionResetError)
    return said and seconds < STALE_SECONDS and isinstance(request.stream, httpx.ByteStream)


def merge_tokens(first: str, second: str) -> str:
    """Two comma-separated lists as one, without doubles. LiteLLM drops the betas of a client that it does not know."""
    return ",".join(dict.fromkeys(token.strip() for token in f"{first},{second}".split(",") if token.strip()))


def run_straight(coroutine: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
    """What a coroutine that never waits returns."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        answer: httpx.Response = stop.value
        return answer
    raise AssertionError


def refusal(request: httpx.Request, message: str) -> httpx.Response:
    """An answer of our own in a provider's place, at which LiteLLM gives up."""
    import httpx

    return httpx.Response(400, json={"error": {"message": message}}, request=request)


def is_challenge(response: httpx.Response) -> bool:
    """Whether a host such as Cloudflare's answered in the provider's place, to see whether this is a browser."""
    page = response.headers.get("content-type", "").lower().startswith("text/html")
    return response.status_code in CHALLENGE_STATUS and (page or response.headers.get("cf-mitigated") == "challenge")


class LoopbackHandler(http.server.BaseHTTPRequestHandler):
    """Of a small server in this process, see `loopback_server`; says nothing on standard error."""

    def body(self) -> bytes:
        """What was sent."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, media: str, data: bytes, **headers: str) -> None:
        """Send the whole answer."""
        self.send_response(status)
        for name, value in {"Content-Type": media, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class CookieGate(LoopbackHandler):
    """A host on loopback that lets nobody in without its cookie, for the proof at the start."""

    def do_POST(self) -> None:
        """503 in HTML with the cookie, or 400 to a request that has it: an answer would be logged, by large tables."""
        self.body()
        passed = PROOF_COOKIE in (self.headers.get("cookie") or "")
        self.server.seen[self.path.split("/")[1]] = passed  # type: ignore[attr-defined]
        if passed:
            self.reply(400, "application/json", b"{}")
        else:
            self.reply(503, "text/html", b"{}", **{"Set-Cookie": f"{PROOF_COOKIE}=1; Path={self.path}"})


@contextlib.contextmanager
def loopback_server(handler: type[LoopbackHandler], seen: Any) -> Iterator[str]:
    """The URL of a small server that runs for as long as it is needed; its handlers find ``seen`` there."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.block_on_close = False
    server.seen = seen  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# ── sdk backend ──────────────────────────────────────────────────────────────────────────────────────────────────
# The model API by LiteLLM's SDK: a table from path to LiteLLM function, the parameters that go in, the frames that
# come out. The only importer of litellm, and only when sdk mode is used. Its parts, each under a line of its own:
# LiteLLM in this process · what goes in · errors · what comes out · whole answers as events · Ollama's API · lists of
# models · the table · one request.

# LiteLLM in this process: what of it is relied on, how it is loaded, and the settings of a config.

# Where LiteLLM keeps the callbacks of a config, those that it derives from them, and its Router's own.
CALLBACK_LISTS = (
    *("callbacks", "input_callback", "success_callback", "failure_callback", "service_callback"),
    *("_async_input_callback", "_async_success_callback", "_async_failure_callback"),
)

# What this program relies on inside LiteLLM beyond its documented interface: (module, attribute, what for). Checked
# at the start, so that another LiteLLM version fails there with its name and not later with a wrong answer.
LITELLM_INTERNALS = (
    ("litellm.llms.custom_httpx.aiohttp_transport", "LiteLLMAiohttpTransport.handle_async_request", "the session"),
    ("litellm.llms.custom_httpx.async_client_cleanup", "close_litellm_async_clients", "closing connections at exit"),
    ("litellm.types.utils", "all_litellm_params", "telling LiteLLM's parameters from the model API's"),
    ("litellm", "Router.get_valid_args", "router_settings"),
    ("litellm", "Router.registry or Router.get_deployment", "models and costs"),
    ("litellm", "Router.select or Router.async_get_available_deployment", "count_tokens"),
    ("litellm", "Router.retire or Router.discard", "reading the config again"),
    *(("litellm", name, "reading the config again") for name in CALLBACK_LISTS),
    ("litellm.utils", "callback_list", "reading the config again"),
)

# What LiteLLM's SDK imports without declaring it (BerriAI/litellm#18193, #32993): without them /v1/messages, tool calls
# and /v1/responses fail with a ModuleNotFoundError. `litellm[proxy]` brings them all, and 300 MB more.
LITELLM_UNDECLARED = ("backoff", "fastapi", "mcp", "orjson", "redis", "soundfile")
LITELLM_ENVIRONMENT = {  # set before the import, unless the user has set them
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else three attempts to fetch a price list hold up the start
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",  # else the first Anthropic call waits for a fetch from GitHub
    "DEFAULT_MAX_RETRIES": "0",  # else OpenAI's client repeats embeddings and moderations too, under LiteLLM's Router
}


def import_litellm(log: Log) -> Any:
    """LiteLLM, checked for what this program needs of it and with its own output turned off.

    Raises:
        StartError: LiteLLM is not installed, or its version lacks something of `LITELLM_INTERNALS`.
    """
    for name, value in LITELLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import litellm
    except ImportError as error:
        raise StartError(f"sdk mode needs LiteLLM ({error}): pip install litellm") from None
    for module, attributes, purpose in LITELLM_INTERNALS:
        if not any(has_attribute(module, attribute) for attribute in attributes.split(" or ")):
            raise litellm_lacks(f"{module}.{attributes}", purpose)
    absent = [name for name in LITELLM_UNDECLARED if find_spec(name) is None]
    if absent:
        hint = f"LiteLLM needs more for /v1/messages, /v1/responses and tools: pip install {' '.join(absent)}"
        log.event("WARNING", "sdk", "undeclared", message=hint)
    warnings.filterwarnings("ignore", module="pydantic")  # LiteLLM's models do not always fit what it puts in them
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of use to whoever works on this, not to users
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # of a call that was cancelled as it began
    litellm.suppress_debug_info = True
    litellm.disable_hf_tokenizer_download = True  # it would hold the loop, and with it every client, for half a minute
    litellm.telemetry = False
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy", "asyncio", "httpx"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [LoggingHandler(log)], False
        logger.setLevel(log.level if log.level <= logging.DEBUG else logging.CRITICAL)
    return litellm


def has_attribute(module: str, attribute: str) -> bool:
    """Whether there is such a module, and in it what the dotted path leads to."""
    try:
        attrgetter(attribute)(import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


class RouterView(NamedTuple):
    """What is asked of LiteLLM's Router beside calls.

    Args:
        names: of its models and aliases.
        deployment: the one with this id.
        select: the one for a call to this model, with these parameters.
        retire: takes it out of LiteLLM's lists; calls that it is at work on go on.
    """

    names: Callable[[], Iterable[str]]
    deployment: Callable[[str], Any]
    select: Callable[[str, dict[str, Any]], Awaitable[Any]]
    retire: Callable[[], None]


def view_of(router: Any) -> RouterView:
    """By the entry points of LiteLLM 1.110, else by the members that these replace, and that are to be dropped."""
    if hasattr(router, "registry"):
        return RouterView(router.registry().names, router.registry().deployment, router.select, router.retire)
    pick = router.async_get_available_deployment
    return RouterView(router.get_model_names, router.get_deployment, pick, router.discard)


def litellm_lacks(what: str, purpose: str) -> StartError:
    """The error of a LiteLLM without something that this program needs."""
    return StartError(f"LiteLLM {version_of('litellm')} has no {what}, needed for {purpose}")


def version_of(distribution: str) -> str:
    """The installed version of a distribution."""
    from importlib.metadata import version

    return version(distribution)


def uncounted_calls() -> ContextVar[bool]:
    """LiteLLM's mark of calls that it neither logs nor counts, such as its own; in a version without it, no mark."""
    with contextlib.suppress(ImportError, AttributeError):
        mark: ContextVar[bool] = import_module("litellm._internal_context").is_internal_call
        return mark
    return ContextVar("uncounted")


def sign_streamed_thoughts() -> None:
    """Have LiteLLM tell the signatures of a thought as it ends, and not with the end of the whole response alone.

    Clients keep each item as it ends, and send it back with the result of a tool: Claude wants a thought signed.
    """
    with contextlib.suppress(ImportError, AttributeError):  # another version of LiteLLM: its streams stay as they are
        transformation = "litellm.responses.litellm_completion_transformation"
        stream = import_module(f"{transformation}.streaming_iterator").LiteLLMCompletionStreamingIterator
        encode = import_module(f"{transformation}.reasoning_items").encode_thinking_blocks
        processor = import_module("litellm.litellm_core_utils.streaming_chunk_builder_utils").ChunkProcessor
        end = stream.create_reasoning_output_item_done_event

        def signed_end(self: Any, *args: Any, **kwargs: Any) -> Any:
            event, chunks = end(self, *args, **kwargs), self.collected_chat_completion_chunks
            event.item.encrypted_content = encode(processor(chunks).get_combined_thinking_content(chunks) or ())
            return event

        stream.create_reasoning_output_item_done_event = signed_end


async def count_nothing(**_: Any) -> None:
    """Stands for the Router's count of requests and tokens, where no limit needs it."""


# Function → the module that LiteLLM imports with its first stream.
STREAM_MODULES = {"aanthropic_messages": "litellm.proxy.pass_through_endpoints.streaming_handler"}


async def import_aside(module: str) -> None:
    """Import a module of LiteLLM's in a thread, once: the loop, and with it every other client, would wait for it."""
    import asyncio

    if module not in sys.modules:
        with contextlib.suppress(ImportError):  # another version of LiteLLM: it says so where it needs the module
            await asyncio.to_thread(import_module, module)


def unshared(value: Any) -> Any:
    """The value, of a list a copy: LiteLLM changes its lists in place."""
    return list(value) if isinstance(value, list) else value


SERVER_MODULE = "litellm.proxy.proxy_server"
SERVER_SETTINGS = ("guardrails", "custom_provider_map", "post_call_rules")  # code that LiteLLM's server loads

# What LiteLLM's server alone does; who relies on it (a guardrail keeps secrets back) is told that the SDK does not.
SERVER_PARTS = tuple(
    "guardrails policies prompts mcp_servers vector_store_registry search_tools general_settings.allowed_ips "
    "general_settings.custom_auth general_settings.enable_jwt_auth general_settings.pass_through_endpoints".split()
)


def litellm_attributes(litellm: Any, config: Config, log: Log) -> dict[str, Any]:
    """``litellm_settings`` as LiteLLM's server understands them: each is an attribute of the module."""
    settings = config.section("litellm_settings")
    found: dict[str, Any] = {}
    for where in SERVER_PARTS:
        if value_at(config.document, where):
            log.event("WARNING", "config", "server_part", message=f"{where} works in binary mode only")
    for key, value in settings.items():
        if key == "cache":
            found["cache"] = litellm.Cache(**settings.get("cache_params") or {}) if value else None
        elif key in SERVER_SETTINGS or (key.endswith(("callback", "callbacks")) and "." in str(value)):
            log.event("WARNING", "config", "litellm_settings", message=f"{key} works in binary mode only")
        elif key != "cache_params":
            found[str(key)] = [value] if key.endswith("callbacks") and isinstance(value, str) else value
    if "request_timeout" in settings:
        found["request_timeout_explicitly_set"] = True
    if credentials := config.document.get("credential_list"):
        found["credential_list"] = [litellm.types.utils.CredentialItem(**item) for item in credentials]
    return found


# Providers that log in with a device flow: asking LiteLLM whether their key is there would start it.
DEVICE_FLOW_PROVIDERS = ("github_copilot/", "chatgpt/")
CREDENTIAL_PARAMS = (
    *("api_key", "mock_response", "litellm_credential_name"),
    *("azure_ad_token", "azure_username", "client_secret", "tenant_id"),
)
CREDENTIAL_FIELDS = ("authorization", "api-key", "x-api-key")  # in a deployment's ``extra_headers``


def missing_provider_keys(litellm: Any, params: Mapping[str, Any]) -> str:
    """The API key that a deployment needs from the environment and does not find there, in words.

    LiteLLM knows the names. Cloud identities (AWS, Google) have more sources than variables and are left to it.
    """
    model = str(params["model"])
    if (
        any(params.get(name) for name in CREDENTIAL_PARAMS)
        or any(str(name).lower() in CREDENTIAL_FIELDS for name in params.get("extra_headers") or ())
        or model.startswith(DEVICE_FLOW_PROVIDERS)
    ):
        return ""
    provider = params.get("custom_llm_provider")
    found = litellm.validate_environment(model=f"{provider}/{model}" if provider else model)
    return " or ".join(name for name in found["missing_keys"] if name.endswith("_API_KEY"))


# The proof of cookies at the start: for each HTTP stack (the OpenAI SDK's client, LiteLLM's own) a function of LiteLLM
# that uses it. Claude by `acompletion` would load the tokenizer's tables, 40 MB that many never need.
PROOFS = {"openai": "acompletion", "anthropic": "anthropic_messages"}
PROOF_SECONDS = 5.0


class SdkRuntime:
    """LiteLLM in this process, for as long as the program runs: the module, its loop, its session, its settings."""

    def __init__(self, log: Log, session: Session) -> None:
        self.log, self.session = log, session
        self.litellm = import_litellm(log)
        self.uncounted = uncounted_calls()
        sign_streamed_thoughts()
        # Of LiteLLM's settings, those that a config has changed or that LiteLLM changes itself.
        self._defaults: dict[str, Any] = {name: list(getattr(self.litellm, name)) for name in CALLBACK_LISTS}
        session.install(self.litellm.llms.custom_httpx.aiohttp_transport.LiteLLMAiohttpTransport)
        self.bridge = Bridge(lambda text: log.event("WARNING", "bridge", "problem", message=text))

    def apply_settings(self, config: Config) -> None:
        """``litellm_settings`` as LiteLLM's server applies them, in place of those of the config before.

        The callbacks of the config before are gone then, its Router's too: the new config's Router brings its own.
        """
        self.restore_settings({})
        self.litellm.utils.callback_list = []  # else LiteLLM starts only what the first config names
        for name, value in litellm_attributes(self.litellm, config, self.log).items():
            self._defaults.setdefault(name, getattr(self.litellm, name, None))
            setattr(self.litellm, name, unshared(value))
        self._keep_server_out()

    def _keep_server_out(self) -> None:
        """Have LiteLLM not load its server's module, where that is installed, unless a callback may need it.

        It looks there for the server's Router, in vain. The first message for Mistral, say, would hold the loop, and
        with it every client, for 4 s, and take 80 MB.
        """
        if not any(getattr(self.litellm, name) for name in CALLBACK_LISTS):
            sys.modules.setdefault(SERVER_MODULE, cast(Any, None))
        elif sys.modules.get(SERVER_MODULE, self) is None:
            del sys.modules[SERVER_MODULE]

    def settings(self) -> dict[str, Any]:
        """All that a config and its Router have changed in LiteLLM, for `restore_settings`."""
        return {name: unshared(getattr(self.litellm, name)) for name in self._defaults}

    def restore_settings(self, before: Mapping[str, Any]) -> None:
        """Go back to settings of before; what is not among them has LiteLLM's default."""
        for name, value in {**self._defaults, **before}.items():
            setattr(self.litellm, name, unshared(value))

    async def prove_cookies(self) -> None:
        """Call a host on loopback that demands its cookie, over each HTTP stack of LiteLLM's.

        LiteLLM changes such internals often: better to hear it at the start than to wonder at 503s later. A stack
        that does not reach loopback at all (a proxy stands in between) proves nothing either way.
        """
        import asyncio

        seen: dict[str, bool] = {}  # for the first part of each path that was asked, whether the cookie came
        with loopback_server(CookieGate, seen) as url:
            calls = [
                getattr(self.litellm, function)(
                    model=f"{path}/proof",
                    messages=[{"role": "user", "content": "hello"}],
                    max_tokens=1,
                    api_key="none",
                    api_base=f"{url}/{path}",
                    timeout=PROOF_SECONDS,
                    max_retries=0,
                    **{"no-log": True},
                )
                for path, function in PROOFS.items()
            ]
            await asyncio.gather(*calls, return_exceptions=True)
        self.session.forget(PROOF_COOKIE)
        if lost := ", ".join(path for path, passed in seen.items() if not passed):
            loses = f"LiteLLM {version_of('litellm')} loses cookies on its way to {lost}"
            self.session.fault = f"{loses}: hosts that demand one will refuse"
            self.log.event("CRITICAL", "session", "cookies_lost", message=self.session.fault)

    def close(self) -> None:
        """Close LiteLLM's connections and the loop."""
        from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

        self.bridge.run(close_litellm_async_clients())  # type: ignore[no-untyped-call]
        self.bridge.run(self.session.aclose())
        self.bridge.stop()


# What goes in: the path, the body with its codings and forms, the fields that LiteLLM may get, the headers.

API_BASE = re.compile(r"^(?:/openai(?!/deployments/))?(?:/v1)?(?=/|$)")


def api_path(request: Request) -> str:
    """The path within the model API, which clients put under ``/v1`` or not, and Azure's under ``/openai``."""
    return API_BASE.sub("", request.path).rstrip("/")


def require_method(request: Request, *allowed: str) -> None:
    """Raises ProxyError 405 with ``Allow`` for any other method."""
    if request.method not in allowed:
        raise ProxyError(405, f"{request.path} takes {' or '.join(allowed)}", headers=[("Allow", ", ".join(allowed))])


def parse_json_object(request: Request) -> dict[str, Any]:
    """The request body.

    Raises:
        ProxyError: 400, it is no JSON object; 415, its coding is unknown; 413, it unfolds to more than the limit.
    """
    document = parse_json(decoded_body(request))
    if not isinstance(document, dict):
        raise ProxyError(400, "the request body must be a JSON object")
    return document


def response_params(request: Request) -> dict[str, Any]:
    """The fields of a body for a response; ``conversation``, which LiteLLM leaves out, goes beside those it knows."""
    params = parse_json_object(request)
    extra = params.get("extra_body")
    if params.get("conversation") and isinstance(extra, dict | None):
        params["extra_body"] = {"conversation": params.pop("conversation"), **(extra or {})}
    return params


def decoded_body(request: Request) -> bytes:
    """The request body without its content codings (RFC 9110 §8.4)."""
    data = request.body.read()
    for coding in reversed(request.headers.tokens("content-encoding")):
        if coding == "identity":
            continue
        decoder = DECODERS.get(coding)
        if decoder is None:
            accepted = [("Accept-Encoding", ", ".join(DECODERS))]  # RFC 9110 §15.5.16
            raise ProxyError(415, f"the content coding {coding!r} is not known here", headers=accepted)
        try:
            data = decoder(data, request.body.limit)
        except (zlib.error, ValueError, EOFError, OSError) as error:
            raise ProxyError(400, f"the request body is no valid {coding}: {error}") from None
        if len(data) > request.body.limit:
            raise ProxyError(413, f"the request body unfolds to more than {request.body.limit // 2**20} MiB")
    return data


def unfold(data: bytes, limit: int, decoder: Callable[[], Any]) -> bytes:
    """What all members of a compressed body unfold to, at most one byte more than the limit.

    A gzip file may have several (RFC 1952 §2.2), and a zstd one several frames (RFC 8878 §3.1). The bytes go in by
    pieces, since each member copies what it leaves over.

    Args:
        decoder: makes the decompressor of one member.
    """
    found, at = bytearray(), 0
    for _ in range(MAX_MEMBERS):
        engine = decoder()
        while not engine.eof:
            piece = data[at : at + RECEIVE_BYTES]
            if not piece:
                raise EOFError("it ends early")
            found += engine.decompress(piece, limit + 1 - len(found))
            if len(found) > limit:
                return bytes(found)
            at += len(piece) - len(engine.unused_data)
        if at == len(data):
            return bytes(found)
    raise ValueError(f"it has more than {MAX_MEMBERS} members")


def deflate_body(data: bytes, limit: int) -> bytes:
    """``deflate``: zlib's format, or, from some clients, the bare one."""
    try:
        return unfold(data, limit, zlib.decompressobj)
    except zlib.error:
        return unfold(data, limit, partial(zlib.decompressobj, -zlib.MAX_WBITS))


def zstd_body(data: bytes, limit: int) -> bytes:
    """``zstd``, which Python has from 3.14 on."""
    zstd = import_module("compression.zstd")
    try:
        return unfold(data, limit, zstd.ZstdDecompressor)
    except zstd.ZstdError as error:  # a class of a module that may not be there
        raise ValueError(str(error)) from None


DECODERS: Mapping[str, Callable[[bytes, int], bytes]] = {
    **dict.fromkeys(("gzip", "x-gzip"), partial(unfold, decoder=partial(zlib.decompressobj, zlib.MAX_WBITS | 16))),
    "deflate": deflate_body,
    **({"zstd": zstd_body} if sys.version_info >= (3, 14) else {}),
}


def parse_form(request: Request) -> dict[str, Any]:
    """The fields of a ``multipart/form-data`` body (RFC 7578): files as (name, bytes, content type), all else text.

    Raises:
        ProxyError: 400, it is no such body.
    """
    kind = request.headers.get("content-type")
    boundary = form_params(kind).get("boundary")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data" or not boundary:
        raise ProxyError(400, "the request body must be multipart/form-data with a boundary")
    # A delimiter is a whole line, and the one with two more hyphens is the last (RFC 2046 §5.1.1).
    delimiter = re.compile(rb"\r\n--" + re.escape(boundary.encode("latin-1")) + rb"(--)?[ \t]*(?=\r\n|\Z)")
    split = delimiter.split(b"\r\n" + decoded_body(request), MAX_FORM_PARTS + 1)
    ends, contents = split[1::2], split[2::2]
    if b"--" not in ends:
        said = "is unfinished" if len(ends) <= MAX_FORM_PARTS else f"has more than {MAX_FORM_PARTS} parts"
        raise ProxyError(400, f"the form in the request body {said}")
    fields: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    for content in contents[: ends.index(b"--")]:
        name, value = form_field(content)
        if name.endswith("[]"):
            lists.setdefault(name[:-2], []).append(value)
        else:
            fields[name] = value
    return {name: FORM_TYPES_OF.get(name, lambda text: text)(value) for name, value in {**fields, **lists}.items()}


def form_field(part: bytes) -> tuple[str, Any]:
    """Name and value of one part of a form, from the end of its delimiter on; raises ProxyError 400."""
    begin = part.find(b"\r\n\r\n", 0, MAX_PART_HEAD_BYTES)
    headers = parse_fields("\r\n" + part[2:begin].decode("latin-1")) if begin > 0 else NO_HEADERS
    params = form_params(headers.get("content-disposition").encode("latin-1").decode("utf-8", "replace"))
    name, file_name, content = params.get("name"), params.get("filename"), part[begin + 4 :]
    if name is None:
        raise ProxyError(400, "a part of the form in the request body has no name")
    if file_name is None:
        return name, content.decode("utf-8", "replace")
    return name, (file_name, content, headers.get("content-type") or "application/octet-stream")


FORM_PARAM = re.compile(r""";\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))""")


def form_params(value: str) -> dict[str, str]:
    """The parameters of a header of a form, by their lower-case names.

    ``filename*``, which some clients send against RFC 7578 §4.2, counts where there is no ``filename``.
    """
    taken = FORM_PARAM.findall(value)
    found = {name.lower(): quoted.replace('\\"', '"').replace("\\\\", "\\") or token for name, quoted, token in taken}
    if "filename*" in found:
        found.setdefault("filename", unquote(found["filename*"].rpartition("'")[2]))
    return found


def form_number(text: str) -> float:
    """A number in a form; raises ProxyError 400."""
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ProxyError(400, f"{text!r} in the form is no number") from None


# What is no text in a transcription's form.
FORM_TYPES_OF: Mapping[str, Callable[[Any], Any]] = {
    "temperature": form_number,
    "stream": lambda text: str(text).lower() == "true",
}
JSON_TYPES = {list: "array", int: "number", str: "string", dict: "object", bool: "boolean", tuple: "file"}

# Fields that LiteLLM takes apart itself, with the JSON types that it does not check.
OPTIONAL_SHAPE = {
    "stream": bool,
    **dict.fromkeys("stream_options metadata litellm_metadata extra_body cache".split(), dict),
    **dict.fromkeys(("messages", "tools"), list),
}
CLIENT_SECONDS = ("timeout", "request_timeout", "stream_timeout")  # with a negative one LiteLLM itself seems to fail


def check_shape(params: dict[str, Any], shape: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check the fields that LiteLLM takes apart itself; what else may be wrong with them, the provider says.

    A null is taken out: it means the same as nothing, but LiteLLM fails on that of ``metadata``.

    Raises:
        ProxyError: 400, a field has another JSON type than it must.
    """
    for name, kind in shape.items():
        if not isinstance(params.get(name), kind):
            types = " or ".join(JSON_TYPES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ProxyError(400, f"the request body must have {name!r}, a JSON {types}", param=name)
    for name, wanted in OPTIONAL_SHAPE.items():
        if params.get(name) is None:
            params.pop(name, None)
        elif not isinstance(params[name], wanted):
            raise ProxyError(400, f"{name!r} must be a JSON {JSON_TYPES[wanted]}", param=name)
    fits, rule = SECONDS
    for name in CLIENT_SECONDS:
        if params.get(name) is not None and not fits(params[name]):
            raise ProxyError(400, f"{name!r} must be {rule}", param=name)
    for name in ("messages", "tools"):
        if not all_objects(params.get(name, ())):
            raise ProxyError(400, f"each of {name!r} must be a JSON object", param=name)
    if not all(is_content(message.get("content")) for message in params.get("messages", ())):
        raise ProxyError(400, "a message's 'content' must be a string or an array of objects", param="messages")


def is_content(value: Any) -> bool:
    """Whether LiteLLM can read this content of a message."""
    return all_objects(value) if isinstance(value, list) else not isinstance(value, (int, float))


def all_objects(values: Iterable[Any]) -> bool:
    """Whether these are all JSON objects."""
    return all(isinstance(value, dict) for value in values)


# LiteLLM's parameters that a client may set for its own request, as on LiteLLM's server. The rest of them decide
# where a request goes and as whom, and are for the config alone.
CLIENT_PARAMS = frozenset(
    "metadata litellm_metadata num_retries max_retries request_timeout stream_timeout tags cache guardrails "
    "allowed_openai_params merge_reasoning_content_in_choices litellm_session_id litellm_trace_id id".split()
)

# Further names that decide this, on top of LiteLLM's own list: credentials and endpoints of single providers, and
# arguments of the Router's functions.
FORBIDDEN_PARAMS = frozenset(
    "base_url extra_headers extra_query organization user_config specific_deployment context_window_fallbacks "
    "content_policy_fallbacks router_settings_override deployment_id model_id deployment_url custom_endpoint token url "
    "gigachat_auth_url gigachat_access_token gemini_api_key apikey zen_api_key account_id project_id space_id "
    "workspace_id http_client success_callback failure_callback callbacks".split()
)
FORBIDDEN_PREFIXES = ("_", "aws_", "azure_", "gcs_", "s3_", "oci_", "sagemaker_", "vertex_", "litellm_")


def not_for_clients(name: str) -> ProxyError:
    """The 400 of a body field that decides where a request goes, or as whom."""
    return ProxyError(400, f"{name!r} is set in config.yaml, not by a client", param=name)


RESPONSE_ID = "resp_bGl0ZWxsbT"  # how LiteLLM's ids begin: "litellm:" in base64, then the deployment that has it


def refuse_unstored(response_id: str, query: Mapping[str, str]) -> None:
    """Raises ProxyError 404 for an id that LiteLLM has not made; 400 where the response is wanted as a stream."""
    if not response_id.startswith(RESPONSE_ID):
        raise ProxyError(404, f"the response {response_id!r} does not exist", param="response_id")
    if query.get("stream") == "true":  # OpenAI's client would find no event in a whole answer
        raise ProxyError(400, "a stored response comes whole in sdk mode, not as a stream", param="stream")


# Function → the field that stands for the conversation so far, and the error code at which clients send all of it.
STAND_INS = {
    "aanthropic_messages": ("thread", "thread_unsupported_request"),
    "aresponses": ("previous_response_id", "previous_response_not_found"),
}


def lost_conversation(stand_in: str) -> ProxyError:
    """The 400 in place of an answer to a client's last words: LiteLLM leaves out what a provider does not know."""
    message = f"{stand_in!r} does not reach this model: send the whole conversation"
    return ProxyError(400, message, param=stand_in, code=dict(STAND_INS.values())[stand_in])


# Client headers that reach the provider, but for credentials: LiteLLM's server forwards the same ones.
FORWARDED = re.compile("anthropic-beta$|x-(?!stainless)")
CREDENTIAL_HEADERS = frozenset("x-api-key x-goog-api-key x-litellm-api-key x-mcp-auth".split())


def upstream_headers(request: Request, route: Route, mappings: Mappings) -> dict[str, str]:
    """The client's headers that LiteLLM is to send on, with the memory id and the request id."""
    dropped = HOP_BY_HOP | CREDENTIAL_HEADERS | kept_back(mappings)
    kept = {
        name.lower(): request.headers.get(name.lower())
        for name, value in request.headers.end_to_end(dropped)
        if value.isascii() and FORWARDED.match(name.lower())  # httpx sends nothing else than ASCII
    }
    return {**kept, "x-request-id": request.id, **dict(route.injected)}


# Errors, as the provider has stated them: out of what the session saw, since LiteLLM blurs some and swallows others.


# OpenAI's codes of a response that has failed, which says no status → the status of the same error elsewhere.
CODE_STATUS = {
    "context_length_exceeded": 400,
    "insufficient_quota": 429,
    "invalid_prompt": 400,
    "rate_limit_exceeded": 429,
}


def stated_error(said: Mapping[str, Any]) -> ProxyError:
    """What a provider's error object says where the status was good: its code tells which one is meant, or its type."""
    code = said.get("code")
    status = next((status for status, name in ANTHROPIC_TYPES.items() if name == said.get("type")), 500)
    status = CODE_STATUS.get(str(code), status)
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    message = plain_text(str(said.get("message") or "the provider's stream failed"))
    return ProxyError(status, message, blame=PROVIDER, **said_fields(said))


def said_fields(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a provider's error object says besides its message, for a `ProxyError`."""
    names = {"kind": "type", "param": "param", "code": "code"}
    return {key: said[name] for key, name in names.items() if isinstance(said.get(name), str)}


def event_error(exchange: Exchange, error: BaseException | None = None) -> ProxyError | None:
    """The error object of a stream's event: as it came, or as OpenAI's client keeps it in the exception it raises."""
    bodies = (getattr(cause, "body", None) for cause in causes(error))
    kept = next((body for body in bodies if isinstance(body, dict) and body.get("message")), {})
    said = provider_error(bytes(exchange.error_data)) or with_cause(kept)
    return stated_error(said) if said else None


def false_answer(exchange: Exchange) -> ProxyError | None:
    """The error in an answer with a good status, out of which LiteLLM makes an empty answer: a web page, or an object.

    The page is no provider's own word: a host in front of it, such as Cloudflare's, answered; another side may get
    through.
    """
    if not 0 < exchange.status < 400:
        return None
    if page := provider_page(exchange):
        return ProxyError(502, page, blame=BACKEND)
    said = provider_error(exchange.error_object)
    return stated_error(said) if said.get("message") else None


EVENT_FIELD = re.compile(rb"(?:data|event|id|retry)?:")
STREAM_KIND = re.compile("(?<!octet-)stream|ndjson")  # of media types, such as AWS's


def brings_a_stream(exchange: Exchange) -> bool:
    """Whether the answer is what its media type says: a stream, and one of events if that is what it is called."""
    kind = exchange.headers.get("content-type")
    if kind.startswith("text/event-stream"):
        return EVENT_FIELD.match(exchange.heard) is not None
    return STREAM_KIND.search(kind) is not None


def refuse_no_stream(exchange: Exchange) -> None:
    """Raises ProxyError 502 where something else came in place of a stream: LiteLLM makes an empty one of it."""
    if exchange.alive and not brings_a_stream(exchange):
        said = f"{exchange.host} answered with no stream, but with {sent_text(exchange.heard)}"
        raise ProxyError(502, said, blame=PROVIDER)


def ended_early() -> ProxyError:
    """The error of a stream without an end, or of one that never began."""
    return ProxyError(502, "the provider's stream ended early", blame=BACKEND)


def provider_failure(exchange: Exchange, error: Exception) -> ProxyError:
    """The error that a provider has answered.

    The status is the truth: LiteLLM's classes blur some of them (a 403 of Anthropic's is its 500).
    """
    status, headers = exchange.status, provider_headers(exchange)
    if exchange.challenged:
        refused = f"the host in front of the model refused us (Cloudflare challenge): {exchange.host} answered {status}"
        return ProxyError(status, refused, headers=headers, blame=PROVIDER)
    said = provider_error(exchange.body)
    text = said.get("message") or provider_page(exchange) or sent_text(exchange.body) or plain_message(error)
    return ProxyError(status, text, headers=headers, blame=PROVIDER, **said_fields(said))


def sent_text(body: bytes) -> str:
    """An error's body as it came: LiteLLM keeps some, and loses some."""
    return body.decode(errors="replace").strip()


def provider_page(exchange: Exchange) -> str | None:
    """What is said of an error that came as a web page; the page itself is for browsers."""
    if exchange.headers.get("content-type").startswith("text/html"):
        return f"{exchange.host} answered {exchange.status} with an HTML page"
    return None


# Provider headers that reach the client; those of its own connection (server, date, set-cookie, …) do not.
PROVIDER_HEADERS = ("x-", "anthropic-", "openai-", "ratelimit-", "retry-after", "request-id")
PROVIDER_HEADERS_DROPPED = OURS | {"x-accel-buffering", "x-frame-options", "x-powered-by"}


def provider_headers(exchange: Exchange) -> list[tuple[str, str]]:
    """The provider's response headers that concern the client."""
    return [
        (name, value)
        for name, value in exchange.headers.fields
        if name.lower().startswith(PROVIDER_HEADERS) and name.lower() not in PROVIDER_HEADERS_DROPPED
    ]


# What comes out: LiteLLM's results as JSON, and its streams as events.


def hidden_params(result: Any) -> dict[str, Any]:
    """What LiteLLM notes of a result beside it."""
    hidden = result.get("_hidden_params") if isinstance(result, dict) else getattr(result, "_hidden_params", None)
    return hidden or {}


def served_model(result: Any, model: str) -> str:
    """The model that the client reads: the one it named, or after a fallback the one that answered."""
    extra = hidden_params(result).get("additional_headers") or {}
    fell_back = extra.get("x-litellm-attempted-fallbacks")
    return str(extra.get("x-litellm-model-group") or model) if fell_back else model


def filled_in(wildcard: str, target: str, model: str) -> str:
    """What a deployment calls for this model: what the stars of its name stand for is in the place of its target's."""
    found = re.fullmatch("(.*)".join(map(re.escape, wildcard.split("*"))), model)
    for part in found.groups() if found else ():
        target = target.replace("*", part, 1)
    return target


def whole_answer(result: Any, model: str) -> tuple[str, bytes]:
    """LiteLLM's result as JSON, naming the model as the client does."""
    if not isinstance(result, dict):
        named = model and hasattr(result, "model")
        copy = result.model_copy(update={"model": model}) if named else result
        # OpenAI's schema demands the nulls of a response, and some of a chat's.
        bare = getattr(result, "object", None) != "response"
        answer = copy.model_dump(mode="json", exclude_none=bare, by_alias=True)
        summarize_thoughts([] if bare else answer.get("output") or [])
        for choice in answer.get("choices") or ():
            choice.setdefault("logprobs", None)
            if "message" in choice:
                choice["message"] = {"content": None, "refusal": None, **choice["message"]}
        return "application/json", json.dumps(answer).encode()
    document = {key: value for key, value in result.items() if key != "_hidden_params"}
    if document.get("type") == "error":
        raise stated_error(document.get("error") or {})
    return "application/json", json.dumps({**document, "model": model} if "model" in document else document).encode()


def speech_answer(result: Any, _model: str) -> tuple[str, bytes]:
    """The sound that a provider has made."""
    return result.response.headers.get("content-type") or "audio/mpeg", result.response.content


def heard_answer(result: Any, model: str) -> tuple[str, bytes]:
    """What was heard, as JSON; where the provider has sent a text or subtitles, as these: LiteLLM wraps them up."""
    kind = EXCHANGE.get().headers.get("content-type")
    return (kind, result.text.encode()) if kind.startswith("text/") else whole_answer(result, model)


def count_answer(result: Any, _model: str) -> tuple[str, bytes]:
    """Anthropic's answer to how many tokens there are."""
    return "application/json", json.dumps({"input_tokens": result.total_tokens}).encode()


async def chat_frames(stream: Any, model: str, tally: Tally) -> AsyncIterator[bytes]:
    """LiteLLM's chunks as OpenAI's events; each names the model as the client does."""
    changed: dict[str, Any] = {"model": model, **({"usage": None} if tally.hidden else {})}
    async for part in chat_chunks(stream, tally):
        if tally.hidden and getattr(part, "usage", None) is not None and is_bare(part):
            continue
        # A copy: LiteLLM prices the call by the chunks that it made.
        yield sse_event(part.model_copy(update=changed).model_dump_json(exclude_none=True, exclude_unset=True))
    yield SSE_DONE


async def text_frames(stream: Any, model: str, tally: Tally) -> AsyncIterator[bytes]:
    """The same for a text completion.

    OpenAI's last chunk has an empty text, and LiteLLM's has none. Out of its cache LiteLLM takes the chunks of a chat.
    """

    async def mended() -> AsyncIterator[Any]:
        async for part in stream:
            part.object = "text_completion"
            for choice in part.choices:
                delta = getattr(choice, "delta", None)
                choice.text = (delta.content if delta else choice.text) or ""
            yield part

    async for data in chat_frames(mended(), model, tally):
        yield data


async def chat_chunks(stream: Any, tally: Tally) -> AsyncIterator[Any]:
    """LiteLLM's chunks of a chat, their usage taken in.

    Raises:
        ProxyError: an error event came that LiteLLM has swallowed; 502, see `refuse_no_stream`.
    """
    silent = True
    async for part in stream:
        silent = silent and not any(map(says_something, part.choices))
        tally.add(getattr(part, "usage", None))
        yield part
    exchange = EXCHANGE.get()
    if error := event_error(exchange):
        raise error
    if silent:
        refuse_no_stream(exchange)


def pieces(choice: Any) -> dict[str, Any]:
    """What a chunk's choice brings: the fields of its delta, or the text of a text completion."""
    delta = getattr(choice, "delta", None)
    text = getattr(choice, "text", None)
    return delta.model_dump(exclude_none=True) if delta else {"text": text} if text else {}


def says_something(choice: Any) -> bool:
    """Whether a chunk's choice has a piece of the answer: text, a call, a thought."""
    return any(value for name, value in pieces(choice).items() if name != "role")


def is_bare(part: Any) -> bool:
    """Whether a chunk says nothing but the usage."""
    return not any(choice.finish_reason or pieces(choice) for choice in part.choices)


# Anthropic's events by their lines; some hosts leave out the space behind the colon.
BLANK_LINE = re.compile(rb"\n\r?\n")
MESSAGE_START = re.compile(rb"event: ?message_start\ndata:")
MESSAGE_STOP = re.compile(rb"\nevent: ?message_stop\n")
ERROR_EVENT = re.compile(rb"\nevent: ?error\n(?:data:)?(.*)")


async def message_frames(stream: Any, model: str, tally: Tally) -> AsyncIterator[bytes]:
    """Anthropic's events: LiteLLM hands them on as the bytes that they are, cut anywhere.

    The first of them names the model as the client does, and all others stay as they are.

    Raises:
        ProxyError: for an error event, and 502 where the stream ended before its ``message_stop``, or was none.
    """
    if isinstance(stream, dict):  # mock_response knows no streams in this dialect
        tally.add(stream.get("usage"))
        document = {key: value for key, value in stream.items() if key != "_hidden_params"}
        for event in message_events({**document, "model": model}):
            yield sse_event(json.dumps(event), event["type"])
        return
    rest, silent, ended = bytearray(), True, False
    async for part in stream:
        piece = part if isinstance(part, bytes) else str(part).encode()
        rest += piece
        if not BLANK_LINE.search(rest, len(rest) - len(piece) - 2):  # one event may be megabytes, in many pieces
            continue
        before, _, rest = rest.replace(b"\r\n", b"\n").rpartition(b"\n\n")
        events = b"\n" + before
        error = ERROR_EVENT.search(events)
        good = events[: error.start()] if error else events
        silent = silent and b'"content_block_delta"' not in good
        ended = ended or MESSAGE_STOP.search(good) is not None
        if silent and (ended or error):  # the error may be LiteLLM's, about what is missing
            refuse_no_stream(EXCHANGE.get())
        count_usage(good, tally)
        if good.strip():
            yield with_model(good[1:].rstrip(b"\n"), model) + b"\n\n"
        if error:
            raise stated_error(provider_error(error[1]))
    if silent:
        refuse_no_stream(EXCHANGE.get())
    last = b"\n" + rest.replace(b"\r\n", b"\n")
    if not ended and MESSAGE_STOP.search(last):  # a host that ends with the last line and not with a blank one
        yield last[1:].rstrip(b"\n") + b"\n\n"
    elif not ended:
        raise ended_early()


def with_model(events: bytes, model: str) -> bytes:
    """Anthropic's events, the ``message_start`` among them with this model."""
    mark = MESSAGE_START.search(events)
    if not mark:
        return events
    line, end, after = events[mark.end() :].partition(b"\n")
    try:
        document = json.loads(line)
        document["message"]["model"] = model
    except (ValueError, LookupError, TypeError):
        return events
    return events[: mark.end()] + b" " + json.dumps(document).encode() + end + after


def count_usage(events: bytes, tally: Tally) -> None:
    """Take the usage out of Anthropic's events: the first and the last but one have it."""
    if b'"usage"' not in events:
        return
    for line in events.split(b"\n"):
        if not (line.startswith(b"data:") and b'"usage"' in line):
            continue
        with contextlib.suppress(ValueError, AttributeError):
            document = json.loads(line[5:])
            usage = document.get("usage") or document.get("message", {}).get("usage")
            tally.add(usage if isinstance(usage, dict) else None)


async def response_frames(stream: Any, model: str, tally: Tally) -> AsyncIterator[bytes]:
    """LiteLLM's events of a response as OpenAI's; those that carry the response name the model as the client does.

    Raises:
        ProxyError: 502, see `refuse_no_stream`.
    """
    if not hasattr(stream, "__aiter__"):  # mock_response knows no streams in this API
        tally.add(stream.usage)
        for event in response_events(stream.model_copy(update={"model": model}).model_dump(mode="json")):
            yield sse_event(json.dumps(event), event["type"])
        return
    silent = True
    async for part in stream:
        response: Any = getattr(part, "response", None)
        tally.add(getattr(response, "usage", None))
        if getattr(response, "model", None):
            part = part.model_copy(update={"response": response.model_copy(update={"model": model})})
        kind = str(getattr(part.type, "value", part.type))
        silent = silent and not kind.endswith(".delta")
        if silent and kind == "response.completed":
            refuse_no_stream(EXCHANGE.get())
        if kind not in THOUGHT_EVENTS:
            part.sequence_number = tally.events
            tally.events += 1
            yield sse_event(part.model_dump_json(exclude_none=True), kind)  # defaults too, such as summary_index
            continue
        for event in openai_thoughts(part.model_dump(mode="json", exclude_none=True)):
            event["sequence_number"] = tally.events
            tally.events += 1
            yield sse_event(json.dumps(event), event["type"])


# The events of a response that may hold a thought as LiteLLM has it.
THOUGHT_EVENTS = ("response.output_item.added", "response.completed", "response.incomplete")


def openai_thoughts(event: dict[str, Any]) -> list[dict[str, Any]]:
    """One of these events, and behind that of a thought which begins OpenAI's for its summary, which LiteLLM lacks."""
    items = [event["item"]] if "item" in event else event["response"].get("output") or []
    if not summarize_thoughts(items) or "item" not in event:
        return [event]
    place = {"item_id": event["item"]["id"], "output_index": event["output_index"], "summary_index": 0}
    part = {"type": "summary_text", "text": ""}
    return [event, {"type": "response.reasoning_summary_part.added", **place, "part": part}]


def summarize_thoughts(items: list[dict[str, Any]]) -> bool:
    """Have each thought among the items of a response tell its text as a summary, as OpenAI's schema demands.

    LiteLLM tells it as the content of a message of the assistant's. Returns whether there was such a thought.
    """
    thoughts = [item for item in items if item.get("type") == "reasoning" and item.get("summary") is None]
    for item in thoughts:
        said = item.pop("content", None) or ()
        item.pop("role", None)
        item["summary"] = [{"type": "summary_text", "text": part.get("text") or ""} for part in said]
    return bool(thoughts)


def empty_class(made: type) -> None:
    """Take the functions out of a class that LiteLLM has made for one stream, which is over.

    A class is a circle. By what its functions refer to it holds the stream's chunks and its conversation: megabytes,
    which would lie about until the garbage collector comes by. A class that is made once refers to no stream, and stays
    as it is.
    """
    if not (made.__module__.startswith("litellm.") and "<locals>" in made.__qualname__):
        return
    functions = {name: member for name, member in vars(made).items() if isinstance(member, FunctionType)}
    held = [cell.cell_contents for function in functions.values() for cell in function.__closure__ or ()]
    if any(isinstance(each, made.__mro__[1:-1]) for each in held):
        for name in functions:
            delattr(made, name)


# Whole answers as the events of a stream, for what LiteLLM does not stream itself.


def emptied(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block of Anthropic's as it begins, empty, and the deltas that fill it again."""
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": piece} for piece in halves(block["text"])]
    if block["type"] == "thinking":
        thinking = {"type": "thinking_delta", "thinking": block["thinking"]}
        signature = {"type": "signature_delta", "signature": block["signature"]}
        return {**block, "thinking": "", "signature": ""}, [thinking, signature]
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]


def halves(text: str) -> tuple[str, str]:
    """A text in two pieces."""
    middle = -(-len(text) // 2)
    return text[:middle], text[middle:]


def message_events(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A message of Anthropic's (https://docs.anthropic.com/en/api/messages-streaming)."""
    yield {"type": "message_start", "message": {**document, "content": [], "stop_reason": None}}
    yield {"type": "ping"}
    for index, block in enumerate(document["content"]):
        empty, deltas = emptied(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    end = {name: document.get(name) for name in ("stop_reason", "stop_sequence")}
    usage = {"output_tokens": (document.get("usage") or {}).get("output_tokens", 0)}
    yield {"type": "message_delta", "delta": end, "usage": usage}
    yield {"type": "message_stop"}


def response_events(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A response of OpenAI's with one item (https://platform.openai.com/docs/api-reference/responses-streaming)."""
    (item,) = document["output"]
    place = {"item_id": item["id"], "output_index": 0}
    begun = {**document, "status": "in_progress", "output": [], "usage": None}
    if item["type"] == "message":
        (part,) = item["content"]
        added = {**item, "status": "in_progress", "content": []}
        place["content_index"] = 0
        body: list[dict[str, Any]] = [
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            *(
                {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
                for piece in halves(part["text"])
            ),
            {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []},
            {"type": "response.content_part.done", **place, "part": part},
        ]
    else:
        added = {**item, "status": "in_progress", "arguments": ""}
        body = [
            {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]},
            {"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]},
        ]
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": added},
        *body,
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": document},
    ]
    for number, event in enumerate(events):
        yield {**event, "sequence_number": number}


# Ollama's API (https://github.com/ollama/ollama/blob/main/docs/api.md), as far as its clients need it for a chat.

OLLAMA_VERSION = "0.12.0"  # VS Code wants 0.6.4 or later
OLLAMA_OPTIONS = {"num_predict": "max_tokens", **{n: n for n in "temperature top_p seed stop".split()}}


def ollama_params(request: Request) -> dict[str, Any]:
    """The parameters of OpenAI's API for a body of Ollama's ``/api/chat``, which streams unless told otherwise."""
    body = parse_json_object(request)
    given = body.get("options") or {}
    schema = body.get("format")
    messages = body.get("messages")
    if isinstance(messages, list):
        try:
            waiting: dict[str, str] = {}
            messages = [ollama_message(message, f"call_{at}", waiting) for at, message in enumerate(messages)]
        except (LookupError, TypeError, AttributeError):
            raise ProxyError(400, "a message is malformed", param="messages") from None
    params = {
        "model": body.get("model"),
        "messages": messages,
        "stream": body.get("stream") is not False,
        "tools": body.get("tools") or None,
        **({name: given.get(option) for option, name in OLLAMA_OPTIONS.items()} if isinstance(given, dict) else {}),
    }
    if params.get("max_tokens") in (-1, -2):  # Ollama's words for no limit
        params["max_tokens"] = None
    if isinstance(schema, dict):
        params["response_format"] = {"type": "json_schema", "json_schema": {"name": "format", "schema": schema}}
    elif schema == "json":
        params["response_format"] = {"type": "json_object"}
    return {name: value for name, value in params.items() if value is not None}


def ollama_message(message: dict[str, Any], mark: str, waiting: dict[str, str]) -> dict[str, Any]:
    """One message of Ollama's as OpenAI's: pictures are parts of it, arguments text, and calls have ids.

    Args:
        mark: how the ids of this message's calls begin, where the client names none.
        waiting: id → name of the calls before it that have no result yet; kept up to date.
    """
    kept: dict[str, Any] = {name: message[name] for name in ("role", "content") if name in message}
    pictures = message.get("images") or ()
    if pictures:
        text = {"type": "text", "text": message.get("content") or ""}
        urls = (f"data:image/png;base64,{picture}" for picture in pictures)
        kept["content"] = [text, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    if message.get("tool_calls"):
        kept["tool_calls"] = [
            {"id": call.get("id") or f"{mark}_{number}", "type": "function", "function": {
                "name": call["function"]["name"], "arguments": json.dumps(call["function"].get("arguments") or {})}}
            for number, call in enumerate(message["tool_calls"])
        ]  # fmt: skip
        waiting.update({call["id"]: call["function"]["name"] for call in kept["tool_calls"]})
    if message.get("role") == "tool":
        name = message.get("tool_name") or message.get("name")
        oldest = (key for key, called in waiting.items() if name in (called, None))
        kept["tool_call_id"] = message.get("tool_call_id") or next(oldest, f"{mark}_result")
        waiting.pop(kept["tool_call_id"], None)
    return kept


def ollama_reply(model: str, message: dict[str, Any], done: str = "", tally: Tally | None = None) -> bytes:
    """One line of Ollama's answer; the last says with ``done`` why it is that, and has the usage."""
    line = {"model": model, "created_at": timestamp(), "message": {"role": "assistant", "content": "", **message}}
    if tally is None:
        return json_line({**line, "done": False})
    usage = tally.usage()
    counts = {"prompt_eval_count": usage.input_tokens or 0, "eval_count": usage.output_tokens or 0}
    return json_line({**line, "done": True, "done_reason": "length" if done == "length" else "stop", **counts})


def ollama_text(said: Any) -> dict[str, Any]:
    """Text and thoughts of OpenAI's message, or of a piece of it, as part of a message of Ollama's."""
    thinking = getattr(said, "reasoning_content", None)
    return {"content": said.content or "", **({"thinking": thinking} if thinking else {})}


def ollama_calls(calls: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """OpenAI's tool calls, each whole, as part of a message of Ollama's."""
    said = [{"function": {"name": call["name"], "arguments": json_object(call["arguments"])}} for call in calls]
    return {"tool_calls": said} if said else {}


async def ollama_frames(stream: Any, model: str, tally: Tally) -> AsyncIterator[bytes]:
    """LiteLLM's chunks as Ollama's lines; a tool call is one line, once it is whole."""
    calls: dict[int, dict[str, str]] = {}
    reason = "stop"
    async for part in chat_chunks(stream, tally):
        for choice in part.choices:
            reason = choice.finish_reason or reason
            message = ollama_text(choice.delta)
            if message["content"] or "thinking" in message:
                yield ollama_reply(model, message)
            for piece in choice.delta.tool_calls or ():
                call = calls.setdefault(piece.index, {"name": "", "arguments": ""})
                call["name"] += piece.function.name or ""
                call["arguments"] += piece.function.arguments or ""
    if calls:
        yield ollama_reply(model, ollama_calls(calls.values()))
    yield ollama_reply(model, {}, reason, tally)


def ollama_answer(result: Any, model: str) -> tuple[str, bytes]:
    """LiteLLM's whole answer as Ollama's."""
    choice = result.choices[0]
    tally = Tally()
    tally.add(result.usage)
    calls = ollama_calls(call.function.model_dump() for call in choice.message.tool_calls or ())
    message = {**ollama_text(choice.message), **calls}
    return "application/json", ollama_reply(model, message, choice.finish_reason or "stop", tally)


# Lists of models, as each API has them.

MODELS_PATH = "/models"
MODEL_CREATED = 1677610602  # Unix time that LiteLLM's server gives every model
MODEL_CREATED_AT = "2023-02-28T18:56:42Z"  # the same, as Anthropic and Ollama write it


def openai_model(name: str) -> dict[str, Any]:
    """A model in OpenAI's list."""
    return {"id": name, "object": "model", "created": MODEL_CREATED, "owned_by": "openai"}


def anthropic_model(name: str) -> dict[str, Any]:
    """A model in Anthropic's list (https://docs.anthropic.com/en/api/models-list)."""
    return {"type": "model", "id": name, "display_name": name, "created_at": MODEL_CREATED_AT}


def page_of_models(rows: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Anthropic's page of a list: at most ``limit`` rows, right behind ``after_id`` or right before ``before_id``."""
    ids = [row["id"] for row in rows]
    begin = ids.index(query["after_id"]) + 1 if query.get("after_id") in ids else 0
    end = ids.index(query["before_id"]) if query.get("before_id") in ids else len(ids)
    limit = int(query["limit"]) if re.fullmatch(r"[1-9][0-9]{0,3}", query.get("limit", "")) else len(ids)
    backwards = query.get("before_id") in ids
    page = rows[begin:end][-limit:] if backwards else rows[begin:end][:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"data": page, "has_more": len(page) < end - begin, "first_id": first, "last_id": last}


def ollama_model(name: str) -> dict[str, Any]:
    """A model in Ollama's list."""
    details = {"format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": ""}
    return {"name": name, "model": name, "modified_at": MODEL_CREATED_AT, "size": 0, "digest": "", "details": details}


OLLAMA_ABILITIES = {"tools": "supports_function_calling", "vision": "supports_vision", "thinking": "supports_reasoning"}


# The table of the model API.


@dataclass(frozen=True)
class Endpoint:
    """One row of the model API in sdk mode.

    Args:
        function: the method of LiteLLM's Router, or of `SdkBackend`, that serves it.
        shape: the fields that the body must have, and their JSON types as Python has them.
        frames: turns LiteLLM's stream into server-sent events, or Ollama's lines; None: there are no streams.
        read: makes the parameters out of the request's body.
        write: makes content type and body out of LiteLLM's result and the model's name for the client.
    """

    function: str
    shape: Mapping[str, type | tuple[type, ...]]
    frames: Callable[[Any, str, Tally], AsyncIterator[bytes]] | None = None
    read: Callable[[Request], dict[str, Any]] = parse_json_object
    write: Callable[[Any, str], tuple[str, bytes]] = whole_answer


ENDPOINTS: Mapping[str, Mapping[str, Endpoint]] = {
    "/chat/completions": {"POST": Endpoint("acompletion", {"messages": list}, chat_frames)},
    "/messages": {"POST": Endpoint("aanthropic_messages", {"messages": list, "max_tokens": int}, message_frames)},
    "/messages/count_tokens": {"POST": Endpoint("count_tokens", {"messages": list}, write=count_answer)},
    "/responses": {"POST": Endpoint("aresponses", {"input": (str, list)}, response_frames, read=response_params)},
    "/responses/": {  # and a response's id
        "GET": Endpoint("aget_responses", {"response_id": str}),
        "DELETE": Endpoint("adelete_responses", {"response_id": str}),
    },
    "/completions": {"POST": Endpoint("atext_completion", {"prompt": (str, list)}, text_frames)},
    "/embeddings": {"POST": Endpoint("aembedding", {"input": (str, list)})},
    "/moderations": {"POST": Endpoint("amoderation", {"input": (str, list)})},
    "/images/generations": {"POST": Endpoint("aimage_generation", {"prompt": str})},
    "/rerank": {"POST": Endpoint("arerank", {"query": str, "documents": list})},
    "/v2/rerank": {"POST": Endpoint("arerank", {"query": str, "documents": list})},  # Cohere's clients have it so
    "/audio/speech": {"POST": Endpoint("aspeech", {"input": str}, write=speech_answer)},
    "/audio/transcriptions": {"POST": Endpoint("atranscription", {"file": tuple}, read=parse_form, write=heard_answer)},
    "/api/chat": {
        "POST": Endpoint("acompletion", {"messages": list}, ollama_frames, read=ollama_params, write=ollama_answer)
    },
}
NO_RESPONSE_IDS = ("compact", "input_tokens")  # in the place of an id, OpenAI's other paths under /responses
DEPLOYMENT_PATH = re.compile(r"/(?:openai/deployments|engines)/([^/]+)(/.+)")  # Azure's, and OpenAI's of old


def find_rows(path: str) -> tuple[Mapping[str, Endpoint], dict[str, str]]:
    """The rows for a path of the model API, none where nothing serves it, and the parameters that the path has."""
    deployment = DEPLOYMENT_PATH.fullmatch(path)
    given, path = ({"model": unquote(deployment[1])}, deployment[2]) if deployment else ({}, path)
    above, slash, last = path.rpartition("/")
    if path in ENDPOINTS or last in NO_RESPONSE_IDS:
        return ENDPOINTS.get(path, {}), given
    return ENDPOINTS.get(above + slash, {}), {**given, "response_id": unquote(last)}


# One request: from the table to the answer.

UPGRADE_TO_HTTP = [("Upgrade", "HTTP/1.1"), ("Connection", "Upgrade")]  # RFC 9110 §15.5.22
NDJSON_HEADERS = [("Content-Type", "application/x-ndjson"), ("X-Accel-Buffering", "no")]
OWN_EVENTS = 2  # the most that LiteLLM makes before it asks the provider: response.created and in_progress in 1.100


class Opening:
    """The beginning of a stream, held back until it is certain that the answer comes from here.

    The head leaves with the first event that the provider has caused: until then an error has a status of its own, and
    another backend may answer. What does not count: the events that LiteLLM makes before the provider has sent one,
    and comments and pings, behind which an answer may still fail to come. They keep a slow stream alive, though: where
    the provider has sent something, what is held goes out after `HOLD_SECONDS`, and all that follows at once.

    Args:
        fields: of the head, besides the provider's.
    """

    def __init__(self, channel: Channel, exchange: Exchange, fields: Sequence[tuple[str, str]]) -> None:
        self._channel, self._exchange, self._fields = channel, exchange, fields
        self._held: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self.over = False

    async def put(self, data: bytes) -> None:
        """Take the next events of the stream."""
        if self.over:
            await self._channel.put(data)
            return
        self._held.append(data)
        # A stream from a cache, or by a client that the session does not see, is known by its length alone.
        if self._exchange.heard or (not self._exchange.sent and len(self._held) > OWN_EVENTS):
            self._go()
            await self._channel.until_left(0)  # else what follows takes the interpreter from the thread that sends it
        elif self._timer is None:
            self._wait()

    def end(self) -> None:
        """The stream has ended; raises ProxyError where it never began."""
        if not self.over:
            if self._exchange.sent:
                raise ended_early()
            self._go()

    def _wait(self) -> None:
        self._timer = self._channel.loop.call_later(HOLD_SECONDS, self._look)

    def _look(self) -> None:
        if self._exchange.alive and not false_answer(self._exchange):
            self._go()
        else:
            self._wait()

    def _go(self) -> None:
        if error := false_answer(self._exchange):
            raise error
        self.close()
        self.over = True
        head = Response(200, [*self._fields, *provider_headers(self._exchange)], self._channel)
        for item in (head, *self._held):
            self._channel.put_now(item)

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._timer:
            self._timer.cancel()


# Settings of the config that decide on cooldowns and on retries.
COOLDOWN_SETTINGS = frozenset("allowed_fails allowed_fails_policy cooldown_time disable_cooldowns".split())
RETRY_SETTINGS = frozenset("num_retries retry_policy model_group_retry_policy".split())

# Settings for which LiteLLM has to hear how each call ended: callbacks, limits (rpm, tpm), budgets, cooldowns, routing.
COUNTED = re.compile(r"(?:callback|[rt]pm|budget|cooldown|allowed_fails|pre_call_checks|routing)\w*':")


class SdkBackend:
    """Serves the model API of one config with LiteLLM's SDK, in this process.

    Args:
        before: that of the config before: where LiteLLM reads the same in both, its Router is used on.

    Raises:
        StartError: LiteLLM refuses the config.
    """

    name = "sdk"

    def __init__(self, config: Config, runtime: SdkRuntime, before: SdkBackend | None = None) -> None:
        self._config, self._runtime, self._log = config, runtime, runtime.log
        self._litellm, self._bridge, self.session = runtime.litellm, runtime.bridge, runtime.session
        self._own_params = frozenset(self._litellm.types.utils.all_litellm_params) | FORBIDDEN_PARAMS
        settings = (*config.section("router_settings").items(), *config.section("litellm_settings").items())
        self._has_fallbacks = any(str(name).endswith("fallbacks") and value for name, value in settings)
        self.router: Any
        self.missing_keys: Mapping[str, str]
        self._counting: bool
        if before and before._config.server_part == config.server_part:
            self.router, self.missing_keys, self._counting = before.router, before.missing_keys, before._counting
            return
        try:
            runtime.apply_settings(config)
            self.missing_keys = {**config.missing_keys, **self._keys_from_environment()}
            self.router = self._bridge.run(self._build_router())
            self._counting = self._is_counting()
            if not self._counting and hasattr(self.router, "increment_deployment_usage_for_response"):
                self.router.increment_deployment_usage_for_response = count_nothing
        except StartError:
            raise
        except Exception as error:  # LiteLLM checks its sections with whatever exception comes to hand
            said = plain_message(error).split("\n")[0]
            raise StartError(f"{config.path}: LiteLLM refuses this config: {type(error).__name__}: {said}") from None

    async def _build_router(self) -> Any:
        """LiteLLM's Router, made on the loop that will use it, from the config as LiteLLM's server makes it."""
        router = self._litellm.Router
        settings = self._config.section("router_settings")
        known = set(router.get_valid_args())
        for key in settings.keys() - known:
            self._log.event("WARNING", "config", "router_settings", message=f"{key} is unknown to LiteLLM's Router")
        arguments = {key: value for key, value in settings.items() if key in known}
        if "request_timeout" not in self._config.section("litellm_settings"):
            arguments.setdefault("timeout", self._config.request_seconds)  # LiteLLM's own default is 6,000 s
        usual = {"cache_responses": self._litellm.cache is not None, "ignore_invalid_deployments": True}
        made = router(**{**usual, **arguments, "model_list": self._deployments()})
        taken = set(view_of(made).names())
        for name in self._config.model_names:
            if name not in taken and name not in self.missing_keys:
                message = f"LiteLLM cannot use the model {name!r}; --log-level debug shows why"
                self._log.event("WARNING", "config", "model_list", message=message)
        for path, rows in ENDPOINTS.items():
            for endpoint in rows.values():
                if not (hasattr(made, endpoint.function) or hasattr(self, endpoint.function)):
                    raise litellm_lacks(f"Router.{endpoint.function}", path)
        return made

    def _is_counting(self) -> bool:
        """Whether anything depends on what LiteLLM counts and tells after a call; else it is spared that work.

        Its records for callbacks, and its Router's counts of successes, failures and tokens, take a fifth of a call's
        time. They serve callbacks, limits, budgets, and the choice between several deployments of a name. What a call
        consumed and cost stands in its result.
        """
        listeners = (listener for name in CALLBACK_LISTS for listener in getattr(self._litellm, name))
        names = [entry["model_name"] for entry in self._config.document["model_list"]]
        return (
            any(getattr(listener, "__self__", None) is not self.router for listener in listeners)
            or len(set(names)) < len(names)
            or COUNTED.search(self._config.server_part) is not None
        )

    def _deployments(self) -> list[dict[str, Any]]:
        """The model_list for the Router.

        A deployment that is alone under its name neither cools down nor is tried again, unless the config says so:
        there is no other to turn to. One 401 would stand between a user and the model for 5 s, a 429 with a
        Retry-After of 20 s hold the client for a minute, and clients retry by themselves.
        """
        usable = [
            entry for entry in self._config.document["model_list"] if entry["model_name"] not in self.missing_keys
        ]
        count = Counter(entry["model_name"] for entry in usable)
        settings = {*self._config.section("router_settings"), *self._config.section("litellm_settings")}
        alone: dict[str, Any] = {} if settings & COOLDOWN_SETTINGS else {"cooldown_time": 0}
        alone |= {} if settings & RETRY_SETTINGS else {"num_retries": 0}
        deployments = []
        for entry in usable:
            params = {**(alone if count[entry["model_name"]] == 1 else {}), **entry["litellm_params"]}
            if isinstance(params.get("extra_headers"), dict):  # in one case, or a client's header would stand beside it
                params["extra_headers"] = {str(name).lower(): value for name, value in params["extra_headers"].items()}
            deployments.append({**entry, "litellm_params": params})
        return deployments

    def _keys_from_environment(self) -> dict[str, str]:
        """Model names of which no deployment has a key, neither in the config nor in the environment."""
        entries = self._config.document["model_list"]
        lacking = [(one["model_name"], missing_provider_keys(self._litellm, one["litellm_params"])) for one in entries]
        served = {name for name, keys in lacking if not keys}
        return {name: keys for name, keys in lacking if name not in served}

    @staticmethod
    def calls_a_model(request: Request) -> bool:
        """Whether the request leads to a provider, and so shows whether LiteLLM works."""
        return bool(find_rows(api_path(request))[0])

    def answer(self, request: Request, route: Route) -> Response:
        """Serve one request of the model API.

        Raises:
            ProxyError: whatever the client is to be told.
            ClientGone: it left; the call upstream has been cancelled.
        """
        if upgrades(request.headers):  # Codex tries a WebSocket first, and takes this for "POST it"
            raise ProxyError(426, "there are no WebSockets in sdk mode", headers=UPGRADE_TO_HTTP)
        path = api_path(request)
        fixed = self._fixed_answer(request, path)
        if fixed:
            return fixed
        rows, given = find_rows(path)
        if not rows:
            elsewhere = "" if request.dialect == OLLAMA else "; binary mode serves all of LiteLLM's API"
            raise ProxyError(404, f"{request.path} is not served in sdk mode{elsewhere}")
        require_method(request, *rows)
        endpoint = rows[request.method]
        params = self._params(request, endpoint, given)
        request.model = params.get("model", "")
        tally = Tally(hidden=self._ask_for_usage(endpoint, params))
        if self._litellm.cache is not None:  # a cached answer has been written with a memory: it is that memory's own
            params["cache"] = {**(params.get("cache") or {}), "namespace": route.user_id}
        headers = upstream_headers(request, route, self._config.mappings)
        stand_in, _code = STAND_INS.get(endpoint.function, ("", ""))
        exchange = Exchange(betas=headers.get("anthropic-beta", ""), stand_in=stand_in if params.get(stand_in) else "")
        if endpoint.frames:
            params["headers"] = headers
        else:  # LiteLLM sends them on none of these routes, or not to all providers: there the session has to
            exchange.headers_to_add = headers
        produce = partial(self._produce, endpoint, params, exchange, request.dialect, tally)
        call = self._bridge.call(produce, request.peer)
        try:
            response: Response = call.first()
        except BaseException:
            call.close()
            raise
        response.tally = tally
        return response

    def _fixed_answer(self, request: Request, path: str) -> Response | None:
        """The answer to a request that leads to no provider; None where it is another."""
        if path == "/api/show":
            require_method(request, "POST")
            return json_response(200, self._ollama_show(parse_json_object(request)))
        if path == MODELS_PATH or path.startswith(f"{MODELS_PATH}/"):
            found = self._models(request, unquote(path.removeprefix(MODELS_PATH).lstrip("/")))
        elif path == "":  # Claude Code asks whether anybody is there
            found = {"message": "litellm_memory_proxy, sdk mode"}
        elif path == "/api/version":
            found = {"version": OLLAMA_VERSION}
        elif path == "/api/tags":
            found = {"models": [ollama_model(name) for name in self._model_names()]}
        else:
            return None
        require_method(request, "GET", "HEAD")
        return json_response(200, found)

    @staticmethod
    def _ask_for_usage(endpoint: Endpoint, params: dict[str, Any]) -> bool:
        """Have a stream of completions end with its usage, as LiteLLM's server does; whether the client wanted none.

        LiteLLM keeps it from providers that do not know ``stream_options``, and counts by itself there.
        """
        wanted = params.get("stream_options") or {}
        streams = endpoint.function in ("acompletion", "atext_completion") and params.get("stream") is True
        if not streams or wanted.get("include_usage") is True:
            return False
        params["stream_options"] = {**wanted, "include_usage": True}
        return True

    def _price(self, model: str, model_id: str | None, usage: Mapping[str, Any]) -> float | None:
        """LiteLLM's price of a call to this deployment; raises what LiteLLM does where it has none for the model."""
        deployment = view_of(self.router).deployment(model_id or "")
        params = {} if deployment is None else deployment.litellm_params.model_dump(exclude_none=True)
        info = {} if deployment is None else deployment.model_info.model_dump(exclude_none=True)
        name = filled_in(deployment.model_name, params["model"], model) if deployment else model
        cost = self._litellm.completion_cost(
            {"model": name, "usage": dict(usage)},
            model=name,
            custom_pricing=any("cost_per" in key for key in {**params, **info}) or None,
            router_model_id=model_id,
        )
        return float(cost) if 0 <= cost < MAX_COST else None

    def _params(self, request: Request, endpoint: Endpoint, given: Mapping[str, str]) -> dict[str, Any]:
        """The parameters of path and body, checked as far as LiteLLM would stumble over them."""
        if "response_id" in given:
            refuse_unstored(given["response_id"], request.query)
            return dict(given)
        params = {**endpoint.read(request), **given}
        model = params.get("model")
        if not isinstance(model, str) or not model:
            raise ProxyError(400, "the request body must name a model", param="model")
        if len(model) > MAX_MODEL_NAME:
            raise ProxyError(400, f"a model's name has at most {MAX_MODEL_NAME} characters", param="model")
        if params.get("stream") is True and endpoint.frames is None:
            raise ProxyError(400, f"{request.path} has no streams", param="stream")
        check_shape(params, endpoint.shape)
        for name in (*params, *(params.get("extra_body") or ())):
            own = name in self._own_params or name.startswith(FORBIDDEN_PREFIXES)
            if own and name not in CLIENT_PARAMS:
                raise not_for_clients(name)
        return params

    async def _produce(
        self,
        endpoint: Endpoint,
        params: dict[str, Any],
        exchange: Exchange,
        dialect: str,
        tally: Tally,
        channel: Channel,
    ) -> Response | None:
        """Call LiteLLM; returns a whole answer, and puts a streamed one into the channel: its head, then its events."""
        EXCHANGE.set(exchange)
        self._runtime.uncounted.set(not self._counting)
        model = params.get("model", "")
        result: Any = None
        opening = Opening(channel, exchange, NDJSON_HEADERS if dialect == OLLAMA else SSE_HEADERS)
        try:
            result = await self._call(endpoint, params)
            if stated := false_answer(exchange):
                raise stated
            if params.get("stream") is not True or endpoint.frames is None:
                tally.add(result.get("usage") if isinstance(result, dict) else getattr(result, "usage", None))
                tally.known_cost = hidden_params(result).get("response_cost")  # mostly known by now: pricing takes time
                kind, body = endpoint.write(result, served_model(result, model))
                return Response(200, [("Content-Type", kind), *provider_headers(exchange)], body)
            async for data in endpoint.frames(result, served_model(result, model), tally):
                await opening.put(data)
            opening.end()
        except Exception as error:
            failure = self._failure(error, exchange, model)
            if not self._counting:  # else a callback may look at it yet
                forget_frames(error)
            if not opening.over:
                raise failure from None
            tally.error_status = failure.status
            await channel.put(sse_error(failure.redact(self._log.redact), dialect, tally.events))
        finally:  # a stream that is left behind would keep its connection to the provider
            # Not the result: the tally outlives it, and may wait for long.
            tally.price = partial(self._price, served_model(result, model), hidden_params(result).get("model_id"))
            opening.close()
            if hasattr(result, "aclose"):
                await result.aclose()
            await exchange.close()
            empty_class(type(result))
        return None

    async def _call(self, endpoint: Endpoint, params: dict[str, Any]) -> Any:
        """What LiteLLM answers; raises ProxyError where there is no key or no answer, and whatever LiteLLM does."""
        model = params.get("model", "")
        if not self._has_fallbacks and (keyless := self._keyless(model)):  # else another model may answer
            raise keyless
        if endpoint.function in STREAM_MODULES and params.get("stream") is True:
            await import_aside(STREAM_MODULES[endpoint.function])
        call = getattr(self, endpoint.function, None) or getattr(self.router, endpoint.function)
        result = await call(**params)
        if result is None:
            raise ProxyError(502, f"LiteLLM gave no answer for {model}", blame=BACKEND)
        return result

    def _failure(self, error: Exception, exchange: Exchange, model: str) -> ProxyError:
        """What the client is told of an exception out of LiteLLM."""
        if exchange.lost:
            return lost_conversation(exchange.stand_in)
        if stated := false_answer(exchange) or event_error(exchange, None if exchange.failed else error):
            return stated
        if isinstance(error, ProxyError) and error.blame == PROVIDER and not exchange.sent:
            return self._unexpected(error, exchange, model)  # LiteLLM has made the error event
        if isinstance(error, ProxyError) and not exchange.failed:
            silent = exchange.sent and not exchange.heard  # then LiteLLM has made the error event
            return ended_early() if silent else error
        if not exchange.sent and (keyless := self._keyless(model)):
            return keyless
        if not exchange.sent and (status := cause_status(error, LOGIN_STATUS)):
            return ProxyError(status, f"the model {model!r} has no credentials: {plain_message(error)}")
        if exchange.status >= 400:
            return provider_failure(exchange, error)
        if broken := connection_status(exchange.fault or error):
            what = "did not answer in time" if broken == 504 else "could not be reached, or broke off"
            message = f"the provider {exchange.host or 'of ' + model} {what}: {plain_message(error)}"
            return ProxyError(broken, message, blame=BACKEND)
        status = class_status(error, LITELLM_STATUS)
        if status is None or (not exchange.sent and status >= 500):
            return self._unexpected(error, exchange, model)
        message = sent_text(exchange.error_object) or plain_message(error)
        pause: float | None = None if exchange.sent else getattr(error, "cooldown_time", None)
        if pause is not None:
            return ProxyError(status, message, headers=[("Retry-After", str(int(pause) + 1))], blame=RESTING)
        blame = CLIENT if status < 500 else BACKEND
        return ProxyError(status, message, headers=provider_headers(exchange), blame=blame)

    def _unexpected(self, error: Exception, exchange: Exchange, model: str) -> ProxyError:
        """An exception that no provider caused: LiteLLM could not translate the request, or has a defect."""
        if exchange.stand_in and not exchange.sent:  # it looks for the conversation in its server's database
            return lost_conversation(exchange.stand_in)
        if not (model or exchange.sent):  # a response by its id, made out of a chat, such as Claude's
            return ProxyError(404, f"this response is kept nowhere: {plain_message(error)}", param="response_id")
        self._log.event("ERROR", "sdk", "unexpected", error=type(error).__name__, message=plain_message(error))
        if exchange.sent:
            return ProxyError(500, f"LiteLLM failed on the answer of {model}: {plain_message(error)}", blame=BACKEND)
        said = f"LiteLLM cannot translate this request for {model}: {plain_message(error)}"
        return ProxyError(400, said, blame=UNSURE)

    def _keyless(self, model: str) -> ProxyError | None:
        """The 401 of a model without a key; None for any other."""
        keys = self.missing_keys.get(self._covering_name(model))
        message = f"the model {model!r} has no key: set {keys} in the proxy's environment"
        return ProxyError(401, message, code="missing_api_key") if keys else None

    def _covering_name(self, model: str) -> str:
        """The name of the config under which a model is served: its own, its alias's, or the longest wildcard."""
        names, alias = self._config.model_names, self._config.aliases.get(model, model)
        model = alias["model"] if isinstance(alias, dict) else alias
        covering = (name for name in names if "*" in name and fnmatch.fnmatchcase(model, name))
        return model if model in names else max(covering, key=len, default="")

    def _models(self, request: Request, wanted: str) -> dict[str, Any]:
        """``GET /models`` and ``GET /models/{id}``, in the shape of the client's API."""
        anthropic = bool(request.headers.get("anthropic-version"))
        row, names = anthropic_model if anthropic else openai_model, self._model_names()
        if wanted:
            if wanted not in names and "*" not in self._covering_name(wanted):
                raise ProxyError(404, f"the model {wanted!r} does not exist", code="model_not_found", param="model")
            return row(wanted)
        rows = [row(name) for name in names]
        return page_of_models(rows, request.query) if anthropic else {"data": rows, "object": "list"}

    def _ollama_show(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ollama's ``/api/show``: what LiteLLM knows of a model."""
        name = str(body.get("model") or body.get("name"))
        covering = self._covering_name(name)
        entry = next((e for e in self._config.document["model_list"] if e["model_name"] == covering), None)
        if entry is None:
            raise ProxyError(404, f"model {name!r} not found")
        target = entry["litellm_params"]["model"]
        try:
            known = self._litellm.get_model_info(name if "*" in target else target)
        except Exception:  # LiteLLM's way of saying that it does not know the model
            known = {}
        able = (word for word, flag in OLLAMA_ABILITIES.items() if known.get(flag))
        size = {"general.architecture": "litellm", "litellm.context_length": known.get("max_input_tokens") or 32768}
        return {**ollama_model(name), "capabilities": ["completion", *able], "model_info": size}

    async def count_tokens(self, **params: Any) -> Any:
        """How many input tokens Anthropic's ``count_tokens`` body has: the provider's own count where it has one."""
        deployment = await view_of(self.router).select(params["model"], {})
        configured = deployment["litellm_params"]
        model = configured["model"]
        provider = configured.get("custom_llm_provider")
        exchange = EXCHANGE.get()
        if isinstance(configured.get("extra_headers"), dict):
            exchange.headers_to_add = {**exchange.headers_to_add, **configured["extra_headers"]}
        return await self._litellm.acount_tokens(
            model=f"{provider}/{model}" if provider else model,
            messages=params["messages"],
            tools=params.get("tools"),
            system=params.get("system"),
            api_key=configured.get("api_key"),
            api_base=configured.get("api_base"),
        )

    def _model_names(self) -> Iterator[str]:
        """The configured names, and the aliases that are not hidden.

        A wildcard such as ``anthropic/*`` stands for the models that LiteLLM knows there.
        """
        aliases = self._config.aliases.items()
        shown = [name for name, alias in aliases if not (isinstance(alias, dict) and alias.get("hidden"))]
        for name in dict.fromkeys([*self._config.model_names, *shown]):
            provider, _, rest = name.partition("/")
            known = self._litellm.models_by_provider.get(provider) if rest == "*" else None
            yield from (
                sorted(f"{provider}/{model.removeprefix(f'{provider}/')}" for model in known) if known else [name]
            )

    def health(self) -> dict[str, dict[str, Any]]:
        """This backend's rows of ``/health``."""
        return {"session_manager": self.session.health()}

    def samples(self) -> Figures:
        """This backend's part of the metrics."""
        return {"cookies": {(): self.session.cookie_count}}

    def close(self) -> None:
        """Take the Router out of LiteLLM's lists; calls that it is at work on end as they began."""
        view_of(self.router).retire()


# ── binary backend ───────────────────────────────────────────────────────────────────────────────────────────────
# Raw forwarding to LiteLLM's server, in the handler's own thread: bytes in, bytes out, over pooled connections. The
# answer's body is not looked into. The server is our child, or runs elsewhere (--litellm-url).

# Fields of a JSON body whose contents LiteLLM's server sends to the provider as headers.
HEADER_PARAMS = ("extra_headers", "provider_specific_header")


class Upstream:
    """Where the LiteLLM server is: opens connections to it."""

    def __init__(self, url: str) -> None:
        parts, self.port = server_url(url, "--litellm-url", "each client shows LiteLLM's server its own key")
        self.host, self.prefix, self.authority = parts.hostname, parts.path.rstrip("/"), parts.netloc
        self.fault: str | None = None  # why it cannot be reached, until it can be again
        self._closed, self._looking = threading.Event(), threading.Lock()
        self.url = f"{parts.scheme}://{self.authority}{self.prefix}"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None

    def connect(self) -> socket.socket:
        """A new connection, with Nagle's algorithm off; raises ProxyError 503 where there is none to be had."""
        try:
            sock = socket.create_connection((self.host, self.port), CONNECT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected = self._tls.wrap_socket(sock, server_hostname=self.host) if self._tls else sock
        except OSError as error:
            fault = f"the LiteLLM server at {self.url} cannot be reached ({error})"
            if self.fault is None:
                threading.Thread(target=self._await_return, name="LiteLLM server's return", daemon=True).start()
            self.fault = fault
            raise unavailable(fault) from None
        self.fault = None
        if self._tls:
            connected.setblocking(False)  # what it has read ahead, no timeout of the kernel's knows
        else:
            connected.settimeout(None)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(SOON_SECONDS))
        return connected

    def glance(self) -> None:
        """Try a connection, so that `fault` is true of now also where nobody sent a request; it goes on behind us."""
        if self.fault is None and self._looking.acquire(blocking=False):
            look = threading.Thread(target=self._look, name="look at the LiteLLM server", daemon=True)
            look.start()
            look.join(GLANCE_SECONDS)

    def _look(self) -> None:
        with contextlib.suppress(ProxyError):
            self.connect().close()
        self._looking.release()

    def _await_return(self) -> None:
        """Look for the server again and again, so that `fault` is true of now also where nobody asks for it."""
        while not self._closed.wait(PROBE_SECONDS) and self.fault:
            with contextlib.suppress(ProxyError):
                self.connect().close()

    def close(self) -> None:
        """Look for the server no more."""
        self._closed.set()


class Pool:
    """The connections to one upstream; idle ones are used again, the last used first. One lock, held for no I/O."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream, self._lock = upstream, threading.Lock()
        self._idle: deque[Connection] = deque()
        self._busy = 0
        self._closed = False

    def take(self, *, fresh: bool = False) -> Connection:
        """A connection for one exchange; raises ProxyError 503 where none can be made."""
        while not fresh:
            with self._lock:
                if not self._idle:
                    break
                connection = self._idle.pop()
                self._busy += 1
            # One with something to read was closed by the server, or would give an answer to whom it is not meant for.
            if time.monotonic() - connection.used_at < POOL_IDLE_SECONDS and not readable(connection.sock):
                return connection
            self.release(connection)
        connection = Connection(self.upstream.connect())
        with self._lock:
            self._busy += 1
        return connection

    def release(self, connection: Connection, *, keep: bool = False) -> None:
        """Take back a connection, to be used again where a whole answer was read on it; close those idle for long."""
        connection.used_at = now = time.monotonic()
        dropped = [] if keep else [connection]
        with self._lock:
            self._busy -= 1
            if keep:
                self._idle.append(connection)
            while self._idle and (
                self._closed or len(self._idle) > POOL_SIZE or now - self._idle[0].used_at > POOL_IDLE_SECONDS
            ):
                dropped.append(self._idle.popleft())
        for old in dropped:
            old.sock.close()

    def count(self) -> dict[str, int]:
        """How many connections are busy, and how many idle."""
        with self._lock:
            return {"busy": self._busy, "idle": len(self._idle)}

    def close(self) -> None:
        """Close what is idle, and from now on whatever comes back."""
        self.upstream.close()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, deque()
        for connection in idle:
            connection.sock.close()


def readable(sock: socket.socket, seconds: float = 0.0) -> bool:
    """Whether there is something to read right now, or within so long, the end of the input included."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


# Linux tells a closed half from data that waits to be read; elsewhere (macOS) only the close of both halves is seen.
CLOSED: int = getattr(select, "POLLRDHUP", select.POLLHUP)
BAD_ANSWER = "the LiteLLM server's answer is malformed"


NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Stale(Exception):
    """A connection out of the pool was closed before the first byte of an answer: a new one may do."""


class AnswerHead(NamedTuple):
    """The head of a server's answer; ``lines`` are those of its fields, each behind its CRLF."""

    status: int
    reason: str
    minor_version: int
    lines: str


class Connection(Reader):
    """A connection to the server, for one exchange after another: send a request, read its answer.

    Args:
        sock: as `Upstream.connect` makes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock
        self.used_at = 0.0  # when an exchange ended on it, by the monotonic clock
        tls = isinstance(sock, ssl.SSLSocket)
        self._flags = 0 if tls else socket.MSG_DONTWAIT
        self._early = 0 if tls else select.POLLIN  # an answer before the request is sent; TLS has messages of its own

    def begin(self, peer: Peer, timeout: float) -> None:
        """An exchange begins, under watch of the client; the server may be silent for ``timeout`` seconds."""
        self._peer, self._timeout = peer, timeout
        self.final: AnswerHead | None = None  # the head of the answer, once it was read
        self._begun = self._answered = False
        self._sent_at = 0.0
        self._poll: select.poll | None = None  # made once there is something to wait for

    def receive(self) -> bytes:
        """The server's next bytes; waits for them, and for the client to go away."""
        while True:
            try:
                data = self.sock.recv(RECEIVE_BYTES)  # waits for `SOON_SECONDS`: most answers need no more
                break
            except NOT_NOW:
                self._wait(select.POLLIN)
            except OSError as error:
                if self._answered:  # of a body without a length, the end of the input would be its end
                    raise ProxyError(502, f"the connection broke ({error})") from None
                data = b""
                break
        if not data and not self._answered and self.used_at and time.monotonic() - self._sent_at < STALE_SECONDS:
            raise Stale
        self._answered = True
        return data

    def _wait(self, events: int) -> int:
        """Wait until the server's socket is ready for one of these events; returns those that it is ready for."""
        deadline = time.monotonic() + self._timeout
        server, client = self.sock.fileno(), self._peer.fileno()
        if self._poll is None:
            self._poll = select.poll()
            if client >= 0:
                self._poll.register(client, select.POLLIN | CLOSED)
        self._poll.register(server, events)
        while True:
            ready = dict(self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                raise ProxyError(504, f"the LiteLLM server sent nothing for {self._timeout:g} s")
            if server in ready:
                return ready[server]
            state = self._peer.state()
            if state == "gone":
                raise ClientGone
            if state == "talking":  # its next request waits, and would wake us for ever: watch for its close alone
                self._poll.modify(client, CLOSED)

    def send(self, data: bytes) -> bool:
        """Send to the server; False where it answers or closes before it has taken everything. Raises ClientGone."""
        left = memoryview(data)
        while left:
            if self._begun and self._wait(select.POLLOUT | self._early) & ~select.POLLOUT:
                self._sent_at = time.monotonic()
                self.hear()
                while self.buffer and not self.final:
                    self.hear()
                if self.final:
                    return False
                continue
            self._begun = True  # an unused connection takes the first bytes without being asked
            try:
                left = left[self.sock.send(left[:RECEIVE_BYTES], self._flags) :]
            except NOT_NOW:
                continue
            except OSError:
                self._sent_at = time.monotonic()
                return False
        self._sent_at = time.monotonic()
        return True

    def final_head(self) -> AnswerHead:
        """The head of the answer."""
        while self.final is None:
            self.hear()
        return self.final

    def hear(self, *, awaits_100: bool = False) -> int:
        """Read the server's next head, and keep it as ``final`` or pass it on; returns its status.

        Args:
            awaits_100: a 100 is passed on too; else nobody waits for it any more.
        """
        try:
            head = self.head()
        except ProxyError as error:
            if error.status == 504:
                raise
            raise ProxyError(502, BAD_ANSWER, blame=BACKEND) from None
        match = ANSWER_HEAD.fullmatch((head or b"").decode("latin-1"))
        if match is None:
            said = "the LiteLLM server closed the connection" if head is None else BAD_ANSWER
            raise ProxyError(502, said, blame=BACKEND)
        minor, code, reason, lines = match.groups()
        status = int(code)
        if status >= 200 or status == 101:  # no other follows in this exchange (RFC 9110 §15.2)
            self.final = AnswerHead(status, reason or "", int(minor), lines)
        elif status != 100 or awaits_100:
            self._peer.interim(status, Headers.parse(lines))
        return status


class AnswerBody:
    """The body of a server's answer, read as it is asked for.

    Args:
        finish: called once, with whether the body was read to its end.
    """

    def __init__(self, connection: Connection, framing: int, finish: Callable[[bool], None]) -> None:
        # The head leaves at once, however long the first byte of the body takes.
        early = () if connection.buffer else (b"",)
        self._pieces, self._finish = chain(early, connection.body(framing)), finish
        self._open = True

    def __iter__(self) -> AnswerBody:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._pieces)
        except StopIteration:
            self._end(whole=True)
            raise
        except ProxyError as error:
            raise ProxyError(502, f"the LiteLLM server broke off its answer: {error.message}") from None

    def close(self) -> None:
        """Give the connection up where it is still in use."""
        self._end(whole=False)

    def _end(self, *, whole: bool) -> None:
        if self._open:
            self._open = False
            self._finish(whole)


class BinaryBackend:
    """Forwards requests to LiteLLM's server.

    Args:
        pool: connections to the server.
        server: the server itself, where it is our child.
    """

    name = "binary"

    def __init__(self, config: Config, pool: Pool, server: LitellmServer | None = None) -> None:
        self.pool, self.server, self._upstream = pool, server, pool.upstream
        self._kept_back, self._timeout = HOP_BY_HOP | kept_back(config.mappings), config.silent_seconds
        self._template = lru_cache(maxsize=REMEMBERED_HEADS)(self._make_template)
        authority, prefix = re.escape(self._upstream.authority), re.escape(self._upstream.prefix)
        self._own_place = re.compile(rf"(?i:https?://{authority})?{prefix}(?=/(?!/)|$)")

    def answer(self, request: Request, route: Route) -> Response:
        """Forward one request.

        Raises:
            ProxyError: 503 while the server is down, 502 or 504 where it breaks off or is silent.
            ClientGone: the client left; the connection to the server has been closed.
        """
        if self.server and (reason := self.server.down()):
            raise unavailable(reason)
        body = None if request.head.is_form else self._json_body(request)
        head = self._head(request, route)
        # A streamed body cannot be sent again, and so is not trusted to a connection that may be stale.
        for fresh in (body is None and is_large(request.body), True):
            connection = self.pool.take(fresh=fresh)
            connection.begin(request.peer, self._timeout)
            try:
                sent = self._send_form(connection, request, head) if body is None else connection.send(head + body)
                return self._answer(connection, request, sent)
            except Stale:
                self.pool.release(connection)
            except OSError as error:
                self.pool.release(connection)
                raise ProxyError(502, f"the connection to the LiteLLM server broke ({error})", blame=BACKEND) from None
            except BaseException:
                self.pool.release(connection)
                raise
        raise AssertionError  # a fresh connection is not stale

    @staticmethod
    def _json_body(request: Request) -> bytes:
        """The body as it is sent on; LiteLLM's server takes all but forms for JSON."""
        framing = request.body.framing
        if framing == BODILESS:
            return b""
        data = request.body.read()
        request.model = model_named_in(data)
        refuse_smuggled_headers(data)
        return (chunk(data) if data else b"") + LAST_CHUNK if framing == CHUNKED else data

    def _lead_through_us(self, lines: str) -> list[tuple[str, str]]:
        """The fields of a redirect; one to the server is without its place: past us, no memory is injected."""

        def led(name: str, value: str) -> tuple[str, str]:
            there = self._own_place.match(value) if name.lower() == "location" else None
            return (name, value[there.end() :] or "/") if there else (name, value)

        return [led(name, value) for name, value in Headers.parse(lines).fields]

    def _head(self, request: Request, route: Route) -> bytes:
        """The request head for the server: the client's own but for what a proxy changes."""
        before, after = self._template(request.head, route.injected)
        length = b"%d" % request.body.framing if request.head.framing == BY_DIGITS else b""
        return b"%b%b%b%b\r\n\r\n" % (before, length, after, request.id.encode())

    def _make_template(self, head: Head, injected: tuple[tuple[str, str], ...]) -> tuple[bytes, bytes]:
        """What is the same in the head of every such request: its bytes up to the length, if any, and up to the id."""
        headers = head.headers
        fields = [
            (name, self._upstream.authority if name.lower() == "host" else value)
            for name, value in headers.end_to_end(self._kept_back)
        ]
        if not headers.values("host"):
            fields.insert(0, ("Host", self._upstream.authority))
        if headers.tokens("transfer-encoding"):
            fields.append(("Transfer-Encoding", "chunked"))
        if upgrades(headers):
            fields += [("Connection", "Upgrade"), ("Upgrade", headers.get("upgrade"))]
        mark = "\0"  # stands in no head
        marked = [(name, mark if name.lower() == "content-length" else value) for name, value in fields]
        line = f"{head.method} {self._upstream.prefix}{head.target} HTTP/1.1"
        whole = head_bytes(line, field_lines([*marked, *injected, ("x-request-id", "")])).removesuffix(b"\r\n\r\n")
        before, _, after = whole.partition(mark.encode())
        return before, after

    def _answer(self, connection: Connection, request: Request, sent: bool) -> Response:
        """Read the head of the answer to a request that was sent, as a whole or not; the front asks for its body."""
        status, reason, minor, lines = connection.final_head()
        if status == 101:
            if not upgrades(request.headers):
                raise ProxyError(502, BAD_ANSWER)
            return self._tunnel(connection, status, reason, Headers.parse(lines))
        passed_on, minded = Headers.mind(lines)
        framing = response_framing(request.method, status, minded)
        keep = sent and minor == 1 and framing != UNTIL_CLOSE and "close" not in minded.tokens("connection")
        response = Response(status, reason=reason, passed_on=passed_on)
        if 300 <= status < 400:
            response.headers, response.passed_on = self._lead_through_us(passed_on), ""
        if framing == BODILESS:
            response.bodiless = True
            if status != HTTPStatus.NO_CONTENT:  # which has no length either (RFC 9110 §8.6)
                response.headers += [field for field in minded.fields if field[0].lower() == "content-length"]
            self._finish(connection, keep)
        elif 0 < framing <= len(connection.buffer):  # the body came with its head: there is nothing to wait for
            response.body = connection.some(framing)
            self._finish(connection, keep)
        else:
            response.body = AnswerBody(connection, framing, lambda whole: self._finish(connection, keep and whole))
            response.length = framing if framing > 0 else None
        return response

    def _send_form(self, connection: Connection, request: Request, head: bytes) -> bool:
        """Send head and form; False where the server answered before it had all of it."""
        body, framing = request.body, request.body.framing
        if framing and request.head.expects_continue:
            if not connection.send(head) or not self._may_continue(connection):
                return False
            head = b""
        if not is_large(body):
            return connection.send(head + body.read())  # one write, and it can be sent again
        for piece in body.pieces():
            if not connection.send(head + (chunk(piece) if framing == CHUNKED else piece)):
                return False
            head = b""
        return connection.send(head + (LAST_CHUNK if framing == CHUNKED else b""))

    @staticmethod
    def _may_continue(connection: Connection) -> bool:
        """Wait for the server's word on ``Expect``; False where it answers for good (RFC 9110 §10.1.1)."""
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        while connection.buffer or poll.poll(CONTINUE_SECONDS * 1000):
            if connection.hear(awaits_100=True) == 100:
                return True
            if connection.final:
                return False
        return True

    def _finish(self, connection: Connection, keep: bool) -> None:
        """The exchange is over; its connection is kept where the answer was whole and nothing came behind it."""
        self.pool.release(connection, keep=keep and not connection.buffer)

    def _tunnel(self, connection: Connection, status: int, reason: str, headers: Headers) -> Response:
        """A 101: from here on bytes flow both ways, whatever they are."""
        fields = [*headers.end_to_end(), ("Connection", "Upgrade"), ("Upgrade", headers.get("upgrade"))]

        def tunnel(client: socket.socket, head: bytes, early: bytes) -> None:
            try:
                connection.sock.settimeout(None)
                connection.sock.sendall(early)
                client.sendall(head + connection.buffer)
                pump(client, connection.sock)
            finally:
                self._finish(connection, keep=False)

        return Response(status, fields, reason=reason, tunnel=tunnel)

    def health(self) -> dict[str, dict[str, Any]]:
        """This backend's rows of ``/health``."""
        if self.server is None:
            self._upstream.glance()
        reason = self.down()
        row = {"status": "unhealthy" if reason else "healthy", "url": self._upstream.url, "reason": reason}
        return {"litellm_server": {**row, **({"restarts": self.server.restarts} if self.server else {})}}

    def down(self) -> str | None:
        """Why the server cannot be asked right now; None where it can, as far as is known."""
        return (self.server.down() if self.server else None) or self._upstream.fault

    def samples(self) -> Figures:
        """This backend's part of the metrics."""
        return {"pool_connections": {(("state", state),): count for state, count in self.pool.count().items()}}


def unavailable(reason: str) -> ProxyError:
    """The 503 of a LiteLLM server that cannot be asked."""
    return ProxyError(503, reason, headers=[("Retry-After", str(RETRY_AFTER_SECONDS))], blame=BACKEND)


def is_large(form: Body) -> bool:
    """Whether a form is sent on as it comes in, and not kept; one of unknown length is."""
    return not 0 <= form.framing <= RECEIVE_BYTES


MODEL_FIELD = re.compile(rb'"model"\s*:\s*"([^"\\]{0,500})"')


def model_named_in(data: bytes) -> str:
    """The model that a JSON body names, for the log and the metrics; "" where it names none.

    A body is parsed only where more than one place could be meant: a conversation is large, its model is not.
    """
    at = data.find(b'"model"')
    if at < 0:
        return ""
    found = MODEL_FIELD.match(data, at)
    if found and data.find(b'"model"', found.end()) < 0:
        return found[1].decode("utf-8", "replace")
    named = json_object(data).get("model")
    return named if isinstance(named, str) else ""


def refuse_smuggled_headers(data: bytes) -> None:
    """Refuse a body that would make LiteLLM's server replace the headers that we inject.

    The server merges a body's ``extra_headers`` over the forwarded ones (measured with 1.106.2), the memory id
    included, and so it does with the headers of a fallback. Forms are not looked into: it reads no headers there.

    Raises:
        ProxyError: 400.
    """
    if not (b"extra_headers" in data or b"specific_header" in data or b"fallbacks" in data or b"\\u" in data):
        return
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return  # no object, no fields
    document = parse_json(data)
    for name, value in document.items() if isinstance(document, dict) else ():
        if name in HEADER_PARAMS or (name.endswith("fallbacks") and re.search(r'headers?"', json.dumps(value))):
            raise not_for_clients(name)


def pump(left: socket.socket, right: socket.socket) -> None:
    """Copy bytes both ways until either side closes; neither direction waits for the other."""
    other = {left: right, right: left}
    waiting = {left: b"", right: b""}  # what the socket has not taken yet
    for sock in other:
        sock.setblocking(False)
    while True:
        poll = select.poll()
        for sock, sink in other.items():
            wants = (0 if waiting[sink] else select.POLLIN) | (select.POLLOUT if waiting[sock] else 0)
            if wants:  # else a reset, which a poll always tells, would wake us for ever
                poll.register(sock, wants)
        buffered = any(
            isinstance(sock, ssl.SSLSocket) and sock.pending() and not waiting[other[sock]] for sock in other
        )
        poll.poll(0 if buffered else None)
        try:
            for sock, sink in other.items():
                with contextlib.suppress(*NOT_NOW):
                    waiting[sock] = waiting[sock][sock.send(waiting[sock]) :] if waiting[sock] else b""
                with contextlib.suppress(*NOT_NOW):
                    if not waiting[sink]:
                        waiting[sink] = sock.recv(RECEIVE_BYTES)
                        if not waiting[sink]:
                            return
        except OSError:
            return


# The child's program: LiteLLM's command line, and a watch over the pipe that the proxy holds. The proxy never writes
# to it, so that the read returns when the proxy is gone, however it went; then the whole process group goes too, and
# what would be left of it: the copy of the config.
CHILD_PROGRAM = """\
import contextlib, os, signal, sys, threading
copy = sys.argv.pop(1)
def watch():
    os.read(0, 1)
    with contextlib.suppress(OSError):
        os.unlink(copy)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
from litellm import run_server
sys.argv[0] = "litellm"
sys.exit(run_server())
"""


class LitellmServer:
    """LiteLLM's server as our child: started, watched, restarted with growing pauses, taken down with us.

    It reads a copy of the config: an edit that was refused, or not yet taken over, must not come with a restart.
    """

    def __init__(self, config: Config, port: int, log: Log) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.config, self._port, self._log = config, port, log
        self._copy = Path(f"{config.path}.{port}.yaml")
        self._stillborn = ""  # its last word, where it has died without ever having served
        self._obstacle = ""  # why it cannot even be started now
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._served = False
        self.restarts = 0
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)  # shown where it dies: it says a lot while it is well
        self._thread = threading.Thread(target=self._supervise, name="LiteLLM server", daemon=True)

    def start(self) -> None:
        """Begin starting the server; `wait` returns when it serves.

        Raises:
            StartError: LiteLLM is not installed, or the server's port is taken.
        """
        if find_spec("litellm") is None:
            raise StartError("binary mode needs LiteLLM's server: pip install 'litellm[proxy]', or --litellm-url URL")
        if port_taken(self._port):
            raise StartError(f"port {self._port} is taken: choose another with --litellm-port, or use --litellm-url")
        self._thread.start()

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Return when the server answers, or when the program is to stop.

        Raises:
            StartError: it did not within `CHILD_READY_SECONDS`, or died before.
        """
        deadline = time.monotonic() + CHILD_READY_SECONDS
        while not self._up.wait(0.1) and not stopped():
            if self._stillborn:
                raise StartError(f"the LiteLLM server does not start with this config: {self._stillborn}")
            if time.monotonic() > deadline:
                limit = f"{CHILD_READY_SECONDS:g} s"
                raise StartError(f"the LiteLLM server did not get ready within {limit}; its output is above")

    def down(self) -> str | None:
        """Why the server cannot be asked right now; None where it can."""
        if self._up.is_set():
            return None
        if self._obstacle:
            return f"the LiteLLM server cannot be started: {self._obstacle}"
        return "the LiteLLM server is starting; try again in a few seconds"

    def _supervise(self) -> None:
        pauses = iter(CHILD_PAUSES)
        while not self._stopping.is_set():
            began = time.monotonic()
            self._run_once()
            if self._stopping.is_set():
                return
            if time.monotonic() - began > CHILD_STABLE_SECONDS:
                pauses = iter(CHILD_PAUSES)
            pause = next(pauses, CHILD_PAUSES[-1])
            self.restarts += 1
            words = [text for text in self._last_words if text]
            for text in words:
                self._log.event("ERROR", "litellm", "output", message=text)
            self._last_words.clear()
            if not self._served:
                named = (text for text in reversed(words) if re.match(r"[\w.]*(Error|Exception)\b", text))
                self._stillborn = self._log.redact(next(named, words[-1] if words else "it ended without a word"))
            self._log.event("ERROR", "litellm", "died", message=f"the LiteLLM server stopped; restart in {pause:g} s")
            self._stopping.wait(pause)

    def _run_once(self) -> None:
        """Start the server and stay with it until it ends."""
        # Who answers there would pass for the server, which moves elsewhere or dies later.
        self._obstacle = f"port {self._port} is taken by another process" if port_taken(self._port) else ""
        if self._obstacle:
            self._last_words.append(self._obstacle)
            return
        config = save_copy(self.config, self._copy)
        arguments = [str(self._copy), "--config", config, "--host", "127.0.0.1", "--port", str(self._port)]
        environment = {**LITELLM_ENVIRONMENT, **self.config.environment}
        # Loopback only and behind this proxy: a missing or weak master key is acceptable there.
        environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD_PROGRAM, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is for us: requests in flight still need the server
            )
        except OSError as error:  # no open file is left, no process, no memory; or the environment is too large
            self._last_words.append(f"OSError: {error}")
            return
        if self._stopping.is_set():  # `stop` came while it was being started, and may have seen none
            self._process.terminate()
        for watch in (self._await_ready, self._await_death):
            threading.Thread(target=watch, args=(self._process,), daemon=True).start()
        assert self._process.stdout
        for line in self._process.stdout:
            text = re.sub(r"\x1b\[[0-9;]*m", "", line.decode("utf-8", "replace")).rstrip()
            self._last_words.append(text)
            self._log.event("DEBUG", "litellm", "output", message=text)
        self._up.clear()
        self._process.wait()
        assert self._process.stdin
        self._process.stdin.close()

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Ask until the server answers, and show that time goes by."""
        with self._log.progress("litellm", "waiting for the LiteLLM server"):
            while process.poll() is None and not self._stopping.wait(0.25):
                if server_answers(self._port) and process.poll() is None:
                    self._served, self._stillborn = True, ""
                    self._up.set()
                    return

    def _await_death(self, process: subprocess.Popen[bytes]) -> None:
        """Say at once that the server is down, and end what it leaves behind, which may hold on to its output."""
        process.wait()
        self._up.clear()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Take the server down: SIGTERM to its group, SIGKILL to what is left after `CHILD_STOP_SECONDS`."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(CHILD_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._thread.join(CHILD_STOP_SECONDS)
        with contextlib.suppress(OSError):  # there is none, or the disk is read-only
            self._copy.unlink()


def port_taken(port: int) -> bool:
    """Whether somebody listens on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def server_answers(port: int) -> bool:
    """Whether LiteLLM's server on this port of loopback says that it is alive."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health/liveliness")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# ── failover ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Which side answers a request, where there are two. It is decided before the first byte of an answer goes out, and not
# again after it.


# What an error shows of the SDK: a provider's, that it works.
WORKED = {CLIENT: None, PROVIDER: True, BACKEND: False, RESTING: None}
# Errors on which the binary side is asked → from which status on its answer is no better. A 429 of both sides is shown
# with the SDK's Retry-After.
REPEATED = {BACKEND: 500, UNSURE: 400, RESTING: 429}
LITELLM_TIMEOUT = 408  # so LiteLLM's server says that the provider was slow: no better than the SDK's 504


class Failover:
    """The SDK's side, with the binary side behind it.

    In the order of the code: what leads to no model is the SDK's. While the circuit breaker holds the SDK back, the
    binary side answers, and where that is out of order the SDK after all: the breaker never stands between a user and
    the only way to a model. Else the SDK tries; where it has failed, and not the client or the provider, the binary
    side gets the request. Where neither has a good answer, the SDK's error is the answer, whoever was asked first: it
    names the provider and the cause, in the client's dialect, while the binary side's may be a gateway's page.
    """

    name = "sdk"

    def __init__(self, sdk: SdkBackend, binary: BinaryBackend, breaker: CircuitBreaker, log: Log) -> None:
        self._sdk, self._binary, self._breaker, self._log = sdk, binary, breaker, log

    def answer(self, request: Request, route: Route) -> Response:
        """Serve one request; raises what `SdkBackend.answer` raises."""
        if not self._sdk.calls_a_model(request):
            return self._sdk.answer(request, route)
        ticket = self._breaker.ticket()
        held_back = ticket is None
        if held_back:
            instead = self._answer_instead(request, route)
            if instead:
                return instead
            ticket = self._breaker.ticket(out_of_turn=True)
        try:
            response = self._sdk.answer(request, route)
        except ClientGone:
            self._breaker.report(ticket, None)
            raise
        except ProxyError as error:
            return self._after(error, request, route, ticket, held_back)
        except Exception as error:
            return self._after(defect(error, request.id, self._log), request, route, ticket, held_back)
        self._breaker.report(ticket, True)
        return response

    def _answer_instead(self, request: Request, route: Route) -> Response | None:
        """The binary side's answer while the SDK is held back; None where it is out of order."""
        request.body.read()  # kept: the SDK may need it too
        try:
            response = self._binary_answer(request, route)
        except ProxyError as error:
            if error.blame != BACKEND:
                raise
            return None
        if out_of_order(response):
            response.discard()
            return None
        return response

    def _after(
        self, failure: ProxyError, request: Request, route: Route, ticket: int | None, held_back: bool
    ) -> Response:
        """What becomes of a request on which the SDK has failed; raises the failure where that is the answer.

        Args:
            held_back: the SDK was, so that the binary side has been asked already.
        """
        if failure.blame != UNSURE:
            self._breaker.report(ticket, WORKED[failure.blame])
        second = None
        try:
            if failure.blame in REPEATED and not held_back:
                second = self._repeat(request, route, failure)
        finally:  # also where the client leaves meanwhile: a probe must not stay out for ever
            if failure.blame == UNSURE:
                self._breaker.report(ticket, False if second else None)
        if second is None:
            raise failure
        return second

    def _binary_answer(self, request: Request, route: Route) -> Response:
        response = self._binary.answer(request, route)
        response.backend = self._binary.name
        return response

    def _repeat(self, request: Request, route: Route, failure: ProxyError) -> Response | None:
        """The binary side's answer to a request on which the SDK has failed; None where it is no better."""
        said = self._log.redact.cut(failure.message, MAX_LOGGED)
        message = f"the SDK failed ({failure.status} {said}); the binary side is asked"
        self._log.event("WARNING", "failover", "repeated", request_id=request.id, message=message)
        try:
            response = self._binary_answer(request, route)
        except ProxyError:
            return None
        if response.status >= REPEATED[failure.blame] or response.status == LITELLM_TIMEOUT:
            response.discard()
            return None
        return response

    def health(self) -> dict[str, dict[str, Any]]:
        """The rows of both sides; with one of them well, the other's fault is no more than a weakness.

        While the circuit breaker is not closed, the SDK is not well: its last tries have failed.
        """
        breaker = self._breaker
        closed = breaker.state is State.CLOSED
        sdk, binary = self._sdk.health(), self._binary.health()
        rows = {**sdk, **binary}
        if (closed and is_well(sdk)) or is_well(binary):
            rows = softened(rows)
        rows["circuit_breaker"] = {
            "status": "healthy" if closed else "degraded",
            "state": breaker.state.name.lower(),
            "failures": breaker.failures,
            "trips": breaker.trips,
        }
        return rows


def softened(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of a side that is not the only way: what is ill there is no more than a weakness."""
    ill = {name: {**row, "status": "degraded"} for name, row in rows.items() if row["status"] == "unhealthy"}
    return {**rows, **ill}


def is_well(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether no row of a side's health is unhealthy."""
    return all(row["status"] != "unhealthy" for row in rows.values())


def out_of_order(response: Response) -> bool:
    """Whether LiteLLM's server, or a gateway in front of it, failed before a provider was called.

    The server marks what it has begun a call for with ``x-litellm-call-id``, errors included: its own, those of its
    connection to the provider, and the provider's. These cannot be told apart for good (``llm_provider-*`` headers
    come with a provider's error on some routes only, never on ``/v1/messages``; measured with 1.108.7), and a repeat
    could have the provider do, and bill, the same thing twice. So an error with the mark is final. Without it no model
    was called (``count_tokens`` lacks it always, and does nothing). A gateway's 504 is final too: what it
    has waited for may well be under way.
    """
    marked = "\r\nx-litellm-call-id:" in response.lines().lower()
    return response.status >= 500 and response.status != 504 and not marked


# ── application ──────────────────────────────────────────────────────────────────────────────────────────────────
# One request from end to end: own endpoint or model API, authenticate, route, answer, record. No sockets.


class Backend(Protocol):
    """A way to the models."""

    name: str

    def answer(self, request: Request, route: Route) -> Response:
        """Serve one request of the model API; raises ProxyError or ClientGone."""

    def health(self) -> dict[str, dict[str, Any]]:
        """Rows for ``checks`` of ``/health``, each with a ``status``."""


DESKTOP_SCHEMES = frozenset("app file tauri vscode-file vscode-webview".split())  # origins of desktop applications
PREFLIGHT_SECONDS = 600  # how long a browser may remember the answer to a preflight; Chrome takes 7,200 at most


@dataclass(frozen=True)
class Access:
    """Which requests are let in at all, by their ``Host`` and ``Origin``.

    A server on loopback is within reach of every web page that the user opens: through a name that its owner points
    at 127.0.0.1 (DNS rebinding), or by a plain cross-site POST. On another address the master key is the guard.

    Args:
        loopback: the front is bound to loopback.
        hosts: further names in ``Host``, in lower case; ``*`` is any.
        origins: further origins, in lower case; ``*`` is any.
    """

    loopback: bool = True
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def refuse_strangers(self, headers: Headers) -> None:
        """Raises ProxyError 403 for a request that a web page made which does not belong here."""
        if not self.loopback:
            return
        for host in headers.values("host"):  # HTTP/1.0 may have none; no browser speaks it
            name = host_name(host)
            if not (is_loopback(name) or self.hosts & {name, "*"}):
                raise ProxyError(403, f"Host {host!r} is no loopback name; --allow-host {name} lets it in")
        origins = headers.values("origin")
        if not origins and headers.get("sec-fetch-site") == "cross-site":  # a picture or a link: it has no Origin
            raise ProxyError(403, "a web page's request without an Origin is not let in")
        for origin in origins:
            if not self.welcomes(origin):
                raise ProxyError(403, f"Origin {origin!r} is a web page's; --allow-origin {origin} lets it in")

    def welcomes(self, origin: str) -> bool:
        """Whether a page or application of this origin may ask, and read the answer."""
        if re.search(r"[\s,]", origin):
            return False
        scheme, _, authority = origin.lower().partition("://")
        local = scheme in ("http", "https") and is_loopback(host_name(authority))
        return local or (scheme in DESKTOP_SCHEMES and "://" in origin) or bool(self.origins & {origin.lower(), "*"})

    def cors(self, headers: Headers) -> list[tuple[str, str]]:
        """The header fields that let a welcome page read the answer (https://fetch.spec.whatwg.org/#http-cors-protocol)."""
        origin = headers.get("origin")
        if not origin or not self.welcomes(origin):
            return []
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "*"),
            ("Vary", "Origin"),
        ]

    def preflight(self, head: Head) -> list[tuple[str, str]]:
        """The fields that answer a browser's question whether it may ask; [] where the request is no such question."""
        headers = head.headers
        method = headers.get("access-control-request-method")
        if head.method != "OPTIONS" or not method or not self.cors(headers):
            return []
        allowed = [
            ("Access-Control-Allow-Methods", method),
            ("Access-Control-Allow-Headers", headers.get("access-control-request-headers") or "*"),
            ("Access-Control-Max-Age", str(PREFLIGHT_SECONDS)),
        ]
        if headers.get("access-control-request-private-network"):  # from the internet to loopback
            allowed.append(("Access-Control-Allow-Private-Network", "true"))
        return allowed


def host_name(authority: str) -> str:
    """The host of ``host:port`` in lower case, an IPv6 address without its brackets."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_-][a-z0-9._-]*))(?::\d*)?", authority.lower())
    return (match[1] or match[2]).rstrip(".") if match else ""


def is_loopback(name: str) -> bool:
    """Whether a host name (lower case) is this machine's own and nobody else's: RFC 6761 §6.3, RFC 1122 §3.2.1.3."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class InFlight:
    """Counts the requests under way, from head to end, so that what serves them is not taken away before the last."""

    def __init__(self) -> None:
        self._running: deque[None] = deque()  # as long as there are requests; it needs no lock
        self._closed = False
        self._changed = threading.Condition()

    def begin(self) -> bool:
        """A request begins; False where it is too late for that."""
        self._running.append(None)
        if self._closed:
            self.end()
            return False
        return True

    def end(self) -> None:
        """A request that had begun has ended."""
        self._running.pop()
        if self._closed:
            with self._changed:
                self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Let none begin any more, and wait this long for the rest to end."""
        self._closed = True
        with self._changed:
            self._changed.wait_for(lambda: not self._running, seconds)


@dataclass(frozen=True)
class Serving:
    """What requests are served with, from one reading of the config to the next.

    Args:
        primary: the backend of this front.
        sides: by name, those to which a header pattern may send its client.
        in_flight: of all that share a LiteLLM server.
    """

    config: Config
    primary: Backend
    sides: Mapping[str, Backend] = field(default_factory=dict)
    in_flight: InFlight = field(default_factory=InFlight)

    def health(self) -> dict[str, dict[str, Any]]:
        """The rows of every side for ``/health``; an ill one that serves but some clients is a weakness."""
        others = (softened(side.health()) for side in self.sides.values() if side is not self.primary)
        return {**{name: row for rows in others for name, row in rows.items()}, **self.primary.health()}

    @cached_property
    def route(self) -> Callable[[Head], Route]:
        """The route of a request with this head under this config; it is remembered."""
        return lru_cache(maxsize=REMEMBERED_HEADS)(lambda head: route_request(head.headers, self.config.mappings))

    def backend(self, route: Route) -> Backend:
        """The backend for a request with this route."""
        wanted = route.pattern.mode if route.pattern else None
        return self.sides.get(wanted or "", self.primary)


@dataclass
class Record:
    """One request and what becomes of it; ``backend`` is `OWN` for the endpoints of our own.

    ``began`` is when the request's head was read, by the monotonic clock, ``ttft`` how many seconds later the first
    byte of the answer's body was there. ``lines`` are the answer's header fields as the front has sent them.
    """

    request: Request
    began: float
    serving: Serving
    route: Route = NO_ROUTE
    backend: str = OWN
    ttft: float | None = None
    lines: str = ""
    response: Response = field(init=False)


class Admission(NamedTuple):
    """What a front makes of a request's head, before it looks at a config or a body.

    Args:
        own: answers it, where it asks for an endpoint of our own.
        preflight: the fields of its answer, where it is a browser's question whether it may ask.
        cors: the fields that let a welcome page read the answer.
    """

    own: Callable[[Record], Response] | None
    preflight: Sequence[tuple[str, str]]
    cors: Sequence[tuple[str, str]]


class Application:
    """What one front serves.

    On an address that is not loopback, own endpoints need the master key.
    """

    def __init__(self, metrics: Metrics, log: Log, access: Access) -> None:
        self.serving: Serving  # set before the first request, and replaced as a whole: one under way keeps its own
        self._metrics, self._log, self._access = metrics, log, access
        self._reported: set[str] = set()  # patterns whose invalid ids were logged
        self._admit = lru_cache(maxsize=REMEMBERED_HEADS)(self._make_admission)
        self._own = {
            "/health": self._health,
            "/memory-routing/info": self._info,
            "/memory-routing/stats": self._stats,
            "/metrics": self._prometheus,
        }

    def answer(self, request: Request) -> Record:
        """Serve one request; every outcome but a vanished client has a response. The front says when it is out."""
        while not (serving := self.serving).in_flight.begin():
            pass  # it was replaced this very moment
        record = Record(request, time.monotonic(), serving)
        request.id = request.head.request_id or new_request_id()
        cors: Sequence[tuple[str, str]] = ()
        self._metrics.begin()
        try:
            admission = self._admit(request.head)
            cors = admission.cors
            response = self._serve(record, admission)
        except ProxyError as error:
            response = self._error(error, request)
        except ClientGone:
            record.response = Response(499)
            self.end(record)
            raise
        except Exception as error:
            response = self._error(defect(error, request.id, self._log), request)
        record.response, record.backend = response, response.backend or record.backend
        if cors:  # LiteLLM's server has such fields too
            replaced = {name.lower() for name, _ in cors} - {"vary"}
            fields = Headers.parse(response.lines()).fields
            kept = [field for field in fields if field[0].lower() not in replaced]
            response.headers, response.passed_on = [*kept, *cors], ""
        side = serving.primary.name if record.backend == OWN else record.backend
        response.headers += [("x-request-id", request.id), ("x-proxy-backend", side)]
        if isinstance(response.body, bytes):
            record.ttft = time.monotonic() - record.began
        return record

    def _serve(self, record: Record, admission: Admission) -> Response:
        if admission.preflight:
            return Response(204, list(admission.preflight), bodiless=True)
        if admission.own:
            return self._answer_own(record, admission.own)
        request, serving = record.request, record.serving
        record.backend = serving.primary.name
        record.route = route = serving.route(request.head)
        if route.invalid:
            self._report(route, request)
        if request.body.framing > request.body.limit:  # before any of it is asked for
            raise too_large(request.body.limit)
        backend = serving.backend(route)
        record.backend = backend.name
        if backend.name == "sdk":  # LiteLLM's server checks keys itself: it knows its virtual ones too
            self._check_key(record)
        return backend.answer(request, route)

    def _make_admission(self, head: Head) -> Admission:
        """Raises ProxyError 403 for a stranger."""
        self._access.refuse_strangers(head.headers)
        own = self._own.get(unquote(head.path))  # LiteLLM's server has a /health of its own, which calls every model
        return Admission(own, self._access.preflight(head), self._access.cors(head.headers))

    def _answer_own(self, record: Record, own: Callable[[Record], Response]) -> Response:
        require_method(record.request, "GET", "HEAD")
        if not self._access.loopback and record.request.path != "/health":
            self._check_key(record)
        return own(record)

    @staticmethod
    def _check_key(record: Record) -> None:
        """Raises ProxyError 401 unless the request shows the master key, where there is one."""
        key, request = record.serving.config.master_key, record.request
        if key is None:
            return
        shown = [request.headers.get("x-api-key"), request.headers.get("api-key")]
        scheme, _, token = request.headers.get("authorization").partition(" ")
        if scheme.lower() == "bearer":
            shown.append(token.strip())
        matches = [hmac.compare_digest(value.encode("latin-1"), key.encode()) for value in shown]
        if not any(matches):
            raise ProxyError(
                401,
                "the master key is missing or wrong",
                headers=[("WWW-Authenticate", "Bearer")],
                code="invalid_api_key",
            )

    def _report(self, route: Route, request: Request) -> None:
        """Log, once for each pattern, that it has found what is no memory id."""
        for pattern, user_id in route.invalid:
            if pattern.pattern not in self._reported:
                self._reported.add(pattern.pattern)
                message = (
                    f"{pattern.pattern} on {pattern.header} gives {user_id!r}, which is no memory id: it does not match"
                )
                self._log.event("WARNING", "memory", "invalid_id", request_id=request.id, message=message)

    def refuse(self, error: ProxyError, request: Request | None = None) -> Response:
        """The answer to a request that could not be read, or of which the answer broke off before it began."""
        request_id = request.id if request else new_request_id()
        if request is None:  # else it has been counted
            self._metrics.begin()
            self._metrics.end(Ended(time.time(), NONE, NONE, OWN, error.status, 0.0))
        fields: dict[str, Any] = {"request_id": request_id, "status": error.status, "message": error.message}
        self._log.event("WARNING", "front", "refused", **fields)
        error.headers += [("x-request-id", request_id), ("x-proxy-backend", self.serving.primary.name)]
        return self._error(error, request)

    def broke_off(self, error: ProxyError, request: Request) -> None:
        """Say why an answer has ended before its end: the client, which has its head, can be told no more."""
        self._log.event("WARNING", "front", "broken_off", request_id=request.id, message=error.message)

    def _error(self, error: ProxyError, request: Request | None) -> Response:
        """The error in the dialect of the path, without secrets."""
        error.redact(self._log.redact)
        dialect = request.dialect if request else OPENAI
        return json_response(error.status, error.body(dialect), error.headers)

    def end(self, record: Record, status: int | None = None) -> None:
        """The answer is out; else this is the status to record: 499 where the client left, 502 where it broke off."""
        record.serving.in_flight.end()
        request, response = record.request, record.response
        tally = response.tally
        ended = Ended(
            time.time(),
            record.route.user_id,
            request.model,
            record.backend,
            status or (tally.error_status if tally else None) or response.status,
            time.monotonic() - record.began,
            record.ttft,
            request.id,
            request.head.method,
            request.head.path,
        )
        self._metrics.end(ended, tally, record.lines)

    # The endpoints of our own.

    def _health(self, record: Record) -> Response:
        config = record.serving.config
        checks: dict[str, dict[str, Any]] = {
            "session_manager": {"status": "healthy", "cookie_count": 0},
            "configuration": {"status": "healthy", "model_count": len(config.model_names)},
            "memory_router": {"status": "healthy", "pattern_count": len(config.mappings.patterns)},
            "memory_service": {"status": "degraded" if self._metrics.memory_degraded else "healthy"},
            **record.serving.health(),
        }
        worst = max((row["status"] for row in checks.values()), key=("healthy", "degraded", "unhealthy").index)
        document = {"status": worst, "timestamp": timestamp(), "checks": checks}
        return json_response(503 if worst == "unhealthy" else 200, document)

    def _info(self, record: Record) -> Response:
        request, mappings = record.request, record.serving.config.mappings
        asked = Headers(request.query.items())  # for a client that is not at hand
        route = route_request(asked if asked.fields else request.headers, mappings)
        self._report(route, request)
        return json_response(200, route_info(route))

    def _stats(self, _record: Record) -> Response:
        return json_response(200, self._metrics.snapshot())

    def _prometheus(self, _record: Record) -> Response:
        return Response(
            200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")], self._metrics.prometheus().encode()
        )


def new_request_id() -> str:
    """An id that no other request has."""
    return f"{random.getrandbits(128):032x}"


# ── HTTP front ───────────────────────────────────────────────────────────────────────────────────────────────────
# The only place that touches a client's socket: reads requests, writes answers, keeps connections alive. One thread a
# connection. `http.server` gives the frame; the head is read by `wire`, once, since http.server's own parser goes
# through the email package and is about half of a request's cost.


class ClientPeer:
    """A client's socket during one request, as backends may see it."""

    chunked = False  # whether the body of the answer is
    _told_to_continue = False
    _rest = b""  # what `write_now` has begun to send

    def __init__(self, sock: socket.socket, minor_version: int = 1) -> None:
        self._sock, self._minor_version = sock, minor_version

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    def state(self) -> str:
        """See `Peer`; a client that has shut down its half counts as gone, as in nginx."""
        try:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN | CLOSED)
            events = sum(flags for _, flags in poll.poll(0))
            if not events:
                return "quiet"
            closed = events & (CLOSED | select.POLLHUP | select.POLLERR | select.POLLNVAL)
            return "gone" if closed or not self._sock.recv(1, socket.MSG_PEEK) else "talking"
        except (OSError, ValueError):
            return "gone"

    def interim(self, status: int, headers: Headers) -> None:
        """Send an interim response: a 100 once only, and none to HTTP/1.0 (RFC 9110 §15.2)."""
        if not self._minor_version or (status == 100 and self._told_to_continue):
            return
        self._told_to_continue |= status == 100
        try:
            head = head_bytes(f"HTTP/1.1 {status} {reason_phrase(status)}", field_lines(headers.end_to_end()))
            self._sock.sendall(head)
        except OSError:
            raise ClientGone from None

    def write(self, head: bytes, data: bytes) -> None:
        """Send the next piece of an answer with body, behind its head or what is left of the piece before."""
        self._sock.sendall(head + self._rest + self._framed(data))
        self._rest = b""

    def write_now(self, data: bytes) -> bytes | None:
        """See `Peer`."""
        framed = self._framed(data)
        try:
            sent = self._sock.send(framed, socket.MSG_DONTWAIT)
        except OSError:  # the socket is full; or broken, which `write` will find too
            sent = 0
        self._rest = framed[sent:]
        return b"" if self._rest else None

    def _framed(self, data: bytes) -> bytes:
        return chunk(data) if self.chunked and data else data


class ClientReader(Reader):
    """A client's bytes, in time: within ``seconds`` for each read, or before a ``deadline`` of the monotonic clock."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self.seconds, self.deadline = IDLE_SECONDS, math.inf
        self._set_seconds = 0.0  # as set in the kernel

    def receive(self) -> bytes:
        """The next bytes; raises ProxyError 408 where they take too long, ClientGone where none come any more."""
        seconds = self.seconds if self.deadline == math.inf else max(self.deadline - time.monotonic(), 0.001)
        if seconds != self._set_seconds:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))
            self._set_seconds = seconds
        try:
            return self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            raise ProxyError(408, "the request took too long to arrive") from None
        except OSError:
            raise ClientGone from None


class ClientBody:
    """A request body that is read from its connection when a backend asks for it."""

    def __init__(self, reader: Reader, framing: int, limit: int, expects_continue: Callable[[], None] | None) -> None:
        self.framing, self._reader, self.limit, self._ask = framing, reader, limit, expects_continue
        self._data: bytes | None = b"" if framing == BODILESS else None
        self.finished = framing == BODILESS

    def pieces(self) -> Iterator[bytes]:
        """The bytes as they come in; raises ProxyError 400, 408 or 413."""
        if self._data is not None:
            yield self._data
            return
        if self._ask:
            self._ask()
        size = 0
        for piece in self._reader.body(self.framing):
            size += len(piece)
            if size > self.limit:
                raise too_large(self.limit)
            yield piece
        self.finished = True

    def read(self) -> bytes:
        """All of it."""
        if self._data is None and 0 < self.framing <= min(len(self._reader.buffer), self.limit):
            self._data, self.finished = self._reader.some(self.framing), True  # it came with its head
        elif self._data is None:
            data = io.BytesIO()  # a list of the pieces takes 60 times their size where they are tiny chunks
            for piece in self.pieces():
                data.write(piece)
            self._data = data.getvalue()
        return self._data


def reason_phrase(status: int) -> str:
    """The standard reason phrase of a status, or ""."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def last_answer(response: Response) -> bytes:
    """A whole answer as the last one on its connection."""
    assert isinstance(response.body, bytes)
    fields = [*response.headers, ("Content-Length", str(len(response.body))), ("Connection", "close")]
    first_line = f"HTTP/1.1 {response.status} {reason_phrase(response.status)}"
    return head_bytes(first_line, field_lines(fields)) + response.body


class BrokenOff(ClientGone):
    """The answer broke off after its head had gone out: the client is left without its end."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection, from its first request to its close, in a thread of its own."""

    server: Front

    def setup(self) -> None:
        """Called by socketserver before `handle`."""
        self.connection: socket.socket = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # answers are whole writes already
        # The kernel's timeouts: Python's own cost a system call more before every read and write.
        self.connection.settimeout(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(SEND_SECONDS))
        self._reader = ClientReader(self.connection)

    def handle(self) -> None:
        """Serve requests until the connection is to be closed."""
        self.close_connection = False
        idle = self.server.connections.idle
        while not self.close_connection and (idle(self.connection) or self._reader.buffer):
            try:
                self.handle_one_request()
            except (ClientGone, OSError):
                return

    def handle_one_request(self) -> None:
        """Wait for one request, answer it."""
        request: Request | None = None
        try:
            request = self._read_request()
            if request is None:
                self.close_connection = True
                return
            record = self.server.application.answer(request)
            assert isinstance(request.body, ClientBody)
            # What is left of a body that nobody wanted would be taken for the next request.
            self.close_connection |= not request.body.finished
            self._deliver(record)
            if not request.body.finished:
                self._linger()
        except ProxyError as error:  # the head was unusable, or never came, or the answer broke off before it began
            self._refuse(error, request)

    def _read_request(self) -> Request | None:
        """The next request, or None where the client has closed or stayed idle."""
        self._reader.seconds = IDLE_SECONDS
        try:
            if not self._reader.buffer and not self._reader.fill():
                return None
        except ProxyError:
            return None
        if not self.server.connections.busy(self.connection):
            raise unavailable("the request came while its connection, which had been idle, was being closed")
        self._reader.deadline = time.monotonic() + HEAD_SECONDS
        data = self._reader.head()
        if data is None:
            return None
        self._reader.deadline, self._reader.seconds = math.inf, BODY_SECONDS
        head, framing = request_head(data)
        self.close_connection = head.closes
        peer = ClientPeer(self.connection, head.minor_version)
        ask = (lambda: peer.interim(100, Headers(()))) if head.expects_continue else None  # RFC 9110 §10.1.1
        return Request(head, ClientBody(self._reader, framing, self.server.limits.body_bytes, ask), peer)

    def _refuse(self, error: ProxyError, request: Request | None) -> None:
        """Answer a request that could not be read, or not be served, and close."""
        self.close_connection = True
        self.connection.sendall(last_answer(self.server.application.refuse(error, request)))
        self._linger()

    def _deliver(self, record: Record) -> None:
        """Write one answer, and tell how that ended: afterwards, when the client has no more to wait for."""
        status: int | None = 499
        try:
            self._send(record)
            status = None
        except (ProxyError, BrokenOff):
            status = 502
            raise
        finally:
            self.server.application.end(record, status)

    def _send(self, record: Record) -> None:
        """Write one answer."""
        request, response = record.request, record.response
        body, fields = response.body, response.headers
        closing = self.close_connection or self.server.connections.draining
        chunked = False
        if isinstance(body, bytes):
            if not response.bodiless and response.tunnel is None:
                fields.append(("Content-Length", str(len(body))))
        elif response.length is not None:
            fields.append(("Content-Length", str(response.length)))
        else:
            chunked = request.head.minor_version >= 1
            closing |= not chunked
            if chunked:
                fields.append(("Transfer-Encoding", "chunked"))
        if response.tunnel is None:
            fields.append(("Connection", "close" if closing else "keep-alive"))
        self.close_connection = closing
        reason = reason_phrase(response.status) if response.reason is None else response.reason
        record.lines = response.lines()
        head = head_bytes(f"HTTP/1.1 {response.status} {reason}", record.lines)
        if response.tunnel:
            self.close_connection = True
            response.tunnel(self.connection, head, self._reader.buffer)
        elif isinstance(body, bytes):
            self.connection.sendall(head if request.method == "HEAD" else head + body)
        else:
            assert isinstance(request.peer, ClientPeer)
            request.peer.chunked = chunked
            self._stream(record, request.peer, head, body)

    def _stream(self, record: Record, peer: ClientPeer, head: bytes, body: Iterator[bytes]) -> None:
        """Write an answer as it comes. One that breaks off leaves the connection closed without its end marked."""
        begun = False
        try:
            for data in body:
                if data and not begun:
                    begun = True
                    record.ttft = time.monotonic() - record.began
                peer.write(head, data)
                head = b""
            self.connection.sendall(head + (LAST_CHUNK if peer.chunked else b""))
        except ProxyError as error:
            if head:
                raise
            self.server.application.broke_off(error, record.request)
            raise BrokenOff from None  # the head is out: all that is left to say is that the body is not whole
        finally:
            body.close()  # type: ignore[attr-defined]

    def _linger(self) -> None:
        """Read on for a moment before closing: a reset would take our last answer with it (RFC 9112 §9.6)."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + LINGER_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(RECEIVE_BYTES):
                    return
        except OSError:
            return

    def finish(self) -> None:
        """Called by socketserver after `handle`: nothing is buffered that would have to go out."""


class Connections:
    """The open client connections, and which of them are idle, the longest idle first.

    A request takes no lock here: who takes a connection out of the idle ones, its own thread for a request or another
    to close it, has it (`dict.pop` is atomic).

    Args:
        limit: how many there may be at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._changed = limit, threading.Condition()
        self._open: set[socket.socket] = set()
        self._idle: dict[socket.socket, None] = {}
        self.draining = False

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._open)

    def admit(self, sock: socket.socket) -> bool:
        """Take in a new connection, in the place of the longest idle one if need be; False where there is none."""
        with self._changed:
            if len(self._open) >= self._limit and not self._make_room():
                return False
            self._open.add(sock)
            self._idle[sock] = None
            return True

    def _make_room(self) -> bool:
        for sock in list(self._idle):
            if self._end_idle(sock):
                self._open.discard(sock)
                return True
        return False

    def _end_idle(self, sock: socket.socket) -> bool:
        """Let an idle connection close; False for one whose request has come in, and is about to be read."""
        ended = not readable(sock) and self.busy(sock)
        if ended:
            shut(sock)
        return ended

    def idle(self, sock: socket.socket) -> bool:
        """The connection waits for a request; False where it should close instead."""
        self._idle[sock] = None
        return sock in self._open and (not self.draining or readable(sock, LAST_CALL_SECONDS))

    def busy(self, sock: socket.socket) -> bool:
        """Take a connection out of the idle ones, such as for its request; False where another thread has."""
        return self._idle.pop(sock, self) is None

    def forget(self, sock: socket.socket) -> None:
        """The connection is closed."""
        with self._changed:
            self._open.discard(sock)
            self._idle.pop(sock, None)
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Close idle connections and wait for the busy ones; False where some were still busy at the end."""
        self.draining = True
        time.sleep(TAKEN_SECONDS)
        for sock in list(self._idle):
            self._end_idle(sock)
        with self._changed:
            quiet = self._changed.wait_for(lambda: not self._open, seconds)
            for sock in self._open:
                shut(sock)
        return quiet


def shut(sock: socket.socket) -> None:
    """Wake whoever reads from this socket; it sees the end of the input."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)


def goes_on(sock: socket.socket) -> bool:
    """Take what there is to read on a socket that does not block; False where its other end is done."""
    try:
        return bool(sock.recv(16 * RECEIVE_BYTES))
    except OSError as error:
        return isinstance(error, BlockingIOError)


@dataclass(frozen=True)
class Limits:
    """How much a front takes in: ``connections`` at once, ``body_bytes`` of one request."""

    connections: int = MAX_CONNECTIONS
    body_bytes: int = MAX_BODY_BYTES


class Front(http.server.ThreadingHTTPServer):
    """Accepts connections for one application."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # the default of 5 refuses a burst of connections

    def __init__(self, address: tuple[str, int], application: Application, log: Log, limits: Limits) -> None:
        self.application, self._log, self.limits = application, log, limits
        self.connections = Connections(limits.connections)
        self._refused: list[tuple[socket.socket, float]] = []  # each with when it is dropped; for one thread
        self._draining = False
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except BaseException:
            self.server_close()
            raise
        self._thread = threading.Thread(target=self._accept, name=f"front {address[1]}", daemon=True)

    def _accept(self) -> None:
        """The accepting thread; those of the connections are its children. Out of memory, it begins again."""
        stay_home()
        no_memory = contextlib.suppress(MemoryError)  # made while there is some
        while True:  # once at least: `shutdown` waits for it
            with no_memory:
                self.serve_forever(ACCEPT_SECONDS)
            if self._draining:  # after a MemoryError `serve_forever` knows of no `shutdown` that came before
                return
            time.sleep(ACCEPT_SECONDS)

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the host's name, which may wait for DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def get_request(self) -> tuple[Any, Any]:
        """The next connection; one for which no open file is left waits, and would be asked for without a pause."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(ACCEPT_SECONDS)
            raise

    def verify_request(self, request: Any, _client_address: Any) -> bool:
        """Whether there is room for one more connection; if not, it is told so at once, without a thread."""
        if self.connections.admit(request):
            return True
        error = unavailable("the proxy has as many connections as it may (--max-connections)")
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.sendall(last_answer(self.application.refuse(error)))
            # What socketserver closes now is our name for the connection: a reset would take the answer with it.
            self._refused.append((request.dup(), time.monotonic() + LINGER_SECONDS))
        return False

    def service_actions(self) -> None:
        """Called by socketserver again and again: take in what refused clients still send, as `_linger` does."""
        kept: list[tuple[socket.socket, float]] = []
        now = time.monotonic()
        for sock, until in self._refused:
            if now < until and goes_on(sock) and len(kept) < MAX_REFUSED:
                kept.append((sock, until))
            else:
                sock.close()
        self._refused = kept

    def shutdown_request(self, request: Any) -> None:
        """Called by socketserver at a connection's end, also where there was no thread to be had for it."""
        self.connections.forget(request)
        super().shutdown_request(request)

    @property
    def url(self) -> str:
        """The address that clients use."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    @property
    def running(self) -> bool:
        """Whether it accepts connections."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Accept connections from now on; until then they are refused."""
        self.server_activate()
        self._thread.start()

    def drain(self) -> None:
        """Accept no more connections; return when what is in flight has ended, or after `DRAIN_SECONDS`."""
        self._draining = True
        self.shutdown()
        self._thread.join()
        self.timeout, until = 0, time.monotonic() + ACCEPT_SECONDS
        while readable(self.socket) and time.monotonic() < until:  # those in the system's queue: a close resets them
            self.handle_request()
        self.server_close()
        if not self.connections.drain(DRAIN_SECONDS):
            self._log.event(
                "WARNING", "front", "drain", message=f"requests were still running after {DRAIN_SECONDS:g} s"
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """socketserver prints a traceback here; a defect of ours belongs in the log, a vanished client nowhere."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self._log.event("ERROR", "front", "defect", error=repr(error), where=where_raised(error))


# ── program ──────────────────────────────────────────────────────────────────────────────────────────────────────
# The running proxy: its backends, its fronts, and how they change while it runs. A new config makes new backends, and
# each front's `Serving` is replaced as a whole: requests under way end with what they began with.


MIN_MASTER_KEY = 16  # characters
MIN_DISTINCT = 8  # different characters
EXAMPLE_KEYS = ("your-master-key-here", "sk-my-super-secret-key")  # long enough, and known to all


@dataclass(frozen=True)
class Settings:
    """The command line, the environment and the config, put together in their order of precedence."""

    mode: str
    host: str
    port: int
    sdk_port: int
    litellm_url: str | None
    litellm_port: int
    cookie_file: str | None
    limits: Limits
    access: Access

    @property
    def needs_server(self) -> bool:
        """Whether a LiteLLM server has to be started."""
        return self.litellm_url is None and self.mode != "sdk"

    @property
    def has_sdk(self) -> bool:
        """Whether LiteLLM's SDK is needed."""
        return self.mode != "binary"

    @property
    def ports(self) -> dict[str, int]:
        """The port of each front: of "main", and under --mode both of "sdk"."""
        return {"main": self.port, **({"sdk": self.sdk_port} if self.mode == "both" else {})}

    def primary_side(self, config: Config) -> str:
        """Which side serves the main port; under --mode both the config says so, and may change it."""
        if self.mode != "both":
            return self.mode
        return "sdk" if config.experimental.get("use_sdk_proxy") is True else "binary"


def refuse_open_bind(settings: Settings, config: Config) -> None:
    """Raises StartError for an address that others can reach without a master key worth its name."""
    key = config.master_key or ""
    weak = (
        len(key.strip()) < MIN_MASTER_KEY
        or len(set(key)) < MIN_DISTINCT
        or key.startswith("sk-1234")
        or key in EXAMPLE_KEYS
    )
    if not settings.access.loopback and weak:
        rule = (
            f"general_settings.master_key of {MIN_MASTER_KEY} random characters or more, which is none of the examples"
        )
        raise StartError(f"--host {settings.host} can be reached by others, and needs a {rule}")


@dataclass(frozen=True)
class Sides:
    """The backends of one config; ``server`` is the LiteLLM server that is our child, ``in_flight`` its requests."""

    config: Config
    primary: str
    sdk: SdkBackend | None = None
    binary: BinaryBackend | None = None
    server: LitellmServer | None = None
    in_flight: InFlight = field(default_factory=InFlight)


def say(line: str) -> None:
    """Print a line for a person; whoever does not listen is no reason to stop, and Python's exit would trip over it."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Program:
    """The running proxy.

    Args:
        config: with its environment applied.
        given: the environment that the program was started with.
        stopped: whether it has been told to stop.
        publish: told, after each (re)load that is through, what was wrong with it and which side serves each front.
    """

    def __init__(
        self,
        settings: Settings,
        config: Config,
        given: Mapping[str, str],
        log: Log,
        stopped: Callable[[], bool],
        publish: Callable[[Sequence[str], Mapping[str, str]], None],
    ) -> None:
        self._settings, self._log, self._stopped, self._publish = settings, log, stopped, publish
        self._given = given
        self._metrics = Metrics(log)
        self._metrics.sources.append(self._samples)
        self._breaker = CircuitBreaker(self._breaker_changed)
        self._runtime: SdkRuntime | None = None
        self._sides = Sides(config, "")
        self._complete = config  # the last one by which all sides served
        self._coming: LitellmServer | None = None  # the server of a config that waits for it
        self._secrets: frozenset[str] = frozenset()  # of every config so far
        self._fronts: dict[str, Front] = {}  # as in `Settings.ports`
        self._lock = threading.Lock()  # one change of the sides at a time
        self._readings = 0  # configs that were taken over, be it in part

    def start(self) -> None:
        """Bring everything up and print the ``ready:`` lines; raises StartError."""
        settings, config = self._settings, self._sides.config
        for role, port in settings.ports.items():  # first: a taken one is not to be found out after LiteLLM was loaded
            application = Application(self._metrics, self._log, settings.access)
            with listening(settings.host, port, PORT_OPTIONS[role]):
                self._fronts[role] = Front((settings.host, port), application, self._log, settings.limits)
        server = LitellmServer(config, settings.litellm_port, self._log) if settings.needs_server else None
        binary = self._binary(config, server)  # before LiteLLM is loaded, too: a wrong --litellm-url
        if server:
            server.start()
            self._sides = replace(self._sides, server=server)
        sdk = None
        if settings.has_sdk:
            self._log.event("INFO", "sdk", "starting", message="loading LiteLLM (3 to 10 s, the first time longer)")
            with self._log.progress("sdk", "loading LiteLLM"):
                self._runtime = SdkRuntime(self._log, Session(settings.cookie_file, self._log))
                sdk = SdkBackend(config, self._runtime)
                self._runtime.bridge.run(self._runtime.prove_cookies())
        self._install(Sides(config, settings.primary_side(config), sdk, binary, server))
        gc.collect()
        gc.freeze()  # what is loaded now stays: a collector that looked through it again would stop us for 0.3 s
        gc.set_threshold(*COLLECT_AFTER)
        for role, front in self._fronts.items():
            with listening(settings.host, front.server_port, PORT_OPTIONS[role]):
                front.start()
        if server and self._sides.primary == "binary":
            server.wait(self._stopped)
        if self._stopped():
            return
        for url, side in self._serving().items():
            while not select.select((), (sys.stdout,), (), ACCEPT_SECONDS)[1]:  # a full pipe must not keep us at a stop
                if self._stopped():
                    return
            say(f"ready: {side} {url}")
        self._publish([], self._serving())

    def _binary(self, config: Config, server: LitellmServer | None) -> BinaryBackend | None:
        """The binary side, if there is one; connections to a server are kept from one config to the next."""
        old = self._sides.binary
        if old and old.server is server:
            return BinaryBackend(config, old.pool, server)
        url = server.url if server else self._settings.litellm_url
        return BinaryBackend(config, Pool(Upstream(url)), server) if url else None

    def _install(self, new: Sides) -> Sides:
        """Serve the next requests by these sides; returns those before."""
        old, self._sides = self._sides, new
        self._breaker.configure(*new.config.breaker)
        for role, front in self._fronts.items():
            front.application.serving = self._for_front(role)
        if old.sdk and new.sdk and old.sdk.router is not new.sdk.router:
            old.sdk.close()
        return old

    def _for_front(self, role: str) -> Serving:
        sides = self._sides
        backends: dict[str, Backend] = {}
        if sides.binary:
            backends["binary"] = sides.binary
        if sides.sdk:
            both = Failover(sides.sdk, sides.binary, self._breaker, self._log) if sides.binary else sides.sdk
            backends["sdk"] = both
        if role == "main":
            return Serving(sides.config, backends[sides.primary], backends, sides.in_flight)
        return Serving(sides.config, backends[role], in_flight=sides.in_flight)

    def _serving(self) -> dict[str, str]:
        """Front URL → the side that serves it."""
        return {front.url: self._sides.primary if role == "main" else role for role, front in self._fronts.items()}

    def _breaker_changed(self, old: State, new: State) -> None:
        level, message = BREAKER_NEWS[old, new]
        self._log.event(level, "failover", "circuit_breaker", state=new.name.lower(), message=message)

    def _samples(self) -> Figures:
        """What the backends and the program itself add to the metrics."""
        sides = self._sides
        found: Figures = {"client_connections": {(): sum(front.connections.count for front in self._fronts.values())}}
        found.update(sides.sdk.samples() if sides.sdk else {})
        found.update(sides.binary.samples() if sides.binary else {})
        if sides.server:
            found["litellm_server_restarts_total"] = {(): sides.server.restarts}
        if sides.sdk and sides.binary:
            found["circuit_breaker_state"] = {(): self._breaker.state}
            found["circuit_breaker_trips_total"] = {(): self._breaker.trips}
        return found

    # Reading the config again.

    def reload(self) -> None:
        """Read the config again, and serve the next requests by it; one that cannot be used changes nothing."""
        with self._changing():
            config = load_config(self._sides.config.path, self._given)
            refuse_open_bind(self._settings, config)
            self._take_over(config)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """For one change of the sides at a time; where it fails, that is said, and all goes on."""
        try:
            with self._lock:
                yield
        except StartError as error:
            self._refused(error.problems if isinstance(error, ConfigError) else [error])
        except Exception as error:  # a defect must not take down what works
            self._refused([defect(error, "-", self._log)])

    def _refused(self, reasons: Iterable[object]) -> None:
        problems = [self._log.redact(str(reason)) for reason in reasons]
        for problem in problems:
            message = f"the config is not taken over, the old one stays: {problem}"
            self._log.event("ERROR", "config", "refused", message=message)
        self._publish(problems, self._serving())

    def _sides_for(self, config: Config) -> Sides:
        """The backends of a config; its LiteLLM server may still be starting. Raises StartError."""
        old = self._sides
        settings = self._runtime.settings() if self._runtime else {}
        apply_environment(config, old.config)
        self._secrets |= old.config.secrets | config.secrets
        self._log.redact = Redactor(self._secrets)
        try:
            sdk = SdkBackend(config, self._runtime, old.sdk) if self._runtime else None
            server = self._server_for(config)
        except StartError:
            apply_environment(old.config, config)
            if self._runtime:
                self._runtime.restore_settings(settings)
            raise
        in_flight = old.in_flight if server is old.server else InFlight()
        primary = self._settings.primary_side(config)
        return Sides(config, primary, sdk, self._binary(config, server), server, in_flight)

    def _take_over(self, config: Config) -> None:
        """Serve by a new config, as far as its backends are ready; raises StartError."""
        old, new = self._sides, self._sides_for(config)
        self._readings += 1  # from here on, a switch of an earlier config that still waits is overtaken
        for warning in config.warnings:
            self._log.event("WARNING", "config", "warning", message=warning.message, place=warning.place)
        moves = new.primary == "binary" != old.primary
        if new.server is None or (new.server is old.server and not (moves and new.server.down())):
            self._switch(new)
            return
        # The server takes its time. Until then the one before goes on, by the new config's patterns.
        stays = old.primary if moves else new.primary
        binary = self._binary(config, old.server)
        self._install(replace(new, primary=stays, binary=binary, server=old.server, in_flight=old.in_flight))
        threading.Thread(target=self._switch_later, args=(new, self._readings), name="switch", daemon=True).start()

    def _server_for(self, config: Config) -> LitellmServer | None:
        """The LiteLLM server of a config: the one that serves, or that is coming, where they read the same; or one
        that is started for it, and takes the place of any that is coming; None where there is none."""
        current, coming = self._sides.server, self._coming
        if current is None or current.config.server_part == config.server_part:
            server = current
        elif coming and coming.config.server_part == config.server_part:
            return coming
        else:
            server = LitellmServer(config, free_port(self._settings.litellm_port), self._log)
            server.start()
        self._coming = None if server is current else server
        if coming:
            threading.Thread(target=coming.stop, name="overtaken", daemon=True).start()
        return server

    def _switch_later(self, new: Sides, reading: int) -> None:
        """Switch to a LiteLLM server as soon as it is ready, unless a later config has come before that.

        Where it does not get ready, all goes back to the config before: the sides must not differ.
        """
        assert new.server
        fault: StartError | None = None
        try:
            new.server.wait(lambda: self._stopped() or self._readings != reading)
        except StartError as error:
            fault = error
        with self._changing():
            if self._stopped() or self._readings != reading:
                return
            if fault:
                self._install(self._sides_for(self._complete))
                raise fault
            self._coming = None
            self._switch(new)

    def _switch(self, new: Sides) -> None:
        """Serve by these sides, all of them ready; say so, and let go of the old ones once their requests are done."""
        before = self._sides.server
        if before and new.server and new.server is not before:
            new.server.restarts += before.restarts  # the program's so far: a counter of the metrics never falls
        old = self._install(new)
        self._complete = new.config
        counts = f"{len(new.config.model_names)} models, {len(new.config.mappings.patterns)} patterns"
        message = f"config taken over: {counts}; {new.primary} serves the main port"
        self._log.event("INFO", "config", "reloaded", message=message)
        self._publish([], self._serving())
        if old.server is not new.server:
            threading.Thread(target=self._retire_server, args=(old,), name="retire", daemon=True).start()

    @staticmethod
    def _retire_server(old: Sides) -> None:
        """Stop a LiteLLM server once nobody needs it any more."""
        assert old.binary and old.server
        old.in_flight.close(old.config.request_seconds)
        old.binary.pool.close()
        old.server.stop()

    def guide(self) -> list[str]:
        """What a user needs to know next, line by line."""
        config = self._sides.config
        url = self._fronts["main"].url
        missing = self._sides.sdk.missing_keys if self._sides.sdk else config.missing_keys
        mappings = config.mappings
        usable = [name for name in config.model_names if name not in missing] or config.model_names
        tried = next((name for name in usable if "*" not in name), usable[0].replace("*", "NAME"))
        token = "$LITELLM_MASTER_KEY" if config.master_key else "anything"
        key = f'-H "Authorization: Bearer {token}" ' if config.master_key else ""
        return [
            f"models: {', '.join(config.model_names)}",
            *(f"no key: {name} answers 401 until you set {keys}" for name, keys in missing.items()),
            f"memory ({mappings.inject_header}):",
            *([f"  {mappings.custom_header + ': ID':<42} -> ID"] if mappings.custom_header else []),
            *(f"  {p.header + ': ' + p.pattern:<42} -> {p.user_id}" for p in mappings.patterns),
            f"  {'anyone else':<42} -> {mappings.default_user_id}",
            "clients:",
            f"  PyCharm AI Assistant   Settings > Tools > AI Assistant > Models > OpenAI API, URL {url}/v1",
            f"  Claude Code            ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={token} claude",
            f"  any OpenAI client      OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={token}",
            f"try it: curl {url}/v1/chat/completions -H 'content-type: application/json' {key}"
            f"""-d '{{"model": "{tried}", "messages": [{{"role": "user", "content": "hello"}}]}}'""",
        ]

    def stop(self) -> None:
        """Let what is in flight end, then close everything."""
        drains = [threading.Thread(target=front.drain) for front in self._fronts.values() if front.running]
        for thread in drains:
            thread.start()
        for thread in drains:
            thread.join()
        with self._lock:
            sides, coming = self._sides, self._coming
        if sides.binary:
            sides.binary.pool.close()
        if self._runtime:
            self._runtime.close()
        for server in filter(None, (sides.server, coming)):
            server.stop()


PORT_OPTIONS = {"main": "--port", "sdk": "--sdk-port"}


@contextlib.contextmanager
def listening(host: str, port: int, option: str) -> Iterator[None]:
    """Raises StartError where the address cannot be listened on."""
    try:
        yield
    except OSError as error:
        at_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        hint = f"another {option} may be free" if at_port else "--host must be an address of this machine"
        raise StartError(f"cannot listen on {host}:{port}: {error.args[-1]}; {hint}") from None


BREAKER_NEWS = {
    (State.CLOSED, State.OPEN): ("CRITICAL", "the SDK keeps failing: the binary side serves (circuit breaker open)"),
    (State.OPEN, State.HALF_OPEN): ("INFO", "one request tries the SDK again"),
    (State.HALF_OPEN, State.OPEN): ("WARNING", "the SDK still fails: the binary side goes on serving"),
    (State.OPEN, State.CLOSED): ("WARNING", "the SDK works again, and serves (circuit breaker closed)"),
    (State.HALF_OPEN, State.CLOSED): ("WARNING", "the SDK works again, and serves (circuit breaker closed)"),
}


def free_port(wanted: int) -> int:
    """This port of loopback where nobody listens on it, else one that is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PidFile:
    """``config.yaml.pid``: whom to signal, locked for as long as we live; beside it, for `move_traffic`, the status.

    The lock tells a living proxy from a number that some other process has got meanwhile. Of several proxies with one
    config, the first has the file. Where it cannot be written there is none, and `rollback` finds nobody.
    """

    def __init__(self, config_path: str, log: Log) -> None:
        self._path, self._status, self._log = Path(f"{config_path}.pid"), Path(f"{config_path}.status"), log
        self._part = Path(f"{self._status}.part")
        self._file: Any = None
        self._loads = 0

    def __enter__(self) -> PidFile:
        try:
            file = self._path.open("ab", buffering=0)  # else what a full disk does not take is tried again at its close
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = file  # ours from here on, to be removed at the end whatever the disk takes of it
            self._status.unlink(missing_ok=True)  # of one that was killed
            file.truncate(0)
            file.write(b"%d\n" % os.getpid())
        except OSError as error:
            taken = isinstance(error, BlockingIOError)
            message = "another proxy runs with this config" if taken else f"{self._path}: {error.strerror}"
            self._log.event("WARNING", "program", "pid_file", message=f"{message}: rollback does not reach this one")
        return self

    def publish(self, problems: Sequence[str], serving: Mapping[str, str]) -> None:
        """Say how the newest reading of the config went, and which side serves each front."""
        self._loads += 1
        if self._file is None:
            return
        status = {"pid": os.getpid(), "loads": self._loads, "problems": list(problems), "serving": dict(serving)}
        with contextlib.suppress(OSError):
            self._part.write_text(json.dumps(status))
            self._part.replace(self._status)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            for path in (self._part, self._status, self._path):
                with contextlib.suppress(OSError):  # it is gone, or the disk is read-only by now
                    path.unlink()
            self._file.close()


def running_proxy(config_path: str) -> tuple[int, dict[str, Any]] | None:
    """Process id and status of the proxy that runs with this config, or None."""
    with contextlib.suppress(OSError, ValueError), Path(f"{config_path}.pid").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read()), published_status(config_path)
    return None


def published_status(config_path: str) -> dict[str, Any]:
    """What the proxy that runs with this config says of itself; that of one that is still starting has no loads."""
    try:
        return json_object(Path(f"{config_path}.status").read_bytes())
    except OSError:
        return {"loads": 0}


def set_use_sdk(path: str, value: bool) -> None:
    """Set ``general_settings.experimental.use_sdk_proxy`` in a config file, and leave all else in it as it is.

    Raises:
        StartError: the file cannot be read or written, or the setting comes from a file that it includes.
    """
    wanted = dict(read_config(path).config.written)
    for where in ("general_settings", "general_settings.experimental"):
        if not isinstance(value_at(wanted, where) or {}, dict):
            raise StartError(f"{path}: {where} must be a mapping")
    general = wanted.get("general_settings") or {}
    experimental = general.get("experimental") or {}
    wanted["general_settings"] = {**general, "experimental": {**experimental, "use_sdk_proxy": value}}
    real = Path(path).resolve()
    part = real.with_name(f"{real.name}.{os.getpid()}.part")
    try:
        text = with_use_sdk(real.read_bytes().decode(), value)
        if values_of(read_nodes(path, [], text)) != wanted:
            raise ValueError
        try:
            part.write_bytes(text.encode())
            shutil.copymode(real, part)
            part.replace(real)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from None
    except (ValueError, ConfigError, yaml.YAMLError):
        hint = f"set general_settings.experimental.use_sdk_proxy: {str(value).lower()} by hand"
        raise StartError(f"{path}: its form is too unusual to be changed safely; {hint}") from None


def with_use_sdk(text: str, value: bool) -> str:
    """The YAML text with the setting in it: its value replaced, or the keys that are missing put in."""
    missing = ["general_settings", "experimental", "use_sdk_proxy"]
    node: Any = yaml.compose(text, yaml.SafeLoader)
    above: Any = None  # the key of ``node``
    while missing and isinstance(node, yaml.MappingNode):
        pair = next((pair for pair in node.value if pair[0].value == missing[0]), None)
        if pair is None:
            break
        above, node = pair
        del missing[0]
    said = str(value).lower()
    if not missing:
        return text[: node.start_mark.index] + said + text[node.end_mark.index :]
    if isinstance(node, yaml.MappingNode) and node.flow_style:
        at = node.start_mark.index + 1
        nested = ": {".join(missing) + f": {said}" + "}" * (len(missing) - 1) + (", " if node.value else "")
        return text[:at] + nested + text[at:]
    end = "\r\n" if "\r\n" in text else "\n"
    text += "" if text.endswith("\n") else end
    inside = isinstance(node, yaml.MappingNode) and node.value
    indent = node.value[0][0].start_mark.column if inside else above.start_mark.column + 2
    at = text.index("\n", above.end_mark.index) + 1 if above else len(text)
    lines = [f"{' ' * (indent + 2 * depth)}{key}:" for depth, key in enumerate(missing)]
    return text[:at] + end.join(lines) + f" {said}{end}" + text[at:]


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# A load test: plain HTTP clients that call a proxy, this one or another, and measure what they see from the outside.
# Nothing here reaches into the rooms that serve requests, and nothing here knows of options or exit codes.

CHAT = "/v1/chat/completions"
LOAD_PROMPT = "Answer with one word: hello."  # a real model is paid by the token
LOOK_SECONDS = 0.1  # between two looks at a run: ten steps a second look like movement

# What breaks an exchange → its name in the table, by the nearest base class that is here.
FAILURE_KINDS: Mapping[type[BaseException], str] = {
    TimeoutError: "timeout",
    ConnectionRefusedError: "connection refused",
    ConnectionError: "connection lost",
    socket.gaierror: "host not found",
    UnicodeError: "host not found",  # a name that DNS cannot even ask for
    ssl.SSLError: "TLS failed",
    http.client.HTTPException: "malformed answer",
    OSError: "no connection",
}
UNREACHABLE = ("connection refused", "host not found", "no connection")  # no request was heard


class Failed(Exception):
    """A request failed for a reason that only its answer shows; ``kind`` is its name in the table."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Target(NamedTuple):
    """What a load test calls, and the request that it sends each time; ``connection`` makes a client for it."""

    url: str
    connection: Callable[[], http.client.HTTPConnection]
    path: str
    headers: Mapping[str, str | bytes]
    body: bytes
    streamed: bool


def load_target(url: str, key: str | None, model: str, *, streamed: bool) -> Target:
    """The target at a base URL, which may have a path and may end in ``/v1``.

    Raises:
        StartError: the URL or the key cannot be used; neither is shown where it may hold a secret.
    """
    parts, port = server_url(url, "--url", "the key comes from LITELLM_MASTER_KEY or the config")
    if key and not key.isprintable():
        raise StartError("the master key has characters that no header can carry")
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    client: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
    if parts.scheme == "https":
        client = partial(http.client.HTTPSConnection, context=ssl.create_default_context())
    headers: dict[str, str | bytes] = {"Content-Type": "application/json", "User-Agent": "litellm_memory_proxy/load"}
    if key:
        headers["Authorization"] = b"Bearer " + key.encode()
    body = {"model": model, "messages": [{"role": "user", "content": LOAD_PROMPT}], "stream": streamed}
    return Target(
        url=f"{parts.scheme}://{parts.netloc}{prefix}",
        connection=partial(client, parts.hostname, port, timeout=CONNECT_SECONDS),
        path=prefix + CHAT,
        headers=headers,
        body=json.dumps(body).encode(),
        streamed=streamed,
    )


class Answered(NamedTuple):
    """What came of one request: the seconds to its end and to its first token; ``kind`` is "" where it succeeded."""

    seconds: float
    first: float | None = None
    kind: str = ""
    message: str = ""


def load_call(target: Target, connection: http.client.HTTPConnection) -> Answered:
    """Make one request, whatever comes of it; after an error the next one opens the connection anew."""
    began = time.monotonic()
    try:
        first = load_exchange(target, connection, began + REQUEST_SECONDS)
        return Answered(time.monotonic() - began, first and first - began)
    except (Failed, OSError, http.client.HTTPException, UnicodeError) as error:
        connection.close()
        return Answered(time.monotonic() - began, kind=failure_kind(error), message=str(error)[:MAX_MESSAGE])


def load_exchange(target: Target, connection: http.client.HTTPConnection, deadline: float) -> float | None:
    """Send the request and read its answer; returns when its first token came, by the monotonic clock."""
    if connection.sock is None:
        connection.connect()
    sock = connection.sock  # http.client forgets it where the answer says that it will close
    sock.settimeout(seconds_until(deadline))
    connection.request("POST", target.path, target.body, target.headers)
    with connection.getresponse() as response:
        pieces = answer_pieces(response, sock, deadline, "stream" if target.streamed else "answer")
        if response.status != HTTPStatus.OK:
            raise Failed(f"HTTP {response.status}", error_text(b"".join(pieces)))
        return read_stream(pieces) if target.streamed else read_answer(pieces)


def failure_kind(error: BaseException) -> str:
    """The name of a failure in the table."""
    if isinstance(error, Failed):
        return error.kind
    return next(FAILURE_KINDS[base] for base in type(error).__mro__ if base in FAILURE_KINDS)


def seconds_until(deadline: float) -> float:
    """What is left of a request's time; raises TimeoutError where nothing is."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"the answer was not whole after {REQUEST_SECONDS:g} s")
    return left


def answer_pieces(
    response: http.client.HTTPResponse, sock: socket.socket, deadline: float, what: str
) -> Iterator[bytes]:
    """The body's bytes as they come in; raises Failed where it ends early, and TimeoutError."""
    try:
        while True:
            sock.settimeout(seconds_until(deadline))
            piece = response.read1(RECEIVE_BYTES)
            if not piece:
                break
            yield piece
        if response.length:  # http.client takes the end of the connection for the end of the body
            raise http.client.IncompleteRead(b"", response.length)
    except (ConnectionError, ssl.SSLEOFError, http.client.IncompleteRead):
        raise Failed(f"{what} cut off", "the connection closed before the end of the body") from None


def read_answer(pieces: Iterator[bytes]) -> float:
    """When the first byte of a whole answer came; raises Failed where it is no chat completion."""
    body = next(pieces, b"")
    first = time.monotonic()
    body += b"".join(pieces)
    if "choices" not in json_object(body):
        raise Failed("no chat completion", error_text(body))
    return first


def read_stream(pieces: Iterator[bytes]) -> float | None:
    """When the first token of a stream came, None where it had none; raises Failed unless it ended as it should."""
    first, data = None, b""
    for data in event_data(pieces):
        if first is None and has_token(json_object(data)):
            first = time.monotonic()
        if b'"error"' in data and json_object(data).get("error"):  # looked for first: parsing costs the others' time
            raise Failed("error event", error_text(data))
    if data != b"[DONE]":
        raise Failed("stream cut off", "the stream ended without data: [DONE]")
    return first


def event_data(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The value of each ``data:`` line of a stream of server-sent events."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line[5:].strip() for line in lines if line.startswith(b"data:"))


def has_token(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk of a chat completion brings more than the role: text, reasoning, a tool call."""
    try:
        return any(value for name, value in chunk["choices"][0]["delta"].items() if name != "role")
    except (LookupError, TypeError, AttributeError):
        return False


def error_text(body: bytes) -> str:
    """The message of an error body, or else all of the body, in one line."""
    text = str(provider_error(body).get("message") or body[:MAX_MESSAGE].decode(errors="replace"))
    return " ".join(text.split())


class LoadRun:
    """One load test: its threads take their turns and note what came of each.

    No lock: all that they share are single steps of the interpreter's, such as the next of a range.
    """

    def __init__(self, requests: int) -> None:
        self.requests, self.stopped = requests, False
        self.good: list[Answered] = []
        self.failed: list[str] = []  # the kind of each failure
        self.examples: dict[str, str] = {}  # kind → the first message of that kind
        self._turns = iter(range(requests))

    def counts(self) -> tuple[int, int]:
        """How many requests have ended, and how many of those failed."""
        failed = len(self.failed)
        return len(self.good) + failed, failed

    def work(self, target: Target) -> None:
        """Take turns until there are none; this is what each of the threads does."""
        connection = target.connection()  # kept alive from one request to the next
        for _ in self._turns:
            outcome = load_call(target, connection)
            if self.stopped:  # what was in flight no longer counts
                return
            if outcome.kind:
                self.examples.setdefault(outcome.kind, outcome.message)
                self.failed.append(outcome.kind)
            else:
                self.good.append(outcome)


def patience(what: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
    """Say on standard error every `PROGRESS_SECONDS`, as long as this lasts, how far it is and that time goes by."""
    return meanwhile(PROGRESS_SECONDS, lambda passed: print(f"{what()}: {passed} s", file=sys.stderr, flush=True))


def draw(bar: str) -> None:
    """Put this in the place of the terminal's last line."""
    print(f"\r{bar}", end="", file=sys.stderr, flush=True)


def terminal_width() -> int:
    """The columns that a line may fill; in the last one, some terminals already begin the next line."""
    return max(shutil.get_terminal_size().columns - 1, 1)


def progress_text(run: LoadRun) -> str:
    """How far a run is, in words."""
    ended, failed = run.counts()
    return f"{ended} of {run.requests} requests" + (f", {failed} failed" if failed else "")


def progress_bar(run: LoadRun, width: int) -> str:
    """The same as a bar of exactly this many columns."""
    text = progress_text(run)
    room = max(width - len(text) - 3, 0)
    filled = room * run.counts()[0] // run.requests
    return f"[{'#' * filled:.<{room}}] {text}"[:width].ljust(width)


def run_load(target: Target, requests: int, threads: int) -> tuple[LoadRun, float]:
    """Make the requests, so many at a time; returns what came of them and the seconds it took.

    Ctrl-C ends it early, with what there is by then. Raises StartError where the system has not that many threads.
    """
    run, terminal, began = LoadRun(requests), sys.stderr.isatty(), time.monotonic()
    bar = meanwhile(LOOK_SECONDS, lambda _: draw(progress_bar(run, terminal_width())))
    workers = [threading.Thread(target=run.work, args=(target,), daemon=True) for _ in range(min(requests, threads))]
    try:
        for worker in workers:
            worker.start()
        with bar if terminal else patience(partial(progress_text, run)):
            for worker in workers:
                worker.join()
    except KeyboardInterrupt:
        run.stopped = True
    except RuntimeError:
        run.stopped = True
        raise StartError("the system has no more threads: a lower --concurrency may do") from None
    seconds = time.monotonic() - began
    if terminal:
        draw(f"{'':{terminal_width()}}\r")
    return run, seconds


def percentile_cells(values: Sequence[float]) -> Iterator[str]:
    """The percentiles of some seconds, in milliseconds, or "-"."""
    for found in (percentile(sorted(values), percent) for percent in PERCENTILES):
        yield "-" if found is None else f"{found * 1000:.1f} ms"


def load_report(run: LoadRun, seconds: float) -> list[str]:
    """The lines of the table."""
    ended, failed = run.counts()
    good = ended - failed
    kinds = Counter(run.failed).most_common()
    rate = f"{good * 1000 // ended / 10:.1f} %" if ended else "-"  # rounded down: 100 % is without any failure
    rows = [
        ("requests", f"{ended}" + (f" of {run.requests}, then stopped" if run.stopped else "")),
        ("duration", f"{seconds:.2f} s"),
        ("requests a second", f"{ended / seconds:.1f}"),
        ("success rate", f"{rate} ({good} of {ended})"),
        ("", *(f"p{percent}" for percent in PERCENTILES)),
        ("whole answer", *percentile_cells([outcome.seconds for outcome in run.good])),
        ("first token", *percentile_cells([outcome.first for outcome in run.good if outcome.first is not None])),
        ("errors", f"{failed}"),
        *((f"  {kind}", f"{count}") for kind, count in kinds),
        *(("for example", f"{kind}: {run.examples[kind]}") for kind, _ in kinds[:1]),
    ]
    label = max(len(row[0]) for row in rows) + 2
    return [(row[0].ljust(label) + "".join(cell.ljust(12) for cell in row[1:])).rstrip() for row in rows]


def unreachable(run: LoadRun) -> str | None:
    """The one reason why nobody heard any request of a run, or None."""
    kinds = set(run.failed)
    return kinds.pop() if not run.good and len(kinds) == 1 and kinds.issubset(UNREACHABLE) else None


# ── parity ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Both modes side by side: each a process of its own with the same config, the same requests to both, and what differs
# in the answers and in what the provider received. The provider is a small one in here, unless real models are named.
# Two processes, and not one with --mode both: failover would let the binary side answer where the SDK's side fails.

INSIDE_KEY = "sk-parity-provider-key"  # what the provider inside is sent
INSIDE_SECTIONS = ("user_id_mappings", "litellm_settings", "general_settings", "environment_variables")
INSIDE_CALL = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
READY_LINE = re.compile(r"^ready: \w+ (\S+)$", re.MULTILINE)

HELLO = {"messages": [{"role": "user", "content": LOAD_PROMPT}]}
CAPPED = {**HELLO, "max_tokens": 2048}  # Anthropic demands a limit; thinking needs more than 1,024
STREAM = {"stream": True}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"messages": [{"role": "user", "content": "What is the weather in Oslo? Use the tool."}], "max_tokens": 2048}
CHAT_TOOLS = {**WEATHER, "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]}
MESSAGE_TOOLS = {**WEATHER, "tools": [{"name": "get_weather", "input_schema": SCHEMA}]}
THINKING = {**CAPPED, "thinking": {"type": "enabled", "budget_tokens": 1024}}
SAMPLED = {**HELLO, "temperature": 0.25, "max_tokens": 33}
BETA = {"anthropic-beta": "context-1m-2025-08-07"}
WRONG_KEY = {"Authorization": "Bearer sk-parity-wrong-key"}
NO_KEY = {"Authorization": None}
MESSAGES = "/v1/messages"
GPT, CLAUDE, LIMITED, UNREACHABLE_MODEL = "parity-openai", "parity-anthropic", "parity-limited", "parity-unreachable"


@dataclass(frozen=True)
class Feature:
    """One row: a request that both modes get.

    Args:
        model: of the provider inside; "" where the request calls none.
        body: None makes it a GET.
        headers: beside those that every request has; None takes one of those away.
        inside: whether it says nothing new with a real model.
    """

    name: str
    path: str
    model: str = ""
    body: Mapping[str, Any] | bytes | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    inside: bool = False


FEATURES = (
    Feature("chat", CHAT, GPT, HELLO),
    Feature("chat, streamed", CHAT, GPT, {**HELLO, **STREAM}),
    Feature("chat, streamed with usage", CHAT, GPT, {**HELLO, **STREAM, "stream_options": {"include_usage": True}}),
    Feature("chat, Claude", CHAT, CLAUDE, HELLO),
    Feature("chat, Claude, streamed", CHAT, CLAUDE, {**HELLO, **STREAM}),
    Feature("messages", MESSAGES, CLAUDE, CAPPED),
    Feature("messages, streamed", MESSAGES, CLAUDE, {**CAPPED, **STREAM}),
    Feature("messages, GPT", MESSAGES, GPT, CAPPED),
    Feature("messages, GPT, streamed", MESSAGES, GPT, {**CAPPED, **STREAM}),
    Feature("models", "/v1/models"),
    Feature("memory: PyCharm", CHAT, GPT, HELLO, {"User-Agent": "OpenAIClientImpl/Java 1.0"}, inside=True),
    Feature("memory: Claude Code", MESSAGES, CLAUDE, CAPPED, {"User-Agent": "claude-cli/2.0"}, inside=True),
    Feature("memory: Python script", CHAT, GPT, HELLO, {"User-Agent": "OpenAI/Python 2.0"}, inside=True),
    Feature("memory: custom header", CHAT, GPT, HELLO, {"x-memory-user-id": "parity-memory"}, inside=True),
    Feature("memory: default", CHAT, GPT, HELLO, {"x-sm-user-id": "someone-else"}, inside=True),
    Feature("memory: why", "/memory-routing/info"),
    Feature("health", "/health"),
    Feature("bad JSON, chat", CHAT, body=b'{"model": '),
    Feature("bad JSON, messages", MESSAGES, body=b'{"model": '),
    Feature("unknown model, chat", CHAT, body={"model": "parity-unknown", **HELLO}),
    Feature("unknown model, messages", MESSAGES, body={"model": "parity-unknown", **CAPPED}),
    Feature("bad key, chat", CHAT, GPT, HELLO, WRONG_KEY),
    Feature("bad key, messages", MESSAGES, CLAUDE, CAPPED, WRONG_KEY),
    Feature("no key, chat", CHAT, GPT, HELLO, NO_KEY),
    Feature("no key, messages", MESSAGES, CLAUDE, CAPPED, NO_KEY),
    Feature("unknown path", "/v1/no-such-path"),
    Feature("wrong method", MESSAGES),
    Feature("thinking", MESSAGES, CLAUDE, THINKING),
    Feature("thinking, streamed", MESSAGES, CLAUDE, {**THINKING, **STREAM}),
    Feature("thinking, chat", CHAT, CLAUDE, THINKING),
    Feature("thinking, chat, streamed", CHAT, CLAUDE, {**THINKING, **STREAM}),
    Feature("anthropic-beta", MESSAGES, CLAUDE, CAPPED, BETA, inside=True),
    Feature("temperature and max_tokens", CHAT, GPT, SAMPLED, inside=True),
    Feature("temperature and max_tokens, messages", MESSAGES, CLAUDE, SAMPLED, inside=True),
    Feature("tools, chat", CHAT, GPT, CHAT_TOOLS),
    Feature("tools, chat, streamed", CHAT, GPT, {**CHAT_TOOLS, **STREAM}),
    Feature("tools, messages", MESSAGES, CLAUDE, MESSAGE_TOOLS),
    Feature("tools, messages, streamed", MESSAGES, CLAUDE, {**MESSAGE_TOOLS, **STREAM}),
    Feature("tools, messages, GPT, streamed", MESSAGES, GPT, {**MESSAGE_TOOLS, **STREAM}),
    Feature("count_tokens", f"{MESSAGES}/count_tokens", CLAUDE, HELLO),
    Feature("count_tokens, GPT", f"{MESSAGES}/count_tokens", GPT, HELLO),
    Feature("embeddings", "/v1/embeddings", GPT, {"input": "hello"}),
    Feature("responses", "/v1/responses", GPT, {"input": LOAD_PROMPT}),
    Feature("responses, streamed", "/v1/responses", GPT, {"input": LOAD_PROMPT, **STREAM}),
    Feature("provider's 429, chat", CHAT, LIMITED, HELLO, inside=True),
    Feature("provider's 429, messages", MESSAGES, LIMITED, CAPPED, inside=True),
    Feature("provider unreachable", CHAT, UNREACHABLE_MODEL, HELLO, inside=True),
)

# What may differ: (features, differences, why), the first two as shell patterns.
NO_MOCKED_STREAM = "LiteLLM's server streams no mock_response here"
IGNORED: tuple[tuple[str, str, str], ...] = (
    ("*", "header x-supermemory-*only in sdk*", "provider headers keep their names in sdk mode"),
    ("*", "header retry-after only in sdk*", "Retry-After is kept in sdk mode"),
    ("*", "*[._]id: *", "ids are made anew"),
    ("*", "*created*: *", "timestamps"),
    ("*", "body.choices.0.*only in sdk: None", "OpenAI's schema has these nulls, LiteLLM's server not always"),
    ("embeddings*", "body.usage.*_details only in binary*", "LiteLLM adds keys of its own, which no client reads"),
    ("health", "*timestamp: *", "timestamps"),
    ("health", "body.checks.litellm_server*", "only binary mode has a server"),
    ("health", "body.checks.session_manager*", "only sdk mode has cookies"),
    ("models", "body.data.0.m*only in binary*", "LiteLLM adds keys of its own, which no client reads"),
    ("count_tokens*", "body.litellm_*only in binary*", "LiteLLM adds keys of its own, which no client reads"),
    ("count_tokens*", "provider: header x-*only in sdk*", "LiteLLM's server sends no client header with it: no memory"),
    ("count_tokens, GPT", "provider: body input*", "the SDK counts Anthropic's messages as they are"),
    ("responses, streamed*", "events: nameless*", "sdk mode names its events, as OpenAI does"),
    ("responses, streamed*", "[[]DONE]*", "LiteLLM's server ends it with [DONE], which OpenAI does not"),
    ("responses, streamed*", "nameless*", "sdk mode names its events, as OpenAI does"),
    ("responses, streamed*", "response.*only in sdk*", "sdk mode names its events, as OpenAI does"),
    ("provider's 429*", "provider: calls: * / 1", "sdk mode tries a lone deployment once: clients retry by themselves"),
    ("provider's 429*", "body.request_id only in binary*", "LiteLLM adds keys of its own, which no client reads"),
    ("bad *", "*error*", "sdk mode answers in the dialect, and more clearly"),
    ("bad *", "body.type*", "sdk mode answers in the dialect, and more clearly"),
    ("bad key*", "status: 400 / 401", "401 in the dialect"),
    ("no key*", "status: 500 / 401", "401 in the dialect"),
    ("no key*", "content type: text/plain / application/json", "401 in the dialect"),
    ("no key*", "body* only in sdk*", "401 in the dialect"),
    ("unknown *", "body*", "sdk mode answers in the dialect, and more clearly"),
    ("wrong method", "body*", "sdk mode answers in the dialect, and more clearly"),
    ("provider's 429*", "body*error*", "the provider's own words are kept in sdk mode"),
    ("*streamed*(mock_response)", "content type: application/json / *", NO_MOCKED_STREAM),
    ("*streamed*(mock_response)", "* only in *", NO_MOCKED_STREAM),
    ("responses, streamed*(mock_response)", "status: 500 / 200", NO_MOCKED_STREAM),
    ("count_tokens*(mock_response)", "status: * / 200", "LiteLLM's server asks a provider, which a mock does not have"),
    ("count_tokens*(mock_response)", "body*", "LiteLLM's server asks a provider, which a mock does not have"),
    ("provider unreachable", "status: 500 / 502", "502 for connection faults"),
    ("provider unreachable", "body*error*", "502 for connection faults"),
)
DIFFERENT = "DIFFERENT"


# The provider inside: what OpenAI and Anthropic would answer, the same each time.


def chat_document(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion: a tool call where there are tools, else text."""
    called = {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": INSIDE_CALL}]}
    said, finish = (called, "tool_calls") if body.get("tools") else ({"content": "hello"}, "stop")
    message = {"role": "assistant", **said, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body.get("model")}
    counted = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    usage = counted if not body.get("stream") or (body.get("stream_options") or {}).get("include_usage") else None
    return {**head, "choices": [choice], "usage": usage, "system_fingerprint": "fp_1", "service_tier": "default"}


def chat_events(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same as chunks."""
    (choice,) = document["choices"]
    deltas: list[dict[str, Any]] = [{"content": piece} for piece in ("", *halves("hello"))]
    for call in choice["message"].get("tool_calls") or ():
        begun = {**call, "function": {**INSIDE_CALL, "arguments": ""}}
        more = ({"function": {"arguments": piece}} for piece in halves(INSIDE_CALL["arguments"]))
        deltas = [{"tool_calls": [{"index": 0, **part}]} for part in (begun, *more)]
    deltas[0] = {"role": "assistant", "content": None, **deltas[0]}
    head = {**document, "object": "chat.completion.chunk", "usage": None}
    for delta, finish in [*((delta, None) for delta in deltas), ({}, choice["finish_reason"])]:
        yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}
    if document["usage"]:
        yield {**head, "choices": [], "usage": document["usage"]}


def message_document(body: Mapping[str, Any]) -> dict[str, Any]:
    """A message: thinking where it is asked for, then a tool call where there are tools, else text."""
    thinking = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": json.loads(INSIDE_CALL["arguments"])}
    said, stop = (call, "tool_use") if body.get("tools") else ({"type": "text", "text": "hello"}, "end_turn")
    content = [*([thinking] if "thinking" in body else []), said]
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": body.get("model"), "content": content}
    usage = {"input_tokens": 5, "output_tokens": 7, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {**head, "stop_reason": stop, "stop_sequence": None, "usage": usage}


def response_document(body: Mapping[str, Any]) -> dict[str, Any]:
    """A response: a function call where there are tools, else text."""
    text = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    said = {"type": "message", "id": "msg_1", "role": "assistant", "content": [text]}
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", **INSIDE_CALL}
    output = [{**(call if body.get("tools") else said), "status": "completed"}]
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": body.get("model"), "status": "completed"}
    unset = dict.fromkeys(("error", "incomplete_details", "instructions", "max_output_tokens", "previous_response_id"))
    given = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "temperature": 1.0, "top_p": 1.0}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    usage = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12, **details}
    return {**head, **unset, **given, "metadata": {}, "output": output, "usage": usage}


def embedding_document(body: Mapping[str, Any]) -> dict[str, Any]:
    """One embedding."""
    row = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return {"object": "list", "model": body.get("model"), "data": [row], "usage": usage}


Whole = Callable[[Mapping[str, Any]], dict[str, Any]]
Streamed = Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]
# The end of a path → its answer, and the events of the same as a stream.
INSIDE_ANSWERS: Mapping[str, tuple[Whole, Streamed]] = {
    "completions": (chat_document, chat_events),
    "messages": (message_document, message_events),
    "count_tokens": (lambda _: {"input_tokens": 5}, lambda _: ()),
    "input_tokens": (lambda _: {"object": "response.input_tokens", "input_tokens": 5}, lambda _: ()),
    "responses": (response_document, response_events),
    "embeddings": (embedding_document, lambda _: ()),
}
INSIDE_REFUSAL = {"error": {"message": "too many requests", "type": "rate_limit_error", "code": "rate_limited"}}


class InsideHandler(LoopbackHandler):
    """Answers as a provider, and adds what it received to ``server.seen``."""

    def do_POST(self) -> None:
        body = json_object(self.body())
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Received(self.path, body, headers))  # type: ignore[attr-defined]
        memory = {"x-supermemory-conversation-id": "conv_1"}
        if "/limited/" in self.path:
            refusal = json.dumps(INSIDE_REFUSAL).encode()
            self.reply(429, "application/json", refusal, **memory, **{"Retry-After": "1"})
            return
        whole, events = INSIDE_ANSWERS[urlsplit(self.path).path.rpartition("/")[2]]
        document = whole(body)
        if body.get("stream"):
            data = [sse_event(json.dumps(event), event.get("type")) for event in events(document)]
            done = SSE_DONE if whole is chat_document else b""
            self.reply(200, "text/event-stream", b"".join(data) + done, **memory)
        else:
            self.reply(200, "application/json", json.dumps(document).encode(), **memory)


class Received(NamedTuple):
    """A request as the provider inside received it; the header names are in lower case."""

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]


def inside_config(document: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The user's sections that are no models, and models at the provider inside."""
    kept = {name: document[name] for name in INSIDE_SECTIONS if document.get(name)}
    settings = {**kept.get("litellm_settings", {}), "cache": False}  # else the second mode may read what the first got
    models = {
        GPT: ("openai/gpt-4o-mini", f"{url}/v1"),
        CLAUDE: ("anthropic/claude-sonnet-4-5", url),
        LIMITED: ("openai/gpt-4o-mini", f"{url}/limited/v1"),
        UNREACHABLE_MODEL: ("openai/gpt-4o-mini", f"http://127.0.0.1:{free_port(0)}/v1"),
    }
    deployments = [
        {"model_name": name, "litellm_params": {"model": model, "api_base": base, "api_key": INSIDE_KEY}}
        for name, (model, base) in models.items()
    ]
    return {**kept, "litellm_settings": settings, "model_list": deployments}


# The two modes, and what they answer.


@contextlib.contextmanager
def both_modes(document: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """The two modes as processes with this config and environment: mode → URL; raises StartError.

    The config is a copy: the files that a proxy keeps beside the user's own belong to the one that runs with it.
    """
    direct = {name: f"{environment.get(name, '')},127.0.0.1" for name in ("NO_PROXY", "no_proxy")}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder, contextlib.ExitStack() as running:
        config = Path(folder, "config.yaml")
        config.write_text(yaml.safe_dump(dict(document), sort_keys=False))
        modes = {}
        for mode in ("binary", "sdk"):
            modes[mode] = ModeProcess(mode, config, {**environment, **direct})
            running.callback(modes[mode].stop)
        with patience(lambda: "waiting for both modes (LiteLLM's server takes 8 to 30 s)"):
            while [mode for mode in modes.values() if not mode.url()]:
                time.sleep(LOOK_SECONDS)
        yield {name: process.url() for name, process in modes.items()}
        for process in modes.values():  # both at once, instead of one after the other
            process.process.terminate()


# One mode's program: this module, and a watch over the pipe that the comparison holds and never writes to, so that the
# read returns when the comparison is gone, however it went; what is left of it, its folder, goes too.
MODE_PROGRAM = """\
import os, runpy, shutil, signal, sys, threading
_, folder, *sys.argv = sys.argv
def watch():
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class ModeProcess:
    """One mode as a process of its own; its output goes to files beside its config."""

    def __init__(self, mode: str, config: Path, environment: Mapping[str, str]) -> None:
        self._output, self._log = config.with_name(f"{mode}.out"), config.with_name(f"{mode}.log")
        arguments = ["--mode", mode, "--config", str(config), "--port", "0", "--litellm-port", str(free_port(0))]
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", MODE_PROGRAM, str(config.parent), __file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=log,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is for us
            )

    def url(self) -> str:
        """Where it serves, "" until it does; raises StartError where it has ended."""
        ready = READY_LINE.search(self._output.read_text())
        if ready is None and self.process.poll() is not None:
            lines = ["", *self._log.read_text(errors="replace").splitlines()]
            raise StartError(next((line[7:] for line in lines if line.startswith("error: ")), lines[-1]))
        return ready[1] if ready else ""

    def stop(self) -> None:
        """End it, and what it started."""
        self.process.terminate()
        try:
            self.process.communicate(timeout=DRAIN_SECONDS + CHILD_STOP_SECONDS)  # closes the pipe too
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass(frozen=True)
class Answer:
    """What a client got, and what the provider received for it; a status of 0 is none, its media type says why."""

    status: int
    media: str
    headers: Mapping[str, str]
    body: bytes
    received: tuple[Received, ...] = ()


def ask_mode(url: str, feature: Feature, headers: Mapping[str, str]) -> Answer:
    """Send one mode the request."""
    named = {"model": feature.model} if feature.model else {}
    body = json.dumps({**named, **feature.body}) if isinstance(feature.body, Mapping) else feature.body
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=REQUEST_SECONDS)
    try:
        sent = {name: value for name, value in {**headers, **feature.headers}.items() if value is not None}
        connection.request("GET" if body is None else "POST", feature.path, body, sent)
        response = connection.getresponse()
        got = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, got.get("content-type", "").partition(";")[0], got, response.read())
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, failure_kind(error), {}, b"")
    finally:
        connection.close()


# From an answer to its facts: what a client could see of it, by name.

TEXTS = frozenset("content reasoning_content arguments text thinking signature partial_json delta".split())
INNER_TYPES = ("delta", "content_block", "item", "part")  # of an event, what has a type of its own
SEEN_HEADERS = ("x-", "anthropic-", "authorization", "api-key", "content-type")
SEEN_ANSWER_HEADERS = ("retry-after", "x-request-id", "x-supermemory-conversation-id")


def facts_of(answer: Answer, *, values: bool) -> dict[str, Any]:
    """All that is compared; without ``values`` (a real model answers anew each time) the keys alone."""
    found: dict[str, Any] = {"status": answer.status, "content type": answer.media}
    said: dict[str, Any] = {}
    if answer.media == "text/event-stream":
        events = list(stream_events(answer.body))
        found["events"] = " ".join(kind for kind, _ in groupby(chain.from_iterable(kinds for kinds, _, _ in events)))
        for _, group, document in events:
            fold(said, leaves(document, group))
    elif answer.media == "application/json":
        fold(said, leaves(json_value(answer.body, answer.body.decode(errors="replace")), "body"))
    found.update(said if values else dict.fromkeys(said))
    found.update({f"header {name}": answer.headers[name] for name in SEEN_ANSWER_HEADERS if name in answer.headers})
    found["provider: calls"] = len(answer.received)
    for received in answer.received[:1]:
        found["provider: path"] = received.path
        found.update({f"provider: body {name}": json.dumps(value) for name, value in received.body.items()})
        headers = {name: value for name, value in received.headers.items() if name.startswith(SEEN_HEADERS)}
        found.update({f"provider: header {name}": value for name, value in headers.items()})
    return found


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The (key path, value) pairs of a JSON document; of a list its length and its first element."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        yield f"{path}.length", len(value)
        yield from leaves(value[0], f"{path}.0")
    else:
        yield path, value


def stream_events(body: bytes) -> Iterator[tuple[Sequence[str], str, dict[str, Any]]]:
    """Of each event what it says, the group that its keys are compared in, and its document."""
    for block in body.decode(errors="replace").replace("\r\n", "\n").split("\n\n"):
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in block.split("\n"))}
        if "data" not in fields:
            continue
        document = json_object(fields["data"].encode())
        if "choices" in document:
            yield list(chunk_kinds(document)), "chunk", document
            continue
        inner: dict[str, Any] = next((document[key] for key in INNER_TYPES if isinstance(document.get(key), dict)), {})
        kind = fields.get("event") or (f"nameless {document.get('type')}" if document else fields["data"])
        kind = ":".join(filter(None, (kind, inner.get("type"))))
        yield [kind], kind, document


def chunk_kinds(document: Mapping[str, Any]) -> Iterator[str]:
    """What a chunk of a chat completion says."""
    for choice in document["choices"]:
        said = [name for name, value in choice.get("delta", {}).items() if value not in (None, "")]
        yield from sorted(said, key=lambda name: name != "role")  # within one chunk there is no order
        yield from ["finish"] if choice.get("finish_reason") else []
    yield from ["usage"] if document.get("usage") else []


def fold(said: dict[str, Any], pairs: Iterable[tuple[str, Any]]) -> None:
    """Add the leaves of one more event: pieces of text are put together, else the last value counts."""
    for path, value in pairs:
        before = said.get(path)
        if isinstance(before, str) and isinstance(value, str) and path.rpartition(".")[2] in TEXTS:
            said[path] = before + value
        elif value is not None or path not in said:
            said[path] = value


def differences(binary: Mapping[str, Any], sdk: Mapping[str, Any]) -> Iterator[str]:
    """Every difference of the facts, in words."""
    for name in {**binary, **sdk}:
        if name not in sdk or name not in binary:
            one, facts = ("binary", binary) if name in binary else ("sdk", sdk)
            yield f"{name} only in {one}: {str(facts[name])[:MAX_SHOWN]}"
        elif binary[name] != sdk[name]:
            yield f"{name}: {str(binary[name])[:MAX_SHOWN]} / {str(sdk[name])[:MAX_SHOWN]}"


def verdict(feature: str, found: Iterable[str]) -> str:
    """What is to be said of a feature with these differences."""
    ignored = [(what, why) for name, what, why in IGNORED if fnmatch.fnmatchcase(feature, name)]
    reasons: dict[str, None] = {}
    for difference in found:
        reason = next((why for what, why in ignored if fnmatch.fnmatchcase(difference, what)), None)
        if reason is None:
            return f"{DIFFERENT}: {difference}"
        reasons[reason] = None
    return f"same (ignored: {'; '.join(reasons)})" if reasons else "same"


def real_features(names: Sequence[str], mocked: Collection[str]) -> Iterator[Feature]:
    """The rows for models of the config: each that calls a model once for each of these names; mocks are marked."""
    for feature in FEATURES:
        if not feature.model:
            yield feature
        for name in names if feature.model and not feature.inside else ():
            mark = " (mock_response)" if name in mocked else ""
            yield replace(feature, name=f"{feature.name}, {name}{mark}", model=name)


def refuse_unknown(models: Sequence[str], config: Config) -> None:
    """Raises StartError for a model that neither a name of the config nor one of its wildcards or aliases covers."""
    known = [*config.model_names, *config.aliases]
    for model in models:
        if not any(model == name or fnmatch.fnmatchcase(model, str(name)) for name in known):
            raise StartError(f"--model {model}: is not in the config (known: {', '.join(map(str, known))})")


def compare_modes(config: Config, models: Sequence[str]) -> list[tuple[str, ...]]:
    """Start both modes, send each feature to both; returns the rows: feature, binary's status, sdk's, verdict.

    Without ``models`` the provider is the one inside. Raises StartError where a mode cannot start, or a model is not
    in the config.
    """
    refuse_unknown(models, config)
    key = config.master_key or f"sk-parity-{random.getrandbits(128):032x}"
    environment = {**config.environment, "LITELLM_MASTER_KEY": key}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "x-request-id": "parity"}
    mocked = {one["model_name"] for one in config.document["model_list"] if one["litellm_params"].get("mock_response")}
    rows: list[tuple[str, ...]] = []
    received: list[Received] = []
    with loopback_server(InsideHandler, received) as url:
        features = list(real_features(models, mocked)) if models else FEATURES
        both = both_modes(config.written if models else inside_config(config.written, url), environment)
        with both as urls, patience(lambda: f"{len(rows)} of {len(features)} features"):
            for feature in features:
                answers = {}
                for mode, base in urls.items():
                    received.clear()
                    answer = ask_mode(base, feature, headers)
                    answers[mode] = replace(answer, received=tuple(received))
                found = list(differences(*(facts_of(answer, values=not models) for answer in answers.values())))
                rows.append((feature.name, *(str(a.status) for a in answers.values()), verdict(feature.name, found)))
    return rows


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────
# Arguments, signals, exit codes, and what a user reads at the start.

MODES = ("sdk", "binary", "both")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOAD_REQUESTS, LOAD_CONCURRENCY = 100, 50
INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells give a program that Ctrl-C ended
EPILOG = """\
examples:
  %(prog)s --mode sdk                                  the SDK in this process, on 127.0.0.1:8764
  %(prog)s --mode binary                               starts LiteLLM's server and forwards to it
  %(prog)s --mode binary --litellm-url http://gpu:4000 forwards to a server that runs elsewhere
  %(prog)s --mode both                                 binary on 8764, sdk on 8765
  %(prog)s check                                       is config.yaml right?
  %(prog)s parity                                      do both modes answer alike? costs nothing
  %(prog)s cutover                                     --mode both: the sdk serves the main port from now on
  %(prog)s rollback                                    --mode both: binary serves it again
  %(prog)s load --stream                               how fast is the proxy that runs on 127.0.0.1:8764?

environment:
  CONFIG_PATH, PROXY_PORT                 defaults of --config and --port
  USE_SDK_PROXY=true|false                mode sdk or binary, where no flag names one
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="litellm_memory_proxy.py",
        description="A local proxy that gives every AI client its own memory, in front of any model LiteLLM knows.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    commands = (
        "serve (default): run the proxy; check: validate the config, exit 1 if it has errors; load: measure a "
        "running proxy, exit 1 if a request failed; parity: do both modes answer alike? exit 1 if not; cutover, "
        "rollback: move the main port of the running --mode both to the sdk, back to binary"
    )
    add("command", nargs="?", default="serve", choices=tuple(COMMANDS), help=commands)
    add("--mode", choices=MODES, help="how to reach the models: sdk, binary, or both on two ports (default: sdk)")
    add("--use-sdk", dest="mode", action="store_const", const="sdk", help="the same as --mode sdk")
    add("--run-both", dest="mode", action="store_const", const="both", help="the same as --mode both")
    file, config = "a LiteLLM config file (default: CONFIG_PATH, else config.yaml)", os.environ.get("CONFIG_PATH")
    add("--config", metavar="PATH", type=path_option, default=config or "config.yaml", help=file)
    address = "the address to listen on (default: %(default)s)"
    add("--host", metavar="ADDR", type=address_option, default="127.0.0.1", help=address)
    port = f"the port to listen on (default: PROXY_PORT, else {DEFAULT_PORT})"
    add("--port", metavar="N", type=port_number, help=port)
    add("--sdk-port", metavar="N", type=port_number, help=f"sdk's port under --mode both (default: {DEFAULT_SDK_PORT})")
    add("--litellm-url", metavar="URL", help="a LiteLLM server that already runs: none is started")
    add("--cookie-file", metavar="PATH", help="keep sdk mode's cookies here over restarts (default: in memory only)")
    most = "client connections at once; idle ones make room for new ones (default: %(default)s)"
    add("--max-connections", metavar="N", type=positive_number, default=MAX_CONNECTIONS, help=most)
    body = "size of a request body in MiB (default: %(default)s)"
    add("--max-body-mb", metavar="N", type=positive_number, default=MAX_BODY_BYTES // 2**20, help=body)
    hosts = "let in requests whose Host header has this name too, * for any; may be repeated"
    add("--allow-host", metavar="NAME", action="append", type=host_option, default=[], help=hosts)
    origins = "let in web pages of this origin, such as https://chat.example, * for any; may be repeated"
    add("--allow-origin", metavar="ORIGIN", action="append", type=origin_option, default=[], help=origins)
    logged, level = "what is logged (default: LOG_LEVEL, else INFO)", os.environ.get("LOG_LEVEL")
    add("--log-level", choices=LEVELS, default=level or "INFO", type=str.upper, help=logged)
    add("--watch", action="store_true", help="read the config again when it changes (SIGHUP does it at any time)")
    add("--log-json", action="store_true", help="log JSON lines on a terminal too; elsewhere it does so anyway")
    add("--log-file", metavar="PATH", help="log there too, as JSON lines; rotated at 10 MiB, five older files are kept")
    server_port = "the port of the LiteLLM server that is started (default: %(default)s)"
    add("--litellm-port", metavar="N", type=port_number, default=DEFAULT_LITELLM_PORT, help=server_port)
    models = "load: the model to ask (default: demo); parity: a model of the config to compare by, which may cost money"
    add("--model", metavar="NAME", action="append", help=f"{models}; may be repeated")
    add_load_options(parser)
    return parser


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``load``, in a group of their own."""
    about = "many requests at once; the key, if one is needed, is LITELLM_MASTER_KEY or the config's master_key"
    add = parser.add_argument_group("load", about).add_argument
    in_all, at_a_time = "requests in all (default: %(default)s)", "requests at a time (default: %(default)s)"
    add("--num-requests", metavar="N", type=positive_number, default=LOAD_REQUESTS, help=in_all)
    add("--concurrency", metavar="N", type=positive_number, default=LOAD_CONCURRENCY, help=at_a_time)
    add("--stream", action="store_true", help="ask for streams, and read each to its end")
    add("--url", metavar="URL", help="the proxy to call (default: the one on this machine, at --port)")


def number_in(allowed: range, kind: str, text: str) -> int:
    """The number that is written there; raises argparse.ArgumentTypeError where it is none of these."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) in allowed:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no {kind}")


# Types of argparse's, as are the functions that follow.
positive_number = partial(number_in, range(1, sys.maxsize), "whole number from 1")
port_number = partial(number_in, range(65536), "port (0 to 65535)")  # 0 lets the system choose


def path_option(text: str) -> str:
    """The path of a file; an empty one would be that of the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def address_option(text: str) -> str:
    """An address or a host name to listen on, without a scheme, brackets or a port."""
    address = text.strip("[]")
    if re.fullmatch(r"|.*[/\]].*|[^:]*:[^:]*", address):
        raise argparse.ArgumentTypeError(f"{text!r} is no address (without http://; --port names the port)")
    return address


def host_option(text: str) -> str:
    """A host name without a port, or ``*``."""
    if text != "*" and host_name(text) != text.lower().strip("[]"):
        raise argparse.ArgumentTypeError(f"{text!r} is no host name (without a port)")
    return text.lower().strip("[]")


def origin_option(text: str) -> str:
    """``scheme://host[:port]``, ``null`` or ``*``."""
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+/?|null|\*", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin (https://host or https://host:port)")
    return text.lower().rstrip("/")


def settle(arguments: argparse.Namespace, config: Config) -> Settings:
    """Decide the mode and the ports; raises StartError where the environment's or the config's are unusable."""
    experimental = config.experimental
    use_sdk = str(config.environment.get("USE_SDK_PROXY") or experimental.get("use_sdk_proxy"))
    modes = {"true": "sdk", "false": "binary", "none": "sdk"}  # None: nobody says
    if use_sdk.lower() not in modes:
        raise StartError(f"USE_SDK_PROXY / use_sdk_proxy must be true or false, not {use_sdk!r}")
    mode = arguments.mode or modes[use_sdk.lower()]
    port, sdk_port = arguments.port, arguments.sdk_port
    if port is None:
        configured = experimental.get("sdk_proxy_port" if mode == "sdk" else "binary_proxy_port")
        try:
            port = port_number(str(config.environment.get("PROXY_PORT") or configured or DEFAULT_PORT))
        except argparse.ArgumentTypeError as error:  # the config's own have been checked
            raise StartError(f"PROXY_PORT: {error}") from None
    if sdk_port is None:
        sdk_port = experimental.get("sdk_proxy_port") or DEFAULT_SDK_PORT
    settings = Settings(
        mode=mode,
        host=arguments.host,
        port=port,
        sdk_port=sdk_port,
        litellm_url=arguments.litellm_url,
        litellm_port=arguments.litellm_port,
        cookie_file=arguments.cookie_file,
        limits=Limits(arguments.max_connections, arguments.max_body_mb * 1024 * 1024),
        access=Access(
            is_loopback(arguments.host.lower()), frozenset(arguments.allow_host), frozenset(arguments.allow_origin)
        ),
    )
    ports = [*settings.ports.values(), *([settings.litellm_port] if settings.needs_server else [])]
    taken = [number for number in ports if number]  # 0: the system chooses
    if len(set(taken)) < len(taken):
        raise StartError(f"--port, --sdk-port and --litellm-port must differ, not {', '.join(map(str, taken))}")
    return settings


def needs_server(argv: Sequence[str]) -> bool:
    """Whether this command line will start LiteLLM's server; run.sh asks, to install it the first time."""
    try:
        arguments = build_parser().parse_args(argv)
        if arguments.command == "parity":
            return True
        return arguments.command == "serve" and settle(arguments, load_config(arguments.config)).needs_server
    except (StartError, SystemExit):  # the latter: --help, or a wrong argument
        return False


class Signals:
    """The signals that were sent to us, whichever thread the system hands them to.

    Python runs its handlers in the main thread, and a main thread that waits for a lock does not wake for a signal that
    another thread got; a byte in a socket wakes it always (`signal.set_wakeup_fd`).
    """

    def __init__(self) -> None:
        self.stop = self.reload = False
        self._stopped_at = math.inf
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._terminals = [number for number in range(3) if os.isatty(number)]
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _note(self, number: int, _frame: Any) -> None:
        # A terminal that was closed sends SIGHUP too, and wants everything in it to end.
        hung_up = number == signal.SIGHUP and not all(map(os.isatty, self._terminals))
        if number == signal.SIGHUP and not hung_up:
            self.reload = True
        elif not self.stop:
            self.stop, self._stopped_at = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._stopped_at > AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def wait(self, seconds: float | None = None) -> None:
        """Return when there is one to be seen to, be it from before this call, or after this time."""
        self._reader.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            while not (self.stop or self.reload):
                self._reader.recv(1)

    def close(self) -> None:
        """All is done: what comes while Python takes itself down, without handlers, must not change the exit code."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def file_state(path: str) -> tuple[int, ...] | None:
    """What changes with a file: its time in ns, its size in bytes, its inode; None where there is no file."""
    try:
        state = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


class Watch:
    """Tells when a config has changed and lies still again: editors write in several steps."""

    def __init__(self, path: str) -> None:
        self._path, self._files = path, [path]
        self._states: list[tuple[int, ...] | None] = []
        self._seen = self._taken = self._look()

    def _look(self) -> list[tuple[int, ...] | None]:
        """What the file system says of the config, its ``include`` files and its ``.env``."""
        while (states := [*map(file_state, self._files)]) != self._states:
            # Only then may others be included: to read 1,000 models takes 0.2 s.
            self._states, self._files = states, files_of(self._path)
        return [*states, file_state(str(dotenv_path(self._path)))]

    def changed(self) -> bool:
        """Whether there is something new since the last time that this was so."""
        before, self._seen = self._seen, self._look()
        if self._seen != before or self._seen == self._taken:
            return False
        self._taken = self._seen
        return True


def allow_open_files(connections: int) -> None:
    """Raise our limit of open files to what so many connections need, as far as the system lets us (as Go and Node do).

    Linux starts a program with 1,024, macOS with 256; past it neither a request nor its refusal would get through.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + SPARE_FILES
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if resource.RLIM_INFINITY != soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(arguments: argparse.Namespace) -> int:
    """Run the proxy until it is told to stop; returns the exit code."""
    given = dict(os.environ)
    watch = Watch(arguments.config) if arguments.watch else None  # from before the first reading on
    config = load_config(arguments.config)
    apply_environment(config)
    settings = settle(arguments, config)
    refuse_open_bind(settings, config)
    log = make_log(arguments, config)
    take_in_logging(log)
    for warning in config.warnings:
        log.event("WARNING", "config", "warning", message=warning.message, place=warning.place)
    if settings.has_sdk:
        sys.setswitchinterval(SWITCH_SECONDS)
    allow_open_files(settings.limits.connections)
    signals = Signals()
    with PidFile(config.path, log) as pid_file:
        program = Program(settings, config, given, log, lambda: signals.stop, pid_file.publish)
        try:
            program.start()
            if not signals.stop:
                show_guide(program, log, plain=sys.stdout.isatty() and not arguments.log_json)
            while not signals.stop:
                signals.wait(WATCH_SECONDS if watch else None)
                if signals.reload or (watch and watch.changed()):
                    signals.reload = False
                    program.reload()
            log.event("INFO", "program", "stopping", message="stopping; Ctrl-C again does not wait for what runs")
        finally:
            program.stop()
            log.flush()
            signals.close()
    return 0


def make_log(arguments: argparse.Namespace, config: Config) -> Log:
    """The program's log on standard error."""
    if arguments.log_level not in LEVELS:  # argparse does not check a default
        raise StartError(f"LOG_LEVEL must be one of {', '.join(LEVELS)}, not {arguments.log_level!r}")
    level = getattr(logging, arguments.log_level)
    as_json = arguments.log_json or not sys.stderr.isatty()
    redact = Redactor(config.secrets)
    return Log(own_stream(sys.stderr), as_json=as_json, redact=redact, level=level, file=arguments.log_file)


def own_stream(stream: Any) -> Any:
    """The same output as a stream of its own: one that is stuck in a full pipe must not hold up Python's exit."""
    return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="backslashreplace")


def show_guide(program: Program, log: Log, *, plain: bool) -> None:
    """What to do next, on standard output."""
    guide = Log(own_stream(sys.stdout), as_json=True, redact=log.redact)
    for line in program.guide():
        say(line) if plain else guide.event("INFO", "guide", "start", message=line)


def move_traffic(arguments: argparse.Namespace, use_sdk: bool) -> int:
    """Move the main port of the running proxy to a side, and wait until it is there; returns 1 where it is not."""
    path, wanted = arguments.config, "sdk" if use_sdk else "binary"
    before = running_proxy(path)
    if before:
        tell(before[0], 0)  # may we? else the config stays as it is
    set_use_sdk(path, use_sdk)
    say(f"{path}: use_sdk_proxy is {str(use_sdk).lower()}")
    if before is None:
        say("no proxy runs with this config: it counts at the next start")
        return 1
    pid, status = before
    if not status["loads"]:  # it is starting, and may have read the config before or after the change
        status = await_load(path, 0)
    tell(pid, signal.SIGHUP)
    now = await_load(path, status["loads"])
    for problem in now["problems"]:
        say(f"error: the proxy (pid {pid}) stays as it is: {problem}")
    for url, side in now["serving"].items():
        say(f"{url}: {side} serves")
    moved = next(iter(now["serving"].values()), "") == wanted
    if not (moved or now["problems"]):
        later = f"without --mode, {wanted} alone serves from the next start on"
        say(f"error: the proxy (pid {pid}) has no such second side: start it with --mode both; {later}")
    return 0 if moved and not now["problems"] else 1


def tell(pid: int, number: int) -> None:
    """Send a signal to the running proxy; raises StartError where it is another user's, or gone this moment."""
    try:
        os.kill(pid, number)
    except OSError as error:
        raise StartError(f"the proxy (pid {pid}) cannot be told: {error.strerror}") from None


def await_load(path: str, loads: int) -> dict[str, Any]:
    """The status of the running proxy after one more reading of its config; raises StartError where there is none."""
    deadline = time.monotonic() + CHILD_READY_SECONDS + CHILD_STOP_SECONDS
    with patience(lambda: "waiting for the proxy"):
        while time.monotonic() < deadline:
            found = running_proxy(path)
            if found is None:
                raise StartError("the proxy has stopped")
            if found[1]["loads"] > loads:
                return found[1]
            time.sleep(0.02)
    raise StartError("the proxy did not switch; its log says why")


def check(arguments: argparse.Namespace) -> int:
    """Print every problem of the config and what it means; returns 1 if there is an error, else 0."""
    try:
        reading = read_config(arguments.config)
    except ConfigError as error:
        return report(arguments.config, error.problems, [], Redactor(secrets_of(dict(os.environ))))
    config, problems = reading.config, every_problem(reading, arguments)
    models = aligned([(name, model, f"key {key}") for name, model, key in reading.deployments])
    tables = ["models:", *models, f"memory ({config.mappings.inject_header}):", *memory_table(config.mappings)]
    found = f"{len(config.model_names)} models, {len(config.mappings.patterns)} patterns"
    return report(config.path, problems, tables, Redactor(config.secrets), found)


def report(path: str, problems: Sequence[Problem], tables: Iterable[str], redact: Redactor, found: str = "") -> int:
    """Print the problems, errors first, the tables and a last line; returns 1 if there is an error, else 0."""
    for problem in sorted(problems, key=lambda problem: problem.warning):
        # One by one: the redaction would take what follows the key path of an api_key for the key.
        parts = filter(None, ("warning" if problem.warning else "error", problem.place, problem.message))
        say(printable(": ".join(map(redact, parts))))
    warned = sum(problem.warning for problem in problems)
    wrong = len(problems) - warned
    for line in (*tables, f"{path}: " + (f"{wrong} errors, {warned} warnings" if wrong else f"ok, {found}")):
        say(printable(redact(line)))
    return 1 if wrong else 0


def every_problem(reading: Reading, arguments: argparse.Namespace) -> list[Problem]:
    """What is wrong with the config, and with this command line and environment on top of it."""
    problems = [*reading.problems, *locate(pattern_warnings(reading.config.mappings), reading.root)]
    if all(problem.warning for problem in problems):
        try:
            settle(arguments, reading.config)
        except StartError as error:
            problems.append(Problem("", str(error)))
    return problems


def memory_table(mappings: Mappings) -> list[str]:
    """The lines of a table of what leads to which memory, in the order in which it is looked at."""
    rows = [(mappings.custom_header, "ID", "->", "ID", "")] if mappings.custom_header else []
    for pattern in mappings.patterns:
        value, user_id = example_of(pattern) or (None, "")
        example = "" if value is None else f'matches "{value[:MAX_SHOWN]}"'
        gets = f" and gives {user_id}" if user_id not in ("", pattern.user_id) else ""
        rows.append((pattern.header, pattern.pattern, "->", pattern.user_id, example + gets))
    rows.append(("anyone else", "", "->", mappings.default_user_id, ""))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def printable(line: str) -> str:
    """One line that the terminal takes as such, whatever a config or a file's name has in it."""
    encoding = sys.stdout.encoding or "utf-8"
    return one_line(line).encode(encoding, "backslashreplace").decode(encoding)


def config_if_any(path: str) -> Config:
    """The config, or an empty one where it is missing or broken: a load test may run far from it."""
    try:
        return load_config(path)
    except ConfigError:
        environment = dict(os.environ)
        return Config(path, {}, (), {}, Mappings(), secrets_of(environment), environment, "")


def load(arguments: argparse.Namespace) -> int:
    """Measure a running proxy and print the table; returns 1 if a request failed, 130 after Ctrl-C, else 0."""
    config = config_if_any(arguments.config)
    url = f"http://127.0.0.1:{settle(arguments, config).port}" if arguments.url is None else arguments.url
    model = (arguments.model or ["demo"])[-1]
    target = load_target(url, config.master_key, model, streamed=arguments.stream)
    redact = Redactor(config.secrets)
    run, seconds = run_load(target, arguments.num_requests, arguments.concurrency)
    for line in load_report(run, seconds):
        say(printable(redact(line))[:MAX_LOGGED])
    if reason := unreachable(run):
        print(f"error: {target.url}: {reason}: is the proxy running there? --url names another", file=sys.stderr)
    if run.stopped:
        return INTERRUPTED
    return int(len(run.good) < run.requests)


def parity(arguments: argparse.Namespace) -> int:
    """Compare the two modes and print a row for each feature; returns 1 on a difference, else 0."""
    config = load_config(arguments.config)
    for number in (signal.SIGTERM, signal.SIGHUP):  # nor may these leave the two modes behind
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    rows = compare_modes(config, arguments.model or ())
    redact = Redactor(config.secrets)
    for line in aligned([("feature", "binary", "sdk", "verdict"), *rows]):
        say(printable(redact(line)))
    different = sum(row[-1].startswith(DIFFERENT) for row in rows)
    say(f"{len(rows)} features, {different} differences")
    return int(different > 0)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": serve,
    "check": check,
    "load": load,
    "parity": parity,
    "cutover": partial(move_traffic, use_sdk=True),
    "rollback": partial(move_traffic, use_sdk=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 0, 1 where a command found something, 2 where it could not start, or 130."""
    for name in ("stdout", "stderr"):  # Python has None there where the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    arguments = build_parser().parse_args(argv)
    if arguments.command != "serve":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except StartError as error:
        print(f"error: {Redactor(secrets_of(dict(os.environ)))(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
