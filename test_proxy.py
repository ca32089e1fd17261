"""The tests of litellm_memory_proxy, in the order of its rooms.

Everything is real: the module's own processes, LiteLLM's SDK and LiteLLM's server, sockets. The providers are played
by `Provider`, an HTTP server that answers from a script and records what it got. Nothing of ours is patched.

    ./run.sh test                 all of it (a quarter of an hour; installs LiteLLM's server the first time)
    ./run.sh test -k routing      some of it
    ./run.sh clients              the real clients that npm has, in both modes
    ./run.sh bench                how fast it is, beside nginx, LiteLLM's server and the bare SDK
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import http.client
import importlib
import io
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import litellm_memory_proxy as proxy

if TYPE_CHECKING:  # run.sh's `oldest` has no anthropic
    import anthropic
    import openai

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it; our children would too
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
MODULE = HERE / "litellm_memory_proxy.py"
PROVIDER_KEY = "sk-provider-secret-0123456789"
ANTHROPIC_KEY = "ant-provider-secret-9876543210"

# ── the provider ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Got:
    """A request as the provider received it."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    raw: bytes
    gone: threading.Event = field(default_factory=threading.Event)

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        return ", ".join(values) if values else None

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass
class Reply:
    """An answer of the provider: a whole body, or parts, each after its pause."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] | None = None
    pause: float = 0.0
    hold: float = 0.0  # seconds before the head
    cut: bool = False  # close the connection after the last part, without its end


class Provider:
    """Plays OpenAI's and Anthropic's APIs; ``script`` decides each answer, ``got`` records each request."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.script: Callable[[Got], Reply] = usual_answer
        self.connections = 0
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def setup(self) -> None:
                provider.connections += 1
                super().setup()

            def serve(self) -> None:
                got = Got(self.command, self.path, list(self.headers.items()), self.read_body())
                provider.got.append(got)
                try:
                    self.send(got, provider.script(got))
                except OSError:
                    got.gone.set()
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = serve

            def read_body(self) -> bytes:
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length") or 0))
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

            def send(self, got: Got, reply: Reply) -> None:
                self.wait(got, reply.hold)
                self.send_response(reply.status)
                headers = {"content-type": "application/json", **reply.headers}
                if reply.parts is None:
                    headers.setdefault("content-length", str(len(reply.body)))
                else:
                    headers["transfer-encoding"] = "chunked"
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(reply.body)
                for part in reply.parts or ():
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                    self.wait(got, reply.pause)
                if reply.cut:
                    self.close_connection = True
                elif reply.parts is not None:
                    self.wfile.write(b"0\r\n\r\n")

            def wait(self, got: Got, seconds: float) -> None:
                """Wait, and notice when the other side closes."""
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline:
                    self.connection.settimeout(min(0.02, seconds))
                    try:
                        if self.connection.recv(1, socket.MSG_PEEK) == b"":
                            raise ConnectionResetError
                    except TimeoutError:
                        pass
                    finally:
                        self.connection.settimeout(None)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def last(self) -> Got:
        return self.got[-1]

    @property
    def posts(self) -> list[Got]:
        """Without the GET /v1/models that LiteLLM's server sends by itself after its start."""
        return [got for got in self.got if got.method == "POST"]

    def wait_for(self, count: int = 1, seconds: float = 10) -> Got:
        """The newest request, once there are this many."""
        wait_until(lambda: len(self.got) >= count, seconds)
        return self.got[-1]


PROVIDER_HEADERS = {
    "x-supermemory-conversation-id": "conv-1",
    "x-ratelimit-remaining-requests": "99",
    "anthropic-ratelimit-tokens-remaining": "77",
    "set-cookie": "session=abc; Path=/",
}
SSE = {"content-type": "text/event-stream"}
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
THINKING = {"type": "thinking", "thinking": "hm", "signature": "c2lnbmF0dXJl"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def sse(document: dict[str, Any], event: str | None = None) -> bytes:
    return (f"event: {event}\n" if event else "").encode() + b"data: " + json.dumps(document).encode() + b"\n\n"


def openai_chunk(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return sse(
        {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **extra}
    )


def openai_stream(words: list[str]) -> list[bytes]:
    first, *rest = words
    return [
        openai_chunk({"role": "assistant", "content": first}),
        *(openai_chunk({"content": word}) for word in rest),
        openai_chunk({}, "stop"),
        sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": USAGE}),
        b"data: [DONE]\n\n",
    ]


def anthropic_stream(words: list[str]) -> list[bytes]:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 1}}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in words),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]
    return [sse(event, event["type"]) for event in events]


def responses_stream(text: str) -> list[bytes]:
    item = {"type": "message", "id": "m1", "role": "assistant", "status": "completed"}
    item |= {"content": [{"type": "output_text", "text": text, "annotations": []}]}
    whole = response_object([item])
    place = {"item_id": "m1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**whole, "status": "in_progress", "output": []}},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": part},
        {"type": "response.output_text.delta", **place, "delta": text},
        {"type": "response.output_text.done", **place, "text": text},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
    ]
    return [sse({**event, "sequence_number": n}, event["type"]) for n, event in enumerate(events)]


def response_object(output: list[Any]) -> dict[str, Any]:
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    empty = {"error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "tools": []}
    settings = {"parallel_tool_calls": True, "tool_choice": "auto", "temperature": 1, "top_p": 1}
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed"}
    return {**head, "output": output, "usage": usage, **empty, **settings}


GEMINI = {
    "responseId": "g1",
    "candidates": [{"content": {"parts": [{"text": "hello"}], "role": "model"}, "finishReason": "STOP", "index": 0}],
    "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5},
}
OLLAMA = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": {"role": "assistant", "content": "hello"}}
OLLAMA |= {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2}
VECTOR = [0.5, 0.25]
VECTOR_TEXT = base64.b64encode(struct.pack("<2f", *VECTOR)).decode()
TEXT = {"id": "t1", "object": "text_completion", "created": 1, "model": "m"}
TEXT |= {"choices": [{"text": "hello", "index": 0, "finish_reason": "stop", "logprobs": None}], "usage": USAGE}


def embeddings(body: dict[str, Any]) -> dict[str, Any]:
    """A vector for each input, packed where the client asks for it."""
    value: Any = VECTOR_TEXT if body.get("encoding_format") == "base64" else VECTOR
    count = len(body["input"]) if isinstance(body["input"], list) else 1
    rows = [{"object": "embedding", "index": index, "embedding": value} for index in range(count)]
    return {"object": "list", "model": "m", "data": rows, "usage": USAGE}


def other_answer(path: str, body: dict[str, Any]) -> Reply | None:
    """The answers of the other APIs: Gemini, Ollama, embeddings, text completions."""
    stream = body.get("stream")
    if "generateContent" in path.replace("streamG", "g"):
        return Reply(parts=[sse(GEMINI)], headers=SSE) if "stream" in path else Reply(json.dumps(GEMINI).encode())
    if path.endswith("/api/chat"):
        line = json.dumps(OLLAMA).encode() + b"\n"
        return Reply(parts=[line], headers={"content-type": "application/x-ndjson"}) if stream else Reply(line)
    if path.endswith("/embeddings"):
        return Reply(json.dumps(embeddings(body)).encode())
    if path.endswith("/v1/completions"):
        return (
            Reply(parts=[sse(TEXT), b"data: [DONE]\n\n"], headers=SSE) if stream else Reply(json.dumps(TEXT).encode())
        )
    return None


def usual_answer(got: Got) -> Reply:
    """What the real providers would answer, told apart by the path."""
    if got.method != "POST" or not got.raw:
        return Reply(json.dumps({"method": got.method, "path": got.path}).encode(), headers=PROVIDER_HEADERS)
    body = got.body
    other = other_answer(got.path.partition("?")[0], body)
    if other:
        return other
    stream, tools = body.get("stream"), body.get("tools")
    if got.path.endswith("/v1/messages"):
        if stream:
            return Reply(parts=anthropic_stream(["hel", "lo"]), headers={**SSE, **PROVIDER_HEADERS})
        content: list[dict[str, Any]] = [THINKING] if body.get("thinking") else []
        use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
        content.append(use if tools else {"type": "text", "text": "hello"})
        answer: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"]}
        answer |= {"content": content, "stop_reason": "tool_use" if tools else "end_turn", "stop_sequence": None}
        answer |= {"usage": {"input_tokens": 3, "output_tokens": 2}}
    elif got.path.endswith("/responses"):
        if stream:
            return Reply(parts=responses_stream("hello"), headers={**SSE, **PROVIDER_HEADERS})
        text = {"type": "output_text", "text": "hello", "annotations": []}
        answer = response_object(
            [{"type": "message", "id": "m1", "role": "assistant", "status": "completed", "content": [text]}]
        )
    else:
        if stream:
            return Reply(parts=openai_stream(["hel", "lo"]), headers={**SSE, **PROVIDER_HEADERS})
        message: dict[str, Any] = {"role": "assistant", "content": None if tools else "hello"}
        if tools:
            message["tool_calls"] = [TOOL_CALL]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if tools else "stop"}
        answer = {"id": "c1", "object": "chat.completion", "created": 1, "model": body.get("model")}
        answer |= {"service_tier": "default"}  # LiteLLM cannot read Groq's answers without it
        answer |= {"choices": [choice], "usage": USAGE}
    return Reply(json.dumps(answer).encode(), headers=PROVIDER_HEADERS)


# ── the running proxy ────────────────────────────────────────────────────────────────────────────────────────────


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Return when the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment without anybody's keys, proxies and settings."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG", "SSL_CERT_FILE") if name in os.environ
    }
    return {**kept, "NO_PROXY": "*", **extra}


class Proxy:
    """litellm_memory_proxy.py as a process of its own."""

    left: ClassVar[list[Proxy]] = []  # those that the test at hand has started and not stopped

    def __init__(
        self,
        config: dict[str, Any],
        *arguments: str,
        wait: bool = True,
        terminal: int | None = None,
        **environment: str,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.config = Path(self.folder.name) / "config.yaml"
        self.config.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, str(MODULE), "--config", str(self.config), "--port", "0", *arguments]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if terminal is None else terminal,
            text=True,
            env=clean_environment(**environment),
            cwd=self.folder.name,
        )
        self._pump = threading.Thread(target=self._read, daemon=True)
        self._pump.start()
        Proxy.left.append(self)
        if wait:
            self.wait_ready(1 + ("both" in arguments))

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def ready(self) -> list[str]:
        return re.findall(r"^ready: \w+ (\S+)$", self.output, re.M)

    def wait_ready(self, count: int = 1, seconds: float = 120) -> None:
        wait_until(lambda: len(self.ready()) >= count or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.output
        self.url = self.ready()[0]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, model: str = "gpt", **options: Any) -> httpx.Response:
        headers = options.pop("headers", {})
        return self.post("/v1/chat/completions", {**chat_body(model), **options}, headers=headers)

    def messages(self, model: str = "claude", **options: Any) -> httpx.Response:
        headers = options.pop("headers", {})
        return self.post("/v1/messages", {**messages_body(model), **options}, headers=headers)

    def raw(self, data: bytes, seconds: float = 5) -> bytes:
        """Send bytes on a connection of their own; what came back until the proxy closed or fell silent."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as sock:
            sock.sendall(data)
            received = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while piece := sock.recv(65536):
                    received += piece
            return received

    def kept(self) -> Proxy:
        """It serves more than one test."""
        Proxy.left.remove(self)
        return self

    def stop(self) -> int:
        if self in Proxy.left:
            Proxy.left.remove(self)
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(40)
        self._pump.join(5)
        self.folder.cleanup()
        return code


def failed_start(config: dict[str, Any], *arguments: str, **environment: str) -> Proxy:
    """A proxy that cannot start, and says in its last line why."""
    running = Proxy(config, *arguments, wait=False, **environment)
    assert running.process.wait(90) == 2
    running.stop()
    assert "error: " in running.lines[-1] and "\nTraceback" not in running.output, running.output
    return running


def chat_body(model: str = "gpt") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]}


def messages_body(model: str = "claude") -> dict[str, Any]:
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}


def model(name: str, target: str, base: str, key: str = PROVIDER_KEY, **params: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": target, "api_base": base, "api_key": key, **params}}


SHIPPED_PATTERNS = yaml.safe_load((HERE / "config.yaml").read_text())["user_id_mappings"]["header_patterns"]


def config_for(provider: Provider, *more: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A config with an OpenAI and an Anthropic model at the provider, and the shipped patterns."""
    return {
        "model_list": [
            model("gpt", "openai/gpt-4o-mini", f"{provider.url}/v1", extra_headers={"x-from-config": "1"}),
            model("claude", "anthropic/claude-sonnet-4-5", provider.url, ANTHROPIC_KEY),
            {
                "model_name": "demo",
                "litellm_params": {"model": "openai/demo", "api_key": "none", "mock_response": "hi"},
            },
            *more,
        ],
        "user_id_mappings": {
            "header_patterns": [
                {"header": "user-agent", "pattern": "^claude-cli/", "user_id": "claude-code"},
                {"header": "x-project", "pattern": r"^(?P<name>[\w/]+)$", "user_id": r"app-\g<name>"},
                *(pattern for pattern in SHIPPED_PATTERNS if pattern["user_id"] != "claude-code"),
            ]
        },
        "general_settings": {"forward_client_headers_to_llm_api": True},
        **sections,
    }


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that fails leaves no process behind that would slow those after it."""
    yield
    for running in list(Proxy.left):
        running.process.kill()
        running.stop()


@pytest.fixture(scope="session")
def shared_provider() -> Provider:
    return Provider()


@pytest.fixture
def provider(shared_provider: Provider) -> Iterator[Provider]:
    shared_provider.script = usual_answer
    shared_provider.got.clear()
    yield shared_provider
    shared_provider.script = usual_answer


@pytest.fixture(scope="session")
def sdk(shared_provider: Provider) -> Iterator[Proxy]:
    """One sdk-mode process for the tests that need nothing special."""
    refused = f"http://127.0.0.1:{free_port()}/v1"
    models = (
        model("refused", "openai/gpt-4o-mini", refused),
        model("nowhere", "openai/gpt-4o-mini", "http://host.invalid/v1"),
        model("slow", "openai/gpt-4o-mini", f"{shared_provider.url}/v1", timeout=1),
        model("twice", "openai/gpt-one", f"{shared_provider.url}/v1"),
        model("twice", "openai/gpt-two", f"{shared_provider.url}/v1"),
        model("anthropic/*", "anthropic/*", shared_provider.url, ANTHROPIC_KEY),
        model("custom", "my-own-name", f"{shared_provider.url}/v1", custom_llm_provider="openai"),
        model("shaky", "openai/gpt-shaky", f"{shared_provider.url}/v1"),
        model("half", "openai/gpt-4o-mini", f"{shared_provider.url}/v1", "os.environ/UNSET_KEY"),
        model("half", "openai/gpt-4o-mini", f"{shared_provider.url}/v1"),
        model("keyless", "openai/gpt-4o-mini", f"{shared_provider.url}/v1", "os.environ/UNSET_KEY"),
        {"model_name": "implicit", "litellm_params": {"model": "groq/llama-3"}},
        model("ranker", "cohere/rerank-v3.5", shared_provider.url),
        model("embedder", "mistral/mistral-embed", f"{shared_provider.url}/v1"),
        model("gemini", "gemini/gemini-2.5-flash", shared_provider.url),
    )
    aliases = {"smart": "gpt", "hidden": {"model": "claude", "hidden": True}, "bare": "keyless"}
    settings = {"fallbacks": [{"shaky": ["claude"]}], "num_retries": 0, "model_group_alias": aliases}
    running = Proxy(config_for(shared_provider, *models, router_settings=settings))
    yield running.kept()
    assert running.stop() == 0
    assert "Unclosed" not in running.output
    assert "Traceback (most" not in running.output
    assert PROVIDER_KEY not in running.output


@pytest.fixture(scope="session")
def binary(shared_provider: Provider) -> Iterator[Proxy]:
    """One binary-mode process in front of a real LiteLLM server that it started."""
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-port", str(free_port()))
    yield running.kept()
    assert running.stop() == 0


@pytest.fixture(scope="session")
def forward(shared_provider: Provider) -> Iterator[Proxy]:
    """One binary-mode process in front of the scripted provider: what is forwarded arrives there as it is."""
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", shared_provider.url)
    yield running.kept()
    assert running.stop() == 0
    assert "Traceback (most" not in running.output


def events_of(response: httpx.Response) -> list[tuple[str | None, str]]:
    """The (event, data) pairs of a stream."""
    found = []
    for block in response.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        found.append((lines.get("event"), lines.get("data", "")))
    return found


# ── the module's shape ───────────────────────────────────────────────────────────────────────────────────────────


def test_each_room_uses_only_rooms_above_it() -> None:
    source = MODULE.read_text()
    heads = [source[: match.start()].count("\n") + 1 for match in re.finditer(r"^# ── ", source, re.M)]
    room = lambda line: sum(head <= line for head in heads)  # noqa: E731
    tree = ast.parse(source)
    defined = {node.name: room(node.lineno) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    def runtime_names(node: ast.AST) -> Iterator[ast.Name]:
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, ast.Name):
                    yield item
                if isinstance(item, ast.AST):
                    yield from runtime_names(item)

    upward = {(name.id, name.lineno) for name in runtime_names(tree) if defined.get(name.id, 0) > room(name.lineno)}
    assert not upward
    assert len(heads) == 18


def test_litellm_and_httpx_are_imported_only_where_they_are_used() -> None:
    code = "import sys, litellm_memory_proxy; print([m for m in ('litellm', 'httpx', 'asyncio') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_the_inline_metadata_is_valid_and_complete() -> None:
    """PEP 723: what `uv run` and run.sh install."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    block = re.search(r"^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", MODULE.read_text(), re.M)
    assert block
    metadata = toml.loads("\n".join(line[2:] for line in block[1].splitlines()))
    names = {re.split(r"[<>=!~\[]", requirement)[0] for requirement in metadata["dependencies"]}
    assert names == {"litellm", "httpx", "pyyaml", *proxy.LITELLM_UNDECLARED}


def script_copy(tmp_path: Path) -> Path:
    """The module in a folder of its own and under another name, which no import statement could name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    return Path(shutil.copy(MODULE, folder / "my proxy-2.py"))


def ps(pid: int, column: str) -> str:
    return subprocess.run(["ps", "-o", f"{column}=", "-ww", "-p", str(pid)], capture_output=True, text=True).stdout


@contextlib.contextmanager
def front_from(script: Path, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A binary front that serves, run by this command from the script's folder's parent; it must end well."""
    config = write_config(script.parent, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9/v1")]})
    arguments = ["--mode", "binary", "--litellm-url", "http://127.0.0.1:9", "--port", "0", "--config", config]
    command = [sys.executable, *options, str(script.relative_to(script.parents[1])), *arguments]
    place = {"cwd": script.parents[1], "env": clean_environment(**environment)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **place) as process:
        try:
            assert process.stdout and process.stdout.readline().startswith("ready: binary ")
            yield process
        finally:
            process.terminate()
        assert process.wait(20) == 0


def test_a_script_starts_over_in_the_same_process_without_its_syntax_tree(tmp_path: Path) -> None:
    with front_from(script_copy(tmp_path), "-X", "dev", "-u", LC_ALL="C.UTF-8", MARK="1") as process:
        said = ps(process.pid, "args")
        assert " -X dev -u -c " in said and " a folder/my proxy-2.py --mode binary --litellm-url" in said
        assert int(ps(process.pid, "rss")) < 40 * 1024
        if sys.platform == "linux":
            given = Path(f"/proc/{process.pid}/environ").read_text().strip("\0").split("\0")
            assert dict(pair.split("=", 1) for pair in given) == clean_environment(LC_ALL="C.UTF-8", MARK="1")


@pytest.mark.parametrize(
    "caller",
    [
        ("-m", "pdb", "-c", "continue", "{}"),
        ("-c", "import runpy, sys; sys.argv[0] = '{}'; print('status', runpy.run_path('{}', run_name='__main__'))"),
    ],
)
def test_a_script_that_is_called_stays_with_its_caller(tmp_path: Path, caller: tuple[str, ...]) -> None:
    script = script_copy(tmp_path)
    command = [sys.executable, *(word.replace("{}", str(script)) for word in caller), "--port", "x"]
    result = subprocess.run(command, input="q\n", capture_output=True, text=True, env=clean_environment())
    assert "--port: 'x' is no port" in result.stderr and not (script.parent / "__pycache__").exists()
    assert "pdb" not in caller or "exited via sys.exit(). Exit status: 2" in result.stdout


@pytest.mark.parametrize(
    ("module", "status"), [("sitecustomize", -signal.SIGINT), ("yaml", -signal.SIGINT), ("dotenv", 130)]
)
def test_ctrl_c_during_the_start_ends_it_without_a_traceback(tmp_path: Path, module: str, status: int) -> None:
    text = "import os, signal, sys; '-c' in sys.orig_argv and os.kill(os.getpid(), signal.SIGINT)"  # once started over
    (tmp_path / f"{module}.py").write_text(text)
    config = write_config(tmp_path, {"model_list": []})
    command = [sys.executable, str(MODULE), "--config", config]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(PYTHONPATH=str(tmp_path)))
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "")


def test_a_sighup_during_the_start_ends_nothing_and_has_the_config_read_again(tmp_path: Path) -> None:
    script = script_copy(tmp_path)
    text = "import os, signal, sys; '-c' in sys.orig_argv and os.kill(os.getpid(), signal.SIGHUP)"  # once started over
    (tmp_path / "sitecustomize.py").write_text(text)
    with front_from(script, PYTHONPATH=str(tmp_path)):
        wait_until(lambda: proxy.published_status(str(script.parent / "config.yaml"))["loads"] == 2)


@pytest.mark.parametrize("command", ["check", "load", "parity"])
def test_a_sighup_ends_a_command_that_reads_no_config_again(tmp_path: Path, command: str) -> None:
    (tmp_path / "dotenv.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGHUP)")
    config = write_config(tmp_path, {"model_list": []})
    line = [sys.executable, str(MODULE), command, "--config", config]
    result = subprocess.run(line, capture_output=True, text=True, env=clean_environment(PYTHONPATH=str(tmp_path)))
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGHUP, "", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--port", "x"), "usage: litellm_memory_proxy.py [-h]"), (("--config", "none.yaml"), "error: none.yaml: ")],
)
def test_a_start_that_fails_says_so_once(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    command = [sys.executable, str(script_copy(tmp_path)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("error: ")) == (2, "", 1)
    assert result.stderr.startswith(said)


@pytest.mark.parametrize(
    ("option", "kind"), [("--port", "port (0 to 65535)"), ("--max-connections", "whole number from 1")]
)
@pytest.mark.parametrize("text", ["-1", "x", "1.5", "9" * 5000])
def test_an_option_that_is_no_number_says_what_it_wants(
    capsys: pytest.CaptureFixture[str], option: str, kind: str, text: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        proxy.main(["check", f"{option}={text}"])
    assert f"argument {option}: {text!r} is no {kind}\n" in capsys.readouterr().err


def test_an_empty_path_of_the_config_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        proxy.main(["check", "--config", ""])
    assert capsys.readouterr().err.endswith("error: argument --config: the path is empty\n")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PROXY_PORT", "x", "PROXY_PORT: 'x' is no port (0 to 65535)"),
        ("USE_SDK_PROXY", "x", "USE_SDK_PROXY / use_sdk_proxy must be true or false, not 'x'"),
        ("LOG_LEVEL", "x", "LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not 'X'"),
    ],
)
def test_a_variable_with_a_wrong_value_is_named(tmp_path: Path, name: str, value: str, said: str) -> None:
    config = write_config(tmp_path, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9/v1")]})
    environment = clean_environment(**{name: value})
    command = [sys.executable, str(MODULE), "--mode", "binary", "--config", config]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {said}\n")


def test_a_pipe_that_is_full_before_the_start_does_not_keep_the_proxy_from_ending(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9/v1")]})
    port = str(proxy.free_port(0))
    arguments = ["--mode", "binary", "--litellm-url", "http://127.0.0.1:9", "--port", port, "--config", config]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    process = subprocess.Popen([sys.executable, str(MODULE), *arguments], stdout=writer, env=clean_environment())

    def serves() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return bool(httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).content)
        return False

    try:
        wait_until(serves)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_litellm_exception_keeps_its_status() -> None:
    import litellm

    differs = {"Timeout": 504, "APIConnectionError": 502}  # on purpose: see LITELLM_STATUS
    seen = set()
    for name, kind in vars(litellm.exceptions).items():
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == "litellm.exceptions":
            status = proxy.class_status(kind.__new__(kind), proxy.LITELLM_STATUS)
            with contextlib.suppress(TypeError):
                made = kind(message="m", model="m", llm_provider="p")
                assert status == differs.get(name, made.status_code), name
                seen.add(name)
    assert seen >= {"AuthenticationError", "RateLimitError", "BadRequestError", "ContextWindowExceededError", "Timeout"}


def test_nothing_is_asked_of_litellms_router_that_is_to_be_dropped() -> None:
    import litellm

    called = {"model": "openai/gpt-one", "api_key": "k"}
    one = {"model_name": "one", "litellm_params": called, "model_info": {"id": "1"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's on LiteLLM's types
        warnings.simplefilter("error", DeprecationWarning)
        view = proxy.view_of(litellm.Router([one]))
        assert list(view.names()) == ["one"]
        assert view.deployment("1").litellm_params.model == called["model"]
        assert view.deployment("2") is None
        assert asyncio.run(view.select("one", {}))["litellm_params"]["model"] == called["model"]
        view.retire()


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/chat/completions", "openai"),
        ("/v1/messagesx", "openai"),
        ("/openai/v1/responses", "responses"),
        ("/nowhere", "openai"),
    ],
)
def test_errors_have_the_dialect_of_the_path(path: str, dialect: str) -> None:
    assert proxy.dialect_of(path) == dialect
    body = proxy.ProxyError(429, "slow down").body(dialect)
    assert body["error"]["type"] == "rate_limit_error" and body["error"]["message"] == "slow down"
    assert proxy.ProxyError(415, "m").body(dialect)["error"]["type"] == "invalid_request_error"
    assert (body.get("type") == "error") == (dialect == "anthropic")


def test_a_broken_connection_is_found_in_the_chain_of_causes() -> None:
    try:
        try:
            raise httpx.ConnectTimeout("slow")
        except httpx.ConnectTimeout as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        assert proxy.connection_status(error) == 504
    assert proxy.connection_status(ConnectionRefusedError()) == 502
    assert proxy.connection_status(ValueError()) is None


def test_a_message_is_plain_without_its_traceback_and_in_no_time_where_it_has_many_blank_lines() -> None:
    assert proxy.plain_text("\nno such model\n\nTraceback (most recent call last)\n  File ...") == "no such model"
    began = time.monotonic()
    assert proxy.plain_text("a" + "\n" * 500_000 + "b").endswith("\nb")
    assert time.monotonic() - began < 20  # it was half an hour: each line break began a search to the end


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def write_config(folder: Path, document: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def test_environment_references_are_resolved_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEP_KEY", "deep-secret-value")
    monkeypatch.delenv("FROM_CONFIG", raising=False)
    deep = {"x-api-key": "os.environ/FROM_CONFIG"}
    document = {
        "environment_variables": {"FROM_CONFIG": "os.environ/DEEP_KEY"},
        "model_list": [model("a", "openai/a", "http://h", "os.environ/DEEP_KEY", extra_headers=deep)],
    }
    config = proxy.load_config(write_config(tmp_path, document))
    params = config.document["model_list"][0]["litellm_params"]
    assert params["api_key"] == params["extra_headers"]["x-api-key"] == "deep-secret-value"
    assert "deep-secret-value" in config.secrets
    assert config.environment["FROM_CONFIG"] == "deep-secret-value" and "FROM_CONFIG" not in os.environ


def test_every_problem_is_reported_at_once_with_its_key_path(tmp_path: Path) -> None:
    document = {
        "model_list": [{"model_name": ""}, {"model_name": "a", "litellm_params": {"model": 7}}, "x"],
        "user_id_mappings": {
            "header_patterns": [
                {"header": "user-agent", "pattern": "(", "user_id": "a"},
                {"header": "user-agent", "pattern": "a", "user_id": "not an id"},
                {"header": "user-agent", "pattern": "a", "user_id": r"\g<nope>"},
                {"header": "user agent", "pattern": "a", "user_id": "a", "colour": "red"},
                "x",
            ],
            "default_user_id": "",
            "inject_header": "bad header",
            "injekt": 1,
        },
        "litellm_settings": [],
        "router_settings": {"num_retries": "many", "timeout": float("nan")},
        "general_settings": {"experimental": {"use_sdk_proxy": "maybe", "sdk_proxy_port": 70000}},
        "environment_variables": {"a=b": "c"},
    }
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.load_config(write_config(tmp_path, document))
    found = {problem.where for problem in caught.value.problems}
    patterns = "user_id_mappings.header_patterns"
    assert found >= {
        "model_list[0].model_name",
        "model_list[1].litellm_params.model",
        "model_list[2]",
        f"{patterns}[0].pattern",
        f"{patterns}[1].user_id",
        f"{patterns}[2].user_id",
        f"{patterns}[3].header",
        f"{patterns}[3].colour",
        f"{patterns}[4]",
        "user_id_mappings.default_user_id",
        "user_id_mappings.inject_header",
        "user_id_mappings.injekt",
        "litellm_settings",
        "router_settings.num_retries",
        "router_settings.timeout",
        "general_settings.experimental.use_sdk_proxy",
        "general_settings.experimental.sdk_proxy_port",
        "environment_variables.a=b",
    }


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_setting_that_is_a_number_is_neither_true_nor_false(tmp_path: Path, value: str) -> None:
    text = """
litellm_settings: {request_timeout: X, num_retries: X}
router_settings: {timeout: X, stream_timeout: X, num_retries: X}
general_settings:
  experimental:
    use_sdk_proxy: X
    circuit_breaker: {failure_threshold: X, reset_seconds: X}
    sdk_proxy_port: X
    binary_proxy_port: X
""".replace("X", value)
    problems = proxy.read_config(write_config(tmp_path, text)).problems
    said = {p.where.rpartition(".")[2] for p in problems if p.message.endswith(f", not {value.title()}")}
    timeouts = {"request_timeout", "timeout", "stream_timeout", "reset_seconds"}
    assert said == {"num_retries", "failure_threshold", "sdk_proxy_port", "binary_proxy_port", *timeouts}


@pytest.mark.parametrize("key", ["timeout", "stream_timeout"])
@pytest.mark.parametrize("value", ["10s", "{a: 1}", "[1]", "-1", ".inf", ".nan", "9" * 400, "os.environ/MINUTE"])
def test_a_models_time_limit_that_litellm_cannot_use_is_an_error(tmp_path: Path, key: str, value: str) -> None:
    text = f"model_list: [{{model_name: a, litellm_params: {{model: openai/a, {key}: {value}}}}}]"
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.load_config(write_config(tmp_path, text), {"MINUTE": "1m"})
    (problem,) = caught.value.problems
    assert problem.where == f"model_list[0].litellm_params.{key}"
    assert problem.message.startswith("must be a number of seconds, not ")


@pytest.mark.parametrize("value", ["10", "0.5", "'10'", "0", "null", "''", "os.environ/MINUTE"])
def test_a_models_time_limit_may_be_a_text_as_litellm_takes_it(tmp_path: Path, value: str) -> None:
    text = f"model_list: [{{model_name: a, litellm_params: {{model: openai/a, timeout: {value}}}}}]"
    assert proxy.load_config(write_config(tmp_path, text), {"MINUTE": "60"}).model_names == ("a",)


@pytest.mark.parametrize("given", ["null", "{}", "{failure_threshold: , reset_seconds: null}"])
def test_settings_of_the_circuit_breaker_that_are_null_have_their_defaults(tmp_path: Path, given: str) -> None:
    text = f"""
model_list: [{{model_name: a, litellm_params: {{model: openai/a}}}}]
general_settings: {{experimental: {{circuit_breaker: {given}}}}}
"""
    assert proxy.load_config(write_config(tmp_path, text)).breaker == (proxy.FAILURE_THRESHOLD, proxy.RESET_SECONDS)


UNUSABLE = ["", "[", "a: b", "- 1", "model_list: []", "model_list: {}", "\x00", "a: &x [*x]", "a: 2001-99-99"]
UNUSABLE += ["include: 5", "include: [config.yaml]", "environment_variables: [a]", "a: " + "1" * 5000]


@pytest.mark.parametrize("text", UNUSABLE)
def test_an_unusable_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    command = [sys.executable, str(MODULE), "--config", write_config(tmp_path, text)]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


def test_a_reference_to_a_variable_without_its_name_is_an_error_with_its_place(tmp_path: Path) -> None:
    text = """
model_list: [{model_name: a, litellm_params: {model: openai/a, api_key: os.environ/, api_base: os.environ/UNSET}}]
general_settings: {master_key: os.environ/}
"""
    code, said = run_check(write_config(tmp_path, text))
    assert code == 1 and "key missing: set UNSET\n" in said
    for line, place in ((2, "model_list[0].litellm_params.api_key"), (3, "general_settings.master_key")):
        rule = "os.environ/ must be followed by the name of a variable"
        assert f"error: config.yaml:{line}: {place}: {rule}\n" in said


def test_the_env_file_beside_the_config_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    for folder in (beside, elsewhere):
        folder.mkdir()
        (folder / ".env").write_text(f"WHERE={folder.name}\n")
    config = write_config(
        beside, "model_list: [{model_name: a, litellm_params: {model: openai/a, api_key: os.environ/WHERE}}]"
    )
    monkeypatch.chdir(elsewhere)
    assert proxy.load_config(config, {}).environment["WHERE"] == "beside"
    (beside / ".env").unlink()
    assert proxy.load_config(config, {}).environment["WHERE"] == "elsewhere"


def test_a_line_of_the_env_file_that_says_nothing_is_a_warning_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text('ONE=1\n\n\nhidden-1 is bad\nTWO="${ONE}2"\nTHREE="hidden-3\nFOUR=4')
    config = write_config(tmp_path, {"model_list": [model("a", "openai/a", "http://h")]})
    code, said = run_check(config)
    assert code == 0 and "hidden" not in said
    warned = [line for line in said.splitlines() if ".env:" in line]
    assert warned == [f"warning: {tmp_path}/.env:{line}: is no NAME=VALUE, and is ignored" for line in (4, 6)]
    environment = proxy.load_config(config, {}).environment
    assert (environment["TWO"], environment["FOUR"], len(environment)) == ("12", "4", 3)


def test_a_folder_that_is_named_like_the_env_file_is_none(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    config = write_config(tmp_path, {"model_list": [model("a", "openai/a", "http://h")]})
    assert proxy.load_config(config, {}).environment == {}


# What the models have, `router_settings` and `litellm_settings` → how long LiteLLM's server may be silent, in seconds.
PATIENCE: list[tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], float]] = [
    ([{}], {}, {}, 3 * 600),
    ([{}], {"timeout": 10}, {"num_retries": 0}, 10),
    ([{}], {"timeout": 10, "stream_timeout": 20, "num_retries": 1}, {"num_retries": 5}, 2 * 20),
    ([{}], {"num_retries": None}, {"request_timeout": 10, "num_retries": 5}, 6 * 10),
    ([{}, {"timeout": 3600}], {"num_retries": 0}, {}, 3600),
    ([{"stream_timeout": 700, "num_retries": 4}, {"timeout": "os.environ/UNSET"}], {}, {}, 5 * 700),
    ([{"timeout": "3600"}], {"num_retries": 0}, {}, 3600),
]


@pytest.mark.parametrize(("models", "router", "general", "seconds"), PATIENCE)
def test_litellms_server_may_be_silent_as_long_as_the_most_patient_model(
    tmp_path: Path, models: list[dict[str, Any]], router: dict[str, Any], general: dict[str, Any], seconds: float
) -> None:
    listed = [model(f"m{number}", "openai/x", "http://h", **params) for number, params in enumerate(models)]
    document = {"model_list": listed, "router_settings": router, "litellm_settings": general}
    assert proxy.load_config(write_config(tmp_path, document), {}).silent_seconds == seconds


def test_a_working_directory_that_was_removed_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, config = tmp_path / "gone", write_config(tmp_path, {"model_list": [model("a", "openai/a", "http://h")]})
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert proxy.load_config(config, {}).model_names == ("a",)


def test_a_pipe_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(proxy.ConfigError, match="is no regular file"):
        proxy.load_config(str(tmp_path / "config.yaml"), {})


def test_included_files_are_merged(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"model_list": [model("b", "openai/b", "http://h")]}))
    document = {"include": ["more.yaml"], "model_list": [model("a", "openai/a", "http://h")]}
    assert proxy.load_config(write_config(tmp_path, document)).model_names == ("a", "b")


def test_an_included_file_that_cannot_be_read_is_named_with_the_line_that_includes_it(tmp_path: Path) -> None:
    text = """
model_list: [{model_name: a, litellm_params: {model: openai/a}}]
include:
  - more.yaml
  - gone.yaml
"""
    (tmp_path / "more.yaml").write_text("include: [broken.yaml]")
    (tmp_path / "broken.yaml").write_text("a: 1\na: [")
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.load_config(write_config(tmp_path, text))
    broken, gone = map(str, caught.value.problems)
    assert broken.startswith(f"{tmp_path}/broken.yaml:2: YAML: ")
    assert broken.endswith(f" (included by {tmp_path}/more.yaml:1)")
    by = f"{tmp_path}/config.yaml:5"
    assert gone == f"{tmp_path}/gone.yaml: No such file or directory (included by {by})"


def test_a_file_that_includes_itself_is_named_with_its_line_and_read_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "more.yaml").write_text("x: 1\ninclude: [../config.yaml]\n")
    config = write_config(tmp_path, "include: [folder/more.yaml]\nmodel_list: []\n")
    files = [
        problem.file for problem in proxy.read_config(config).problems if problem.message.endswith("includes itself")
    ]
    assert files == [f"{tmp_path}/folder/more.yaml"]
    with pytest.raises(proxy.ConfigError, match=r"folder/more\.yaml:2: include: .*config\.yaml includes itself"):
        proxy.load_config(config)


def test_keys_of_its_own_that_the_program_misses_or_does_not_know_are_warnings(tmp_path: Path) -> None:
    text = """\
user_id_mapping: {default_user_id: me}
general_settings:
  experimental:
    use_sdk: true
    circuit_breaker: {treshold: 1}
"""
    experimental = "general_settings.experimental"
    said = {(p.where, p.line, p.message, p.warning) for p in proxy.read_config(write_config(tmp_path, text)).problems}
    known = "use_sdk_proxy, circuit_breaker, sdk_proxy_port, binary_proxy_port"
    assert said >= {
        ("user_id_mapping", 1, "is unknown: user_id_mappings may be meant", True),
        ("user_id_mappings", 1, "is missing: all clients get the memory default-dev", True),
        (f"{experimental}.use_sdk", 4, f"is unknown (known: {known})", True),
        (f"{experimental}.circuit_breaker.treshold", 5, "is unknown (known: failure_threshold, reset_seconds)", True),
    }


def test_a_key_of_its_own_corner_that_stands_beside_it_is_a_warning(tmp_path: Path) -> None:
    text = """\
model_list: [{model_name: a, litellm_params: {model: openai/a}}]
general_settings:
  use_sdk_proxy: false
  circuit_breaker: {reset_seconds: 5}
  experimental: {sdk_proxy_port: 1}
"""
    said = {(p.line, p.where): p.message for p in proxy.load_config(write_config(tmp_path, text)).warnings}
    for place in ((3, "general_settings.use_sdk_proxy"), (4, "general_settings.circuit_breaker")):
        assert said[place] == "is not read here, but in general_settings.experimental"
    assert sum("is not read" in message for message in said.values()) == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("user-id-mappings", "user_id_mappings"),
        ("model_lists", "model_list"),
        ("litelm_settings", "litellm_settings"),
        ("includes", "include"),
        ("environment_variable", "environment_variables"),
        ("router_settings", None),
        *((key, None) for key in ("credential_list", "files_settings", "finetune_settings", "callback_settings")),
        *((key, None) for key in ("guardrails", "mcp_servers", "vector_store_registry", "agent_list", "prompts", "5")),
    ],
)
def test_a_section_that_is_misspelt_is_a_warning_that_names_the_right_one(
    tmp_path: Path, key: str, meant: str | None
) -> None:
    text = f"model_list: [{{model_name: a, litellm_params: {{model: openai/a}}}}]\n{key}: {{}}\n"
    said = [str(p) for p in proxy.load_config(write_config(tmp_path, text)).warnings if "may be meant" in p.message]
    assert said == ([f"{tmp_path}/config.yaml:2: {key}: is unknown: {meant} may be meant"] if meant else [])


BROKEN = """\
include: [more.yaml, gone.yaml]
model_list:
  - model_name: a
    litellm_params: {model: openai/a, api_key: os.environ/UNSET_KEY}
  - model_name: b
    litellm_params:
      api_key: twice-in-here-secret
      api_key: twice-in-here-secret
general_settings:
  master_key: 12345678
user_id_mappings:
  default_user_id: me
  default_user_id: 5
  header_patterns:
    - {header: user-agent, pattern: 7, user_id: a}
  colour: red
"""
INCLUDED = """\
# a comment
model_list:
  - model_name: c
    litellm_params: {model: 5}
"""


def test_every_problem_has_the_file_and_the_line_of_its_key_or_of_what_it_is_missing_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET_KEY", raising=False)
    (tmp_path / "more.yaml").write_text(INCLUDED)
    reading = proxy.read_config(write_config(tmp_path, BROKEN))
    patterns = "user_id_mappings.header_patterns"
    assert {(Path(p.file).name, p.line, p.where, p.warning) for p in reading.problems} == {
        ("gone.yaml", None, "", False),
        ("config.yaml", 4, "model_list[0].litellm_params.api_key", True),
        ("config.yaml", 6, "model_list[1].litellm_params.model", False),
        ("config.yaml", 8, "model_list[1].litellm_params.api_key", True),
        ("more.yaml", 4, "model_list[2].litellm_params.model", False),
        ("config.yaml", 10, "general_settings.master_key", False),
        ("config.yaml", 9, "general_settings.forward_client_headers_to_llm_api", True),
        ("config.yaml", 13, "user_id_mappings.default_user_id", True),
        ("config.yaml", 13, "user_id_mappings.default_user_id", False),
        ("config.yaml", 15, f"{patterns}[0].pattern", False),
        ("config.yaml", 16, "user_id_mappings.colour", False),
    }
    with pytest.raises(
        proxy.ConfigError, match=r"config\.yaml:13: user_id_mappings\.default_user_id: must be"
    ) as caught:
        proxy.load_config(str(tmp_path / "config.yaml"))
    assert not any(problem.warning for problem in caught.value.problems)


def test_what_is_there_twice_is_a_warning(tmp_path: Path) -> None:
    entry, other = model("a", "openai/a", "http://h"), model("a", "openai/a", "http://other")
    pattern = {"header": "user-agent", "pattern": "^a", "user_id": "a"}
    document = {
        "model_list": [entry, other, entry],
        "user_id_mappings": {"header_patterns": [pattern, {**pattern, "header": "originator"}]},
    }
    document["user_id_mappings"]["header_patterns"].append({**pattern, "header": "User-Agent", "user_id": "b"})
    text = yaml.safe_dump(document) + "litellm_settings: {drop_params: true, drop_params: false}\n"
    text += "base: &base {x: 1}\nderived: {<<: *base, <<: *base, x: 2}\n"  # that repeats nothing
    said = {p.where: p.message for p in proxy.load_config(write_config(tmp_path, text)).warnings}
    assert set(said) == {
        "model_list[2]",
        "user_id_mappings.header_patterns[2]",
        "litellm_settings.drop_params",
        "general_settings.forward_client_headers_to_llm_api",
    }
    assert "model_list[0]" in said["model_list[2]"]
    assert "header_patterns[0]" in said["user_id_mappings.header_patterns[2]"]


@pytest.mark.parametrize("cache", [True, False])
def test_a_cache_that_all_memories_share_is_a_warning(tmp_path: Path, cache: bool) -> None:
    document = {"model_list": [model("a", "openai/a", "http://h")], "litellm_settings": {"cache": cache}}
    warned = {problem.where for problem in proxy.load_config(write_config(tmp_path, document)).warnings}
    assert ("litellm_settings.cache" in warned) == cache


HOSTILE: dict[str, Any] = {  # user_id_mappings that are not what they should be → where the errors are
    "[a]": {""},
    "7": {""},
    "{5: a, null: b, true: c, 2001-01-01: d}": {".5", ".None", ".True", ".2001-01-01"},
    "{header_patterns: abc}": {".header_patterns"},
    "{header_patterns: {a: b}}": {".header_patterns"},
    "{header_patterns: [null, [a], {5: x}]}": {".header_patterns[0]", ".header_patterns[1]"}
    | {f".header_patterns[2].{key}" for key in ("5", "header", "pattern", "user_id")},
    f"{{header_patterns: [{{header: a, pattern: 'a{{{'9' * 5000}}}', user_id: a}}]}}": {".header_patterns[0].pattern"},
    "{header_patterns: [{header: a b, pattern: '(', user_id: a b}]}": {
        f".header_patterns[0].{key}" for key in ("header", "pattern", "user_id")
    },
    "{default_user_id: [x], custom_header: 7, inject_header: {a: b}}": {
        ".default_user_id",
        ".custom_header",
        ".inject_header",
    },
    "{inject_header: null, custom_header: null}": {".inject_header"},
    "{inject_header: X-Memory-User-Id}": {".custom_header"},
    "{inject_header: X-Request-Id}": {".inject_header"},
    "{conversation: {from_headers: [session_id], inject_header: x-request-id}}": {".conversation.inject_header"},
}


@pytest.mark.parametrize("section", HOSTILE, ids=range(len(HOSTILE)))
def test_no_kind_of_value_breaks_the_check_of_the_mappings(tmp_path: Path, section: str) -> None:
    text = "model_list: [{model_name: a, litellm_params: {model: openai/a}}]\nuser_id_mappings: " + section
    text += "\ngeneral_settings: {forward_client_headers_to_llm_api: true}\n"
    problems = proxy.read_config(write_config(tmp_path, text)).problems
    assert {problem.where for problem in problems} == {f"user_id_mappings{where}" for where in HOSTILE[section]}
    assert {problem.line for problem in problems} == {2}


TEN_TIMES_TEN = "".join(f"{n}: &{n} [{','.join([f'*{o}'] * 10)}]\n" for o, n in zip("abcdefg", "bcdefgh", strict=True))
UNREADABLE: list[tuple[str, int | None]] = [  # no YAML, and the line that the error names
    ("a: 1\nb: [", 2),
    ("a:\n\t- b", 2),
    ("\ufeffa: 1\na: 2001-99-99", 2),
    ("a: !!timestamp hunter22", 1),
    ("a: 1\r\nb: *hunter22\r\n", 2),
    ("a: 1\npassword: !hunter22 x", 2),
    ('a: 1\npassword: "hunter22', 2),
    ("a: 1\n\nb: \x00", 3),
    ("a: 1\nb: 0x" + "f" * 5000, 2),
    ('a: "\\ud800"', 1),
    ("? [a]\n: b", 1),
    ("---\na: 1\n---\nb: 2", 3),
    ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + TEN_TIMES_TEN, None),
    ("a: " + "[" * 5000, None),
]


@pytest.mark.parametrize(("text", "line"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_file_that_is_no_yaml_is_one_error_with_its_line_and_without_its_text(
    tmp_path: Path, text: str, line: int | None
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.load_config(str(path))
    (problem,) = caught.value.problems
    assert problem.where == "YAML" and problem.line == line, problem
    assert "hunter22" not in str(problem)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a:\n\t- b", "with spaces"),
        ('a: "^b\\d"', "single quotes as it is"),
        ("a: *", "in quotes"),
        ("a: *-b", "in quotes"),
        ("a: %b", "in quotes"),
        ("a: !b", "in quotes"),
        ("a: b: c", "in quotes"),
        ("a: [b] c", "in quotes"),
        ("a:\n  b: 1\n c: 2", "indented like its neighbours"),
        ('a: 1\nb: "c\n', "from line 2"),
    ],
)
def test_what_yaml_stumbles_over_comes_with_what_to_do(tmp_path: Path, text: str, hint: str) -> None:
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.load_config(write_config(tmp_path, text))
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("5", "not 5: in quotes it is one"),
        ("yes", "not True: in quotes it is one"),
        ("2026-11-20", "not date: in quotes it is one"),
        ("", "not None"),
        ("{}", "not a mapping"),
    ],
)
def test_what_should_be_a_text_and_is_none_is_shown(tmp_path: Path, value: str, said: str) -> None:
    text = f"""
model_list: [{{model_name: {value}, litellm_params: {{model: openai/a}}}}]
user_id_mappings: {{header_patterns: [{{header: a, pattern: {value}, user_id: a}}]}}
"""
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.load_config(write_config(tmp_path, text))
    assert [problem.message for problem in caught.value.problems] == [f"must be a non-empty string, {said}"] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$THE_KEY", "a variable is written os.environ/NAME"),
        ("${THE_KEY}", "a variable is written os.environ/NAME"),
        ("os.environ.THE_KEY", "a variable is written os.environ/NAME"),
        ("os.environ['THE_KEY']", "a variable is written os.environ/NAME"),
        ("os.env/THE_KEY", "a variable is written os.environ/NAME"),
        ("os.environ/STRAY_KEY", "STRAY_KEY begins or ends with white space"),
        ("os.environ/THE_KEY", ""),
        ("sk-$THE_KEY", ""),
        ("os.example/key", ""),
    ],
)
def test_what_only_looks_like_a_variable_and_what_has_a_stray_line_end_is_a_warning(
    tmp_path: Path, text: str, said: str
) -> None:
    config = write_config(tmp_path, {"model_list": [model("a", "openai/a", "http://h", text)]})
    problems = proxy.read_config(config, {"THE_KEY": "sk-the-key", "STRAY_KEY": "sk-the-key\n"}).problems
    found = [problem for problem in problems if problem.where == "model_list[0].litellm_params.api_key"]
    assert [(p.message.removeprefix("is taken as it stands: "), p.warning) for p in found] == [(said, True)] * bool(
        said
    )


def test_a_file_that_is_not_utf8_or_no_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"a: 1\nb: \xff\n")
    for path, said in ((tmp_path / "config.yaml", "config.yaml:2: YAML: is not UTF-8"), (tmp_path, "Is a directory")):
        with pytest.raises(proxy.ConfigError) as caught:
            proxy.load_config(str(path))
        assert str(caught.value).endswith(said)


def run_check(config: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, str(MODULE), "check", "--config", config]
    environment = clean_environment(**environment)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(config).parent)
    assert not result.stderr
    return result.returncode, result.stdout.replace(config, "config.yaml")


def test_the_check_command_says_what_is_right_and_what_is_wrong(tmp_path: Path) -> None:
    models = [model("a", "openai/a", "http://h", "os.environ/UNSET_KEY"), model("b", "openai/b", "http://h")]
    local = {"model_name": "c", "litellm_params": {"model": "ollama_chat/c", "api_base": "http://h"}}
    patterns = [
        {"header": "user-agent", "pattern": "^claude-cli/", "user_id": "claude-code"},
        {"header": "user-agent", "pattern": "^App/(?P<name>[a-z]+)", "user_id": r"app-\g<name>"},
    ]
    document = {"model_list": [*models, local], "user_id_mappings": {"header_patterns": patterns}}
    good = write_config(tmp_path, document)
    code, said = run_check(good)
    assert code == 0
    rows = [re.sub(" +", " ", line) for line in said.splitlines()]
    line = 1 + Path(good).read_text().split("\n").index("    api_key: os.environ/UNSET_KEY")
    assert (
        f"warning: config.yaml:{line}: model_list[0].litellm_params.api_key: UNSET_KEY is not set in the environment"
        in rows
    )
    assert any(
        row.startswith("warning: config.yaml:1: general_settings.forward_client_headers_to_llm_api") for row in rows
    )
    assert rows[rows.index("models:") :] == [
        "models:",
        " a openai/a key missing: set UNSET_KEY",
        " b openai/b key present",
        " c ollama_chat/c key none named",
        "memory (x-sm-user-id):",
        " x-memory-user-id ID -> ID",
        ' user-agent ^claude-cli/ -> claude-code matches "claude-cli/"',
        r' user-agent ^App/(?P<name>[a-z]+) -> app-\g<name> matches "App/a" and gives app-a',
        " anyone else -> default-dev",
        "config.yaml: ok, 3 models, 2 patterns",
    ]
    Path(good).write_text("model_list: [{}, {}]")
    code, said = run_check(good)
    assert code == 1
    assert (
        "error: config.yaml:1: model_list[0].model_name" in said and "config.yaml:1: model_list[1].model_name" in said
    )
    assert said.endswith("config.yaml: 4 errors, 2 warnings\n")
    assert run_check(str(tmp_path / "gone.yaml"))[0] == 1


def test_the_check_command_shows_no_secret(tmp_path: Path) -> None:
    text = """
model_list:
  - {model_name: sk-in-a-name-0123456, litellm_params: {model: openai/config-secret, api_key: config-secret}}
general_settings: {master_key: 12345678}
router_settings: {timeout: "http://me:pa55@host/", num_retries: environment-secret}
user_id_mappings: {default_user_id: {api_key: config-secret}, config-secret: x}
"""
    code, said = run_check(write_config(tmp_path, text), ANY_TOKEN="environment-secret")
    assert code == 1 and "general_settings.master_key" in said and said.count(proxy.REDACTED) >= 4
    for secret in ("in-a-name", "config-secret", "12345678", "pa55", "environment-secret"):
        assert secret not in said


def test_a_model_lacks_what_its_credential_lacks_and_the_credentials_name_is_no_secret(tmp_path: Path) -> None:
    def credential(name: str, key: str) -> dict[str, Any]:
        return {"credential_name": name, "credential_values": {"api_key": key}, "credential_info": {}}

    def by(name: str, **params: Any) -> dict[str, Any]:
        return {"model_name": name, "litellm_params": {"model": "openai/gpt-4o", **params}}

    document = {
        "model_list": [
            by("whole", litellm_credential_name="openai"),
            by("keyless", litellm_credential_name="unset"),
            by("own", litellm_credential_name="unset", api_key=PROVIDER_KEY),
            by("nowhere", litellm_credential_name="gone"),
        ],
        "credential_list": [credential("openai", PROVIDER_KEY), credential("unset", "os.environ/UNSET_KEY")],
    }
    path = write_config(tmp_path, document)
    code, said = run_check(path)
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert code == 0 and any(
        row.endswith("[3].litellm_params.litellm_credential_name: is not in credential_list") for row in rows
    )
    assert rows[rows.index("models:") + 1 :][:3] == [
        "whole openai/gpt-4o key present",
        "keyless openai/gpt-4o key missing: set UNSET_KEY",
        "own openai/gpt-4o key present",
    ]
    config = proxy.load_config(path, {})
    assert config.missing_keys == {"keyless": "UNSET_KEY"} and config.secrets == {PROVIDER_KEY}


def test_the_start_says_of_keys_that_are_not_set_only_what_its_guide_says(shared_provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", shared_provider.url)
    assert not any("is not set in the environment" in line for line in running.lines)
    running.stop()


def test_a_warning_of_the_start_names_the_variable_that_an_api_key_lacks(shared_provider: Provider) -> None:
    unset = {"credential_name": "c", "credential_values": {"api_key": "os.environ/UNSET_KEY"}}
    config = config_for(shared_provider, credential_list=[unset])
    running = Proxy(config, "--mode", "binary", "--litellm-url", shared_provider.url)
    running.stop()  # by then its log is written
    assert "UNSET_KEY is not set in the environment" in running.output
    assert "credential_list[0].credential_values.api_key" in running.output


def test_secrets_are_what_stands_under_a_keys_name_with_and_without_its_scheme() -> None:
    headers = {"Authorization": "Bearer gateway-token", "Ocp-Apim-Subscription-Key": "subscribed", "x-team": "search"}
    params = {"litellm_credential_name": "openai", "model": "openai/a", "extra_headers": headers}
    assert set(proxy.secrets_in(params)) == {"Bearer gateway-token", "gateway-token", "subscribed"}


# ── memory routing ───────────────────────────────────────────────────────────────────────────────────────────────


def mappings_of(*patterns: tuple[str, str, str], **more: Any) -> proxy.Mappings:
    entries = [{"header": header, "pattern": pattern, "user_id": user_id} for header, pattern, user_id in patterns]
    problems: list[proxy.Problem] = []
    mappings = proxy.check_mappings({"header_patterns": entries, **more}, problems)
    assert not problems
    return mappings


def routed(mappings: proxy.Mappings, *fields: tuple[str, str]) -> str:
    return proxy.route_memory(proxy.Headers(fields), mappings).user_id


def test_routing_takes_the_custom_header_then_the_first_pattern_then_the_default() -> None:
    mappings = mappings_of(("user-agent", "^b", "second"), ("user-agent", "b", "third"), default_user_id="d")
    assert routed(mappings, ("User-Agent", "Bob"), ("X-Memory-User-Id", "me")) == "me"
    assert routed(mappings, ("USER-AGENT", "Bob")) == "second"
    assert routed(mappings, ("user-agent", "a b")) == "third"
    assert routed(mappings, ("user-agent", "none"), ("x-memory-user-id", "")) == "d"
    assert routed(mappings) == "d"


def test_routing_looks_at_every_header_of_a_name() -> None:
    mappings = mappings_of(("x-a", "^yes$", "found"))
    assert routed(mappings, ("x-a", "no"), ("X-A", "yes")) == "found"


def test_routing_uses_groups_and_skips_what_gives_an_invalid_id() -> None:
    mappings = mappings_of(("x-project", r"^(?P<name>.*)$", r"app-\g<name>"), ("x-project", "a", "second"))
    assert routed(mappings, ("x-project", "web")) == "app-web"
    route = proxy.route_memory(proxy.Headers([("x-project", "a b")]), mappings)
    assert route.user_id == "second" and route.invalid[0][1] == "app-a b"


@pytest.mark.parametrize("value", ["a b", "a/b", "ü", "a" * 129, "a\tb", "a,b"])
def test_routing_refuses_a_custom_header_that_is_no_memory_id(value: str) -> None:
    with pytest.raises(proxy.ProxyError) as caught:
        routed(proxy.Mappings(), ("x-memory-user-id", value))
    assert caught.value.status == 400


def test_routing_refuses_a_custom_header_given_twice_and_takes_null_for_off() -> None:
    twice = (("x-memory-user-id", "a"), ("X-Memory-User-Id", "a"))
    with pytest.raises(proxy.ProxyError):
        routed(proxy.Mappings(), *twice)
    assert routed(mappings_of(custom_header=None), *twice) == "default-dev"
    assert routed(proxy.Mappings(), ("x-memory-user-id", "A.b_c:d@e-9")) == "A.b_c:d@e-9"


REAL_CLIENTS = [  # what the clients send, as recorded on the wire
    ("OpenAIClientImpl/Java unknown", "pycharm-ai"),
    ("OpenAIClientAsyncImpl/Java unknown", "pycharm-ai"),
    ("claude-cli/2.1.197 (external, sdk-cli)", "claude-code"),
    ("claude-cli/2.1.197 (external, cli)", "claude-code"),
    ("GitHubCopilotChat/0.30.1", "vscode"),
    ("codex_exec/0.169.0 (Debian 12.0.0; x86_64) dumb (codex_exec; 0.169.0)", "codex"),
    ("codex_cli_rs/0.169.0 (Mac OS 15.0; arm64)", "codex"),
    ("opencode/1.18.33 ai-sdk/provider-utils/4.0.23 runtime/bun/1.3.14", "opencode"),
    ("QwenCode/0.15.10 (linux; x64)", "qwen-code"),
    ("OpenAI/Python 3.54.0", "sdk-OpenAI-Python"),
    ("AsyncOpenAI/Python 1.109.1", "sdk-OpenAI-Python"),
    ("AzureOpenAI/Python 3.57.0", "sdk-OpenAI-Python"),
    ("AsyncAzureOpenAI/Python 3.57.0", "sdk-OpenAI-Python"),
    ("Anthropic/Python 2.12.0", "sdk-Anthropic-Python"),
    ("AsyncAnthropic/Python 0.75.0", "sdk-Anthropic-Python"),
    ("OpenAI/JS 6.49.0", "sdk-OpenAI-JS"),
    ("Anthropic/JS 1.12.0", "sdk-Anthropic-JS"),
    ("AzureOpenAI/JS 7.59.0", "sdk-OpenAI-JS"),
    ("Agents/Python 0.24.0", "openai-agents"),
    ("Agents/JavaScript 0.20.0", "openai-agents"),
    ("pydantic-ai/2.68.0", "pydantic-ai"),
    ("ai/6.0.326 ai-sdk/provider-utils/4.0.64 runtime/node.js/v20.20.2", "ai-sdk"),
    ("ai-sdk/anthropic/3.0.139 ai-sdk/provider-utils/4.0.64 runtime/node.js/v20.20.2", "ai-sdk"),
    ("curl/8.5.0", "default-dev"),
    ("Bun/1.4.0", "default-dev"),
]


@pytest.mark.parametrize(("agent", "user_id"), REAL_CLIENTS)
def test_the_shipped_patterns_recognise_real_clients(agent: str, user_id: str) -> None:
    mappings = proxy.load_config(str(HERE / "config.yaml")).mappings
    assert routed(mappings, ("User-Agent", agent)) == user_id


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        "^ab?$",
        r"\Bfoo",
        "^.{5,}$",
        r"(?P<x>a|b)+\d{2,}",
        "[^a-z]",
        r"\s",
        "^$",
        ".*",
        "ü",
        "(?=claude).*",
        "^(?!bot)x",
    ],
)
def test_an_example_is_a_header_value_that_its_pattern_matches(pattern: str) -> None:
    (checked,) = mappings_of(("user-agent", pattern, "m")).patterns
    example = proxy.example_of(checked)
    assert example and checked.regex.search(example[0]) and example[1] == "m"
    assert example[0] or pattern == "^$"  # an empty value would tell nobody anything
    assert proxy.parse_fields(f"\r\nuser-agent: {example[0]}").values("user-agent") == [example[0]]


def test_an_example_shows_the_id_that_its_groups_give_and_is_left_out_where_none_is_known() -> None:
    grouped, backwards = mappings_of(("x-a", r"^p/(\w+)$", r"app-\1"), ("x-a", r"(a)\1", "m")).patterns
    assert proxy.example_of(grouped) == ("p/a", "app-a")
    assert proxy.example_of(backwards) is None


NEVER = ["a^", "$x", "(?!)", r"\x00", r"[\x00-\x08]", "^ a", "a $", "日本"]
SOMETIMES = ["a|$x", r"(a|)(b|)^c", r"\Bfoo", r"(a)\1", r"a\tb", "^(?!.*bot)claude", r"[-a-y,z]\bfoo", "(x+x+)+y"]


@pytest.mark.parametrize("pattern", NEVER + SOMETIMES)
def test_a_pattern_that_can_never_match_is_a_warning(pattern: str) -> None:
    said = [str(problem) for problem in proxy.pattern_warnings(mappings_of(("user-agent", pattern, "m")))]
    assert len(said) == (pattern in NEVER), said


@pytest.mark.parametrize(
    ("first", "second", "hidden"),
    [
        ("^claude", "^claude-cli/", True),
        ("^CODEX_", "^codex_(cli|exec)/", True),
        (".*", "x", True),
        ("^claude-cli/", "claude-cli/", False),
        ("^codex_cli/", "^codex_(cli|exec)/", False),
        ("[0-5]x", "[0-9]x", False),
        ("^claude-cli/(?!2)", "^claude-cli/", False),
        ("^claude-cli/[^0-9]*$", "^claude-cli/", False),
        ("^[a-z]", "[a-z]", False),
    ],
)
def test_a_pattern_behind_one_that_takes_all_of_it_is_a_warning(first: str, second: str, hidden: bool) -> None:
    mappings = mappings_of(("User-Agent", first, "a"), ("user-agent", second, "b"), ("x-other", second, "c"))
    problems = list(proxy.pattern_warnings(mappings))
    assert [problem.where for problem in problems] == ["user_id_mappings.header_patterns[1].pattern"] * hidden
    assert all("header_patterns[0] takes all of it" in problem.message for problem in problems)


def test_a_pattern_is_not_hidden_by_one_whose_ids_are_invalid_and_is_of_no_use_with_such_ids() -> None:
    assert not list(proxy.pattern_warnings(mappings_of(("x-a", "^(.*)$", r"app-\1"), ("x-a", "a", "b"))))
    useless = mappings_of(("x-a", "^(.*)$", r"app/\1"), ("x-memory-user-id", "a", "b"))
    keys = [problem.where.rpartition(".")[2] for problem in proxy.pattern_warnings(useless)]
    assert keys == ["user_id", "header"]


def test_the_shipped_config_has_no_warning_but_for_its_keys() -> None:
    reading = proxy.read_config(str(HERE / "config.yaml"))
    assert not list(proxy.pattern_warnings(reading.config.mappings)) and not reading.config.warnings
    assert all(proxy.example_of(pattern) for pattern in reading.config.mappings.patterns)


# ── logs and metrics ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "the key deep-secret-value is wrong",
        "Authorization: Bearer abcdefgh12345",
        "bearer  abcdefgh12345",
        "Incorrect API key: sk-abcdefgh12345",
        '{"x-api-key": "abcdefgh12345"}',
        "x-supermemory-api-key=abcdefgh12345",
        "api_key='abcdefgh12345'",
        "http://me:abcdefgh12345@host:8080/v1",
        "http://me:pass,abcdefgh12345@host:8080/v1",
    ],
)
def test_secrets_are_redacted_by_value_and_by_shape(text: str) -> None:
    redacted = proxy.Redactor(["deep-secret-value"])(text)
    assert "abcdefgh12345" not in redacted and "deep-secret-value" not in redacted and proxy.REDACTED in redacted


SHORTENED = ["deep-secret-value", "sk-abcdefgh12345", "Bearer abcdefgh12345", "http://me:abc,defgh@host", "x" * 3000]


@pytest.mark.parametrize("rest", [" and so on", "." * 100_000], ids=len)
@pytest.mark.parametrize("secret", SHORTENED)
def test_no_part_of_a_secret_is_shown_where_a_text_is_cut(secret: str, rest: str) -> None:
    redact = proxy.Redactor(["deep-secret-value", "x" * 3000])
    for shown in range(0, len(secret) + 1, len(secret) // 16):
        cut = redact.cut("." * (5000 - shown) + secret + rest, 5000)
        assert not re.search("dee|abc|x", cut), (shown, cut)
        assert 1900 < len(cut) <= 5000 and cut.startswith("." * 1900)
    for cut_through in range(7000, 14_000, 53):  # wherever the search ends, however much shorter the text became
        cut = redact.cut(f"{'Bearer ' + 'a' * 900:.<1000}" * 2 + "." * (cut_through - 2000) + secret + rest, 5000)
        assert not re.search("dee|abc|x", cut), (cut_through, cut)
    assert redact.cut("." * 10_000 + rest, 5000) == "." * 5000


def test_errors_names_and_what_libraries_log_are_cut_before_a_secret() -> None:
    log = proxy.Log(io.StringIO(), as_json=True, redact=proxy.Redactor(["-----KEY\ndeep-secret-value"]))
    logger, metrics = logging.Logger("library"), proxy.Metrics(log)
    logger.addHandler(proxy.LoggingHandler(log))
    behind = lambda most: "." * (most - 12) + "-----KEY\ndeep-secret-value" + "." * most  # noqa: E731
    error = proxy.ProxyError(500, behind(proxy.MAX_MESSAGE), kind="." * 1_000_000).redact(log.redact)
    logger.warning("%s", behind(proxy.MAX_MESSAGE))
    proxy.defect(ValueError(behind(proxy.MAX_LOGGED)), "id", log)
    metrics.begin()
    metrics.end(ended(model=behind(proxy.MAX_MODEL)))
    log.flush()
    for text in (error.message, log._stream.getvalue(), metrics.prometheus()):
        assert "--" not in text and "." * 180 in text
    assert error.kind and len(error.kind) == proxy.MAX_MESSAGE


def test_the_guide_tells_what_to_set_as_a_key(sdk: Proxy) -> None:
    wait_until(lambda: "OPENAI_API_KEY=anything" in sdk.output and "ANTHROPIC_AUTH_TOKEN=anything" in sdk.output)
    named = "OPENAI_BASE_URL=http://127.0.0.1:8764/v1 OPENAI_API_KEY=$LITELLM_MASTER_KEY"
    assert proxy.Redactor()(named) == named


@pytest.mark.parametrize(("names", "tried"), [(["gpt-*", "mine"], "mine"), (["gpt-*"], "gpt-NAME")])
def test_what_the_guide_says_to_try_works(provider: Provider, names: list[str], tried: str) -> None:
    models = [model(name, f"openai/{name}", f"{provider.url}/v1") for name in names]
    keyed = {"model_list": models, "general_settings": {"master_key": "sk-master-of-the-test"}}
    running = Proxy(keyed, "--mode", "binary", "--litellm-url", provider.url)
    wait_until(lambda: "try it: " in running.output)
    (line,) = (line for line in running.output.splitlines() if "try it: " in line)
    environment = clean_environment(LITELLM_MASTER_KEY="sk-master-of-the-test")
    command = ["sh", "-c", json.loads(line)["message"].removeprefix("try it: ")]
    assert "hello" in subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    assert provider.got[-1].body["model"] == tried
    assert provider.got[-1].header("authorization") == "Bearer sk-master-of-the-test"
    assert running.stop() == 0


def test_redaction_takes_no_longer_for_hostile_text() -> None:
    began = time.monotonic()
    proxy.Redactor(["deep-secret-value"])("a-" * 500_000)
    assert time.monotonic() - began < 20  # it was hours: each letter began a search to the end


def test_a_log_line_cannot_be_forged(tmp_path: Path) -> None:
    for as_json in (True, False):
        with (tmp_path / "log").open("w+") as stream:
            log = proxy.Log(stream, as_json=as_json, redact=proxy.Redactor())
            log.event("INFO", "request", "answered", path='/a\r\n{"level": "forged"}\x1b[31m\u2028')
            log.flush()
            stream.seek(0)
            text = stream.read()
        assert text.count("\n") == 1 and "\r" not in text and "\x1b" not in text and "\u2028" not in text


@pytest.mark.parametrize("as_json", [True, False])
def test_a_key_of_several_lines_is_redacted_in_a_line_of_the_log(as_json: bool) -> None:
    log = proxy.Log(io.StringIO(), as_json=as_json, redact=proxy.Redactor(["-----BEGIN\nMIIEvQ\n-----END"]))
    log.event("WARNING", "test", "said", message="no such file: -----BEGIN\nMIIEvQ\n-----END")
    log.flush()
    assert "no such file: [redacted]" in log._stream.getvalue() and "MIIE" not in log._stream.getvalue()


def test_what_takes_long_says_so_until_it_is_over() -> None:
    log = quiet_log()
    said = lambda: re.findall(r'"message": "(.*?)"', log._stream.getvalue())  # noqa: E731
    with log.progress("sdk", "loading LiteLLM"):
        wait_until(lambda: len(said()) == 2)
    time.sleep(proxy.PROGRESS_SECONDS + 0.5)
    assert said() == ["loading LiteLLM (2 s)", "loading LiteLLM (4 s)"]


def test_an_exception_that_nobody_can_catch_is_a_line_in_the_log() -> None:
    code = (
        "import sys, litellm_memory_proxy as proxy\n"
        "log = proxy.Log(sys.stdout, as_json=True, redact=proxy.Redactor(), level=10)\n"
        "proxy.take_in_logging(log)\n"
        "class Torn:\n    def __del__(self): raise ValueError('torn')\n"
        "Torn()\nlog.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert not done.stderr and "ValueError('torn')" in json.loads(done.stdout)["message"]


def test_what_a_library_logs_wrongly_or_at_length_fails_no_call_of_its_own() -> None:
    log = proxy.Log(io.StringIO(), as_json=True, redact=proxy.Redactor())
    logger = logging.Logger("library")
    logger.addHandler(proxy.LoggingHandler(log))
    logger.warning("%d of %d", "some")
    logger.log(logging.WARNING + 5, "a level of its own")
    logger.warning("x" * 1_000_000)
    log.flush()
    lines = [json.loads(line) for line in log._stream.getvalue().splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("WARNING", "%d of %d"),
        ("WARNING", "a level of its own"),
        ("WARNING", "x" * proxy.MAX_MESSAGE),
    ]


def ended(user_id: str = "a", model: str = "gpt", status: int = 200, **more: Any) -> proxy.Ended:
    return proxy.Ended(time.time(), user_id, model, "sdk", status, seconds=0.3, method="POST", **more)


def quiet_log() -> proxy.Log:
    return proxy.Log(io.StringIO(), as_json=True, redact=proxy.Redactor())


def test_metrics_count_by_memory_and_bound_their_labels() -> None:
    metrics = proxy.Metrics(quiet_log())
    for number in range(150):
        metrics.begin()
        metrics.end(ended(f"user-{number}", f"model-{number}"))
    rows = metrics.snapshot()["requests_total"]
    assert len(rows) == 101 and sum(row["value"] for row in rows) == 150
    most = max(rows, key=lambda row: row["value"])
    assert most == {"user_id": "other", "model": "other", "backend": "sdk", "status": "2xx", "value": 50}
    assert metrics.snapshot()["requests_in_flight"] == 0


def test_a_call_that_cannot_be_priced_is_counted_and_so_are_those_beside_it() -> None:
    def price(_usage: Any) -> float:
        raise KeyError("gpt")

    metrics = proxy.Metrics(quiet_log())
    tally = proxy.Tally(price)
    tally.add({"prompt_tokens": 3, "completion_tokens": 2})
    for priced in (None, tally, None):
        metrics.begin()
        metrics.end(ended(), priced)
    figures = metrics.snapshot()
    assert [row["value"] for row in figures["requests_total"]] == [3]
    assert [row["value"] for row in figures["tokens_total"]] == [3, 2] and not figures.get("cost_usd_total")


def test_metrics_are_valid_in_prometheus_format_whatever_their_labels() -> None:
    metrics = proxy.Metrics(quiet_log())
    odd = 'a"b\\c\nd\u00fc{}'
    tally = proxy.Tally(known_cost=0.25)
    tally.add({"prompt_tokens": 3, "completion_tokens": 2})
    for status in (200, 429, 499, 504, 418):
        metrics.begin()
        failed = "\r\nllm_provider-X-Supermemory-Error: down" if status == 418 else ""
        metrics.end(ended(odd, odd, status, ttft=0.02), tally, failed)
    families = {family.name: family for family in text_string_to_metric_families(metrics.prometheus())}
    assert {name.removesuffix("_total") for name in metrics.snapshot()} <= {
        name.removeprefix("memory_proxy_") for name in families
    }
    assert all(
        name.startswith(("memory_proxy_", "process_")) and family.documentation for name, family in families.items()
    )
    samples = [sample for family in families.values() for sample in family.samples]
    values = {
        (sample.name.removeprefix("memory_proxy_"), *sorted(sample.labels.items())): sample.value for sample in samples
    }
    client = (("model", odd), ("user_id", odd))
    assert values[("tokens_total", ("backend", "sdk"), ("direction", "in"), *client)] == 15
    assert values[("cost_usd_total", ("backend", "sdk"), *client)] == 1.25
    assert values["request_duration_seconds_bucket", ("le", "0.25")] == 0
    assert values["request_duration_seconds_bucket", ("le", "+Inf")] == values["request_duration_seconds_count",] == 5
    assert values["recent_duration_seconds", ("percentile", "p95")] == 0.3
    assert [values["errors_total", ("kind", kind)] for kind in ("rate_limit", "client_gone", "timeout")] == [1, 1, 1]
    assert values["memory_degraded",] == values["memory_errors_total",] == 1
    assert values["process_resident_memory_bytes",] > 10_000_000 and values["process_open_fds",] > 2


class Unread(io.StringIO):
    """A stream whose reader does not read until ``read_on`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.read_on = threading.Event()

    def write(self, text: str) -> int:
        self.read_on.wait(10)
        return super().write(text)


def test_a_line_that_nobody_reads_holds_on_to_nothing_large() -> None:
    class Answer:
        """Stands for what the price is asked of."""

        def price(self, _usage: Any) -> float:
            return 0.5

    stream, answer = Unread(), Answer()
    kept = weakref.ref(answer)
    metrics = proxy.Metrics(proxy.Log(stream, as_json=True, redact=proxy.Redactor()))
    tally = proxy.Tally(price=answer.price)
    tally.add(USAGE)
    metrics.begin()
    metrics.end(ended(), tally)
    del answer, tally
    try:
        wait_until(lambda: kept() is None, 3)
    finally:
        stream.read_on.set()
    assert metrics.snapshot()["cost_usd_total"][0]["value"] == 0.5


def test_lines_stand_in_the_order_in_which_their_requests_ended_whoever_counts_them() -> None:
    class Slow(proxy.Log):
        """Each event takes its time, as where the thread has to wait for its turn."""

        def event(self, *arguments: Any, **more: Any) -> None:
            time.sleep(0.05)
            super().event(*arguments, **more)

    stream = io.StringIO()
    log = Slow(stream, as_json=True, redact=proxy.Redactor())
    metrics = proxy.Metrics(log)
    for number in range(10):
        metrics.begin()
        metrics.end(ended(request_id=str(number)))
        time.sleep(0.03)
    log.flush(5)  # as at the end of the program: all are there
    assert [json.loads(line)["request_id"] for line in stream.getvalue().splitlines()] == [str(n) for n in range(10)]


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, (1, 1, 1)), (2, (1, 2, 2)), (3, (2, 3, 3)), (100, (50, 95, 99)), (101, (51, 96, 100))]
)
def test_percentiles_are_values_by_nearest_rank(count: int, ranks: tuple[int, ...]) -> None:
    values = [float(number) for number in range(1, count + 1)]
    assert tuple(proxy.percentile(values, percent) for percent in proxy.PERCENTILES) == ranks
    assert proxy.percentile([], 50) is None


def test_a_log_file_has_json_lines_without_secrets_and_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "proxy.log"
    log = proxy.Log(io.StringIO(), as_json=False, redact=proxy.Redactor(["hunter22"]), file=str(path))
    for _ in range(13):
        log.event("INFO", "test", "big", message="x" * 1_000_000, key="hunter22", absent=None)
    log.flush(60)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["proxy.log", "proxy.log.1"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(lines) == 13 and {line["key"] for line in lines} == {"[redacted]"}
    with pytest.raises(proxy.StartError, match="--log-file"):
        proxy.Log(sys.stderr, as_json=False, redact=proxy.Redactor(), file=str(tmp_path / "none" / "x"))


# ── circuit breaker ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_circuit_breakers_whole_life() -> None:
    now = [0.0]
    changes: list[str] = []
    breaker = proxy.CircuitBreaker(lambda old, new: changes.append(f"{old.name}>{new.name}"), lambda: now[0])
    breaker.configure(3, 30.0)

    def report(*results: bool | None) -> None:
        for worked in results:
            breaker.report(breaker.ticket(), worked)

    report(False, False, True, False, None, False)  # a success begins the row anew, neither does nothing
    assert breaker.state is proxy.State.CLOSED and breaker.failures == 2
    late = breaker.ticket()
    report(False)
    assert breaker.state is proxy.State.OPEN and breaker.ticket() is None
    breaker.report(late, True)  # begun before it opened: says nothing of now
    now[0] = 29.9
    assert breaker.ticket() is None
    now[0] = 30.0
    probe = breaker.ticket()
    assert probe is not None and breaker.ticket() is None, "one probe at a time"
    breaker.report(probe, None)  # it has shown nothing: the next may try at once
    report(False)
    assert breaker.state is proxy.State.OPEN and breaker.ticket() is None
    now[0] = 60.0
    report(True)
    assert breaker.state is proxy.State.CLOSED and (breaker.failures, breaker.trips) == (0, 1)
    report(False, False)
    assert breaker.state is proxy.State.CLOSED
    assert changes == ["CLOSED>OPEN", "OPEN>HALF_OPEN", "HALF_OPEN>OPEN", "OPEN>HALF_OPEN", "HALF_OPEN>CLOSED"]


def test_a_try_out_of_turn_that_works_closes_the_circuit_breaker() -> None:
    breaker = proxy.CircuitBreaker(clock=lambda: 0.0)
    breaker.configure(1, 30.0)
    breaker.report(breaker.ticket(), False)
    assert breaker.ticket() is None
    breaker.report(breaker.ticket(out_of_turn=True), False)
    assert breaker.state is proxy.State.OPEN and breaker.ticket() is None
    breaker.report(breaker.ticket(out_of_turn=True), True)
    assert (breaker.state, breaker.failures, breaker.trips) == (proxy.State.CLOSED, 0, 1)


def test_the_circuit_breaker_lets_one_of_many_threads_probe() -> None:
    breaker = proxy.CircuitBreaker()
    breaker.configure(1, 0.001)
    breaker.report(breaker.ticket(), False)
    time.sleep(0.01)
    with ThreadPoolExecutor(16) as pool:
        tickets = list(pool.map(lambda _: breaker.ticket(), range(200)))
    assert sum(ticket is not None for ticket in tickets) == 1


# ── wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MALFORMED_HEADS = {
    b"\n\nGET / HTTP/1.1\r\nHost: localhost": 400,  # bare line feeds before the request line
    b"\r\rGET / HTTP/1.1\r\nHost: localhost": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX : b": 400,  # a space before the colon
    b"GET / HTTP/1.1\r\nHost: localhost\r\n folded": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x7f": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n: b": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nnocolon": 400,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: b": 400,
    b"GET / HTTP/1.1\r\nX: a": 400,
    b"GET  / HTTP/1.1\r\nHost: localhost": 400,
    b"GET /": 400,
    b"GET / HTTP/1.1 \r\nHost: localhost": 400,
    b"G\xc3T / HTTP/1.1\r\nHost: localhost": 400,
    b"GET a HTTP/1.1\r\nHost: localhost": 400,
    b"PRI * HTTP/2.0": 505,
    b"CONNECT a:443 HTTP/1.1\r\nHost: localhost": 405,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"\r\n".join(b"X: a" for _ in range(201)): 431,
}


@pytest.mark.parametrize(("head", "status"), MALFORMED_HEADS.items())
def test_malformed_heads_are_refused(head: bytes, status: int) -> None:
    with pytest.raises(proxy.ProxyError) as caught:
        proxy.request_head(head)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 1\r\nTransfer-Encoding: chunked",
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: 1, 1",
        "Content-Length: +1",
        "Content-Length: -1",
        "Content-Length: 0x1",
        "Content-Length: \u0661",
        "Content-Length:",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding:",
    ],
)
def test_ambiguous_framing_is_refused(lines: str) -> None:
    with pytest.raises(proxy.ProxyError) as caught:
        proxy.request_head(f"POST / HTTP/1.1\r\nHost: localhost\r\n{lines}".encode())
    assert caught.value.status == 400


@pytest.mark.parametrize("line", ["Content-Length: {}", "content-length:{}", "CONTENT-LENGTH: \t {} \t"])
def test_a_remembered_head_takes_the_length_of_each_request(line: str) -> None:
    def read(length: str) -> tuple[proxy.Head, int]:
        return proxy.request_head(f"POST / HTTP/1.1\r\nHost: a\r\n{line.format(length)}\r\nX-A: 1".encode())

    head, framing = read("12")
    assert framing == 12 and read("05") == (head, 5) and read("0") == (head, 0)
    for length in ("", "-1", "1 2", "1,2", "1" * 16):
        with pytest.raises(proxy.ProxyError):
            read(length)


class Pieces(proxy.Reader):
    """Input that arrives in these pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__()
        self._waiting = list(pieces)

    def receive(self) -> bytes:
        return self._waiting.pop(0) if self._waiting else b""


def reader_of(*pieces: bytes) -> proxy.Reader:
    return Pieces(pieces)


def test_a_reader_takes_heads_and_bodies_in_any_pieces() -> None:
    data = b"\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n5;ext=1\r\nhello\r\n1\r\n!\r\n0\r\nTrailer: x\r\n\r\nGET"
    for size in (1, 2, 3, 7, 1000):
        reader = reader_of(*(data[i : i + size] for i in range(0, len(data), size)))
        assert reader.head() == b"GET / HTTP/1.1\r\nHost: localhost"
        assert b"".join(reader.body(proxy.CHUNKED)) == b"hello!"
        assert reader.some(10)[:1] == b"G"


@pytest.mark.parametrize(
    "data",
    [
        b"5\r\nhel",
        b"x\r\n",
        b"5\r\nhelloX\r\n",
        b"-1\r\n",
        b"5 5\r\nhello\r\n",
        b"5\nhello\r\n",
        b"",
        b"0\r\n",
        b"1" * 20,
        b"0\r\nTrailer: a\nb: c\r\n\r\n",
        b"0\r\nTrailer : x\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 201 + b"\r\n",
    ],
)
def test_a_broken_chunked_body_is_refused(data: bytes) -> None:
    with pytest.raises(proxy.ProxyError):
        list(reader_of(data).body(proxy.CHUNKED))


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_its_size() -> None:
    reader = reader_of(*[proxy.chunk(b"xy") * 1000] * 200, proxy.LAST_CHUNK)
    tracemalloc.start()
    try:
        body = proxy.ClientBody(reader, proxy.CHUNKED, MIB, None).read()
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body) and body == b"xy" * 200_000
    finally:
        tracemalloc.stop()


def test_headers_keep_order_case_and_duplicates() -> None:
    headers = proxy.Headers([("X-B", "1"), ("x-a", "2"), ("X-b", "3"), ("Connection", "x-a"), ("TE", "trailers")])
    assert headers.values("x-b") == ["1", "3"] and headers.get("x-b") == "1, 3"
    assert list(headers.end_to_end()) == [("X-B", "1"), ("X-b", "3")]


# ── asyncio bridge ───────────────────────────────────────────────────────────────────────────────────────────────


class NoPeer:
    """A client that is always there, and has no socket."""

    def fileno(self) -> int:
        return -1

    def state(self) -> str:
        return "quiet"

    def interim(self, status: int, headers: proxy.Headers) -> None:
        raise AssertionError

    def write_now(self, data: bytes) -> bytes | None:
        return data


class SocketPeer(NoPeer):
    def __init__(self, sock: socket.socket) -> None:
        self._peer = proxy.ClientPeer(sock)
        self.fileno, self.state = self._peer.fileno, self._peer.state  # type: ignore[method-assign]


@pytest.fixture
def bridge() -> Iterator[proxy.Bridge]:
    problems: list[str] = []
    running = proxy.Bridge(problems.append)
    yield running
    running.stop()
    assert not problems


def test_the_bridge_holds_back_a_stream_whose_reader_is_slow(bridge: proxy.Bridge) -> None:
    sent = 0

    async def produce(channel: proxy.Channel) -> None:
        nonlocal sent
        for _ in range(1000):
            await channel.put(b"x" * 10_000)
            sent += 10_000

    call = bridge.call(produce, NoPeer())
    wait_until(lambda: sent >= proxy.STREAM_HIGH_BYTES - 10_000)
    time.sleep(0.1)
    assert sent <= proxy.STREAM_HIGH_BYTES + 10_000
    assert sum(len(data) for data in call) == 10_000_000


def test_a_stream_under_way_does_not_wake_its_thread(bridge: proxy.Bridge) -> None:
    written: list[bytes] = []

    class Taker(NoPeer):
        def write_now(self, data: bytes) -> None:
            written.append(data)

    async def produce(channel: proxy.Channel) -> None:
        for _ in range(200):
            await channel.put(b"x")
            await asyncio.sleep(0.01)

    read = list(bridge.call(produce, Taker()))
    assert len(b"".join(read + written)) == 200
    assert len(read) < 20


def test_what_a_full_socket_does_not_take_comes_in_order(bridge: proxy.Bridge) -> None:
    texts = [b"%d " % number * 2000 for number in range(1000)]

    async def produce(channel: proxy.Channel) -> None:
        for text in texts:
            await channel.put(text)
            await asyncio.sleep(0)

    def write() -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for data in bridge.call(produce, peer):
            peer.write(head, data)
            head = b""
        ours.sendall(proxy.LAST_CHUNK)

    ours, theirs = tcp_pair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        peer = proxy.ClientPeer(ours)
        peer.chunked = True
        writer = threading.Thread(target=write)
        writer.start()
        answer = http.client.HTTPResponse(theirs)
        answer.begin()
        received = []
        while data := answer.read(65536):
            received.append(data)
            time.sleep(0.001)
        writer.join()
    assert b"".join(received) == b"".join(texts)


def test_a_stream_with_much_to_say_lets_the_others_have_their_turn(bridge: proxy.Bridge) -> None:
    enough, ended = threading.Event(), False

    class Taker(NoPeer):
        def write_now(self, data: bytes) -> None:
            pass

    async def much(channel: proxy.Channel) -> None:
        nonlocal ended
        await channel.put(b"x")
        await asyncio.sleep(0.1)
        for _ in range(10_000):
            if enough.is_set():
                return
            time.sleep(0.002)
            await channel.put(b"x")
        ended = True

    async def little(channel: proxy.Channel) -> None:
        await channel.put(b"x")

    call = bridge.call(much, Taker())
    reader = threading.Thread(target=lambda: list(call))
    reader.start()
    time.sleep(0.2)
    assert next(bridge.call(little, Taker())) == b"x"
    assert not ended
    enough.set()
    reader.join()


def test_a_call_can_wait_until_what_it_sent_has_gone_out(bridge: proxy.Bridge) -> None:
    waited = threading.Event()

    async def produce(channel: proxy.Channel) -> None:
        await channel.put(b"one")
        await channel.until_left(0)
        waited.set()

    call = bridge.call(produce, NoPeer())
    assert next(call) == b"one"
    assert not waited.wait(0.1), "its thread has it, and has not written it"
    assert list(call) == [] and waited.is_set()


def test_what_a_call_returns_comes_when_it_has_let_go_of_the_client(bridge: proxy.Bridge) -> None:
    async def produce(channel: proxy.Channel) -> str:
        return "whole"

    async def is_watched() -> bool:
        return bridge.loop.remove_reader(ours)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(100):
            call = bridge.call(produce, SocketPeer(ours))
            assert call.first() == "whole"
            assert not bridge.run(is_watched()) and list(call) == []


def test_the_bridge_hands_over_what_was_raised(bridge: proxy.Bridge) -> None:
    async def produce(channel: proxy.Channel) -> None:
        await channel.put(b"one")
        raise KeyError("two")

    call = bridge.call(produce, NoPeer())
    assert call.first() == b"one"
    with pytest.raises(KeyError):
        next(call)


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_the_bridge_cancels_a_call_whose_client_has_gone(bridge: proxy.Bridge, leave: str) -> None:
    cancelled = threading.Event()

    async def produce(channel: proxy.Channel) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    ours, theirs = socket.socketpair() if leave == "close" else tcp_pair()
    with ours:
        call = bridge.call(produce, SocketPeer(ours))
        if leave == "reset":
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        with pytest.raises(proxy.ClientGone):
            call.first()
    assert cancelled.is_set()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


def test_closing_a_call_cancels_it_and_waits_for_its_end(bridge: proxy.Bridge) -> None:
    ended = False

    async def produce(channel: proxy.Channel) -> None:
        nonlocal ended
        try:
            while True:
                await channel.put(b"x" * 1000)
        finally:
            await asyncio.sleep(0.05)
            ended = True

    call = bridge.call(produce, NoPeer())
    next(call)
    call.close()
    assert ended


# ── session and sdk backend ──────────────────────────────────────────────────────────────────────────────────────

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
DIALECTS = [(CHAT, "gpt"), (CHAT, "claude"), (MESSAGES, "claude"), (MESSAGES, "gpt")]


def body_for(path: str, name: str, **more: Any) -> dict[str, Any]:
    if path == RESPONSES:
        return {"model": name, "input": "hello", **more}
    return {**(messages_body(name) if path.endswith("messages") else chat_body(name)), **more}


def text_of(path: str, answer: dict[str, Any]) -> str:
    if path.endswith("messages"):
        return "".join(block.get("text", "") for block in answer["content"])
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_both_dialects_reach_both_providers(sdk: Proxy, provider: Provider, path: str, name: str, prefix: str) -> None:
    response = sdk.post(path.replace("/v1", prefix), body_for(path, name))
    assert response.status_code == 200 and response.headers["content-type"] == "application/json", response.text
    answer = response.json()
    assert text_of(path, answer) == "hello" and answer["model"] == name
    if path == CHAT:
        (choice,) = answer["choices"]
        assert (choice["logprobs"], choice["message"]["refusal"]) == (None, None), "OpenAI's schema demands the nulls"
    usage = answer["usage"]
    assert (usage.get("prompt_tokens", usage.get("input_tokens")), len(provider.got)) == (3, 1)
    assert "_hidden_params" not in answer


@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_both_dialects_stream_from_both_providers(sdk: Proxy, provider: Provider, path: str, name: str) -> None:
    response = sdk.post(path, body_for(path, name, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    events = events_of(response)
    if path.endswith("messages"):
        kinds = [event for event, _ in events if event != "ping"]
        assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
        said = "".join(
            json.loads(data)["delta"].get("text", "") for kind, data in events if kind == "content_block_delta"
        )
        assert json.loads(events[-2][1])["usage"]["output_tokens"] == 2
    else:
        assert events[-1] == (None, "[DONE]")
        chunks = [json.loads(data) for _, data in events[:-1]]
        assert {chunk["model"] for chunk in chunks} == {name}
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert said == "hello"


@pytest.mark.parametrize(("path", "name"), DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_memory_header_reaches_the_provider(
    sdk: Proxy, provider: Provider, path: str, name: str, stream: bool
) -> None:
    for headers, user_id in (
        ({"user-agent": "claude-cli/2.1 (external, cli)"}, "claude-code"),
        ({"x-memory-user-id": "mine", "user-agent": "claude-cli/2.1"}, "mine"),
        ({"user-agent": "claude-cli/2.1", "x-sm-user-id": "somebody-else"}, "claude-code"),
        ({"x-project": "web"}, "app-web"),
        ({"x-project": "a/b"}, "default-dev"),
        ({}, "default-dev"),
    ):
        assert sdk.post(path, body_for(path, name, stream=stream), headers=headers).status_code == 200
        assert provider.last.header("x-sm-user-id") == user_id
        assert provider.last.header("x-memory-user-id") is None


def test_an_unusable_custom_header_is_not_forwarded(sdk: Proxy, provider: Provider) -> None:
    for headers in ([("x-memory-user-id", "a b")], [("x-memory-user-id", "a"), ("X-Memory-User-Id", "b")]):
        response = sdk.client.post("/v1/messages", json=messages_body(), headers=headers)
        assert response.status_code == 400 and response.json()["type"] == "error"
    assert not provider.got


def test_a_pattern_that_gives_an_invalid_id_is_logged_once(sdk: Proxy, provider: Provider) -> None:
    for _ in range(3):
        sdk.chat(headers={"x-project": "x/y"})
    assert sum("no memory id" in line for line in sdk.lines) == 1


def test_what_a_client_sends_reaches_an_openai_provider(sdk: Proxy, provider: Provider) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    history = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    headers = {
        "authorization": "Bearer client-key",
        "x-api-key": "client-key",
        "X-Trace": "t1",
        "x-stainless-lang": "js",
    }
    response = sdk.chat(
        temperature=0.3, max_tokens=50, tools=[tool], messages=history, user="u1", seed=7, headers=headers
    )
    assert response.json()["choices"][0]["message"]["tool_calls"][0]["function"] == TOOL_CALL["function"]
    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    body = provider.last.body
    assert (body["temperature"], body["max_tokens"], body["user"], body["seed"]) == (0.3, 50, "u1", 7)
    assert body["tools"] == [tool] and body["model"] == "gpt-4o-mini"
    assert body["messages"][1]["tool_calls"] == [TOOL_CALL] and body["messages"][2]["content"] == "sunny"
    assert provider.last.header("x-trace") == "t1" and provider.last.header("x-from-config") == "1"
    assert provider.last.header("authorization") == f"Bearer {PROVIDER_KEY}"
    assert "client-key" not in str(provider.last.headers) and provider.last.header("x-stainless-lang") == "python"


def test_what_a_client_sends_reaches_an_anthropic_provider(sdk: Proxy, provider: Provider) -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [THINKING, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    fields = {
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": '{"device_id": "d", "session_id": "s"}'},
        "temperature": 1,
        "max_tokens": 3000,
    }
    beta = "claude-code-20250219,interleaved-thinking-2025-05-14"
    response = sdk.messages(
        messages=history, **fields, headers={"anthropic-beta": beta, "x-claude-code-session-id": "s1"}
    )
    assert response.json()["content"][0] == THINKING
    body = provider.last.body
    assert body["messages"] == history
    assert {name: body[name] for name in fields} == fields
    assert set(beta.split(",")) <= set(str(provider.last.header("anthropic-beta")).split(","))
    assert (
        provider.last.header("x-api-key") == ANTHROPIC_KEY and provider.last.header("x-claude-code-session-id") == "s1"
    )
    assert provider.last.header("authorization") is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_what_the_provider_says_in_headers_comes_back(
    sdk: Proxy, provider: Provider, path: str, name: str, stream: bool
) -> None:
    response = sdk.post(path, body_for(path, name, stream=stream), headers={"x-request-id": "my-id"})
    assert response.headers["x-supermemory-conversation-id"] == "conv-1"
    assert response.headers["x-ratelimit-remaining-requests"] == "99"
    assert response.headers["anthropic-ratelimit-tokens-remaining"] == "77"
    assert response.headers["x-request-id"] == "my-id" == provider.last.header("x-request-id")
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize("mode", ["sdk", "forward"])
@pytest.mark.parametrize(("path", "name"), DIALECTS[:3:2])
def test_each_chunk_leaves_as_soon_as_it_arrives(
    request: pytest.FixtureRequest, provider: Provider, path: str, name: str, mode: str
) -> None:
    """The second and the third word leave the provider only once the client has seen the one before."""
    seen, words = threading.Semaphore(0), []

    def held() -> Iterator[bytes]:
        for part in (openai_stream if name == "gpt" else anthropic_stream)(["one ", "two ", "three "]):
            assert not re.search(b"two|three", part) or seen.acquire(timeout=20)
            yield part

    provider.script = lambda _got: Reply(parts=held(), headers=SSE)  # type: ignore[arg-type]
    body = body_for(path, name, stream=True)
    with request.getfixturevalue(mode).client.stream("POST", path, json=body) as response:
        for text in response.iter_text():
            for word in re.findall("one|two|three", text):
                words.append(word)
                seen.release()
    assert words == ["one", "two", "three"]


@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_an_error_in_mid_stream_becomes_an_error_event(sdk: Proxy, provider: Provider, path: str, name: str) -> None:
    failure = b'data: {"error": {"message": "overloaded", "type": "server_error", "code": 500}}\n\n'

    def script(got: Got) -> Reply:
        parts = list(usual_answer(got).parts or [])[:4]
        return Reply(parts=[*parts[:2], failure] if "chat" in got.path else parts, headers=SSE, cut=True)

    provider.script = script
    response = sdk.post(path, body_for(path, name, stream=True))
    event, data = events_of(response)[-1]
    error = json.loads(data)["error"]
    assert response.status_code == 200 and error["message"]
    assert (event == "error") == path.endswith("messages")


def test_an_answer_without_a_model_gets_the_clients_name_for_it(sdk: Proxy, provider: Provider) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    provider.script = lambda _got: Reply(json.dumps({"choices": [choice]}).encode())
    assert sdk.chat("gpt").json()["model"] == "gpt"


def test_a_thought_in_a_response_says_which_it_is(sdk: Proxy, provider: Provider) -> None:
    """OpenAI's schema demands it: without it Vercel's AI SDK shows its schema's errors for a thought of Claude's."""
    provider.script = tool_stream
    answer = sdk.post(RESPONSES, body_for(RESPONSES, "claude", stream=True))
    events = [json.loads(data) for kind, data in events_of(answer) if kind == "response.reasoning_summary_text.delta"]
    assert events and all(event["summary_index"] == 0 for event in events)


def test_a_thought_in_a_response_is_one_that_openais_clients_can_put_together(sdk: Proxy, provider: Provider) -> None:
    """OpenAI's for JavaScript adds each piece of a thought to a part of its summary, which has begun before."""
    provider.script = tool_stream
    answer = sdk.post(RESPONSES, body_for(RESPONSES, "claude", stream=True))
    events = [json.loads(data) for _, data in events_of(answer)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added, begun, said = [event for event in events if event.get("output_index") == 0][:3]
    assert added["item"]["type"] == "reasoning" and added["item"]["summary"] == []
    place = {"item_id": added["item"]["id"], "output_index": 0, "summary_index": 0}
    part = {"type": "summary_text", "text": ""}
    number = begun.pop("sequence_number")
    assert begun == {"type": "response.reasoning_summary_part.added", **place, "part": part}
    assert said["type"] == "response.reasoning_summary_text.delta" and said["sequence_number"] == number + 1
    thought = events[-1]["response"]["output"][0]
    assert thought["summary"] == [{**part, "text": "hm"}] and "content" not in thought


def test_a_thought_in_a_whole_response_has_a_summary(sdk: Proxy) -> None:
    """OpenAI's schema demands it, and knows no content of a message in a thought."""
    body = {**body_for(RESPONSES, "claude"), "reasoning": {"effort": "low"}}
    thought, answer = sdk.post(RESPONSES, body).json()["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": "hm"}] and "content" not in thought
    assert answer["content"][0]["text"] == "hello"


def test_a_thought_that_a_client_keeps_as_it_ends_comes_back_signed(sdk: Proxy, provider: Provider) -> None:
    """As LangChain keeps it: Claude answers 400 where the thought before a tool's result is missing or not signed."""
    provider.script = tool_stream
    body = {**body_for(RESPONSES, "claude", stream=True), "reasoning": {"effort": "low"}}
    answer = sdk.post(RESPONSES, body)
    items = [json.loads(data)["item"] for kind, data in events_of(answer) if kind == "response.output_item.done"]
    result = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "sunny"}
    provider.script = usual_answer
    sdk.post(RESPONSES, {**body, "input": [{"role": "user", "content": "weather?"}, *items, result]})
    thought, use = provider.got[-1].body["messages"][1]["content"]
    assert thought == {"type": "thinking", "thinking": "hm", "signature": "c2ln"} and use["type"] == "tool_use"


TOO_LONG = {"code": "context_length_exceeded", "message": "too long"}
FAILED = {"id": "resp_1", "object": "response", "created_at": 1, "model": "up", "output": [], "status": "failed"}
FAILED_ENDS = [
    {"type": "response.failed", "sequence_number": 9, "response": {**FAILED, "error": TOO_LONG}},
    {"type": "error", "sequence_number": 9, **TOO_LONG, "param": None},
]


@pytest.mark.parametrize("end", FAILED_ENDS, ids=["failed", "error"])
def test_a_response_that_fails_in_mid_stream_ends_as_openai_ends_it(
    sdk: Proxy, provider: Provider, end: dict[str, Any]
) -> None:
    """Its clients raise the error event; Codex looks for the code of a failed response, and for no error event."""
    provider.script = lambda _got: Reply(parts=[*responses_stream("hello")[:4], sse(end)], headers=SSE)
    answer = sdk.post(RESPONSES, body_for(RESPONSES, "gpt", stream=True))
    *before, (first, error), (second, failure) = ((event, json.loads(data)) for event, data in events_of(answer))
    assert [first, second] == [error["type"], failure["type"]] == ["error", "response.failed"]
    assert [end["sequence_number"] for end in (error, failure)] == [len(before), len(before) + 1]
    assert TOO_LONG.items() <= error.items() and failure["response"]["error"] == TOO_LONG


@pytest.mark.parametrize("end", FAILED_ENDS, ids=["failed", "error"])
def test_a_response_that_fails_at_once_has_the_status_of_its_code(
    sdk: Proxy, provider: Provider, end: dict[str, Any]
) -> None:
    provider.script = lambda _got: Reply(parts=[sse(end)], headers=SSE)
    answer = sdk.post(RESPONSES, body_for(RESPONSES, "gpt", stream=True))
    assert answer.status_code == 400
    assert {**TOO_LONG, "type": "invalid_request_error"}.items() <= answer.json()["error"].items()


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
@pytest.mark.parametrize("first", [60, 200_000], ids=["before the error", "behind it"])
def test_a_response_that_fails_in_pieces_keeps_the_providers_words(
    sdk: Proxy, provider: Provider, path: str, first: int
) -> None:
    """It repeats the instructions and tools of its request: no read brings all of it."""
    response = {**FAILED, "error": TOO_LONG, "instructions": "x" * 300_000}
    event = sse({"type": "response.failed", "sequence_number": 0, "response": response})
    provider.script = lambda _got: Reply(parts=[event[:first], event[first:]], headers=SSE, pause=0.05)
    answer = sdk.post(path, body_for(path, "gpt", stream=True))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == TOO_LONG["message"] and TOO_LONG["code"] in answer.text


STATUSES = [400, 401, 403, 404, 422, 429, 500, 502, 503]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), DIALECTS)
@pytest.mark.parametrize("status", STATUSES)
def test_a_providers_error_keeps_status_message_and_retry_after(
    sdk: Proxy, provider: Provider, path: str, name: str, status: int, stream: bool
) -> None:
    said = {"message": f"said the provider about {PROVIDER_KEY}", "type": "some_error", "code": "some_code"}
    body = json.dumps({"error": said} if name == "gpt" else {"type": "error", "error": said}).encode()
    provider.script = lambda _got: Reply(body, status, {"retry-after": "17", "x-supermemory-error": "none"})
    response = sdk.post(path, body_for(path, name, stream=stream))
    assert response.status_code == status, response.text
    assert response.headers["retry-after"] == "17" and response.headers["x-supermemory-error"] == "none"
    document = response.json()
    assert (document.get("type") == "error") == path.endswith("messages")
    assert document["error"]["message"].startswith("said the provider about")
    assert PROVIDER_KEY not in response.text and len(provider.got) == 1


@pytest.mark.parametrize("body", [b"upstream connect error", b'{"detail": [{"loc": ["body"], "msg": "too hot"}]}'])
@pytest.mark.parametrize(("path", "name"), [*DIALECTS, ("/v1/embeddings", "gpt")])
def test_an_error_body_without_a_message_is_the_message(
    sdk: Proxy, provider: Provider, path: str, name: str, body: bytes
) -> None:
    provider.script = lambda _got: Reply(body, 422, {"content-type": "text/plain"})
    response = sdk.post(path, {**body_for(path, name), "input": "hello"} if "emb" in path else body_for(path, name))
    assert (response.status_code, response.json()["error"]["message"]) == (422, body.decode())


def test_a_long_error_body_is_cut_before_a_key_that_it_quotes(sdk: Proxy, provider: Provider) -> None:
    said = "." * (proxy.MAX_MESSAGE - 5)
    provider.script = lambda _got: Reply(f"{said}{PROVIDER_KEY}{said}".encode(), 422, {"content-type": "text/plain"})
    message = sdk.chat().json()["error"]["message"]
    assert "sk" not in message and message.startswith(said[:-100])


BAD_BODIES = [
    b"{",
    b"",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"{}",
    b'{"model": ""}',
    b'{"model": 7}',
    b'{"model": "gpt"}',
    b'{"model": "gpt", "messages": "x"}',
    b'{"model": "gpt", "messages": ["x"], "max_tokens": 5}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "stream": "yes"}',
    b'{"model": "unknown", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "api_base": "http://evil"}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "extra_headers": {"x-sm-user-id": "evil"}}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "extra_body": {"api_key": "x"}}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "metadata": "x"}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "deployment_id": "x"}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "fallbacks": [{"model": "x", "api_base": "y"}]}',
    b'{"model": "gpt", "messages": [{"role": "user", "content": 7}], "max_tokens": 5}',
    b'{"model": "gpt", "messages": [{"role": "user", "content": [null]}], "max_tokens": 5}',
    b'{"model": "gpt", "messages": [{"role": "user", "content": [["x"]]}], "max_tokens": 5}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "tools": [null]}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "timeout": -1}',
    b'{"model": "gpt", "messages": [], "max_tokens": 5, "request_timeout": "1"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:60]))
def test_bad_bodies_get_a_clear_400_without_a_call(sdk: Proxy, provider: Provider, path: str, body: bytes) -> None:
    response = sdk.client.post(path, content=body)
    assert response.status_code == 400, response.text
    document = response.json()
    assert (document.get("type") == "error") == path.endswith("messages")
    assert document["error"]["type"] == "invalid_request_error" and document["error"]["message"]
    assert "LiteLLM cannot translate" not in response.text and not provider.got


@pytest.mark.parametrize("name", ["gpt", "claude"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_null_is_as_good_as_nothing(sdk: Proxy, provider: Provider, path: str, name: str) -> None:
    for field_name in set(proxy.OPTIONAL_SHAPE) - set(body_for(path, name)):
        answer = sdk.post(path, body_for(path, name, **{field_name: None}))
        assert answer.status_code == 200, (field_name, answer.text)


@pytest.mark.parametrize("stream", [False, True])
def test_no_model_answers_without_the_conversation_so_far(sdk: Proxy, provider: Provider, stream: bool) -> None:
    """LiteLLM leaves out the fields that stand for it; Anthropic's clients send all messages where a thread fails."""
    more = {"conversation": {"id": "conv_1"}, "extra_body": {"moderation": "x"}}
    assert sdk.post(RESPONSES, body_for(RESPONSES, "gpt", stream=stream, **more)).status_code == 200
    assert provider.last.body["conversation"] == {"id": "conv_1"} and provider.last.body["moderation"] == "x"
    provider.got.clear()
    for name in ("claude", "gpt"):
        thread = {"type": "continue", "previous_message_id": "msg_1"}
        answer = sdk.post(MESSAGES, body_for(MESSAGES, name, stream=stream, thread=thread))
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        assert answer.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    assert not provider.got


def test_wrong_methods_and_unknown_paths(sdk: Proxy) -> None:
    for path in ("/v1/chat/completions", "/v1/messages"):
        response = sdk.client.get(path)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert sdk.client.delete("/v1/models").headers["allow"] == "GET, HEAD"
    assert sdk.client.post("/health").status_code == 405
    assert sdk.client.head("/").status_code == sdk.client.get("/").status_code == 200
    for response in (sdk.client.get("/v1/nowhere"), sdk.client.post("/v1/responses/compact", json={})):
        assert response.status_code == 404 and "binary mode" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(("name", "status"), [("refused", 502), ("nowhere", 502), ("slow", 504)])
def test_connections_that_fail_are_502_or_504(
    sdk: Proxy, provider: Provider, name: str, status: int, path: str, stream: bool
) -> None:
    provider.script = lambda _got: Reply(b"{}", hold=3)
    response = sdk.post(path, body_for(path, name, stream=stream))
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert {"refused": "127.0.0.1:", "nowhere": "host.invalid", "slow": "in time"}[name] in message


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(("name", "variable"), [("keyless", "UNSET_KEY"), ("implicit", "GROQ_API_KEY")])
def test_a_model_without_its_key_is_a_401_that_names_the_variable(
    sdk: Proxy, provider: Provider, path: str, name: str, variable: str
) -> None:
    response = sdk.post(path, body_for(path, name))
    assert response.status_code == 401 and variable in response.json()["error"]["message"]
    assert not provider.got
    assert any(name in line and variable in line for line in sdk.lines)
    assert sdk.chat("half").status_code == 200  # another deployment of its name has one


def test_a_cloud_where_nobody_has_logged_in_is_a_missing_key_in_every_dialect(tmp_path: Path) -> None:
    bedrock = {"model": "bedrock/anthropic.claude-3-5-sonnet-20240620-v1:0", "aws_region_name": "us-east-1"}
    config = {"model_list": [{"model_name": "cloud", "litellm_params": bedrock}]}
    running = Proxy(config, HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED="true")
    for answer in (running.chat("cloud"), running.messages("cloud"), running.messages("cloud", stream=True)):
        assert answer.status_code == 401, answer.text
        assert "'cloud' has no credentials: " in answer.text and "nable to locate credentials" in answer.text
    assert running.stop() == 0


def test_several_deployments_wildcards_and_fallbacks(sdk: Proxy, provider: Provider) -> None:
    for _ in range(30):
        assert sdk.chat("twice").status_code == 200
    assert {got.body["model"] for got in provider.got} == {"gpt-one", "gpt-two"}
    assert sdk.chat("anthropic/claude-opus-4-1").json()["model"] == "anthropic/claude-opus-4-1"
    assert provider.last.body["model"] == "claude-opus-4-1"
    assert sdk.chat("custom").status_code == 200 and provider.last.body["model"] == "my-own-name"

    provider.script = lambda got: usual_answer(got) if "claude" in got.body["model"] else Reply(b"{}", 500)
    answer = sdk.chat("shaky")
    assert answer.status_code == 200 and provider.last.body["model"] == "claude-sonnet-4-5"


def test_an_alias_is_listed_and_served_as_its_model(sdk: Proxy, provider: Provider) -> None:
    assert [sdk.client.get(f"/v1/models/{name}").status_code for name in ("smart", "hidden")] == [200, 404]
    assert [sdk.post("/api/show", {"model": name}).status_code for name in ("smart", "hidden")] == [200, 200]
    assert [sdk.chat(name).json()["model"] for name in ("smart", "hidden")] == ["smart", "hidden"]
    assert [got.body["model"] for got in provider.got] == ["gpt-4o-mini", "claude-sonnet-4-5"]
    assert sdk.chat("bare").status_code == 401


@pytest.mark.parametrize("headers", [{}, {"anthropic-version": "2023-06-01"}], ids=["openai", "anthropic"])
def test_a_model_that_a_wildcard_serves_is_found(sdk: Proxy, headers: dict[str, str]) -> None:
    """A client that asks for its model first must not be told that it does not exist."""
    found = sdk.client.get("/v1/models/anthropic/claude-opus-4-1", headers=headers)
    assert (found.status_code, found.json()["id"]) == (200, "anthropic/claude-opus-4-1")
    missing = sdk.client.get("/v1/models/nowhere/claude-opus-4-1", headers=headers)
    assert missing.status_code == 404 and (missing.json().get("type") == "error") == bool(headers)


def test_models_are_listed(sdk: Proxy) -> None:
    document = sdk.client.get("/v1/models").json()
    names = [row["id"] for row in document["data"]]
    assert document["object"] == "list" and {"gpt", "claude", "demo", "keyless"} <= set(names)
    assert any(name.startswith("anthropic/claude") for name in names) and "anthropic/*" not in names
    assert sdk.client.get("/v1/models/gpt").json()["object"] == "model"
    assert sdk.client.get(f"/models/{names[-1].replace('/', '%2F')}").status_code == 200
    assert sdk.client.get("/v1/models/nope").json()["error"]["code"] == "model_not_found"
    assert sdk.client.head("/v1/models").content == b""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_the_demo_model_needs_no_provider(sdk: Proxy, provider: Provider, path: str, stream: bool) -> None:
    response = sdk.post(path, body_for(path, "demo", stream=stream))
    assert response.status_code == 200 and not provider.got
    said = said_in_stream(path, response.text) if stream else said_in([response.json()])
    assert said == ("hi", "", {})


HANG_UPS = [
    (path, name, kind) for path, name in DIALECTS for kind in ("whole", "before the first token", "in mid-stream")
]


@pytest.mark.parametrize(("path", "name", "kind"), HANG_UPS)
def test_a_client_that_leaves_cancels_the_call(sdk: Proxy, provider: Provider, path: str, name: str, kind: str) -> None:
    check_hang_up(sdk, provider, path, body_for(path, name, stream=kind != "whole"), kind)


def check_hang_up(running: Proxy, provider: Provider, path: str, body: dict[str, Any], kind: str) -> None:
    """A client leaves, and the provider sees its connection close within two seconds."""
    if kind == "in mid-stream":
        provider.script = lambda got: Reply(parts=(usual_answer(got).parts or [])[:4] * 50, headers=SSE, pause=0.1)
    else:
        provider.script = lambda _got: Reply(b"{}", hold=30)
    data = json.dumps(body).encode()
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), 10) as sock:
        sock.sendall(head.encode() + data)
        got = provider.wait_for()
        if kind == "in mid-stream":
            assert b" 200 " in sock.recv(100)
        else:
            time.sleep(0.1)
    assert got.gone.wait(2), "the provider was not told that the client left"


def test_clients_that_leave_at_once_are_no_warning(sdk: Proxy, provider: Provider) -> None:
    data = json.dumps({**messages_body(), "stream": True}).encode()
    head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    for number in range(60):
        with socket.create_connection(("127.0.0.1", sdk.port), 10) as sock:
            sock.sendall(head + data)
            time.sleep(number % 6 * 0.001)
    wait_until(lambda: samples_of(sdk)["memory_proxy_requests_in_flight"] == 1)
    time.sleep(0.2)  # for the log
    assert "never awaited" not in sdk.output


def test_a_slow_client_holds_back_the_stream_and_not_the_memory(sdk: Proxy, provider: Provider) -> None:
    check_slow_client(sdk, provider, "/v1/messages", body_for("/v1/messages", "claude", stream=True))


def check_slow_client(running: Proxy, provider: Provider, path: str, body: dict[str, Any]) -> None:
    """The provider has 100 MB to send; a client that does not read keeps it waiting."""
    sent = 0
    part = anthropic_stream(["x" * 100_000])[3]

    def parts() -> Iterator[bytes]:
        nonlocal sent
        yield from anthropic_stream(["hel"])[:4]
        for _ in range(1000):
            yield part
            sent += len(part)

    assert running.post(path, body).status_code == 200  # LiteLLM imports 40 MB for the first one
    provider.script = lambda _got: Reply(parts=parts(), headers=SSE)  # type: ignore[arg-type]
    before = resident_bytes(running)
    with running.client.stream("POST", path, json=body) as response:
        stream = response.iter_raw()  # kept: httpx closes the response with its iterator
        next(stream)
        wait_until(lambda: sent > 0)
        settled = -1
        while settled != sent:
            settled = sent
            time.sleep(0.5)
        assert sent < 30_000_000
        assert resident_bytes(running) - before < 60_000_000
        taken = sum(len(data) for data, _ in zip(stream, range(300), strict=False))  # it goes on when the client does
        assert taken > 5_000_000 and sent > settled


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_a_long_conversation_goes_with_its_answer(
    request: pytest.FixtureRequest, provider: Provider, mode: str
) -> None:
    """It does not wait for the garbage collector, which counts objects and not bytes."""
    running: Proxy = request.getfixturevalue(mode)
    sizes = []
    for _ in range(2):
        for _ in range(20):
            conversation = [{"role": "user", "content": "x" * 3_000_000}]
            assert running.chat(messages=conversation).status_code == 200
            provider.got.clear()
        sizes.append(resident_bytes(running))
    assert sizes[1] - sizes[0] < 15_000_000


def test_a_model_whose_name_is_a_book_is_refused(sdk: Proxy) -> None:
    """LiteLLM would hold up everybody for seconds, and remember it."""
    for name, status in (("anthropic/" + "x" * 2038, 200), ("anthropic/" + "x" * 2039, 400), ("x" * 1_000_000, 400)):
        response = sdk.chat(name)
        assert response.status_code == status
        assert status == 200 or response.json()["error"]["param"] == "model"


CIRCLES = """\
import gc, signal
gc.disable()
signal.signal(signal.SIGUSR1, lambda *_: print("in circles:", gc.collect(), flush=True))
"""
CUT_STREAM = Reply(parts=openai_stream(["hel", "lo"])[:2], headers=SSE, cut=True)
ENDS = [  # of a call: its path and model, and what the provider does
    *((path, name, usual_answer) for path, name in [*DIALECTS, (RESPONSES, "gpt"), (RESPONSES, "claude")]),
    *((path, name, lambda _got: Reply(b'{"error": {"message": "no"}}', 400)) for path, name in DIALECTS),
    (CHAT, "gpt", lambda _got: CUT_STREAM),
    (CHAT, "gpt", lambda _got: Reply(b"<html></html>", 503, {"content-type": "text/html"})),
    (CHAT, "refused", usual_answer),
    (CHAT, "unknown", usual_answer),
]


def test_little_of_a_call_waits_for_the_garbage_collector(provider: Provider, tmp_path: Path) -> None:
    """The collector counts objects; a stream's chunks, and the conversation of a call that failed, are megabytes."""
    (tmp_path / "sitecustomize.py").write_text(CIRCLES)
    refused = model("refused", "openai/gpt-4o-mini", f"http://127.0.0.1:{free_port()}/v1")
    running = Proxy(config_for(provider, refused), PYTHONPATH=str(tmp_path))
    for path, name, script in ENDS:
        provider.script = script
        running.post(path, body_for(path, name, stream=True))  # what comes with the first call is not counted
        objects_in_circles(running)
        statuses = [running.post(path, body_for(path, name, stream=True)).status_code for _ in range(5)]
        assert objects_in_circles(running) < 5 * 50, (path, name, statuses)
    provider.script = lambda _got: Reply(parts=openai_stream(["hel", "lo"]), headers=SSE, pause=5)
    for _ in range(5):
        with running.client.stream("POST", CHAT, json=body_for(CHAT, "gpt", stream=True)) as response:
            next(response.iter_raw())
    assert all(got.gone.wait(10) for got in provider.got[-5:])
    wait_until(lambda: samples_of(running)["memory_proxy_requests_in_flight"] == 1)
    assert objects_in_circles(running) < 5 * 50, "clients that left"
    assert running.stop() == 0


def objects_in_circles(running: Proxy) -> int:
    """How many objects the collector finds that nothing but themselves refers to."""

    def told() -> list[str]:
        return re.findall("in circles: (.*)", running.output)

    before = len(told())
    running.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(told()) > before)
    return int(told()[-1])


def resident_bytes(running: Proxy) -> int:
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize("stream", [False, True])
def test_a_lone_deployment_neither_cools_down_nor_makes_its_client_wait(provider: Provider, stream: bool) -> None:
    nim = model("nim", "nvidia_nim/meta/llama3-8b", f"{provider.url}/v1")
    # No router_settings: LiteLLM's own would retry twice, and cool down after a 401.
    running = Proxy(config_for(provider, nim))
    said = json.dumps({"error": {"message": "no", "type": "t"}}).encode()
    for status in (401, 404, 429, 500, 503):
        provider.got.clear()
        provider.script = lambda _got, status=status: Reply(said, status, {"retry-after": "20"})
        began = time.monotonic()
        calls = [(path, body_for(path, name, stream=stream)) for path, name in DIALECTS]
        calls += [(path, {"model": "gpt", "input": "hello"}) for path in ("/v1/embeddings", "/v1/moderations")]
        calls += [(path, body_for(path, "nim", stream=stream)) for path in (CHAT, MESSAGES)]
        calls += [("/v1/images/generations", {"model": "gpt", "prompt": "a cat"})]
        for path, body in calls:
            response = running.post(path, body)
            assert (response.status_code, response.headers["retry-after"]) == (status, "20")
        assert len(provider.got) == len(calls) and time.monotonic() - began < 10
    assert running.stop() == 0


def test_litellm_counts_calls_only_where_something_depends_on_it(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "sdk", "--log-level", "debug")
    mark, costs = "LiteLLM-Async Success Call", set()

    def check_counts(wanted: bool) -> None:
        before = running.output.count(mark)
        costs.add(log_line(running, running.chat().headers["x-request-id"])["cost_usd"])
        if wanted:
            wait_until(lambda: running.output.count(mark) > before)
        else:
            time.sleep(0.5)  # for what comes after the answer
            assert running.output.count(mark) == before

    def limit(document: dict[str, Any]) -> None:
        document["model_list"][0]["litellm_params"]["rpm"] = 1
        document["router_settings"] = {"optional_pre_call_checks": ["enforce_model_rate_limits"]}

    plain = running.config.read_text()
    check_counts(False)

    twin = model("gpt", "openai/gpt-4o-mini", f"{provider.url}/twin/v1")
    reload(running, lambda document: document["model_list"].append(twin))
    check_counts(True)
    provider.script = lambda got: Reply(b"{}", 401) if "twin" in got.path else usual_answer(got)
    provider.got.clear()
    wait_until(lambda: running.chat().status_code == 200 and any("twin" in got.path for got in provider.got))
    provider.got.clear()
    assert {running.chat().status_code for _ in range(8)} == {200} and len(provider.got) == 8  # the twin cools down

    running.config.write_text(plain)
    reload(running, limit)
    check_counts(True)
    assert running.chat().status_code == 429

    reload(running, plain)
    check_counts(False)
    assert len(costs) == 1 and all(cost > 0 for cost in costs)
    assert running.stop() == 0


@pytest.mark.parametrize("target", ["openai/gpt-4o-mini", "nvidia_nim/meta/llama3-8b"])
def test_retries_are_as_the_config_says(provider: Provider, target: str) -> None:
    failing = iter([True, True, False])
    retried = model("retried", target, f"{provider.url}/v1")
    running = Proxy(config_for(provider, retried, router_settings={"num_retries": 1, "retry_after": 0}))
    provider.script = lambda got: Reply(b"{}", 500) if next(failing) else usual_answer(got)
    assert running.chat("retried").status_code == 500 and len(provider.got) == 2
    assert running.chat("retried").status_code == 200 and len(provider.got) == 3
    assert running.stop() == 0


def test_an_error_before_the_first_real_event_has_its_status(provider: Provider) -> None:
    """LiteLLM makes a message_start of its own before it calls Gemini."""
    running = Proxy(config_for_models(model("gemini", "gemini/gemini-2.5-flash", provider.url)))
    assert running.messages("gemini", stream=True).status_code == 200
    provider.script = lambda _got: Reply(b'{"error": {"code": 429, "message": "slow down"}}', 429, {"retry-after": "3"})
    response = running.messages("gemini", stream=True)
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert running.stop() == 0


def test_a_provider_that_says_no_more_than_that_it_is_alive_keeps_its_client(sdk: Proxy, provider: Provider) -> None:
    """Its answer begins when the client has heard of it, so that a proxy that holds back for ever fails here."""

    def first_bytes(name: str, sign: bytes) -> bytes:
        heard = threading.Event()

        def parts(got: Got) -> Iterator[bytes]:
            yield sign
            assert heard.wait(60)
            yield from usual_answer(got).parts or ()

        scripts[name] = lambda got: Reply(parts=parts(got), headers=SSE)  # type: ignore[arg-type]
        with sdk.client.stream("POST", MESSAGES, json=body_for(MESSAGES, name, stream=True), timeout=60) as response:
            pieces = response.iter_raw()
            first = next(pieces)
            heard.set()
            assert b"hel" in b"".join(pieces)
        return first

    scripts: dict[str, Callable[[Got], Reply]] = {}
    provider.script = lambda got: scripts["gpt" if got.path.endswith("/responses") else "claude"](got)
    signs = {"claude": b": hi\n\n" + PING, "gpt": responses_stream("hello")[0]}
    with ThreadPoolExecutor(2) as pool:
        first = dict(zip(signs, pool.map(first_bytes, signs, signs.values()), strict=True))
    assert first["claude"] == signs["claude"] and first["gpt"].startswith(b"event: message_start")


def test_no_key_and_no_traceback_in_an_error_event(sdk: Proxy, provider: Provider) -> None:
    said = {"type": "error", "error": {"type": "overloaded_error", "message": f"busy with {PROVIDER_KEY}"}}
    provider.script = lambda got: Reply(parts=[*(usual_answer(got).parts or [])[:4], sse(said, "error")], headers=SSE)
    for path in (MESSAGES, CHAT):
        response = sdk.post(path, body_for(path, "claude", stream=True))
        errors = [data for _, data in events_of(response) if "error" in json.loads(data)]
        assert len(errors) == 1 and "busy with" in errors[0] and PROVIDER_KEY not in response.text
        assert "Traceback (most" not in response.text and errors[0] == events_of(response)[-1][1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_a_web_page_is_no_answer(sdk: Proxy, provider: Provider, path: str, name: str, stream: bool) -> None:
    provider.script = lambda _got: Reply(b"<html>welcome</html>", 200, {"content-type": "text/html"})
    response = sdk.post(path, body_for(path, name, stream=stream))
    assert response.status_code == 502 and "<html>" not in response.text
    assert "answered 200 with an HTML page" in response.json()["error"]["message"]


ERROR_OBJECTS = {
    b'{"error": {"message": "slow down", "type": "x", "code": 429}}': 429,
    b'\n  {\n  "error": {"message": "slow down", "type": "rate_limit_error", "code": "slow"}}': 429,
    b'{"type": "error", "error": {"type": "overloaded_error", "message": "slow down"}}': 529,
    b'{"error": "slow down"}': 500,
    b'[{\n  "error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}\n}\n]': 429,
    b'\xef\xbb\xbf{"error": {"message": "slow down", "code": 429}}': 429,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), DIALECTS)
@pytest.mark.parametrize("body", ERROR_OBJECTS)
def test_an_error_object_with_a_good_status_is_an_error(
    sdk: Proxy, provider: Provider, path: str, name: str, body: bytes, stream: bool
) -> None:
    provider.script = lambda _got: Reply(body, 200)
    response = sdk.post(path, body_for(path, name, stream=stream))
    assert (response.status_code, response.json()["error"]["message"]) == (ERROR_OBJECTS[body], "slow down")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [[b"{"], [b": hi\n\n", b"{"], [b": hi\n\n{"]], ids=["alone", "behind", "with"])
def test_an_error_object_may_come_in_pieces(sdk: Proxy, provider: Provider, before: list[bytes], stream: bool) -> None:
    body = next(iter(ERROR_OBJECTS))
    parts = [*before, body[1:5], body[5:]]
    provider.script = lambda _got: Reply(parts=parts, pause=0.1)  # else they might be read as one
    response = sdk.chat(stream=stream)
    assert (response.status_code, response.json()["error"]["message"]) == (429, "slow down")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), [*DIALECTS, (RESPONSES, "gpt"), (RESPONSES, "claude")])
def test_an_error_object_may_be_compressed(
    sdk: Proxy, provider: Provider, path: str, name: str, stream: bool, packed: bool
) -> None:
    """Whether it is: the errors are the same; nor is a usual answer another."""
    body = next(iter(ERROR_OBJECTS))
    coding = {"content-encoding": "gzip"} if packed else {}
    provider.script = lambda _got: Reply(gzip.compress(body) if packed else body, 200, coding)
    response = sdk.post(path, body_for(path, name, stream=stream))
    assert (response.status_code, response.json()["error"]["message"]) == (429, "slow down")

    def answer(got: Got) -> Reply:
        usual = usual_answer(got)
        whole = b"".join(usual.parts or [usual.body])
        return Reply(gzip.compress(whole) if packed else whole, 200, {**usual.headers, **coding})

    provider.script = answer
    response = sdk.post(path, body_for(path, name, stream=stream))
    assert response.status_code == 200 and "lo" in response.text and "content-encoding" not in response.headers


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", "text/event-stream"])
@pytest.mark.parametrize("body", [b'{"base_resp": {"status_msg": "no such key"}}', b"error: no such key\n\n"])
def test_what_is_no_stream_is_no_empty_answer(sdk: Proxy, provider: Provider, body: bytes, kind: str) -> None:
    provider.script = lambda _got: Reply(body, 200, {"content-type": kind})
    rows = [(CHAT, "gpt"), (MESSAGES, "claude"), (MESSAGES, "gpt"), (RESPONSES, "claude")]
    calls = [(path, body_for(path, name)) for path, name in rows]
    calls += [("/v1/completions", {"model": "gpt", "prompt": "hello"}), ("/api/chat", chat_body())]
    for path, asked in calls:
        last = sdk.post(path, {**asked, "stream": True}).text.rstrip().rpartition("\n")[2].removeprefix("data: ")
        end = json.loads(last)
        assert "no such key" in str(end.get("response", end)["error"]), (asked, last)
    provider.script = lambda _got: Reply(parts=[openai_chunk({}, "stop"), b"data: [DONE]\n\n"], headers=SSE)
    assert sdk.chat(stream=True).text.endswith("data: [DONE]\n\n")  # a model may say nothing


def test_an_error_event_of_openais_keeps_what_it_says(sdk: Proxy, provider: Provider) -> None:
    said = {"message": "slow down", "type": "rate_limit_error", "code": 429}
    provider.script = lambda _got: Reply(parts=[sse({"error": said})], headers=SSE)
    response = sdk.chat(stream=True)
    assert response.status_code == 429 and response.json()["error"]["message"] == "slow down"
    said |= {"code": "slow", "param": "messages"}
    provider.script = lambda _got: Reply(parts=[*openai_stream(["hi"])[:1], sse({"error": said})], headers=SSE)
    assert json.loads(events_of(sdk.chat(stream=True))[-1][1])["error"] == said


@pytest.mark.parametrize("raw", ["prompt is too long", {"no": "text"}, "", None])
def test_what_openrouter_keeps_apart_of_an_error_is_said(sdk: Proxy, provider: Provider, raw: Any) -> None:
    said = {"message": "Provider returned error", "code": 400, "metadata": {"raw": raw, "provider_name": "Maker"}}
    wanted = "Provider returned error" + (": prompt is too long" if raw == "prompt is too long" else "")
    for reply in (
        Reply(json.dumps({"error": said}).encode(), 400),
        Reply(json.dumps({"error": said}).encode(), 200),
        Reply(parts=[sse({"error": said})], headers=SSE),
    ):
        provider.script = lambda _got, reply=reply: reply
        response = sdk.chat(stream=reply.parts is not None)
        assert (response.status_code, response.json()["error"]["message"]) == (400, wanted)


def test_anthropics_events_may_lack_the_space_and_the_last_blank_line(sdk: Proxy, provider: Provider) -> None:
    parts = [part.replace(b": ", b":", 1).replace(b"data: ", b"data:") for part in anthropic_stream(["hel", "lo"])]
    provider.script = lambda _got: Reply(parts=parts, headers=SSE)
    whole = sdk.messages(stream=True).text
    assert '"model": "claude"' in whole and whole.endswith('event:message_stop\ndata:{"type": "message_stop"}\n\n')
    provider.script = lambda _got: Reply(parts=[*parts[:-1], parts[-1].rstrip()], headers=SSE)
    assert sdk.messages(stream=True).text == whole
    error = b'event:error\ndata:{"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}\n\n'
    provider.script = lambda _got: Reply(parts=[*parts[:4], error], headers=SSE)
    assert events_of(sdk.messages(stream=True))[-1][0] == "error"
    provider.script = lambda _got: Reply(parts=[error], headers=SSE)
    assert sdk.messages(stream=True).status_code == 529


def message_pieces(whole: bytes, size: int) -> bytes:
    """What Anthropic's events become that come in pieces of this size."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(whole), size):
            yield whole[at : at + size]

    async def read() -> bytes:
        return b"".join([data async for data in proxy.message_frames(pieces(), "claude", proxy.Tally())])

    return asyncio.run(read())


def test_anthropics_events_may_be_cut_anywhere() -> None:
    whole = b"".join(anthropic_stream(["hel", "lo"]))
    events = message_pieces(whole, len(whole))
    for text in (whole, whole.replace(b"\n", b"\r\n")):
        assert {message_pieces(text, size) for size in range(1, 60)} == {events}


def test_an_event_of_megabytes_is_not_looked_through_with_each_of_its_pieces() -> None:
    looked = 0

    def count(_frame: Any, event: str, function: Any) -> None:
        nonlocal looked
        if event == "c_call" and isinstance(getattr(function, "__self__", None), bytes | bytearray):
            looked += len(function.__self__)

    whole = b"".join(anthropic_stream(["a" * 2**20]))
    sys.setprofile(count)
    try:
        assert message_pieces(whole, 4096).count(b"a") > 2**20
    finally:
        sys.setprofile(None)
    assert looked < 20 * len(whole)


def test_a_keyless_model_is_not_served_by_another_ones_wildcard(provider: Provider) -> None:
    models = (
        model("claude-*", "anthropic/claude-*", provider.url, "os.environ/UNSET_KEY"),
        model("*", "openai/*", f"{provider.url}/v1"),
    )
    running = Proxy(config_for_models(*models))
    assert running.chat("claude-sonnet-4-5").status_code == 401 and not provider.got
    assert running.chat("gpt-4o").status_code == 200
    assert running.stop() == 0


def test_a_message_for_mistral_does_not_have_litellm_load_its_server(provider: Provider) -> None:
    """Where the server is installed, that would hold up every client for seconds."""
    mistral = model("mistral", "mistral/mistral-small", f"{provider.url}/v1")
    running = Proxy(config_for(provider, mistral), PYTHONPROFILEIMPORTTIME="1")
    assert running.messages("mistral").json()["content"][0]["text"] == "hello"
    assert running.stop() == 0
    assert "| litellm" in running.output and "litellm.proxy.management_endpoints." not in running.output


def test_an_error_event_without_a_call_is_the_requests_fault(provider: Provider) -> None:
    texts = model("texts", "text-completion-openai/gpt-3.5-turbo-instruct", f"{provider.url}/v1")
    running = Proxy(config_for_models(texts))
    response = running.messages("texts", stream=True, tools=[{"name": "f", "input_schema": {"type": "object"}}])
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert not provider.got and running.stop() == 0


def test_a_cached_answer_belongs_to_its_memory(provider: Provider) -> None:
    settings = {"cache": True, "cache_params": {"type": "local"}}
    running = Proxy(config_for(provider, litellm_settings=settings))
    for user_id, calls in (("one", 1), ("one", 1), ("two", 2), ("one", 2)):
        assert running.chat(headers={"x-memory-user-id": user_id}).status_code == 200
        time.sleep(0.2)
        assert len(provider.got) == calls
    assert running.stop() == 0


def test_a_text_completion_streams_out_of_the_cache_too(provider: Provider) -> None:
    running = Proxy(config_for(provider, litellm_settings={"cache": True, "cache_params": {"type": "local"}}))
    for _ in range(2):
        response = running.post("/v1/completions", {"model": "gpt", "prompt": "hello", "stream": True})
        chunks = [json.loads(data) for _, data in events_of(response)[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        time.sleep(0.2)
    assert len(provider.got) == 1
    assert running.stop() == 0


def test_the_configs_headers_win_over_a_clients_whatever_their_case(provider: Provider) -> None:
    running = Proxy(
        config_for_models(model("gpt", "openai/x", f"{provider.url}/v1", extra_headers={"X-Extra": "config"}))
    )
    provider.script = lambda got: Reply(IMAGE) if "images" in got.path else usual_answer(got)
    bodies = {CHAT: chat_body(), "/v1/embeddings": {"model": "gpt", "input": "hello"}}
    for path, body in {**bodies, "/v1/images/generations": {"model": "gpt", "prompt": "a cat"}}.items():
        assert running.post(path, body, headers={"x-extra": "client", "x-other": "client"}).status_code == 200
        assert (provider.last.header("x-extra"), provider.last.header("x-other")) == ("config", "client")
    assert running.stop() == 0


def test_every_beta_of_a_client_reaches_anthropic(sdk: Proxy, provider: Provider) -> None:
    for path in (CHAT, MESSAGES):
        sdk.post(path, body_for(path, "claude"), headers={"anthropic-beta": "claude-code-20250219,unheard-of-2099"})
        assert {"claude-code-20250219", "unheard-of-2099"} <= set(
            str(provider.last.header("anthropic-beta")).split(",")
        )


TOOL_PARTS = ['{"ci', 'ty": "Os', 'lo"}']


def tool_stream(got: Got, name: str = "get_weather", arguments: Sequence[str] = TOOL_PARTS) -> Reply:
    """A tool call whose arguments come in parts, after some thinking where the API has it."""
    if got.path.partition("?")[0].endswith("/messages"):
        start = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {}}
        thoughts = [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "c2ln"}]
        blocks: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
            ({"type": "thinking", "thinking": "", "signature": ""}, thoughts),
            (start, [{"type": "input_json_delta", "partial_json": part} for part in arguments]),
        ]
        events: list[dict[str, Any]] = []
        for index, (block, deltas) in enumerate(blocks):
            events.append({"type": "content_block_start", "index": index, "content_block": block})
            events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
            events.append({"type": "content_block_stop", "index": index})
        first, _, _, *_, last = anthropic_stream(["x"])
        stop = {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}
        return Reply(parts=[first, *(sse(event, event["type"]) for event in (*events, stop)), last], headers=SSE)
    first_part = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": ""}}
    parts = [openai_chunk({"role": "assistant", "content": None, "tool_calls": [first_part]})]
    parts += [openai_chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}) for part in arguments]
    return Reply(parts=[*parts, openai_chunk({}, "tool_calls"), b"data: [DONE]\n\n"], headers=SSE)


@pytest.mark.parametrize(("path", "name"), DIALECTS[:3])
def test_streamed_tool_calls_and_thinking_arrive_whole(sdk: Proxy, provider: Provider, path: str, name: str) -> None:
    provider.script = tool_stream
    text = sdk.post(path, body_for(path, name, stream=True)).text
    documents = [json.loads(data) for data in re.findall(r"^data: (\{.*)$", text, re.M)]
    if path == MESSAGES:
        deltas = [document.get("delta", {}) for document in documents]
        arguments = "".join(delta.get("partial_json", "") for delta in deltas)
        assert {"type": "signature_delta", "signature": "c2ln"} in deltas
        assert any(delta.get("stop_reason") == "tool_use" for delta in deltas)
    else:
        choices = [document["choices"][0] for document in documents]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or ()]
        arguments = "".join(call["function"].get("arguments") or "" for call in calls)
        assert [call["function"]["name"] for call in calls if call["function"].get("name")] == ["get_weather"]
        assert choices[-1]["finish_reason"] == "tool_calls"
        thought = [block for choice in choices for block in choice["delta"].get("thinking_blocks") or ()]
        assert name != "claude" or any(block.get("signature") == "c2ln" for block in thought)
    assert json.loads(arguments) == {"city": "Oslo"}


def test_a_stream_that_does_not_begin_in_time_is_a_504(provider: Provider) -> None:
    running = Proxy(config_for(provider, router_settings={"stream_timeout": 0.5}), "--mode", "sdk")
    provider.script = lambda got: Reply(usual_answer(got).body, parts=usual_answer(got).parts, hold=1.5, headers=SSE)
    for path, name in DIALECTS:
        assert running.post(path, body_for(path, name, stream=True)).status_code == 504
    provider.script = lambda got: Reply(usual_answer(got).body, hold=1)
    assert running.chat().status_code == 200
    assert running.stop() == 0


def test_a_header_that_is_no_ascii_does_not_fail_the_call(sdk: Proxy, provider: Provider) -> None:
    assert sdk.chat(headers={"x-name": "café".encode()}).status_code == 200


@pytest.mark.parametrize("status", [200, 429])
def test_a_header_of_the_provider_that_is_no_ascii_does_not_fail_the_call(
    sdk: Proxy, provider: Provider, status: int
) -> None:
    def script(got: Got) -> Reply:
        usual = usual_answer(got)
        said = {"x-supermemory-note": "café".encode().decode("latin-1"), "x-odd": "\xe9"}
        return replace(usual, status=status, headers={**usual.headers, **said})

    provider.script = script
    for stream in (False, True):
        answer = sdk.chat(stream=stream)
        assert (answer.status_code, answer.headers["x-supermemory-conversation-id"]) == (status, "conv-1")
        assert "x-supermemory-note" in answer.headers and "x-odd" in answer.headers


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"router_settings": {"routing_strategy": "nope"}}, "LiteLLM refuses this config"),
        ({"router_settings": {"fallbacks": ["nope"]}}, "LiteLLM refuses this config"),
        ({"general_settings": {"master_key": "os.environ/UNSET_KEY"}}, "UNSET_KEY is not set"),
    ],
)
def test_a_config_that_litellm_refuses_is_one_clear_line(
    provider: Provider, sections: dict[str, Any], said: str
) -> None:
    assert said in failed_start(config_for(provider, **sections)).lines[-1]


def test_a_model_that_litellm_cannot_use_is_named_and_the_debug_log_shows_why(shared_provider: Provider) -> None:
    strange = model("strange", "no-such-provider/m", shared_provider.url)
    running = Proxy(config_for(shared_provider, strange), "--mode", "sdk", "--log-level", "debug")
    assert running.chat().status_code == 200
    assert running.stop() == 0
    assert "LiteLLM cannot use the model 'strange'; --log-level debug shows why" in running.output
    assert re.search("Error creating deployment.*no-such-provider/m", running.output)


def test_the_start_names_what_litellms_server_alone_does(shared_provider: Provider) -> None:
    """Else who has a guardrail in the config would think it at work."""
    guard = {"guardrail_name": "secrets", "litellm_params": {"guardrail": "hide-secrets", "mode": "pre_call"}}
    running = Proxy(config_for(shared_provider, guardrails=[guard], mcp_servers={}), "--mode", "sdk")
    assert running.stop() == 0
    assert "guardrails works in binary mode only" in running.output and "mcp_servers" not in running.output


# The routes that LiteLLM takes, each to a path of its own at a host that demands its cookie there.
COOKIE_ROUTES: dict[str, tuple[str, str, str]] = {  # name: (path at the proxy, LiteLLM model, end of api_base)
    "chat-openai": (CHAT, "openai/gpt-4o-mini", "/v1"),
    "chat-azure": (CHAT, "azure/gpt-4o-mini", ""),
    "chat-anthropic": (CHAT, "anthropic/claude-sonnet-4-5", ""),
    "chat-gemini": (CHAT, "gemini/gemini-2.5-flash", ""),
    "chat-groq": (CHAT, "groq/llama-3.3-70b-versatile", "/v1"),
    "chat-mistral": (CHAT, "mistral/mistral-small-latest", "/v1"),
    "chat-deepseek": (CHAT, "deepseek/deepseek-chat", "/v1"),
    "chat-openrouter": (CHAT, "openrouter/openai/gpt-4o-mini", "/v1"),
    "chat-hosted_vllm": (CHAT, "hosted_vllm/qwen", "/v1"),
    "chat-xai": (CHAT, "xai/grok-3", "/v1"),
    "chat-ollama_chat": (CHAT, "ollama_chat/llama3.2", ""),
    "messages-anthropic": (MESSAGES, "anthropic/claude-sonnet-4-5", ""),
    "messages-openai": (MESSAGES, "openai/gpt-4o-mini", "/v1"),
    "messages-hosted_vllm": (MESSAGES, "hosted_vllm/qwen", "/v1"),
    "responses-openai": ("/v1/responses", "openai/gpt-4o-mini", "/v1"),
    "responses-anthropic": ("/v1/responses", "anthropic/claude-sonnet-4-5", ""),
    "embeddings-openai": ("/v1/embeddings", "openai/text-embedding-3-small", "/v1"),
    "text-openai": ("/v1/completions", "text-completion-openai/gpt-3.5-turbo-instruct", "/v1"),
}


def cookie_config(url: str, **sections: Any) -> dict[str, Any]:
    models = [
        model(name, target, f"{url}/{name}{end}", api_version="2024-10-21" if "azure" in target else None)
        for name, (_, target, end) in COOKIE_ROUTES.items()
    ]
    return config_for_models(*models, **sections)


def config_for_models(*models: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"model_list": list(models), "general_settings": {"forward_client_headers_to_llm_api": True}, **sections}


def challenge(name: str, **headers: str) -> Reply:
    """What Cloudflare sends to a caller without its cookie."""
    page = {"content-type": "text/html; charset=UTF-8", "cf-mitigated": "challenge"}
    return Reply(b"<html>Just a moment...</html>", 503, {**page, "set-cookie": f"{name}=1; Path=/{name}", **headers})


def gate(got: Got) -> Reply:
    """Lets in who has the cookie of the path's first part."""
    name = got.path.split("/")[1]
    return usual_answer(got) if has_cookie(got, name) else challenge(name)


def has_cookie(got: Got, name: str) -> bool:
    return f"{name}=1" in (got.header("cookie") or "").split("; ")


def cookie_body(name: str, **more: Any) -> dict[str, Any]:
    path = COOKIE_ROUTES[name][0]
    if path.endswith(("responses", "embeddings")):
        return {"model": name, "input": "hello", **more}
    return {"model": name, "prompt": "hello", **more} if path == "/v1/completions" else body_for(path, name, **more)


@pytest.fixture(scope="session")
def cookies(shared_provider: Provider) -> Iterator[Proxy]:
    running = Proxy(cookie_config(shared_provider.url), "--log-level", "debug")
    yield running.kept()
    assert running.stop() == 0
    assert "Unclosed" not in running.output
    assert "Traceback (most" not in running.output


@pytest.mark.parametrize("name", COOKIE_ROUTES)
def test_session_keeps_cookies_on_every_route(cookies: Proxy, provider: Provider, name: str) -> None:
    path = COOKIE_ROUTES[name][0]
    provider.script = gate
    first = cookies.post(path, cookie_body(name))
    assert first.status_code == 200, first.text  # the challenge cost the client nothing
    sent = [got for got in provider.got if got.method == "POST" and not got.path.endswith("/api/show")]
    assert [has_cookie(got, name) for got in sent] == [False, True]
    assert sent[0].raw == sent[1].raw and ("hello" in first.text or "embedding" in name)
    for stream in (False, True)[: 1 if "embedding" in name else 2]:
        provider.got.clear()
        response = cookies.post(path, cookie_body(name, **({"stream": True} if stream else {})))
        assert response.status_code == 200, response.text
        assert provider.got and all(has_cookie(got, name) for got in provider.got)
        if stream:
            last_event, last_data = events_of(response)[-1]
            ends = {MESSAGES: last_event == "message_stop", "/v1/responses": last_event == "response.completed"}
            assert ends.get(path, last_data == "[DONE]"), response.text


def test_a_request_that_cannot_be_read_has_one_line_in_the_log(cookies: Proxy) -> None:
    answer = cookies.raw(b"GET / HTTP/1.1\r\n\r\n")
    assert log_line(cookies, re.findall(r"x-request-id: (\w+)", answer.decode())[0])["event"] == "refused"
    cookies.client.get("/health", headers={"x-request-id": "the-next"})
    log_line(cookies, "the-next")
    assert not [line for line in cookies.lines if '"method": ""' in line]


def test_litellms_client_in_rust_does_not_go_past_the_session(shared_provider: Provider, provider: Provider) -> None:
    provider.script = gate
    running = Proxy(cookie_config(shared_provider.url), LITELLM_RUST="true")
    for _ in range(2):
        assert running.post(MESSAGES, cookie_body("messages-anthropic")).status_code == 200
        reload(running, lambda _: None)  # with the environment as it was given
    assert running.stop() == 0


def test_session_shows_cookies_by_name_and_never_by_value(shared_provider: Provider, provider: Provider) -> None:
    provider.script = lambda got: Reply(usual_answer(got).body, headers={"set-cookie": "visible=secret-cookie-value"})
    config = config_for_models(model("gpt", "openai/gpt-4o-mini", f"{shared_provider.url}/v1"))
    running = Proxy(config, LOG_LEVEL="debug")
    assert running.client.get("/health").json()["checks"]["session_manager"]["cookie_count"] == 0
    assert running.chat().status_code == 200
    assert running.client.get("/health").json()["checks"]["session_manager"]["cookie_count"] == 1
    assert running.stop() == 0
    assert "visible@127.0.0.1" in running.output and "secret-cookie-value" not in running.output


def test_session_keeps_each_hosts_cookies_to_itself(shared_provider: Provider, provider: Provider) -> None:
    port = shared_provider.port
    provider.script = lambda got: Reply(
        usual_answer(got).body,
        headers={"set-cookie": f"of={str(got.header('host')).partition(':')[0]}; Path=/"},
    )
    hosts = {"one": "127.0.0.1", "two": "localhost"}
    running = Proxy(config_for_models(*(model(n, "openai/x", f"http://{h}:{port}/v1") for n, h in hosts.items())))
    for _ in range(2):
        for name in hosts:
            assert running.chat(name).status_code == 200
    sent = [(str(got.header("host")).partition(":")[0], got.header("cookie")) for got in provider.got]
    assert sent == [
        ("127.0.0.1", None),
        ("localhost", None),
        ("127.0.0.1", "of=127.0.0.1"),
        ("localhost", "of=localhost"),
    ]
    assert running.stop() == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "name"), [(CHAT, "chat-openai"), (CHAT, "chat-gemini"), (MESSAGES, "messages-anthropic")]
)
@pytest.mark.parametrize("kind", ["no cookie", "again", "403", "header only"])
def test_a_challenge_that_stays_is_a_clear_error(
    cookies: Proxy, provider: Provider, path: str, name: str, kind: str, stream: bool
) -> None:
    number = iter(range(1000))

    def script(_got: Got) -> Reply:
        reply = challenge(f"new-{name}-{kind.replace(' ', '')}-{stream}-{next(number)}")
        reply.headers["set-cookie"] = reply.headers["set-cookie"].partition(";")[0] + "; Path=/"
        if kind != "again":
            del reply.headers["set-cookie"]
        if kind == "403":
            reply.status = 403
            del reply.headers["cf-mitigated"]
        if kind == "header only":
            reply.headers["content-type"] = "text/plain"
        return reply

    provider.script = script
    response = cookies.post(path, cookie_body(name, stream=stream))
    assert response.status_code == (403 if kind == "403" else 503)
    assert "Cloudflare challenge" in response.json()["error"]["message"] and "<html>" not in response.text
    assert (response.json().get("type") == "error") == (path == MESSAGES)
    assert len(provider.got) == (2 if kind == "again" else 1)


@pytest.mark.parametrize("other", ["", "other=1; Path=/"])
def test_a_challenge_that_takes_a_cookie_back_is_met_without_it(provider: Provider, other: str) -> None:
    given = "stale=1; Path=/" + (f"\r\nset-cookie: {other}" if other else "")
    taken = challenge("-")
    taken.headers["set-cookie"] = "stale=; Path=/; Max-Age=0"

    def script(got: Got) -> Reply:
        if len(provider.got) == 1:
            return Reply(usual_answer(got).body, headers={"set-cookie": given})
        return taken if "stale" in (got.header("cookie") or "") else usual_answer(got)

    provider.script = script
    running = Proxy(config_for(provider))
    assert [running.chat().status_code for _ in range(2)] == [200, 200]
    assert [got.header("cookie") for got in provider.got][2:] == [other.partition(";")[0] or None]
    assert running.stop() == 0


def test_odd_cookies_do_no_harm(provider: Provider, tmp_path: Path) -> None:
    running = Proxy(config_for(provider), "--cookie-file", str(tmp_path / "cookies"))
    assert "proof" not in (tmp_path / "cookies").read_text()
    odd = ["far=1; Max-Age=9999999999999", "far=1; Max-Age=99999999999999999999999", "gone=1; Max-Age=-5", ";;;"]
    for cookie, (path, name) in zip([*odd, "bell=\a; Path=/", "\x01=1; Path=/"], DIALECTS * 2, strict=False):
        provider.script = lambda got, cookie=cookie: Reply(usual_answer(got).body, headers={"set-cookie": cookie})
        assert sdk_ok(running, path, name) and sdk_ok(running, path, name)
    assert running.stop() == 0


def test_a_host_that_hands_out_ever_new_cookies_fills_no_memory(provider: Provider) -> None:
    def script(got: Got) -> Reply:
        new = [f"c{len(provider.got)}-{number}=1; Path=/" for number in range(60)]
        return Reply(usual_answer(got).body, headers={"set-cookie": "\r\nset-cookie: ".join(new)})

    provider.script = script
    running = Proxy(config_for(provider))
    assert [running.chat().status_code for _ in range(5)] == [200] * 5
    assert running.client.get("/health").json()["checks"]["session_manager"]["cookie_count"] == proxy.MAX_COOKIES
    sent = str(provider.got[-1].header("cookie"))
    assert "c4-59=1" in sent and "c1-0=1" not in sent, "the newest are kept"
    assert running.stop() == 0


def test_a_cookie_file_that_cannot_be_written_is_one_warning(provider: Provider, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    running = Proxy(config_for(provider), "--mode", "sdk", "--cookie-file", str(tmp_path / "file" / "cookies"))
    assert sdk_ok(running, "/v1/messages", "claude")  # the provider sets a cookie, as the proof at the start did
    wait_until(lambda: "cookies cannot be written" in running.output)
    assert running.stop() == 0
    assert running.output.count("cookies cannot be written") == 1


def sdk_ok(running: Proxy, path: str, name: str) -> bool:
    return running.post(path, body_for(path, name)).status_code == 200


def test_only_an_answer_that_sets_cookies_is_searched_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.Cookies, "extract_cookies", httpx.Cookies.extract_cookies)  # as it was, at the end
    proxy.look_for_cookies_where_some_are_set()
    found, request = httpx.Cookies(), httpx.Request("GET", "http://127.0.0.1/")
    found.extract_cookies(httpx.Response(200))  # httpx would need its request for that
    found.extract_cookies(httpx.Response(200, headers={"set-cookie": "name=value"}, request=request))
    assert dict(found) == {"name": "value"}


def test_a_stale_connection_to_a_provider_is_replaced() -> None:
    """The provider closes each kept connection when its second request comes."""

    def script(sock: socket.socket, _number: int) -> None:
        head = read_head(sock)
        answer = usual_answer(Got("POST", head.split()[1].decode(), [], b'{"model": "m"}')).body
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer))
        sock.sendall(answer)
        read_head(sock)

    upstream = ScriptedServer(script)
    models = (
        model("gpt", "openai/x", f"{upstream.url}/v1"),
        model("claude", "anthropic/claude-sonnet-4-5", upstream.url),
    )
    running = Proxy(config_for_models(*models))
    for _ in range(3):
        for path, name in ((CHAT, "gpt"), (MESSAGES, "claude")):
            assert sdk_ok(running, path, name)
    assert running.stop() == 0


def test_a_call_on_a_new_connection_is_made_once() -> None:
    """The provider may have served it before it closed."""
    upstream = ScriptedServer(lambda sock, _number: bool(read_head(sock)) and None)
    models = (
        model("gpt", "openai/x", f"{upstream.url}/v1"),
        model("claude", "anthropic/claude-sonnet-4-5", upstream.url),
    )
    running = Proxy(config_for_models(*models))
    for count, (path, name) in enumerate(DIALECTS, 1):
        assert (running.post(path, body_for(path, name)).status_code, upstream.count) == (502, count)
    assert running.stop() == 0


def test_a_providers_own_429_that_sets_a_cookie_is_no_challenge(sdk: Proxy, provider: Provider) -> None:
    said = json.dumps({"error": {"message": "slow down", "type": "rate_limit"}}).encode()
    provider.script = lambda _got: Reply(said, 429, {"set-cookie": "limit=1; Path=/nowhere", "retry-after": "9"})
    response = sdk.chat()
    assert response.status_code == 429 and response.json()["error"]["message"] == "slow down"
    assert response.headers["retry-after"] == "9" and len(provider.got) == 1


def test_cookies_survive_a_restart_in_a_private_file(
    shared_provider: Provider, provider: Provider, tmp_path: Path
) -> None:
    file = tmp_path / "cookies.txt"
    provider.script = gate
    for expected in ([False, True], [True]):
        provider.got.clear()
        running = Proxy(cookie_config(shared_provider.url), "--cookie-file", str(file))
        assert running.messages("messages-anthropic").status_code == 200
        assert [has_cookie(got, "messages-anthropic") for got in provider.got] == expected
        assert running.stop() == 0
        assert file.stat().st_mode & 0o777 == 0o600
        assert [path.name for path in tmp_path.iterdir()] == ["cookies.txt"]


def test_a_litellm_that_loses_cookies_is_found_out_at_the_start(shared_provider: Provider, tmp_path: Path) -> None:
    class Deaf(proxy.Session):
        """As if LiteLLM had moved its requests to where the session does not reach."""

        def install(self, transports: Any) -> None:
            pass

    config = proxy.load_config(write_config(tmp_path, config_for(shared_provider)))
    with (tmp_path / "log").open("w+") as stream:
        log = proxy.Log(stream, as_json=True, redact=proxy.Redactor())
        runtime = proxy.SdkRuntime(log, Deaf(None, log))
        try:
            runtime.bridge.run(runtime.prove_cookies())
            row = proxy.SdkBackend(config, runtime).health()["session_manager"]
        finally:
            runtime.close()
        log.flush()
        stream.seek(0)
        assert '"CRITICAL"' in stream.read()
    assert row["status"] == "unhealthy" and "openai" in row["reason"] and "anthropic" in row["reason"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\xfe\x00", b"#LWP-Cookies-2.0\nSet-Cookie3: broken"])
def test_a_broken_cookie_file_is_a_warning_and_an_empty_jar(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cookies.txt"
    file.write_bytes(content)
    with (tmp_path / "log").open("w+") as stream:
        log = proxy.Log(stream, as_json=True, redact=proxy.Redactor())
        session = proxy.Session(str(file), log)
        log.flush()
        stream.seek(0)
        assert "WARNING" in stream.read()
    assert session.cookie_count == 0


def test_connections_to_a_provider_are_used_again(shared_provider: Provider) -> None:
    for path, name in DIALECTS[:3]:
        own = Provider()
        own.script = lambda got: Reply(usual_answer(got).body, hold=0.02)
        running = Proxy(config_for(own))
        for _ in range(100):
            assert running.post(path, body_for(path, name)).status_code == 200
        assert own.connections == 1
        with ThreadPoolExecutor(50) as pool:
            for _ in range(2):
                answers = list(pool.map(lambda _: running.post(path, body_for(path, name)), range(50)))  # noqa: B023
                assert {answer.status_code for answer in answers} == {200}
                opened = own.connections
                assert opened <= 50
        assert own.connections == opened
        assert running.stop() == 0


def test_the_users_http_proxy_is_used(shared_provider: Provider, provider: Provider) -> None:
    config = config_for_models(
        model("gpt", "openai/gpt-4o-mini", "http://provider.test/v1"),
        model("claude", "anthropic/claude-sonnet-4-5", "http://provider.test"),
    )
    running = Proxy(config, HTTP_PROXY=shared_provider.url, http_proxy=shared_provider.url, NO_PROXY="", no_proxy="")
    assert running.chat().status_code == 200 and running.messages().status_code == 200
    assert {got.path for got in provider.got} >= {
        "http://provider.test/v1/chat/completions",
        "http://provider.test/v1/messages",
    }
    assert running.client.get("/health").json()["checks"]["session_manager"]["status"] == "healthy"
    assert running.stop() == 0


@pytest.mark.parametrize("trust", ["SSL_CERT_FILE", "ssl_verify", "nothing"])
def test_certificates_are_checked_as_the_user_says(tmp_path: Path, trust: str) -> None:
    url, certificate = tls_provider(tmp_path)
    models = [model("gpt", "openai/x", f"{url}/v1"), model("claude", "anthropic/claude-sonnet-4-5", url)]
    settings = {"litellm_settings": {"ssl_verify": False}} if trust == "ssl_verify" else {}
    environment = {"SSL_CERT_FILE": certificate} if trust == "SSL_CERT_FILE" else {}
    running = Proxy(config_for_models(*models, router_settings={"num_retries": 0}, **settings), **environment)
    for response in (running.chat(), running.messages()):
        assert response.status_code == (502 if trust == "nothing" else 200), response.text
    assert running.stop() == 0


def tls_provider(folder: Path) -> tuple[str, str]:
    """The URL of a provider that speaks TLS, and the file of its certificate, which nobody has signed but itself."""
    own = Provider()
    path = folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    own.server.socket = context.wrap_socket(own.server.socket, server_side=True)
    return own.url.replace("http:", "https:"), str(path)


def log_line(running: Proxy, request_id: str) -> dict[str, Any]:
    """The log line of one request, once it is there."""
    found: list[dict[str, Any]] = []
    mark = f'"request_id": "{request_id}"'
    wait_until(lambda: found.extend(json.loads(line) for line in running.lines if mark in line) or found)
    return found[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "name"), [(CHAT, "gpt"), (CHAT, "claude"), (MESSAGES, "claude"), (MESSAGES, "gpt"), (RESPONSES, "gpt")]
)
def test_the_log_says_what_a_request_took(sdk: Proxy, provider: Provider, path: str, name: str, stream: bool) -> None:
    response = sdk.post(path, body_for(path, name, stream=stream))
    said = log_line(sdk, response.headers["x-request-id"])
    assert said["event"] == "answered" and (said["model"], said["backend"], said["status"]) == (name, "sdk", 200)
    assert (said["tokens"], said["input_tokens"], said["output_tokens"]) == (5, 3, 2)
    assert 0 < said["ttft_ms"] <= said["duration_ms"] and 0 < said["cost_usd"] < 0.001
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["timestamp"])
    assert (said["level"], said["component"], said["user_id"]) == ("INFO", "request", "default-dev")


@pytest.mark.parametrize("stream", [False, True])
def test_a_wildcards_models_have_their_price(provider: Provider, stream: bool) -> None:
    targets = {"groq/*": "groq/*", "any-*": "groq/*", "my/*": "openai/*", "claude-*": "openai/gpt-4*"}
    models = (model(name, target, f"{provider.url}/v1") for name, target in targets.items())
    running = Proxy(config_for_models(*models))
    for name in ("groq/openai/gpt-oss-120b", "any-openai/gpt-oss-120b", "my/gpt-4o", "claude-o"):
        said = log_line(running, running.chat(name, stream=stream).headers["x-request-id"])
        assert said["cost_usd"] > 0, name
    assert running.stop() == 0


def test_a_streamed_text_completion_whose_provider_states_no_usage_is_counted(sdk: Proxy, provider: Provider) -> None:
    provider.script = lambda _got: Reply(parts=[openai_chunk({"content": "hi"}), openai_chunk({}, "stop")], headers=SSE)
    response = sdk.post("/v1/completions", {"model": "gpt", "prompt": "hello", "stream": True})
    said = log_line(sdk, response.headers["x-request-id"])
    assert said["tokens"] > 1 and said["cost_usd"] > 0
    assert '"text":"hi"' in response.text and "usage" not in response.text


def text_stream(got: Got) -> Reply:
    """As OpenAI streams a text completion: the usage comes alone, to those who ask for it."""
    chunk = {key: value for key, value in TEXT.items() if key != "usage"}
    usage = [sse({**chunk, "choices": [], "usage": USAGE})] if got.body.get("stream_options") else []
    return Reply(parts=[sse(chunk), *usage, b"data: [DONE]\n\n"], headers=SSE)


@pytest.mark.parametrize("target", ["openai/gpt-4o-mini", "text-completion-openai/gpt-3.5-turbo-instruct"])
def test_a_streamed_text_completion_is_counted(provider: Provider, target: str) -> None:
    running = Proxy(config_for_models(model("up", target, f"{provider.url}/v1")))
    provider.script = text_stream if target.startswith("text") else usual_answer
    asked = {"model": "up", "prompt": "hello", "stream": True}
    for options in ({}, {"stream_options": {"include_usage": True}}):
        response = running.post("/v1/completions", {**asked, **options})
        said = log_line(running, response.headers["x-request-id"])
        assert (said["input_tokens"], said["output_tokens"]) == (3, 2) and said["cost_usd"] > 0
        parts = [json.loads(data) for _, data in events_of(response)[:-1]]
        assert "".join(choice["text"] for part in parts for choice in part["choices"]) == "hello"
        assert [part["usage"]["total_tokens"] for part in parts if part.get("usage")] == ([5] if options else [])
    assert running.stop() == 0


@pytest.mark.parametrize("name", ["gpt", "claude"])
def test_usage_is_shown_to_those_who_ask_for_it(sdk: Proxy, provider: Provider, name: str) -> None:
    quiet = [json.loads(data) for _, data in events_of(sdk.chat(name, stream=True))[:-1]]
    assert not any(part.get("usage") for part in quiet) and all(part["choices"] for part in quiet)
    if name == "gpt":
        assert provider.last.body["stream_options"] == {"include_usage": True}
    asked = sdk.chat(name, stream=True, stream_options={"include_usage": True})
    parts = [json.loads(data) for _, data in events_of(asked)[:-1]]
    assert parts[-1]["usage"]["total_tokens"] == 5
    assert [part["choices"] for part in quiet] == [part["choices"] for part in parts if part["choices"]][: len(quiet)]


COUNTED = b'{"input_tokens": 42}'
MODERATION = (
    b'{"id": "modr-1", "model": "omni", "results": [{"flagged": false, "categories": {}, "category_scores": {}}]}'
)
IMAGE = b'{"created": 1, "data": [{"url": "http://pictures/1.png"}]}'
RANKED = (
    b'{"id": "r1", "results": [{"index": 1, "relevance_score": 0.9}], "meta": {"billed_units": {"search_units": 1}}}'
)
EMBEDDED = json.dumps(embeddings({"input": "hello"})).encode()
OTHER_ROWS = {
    "/v1/moderations": ("gpt", {"input": "hello"}, "/v1/moderations", MODERATION, "results"),
    "/v1/images/generations": ("gpt", {"prompt": "a cat"}, "/v1/images/generations", IMAGE, "data"),
    **dict.fromkeys(
        ("/v1/rerank", "/v2/rerank"),
        ("ranker", {"query": "q", "documents": ["a", "b"]}, "/v2/rerank", RANKED, "results"),
    ),
    "/v1/embeddings": ("embedder", {"input": "hello"}, "/v1/embeddings", EMBEDDED, "data"),
    "/v1/messages/count_tokens?beta=true": (
        *("claude", {"messages": chat_body()["messages"]}, "/v1/messages/count_tokens", COUNTED, "input_tokens"),
    ),
}


@pytest.mark.parametrize("path", OTHER_ROWS)
def test_the_other_rows_reach_the_provider_with_the_memory_header(sdk: Proxy, provider: Provider, path: str) -> None:
    name, body, upstream, answer, key = OTHER_ROWS[path]
    provider.script = lambda _got: Reply(answer, headers={"x-supermemory-conversation-id": "c"})
    response = sdk.post(path, {"model": name, **body}, headers={"user-agent": "claude-cli/2"})
    assert response.status_code == 200, response.text
    wanted, found = json.loads(answer)[key], response.json()[key]
    assert found == wanted or found[0]["flagged"] == wanted[0]["flagged"], "LiteLLM renames a moderation's categories"
    assert response.headers["x-supermemory-conversation-id"] == "c"
    got = provider.last
    assert (got.path.partition("?")[0], got.header("x-sm-user-id")) == (upstream, "claude-code")
    assert sdk.post(path, {"model": name, **body, "stream": True}).status_code == 400
    provider.script = status_reply(429)
    assert sdk.post(path, {"model": name, **body}).status_code in (429, 200), "count_tokens falls back to a tokenizer"


def test_tokens_are_counted_by_a_tokenizer_where_the_provider_has_no_count(sdk: Proxy, provider: Provider) -> None:
    tool = {
        "name": "f",
        "description": "d",
        "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
    }
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "b"}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "done"}]}
    messages = [*chat_body()["messages"], use, result]
    body = {"model": "gpt", "messages": messages, "tools": [tool], "system": [{"type": "text", "text": "be kind"}]}
    provider.script = status_reply(404)
    few = sdk.post("/v1/messages/count_tokens", {"model": "gpt", "messages": messages[:1]}).json()["input_tokens"]
    many = sdk.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    assert 0 < few < many < 500


def test_speech_and_transcription(sdk: Proxy, provider: Provider) -> None:
    provider.script = lambda _got: Reply(b"ID3\x00sound", headers={"content-type": "audio/mpeg"})
    spoken = sdk.post("/v1/audio/speech", {"model": "gpt", "input": "hello", "voice": "alloy"})
    assert (spoken.status_code, spoken.headers["content-type"], spoken.content) == (200, "audio/mpeg", b"ID3\x00sound")
    assert provider.last.header("x-sm-user-id") == "default-dev" and provider.last.body["voice"] == "alloy"
    sound = bytes(range(256)) * 40 + b"\r\n--not-the-boundary\r\n"
    provider.script = lambda _got: Reply(b'{"text": "hello"}')
    upload = {"file": ("a b.wav", sound, "audio/wav")}
    heard = sdk.client.post("/v1/audio/transcriptions", data={"model": "gpt", "temperature": "0.5"}, files=upload)
    assert (heard.status_code, heard.json()["text"]) == (200, "hello"), heard.text
    got = provider.last
    assert sound in got.raw and b'name="temperature"' in got.raw and b"a b.wav" in got.raw
    assert got.header("x-sm-user-id") == "default-dev"


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_a_transcription_comes_as_the_text_that_was_asked_for(sdk: Proxy, provider: Provider, form: str) -> None:
    text, kind = "1\n00:00:00,000 --> 00:00:01,000\nhéllo\n\n", "text/plain; charset=utf-8"
    provider.script = lambda _got: Reply(text.encode(), headers={"content-type": kind})
    data, upload = {"model": "gpt", "response_format": form}, {"file": ("a.wav", b"sound", "audio/wav")}
    heard = sdk.client.post("/v1/audio/transcriptions", data=data, files=upload)
    assert (heard.status_code, heard.headers["content-type"], heard.text) == (200, kind, text)


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"--b\r\n",
        b"--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt\r\n--b--\r\n',
        b"--b\r\nContent-Disposition: form-data\r\n\r\ngpt\r\n--b--\r\n",
        b"--b\r\nmodel\r\n--b--",
        b'--b\r\nContent-Disposition: form-data; name="temperature"\r\n\r\nwarm\r\n--b--\r\n',
    ],
)
def test_a_broken_form_is_a_clear_400(sdk: Proxy, provider: Provider, form: bytes) -> None:
    for kind in (
        "multipart/form-data; boundary=b",
        "multipart/form-data",
        "text/plain",
        'multipart/form-data; boundary=""',
    ):
        answer = sdk.client.post("/v1/audio/transcriptions", content=form, headers={"content-type": kind})
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert not provider.got


class FormBody:
    """A request body that is there already."""

    framing, limit = 0, proxy.MAX_BODY_BYTES

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self) -> bytes:
        return self.data

    def pieces(self) -> Iterator[bytes]:
        yield self.data


def form_fields(data: bytes, kind: str = "multipart/form-data; boundary=b") -> dict[str, Any]:
    head = proxy.Head("POST", "/", 1, proxy.Headers([("Content-Type", kind)]), len(data))
    return proxy.parse_form(proxy.Request(head, FormBody(data), proxy.ClientPeer(socket.socket())))


def form_part(params: str, content: bytes = b"x", end: bytes = b"--b--\r\n") -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {params}\r\n\r\n".encode() + content + b"\r\n" + end


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ('name="a"', {"a": "x"}),
        ("name=a", {"a": "x"}),
        ('name="a[]"', {"a": ["x"]}),
        ('name="f"; filename="straße 日.wav"', {"f": ("straße 日.wav", b"x", "application/octet-stream")}),
        ('name="f"; filename="a\\"b\\\\c\\d;.wav"', {"f": ('a"b\\c\\d;.wav', b"x", "application/octet-stream")}),
        ("name=\"f\"; filename*=UTF-8''%C3%A9.wav", {"f": ("é.wav", b"x", "application/octet-stream")}),
        ("name=f; FileName=\"\"; filename*=punycode''%FF", {"f": ("", b"x", "application/octet-stream")}),
    ],
)
def test_a_forms_parameters(params: str, found: dict[str, Any]) -> None:
    assert form_fields(form_part(params)) == found


def test_a_forms_delimiter_is_a_whole_line() -> None:
    content = b"a\r\n--bc\r\n--b: d\r\n--b--e\r\n--"
    form = b"begin\r\n" + form_part("name=a", content, form_part("name=c", b"", b"--b-- \t\r\nend"))
    assert form_fields(form.replace(b"--b\r\n", b"--b \t\r\n")) == {"a": content.decode(), "c": ""}


def test_a_form_has_a_limited_number_of_parts(sdk: Proxy, provider: Provider) -> None:
    part = form_part('name="a[]"', b"x", b"")
    assert form_fields(part * proxy.MAX_FORM_PARTS + b"--b--") == {"a": ["x"] * proxy.MAX_FORM_PARTS}
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for parts in (proxy.MAX_FORM_PARTS + 1, 300_000):
        form = part * parts + b"--b--\r\n"
        refused = sdk.client.post("/v1/audio/transcriptions", content=form, headers=headers)
        assert refused.status_code == 400 and "1000 parts" in refused.text
    both = form_part('name="model[]"', b"gpt", form_part("name=model", b"gpt"))
    assert sdk.client.post("/v1/audio/transcriptions", content=both, headers=headers).status_code == 400
    assert not provider.got


def test_a_broken_form_raises_nothing_but_a_clear_error() -> None:
    rng = random.Random(7)
    whole = form_part('name="a[]"; filename*0*=x; filename="é"', b"1", form_part("name=temperature", b"2"))
    pieces = [b"\r\n", b"--b", b"--", b";", b'"', b"\\", b"=", b"*", b"''", b"%", b"\xff", b"\0", b"[]", b" ", b":"]
    kinds = ["boundary=b", 'boundary="b"', "boundary*=b", "boundary*=x''b", "boundary*0*=b; boundary*", "boundary=\xff"]
    for _ in range(5000):
        data = bytearray(whole)
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 0, 1, 5])] = rng.choice(pieces)
        try:
            form_fields(bytes(data), f"multipart/form-data; {rng.choice(kinds)}")
        except proxy.ProxyError as error:
            assert error.status in (400, 431)


def test_a_stored_response_can_be_fetched_and_deleted(sdk: Proxy, provider: Provider) -> None:
    made = sdk.post(RESPONSES, {"model": "gpt", "input": "hello"}).json()
    follow = sdk.post(RESPONSES, {"model": "gpt", "input": "more", "previous_response_id": made["id"]})
    assert follow.status_code == 200 and provider.last.body["previous_response_id"] == "resp_1"
    provider.script = lambda _got: Reply(json.dumps(response_object([])).encode())
    fetched = sdk.client.get(f"/v1/responses/{made['id']}", headers={"user-agent": "claude-cli/2"})
    assert fetched.status_code == 200 and fetched.json()["object"] == "response", fetched.text
    assert (provider.last.method, provider.last.path) == ("GET", "/v1/responses/resp_1")
    assert provider.last.header("x-sm-user-id") == "claude-code"
    provider.got.clear()
    streamed = sdk.client.get(f"/v1/responses/{made['id']}?stream=true")
    assert streamed.status_code == 400 and streamed.json()["error"]["param"] == "stream" and not provider.got
    provider.script = lambda _got: Reply(b'{"id": "resp_1", "object": "response", "deleted": true}')
    deleted = sdk.client.delete(f"/v1/responses/{made['id']}")
    assert deleted.status_code == 200 and deleted.json()["deleted"] is True
    assert provider.last.method == "DELETE"
    assert sdk.client.put(f"/v1/responses/{made['id']}").headers["allow"] == "GET, DELETE"
    unknown = sdk.client.get("/v1/responses/resp_unknown")
    assert unknown.status_code == 404 and "'resp_unknown' does not exist" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "then"), [("claude", "claude"), ("gemini", "gemini"), ("gpt", "claude")])
def test_a_response_that_nobody_keeps_is_not_followed_without_its_conversation(
    sdk: Proxy, provider: Provider, name: str, then: str, stream: bool
) -> None:
    """OpenAI's code for it, at which clients send the whole conversation; also where they have changed the model."""
    made = sdk.post(RESPONSES, {"model": name, "input": "hello"}).json()
    provider.got.clear()
    more = {"model": then, "input": "more", "previous_response_id": made["id"], "stream": stream}
    follow = sdk.post(RESPONSES, more)
    assert (follow.status_code, follow.json()["error"]["code"]) == (400, "previous_response_not_found"), follow.text
    assert not provider.got
    for method in ("GET", "DELETE") if name == then else ():
        kept = sdk.client.request(method, f"{RESPONSES}/{made['id']}")
        assert (kept.status_code, kept.json()["error"]["param"]) == (404, "response_id"), kept.text


@pytest.mark.parametrize("prefix", ["/openai/deployments/gpt", "/engines/gpt", "/v1/engines/gpt"])
def test_azures_paths_name_the_model(sdk: Proxy, provider: Provider, prefix: str) -> None:
    body = {"messages": chat_body()["messages"]}
    answer = sdk.post(f"{prefix}/chat/completions?api-version=2024-02-01", body, headers={"api-key": "anything"})
    assert answer.status_code == 200 and answer.json()["model"] == "gpt"
    assert provider.last.path == "/v1/chat/completions"
    assert sdk.post(f"{prefix}/embeddings", {"input": "a"}).status_code == 200
    assert sdk.post(f"{prefix}/nothing", body).status_code == 404
    assert sdk.post(f"{prefix * 2000}/chat/completions", body).status_code == 404


@pytest.mark.parametrize("base", ["/openai", "/openai/v1"])
def test_azures_paths_may_leave_the_model_to_the_body(sdk: Proxy, provider: Provider, base: str) -> None:
    for path, end in ((CHAT, "/chat/completions"), (RESPONSES, "/responses")):
        answer = sdk.post(f"{base}{end}?api-version=preview", body_for(path, "gpt"), headers={"api-key": "anything"})
        assert (answer.status_code, provider.last.path) == (200, path)
    assert "gpt" in {row["id"] for row in sdk.client.get(f"{base}/models").json()["data"]}
    assert sdk.post(f"{base}/nothing", body_for(CHAT, "gpt")).status_code == 404


CODED = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "gzip, deflate": lambda data: zlib.compress(gzip.compress(data)),
    "identity": bytes,
}


@pytest.mark.parametrize("coding", CODED)
def test_compressed_bodies_are_understood(sdk: Proxy, provider: Provider, coding: str) -> None:
    data = CODED[coding](json.dumps(chat_body()).encode())
    headers = {"content-encoding": coding, "content-type": "application/json"}
    assert sdk.client.post(CHAT, content=data, headers=headers).status_code == 200
    assert provider.last.body["messages"] == chat_body()["messages"]
    if coding != "identity":
        for broken in (data[:-5], b"nonsense", b""):
            assert sdk.client.post(CHAT, content=broken, headers=headers).status_code == 400
    bare = zlib.compress(json.dumps(chat_body()).encode())[2:-4]
    assert sdk.client.post(CHAT, content=bare, headers={**headers, "content-encoding": "deflate"}).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_all_members_of_a_compressed_body_are_read(sdk: Proxy, provider: Provider, coding: str) -> None:
    data, pack = json.dumps(chat_body()).encode(), CODED[coding]
    headers = {"content-encoding": coding, "content-type": "application/json"}
    cut = [pack(data[at : at + 10]) for at in range(0, len(data), 10)]
    assert sdk.client.post(CHAT, content=b"".join(cut), headers=headers).status_code == 200
    assert provider.last.body["messages"] == chat_body()["messages"]
    provider.got.clear()
    for broken in (b"".join(cut)[:-5], pack(data) + b"more", pack(data) + b"\0" * 9):
        refused = sdk.client.post(CHAT, content=broken, headers=headers)
        assert refused.status_code == 400 and f"no valid {coding}" in refused.text
    many = sdk.client.post(CHAT, content=pack(b" ") * proxy.MAX_MEMBERS + pack(data), headers=headers)
    assert many.status_code == 400 and "members" in many.text
    bomb = pack(b" " * (40 * 1024 * 1024)) * 2
    assert sdk.client.post(CHAT, content=bomb, headers=headers).status_code == 413
    assert not provider.got


def test_unknown_codings_and_bombs_are_refused(sdk: Proxy, provider: Provider) -> None:
    refused = sdk.client.post(MESSAGES, content=b"x", headers={"content-encoding": "br"})
    assert refused.status_code == 415 and "gzip" in refused.headers["accept-encoding"]
    assert refused.json()["type"] == "error"
    bomb = gzip.compress(b" " * (65 * 1024 * 1024))
    assert len(bomb) < 100_000
    assert sdk.client.post(CHAT, content=bomb, headers={"content-encoding": "gzip"}).status_code == 413
    assert not provider.got


def test_a_websocket_attempt_is_told_to_use_http(sdk: Proxy, provider: Provider) -> None:
    fields = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "a"}
    answer = sdk.client.get(RESPONSES, headers=fields)
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "HTTP/1.1")
    assert sdk.post(RESPONSES, {"model": "gpt", "input": "hello"}).status_code == 200


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_javas_own_client_which_would_like_http_2_gets_its_answer(
    request: pytest.FixtureRequest, provider: Provider, mode: str
) -> None:
    headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAABAAMAAABk"}
    assert request.getfixturevalue(mode).chat(headers=headers).status_code == 200
    assert not {"upgrade", "http2-settings"} & {name.lower() for name, _ in provider.last.headers}


def test_models_have_the_shape_of_the_clients_api(sdk: Proxy) -> None:
    plain = sdk.client.get("/v1/models?limit=2").json()
    assert plain["object"] == "list" and len(plain["data"]) > 2
    names = [row["id"] for row in plain["data"]]
    version = {"anthropic-version": "2023-06-01"}
    page = sdk.client.get("/v1/models?limit=2", headers=version).json()
    assert [row["id"] for row in page["data"]] == names[:2] and page["has_more"]
    assert (page["first_id"], page["last_id"]) == (names[0], names[1])
    created = "2023-02-28T18:56:42Z"
    assert page["data"][0] == {"type": "model", "id": names[0], "display_name": names[0], "created_at": created}
    rest = sdk.client.get(f"/v1/models?limit=1000&after_id={names[1]}", headers=version).json()
    assert [row["id"] for row in rest["data"]] == names[2:] and not rest["has_more"]
    for last, more in ((4, True), (2, False)):
        back = sdk.client.get(f"/v1/models?limit=2&before_id={names[last]}", headers=version).json()
        assert ([row["id"] for row in back["data"]], back["has_more"]) == (names[last - 2 : last], more)
    assert len(sdk.client.get("/v1/models", headers=version).json()["data"]) == len(names)
    assert sdk.client.get("/v1/models/gpt", headers=version).json()["type"] == "model"


def test_ollamas_clients_find_their_models(sdk: Proxy, provider: Provider) -> None:
    assert tuple(map(int, sdk.client.get("/api/version").json()["version"].split("."))) >= (0, 6, 4)
    assert {"gpt", "claude"} <= {row["name"] for row in sdk.client.get("/api/tags").json()["models"]}
    shown = sdk.post("/api/show", {"model": "gpt"}).json()
    assert shown["capabilities"] == ["completion", "tools", "vision"]
    assert shown["model_info"]["litellm.context_length"] == 128000
    covered = sdk.post("/api/show", {"model": "anthropic/claude-of-tomorrow"})
    assert (covered.status_code, covered.json()["capabilities"]) == (200, ["completion"])
    missing = sdk.post("/api/show", {"model": "none"})
    assert missing.status_code == 404 and missing.json() == {"error": "model 'none' not found"}


def test_ollamas_chat_is_served_whole_and_as_lines(sdk: Proxy, provider: Provider) -> None:
    body = {"model": "gpt", "messages": [{"role": "user", "content": "hello"}]}
    whole = sdk.post("/api/chat", {**body, "stream": False, "options": {"num_predict": 7, "temperature": 0.5}}).json()
    assert whole["message"] == {"role": "assistant", "content": "hello"} and whole["done"] is True
    assert (whole["done_reason"], whole["prompt_eval_count"], whole["eval_count"]) == ("stop", 3, 2)
    assert (provider.last.body["max_tokens"], provider.last.body["temperature"]) == (7, 0.5)
    assert sdk.post("/api/chat", {**body, "stream": False, "options": {"num_predict": -1}}).status_code == 200
    assert "max_tokens" not in provider.last.body
    streamed = sdk.post("/api/chat", body, headers={"user-agent": "claude-cli/2"})
    assert streamed.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "hello"
    assert [line["done"] for line in lines] == [False, False, True] and lines[-1]["eval_count"] == 2
    assert provider.last.header("x-sm-user-id") == "claude-code"
    provider.script = tool_stream
    asked = sdk.post("/api/chat", {**body, "tools": [{"type": "function", "function": {"name": "get_weather"}}]})
    calls = [
        line["message"]["tool_calls"]
        for line in map(json.loads, asked.text.splitlines())
        if "tool_calls" in line["message"]
    ]
    assert len(calls) == 1 and calls[0][0]["function"]["name"] == "get_weather"
    assert isinstance(calls[0][0]["function"]["arguments"], dict)
    provider.script = lambda _got: Reply(parts=[openai_chunk({"reasoning_content": "hm"}, "stop")], headers=SSE)
    thought = json.loads(sdk.post("/api/chat", body).text.splitlines()[0])
    assert thought["message"] == {"role": "assistant", "content": "", "thinking": "hm"}


def test_ollamas_messages_are_translated(sdk: Proxy, provider: Provider) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "user", "content": "what is this?", "images": ["aGk="]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_name": "get_weather"},
    ]
    answer = sdk.post("/api/chat", {"model": "gpt", "stream": False, "format": "json", "messages": messages})
    assert answer.status_code == 200, answer.text
    user, assistant, tool = provider.last.body["messages"]
    assert user["content"][1]["image_url"]["url"] == "data:image/png;base64,aGk="
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
    assert tool["tool_call_id"] == assistant["tool_calls"][0]["id"] and tool["content"] == "rain"
    assert provider.last.body["response_format"] == {"type": "json_object"}
    for wrong in (None, "x", [5], [{"role": "assistant", "tool_calls": [{}]}], [{"tool_calls": 5}]):
        refused = sdk.post("/api/chat", {"model": "gpt", "messages": wrong})
        assert refused.status_code == 400 and isinstance(refused.json()["error"], str), (wrong, refused.text)
    assert sdk.post("/api/chat", {"messages": []}).status_code == 400


def test_ollamas_results_belong_to_their_calls(sdk: Proxy, provider: Provider) -> None:
    calls = [{"function": {"name": name, "arguments": {"n": n}}} for n, name in enumerate(["look", "look", "list"])]
    results = [{"tool_name": "list"}, {"tool_name": "look"}, {}]
    turn = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": "done", **result} for result in results),
    ]
    own = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "mine", **calls[0]}]},
        {"role": "tool", "content": "done", "tool_call_id": "mine"},
    ]
    messages = [{"role": "user", "content": "hello"}, *turn, *turn, *own]
    assert sdk.post("/api/chat", {"model": "gpt", "stream": False, "messages": messages}).status_code == 200
    said = provider.last.body["messages"]
    called = [call["id"] for message in said for call in message.get("tool_calls", ())]
    answered = [message["tool_call_id"] for message in said if message["role"] == "tool"]
    assert len(set(called)) == 7 and called[6] == "mine"
    assert answered == [called[at] for at in (2, 0, 1, 5, 3, 4, 6)]


@pytest.mark.parametrize("mode", ["sdk", "binary"])
def test_a_conversation_id_is_sent_on_where_that_is_wanted(provider: Provider, mode: str) -> None:
    config = config_for(provider)
    wanted = {"from_headers": ["x-claude-code-session-id", "session_id"], "inject_header": "x-sm-conversation-id"}
    config["user_id_mappings"]["conversation"] = wanted
    running = Proxy(config, "--mode", mode, "--litellm-url", provider.url)
    cases: list[tuple[dict[str, str], str | None]] = [
        ({"session_id": "s-1"}, "s-1"),
        ({"session_id": "s-1", "x-claude-code-session-id": "c-1"}, "c-1"),
        ({"x-claude-code-session-id": "no good", "session_id": "s-2"}, "s-2"),
        ({"x-sm-conversation-id": "forged"}, None),
        ({}, None),
    ]
    for headers, conversation in cases:
        assert running.chat(headers=headers).status_code == 200
        assert provider.last.header("x-sm-conversation-id") == conversation
    assert running.stop() == 0


def test_the_route_of_a_client_that_is_not_at_hand_can_be_asked_for(sdk: Proxy, forward: Proxy) -> None:
    for running in (sdk, forward):
        asked = lambda query, running=running: running.client.get(f"/memory-routing/info?{query}").json()  # noqa: E731
        assert asked("user-agent=claude-cli/2.1%20(external)")["user_id"] == "claude-code"
        assert asked("X-Project=shop&user-agent=other")["matched_pattern"]["header"] == "x-project"
        assert asked("x-memory-user-id=me")["custom_header_present"] is True
        assert asked("user-agent=")["is_default"] is True


def test_an_error_event_reaches_every_dialect_in_the_providers_words(provider: Provider) -> None:
    """LiteLLM puts its own names before some, fails over others, and ends as if there were none."""
    said = {"type": "overloaded_error", "message": "the provider is on fire"}
    ends = {MESSAGES: sse({"type": "error", "error": said}, "error")}

    def script(got: Got) -> Reply:
        usual = usual_answer(got)
        return Reply(parts=[*(usual.parts or [])[:4], ends.get(got.path, sse({"error": said}))], headers=SSE)

    provider.script = script
    running = Proxy(config_for(provider, model("vllm", "hosted_vllm/x", f"{provider.url}/v1")))
    for path in (CHAT, MESSAGES, RESPONSES, "/v1/completions"):
        for name in ("gpt", "claude", "vllm"):
            body = {"prompt": "hello"} if path == "/v1/completions" else body_for(path, name)
            answer = running.post(path, {**body, "model": name, "stream": True})
            assert answer.status_code == 200, answer.text
            last = json.loads(events_of(answer)[-2 if path == RESPONSES else -1][1])
            assert (last["error"]["type"], last["error"]["message"]) == tuple(said.values()), (path, name, answer.text)
    assert running.stop() == 0


def test_an_error_in_mid_stream_is_logged_and_counted_as_one(sdk: Proxy, provider: Provider) -> None:
    provider.script = lambda _got: Reply(parts=openai_stream(["a", "b"])[:2], headers=SSE, cut=True)
    response = sdk.chat(stream=True)
    assert response.status_code == 200 and log_line(sdk, response.headers["x-request-id"])["status"] >= 500


def test_why_a_forwarded_answer_breaks_off_is_logged(forward: Proxy, provider: Provider) -> None:
    provider.script = lambda _got: Reply(parts=openai_stream(["a", "b"])[:2], headers=SSE, cut=True)
    with forward.client.stream("POST", CHAT, json=chat_body()) as response, pytest.raises(httpx.RemoteProtocolError):
        response.read()
    assert response.status_code == 200
    said = log_line(forward, response.headers["x-request-id"])
    assert said["event"] == "broken_off"
    assert said["message"] == "the LiteLLM server broke off its answer: the body ends early"


def test_the_memory_services_failure_is_seen(sdk: Proxy, forward: Proxy, provider: Provider) -> None:
    ways = ((sdk, "x-supermemory-error"), (forward, "llm_provider-x-supermemory-error"))
    for running, name in ways:
        provider.script = lambda got, name=name: Reply(usual_answer(got).body, headers={name: "quota exceeded"})
        response = running.chat()
        assert log_line(running, response.headers["x-request-id"])["memory_error"] == "quota exceeded"
        health = running.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert health.json()["checks"]["memory_service"]["status"] == "degraded"
        working = {name.replace("error", "chunks-retrieved"): "2"}
        provider.script = lambda got, working=working: Reply(usual_answer(got).body, headers=working)
        running.chat()
        assert running.client.get("/health").json()["status"] == "healthy"


ODD_USAGES: list[Any] = ["text", [1], 5, {"input_tokens": "abc", "output_tokens": 2}, {"input_tokens": float("nan")}]
ODD_USAGES += [{"input_tokens": -5, "output_tokens": 10**400}, {"prompt_tokens": None, "completion_tokens": [1]}, {}]


@pytest.mark.parametrize("usage", ODD_USAGES, ids=lambda usage: str(usage)[:30])
def test_odd_usage_figures_cost_nobody_the_answer(sdk: Proxy, provider: Provider, usage: Any) -> None:
    def script(got: Got) -> Reply:
        usual = usual_answer(got)
        if usual.parts is None:
            return Reply(json.dumps({**json.loads(usual.body), "usage": usage}).encode())
        pattern = rb'"usage": \{[^}]*\}'
        said = b'"usage": ' + json.dumps(usage).encode()
        return Reply(parts=[re.sub(pattern, lambda _: said, part) for part in usual.parts], headers=SSE)

    provider.script = script
    for stream in (False, True):
        answer = sdk.messages(stream=stream)
        assert answer.status_code == 200 and "lo" in answer.text
        log_line(sdk, answer.headers["x-request-id"])
    wait_until(lambda: samples_of(sdk)["memory_proxy_requests_in_flight"] == 1)
    figures = [value for name, value in samples_of(sdk).items() if "tokens" in name or "cost" in name]
    assert all(0 <= value < 1e12 for value in figures)


@pytest.mark.parametrize("cost", ["NaN", "-5", "1e309", "none", ""])
def test_odd_costs_are_no_costs(forward: Proxy, provider: Provider, cost: str) -> None:
    provider.script = lambda got: Reply(usual_answer(got).body, headers={"x-litellm-response-cost": cost})
    answer = forward.chat()
    assert log_line(forward, answer.headers["x-request-id"])["cost_usd"] is None
    assert "NaN" not in forward.client.get("/memory-routing/stats").text


def test_the_cost_is_the_servers_and_not_that_of_another_server_behind_it(forward: Proxy, provider: Provider) -> None:
    stated = {"x-litellm-response-cost": "0.5", "llm_provider-x-litellm-response-cost": "0.25"}
    for headers in (stated, dict(reversed(stated.items()))):
        provider.script = lambda got, headers=headers: Reply(usual_answer(got).body, headers=headers)
        answer = forward.chat()
        assert log_line(forward, answer.headers["x-request-id"])["cost_usd"] == 0.5


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_hostile_names_spoil_neither_log_nor_metrics(
    request: pytest.FixtureRequest, provider: Provider, mode: str
) -> None:
    running: Proxy = request.getfixturevalue(mode)
    names = ["\ud83d", PROVIDER_KEY, "sk-abcdefgh12345678", 'say "Bearer abc" now', "x" * 100_000, 'api_key=x"']
    for number, name in enumerate(names):
        data = json.dumps(chat_body(name)).encode()
        identity = f'api_key={number}"'
        running.client.post(
            CHAT, content=data, headers={"x-request-id": identity, "x-memory-user-id": f"sk-secret-{number}"}
        )
    cut_through = f"/{'.' * (proxy.MAX_LOGGED - 9)}/sk-secret-path"
    shown_path = log_line(running, running.client.get(cut_through).headers["x-request-id"])["path"]
    assert shown_path.startswith("/...") and "sk" not in shown_path and len(shown_path) <= proxy.MAX_LOGGED
    wait_until(lambda: samples_of(running)["memory_proxy_requests_in_flight"] == 1)
    for shown in (running.client.get("/metrics").text, running.client.get("/memory-routing/stats").text):
        assert (
            PROVIDER_KEY not in shown and "sk-abc" not in shown and "sk-secret" not in shown and "x" * 201 not in shown
        )
    for line in running.lines:
        assert line.startswith("ready: ") or json.loads(line)
        assert len(line) < 20_000 and "sk-secret" not in line


def test_output_that_nobody_reads_holds_up_no_request(shared_provider: Provider, provider: Provider) -> None:
    config = Path(tempfile.mkdtemp()) / "config.yaml"
    config.write_text(yaml.safe_dump(config_for(shared_provider)))
    port = free_port()
    line = [sys.executable, str(MODULE), "--config", str(config), "--mode", "binary", "--litellm-url", provider.url]
    with subprocess.Popen(
        [*line, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()
    ) as process:
        wait_until(lambda: not refuses_connections(port))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert {client.post(CHAT, json=chat_body()).status_code for _ in range(600)} == {200}
            assert client.get("/health").status_code == 200
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">/dev/full", "2>/dev/full"])
def test_output_that_is_closed_or_full_is_no_reason_to_stop(shared_provider: Provider, closed: str) -> None:
    config = Path(tempfile.mkdtemp()) / "config.yaml"
    config.write_text(yaml.safe_dump(config_for(shared_provider)))
    port = free_port()
    command = f'exec "{sys.executable}" "{MODULE}" --config "{config}" --mode binary --port {port}'
    command += f" --litellm-url {shared_provider.url} {closed}"
    with subprocess.Popen(
        ["sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment()
    ) as process:
        wait_until(lambda: not refuses_connections(port))
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
        process.terminate()
        assert process.wait(20) == 0


def test_a_request_is_one_readable_line_on_a_terminal(shared_provider: Provider, provider: Provider) -> None:
    master, terminal = os.openpty()
    running = Proxy(config_for(shared_provider), "--mode", "sdk", terminal=terminal)
    running.chat(headers={"x-request-id": "r-1", "user-agent": "claude-cli/2"})
    running.chat("no\u001b[31m\u009bsuch", headers={"x-request-id": "r-2"})
    running.stop()
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(master, 65536):
            shown += piece
    lines = [line for line in shown.decode().splitlines() if "id=r-" in line]
    pattern = r"\d\d:\d\d:\d\d info     claude-code  gpt  sdk  200  3\+2 tokens  \d+\.\d\d s  id=r-1"
    assert re.fullmatch(pattern, lines[0]) and "no?[31m?such  sdk  4" in lines[1]


# ── binary backend ───────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_forwarded_is_what_was_sent(forward: Proxy, provider: Provider) -> None:
    body = b'{"model":  "gpt", "unicode": "\xc3\xbc"}'
    head = (
        b"POST /some//path/%%2F?a=1&&b=%%20 HTTP/1.1\r\nHost: proxy.localhost\r\nX-B: 1\r\nx-a: two\r\nX-b:3\r\n"
        b"Authorization: Bearer client\r\nX-Sm-User-Id: evil\r\nx-memory-user-id: mine\r\nKeep-Alive: 5\r\n"
        b"Connection: close, x-hop\r\nx-hop: 1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    answer = forward.raw(head + body)
    got = provider.last
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and (got.method, got.path) == (
        "POST",
        "/some//path/%2F?a=1&&b=%20",
    )
    assert got.raw == body
    assert got.headers == [
        ("Host", f"127.0.0.1:{provider.port}"),
        ("X-B", "1"),
        ("x-a", "two"),
        ("X-b", "3"),
        ("Authorization", "Bearer client"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("x-sm-user-id", "mine"),
        ("x-request-id", str(got.header("x-request-id"))),
    ]
    assert b"x-supermemory-conversation-id: conv-1" in answer and b"set-cookie: session=abc" in answer


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_every_method_and_path_is_forwarded(forward: Proxy, provider: Provider, method: str) -> None:
    assert forward.client.request(method, "/health/readiness?x=1").status_code == 200
    assert (provider.last.method, provider.last.path) == (method, "/health/readiness?x=1")


def test_a_redirect_of_the_server_leads_through_the_proxy(binary: Proxy, provider: Provider) -> None:
    headers = {"user-agent": "claude-cli/2"}
    answer = binary.client.post("/v1/chat/completions/", json=chat_body(), headers=headers, follow_redirects=True)
    assert (answer.status_code, answer.url) == (200, f"{binary.url}/v1/chat/completions")
    assert answer.history and provider.last.header("x-sm-user-id") == "claude-code"


@pytest.mark.parametrize("prefix", ["", "/base"])
def test_other_redirects_stay_as_they_are(provider: Provider, prefix: str) -> None:
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url + prefix)
    own, secure = provider.url + prefix, provider.url.replace("http:", "HTTPS:") + prefix
    places = {f"{own}/a?b=/c": "/a?b=/c", f"{secure}/a": "/a", own: "/", f"{prefix}/a": "/a"}
    for place in (f"{own}//other.example/a", f"{provider.url}0/a", "http://other.example/a", "//other.example/a", "a"):
        places[place] = place
    for place, shown in places.items():
        provider.script = lambda _got, place=place: Reply(status=302, headers={"location": place})
        assert running.client.get("/ui").headers["location"] == shown
    assert running.stop() == 0


def test_a_head_answer_keeps_its_length_and_has_no_body(forward: Proxy, provider: Provider) -> None:
    answer = forward.raw(b"HEAD /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    length = len(usual_answer(Got("HEAD", "/x", [], b"")).body)
    assert f"content-length: {length}".encode() in answer and answer.endswith(b"\r\n\r\n")


def test_chunked_bodies_are_forwarded_as_chunked(forward: Proxy, provider: Provider) -> None:
    for content_type in ("application/json", "multipart/form-data; boundary=b"):
        data = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
        data += b"Content-Type: %b\r\n\r\n"
        provider.script = lambda _got: Reply(b"{}")
        assert b" 200 " in forward.raw(data % content_type.encode() + b"3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n")
        assert provider.last.raw == b"[1,2]" and provider.last.header("transfer-encoding") == "chunked"


def test_compressed_answers_come_back_as_they_are(forward: Proxy, provider: Provider) -> None:
    packed = gzip.compress(b'{"a": 1}')
    provider.script = lambda _got: Reply(packed, headers={"content-encoding": "gzip"})
    answer = forward.raw(
        b"GET /x HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip, br\r\nConnection: close\r\n\r\n"
    )
    assert answer.endswith(b"\r\n\r\n" + packed) and provider.last.header("accept-encoding") == "gzip, br"


class ScriptedServer:
    """An upstream by the byte: ``script`` gets each connection, and its number from 0."""

    def __init__(self, script: Callable[[socket.socket, int], None]) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.count = 0
        self._script = script
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self.server.accept()[0]
                threading.Thread(target=self._serve, args=(sock, self.count), daemon=True).start()
                self.count += 1

    def _serve(self, sock: socket.socket, number: int) -> None:
        with sock, contextlib.suppress(OSError):
            self._script(sock, number)


@contextlib.contextmanager
def in_front_of(
    script: Callable[[socket.socket, int], None], **sections: Any
) -> Iterator[tuple[Proxy, ScriptedServer]]:
    upstream = ScriptedServer(script)
    config = {"model_list": [model("gpt", "openai/x", "http://h")], **sections}
    running = Proxy(config, "--mode", "binary", "--litellm-url", upstream.url)
    try:
        yield running, upstream
    finally:
        upstream.server.close()
        assert running.stop() == 0
        assert "Traceback (most" not in running.output


def read_head(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    return data


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_a_stale_connection_is_replaced_without_the_client_noticing() -> None:
    def script(sock: socket.socket, number: int) -> None:
        read_head(sock)
        sock.sendall(OK)
        if number == 0:  # closed right after its answer: found readable when it is taken again
            return
        if number == 1:  # closed on the second request: found out by the missing answer
            read_head(sock)
            return
        while read_head(sock):
            sock.sendall(OK)

    with in_front_of(script) as (running, upstream):
        for count in (1, 2, 3, 3):
            assert running.client.get("/x").text == "ok"
            time.sleep(0.1)
            assert upstream.count == count


def test_an_answer_that_nobody_asked_for_reaches_nobody() -> None:
    asked = threading.Event()

    def script(sock: socket.socket, number: int) -> None:
        while read_head(sock):
            sock.sendall(OK)
            if number == 0:
                time.sleep(0.02)
                sock.sendall(OK.replace(b"ok", b"no"))
                asked.set()

    with in_front_of(script) as (running, upstream):
        assert running.client.get("/x").text == "ok"
        assert asked.wait(10)
        assert running.client.get("/x").text == "ok" and upstream.count == 2


def test_connections_to_the_server_are_pooled(forward: Proxy) -> None:
    def script(sock: socket.socket, _number: int) -> None:
        while read_head(sock):
            time.sleep(0.005)
            sock.sendall(OK)

    with in_front_of(script) as (running, upstream):
        for _ in range(50):
            assert running.client.get("/x").text == "ok"
        assert upstream.count == 1
        with ThreadPoolExecutor(20) as pool:
            assert {r.text for r in pool.map(lambda _: running.client.get("/x"), range(200))} == {"ok"}
        assert upstream.count <= 20


def test_expect_100_continue_is_passed_on_both_ways() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        head = read_head(sock)
        if b"/refuse" in head:
            sock.sendall(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
            return
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert sock.recv(100) == b"hello"
        sock.sendall(OK)

    with in_front_of(script) as (running, _):
        for path, expected in (("/take", [b" 100 ", b" 200 "]), ("/refuse", [b" 417 "])):
            with socket.create_connection(("127.0.0.1", running.port), 5) as sock:
                fields = (
                    "Host: localhost\r\nExpect: 100-continue\r\nContent-Type: multipart/form-data\r\nContent-Length: 5"
                )
                sock.sendall(f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
                assert expected[0] in read_head(sock)
                if len(expected) > 1:
                    sock.sendall(b"hello")
                    assert expected[1] in read_head(sock)


def test_a_hint_before_the_100_does_not_keep_an_upload_waiting() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert sock.recv(100) == b"hello"
        sock.sendall(OK)

    head = b"POST /up HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with in_front_of(script) as (running, _):
        received = running.raw(head + b"Content-Type: multipart/form-data\r\nContent-Length: 5\r\n\r\nhello")
    assert re.findall(rb"HTTP/1\.1 (\d+) ", received) == [b"103", b"100", b"200"]


def test_an_interim_response_does_not_end_an_upload() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        head = read_head(sock)
        interim = b"HTTP/1.1 100 Continue\r\n\r\n" if b"Expect" in head else b"HTTP/1.1 103 Early Hints\r\n\r\n"
        time.sleep(1.3 if b"Expect" in head else 0)
        sock.sendall(interim)
        left = 8_000_000 - len(head.partition(b"\r\n\r\n")[2])
        while left > 0:
            left -= len(sock.recv(65536))
        sock.sendall(OK)

    with in_front_of(script) as (running, _):
        for content_type in ("application/json", "multipart/form-data"):
            for headers in ({}, {"Expect": "100-continue"}):
                body = b"x" * 8_000_000
                fields = {"content-type": content_type, **headers}
                assert running.client.post("/up", content=body, headers=fields).text == "ok"


def test_an_early_refusal_of_an_upload_reaches_the_client() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        time.sleep(1)

    with in_front_of(script) as (running, _):
        response = running.client.post("/up", content=b"x" * 8_000_000, headers={"content-type": "text/plain"})
        assert response.status_code == 413


def test_an_empty_chunked_form_and_bytes_that_are_no_json_are_forwarded(forward: Proxy, provider: Provider) -> None:
    provider.script = lambda _got: Reply(b"{}")
    head = (
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    )
    assert b" 200 " in forward.raw(head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert provider.last.raw == b""
    blob = b"\x00\xff\\u\x00"
    headers = {"content-type": "application/octet-stream"}
    assert forward.client.post("/x", content=blob, headers=headers).status_code == 200
    assert provider.last.raw == blob


def test_a_websocket_under_load_in_both_directions_does_not_lock_up() -> None:
    size = 20_000_000

    def script(sock: socket.socket, _number: int) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        sock.sendall(b"y" * size)  # all of it before it reads
        left = size
        while left > 0:
            left -= len(sock.recv(65536))
        sock.sendall(b"end")

    with in_front_of(script) as (running, _), socket.create_connection(("127.0.0.1", running.port), 20) as sock:
        sock.sendall(b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        read_head(sock)
        sender = threading.Thread(target=sock.sendall, args=(b"z" * size,), daemon=True)
        sender.start()
        tail = b""
        while not tail.endswith(b"end"):
            tail = (tail + sock.recv(65536))[-10:]
        sender.join(5)


def test_a_websocket_whose_client_resets_while_the_server_is_busy_costs_nothing() -> None:
    (client, left), (right, server) = tcp_pair(), tcp_pair()
    client.setblocking(False)
    tunnel = threading.Thread(target=proxy.pump, args=(left, right), daemon=True)
    tunnel.start()
    for _ in range(5):  # until nobody takes more
        with contextlib.suppress(BlockingIOError):
            while client.send(b"x" * 65536):
                pass
        time.sleep(0.1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    spent = time.process_time()
    time.sleep(1)
    assert time.process_time() - spent < 0.5
    server.setblocking(False)

    def over() -> bool:
        with contextlib.suppress(BlockingIOError):
            server.recv(65536)
        return not tunnel.is_alive()

    wait_until(over)


def test_a_websocket_flows_both_ways_after_its_101() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        head = read_head(sock).lower()
        assert b"connection: upgrade" in head and b"upgrade: websocket" in head and b"sec-websocket-key: k" in head
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nfirst")
        while data := sock.recv(100):
            sock.sendall(data.upper())

    with in_front_of(script) as (running, _), socket.create_connection(("127.0.0.1", running.port), 5) as sock:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k"
        sock.sendall(b"GET /ws HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n\r\n")
        assert read_head(sock).startswith(b"HTTP/1.1 101 ")
        for word in (b"hello", b"again"):
            sock.sendall(word)
            received = b""
            while word.upper() not in received:
                received += sock.recv(100)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", 502),
        (b"HTTP/1.1 2\r\n\r\n", 502),
        (b"HTTP/1.1 000 Nothing\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nBad : x\r\n\r\n", 502),
        (b"garbage\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Le", 502),
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", 502),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000, 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nBad : x\r\n\r\n", 502),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n", 204),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", 200),
        (b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK, 200),
    ],
)
def test_whatever_the_server_answers_is_an_answer(answer: bytes, status: int) -> None:
    def script(sock: socket.socket, _number: int) -> None:
        read_head(sock)
        sock.sendall(answer)

    with in_front_of(script) as (running, _):
        received = running.raw(b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        statuses = [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+) ", received)]
        assert statuses[-1] == status
        if status in proxy.NO_BODY_STATUS:  # RFC 9110 §8.6
            assert (b"Content-Length" in received) == (status == 304)
        if status == 502:
            said = json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
            assert "the LiteLLM server" in said and "the request" not in said
        if b"until" in answer:
            assert b"until the end" in received


def test_a_silent_server_is_a_504() -> None:
    settings = {"request_timeout": 1, "num_retries": 0}
    with in_front_of(lambda sock, _n: time.sleep(20), litellm_settings=settings) as (running, _):
        response = running.client.post("/v1/messages", json={})
        assert response.status_code == 504 and response.json()["type"] == "error"


def test_an_answer_that_breaks_off_is_not_passed_off_as_whole() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        path = read_head(sock).split()[1]
        if path == b"/chunked":
            sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        else:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")

    with in_front_of(script) as (running, _):
        for path in ("/chunked", "/length"):
            with pytest.raises(httpx.RemoteProtocolError):
                running.client.get(path)


def test_a_reset_is_not_the_end_of_an_answer() -> None:
    begun = threading.Event()

    def script(sock: socket.socket, _number: int) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
        assert begun.wait(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with in_front_of(script) as (running, _), running.client.stream("GET", "/x") as response:
        pieces = response.iter_raw()
        assert next(pieces) == b"hello"
        begun.set()
        with pytest.raises(httpx.RemoteProtocolError):
            next(pieces)


def test_while_the_server_is_down_clients_are_told_to_come_back() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    running = Proxy({"model_list": [model("a", "openai/a", "http://h")]}, "--mode", "binary", "--litellm-url", nobody)
    for path, key in (("/v1/chat/completions", "error"), ("/v1/messages", "type")):
        response = running.client.post(path, json={})
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0 and key in response.json()
    assert running.stop() == 0


@pytest.mark.parametrize("kind", ["whole", "before the first token", "in mid-stream"])
def test_a_client_that_leaves_ends_the_forwarded_call(forward: Proxy, provider: Provider, kind: str) -> None:
    check_hang_up(forward, provider, "/v1/chat/completions", {**chat_body(), "stream": True}, kind)


def test_a_slow_client_holds_back_the_forwarded_stream(forward: Proxy, provider: Provider) -> None:
    check_slow_client(forward, provider, "/v1/messages", {**messages_body(), "stream": True})


@pytest.mark.parametrize(
    "body",
    [
        {"extra_headers": {"x-sm-user-id": "evil"}},
        {"provider_specific_header": {"custom_llm_provider": "openai", "extra_headers": {"x-sm-user-id": "evil"}}},
        {"fallbacks": [{"model": "gpt", "extra_headers": {"x-sm-user-id": "evil"}}]},
    ],
)
def test_a_body_cannot_replace_the_memory_header(forward: Proxy, provider: Provider, body: dict[str, Any]) -> None:
    plain = json.dumps({**chat_body(), **body})
    escaped = plain.replace("extra_headers", "extra\\u005fheaders")
    for text in (plain, escaped):
        for content_type in ("application/json", "text/plain"):
            response = forward.client.post("/v1/chat/completions", content=text, headers={"content-type": content_type})
            assert response.status_code == 400
    assert not provider.got
    talk = {**chat_body(), "messages": [{"role": "user", "content": "what are extra_headers?"}]}
    assert forward.client.post("/v1/chat/completions", json=talk).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Type: application/json; x=form",
        "Content-Type: application/xform",
        "Content-Type: application/json\r\nContent-Type: multipart/form-data",
        "Content-Type: multipart/form-data\r\nContent-Type: application/json",
    ],
)
def test_no_content_type_hides_a_body_that_replaces_the_memory_header(
    forward: Proxy, provider: Provider, fields: str
) -> None:
    body = json.dumps({**chat_body(), "extra_headers": {"x-sm-user-id": "evil"}}).encode()
    fields += f"\r\nContent-Length: {len(body)}\r\nConnection: close"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n"
    assert forward.raw(head.encode() + body).startswith(b"HTTP/1.1 400 ") and not provider.got


def test_a_connection_header_cannot_unframe_a_body(forward: Proxy, provider: Provider) -> None:
    provider.script = lambda _got: Reply(b"{}")
    inner = b"GET /smuggled HTTP/1.1\r\nHost: z\r\n\r\n"
    head = b"POST /v1/a HTTP/1.1\r\nHost: localhost\r\nConnection: close, content-length, host, content-type\r\n"
    forward.raw(head + b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner)
    assert [(got.path, got.raw) for got in provider.got] == [("/v1/a", inner)]
    assert provider.last.header("host") and provider.last.header("content-type") == "text/plain"


def test_a_call_that_the_server_broke_off_is_not_made_again() -> None:
    seen = []

    def script(sock: socket.socket, number: int) -> None:
        while head := read_head(sock):
            seen.append(head.split()[1])
            if head.split()[1] == b"/pay":
                time.sleep(1)
                return
            time.sleep(0.1)
            sock.sendall(OK)

    with in_front_of(script) as (running, _), ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda _: running.client.get("/warm"), range(5)))
        assert running.client.post("/pay").status_code == 502
        assert seen.count(b"/pay") == 1


@pytest.mark.parametrize("after", [b"\r\n", b"GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_a_client_that_leaves_behind_its_next_request_is_noticed(
    request: pytest.FixtureRequest, provider: Provider, mode: str, after: bytes
) -> None:
    provider.script = lambda _got: Reply(b"{}", hold=30)
    data = json.dumps(chat_body()).encode()
    with socket.create_connection(("127.0.0.1", request.getfixturevalue(mode).port), 10) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        got = provider.wait_for()
        sock.sendall(after)
        time.sleep(0.2)
    assert got.gone.wait(2)


def test_the_head_of_a_stream_does_not_wait_for_its_body(forward: Proxy, provider: Provider) -> None:
    def parts() -> Iterator[bytes]:
        time.sleep(1.5)
        yield b"late"

    provider.script = lambda _got: Reply(parts=parts(), headers=SSE)  # type: ignore[arg-type]
    began = time.monotonic()
    with forward.client.stream("GET", "/stream") as response:
        assert response.status_code == 200 and time.monotonic() - began < 1
        assert response.read() == b"late"


def test_binary_mode_reaches_the_provider_through_a_real_litellm_server(binary: Proxy, provider: Provider) -> None:
    for path, name in DIALECTS:
        for stream in (False, True):
            headers = {
                "user-agent": "claude-cli/2.1",
                "x-sm-user-id": "evil",
                "anthropic-beta": "context-1m-2025-08-07",
            }
            response = binary.post(path, body_for(path, name, stream=stream), headers=headers)
            assert response.status_code == 200, response.text
            assert provider.last.header("x-sm-user-id") == "claude-code"
            if stream:
                assert events_of(response)[-1][0 if path.endswith("messages") else 1] in ("message_stop", "[DONE]")
    assert binary.client.get("/v1/models").json()["data"]
    assert any("waiting for the LiteLLM server" in line for line in binary.lines)


def server_pid(running: Proxy) -> int:
    """The process id of the LiteLLM server under a running proxy."""
    found = subprocess.run(["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True)
    return int(found.stdout.split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no thread chooses its core")
def test_the_threads_of_requests_share_a_core_and_the_litellm_server_has_them_all(binary: Proxy, sdk: Proxy) -> None:
    def cores(running: Proxy) -> dict[int, set[int]]:
        tasks = [int(task.name) for task in Path(f"/proc/{running.process.pid}/task").iterdir()]
        return {task: os.sched_getaffinity(task) for task in tasks}

    everywhere = os.sched_getaffinity(0)
    for running, expected in ((binary, 3), (sdk, 4)):  # the log's thread, the accepting one, a connection's, the loop's
        assert running.client.get("/health").status_code == 200
        found = cores(running)
        assert found.pop(running.process.pid) == everywhere
        home = min(found.values(), key=len)
        assert len(home) == 1 and list(found.values()).count(home) >= expected
    assert os.sched_getaffinity(server_pid(binary)) == everywhere


def test_a_litellm_server_is_stopped_where_its_copy_of_the_config_cannot_be_removed(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9")]})
    (tmp_path / "file").touch()
    config = replace(proxy.load_config(path), path=str(tmp_path / "file" / "config.yaml"))
    log = proxy.Log(io.StringIO(), as_json=True, redact=proxy.Redactor())
    server = proxy.LitellmServer(config, free_port(), log)
    server.start()
    wait_until(lambda: server._process)
    server.stop()


def test_a_litellm_server_that_the_system_does_not_start_is_tried_again(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9")]})
    config = proxy.load_config(path)
    environment = {**config.environment, "LARGE": "x" * 4_000_000}  # Linux takes 128 KiB each, macOS 1 MiB in all
    server = proxy.LitellmServer(replace(config, environment=environment), free_port(), quiet_log())
    server.start()
    with pytest.raises(proxy.StartError, match="Argument list too long"):
        server.wait(lambda: False)
    server.config = config
    wait_until(lambda: server._process)
    server.stop()


def test_who_has_the_litellm_servers_port_is_not_taken_for_it(tmp_path: Path, provider: Provider) -> None:
    config = proxy.load_config(write_config(tmp_path, config_for(provider)))
    stranger = Provider()  # it says 200 to whatever it is asked
    server = proxy.LitellmServer(config, stranger.port, quiet_log())
    server._thread.start()  # without a look at the port, as after the server's death
    try:
        with pytest.raises(proxy.StartError, match=f"port {stranger.port} is taken"):
            server.wait(lambda: False)
        taken = f"the LiteLLM server cannot be started: port {stranger.port} is taken by another process"
        assert server.down() == taken and not server._process and not stranger.got
        stranger.server.shutdown()
        stranger.server.server_close()
        wait_until(lambda: server._process)
        assert server.down() == "the LiteLLM server is starting; try again in a few seconds"
    finally:
        server.stop()


def test_a_litellm_server_that_dies_under_load_is_started_again(binary: Proxy, provider: Provider) -> None:
    with Load(binary, rate=20) as load:
        load.wait_for("binary")
        os.kill(server_pid(binary), signal.SIGKILL)
        wait_until(lambda: binary.chat().status_code == 503)
        response = binary.messages()
        assert int(response.headers["retry-after"]) > 0 and response.json()["type"] == "error"
        assert binary.client.get("/health").status_code == 503
        wait_until(lambda: binary.chat().status_code == 200, 90)
    assert load.failed and all(said.startswith(("503 ", "502 ")) for said in load.failed), "each is told at once"
    assert binary.client.get("/health").json()["checks"]["litellm_server"]["status"] == "healthy"


def test_no_litellm_server_outlives_a_killed_proxy(shared_provider: Provider) -> None:
    port = str(free_port())
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-port", port)
    child = server_pid(running)
    assert not refuses_connections(port)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: refuses_connections(port), 5)
    wait_until(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text(), 5)
    assert not list(running.config.parent.glob("config.yaml.*.yaml")), "its copy of the config has gone with it"


def refuses_connections(port: int | str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(port)), 1).close()
    except OSError:
        return True
    return False


# ── failover ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Pair:
    """A proxy with an SDK side, whose provider is ``first``, and a binary side, played by ``second``."""

    proxy: Proxy
    first: Provider
    second: Provider

    def breaker(self) -> dict[str, Any]:
        health = self.proxy.client.get("/health")
        assert health.status_code == 200
        row: dict[str, Any] = health.json()["checks"]["circuit_breaker"]
        assert health.json()["status"] == row["status"]
        return row


@contextlib.contextmanager
def pair(*arguments: str, breaker: dict[str, Any] | None = None, **sections: Any) -> Iterator[Pair]:
    first, second = Provider(), Provider()
    general = {"forward_client_headers_to_llm_api": True, "experimental": {"circuit_breaker": breaker or {}}}
    twice = [model("twice", f"openai/gpt-{name}", f"{first.url}/v1") for name in ("one", "two")]
    config = config_for(first, *twice, general_settings=general, **sections)
    running = Proxy(config, "--mode", "sdk", "--litellm-url", second.url, *arguments)
    try:
        yield Pair(running, first, second)
    finally:
        assert running.stop() == 0
        assert "Traceback (most" not in running.output


def hang_up(_got: Got) -> Reply:
    """The provider closes the connection without a word."""
    raise ConnectionResetError


def status_reply(status: int) -> Callable[[Got], Reply]:
    return lambda _got: Reply(b'{"error": {"message": "as scripted", "type": "t"}}', status)


@pytest.fixture(scope="module")
def failing_pair() -> Iterator[Pair]:
    """A pair whose breaker does not open during the tests that share it."""
    with pair(breaker={"failure_threshold": 1000}) as made:
        made.proxy.kept()
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_what_fails_on_the_sdks_side_is_repeated_on_the_binary_side(
    failing_pair: Pair, path: str, name: str, stream: bool
) -> None:
    failing_pair.first.script = hang_up
    failing_pair.second.script = usual_answer
    failing_pair.second.got.clear()
    answer = failing_pair.proxy.post(path, body_for(path, name, stream=stream), headers={"user-agent": "claude-cli/2"})
    assert answer.status_code == 200 and answer.headers["x-proxy-backend"] == "binary"
    got = failing_pair.second.wait_for(1)
    assert (got.path, got.body["model"], got.header("x-sm-user-id")) == (path, name, "claude-code")
    assert len(failing_pair.second.got) == 1
    assert log_line(failing_pair.proxy, answer.headers["x-request-id"])["event"] == "repeated"


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("said", [[], [b": hi\n\n"], [PING, b": hi\r\n\r\n"]])
@pytest.mark.parametrize(("path", "name"), [*DIALECTS, (RESPONSES, "gpt"), (RESPONSES, "claude")])
def test_a_stream_that_ends_before_its_first_event_is_repeated(
    failing_pair: Pair, path: str, name: str, said: list[bytes], cut: bool
) -> None:
    failing_pair.first.script = lambda _got: Reply(parts=said if name == "claude" else said[-1:], headers=SSE, cut=cut)
    failing_pair.second.script = usual_answer
    before = failing_pair.breaker()["failures"]
    answer = failing_pair.proxy.post(path, body_for(path, name, stream=True))
    assert (answer.status_code, answer.headers["x-proxy-backend"]) == (200, "binary")
    assert failing_pair.breaker()["failures"] == before + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), [*DIALECTS, (RESPONSES, "gpt"), (RESPONSES, "claude")])
def test_a_web_page_in_an_answers_place_is_repeated(failing_pair: Pair, path: str, name: str, stream: bool) -> None:
    failing_pair.first.script = lambda _got: Reply(b"<html>welcome</html>", 200, {"content-type": "text/html"})
    failing_pair.second.script = usual_answer
    before = failing_pair.breaker()["failures"]
    answer = failing_pair.proxy.post(path, body_for(path, name, stream=stream))
    assert (answer.status_code, answer.headers["x-proxy-backend"]) == (200, "binary"), answer.text
    assert failing_pair.breaker()["failures"] == before + 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 502, 503, 529])
def test_a_providers_own_error_is_not_repeated_and_does_not_count(failing_pair: Pair, status: int) -> None:
    failing_pair.first.script = status_reply(status)
    failing_pair.second.got.clear()
    before = failing_pair.breaker()["failures"]
    answer = failing_pair.proxy.chat()
    assert (answer.status_code, answer.headers["x-proxy-backend"]) == (status, "sdk")
    assert "as scripted" in answer.text and not failing_pair.second.got
    assert failing_pair.breaker()["failures"] in (0, before)


def test_what_the_router_lets_cool_down_is_repeated_and_does_not_count() -> None:
    settings = {"allowed_fails": 0, "num_retries": 0, "cooldown_time": 600}
    with pair(breaker={"failure_threshold": 1000}, router_settings=settings) as both:
        both.first.script = hang_up

        def rests() -> bool:
            both.first.got.clear()
            both.proxy.chat("twice")
            return not both.first.got

        wait_until(rests)
        both.second.got.clear()
        before = both.breaker()["failures"]
        answer = both.proxy.chat("twice")
        assert (answer.status_code, answer.headers["x-proxy-backend"]) == (200, "binary"), answer.text
        assert len(both.second.got) == 1
        assert both.breaker()["failures"] == before
        for status in (429, 503):
            both.second.script = status_reply(status)
            answer = both.proxy.chat("twice")
            assert (answer.status_code, answer.headers["x-proxy-backend"]) == (429, "sdk")
            assert int(answer.headers["retry-after"]) > 0
        both.second.script = status_reply(400)
        assert both.proxy.chat("twice").status_code == 400, "a provider's word is better"
        assert both.breaker()["failures"] == before and not both.first.got


def test_bad_requests_and_clients_that_leave_do_not_count(failing_pair: Pair) -> None:
    failing_pair.second.got.clear()
    before = failing_pair.breaker()["failures"]
    assert failing_pair.proxy.chat("no-such-model").status_code in (400, 404)
    assert failing_pair.proxy.post(CHAT, {"model": "gpt"}).status_code == 400
    failing_pair.first.got.clear()
    check_hang_up(failing_pair.proxy, failing_pair.first, CHAT, chat_body(), "whole")
    assert failing_pair.breaker()["failures"] == before and not failing_pair.second.got


def test_nothing_is_repeated_after_the_first_byte(failing_pair: Pair) -> None:
    failing_pair.first.script = lambda _got: Reply(parts=openai_stream(["a", "b"])[:2], headers=SSE, cut=True)
    failing_pair.second.got.clear()
    before = failing_pair.breaker()["failures"]
    answer = failing_pair.proxy.chat(stream=True)
    assert answer.status_code == 200 and '"error"' in answer.text and not failing_pair.second.got
    assert failing_pair.breaker()["failures"] in (0, before)


def test_a_request_that_neither_side_can_serve_has_the_sdks_error(failing_pair: Pair) -> None:
    failing_pair.first.script = hang_up
    for status in (500, 408):  # the latter is LiteLLM's server's word for a provider that is slow
        failing_pair.second.script = status_reply(status)
        answer = failing_pair.proxy.chat()
        assert (answer.status_code, answer.headers["x-proxy-backend"]) == (502, "sdk")
        assert "could not be reached" in answer.json()["error"]["message"]
    failing_pair.second.script = status_reply(429)  # a provider's word from the other side is better than none
    answer = failing_pair.proxy.chat()
    assert (answer.status_code, answer.headers["x-proxy-backend"]) == (429, "binary")
    wait_until(lambda: samples_of(failing_pair.proxy)['memory_proxy_pool_connections{state="busy"}'] == 0)


def samples_of(running: Proxy) -> dict[str, float]:
    """The metrics by their lines' first part."""
    lines = running.client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_the_breaker_opens_and_closes_again() -> None:
    with pair(breaker={"failure_threshold": 3, "reset_seconds": 1}) as both:
        both.first.script = hang_up
        for failures in (1, 2, 3):
            assert both.proxy.chat().headers["x-proxy-backend"] == "binary"
            assert both.breaker()["failures"] == failures
        opened = time.monotonic()
        both.first.got.clear()
        assert both.breaker() == {"status": "degraded", "state": "open", "failures": 3, "trips": 1}
        assert both.proxy.chat().headers["x-proxy-backend"] == "binary"
        assert not both.first.got or time.monotonic() - opened > 1, "an open breaker spares the vain try"
        figures = samples_of(both.proxy)
        assert figures["memory_proxy_circuit_breaker_state"] == 2
        assert figures["memory_proxy_circuit_breaker_trips_total"] == 1
        time.sleep(1.1)
        assert both.proxy.chat().headers["x-proxy-backend"] == "binary" and len(both.first.got) >= 1  # a vain probe
        assert both.breaker()["state"] == "open"
        both.first.script = usual_answer
        time.sleep(1.1)
        assert both.proxy.client.get("/v1/models").status_code == 200  # reaches no provider, and so proves nothing
        assert both.breaker()["state"] in ("open", "half_open")
        assert both.proxy.chat().headers["x-proxy-backend"] == "sdk"
        assert both.breaker() == {"status": "healthy", "state": "closed", "failures": 0, "trips": 1}
        said = lambda: [json.loads(line) for line in both.proxy.lines if '"circuit_breaker"' in line]  # noqa: E731
        wait_until(lambda: said()[-1]["state"] == "closed")
        assert [line["state"] for line in said() if line["level"] == "CRITICAL"] == ["open"]


def test_the_main_ports_health_shows_the_other_sides_breaker() -> None:
    with pair("--mode", "both", "--sdk-port", "0", breaker={"failure_threshold": 1}) as both:
        assert both.breaker()["state"] == "closed"
        both.first.script = hang_up
        sdk_url = both.proxy.ready()[1]
        assert httpx.post(f"{sdk_url}{CHAT}", json=chat_body(), trust_env=False).headers["x-proxy-backend"] == "binary"
        assert both.breaker()["state"] == "open"


def test_the_breaker_never_stands_before_the_only_way_to_a_model() -> None:
    with pair(breaker={"failure_threshold": 1, "reset_seconds": 600}) as both:
        both.first.script = hang_up
        both.second.script = lambda got: Reply(usual_answer(got).body, headers={"connection": "close"})
        assert both.proxy.chat().headers["x-proxy-backend"] == "binary"
        assert both.breaker()["state"] == "open"
        both.second.server.shutdown()
        both.second.server.server_close()
        answer = both.proxy.chat(headers={"connection": "close"})
        assert (answer.status_code, answer.headers["x-proxy-backend"]) == (502, "sdk")
        calls = len(both.first.got)
        health = both.proxy.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy"), "both ways are gone"
        assert len(both.first.got) == calls
        both.first.script = usual_answer
        answer = both.proxy.chat(headers={"connection": "close"})
        assert (answer.status_code, answer.headers["x-proxy-backend"]) == (200, "sdk")
        health = both.proxy.client.get("/health")
        assert health.status_code == 200
        assert health.json()["checks"]["litellm_server"]["status"] == "degraded"
        assert health.json()["checks"]["circuit_breaker"]["state"] == "closed", "the SDK has shown that it works"


@pytest.fixture(scope="module")
def tripped_pair() -> Iterator[Pair]:
    """A pair whose breaker opens at the first failure."""
    with pair(breaker={"failure_threshold": 1, "reset_seconds": 600}) as made:
        made.proxy.kept()
        yield made


def trip(both: Pair) -> None:
    """Have the breaker open, with an SDK's side that would work again."""
    both.first.script, both.second.script = hang_up, usual_answer
    assert both.proxy.chat().headers["x-proxy-backend"] == "binary"
    assert both.breaker()["state"] == "open"
    both.first.script = usual_answer
    both.first.got.clear()
    both.second.got.clear()


BEGUN = {"x-litellm-call-id": "1"}  # LiteLLM's server has begun a call
HTML = {"content-type": "text/html"}  # a gateway's page


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "headers", "tried"),
    [
        *((status, headers, True) for status, headers in ((500, {}), (502, {}), (503, HTML), (0, {}))),
        *((status, headers, False) for status, headers in ((504, {}), (500, BEGUN), (503, BEGUN), (429, {}))),
    ],
)
def test_with_an_open_breaker_the_sdk_is_tried_where_the_binary_side_is_out_of_order(
    tripped_pair: Pair, status: int, headers: dict[str, str], tried: bool, stream: bool
) -> None:
    both = tripped_pair
    trip(both)
    both.second.script = (lambda _got: Reply(b"{}", status, headers)) if status else hang_up
    answer = both.proxy.chat(stream=stream)
    assert (answer.status_code, answer.headers["x-proxy-backend"]) == ((200, "sdk") if tried else (status, "binary"))
    assert both.second.got and len(both.first.got) == int(tried)
    assert both.breaker()["state"] == ("closed" if tried else "open")
    wait_until(lambda: samples_of(both.proxy)['memory_proxy_pool_connections{state="busy"}'] == 0)


def test_with_an_open_breaker_an_upload_reaches_the_sdk_too_and_its_error_is_shown(tripped_pair: Pair) -> None:
    both = tripped_pair
    trip(both)
    both.first.script, both.second.script = lambda _got: Reply(b'{"text": "hello"}'), status_reply(503)
    upload = {"file": ("a.wav", bytes(300_000), "audio/wav")}
    heard = both.proxy.client.post("/v1/audio/transcriptions", data={"model": "gpt"}, files=upload)
    assert (heard.status_code, heard.headers["x-proxy-backend"]) == (200, "sdk"), heard.text
    assert bytes(300_000) in both.first.last.raw and bytes(300_000) in both.second.last.raw
    trip(both)
    both.first.script, both.second.script = hang_up, status_reply(503)
    answer = both.proxy.messages()
    assert (answer.status_code, answer.json()["type"], len(both.second.got)) == (502, "error", 1)
    assert "could not be reached" in answer.json()["error"]["message"]
    assert both.breaker()["state"] == "open"


@pytest.mark.parametrize(("path", "name"), DIALECTS)
def test_litellms_server_marks_what_it_has_begun_a_call_for(
    binary: Proxy, provider: Provider, path: str, name: str
) -> None:
    for script in (status_reply(500), status_reply(503), hang_up):
        provider.script = script
        answer = binary.post(path, body_for(path, name))
        assert answer.status_code >= 500 and answer.headers["x-litellm-call-id"]
    assert "x-litellm-call-id" not in binary.post(path, [1]).headers


def test_without_a_binary_side_there_is_no_breaker(sdk: Proxy) -> None:
    for _ in range(7):
        assert sdk.chat("refused").status_code == 502
    assert "circuit_breaker" not in sdk.client.get("/health").json()["checks"]
    assert sdk.chat().headers["x-proxy-backend"] == "sdk"


def test_a_server_that_cannot_be_reached_is_unhealthy_until_it_can(shared_provider: Provider) -> None:
    port = free_port()
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", f"http://127.0.0.1:{port}")
    assert running.client.get("/health").status_code == 503  # before any request has met it
    answer = running.chat()
    assert (answer.status_code, answer.headers["x-proxy-backend"]) == (503, "binary") and answer.headers["retry-after"]
    health = running.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
    with socket.create_server(("127.0.0.1", port)):
        wait_until(lambda: running.client.get("/health").status_code == 200)
    assert running.stop() == 0


# ── application ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_own_endpoints_answer(sdk: Proxy, forward: Proxy) -> None:
    for running in (sdk, forward):
        health = running.client.get("/health").json()
        assert health["status"] == "healthy" and health["timestamp"].endswith("Z")
        assert health["checks"]["configuration"]["model_count"] >= 3
        assert health["checks"]["memory_router"] == {"status": "healthy", "pattern_count": len(SHIPPED_PATTERNS) + 1}
        assert "cookie_count" in health["checks"]["session_manager"]
        info = running.client.get("/memory-routing/info", headers={"user-agent": "claude-cli/1"}).json()
        assert info["user_id"] == "claude-code" and info["matched_pattern"]["header"] == "user-agent"
        assert (info["is_default"], info["custom_header_present"]) == (False, False)
        info = running.client.get("/memory-routing/info", headers={"x-memory-user-id": "me"}).json()
        assert info == {"user_id": "me", "matched_pattern": None, "custom_header_present": True, "is_default": False}
        assert running.client.get("/memory-routing/info").json()["is_default"]
        assert running.client.get("/memory-routing/stats").json()["requests_total"] is not None
        assert "memory_proxy_requests_in_flight 1" in running.client.get("/metrics").text


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_a_stream_is_in_flight_until_it_ends(request: pytest.FixtureRequest, provider: Provider, mode: str) -> None:
    running: Proxy = request.getfixturevalue(mode)
    in_flight = lambda: running.client.get("/memory-routing/stats").json()["requests_in_flight"]  # noqa: E731
    provider.script = lambda got: Reply(parts=openai_stream(list("abcdef")), headers=SSE, pause=0.2)
    body = {**chat_body(), "stream": True}
    for leave, status in ((False, 200), (True, 499)):
        identity = f"stream-{leave}"
        with running.client.stream("POST", CHAT, json=body, headers={"x-request-id": identity}) as response:
            stream = response.iter_raw()  # kept: httpx closes the response with its iterator
            next(stream)
            assert in_flight() == 2  # the question is one of them
            if not leave:
                list(stream)
        wait_until(lambda: in_flight() == 1)
        assert log_line(running, identity)["status"] == status


def test_the_master_key_is_asked_for(shared_provider: Provider) -> None:
    key = "a-master-key-0123456789"
    general = {"master_key": "os.environ/MASTER", "forward_client_headers_to_llm_api": True}
    running = Proxy(config_for(shared_provider, general_settings=general), MASTER=key)
    accepted = (
        {"authorization": f"Bearer {key}"},
        {"Authorization": f"bearer {key}"},
        {"x-api-key": key},
        {"api-key": key},
    )
    for headers in accepted:
        assert running.chat("demo", headers=headers).status_code == 200
    refused = ({}, {"authorization": f"Bearer {key}x"}, {"authorization": key}, {"x-api-key": "ü"}, {"x-api-key": ""})
    for headers in refused:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        response = running.client.post("/v1/messages", json=messages_body("demo"), headers=encoded)
        assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
    assert running.client.get("/v1/models").status_code == 401
    assert running.client.get("/health").status_code == 200 and running.client.get("/metrics").status_code == 200
    assert running.stop() == 0 and key not in running.output


HOSTS = {
    "localhost": 200,
    "LOCALHOST:8764": 200,
    "127.0.0.1:1": 200,
    "127.9.9.9": 200,
    "[::1]:8764": 200,
    "app.localhost.": 200,
    "evil.example#.localhost": 403,
    "evil.example\\.localhost": 403,
    ".localhost": 403,
    "evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "localhost.evil.example:8764": 403,
    "127.0.0.1@evil.example": 403,
    "0.0.0.0": 403,
    "192.168.1.7:8764": 403,
    "": 403,
}
ORIGINS = {
    "http://localhost:3000": 200,
    "https://127.0.0.1": 200,
    "http://[::1]:5173": 200,
    "tauri://localhost": 200,
    "http://tauri.localhost": 200,
    "vscode-webview://1a2b": 200,
    "app://-": 200,
    "file://": 200,
    "null": 403,
    "app": 403,
    "app://x, http://evil.example": 403,
    "https://evil.example": 403,
    "https://localhost.evil.example": 403,
    "chrome-extension://abc": 403,
}


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_only_loopback_hosts_and_origins_are_let_in(
    request: pytest.FixtureRequest, provider: Provider, mode: str
) -> None:
    running: Proxy = request.getfixturevalue(mode)
    cases = [*(({"host": host}, status) for host, status in HOSTS.items())]
    cases += [({"origin": origin}, status) for origin, status in ORIGINS.items()]
    for headers, status in cases:
        provider.got.clear()
        response = running.post("/v1/messages", messages_body(), headers=headers)
        assert response.status_code == status, headers
        assert len(provider.got) == (status == 200), headers
        if status == 403:
            assert response.json()["error"]["type"] == "permission_error"
            assert log_line(running, response.headers["x-request-id"])["status"] == 403, "not only at --log-level debug"
        assert (response.headers.get("access-control-allow-origin") == headers.get("origin", "")) is (
            status == 200 and "origin" in headers
        )
    assert running.client.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert running.client.get("/v1/models", headers={"sec-fetch-site": "same-site"}).status_code == 200
    assert "checks" in running.client.get("/%68ealth").json(), "LiteLLM's server would call every model"
    assert running.raw(b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 1).startswith(
        b"HTTP/1.1 403 "
    )
    assert running.raw(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_allowed_hosts_and_origins_are_let_in_and_preflights_answered(provider: Provider) -> None:
    allowed = ("--allow-host", "Proxy.LAN", "--allow-origin", "https://chat.example")
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url, *allowed)
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin, status in {
        "https://chat.example": 204,
        "http://localhost:3000": 204,
        "https://evil.example": 403,
    }.items():
        answer = running.client.options(CHAT, headers={"host": "proxy.lan:80", "origin": origin, **asked})
        assert answer.status_code == status
        granted = {
            name[21:]: value for name, value in answer.headers.items() if name.startswith("access-control-allow-")
        }
        wanted = {"origin": origin, "methods": "POST", "headers": "authorization,content-type"}
        assert granted == (wanted if status == 204 else {})
    assert not provider.got
    answer = running.chat(headers={"origin": "https://chat.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert running.chat(headers={"host": "other.lan"}).status_code == 403
    assert (
        running.client.options("/x", headers={"origin": "http://localhost"}).status_code == 200
    )  # no preflight: OPTIONS
    assert provider.last.method == "OPTIONS"
    assert running.stop() == 0


# ── HTTP front ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["sdk", "forward"])
@pytest.mark.parametrize(("head", "status"), MALFORMED_HEADS.items(), ids=lambda value: repr(value)[:40])
def test_malformed_requests_are_answered_and_closed(
    request: pytest.FixtureRequest, provider: Provider, mode: str, head: bytes, status: int
) -> None:
    running: Proxy = request.getfixturevalue(mode)
    answer = running.raw(head + b"\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
    first = answer.partition(b"\r\n")[0]
    assert first.startswith(b"HTTP/1.1 %d " % status) and len(re.findall(rb"^HTTP/1", answer, re.M)) == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] and b"Connection: close" in answer
    assert b"x-proxy-backend: %b" % (b"sdk" if mode == "sdk" else b"binary") in answer
    given = re.search(rb"^x-request-id: (\w{32})\r$", answer, re.M)
    assert given
    wait_until(lambda: f'"request_id": "{given[1].decode()}"' in running.output)
    assert not provider.got


@pytest.mark.parametrize("mode", ["sdk", "forward"])
@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v1/x HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\nHost: localhost\n\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
    ],
)
def test_smuggling_is_refused_with_400(
    request: pytest.FixtureRequest, provider: Provider, mode: str, data: bytes
) -> None:
    answer = request.getfixturevalue(mode).raw(data)
    assert answer.startswith(b"HTTP/1.1 400 ") and len(re.findall(rb"^HTTP/1", answer, re.M)) == 1
    assert not provider.got


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_a_body_that_breaks_off_is_not_taken_for_whole(
    request: pytest.FixtureRequest, provider: Provider, mode: str
) -> None:
    running: Proxy = request.getfixturevalue(mode)
    with socket.create_connection(("127.0.0.1", running.port), 5) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{}")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert not provider.got


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_too_much_is_refused_before_it_is_read(request: pytest.FixtureRequest, mode: str) -> None:
    running: Proxy = request.getfixturevalue(mode)
    for data, status in (
        (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\nabc", 413),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    ):
        assert running.raw(data).startswith(b"HTTP/1.1 %d " % status)
    counted = {row["kind"]: row["value"] for row in running.client.get("/memory-routing/stats").json()["errors_total"]}
    assert counted["request_too_large"] >= 1 and counted["http_4xx"] >= 1


def test_an_upload_that_is_too_large_is_refused_before_its_head_is_forwarded() -> None:
    def script(sock: socket.socket, _number: int) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    form = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n"
    with in_front_of(script) as (running, server):
        running.client.get("/health")  # looks whether the server is there
        wait_until(lambda: server.count > 0)
        before = server.count
        answer = running.raw(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n" + form + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ") and server.count == before


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_connections_are_kept_alive_and_take_requests_in_a_row(request: pytest.FixtureRequest, mode: str) -> None:
    running: Proxy = request.getfixturevalue(mode)
    one = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = running.raw(one + one + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer.count(b"HTTP/1.1 200 ") == 3
    assert running.raw(one.replace(b"1.1", b"1.0")).count(b"Connection: close") == 1


def test_new_connections_take_the_place_of_idle_ones_and_else_are_refused(provider: Provider) -> None:
    arguments = ("--mode", "binary", "--litellm-url", provider.url, "--max-connections", "4")
    running = Proxy(config_for(provider), *arguments)
    idle = [socket.create_connection(("127.0.0.1", running.port), 5) for _ in range(4)]
    time.sleep(0.3)
    assert running.client.get("/health").status_code == 200
    assert idle[0].recv(1) == b"" and running.client.get("/health").status_code == 200
    provider.script = lambda _got: Reply(b"{}", hold=4)
    with ThreadPoolExecutor(4) as pool:
        busy = [
            pool.submit(running.raw, b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            for _ in range(4)
        ]
        provider.wait_for(4)
        began = time.monotonic()
        refused = running.raw(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in refused
        assert time.monotonic() - began < 1.8  # before any of the busy ones ended
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["message"]
        for size in (0, 300_000, 3_000_000):  # a client in the middle of its body is not reset, but answered
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)) as client:
                client.request("POST", "/v1/chat/completions", b"x" * size, {"Content-Type": "application/json"})
                assert client.getresponse().status == 503
        assert all(answer.result().startswith(b"HTTP/1.1 200 ") for answer in busy)
    assert running.client.get("/health").status_code == 200
    assert running.stop() == 0


def test_the_usual_limit_of_open_files_is_no_limit_of_connections(provider: Provider) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    all_there = threading.Event()
    provider.script = lambda _got: Reply(b"{}") if all_there.wait(60) else Reply(status=500)
    one = b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with ThreadPoolExecutor(200) as pool:
        answers = [pool.submit(running.raw, one, 60) for _ in range(200)]
        try:
            provider.wait_for(200, 30)
        finally:
            all_there.set()
        assert all(answer.result().startswith(b"HTTP/1.1 200 ") for answer in answers)
    assert running.stop() == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes the limits of a running process")
def test_connections_for_which_there_is_no_open_file_wait_and_cost_nothing(forward: Proxy) -> None:
    spent = samples_of(forward)["process_cpu_seconds_total"]
    limits = resource.prlimit(forward.process.pid, resource.RLIMIT_NOFILE)
    files = len(list(Path(f"/proc/{forward.process.pid}/fd").iterdir()))
    resource.prlimit(forward.process.pid, resource.RLIMIT_NOFILE, (files + 2, limits[1]))
    try:
        waiting = [socket.create_connection(("127.0.0.1", forward.port), 5) for _ in range(8)]
        time.sleep(2)
        assert samples_of(forward)["process_cpu_seconds_total"] - spent < 1
    finally:
        resource.prlimit(forward.process.pid, resource.RLIMIT_NOFILE, limits)
    waiting[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert waiting[-1].recv(15) == b"HTTP/1.1 200 OK"
    for sock in waiting:
        sock.close()


def test_a_connection_whose_request_has_come_in_makes_room_for_none() -> None:
    connections = proxy.Connections(1)
    (first, client), (second, _) = socket.socketpair(), socket.socketpair()
    assert connections.admit(first)
    client.send(b"G")
    assert not connections.admit(second)
    first.recv(1)
    assert connections.admit(second) and first.recv(1) == b""


def test_a_request_that_comes_while_its_idle_connection_is_being_closed_is_answered() -> None:
    connections = proxy.Connections(1)
    server_side, client = tcp_pair()
    client.settimeout(5)
    application = proxy.Application(proxy.Metrics(quiet_log()), quiet_log(), proxy.Access())
    application.serving = SimpleNamespace(primary=SimpleNamespace(name="sdk"))  # type: ignore[assignment]
    front = SimpleNamespace(connections=connections, application=application, limits=proxy.Limits())
    assert connections.admit(server_side)
    threading.Thread(target=proxy.Handler, args=(server_side, None, front), daemon=True).start()
    time.sleep(0.3)  # it waits for a request
    assert connections.busy(server_side)  # as the thread does that lets it make room
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 503 ")


def test_a_stop_answers_clients_that_go_on_asking(provider: Provider) -> None:
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url)

    def ask_on(_: int) -> bool:
        """Ask again and again; whether the end was announced by an answer."""
        client = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        while True:
            try:
                client.request("GET", "/memory-routing/info")
                answer = client.getresponse()
            except OSError:
                return False
            answer.read()
            if answer.headers["Connection"] == "close":
                return answer.status == 200

    with ThreadPoolExecutor(16) as pool:
        clients = pool.map(ask_on, range(16))
        time.sleep(1)
        assert running.stop() == 0
        assert sum(clients) >= 8  # the others asked only once their connection had been closed as idle


def test_a_request_that_came_in_behind_another_before_a_stop_is_answered(provider: Provider) -> None:
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url)
    provider.script = lambda _got: Reply(parts=[b"data: 1\n\n"] * 4, pause=0.5, headers=SSE)
    both = b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(running.raw, both, 10)
        provider.wait_for(1)
        time.sleep(0.7)  # the head of the first answer is out: it promised to keep the connection
        assert running.stop() == 0
        first, _, second = answers.result().partition(b"\r\n0\r\n\r\n")
    assert first.count(b"data: 1") == 4 and second.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close" in second


def test_a_request_that_follows_on_an_answer_at_a_stop_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LAST_CALL_SECONDS", 30.0)
    connections = proxy.Connections(1)
    server_side, client = tcp_pair()
    assert connections.admit(server_side)
    connections.draining = True  # after the head of the answer, which promised to keep the connection
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(connections.idle, server_side)
        time.sleep(0.3)
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert waits.result()


def test_a_connection_that_waits_to_be_accepted_at_a_stop_is_answered() -> None:
    application = proxy.Application(proxy.Metrics(quiet_log()), quiet_log(), proxy.Access())
    primary, in_flight = SimpleNamespace(name="sdk"), proxy.InFlight()
    application.serving = SimpleNamespace(primary=primary, in_flight=in_flight)  # type: ignore[assignment]
    front = proxy.Front(("127.0.0.1", 0), application, quiet_log(), proxy.Limits())
    front.start()
    clients = []
    with front.connections._changed:  # the accepting thread needs this for the first of them
        for _ in range(2):
            clients.append(socket.create_connection(("127.0.0.1", front.server_port), 5))
            clients[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: len(clients) == 2 or not proxy.readable(front.socket))
        stop = threading.Thread(target=front.drain)
        stop.start()
        wait_until(lambda: front._BaseServer__shutdown_request)  # type: ignore[attr-defined]
    assert [client.recv(15) for client in clients] == [b"HTTP/1.1 200 OK"] * 2
    stop.join()


@pytest.mark.parametrize("stops", [False, True])
def test_a_front_without_memory_to_accept_a_connection_accepts_it_later(
    monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    application = proxy.Application(proxy.Metrics(quiet_log()), quiet_log(), proxy.Access())
    primary, in_flight = SimpleNamespace(name="sdk"), proxy.InFlight()
    application.serving = SimpleNamespace(primary=primary, in_flight=in_flight)  # type: ignore[assignment]
    front = proxy.Front(("127.0.0.1", 0), application, quiet_log(), proxy.Limits())
    stop = threading.Thread(target=front.drain)
    accept, failures = socket.socket.accept, [MemoryError(), MemoryError()]

    def accept_or_fail(sock: socket.socket) -> Any:
        if sock is not front.socket or not failures:
            return accept(sock)
        failure = failures.pop()
        if stops:  # while it fails, and for good
            failures.clear()
            stop.start()
            wait_until(lambda: front._BaseServer__shutdown_request)  # type: ignore[attr-defined]
        raise failure

    monkeypatch.setattr(socket.socket, "accept", accept_or_fail)
    front.start()
    with socket.create_connection(("127.0.0.1", front.server_port), 5) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.1 200 OK"
    if not stops:
        stop.start()
    stop.join(10)
    assert not (failures or stop.is_alive() or front.running)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes the limits of a running process")
def test_a_connection_for_which_there_is_no_thread_is_not_counted_for_ever(provider: Provider) -> None:
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url, "--max-connections", "4")
    before = resource.prlimit(running.process.pid, resource.RLIMIT_AS)
    room = int(ps(running.process.pid, "vsz")) * 1024 + 4 * MIB  # for all but a thread's stack, which has 8 MiB
    resource.prlimit(running.process.pid, resource.RLIMIT_AS, (room, before[1]))
    for _ in range(6):
        assert running.raw(b"") == b""
    resource.prlimit(running.process.pid, resource.RLIMIT_AS, before)
    assert samples_of(running)["memory_proxy_client_connections"] == 1
    assert running.stop() == 0


CHAT_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
# What a client sends at first, and then every few seconds → how long it may, and the status that it then gets.
SLOW_CLIENTS = {
    "head": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ", b"a", proxy.HEAD_SECONDS, b"HTTP/1.1 408 "),
    "body": (CHAT_HEAD + b'{"model": ', b"", proxy.BODY_SECONDS, b"HTTP/1.1 408 "),
    "idle": (b"", b"", proxy.IDLE_SECONDS, b""),
}


def test_slow_and_idle_clients_are_let_go_and_delay_nobody(sdk: Proxy) -> None:
    def be_slow(first: bytes, more: bytes) -> tuple[float, bytes]:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", sdk.port), 3) as sock:
            sock.sendall(first)
            while time.monotonic() - began < 100:
                with contextlib.suppress(TimeoutError):
                    answer = sock.recv(65536)
                    return time.monotonic() - began, answer
                sock.sendall(more)
        raise AssertionError("it was never let go")

    with ThreadPoolExecutor() as pool:
        clients = {kind: pool.submit(be_slow, *row[:2]) for kind, row in SLOW_CLIENTS.items()}
        for _ in range(20):
            assert sdk.client.get("/health").status_code == 200
        for kind, client in clients.items():
            (seconds, answer), (_, _, limit, status) = client.result(), SLOW_CLIENTS[kind]
            assert answer.startswith(status) and bool(answer) == bool(status), kind
            assert limit - 1 < seconds < limit + 20, kind


def test_an_http_1_0_client_gets_a_stream_without_chunks(sdk: Proxy, provider: Provider) -> None:
    data = json.dumps({**chat_body(), "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(data)
    answer = sdk.raw(head + data)
    assert b"ransfer-" not in answer and answer.endswith(b"data: [DONE]\n\n")


def test_a_client_that_expects_it_gets_its_100_continue(sdk: Proxy, provider: Provider) -> None:
    data = json.dumps(chat_body()).encode()
    with socket.create_connection(("127.0.0.1", sdk.port), 5) as sock:
        fields = b"Host: localhost\r\nExpect: 100-continue\r\nContent-Length: %d" % len(data)
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + fields + b"\r\n\r\n")
        assert read_head(sock) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(data)
        assert read_head(sock).startswith(b"HTTP/1.1 200 OK\r\n")


def test_threads_and_descriptors_come_back(sdk: Proxy, provider: Provider) -> None:
    def counts() -> tuple[int, int]:
        base = Path(f"/proc/{sdk.process.pid}")
        return len(list((base / "task").iterdir())), len(list((base / "fd").iterdir()))

    def one(_: int) -> int:
        with httpx.Client(base_url=sdk.url, trust_env=False, verify=False, timeout=30) as client:
            return client.post("/v1/chat/completions", json=chat_body()).status_code

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(one, range(60)))
        wait_until(lambda: True)
        threads, descriptors = counts()
        assert set(pool.map(one, range(120))) == {200}
    wait_until(lambda: counts()[0] <= threads + 2 and counts()[1] <= descriptors + 40)


FUZZ_SEED = 20261123
FUZZ_PIECES = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b":",
    b" ",
    b"\t",
    b"\xff",
    b"Content-Length: 5\r\n",
    b"Host: localhost\r\n",
]
FUZZ_PIECES += [
    b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: upgrade\r\n",
    b"0\r\n\r\n",
]
FUZZ_PIECES += [b"-1", b"99999999999", b"GET /x HTTP/1.1\r\n", b"Upgrade: h2c\r\n", b'{"model":', b"\\u0000", b"[[[[[["]


def fuzz_requests(count: int) -> Iterator[bytes]:
    """Valid requests with some of their bytes dropped, changed, doubled, or others put in: the same ones each time."""
    chance = random.Random(FUZZ_SEED)
    body = json.dumps({**chat_body(), "stream": True}).encode()
    head = b"POST /v1/chat/completions?a=%%20 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%b\r\n"
    valid = [
        head % (b"Content-Length: %d\r\n" % len(body)) + body,
        head % b"Transfer-Encoding: chunked\r\n" + proxy.chunk(body[:9]) + proxy.chunk(body[9:]) + proxy.LAST_CHUNK,
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Memory-User-Id: me\r\n\r\n" * 2,
        b"OPTIONS /v1/messages HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
    ]
    for _ in range(count):
        data = bytearray(chance.choice(valid))
        for _ in range(chance.randint(1, 4)):
            at, width = chance.randrange(len(data) + 1), chance.randint(0, 12)
            data[at : at + width] = chance.choice([b"", bytes(data[at : at + 30]), *FUZZ_PIECES])
        yield bytes(data[: chance.randint(1, len(data) + 1)] if chance.random() < 0.2 else data)


@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_a_storm_of_broken_requests_leaves_nothing_behind(
    request: pytest.FixtureRequest, provider: Provider, mode: str
) -> None:
    running: Proxy = request.getfixturevalue(mode)
    base = Path(f"/proc/{running.process.pid}")
    count = lambda name: len(list((base / name).iterdir()))  # noqa: E731
    running.client.get("/health")
    before = {name: count(name) for name in ("task", "fd")}
    output = len(running.lines)

    def one(data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", running.port), 5) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
            if len(data) % 3:
                sock.shutdown(socket.SHUT_WR)
            sock.settimeout(0.2)
            answer = sock.recv(65536)
            assert not answer or answer.startswith(b"HTTP/1.1 "), (data, answer)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, fuzz_requests(1000)))
    assert running.client.get("/health").json()["status"] == "healthy"
    assert all(len([name for name, _ in got.headers if name.lower() == "x-sm-user-id"]) == 1 for got in provider.got)
    wait_until(lambda: all(count(name) <= before[name] + 10 for name in before), 20)
    wait_until(lambda: samples_of(running)["memory_proxy_requests_in_flight"] == 1)
    assert running.chat().status_code == 200
    assert not [line for line in running.lines[output:] if '"defect"' in line or "Traceback (most" in line]


# ── program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def experimental(**settings: Any) -> dict[str, Any]:
    return {"forward_client_headers_to_llm_api": True, "experimental": settings}


def rewrite(running: Proxy, change: Callable[[dict[str, Any]], Any] | str) -> None:
    """Change the config of a running proxy."""
    if callable(change):
        document = yaml.safe_load(running.config.read_text())
        change(document)
        change = yaml.safe_dump(document, sort_keys=False)
    running.config.write_text(change)


def reload(running: Proxy, change: Callable[[dict[str, Any]], Any] | str, event: str = "reloaded") -> None:
    """Change the config, send SIGHUP, and wait for the word of it in the log."""
    count = running.output.count(f'"event": "{event}"')
    rewrite(running, change)
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: running.output.count(f'"event": "{event}"') > count)


def test_a_pid_file_that_the_disk_does_not_take_is_no_reason_not_to_start(tmp_path: Path) -> None:
    script = script_copy(tmp_path)
    pid_file = script.parent / "config.yaml.pid"
    pid_file.symlink_to("/dev/full")
    (script.parent / "config.yaml.status.part").symlink_to("/dev/full")
    with front_from(script):
        pass
    assert not [*script.parent.glob("config.yaml.*")], "what there is of them is removed as any other"


def test_a_pid_file_that_cannot_be_removed_is_no_reason_to_end_with_a_traceback(tmp_path: Path) -> None:
    script = script_copy(tmp_path)
    pid_file = script.parent / "config.yaml.pid"
    with front_from(script):
        pid_file.unlink()
        pid_file.mkdir()


def test_a_secret_of_a_new_config_is_in_no_metric(provider: Provider) -> None:
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url)
    reload(running, lambda document: document["general_settings"].update(master_key="correct.horse-battery"))
    running.chat("correct.horse-battery", headers={"x-memory-user-id": "correct.horse-battery"})
    wait_until(lambda: "[redacted]" in running.output)
    shown = running.client.get("/metrics").text
    assert 'user_id="[redacted]",model="[redacted]"' in shown and "horse" not in shown + running.output
    assert running.stop() == 0


def test_a_new_config_is_taken_over_by_the_next_request(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(config_for(shared_provider, litellm_settings={"drop_params": True}), "--mode", "sdk")
    env_file = running.config.with_name(".env")
    assert running.chat(seed=[1]).status_code == 200
    assert provider.last.header("authorization") == f"Bearer {PROVIDER_KEY}"

    def change(document: dict[str, Any]) -> None:
        document["model_list"][0]["litellm_params"].update(api_key="os.environ/NEW_KEY", model="openai/gpt-new")
        document["model_list"].append(model("added", "openai/gpt-added", f"{provider.url}/v1"))
        document["model_list"] = [entry for entry in document["model_list"] if entry["model_name"] != "demo"]
        document["user_id_mappings"]["header_patterns"][0]["user_id"] = "renamed"
        document["user_id_mappings"]["default_user_id"] = "someone"
        document["general_settings"]["master_key"] = "sk-a-new-master-key"

    env_file.write_text("NEW_KEY=key-out-of-dotenv-1\n")
    reload(running, change)
    running.client.headers["authorization"] = "Bearer sk-a-new-master-key"
    assert running.chat(headers={"user-agent": "claude-cli/2"}).status_code == 200
    assert provider.last.header("authorization") == "Bearer key-out-of-dotenv-1"
    assert (provider.last.body["model"], provider.last.header("x-sm-user-id")) == ("gpt-new", "renamed")
    assert running.chat("added").status_code == 200 and provider.last.header("x-sm-user-id") == "someone"
    assert running.chat("demo").status_code in (400, 404)
    assert running.chat(headers={"authorization": "Bearer wrong"}).status_code == 401
    listed = {row["id"] for row in running.client.get("/v1/models").json()["data"]}
    assert listed == {"gpt", "claude", "added"}
    env_file.write_text("NEW_KEY=key-out-of-dotenv-2\n")
    reload(running, lambda document: document["litellm_settings"].clear())
    assert running.chat().status_code == 200 and provider.last.header("authorization") == "Bearer key-out-of-dotenv-2"
    env_file.write_text("NEW_KEY=key-out-of-dotenv-3\n")
    reload(running, lambda _: None)
    assert running.chat("key-out-of-dotenv-1").status_code in (400, 404), "keys of long ago are secrets still"
    assert running.stop() == 0
    assert "key-out-of-dotenv" not in running.output and "sk-a-new" not in running.output


def test_a_bad_config_changes_nothing_and_says_why(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "sdk")

    def spoil(document: dict[str, Any]) -> None:
        document["model_list"].append({"model_name": "x"})
        document["user_id_mappings"]["header_patterns"][1]["pattern"] = "("
        document["user_id_mappings"]["default_user_id"] = "elsewhere"

    good = running.config.read_text()
    strange = yaml.safe_dump({**yaml.safe_load(good), "router_settings": {"routing_strategy": "no-such"}})
    for bad, said in (
        (spoil, ["model_list[3].litellm_params", "user_id_mappings.header_patterns[1].pattern"]),
        ("model_list: [", ["YAML"]),
        (strange, ["LiteLLM refuses this config"]),
    ):
        reload(running, bad, "refused")
        wait_until(lambda said=said: all(part in running.output for part in said))
        assert running.chat().status_code == 200 and provider.last.header("x-sm-user-id") == "default-dev"
        running.config.write_text(good)
    reload(running, good)
    assert running.chat().status_code == 200
    assert running.stop() == 0
    assert "Traceback (most" not in running.output


def test_the_callbacks_are_the_configs_after_every_reload(shared_provider: Provider, provider: Provider) -> None:
    logged = {"openmeter": "/api/v1/events", "helicone": "/log"}
    environment = {"OPENMETER_API_ENDPOINT": provider.url, "HELICONE_API_BASE": provider.url}
    environment |= {"OPENMETER_API_KEY": "none", "HELICONE_API_KEY": "none"}
    flaky = model("flaky", "openai/gpt-flaky", f"{provider.url}/v1")
    settings = {"success_callback": ["openmeter"]}
    router = {"cooldown_time": 60, "num_retries": 0}
    running = Proxy(config_for(provider, flaky, litellm_settings=settings, router_settings=router), **environment)

    def arrives(*names: str) -> None:
        provider.got.clear()
        assert running.chat(user="someone").status_code == 200
        for name in names:
            wait_until(lambda name=name: any(got.path.endswith(logged[name]) for got in provider.got))
        time.sleep(1 if len(names) < len(logged) else 0)  # for what must not come
        assert {name for name, end in logged.items() if any(g.path.endswith(end) for g in provider.got)} == set(names)

    arrives("openmeter")
    good = running.config.read_text()
    reload(running, lambda document: document["router_settings"].update(routing_strategy="no-such"), "refused")
    arrives("openmeter")
    provider.script = lambda got: Reply(b"{}", 401) if got.body.get("model") == "gpt-flaky" else usual_answer(got)
    wait_until(lambda: running.chat("flaky").status_code == 429)  # the Router keeps the callback by which it cools down
    provider.script = usual_answer
    running.config.write_text(good)
    reload(running, lambda document: document.pop("litellm_settings"))
    arrives()
    for names in (["openmeter", "helicone"], ["helicone"]):
        reload(running, lambda document, names=names: document.update(litellm_settings={"success_callback": names}))
        arrives(*names)
    assert running.stop() == 0


def test_requests_under_way_end_under_the_old_config(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "sdk")
    provider.script = lambda _got: Reply(parts=openai_stream(["word "] * 30), headers=SSE, pause=0.05)
    with running.client.stream("POST", CHAT, json={**chat_body(), "stream": True}) as response:
        pieces = response.iter_raw()
        data = next(pieces)
        reload(running, lambda document: document["model_list"].pop(0))
        provider.script = usual_answer
        assert running.chat().status_code in (400, 404), "the model is gone"
        data += b"".join(pieces)
    assert data.count(b"word ") == 30 and data.endswith(b"data: [DONE]\n\n")
    assert running.stop() == 0


class Load:
    """Requests at a steady rate from threads of their own; ``failed`` has what went wrong."""

    def __init__(self, running: Proxy, rate: float = 50, **options: Any) -> None:
        self.failed: list[str] = []
        self.sides: list[str] = []
        self._running, self._rate, self._options = running, rate, options
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(32)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(1 / self._rate):
            self._pool.submit(self._one, stream=number % 2 == 0)
            number += 1

    def _one(self, stream: bool) -> None:
        try:
            answer = self._running.chat(stream=stream, **self._options)
            if answer.status_code != 200 or (stream and not answer.text.endswith("data: [DONE]\n\n")):
                self.failed.append(f"{answer.status_code} {answer.text[-200:]}")
            self.sides.append(answer.headers["x-proxy-backend"])
        except httpx.HTTPError as error:
            self.failed.append(repr(error))

    def wait_for(self, side: str) -> None:
        """Until five answers in a row came from this side."""
        wait_until(lambda: self.sides[-5:] == [side] * 5)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()


def test_a_live_switch_there_and_back_fails_no_request(shared_provider: Provider, provider: Provider) -> None:
    config = config_for(shared_provider, general_settings=experimental(use_sdk_proxy=False))
    running = Proxy(config, "--mode", "both", "--sdk-port", "0", "--litellm-url", provider.url)
    provider.script = lambda got: Reply(
        parts=openai_stream(["a", "b"]) if got.body.get("stream") else None,
        body=b"" if got.body.get("stream") else usual_answer(got).body,
        headers=SSE if got.body.get("stream") else {},
        pause=0.02,
    )

    def use_sdk(value: bool) -> None:
        set_to = lambda document: document["general_settings"]["experimental"].update(use_sdk_proxy=value)  # noqa: E731
        reload(running, set_to)

    with Load(running) as load:
        load.wait_for("binary")
        for value, side in ((True, "sdk"), (False, "binary"), (True, "sdk"), (False, "binary")):
            use_sdk(value)
            load.wait_for(side)
        wait_until(lambda: len(load.sides) > 50)
    assert not load.failed
    assert running.stop() == 0


def test_a_pattern_moves_one_client_to_the_other_side(shared_provider: Provider, provider: Provider) -> None:
    config = config_for(shared_provider)
    config["user_id_mappings"]["header_patterns"][0]["mode"] = "sdk"
    running = Proxy(config, "--mode", "both", "--sdk-port", "0", "--litellm-url", provider.url)
    moved, stays = {"user-agent": "claude-cli/2"}, {"user-agent": "other"}
    assert running.chat(headers=moved).headers["x-proxy-backend"] == "sdk"
    assert running.chat(headers=stays).headers["x-proxy-backend"] == "binary"
    reload(running, lambda document: document["user_id_mappings"]["header_patterns"][0].update(mode="binary"))
    assert running.chat(headers=moved).headers["x-proxy-backend"] == "binary"
    assert running.stop() == 0


def command(running: Proxy, name: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(MODULE), name, "--config", str(running.config)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env=clean_environment())


def test_cutover_and_rollback_move_the_running_proxy(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "both", "--sdk-port", "0", "--litellm-url", provider.url)
    running.config.write_text("# first\n" + running.config.read_text() + "# last\n")
    pid_file = Path(f"{running.config}.pid")
    assert int(pid_file.read_text()) == running.process.pid
    with Load(running) as load:
        for name, side in (("cutover", "sdk"), ("rollback", "binary"), ("cutover", "sdk"), ("cutover", "sdk")):
            done = command(running, name)
            assert done.returncode == 0, done
            assert f"{running.url}: {side} serves" in done.stdout
            assert running.chat().headers["x-proxy-backend"] == side
    assert not load.failed
    text = running.config.read_text()
    assert text.startswith("# first\n") and text.endswith("# last\n")
    running.config.write_text(text + "model_list: 5\n")
    done = command(running, "rollback")
    assert done.returncode == 1 and "model_list" in done.stdout and f"{running.url}: sdk serves" in done.stdout
    assert running.stop() == 0
    assert not pid_file.exists() and not Path(f"{running.config}.status").exists()


def test_rollback_tells_where_there_is_nothing_to_move(shared_provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", shared_provider.url)
    done = command(running, "cutover")
    assert done.returncode == 1 and "--mode both" in done.stdout and f"{running.url}: binary serves" in done.stdout
    assert done.stdout.endswith("; without --mode, sdk alone serves from the next start on\n")
    running.process.kill()
    running.process.wait()
    assert Path(f"{running.config}.pid").exists()
    done = command(running, "cutover")  # a number in a file is no running proxy
    assert done.returncode == 1 and "no proxy runs" in done.stdout
    running.stop()


def test_a_second_proxy_with_one_config_leaves_the_first_its_pid_file(shared_provider: Provider) -> None:
    first = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", shared_provider.url)
    line = [sys.executable, str(MODULE), "--config", str(first.config), "--port", "0", "--mode", "binary"]
    with subprocess.Popen(
        [*line, "--litellm-url", shared_provider.url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as second:
        assert second.stdout
        before_ready = list(iter(lambda: second.stdout.readline()[:6], "ready:"))  # type: ignore[union-attr]
        assert before_ready
        assert int(Path(f"{first.config}.pid").read_text()) == first.process.pid
        second.terminate()
    assert int(Path(f"{first.config}.pid").read_text()) == first.process.pid
    assert first.stop() == 0


@pytest.mark.parametrize("stream", ["stdin", "stderr"])
def test_a_terminal_that_is_closed_ends_the_proxy_whatever_of_it_goes_to_a_file(tmp_path: Path, stream: str) -> None:
    master, terminal = os.openpty()
    config = write_config(tmp_path, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9/v1")]})
    arguments = ["--mode", "binary", "--litellm-url", "http://127.0.0.1:9", "--port", "0", "--config", config]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: terminal}
    command = [sys.executable, str(MODULE), *arguments]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True, **streams) as process:
        assert process.stdout and process.stdout.readline().startswith("ready: ")
        os.close(terminal)
        os.close(master)
        process.send_signal(signal.SIGHUP)
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_watch_reads_a_config_again_only_where_it_has_changed(tmp_path: Path) -> None:
    """And not at each look: that of 1,000 models would take half of a core."""
    models = [model(f"m{number}", "openai/m", "http://127.0.0.1:9/v1") for number in range(300)]
    config = write_config(tmp_path, {"include": ["more.yaml", "\0"], "model_list": models})
    began = time.thread_time()
    watch = proxy.Watch(config)
    one_reading = time.thread_time() - began
    began = time.thread_time()
    assert not any(watch.changed() for _ in range(10))
    assert time.thread_time() - began < one_reading
    for path, said in (
        (tmp_path / "more.yaml", "{}"),
        (Path(config), "include: [other.yaml]"),
        (tmp_path / "other.yaml", "include: [folder/third.yaml, other.yaml]"),
        (tmp_path / "folder" / "third.yaml", "{}"),
        (tmp_path / "folder" / "third.yaml", "a: 1"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(said)
        assert [watch.changed() for _ in range(3)] == [False, True, False], "it has changed, and then lies still"


def test_watch_takes_over_a_changed_config_by_itself(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", provider.url, "--watch")
    rewrite(running, lambda document: document["user_id_mappings"].update(default_user_id="watched"))

    def injected() -> str | None:
        running.chat()
        return provider.last.header("x-sm-user-id")

    wait_until(lambda: injected() == "watched")
    rewrite(running, "model_list: [")
    wait_until(lambda: '"event": "refused"' in running.output)
    assert injected() == "watched"
    assert running.stop() == 0


USE_SDK_TEXTS = {
    "model_list: []\n": "model_list: []\ngeneral_settings:\n  experimental:\n    use_sdk_proxy: true\n",
    "a: 1": "a: 1\ngeneral_settings:\n  experimental:\n    use_sdk_proxy: true\n",
    "general_settings: # g\n    x: 1 # x\nb: 2\n": "general_settings: # g\n    experimental:\n"
    "      use_sdk_proxy: true\n    x: 1 # x\nb: 2\n",
    "general_settings:\n": "general_settings:\n  experimental:\n    use_sdk_proxy: true\n",
    "general_settings:\n  experimental:\n    a: 1\n": "general_settings:\n  experimental:\n"
    "    use_sdk_proxy: true\n    a: 1\n",
    "general_settings:\n  experimental:\n    use_sdk_proxy:   false   # why\n": "general_settings:\n  experimental:\n"
    "    use_sdk_proxy:   true   # why\n",
    "general_settings: {}\n": "general_settings: {experimental: {use_sdk_proxy: true}}\n",
    "general_settings: {a: 1}\n": "general_settings: {experimental: {use_sdk_proxy: true}, a: 1}\n",
    "general_settings: {experimental: {use_sdk_proxy: false, b: 2}}": "general_settings: {experimental: "
    "{use_sdk_proxy: true, b: 2}}",
    "x: ü # ü\r\ngeneral_settings:\r\n  a: 1\r\n": "x: ü # ü\r\ngeneral_settings:\r\n  experimental:\r\n"
    "    use_sdk_proxy: true\r\n  a: 1\r\n",
    '"general_settings":\n  "experimental":\n    "use_sdk_proxy": os.environ/X\n': '"general_settings":\n'
    '  "experimental":\n    "use_sdk_proxy": true\n',
}


@pytest.mark.parametrize(("before", "after"), USE_SDK_TEXTS.items())
def test_the_switch_changes_one_line_and_keeps_the_rest(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(before.encode())
    path.chmod(0o640)
    proxy.set_use_sdk(str(path), True)
    assert path.read_bytes().decode() == after
    assert path.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [path]


def test_the_switch_follows_a_link_to_a_config_with_includes(tmp_path: Path) -> None:
    real = tmp_path / "real" / "config.yaml"
    real.parent.mkdir()
    real.write_text("include: [models.yaml]\n")
    (tmp_path / "models.yaml").write_text("model_list: []\n")  # looked for beside the link, as LiteLLM does
    link = tmp_path / "config.yaml"
    link.symlink_to(real)
    proxy.set_use_sdk(str(link), True)
    assert link.is_symlink() and "use_sdk_proxy: true" in real.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "general_settings: null\n",
        "x: &a false\ngeneral_settings: {experimental: {use_sdk_proxy: *a}}\n",
        "general_settings: 5\n",
        "general_settings:\n  experimental: [1]\n",
        "include: [other.yaml]\n",
    ],
)
def test_a_config_that_cannot_be_changed_safely_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("general_settings: {a: 1}\n")
    with pytest.raises(proxy.StartError, match=r"config.yaml: "):
        proxy.set_use_sdk(str(path), True)
    assert path.read_text() == text and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("general_settings: [1]", "general_settings"),
        ("general_settings: {experimental: 5}", "general_settings.experimental"),
    ],
)
def test_a_switch_that_finds_no_mapping_names_its_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(proxy.StartError, match=f"config.yaml: {key} must be a mapping"):
        proxy.set_use_sdk(write_config(tmp_path, text), True)


CALLBACK = """\
from litellm.integrations.custom_logger import CustomLogger
handler = CustomLogger()
"""


def test_a_new_litellm_server_takes_over_without_a_gap(shared_provider: Provider, provider: Provider) -> None:
    arguments = ("--mode", "both", "--sdk-port", "0", "--litellm-port", str(free_port()), "--log-level", "debug")
    running = Proxy(config_for(shared_provider), *arguments)
    old = server_pid(running)
    running.config.with_name("beside.py").write_text(CALLBACK)
    whole = json.dumps(chat_body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(whole)}\r\nConnection: close\r\n\r\n"

    def change(document: dict[str, Any]) -> None:
        document["model_list"].append(model("added", "openai/gpt-added", f"{provider.url}/v1"))
        document["litellm_settings"] = {"callbacks": ["beside.handler"]}

    with Load(running, rate=5) as load, socket.create_connection(("127.0.0.1", running.port), 60) as slow:
        slow.sendall(head.encode() + whole[:20])  # it began under the old server, and is to end there
        load.wait_for("binary")
        rewrite(running, change)
        sdk_url = running.ready()[1]
        ask = lambda url: httpx.post(f"{url}{CHAT}", json=chat_body("added"), trust_env=False).status_code  # noqa: E731
        for _ in range(4):  # the same config again: its server keeps starting
            running.process.send_signal(signal.SIGHUP)
            wait_until(lambda: ask(sdk_url) == 200, 5)
        wait_until(lambda: '"event": "reloaded"' in running.output, 90)
        assert ask(running.url) == 200
        load.wait_for("binary")
        slow.sendall(whole[20:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert not load.failed and set(load.sides) == {"binary"}
    wait_until(lambda: not Path(f"/proc/{old}").exists(), 30)
    assert len(set(re.findall(r"Started server process \[(\d+)\]", running.output))) == 2
    assert running.stop() == 0
    assert "Traceback (most" not in running.output


def test_a_config_that_litellms_server_refuses_changes_nothing(shared_provider: Provider, provider: Provider) -> None:
    running = Proxy(
        config_for(shared_provider), "--mode", "both", "--sdk-port", "0", "--litellm-port", str(free_port())
    )
    sdk_url = running.ready()[1]

    def memory_of(url: str) -> str | None:
        assert httpx.post(f"{url}{CHAT}", json=chat_body(), trust_env=False).status_code == 200
        return provider.last.header("x-sm-user-id")

    def spoil(document: dict[str, Any]) -> None:
        document["general_settings"]["custom_auth"] = "no_such_module.function"
        document["user_id_mappings"]["default_user_id"] = "spoilt"

    def litellm_server() -> Any:
        return running.client.get("/health").json()["checks"]["litellm_server"]

    good = running.config.read_text()
    rewrite(running, spoil)
    done = command(running, "cutover")
    assert done.returncode == 1 and "no_such_module" in done.stdout and f"{running.url}: binary serves" in done.stdout
    assert memory_of(running.url) == memory_of(sdk_url) == "default-dev"
    os.kill(server_pid(running), signal.SIGKILL)  # what it reads then is not what the file says now
    wait_until(lambda: running.chat().headers["x-proxy-backend"] == "binary" and running.chat().status_code == 503)
    wait_until(lambda: running.chat().status_code == 200, 90)
    assert memory_of(running.url) == "default-dev"
    reload(running, good)
    assert litellm_server()["restarts"] == samples_of(running)["memory_proxy_litellm_server_restarts_total"] == 1
    place = litellm_server()["url"]
    rewrite(running, lambda document: document["model_list"].pop())
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: litellm_server()["url"] != place, 90)
    assert litellm_server()["restarts"] == samples_of(running)["memory_proxy_litellm_server_restarts_total"] == 1
    running.process.terminate()
    running.process.wait(40)
    assert [path.name for path in running.config.parent.iterdir()] == ["config.yaml"], "its files have gone with it"
    assert running.stop() == 0


def test_a_litellm_server_that_cannot_start_is_one_clear_line(shared_provider: Provider) -> None:
    config = config_for(shared_provider)
    config["general_settings"]["custom_auth"] = "no_such_module.function"
    said = failed_start(config, "--mode", "binary", "--litellm-port", str(free_port())).lines[-1]
    assert said.startswith("error: the LiteLLM server does not start") and "no_such_module" in said


def test_cutover_reaches_a_proxy_that_is_still_starting(shared_provider: Provider) -> None:
    running = Proxy(
        config_for(shared_provider),
        *("--mode", "both", "--sdk-port", "0", "--litellm-url", shared_provider.url),
        wait=False,
    )
    wait_until(lambda: Path(f"{running.config}.pid").exists())
    done = command(running, "cutover")
    running.wait_ready(2)
    assert done.returncode == 0 and f"{running.url}: sdk serves" in done.stdout, done
    assert running.chat().headers["x-proxy-backend"] == "sdk"
    assert running.stop() == 0


def test_a_switch_to_binary_waits_for_its_server(shared_provider: Provider, provider: Provider) -> None:
    config = config_for(shared_provider, general_settings=experimental(use_sdk_proxy=True))
    running = Proxy(config, "--mode", "both", "--sdk-port", "0", "--litellm-port", str(free_port()))
    with Load(running, rate=5) as load:
        done = command(running, "rollback")  # its server is still starting
        assert done.returncode == 0 and f"{running.url}: binary serves" in done.stdout, done
        load.wait_for("binary")
    assert not load.failed and load.sides[0] == "sdk"
    assert running.stop() == 0


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LOAD = [sys.executable, str(MODULE), "load"]
ALTERED = "import sys, litellm_memory_proxy as p; p.{}; sys.exit(p.main(sys.argv[1:]))"  # one constant, in the child


def run_load(
    folder: Path, *arguments: str, altered: str = "", stderr: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command `load`, in a folder whose config.yaml it reads if there is one."""
    command = [sys.executable, "-c", ALTERED.format(altered), "load"] if altered else LOAD
    environment = clean_environment(PYTHONPATH=str(HERE), **environment)
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
    )


def table_of(output: str) -> dict[str, str]:
    """The rows of load's table: label → the rest."""
    rows = (re.split(r"  +", line.strip(), maxsplit=1) for line in output.splitlines())
    return {row[0]: row[-1] for row in rows}


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("mode", ["sdk", "forward"])
def test_load_measures_a_running_proxy(
    request: pytest.FixtureRequest, provider: Provider, tmp_path: Path, mode: str, stream: list[str]
) -> None:
    running: Proxy = request.getfixturevalue(mode)
    result = run_load(tmp_path, "--port", str(running.port), "--num-requests", "40", "--concurrency", "8", *stream)
    assert result.returncode == 0 and "error" not in result.stderr, result.stdout
    table = table_of(result.stdout)
    assert table["requests"] == "40" and table["errors"] == "0" and table["success rate"] == "100.0 % (40 of 40)"
    assert float(table["duration"].removesuffix(" s")) > 0 and float(table["requests a second"]) > 0
    whole, first = (re.findall(r"([\d.]+) ms", table[row]) for row in ("whole answer", "first token"))
    assert len(whole) == len(first) == 3 and whole == sorted(whole, key=float)
    assert all(float(early) <= float(late) for early, late in zip(first, whole, strict=True))
    assert len(provider.got) == (40 if mode == "forward" else 0)  # sdk mode answers for its demo model itself


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_load_sends_chat_requests_over_kept_connections(provider: Provider, tmp_path: Path, stream: list[str]) -> None:
    before = provider.connections
    arguments = ("--url", provider.url, "--model", "gpt", "--num-requests", "30", "--concurrency", "3", *stream)
    assert run_load(tmp_path, *arguments).returncode == 0
    assert len(provider.got) == 30 and provider.connections - before == 3
    got = provider.last
    assert (got.method, got.path, got.header("user-agent")) == ("POST", CHAT, "litellm_memory_proxy/load")
    assert got.body["model"] == "gpt" and got.body["stream"] is bool(stream) and got.body["messages"]
    assert got.header("authorization") is None


@pytest.mark.parametrize("stream", [False, True])
def test_load_times_the_first_token_apart_from_the_whole(provider: Provider, tmp_path: Path, stream: bool) -> None:
    """Heads and events without text come at once, the text after 0.2 s where it is a stream, the end 2 s later."""
    role = openai_chunk({"role": "assistant", "content": ""})
    body = usual_answer(Got("POST", CHAT, [], b'{"model": "m"}')).body

    def parts() -> Iterator[bytes]:
        if stream:
            yield b": hello\n\n" + role
            time.sleep(0.2)
        yield openai_stream(["hi"])[0] if stream else body[:1]
        time.sleep(2)
        yield b"data: [DONE]\n\n" if stream else body[1:]

    provider.script = lambda _got: Reply(parts=parts(), headers=SSE)  # type: ignore[arg-type]
    arguments = ("--url", provider.url, "--num-requests", "1", *(["--stream"] if stream else []))
    table = table_of(run_load(tmp_path, *arguments).stdout)
    whole, first = (float(table[row].split()[0]) for row in ("whole answer", "first token"))
    assert first > (190 if stream else 0) and whole > first + 500


ERROR_EVENT = sse({"error": {"message": "overloaded", "type": "server_error", "code": 500}})
FAILING: dict[str, Reply] = {
    "HTTP 429": Reply(b'{"error": {"message": "slow down"}}', 429),
    "HTTP 503": Reply(b'{"error": {"message": "the LiteLLM server is starting"}}', 503),
    "stream cut off": Reply(parts=openai_stream(["hel", "lo"])[:1], headers=SSE, cut=True),
    "stream cut off ": Reply(parts=openai_stream(["hel", "lo"])[:-1], headers=SSE),
    "stream cut off  ": Reply(parts=openai_stream(["hel", "lo"]), headers=SSE, cut=True),
    "error event": Reply(parts=[*openai_stream(["hel"])[:1], ERROR_EVENT, b"data: [DONE]\n\n"], headers=SSE),
    "answer cut off": Reply(b'{"choices": []', headers={"content-length": "99"}, cut=True),
    "no chat completion": Reply(b"<html>sign in</html>", headers={"content-type": "text/html"}),
}


@pytest.mark.parametrize("kind", FAILING)
def test_load_tells_each_kind_of_failure(provider: Provider, tmp_path: Path, kind: str) -> None:
    """Every second request fails, and the one after it finds a connection that works."""
    provider.script = lambda got: FAILING[kind] if len(provider.got) % 2 == 0 else usual_answer(got)
    stream = [] if kind in ("answer cut off", "no chat completion") else ["--stream"]
    result = run_load(tmp_path, "--url", provider.url, "--num-requests", "10", "--concurrency", "1", *stream)
    assert (result.returncode, result.stderr) == (1, "")
    table = table_of(result.stdout)
    assert table["errors"] == table[kind.strip()] == "5" and table["success rate"] == "50.0 % (5 of 10)"
    assert table["for example"].startswith(f"{kind.strip()}: ") and "ms" in table["whole answer"]


def test_load_counts_kinds_and_shows_the_most_frequent(provider: Provider, tmp_path: Path) -> None:
    replies = [FAILING["HTTP 429"], *[FAILING["HTTP 503"]] * 2]
    provider.script = lambda _got: replies[len(provider.got) % 3]
    result = run_load(tmp_path, "--url", provider.url, "--num-requests", "9", "--concurrency", "1")
    table = table_of(result.stdout)
    assert (result.returncode, table["HTTP 429"], table["HTTP 503"]) == (1, "3", "6")
    assert table["for example"] == "HTTP 503: the LiteLLM server is starting" and "slow down" not in result.stdout
    assert re.split(r"  +", table["whole answer"]) == ["-", "-", "-"]


@pytest.mark.parametrize("where", ["", "https", "host.invalid"])
def test_load_says_in_one_line_that_nobody_is_there(provider: Provider, tmp_path: Path, where: str) -> None:
    port = free_port()
    url, kind = {
        "": (f"http://127.0.0.1:{port}", "connection refused"),
        "https": (f"https://127.0.0.1:{port}", "connection refused"),
        "host.invalid": ("http://host.invalid:80", "host not found"),
    }[where]
    result = run_load(tmp_path, "--url", url, "--num-requests", "20")
    assert result.returncode == 1 and table_of(result.stdout)[kind] == "20"
    assert result.stderr.startswith(f"error: {url}: {kind}") and result.stderr.count("\n") == 1


def test_load_calls_the_port_that_serve_would_take(provider: Provider, tmp_path: Path) -> None:
    one, other = str(provider.port), str(free_port())
    (tmp_path / "config.yaml").write_text("model_list: [")  # broken, which is no obstacle
    assert run_load(tmp_path, "--num-requests", "1", PROXY_PORT=one).returncode == 0
    assert run_load(tmp_path, "--num-requests", "1", "--port", one, PROXY_PORT=other).returncode == 0
    assert run_load(tmp_path, "--num-requests", "1", "--port", other, PROXY_PORT=one).returncode == 1


PREFIXES = {"/": "", "/v1": "", "/v1/": "", "/a/b": "/a/b", "/a/v1": "/a", "/av1": "/av1"}


@pytest.mark.parametrize(("end", "prefix"), PREFIXES.items())
def test_load_takes_a_url_with_a_path(provider: Provider, tmp_path: Path, end: str, prefix: str) -> None:
    assert run_load(tmp_path, "--url", provider.url + end, "--num-requests", "1").returncode == 0
    assert provider.last.path == prefix + CHAT


UNUSABLE_URLS = [
    "",
    "127.0.0.1:8764",
    "http://",
    "http://h:99999",
    "http://[::1",
    "ftp://h",
    "http://h/ü",
    "http://h/a b",
]
UNUSABLE_URLS += ["http://h?q", "http://user:hidden@h", "http://user:hidden@h:port"]


@pytest.mark.parametrize("url", UNUSABLE_URLS)
def test_load_refuses_an_unusable_url_in_one_line(tmp_path: Path, url: str) -> None:
    result = run_load(tmp_path, "--url", url)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --url") and result.stderr.count("\n") == 1
    assert "hidden" not in result.stderr


@pytest.mark.parametrize("option", ["--num-requests", "--concurrency"])
@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_load_refuses_numbers_that_make_no_sense(tmp_path: Path, option: str, number: str) -> None:
    result = run_load(tmp_path, option, number)
    assert result.returncode == 2 and option in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("source", ["config", "environment", ".env", "broken config"])
def test_load_shows_the_master_key_to_the_proxy_and_to_nobody_else(
    provider: Provider, tmp_path: Path, source: str
) -> None:
    key = "a-master-key-0123456789"
    environment = {} if source in ("config", ".env") else {"LITELLM_MASTER_KEY": key}
    (tmp_path / ".env").write_text(f"LITELLM_MASTER_KEY={key}" if source == ".env" else "")
    general = {"master_key": key} if source == "config" else {}
    document = "[" if source == "broken config" else yaml.safe_dump(config_for(provider, general_settings=general))
    (tmp_path / "config.yaml").write_text(document)
    echo = "wrong key " + key + ", \x1b[31mBearer\n " + PROVIDER_KEY
    provider.script = lambda _got: Reply(json.dumps({"error": {"message": echo}}).encode(), 401)
    result = run_load(tmp_path, "--url", provider.url, "--num-requests", "2", **environment)
    assert provider.last.header("authorization") == f"Bearer {key}"
    assert table_of(result.stdout)["for example"] == "HTTP 401: wrong key [redacted], ?[31mBearer [redacted]"
    assert key not in result.stdout + result.stderr


def test_load_gives_up_on_an_answer_that_takes_too_long(provider: Provider, tmp_path: Path) -> None:
    """The provider never falls silent for long, so that only the whole request's time can tell."""
    provider.script = lambda _got: Reply(parts=openai_stream(list("abcdefghij") * 5), headers=SSE, pause=0.1)
    arguments = ("--url", provider.url, "--stream", "--num-requests", "2")
    result = run_load(tmp_path, *arguments, altered="REQUEST_SECONDS = 0.5")
    table = table_of(result.stdout)
    assert (result.returncode, table["timeout"]) == (1, "2") and float(table["duration"].split()[0]) < 3
    provider.script = lambda got: Reply(usual_answer(got).body, hold=5)
    result = run_load(tmp_path, *arguments, altered="REQUEST_SECONDS = 0.5")
    assert (result.returncode, table_of(result.stdout)["timeout"]) == (1, "2")


@pytest.mark.parametrize("trusted", [True, False])
def test_load_checks_certificates(tmp_path: Path, trusted: bool) -> None:
    url, certificate = tls_provider(tmp_path)
    environment = {"SSL_CERT_FILE": certificate} if trusted else {}
    result = run_load(tmp_path, "--url", url, "--num-requests", "4", "--concurrency", "2", "--stream", **environment)
    assert result.returncode == (0 if trusted else 1), result.stdout
    assert trusted or table_of(result.stdout)["TLS failed"] == "4"


def test_load_stops_at_ctrl_c_with_what_it_has(provider: Provider, tmp_path: Path) -> None:
    provider.script = lambda got: Reply(usual_answer(got).body, hold=0 if len(provider.got) <= 5 else 30)
    command = [*LOAD, "--url", provider.url, "--num-requests", "1000", "--concurrency", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    provider.wait_for(7)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "")
    table = table_of(output)
    assert table["requests"] == "5 of 1000, then stopped" and table["success rate"] == "100.0 % (5 of 5)"


def test_load_draws_a_bar_on_a_terminal_and_leaves_none_behind(provider: Provider, tmp_path: Path) -> None:
    provider.script = lambda got: Reply(usual_answer(got).body, hold=0.2)
    master, slave = os.openpty()
    arguments = ("--url", provider.url, "--num-requests", "8", "--concurrency", "2")
    result = run_load(tmp_path, *arguments, stderr=slave, COLUMNS="60")
    os.close(slave)
    drawn = os.read(master, 65536).decode()
    os.close(master)
    assert result.returncode == 0 and "\r" not in result.stdout and "\n" not in drawn
    before, *bars, blank, after = drawn.split("\r")
    assert (before, blank, after) == ("", " " * 59, "")
    assert len(bars) >= 4 and all(re.fullmatch(r"\[#*\.*\] \d of 8 requests", bar) and len(bar) == 59 for bar in bars)
    filled = [bar.count("#") for bar in bars]
    assert filled == sorted(filled) and filled[-1] > filled[0]


def test_load_prints_lines_where_there_is_no_terminal(provider: Provider, tmp_path: Path) -> None:
    provider.script = lambda _got: Reply(b"{}", 500, hold=0.5)
    arguments = ("--url", provider.url, "--num-requests", "6", "--concurrency", "2")
    result = run_load(tmp_path, *arguments, altered="PROGRESS_SECONDS = 0.6")
    assert re.fullmatch(r"(\d of 6 requests(, \d failed)?: \d+ s\n)+", result.stderr), result.stderr


# ── parity ───────────────────────────────────────────────────────────────────────────────────────────────────────


DEMO = {"model": "openai/demo", "api_key": "os.environ/DEMO_KEY", "mock_response": "hi"}


def run_parity(tmp_path: Path, *arguments: str, **sections: Any) -> subprocess.CompletedProcess[str]:
    """The command with the shipped config, and these sections in place of its own."""
    config = write_config(tmp_path, {**yaml.safe_load((HERE / "config.yaml").read_text()), **sections})
    line = [sys.executable, "-c", ALTERED.format("PROGRESS_SECONDS = 0.1"), "parity", "--config", config, *arguments]
    environment = clean_environment(PYTHONPATH=str(HERE))
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.parametrize(("arguments", "count"), [((), 47), (("--model", "demo"), 36)], ids=["inside", "demo"])
def test_both_modes_answer_alike(tmp_path: Path, arguments: tuple[str, ...], count: int) -> None:
    (tmp_path / ".env").write_text(f"DEMO_KEY={PROVIDER_KEY}")
    done = run_parity(tmp_path, *arguments, model_list=[{"model_name": "demo", "litellm_params": DEMO}])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{count} features, 0 differences"
    assert not list(tmp_path.glob("*.pid")), "it is not the proxy that runs with this config"


def test_parity_finds_a_memory_that_one_mode_loses(tmp_path: Path) -> None:
    done = run_parity(tmp_path, general_settings={})  # without forward_client_headers_to_llm_api
    assert done.returncode == 1 and "0 differences" not in done.stdout
    (row,) = re.findall("^  memory: PyCharm .*$", done.stdout, re.MULTILINE)
    assert "DIFFERENT: provider: header x-" in row and "only in sdk" in row
    said = Counter(re.findall(r"^(\d+) of 47 features: \d+ s$", done.stderr, re.MULTILINE))
    assert max(said.values()) > 2, "time goes by while a mode tries a provider again that does not answer"


def test_parity_with_an_unusable_config_is_one_clear_line(tmp_path: Path) -> None:
    line = [sys.executable, str(MODULE), "parity", "--config", write_config(tmp_path, {"model_list": 5})]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("model_name", "known"), [("gpt", True), ("gpt-5", True), ("short", True), ("gtp", False)])
def test_parity_refuses_a_model_that_the_config_does_not_have(tmp_path: Path, model_name: str, known: bool) -> None:
    models = [model(name, "openai/gpt", "http://127.0.0.1:9") for name in ("gpt", "gpt-*")]
    document = {"model_list": models, "router_settings": {"model_group_alias": {"short": "gpt"}}}
    config = proxy.load_config(write_config(tmp_path, document))
    said = "--model gtp: is not in the config (known: gpt, gpt-*, short)"
    with contextlib.nullcontext() if known else pytest.raises(proxy.StartError, match=re.escape(said)):
        proxy.refuse_unknown(["gpt", model_name], config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_parity_leaves_no_process_and_no_file_behind_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    config = write_config(tmp_path, {"model_list": [model("gpt", "openai/gpt", "http://127.0.0.1:9")]})
    line = [sys.executable, str(MODULE), "parity", "--config", config]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, env=clean_environment(TMPDIR=str(tmp_path)))

    def modes() -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    wait_until(lambda: len(modes()) == 2)
    both = modes()
    process.send_signal(number)
    try:
        if number == signal.SIGKILL:
            wait_until(lambda: all(ps(pid, "stat").strip()[:1] in ("", "Z") for pid in both), 40)
        else:
            assert process.wait(40) == 130
            assert not any(ps(pid, "pid").strip() for pid in both)
        assert not list(tmp_path.glob("parity-*"))
    finally:
        for pid in both:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def parity_answer(**changes: Any) -> proxy.Answer:
    body = {"id": "c1", "choices": [{"message": {"content": "hello"}}]}
    seen = proxy.Received("/v1/chat/completions", {"model": "gpt", "temperature": 0.5}, {"x-sm-user-id": "me"})
    usual = proxy.Answer(200, "application/json", {"x-request-id": "r"}, json.dumps(body).encode(), (seen,))
    return dataclasses.replace(usual, **changes)


PLANTED = {
    "status": {"status": 500},
    "content type": {"media": "text/plain"},
    "body.choices.0.message.content": {"body": b'{"id": "c1", "choices": [{"message": {"content": "other"}}]}'},
    "body.id only in binary": {"body": b'{"choices": [{"message": {"content": "hello"}}]}'},
    "body.choices.length only in binary": {"body": b'{"choices": ['},
    "provider: calls": {"received": ()},
    "provider: body temperature": {
        "received": (
            proxy.Received("/v1/chat/completions", {"model": "gpt", "temperature": 1}, {"x-sm-user-id": "me"}),
        )
    },
    "provider: header x-sm-user-id": {
        "received": (
            proxy.Received("/v1/chat/completions", {"model": "gpt", "temperature": 0.5}, {"x-sm-user-id": "x"}),
        )
    },
}


@pytest.mark.parametrize("name", PLANTED)
def test_parity_finds_a_planted_difference(name: str) -> None:
    facts = [proxy.facts_of(answer, values=True) for answer in (parity_answer(), parity_answer(**PLANTED[name]))]
    assert any(difference.startswith(name) for difference in proxy.differences(*facts))
    assert proxy.verdict("chat", proxy.differences(*facts)).startswith(proxy.DIFFERENT)
    assert proxy.verdict("chat", proxy.differences(facts[0], facts[0])) == "same"


def test_parity_compares_answers_that_are_no_objects_too() -> None:
    for one, other in ((b"[1]", b"[2]"), (b"[1]", b'"one"'), (b"[", b"{")):
        facts = [proxy.facts_of(parity_answer(body=body), values=True) for body in (one, other)]
        assert list(proxy.differences(*facts))


@pytest.mark.parametrize("stream", [anthropic_stream, openai_stream])
def test_parity_compares_streams_by_their_order_and_text_and_not_by_their_chunks(
    stream: Callable[[list[str]], list[bytes]],
) -> None:
    def facts(parts: list[bytes]) -> dict[str, Any]:
        return proxy.facts_of(parity_answer(media="text/event-stream", body=b"".join(parts)), values=True)

    events = stream(["hel", "lo"])
    usual = facts(events)
    assert "hello" in usual.values()
    assert not list(proxy.differences(usual, facts(stream(["h", "el", "lo"]))))
    for changed in (events[:-1], [*events[1:], events[0]], [part.replace(b"hel", b"bye") for part in events]):
        assert list(proxy.differences(usual, facts(changed)))


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_ctrl_c_does_not_wait_for_the_requests_that_run(provider: Provider) -> None:
    provider.script = lambda got: Reply(usual_answer(got).body, hold=30)
    running = Proxy(config_for(provider), "--mode", "binary", "--litellm-url", provider.url)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(running.chat)
        provider.wait_for(1)
        for _ in range(2):  # at once: one Ctrl-C that a wrapper has handed on
            running.process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert running.process.poll() is None and "Ctrl-C again" in running.output
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(5) == -signal.SIGINT
        with pytest.raises(httpx.TransportError):
            waiting.result()


def test_a_litellm_server_that_is_not_installed_is_named_with_its_package(provider: Provider, tmp_path: Path) -> None:
    (tmp_path / "websockets.py").write_text("raise ModuleNotFoundError(\"No module named 'websockets'\")")
    said = failed_start(config_for(provider), "--mode", "binary", PYTHONPATH=str(tmp_path)).lines[-1]
    assert re.match(r"error: the LiteLLM server does not start with this config: .*'websockets'.*litellm\[proxy]", said)


def test_both_fronts_share_one_config(shared_provider: Provider, provider: Provider) -> None:
    url = shared_provider.url
    running = Proxy(config_for(shared_provider), "--mode", "both", "--sdk-port", "0", "--litellm-url", url)
    assert re.findall(r"^ready: (\w+) ", running.output, re.M) == ["binary", "sdk"]
    first, second = running.ready()
    for base in (first, second):
        response = httpx.post(f"{base}/v1/chat/completions", json=chat_body(), trust_env=False, verify=False)
        assert response.status_code == 200 and provider.last.header("x-sm-user-id") == "default-dev"
    assert [got.body["model"] for got in provider.got] == ["gpt", "gpt-4o-mini"]
    assert running.stop() == 0


def test_a_proxy_that_cannot_be_told_of_a_cutover_is_one_error(tmp_path: Path) -> None:
    config = write_config(tmp_path, config_for_models())
    (tmp_path / "config.yaml.status").write_text('{"loads": 1}')
    with (tmp_path / "config.yaml.pid").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print(2**31 - 1, file=file, flush=True)  # more than any process id
        command = [sys.executable, str(MODULE), "cutover", "--config", config]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: the proxy (pid 2147483647) cannot be told: No such process\n")
    assert "use_sdk_proxy" not in Path(config).read_text()


@pytest.mark.parametrize("command", ["check", "load --url http://127.0.0.1:9 --num-requests 1", "cutover"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_whoever_reads_no_output_of_a_command_gets_its_exit_code_and_no_traceback(
    tmp_path: Path, command: str, unbuffered: str
) -> None:
    config = write_config(tmp_path, {"model_list": [{}]} if command == "check" else config_for_models())
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, str(MODULE), *command.split(), "--config", config]
    environment = clean_environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    os.close(writer)
    assert done.returncode == 1 and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "experimental", "mode"),
    [
        ([], {}, {}, "sdk"),
        ([], {}, {"use_sdk_proxy": False}, "binary"),
        ([], {"USE_SDK_PROXY": "true"}, {"use_sdk_proxy": False}, "sdk"),
        ([], {"USE_SDK_PROXY": "false"}, {}, "binary"),
        (["--use-sdk"], {"USE_SDK_PROXY": "false"}, {}, "sdk"),
        (["--mode", "binary"], {"USE_SDK_PROXY": "true"}, {}, "binary"),
        (["--run-both"], {}, {}, "both"),
    ],
)
def test_the_mode_is_flag_then_environment_then_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    experimental: dict[str, Any],
    mode: str,
) -> None:
    monkeypatch.delenv("USE_SDK_PROXY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    document = {"model_list": [model("a", "openai/a", "http://h")], "general_settings": {"experimental": experimental}}
    config = proxy.load_config(write_config(tmp_path, document))
    settings = proxy.settle(proxy.build_parser().parse_args(arguments), config)
    assert (settings.mode, settings.port, settings.sdk_port) == (mode, 8764, 8765)


@pytest.mark.parametrize("stream", [False, True])
def test_sigterm_lets_what_is_in_flight_end(shared_provider: Provider, provider: Provider, stream: bool) -> None:
    running = Proxy(config_for(shared_provider))
    if stream:
        provider.script = lambda _got: Reply(parts=openai_stream(list("abcdef")), headers=SSE, pause=0.2)
    else:
        provider.script = lambda got: Reply(usual_answer(got).body, hold=1)
    idle = socket.create_connection(("127.0.0.1", running.port))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.chat, stream=stream)
        provider.wait_for()
        running.process.terminate()
        wait_until(lambda: refuses_connections(running.port))
        assert answer.result().status_code == 200
        assert ("[DONE]" if stream else "hello") in answer.result().text
    assert idle.recv(1) == b""
    idle.close()
    assert running.stop() == 0
    assert "Traceback (most" not in running.output and "Unclosed" not in running.output


def test_a_storm_of_signals_ends_the_program_all_the_same(shared_provider: Provider) -> None:
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-url", shared_provider.url)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(200):
            running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    running.stop()


def test_sigterm_during_the_start_ends_it(shared_provider: Provider) -> None:
    port = str(free_port())
    running = Proxy(config_for(shared_provider), "--mode", "binary", "--litellm-port", port, wait=False)
    wait_until(lambda: "waiting for the LiteLLM server" in running.output, 20)
    running.process.terminate()
    assert running.process.wait(15) == 0 and not running.ready()
    running.stop()


@pytest.mark.parametrize(
    "key", [None, "sk-1234", "fifteen-letters", "sk-1234567890abcdef", "a" * 40, "short" + " " * 20]
)
def test_an_open_address_without_a_strong_key_is_refused(provider: Provider, key: str | None) -> None:
    general = {"forward_client_headers_to_llm_api": True, "master_key": key}
    arguments = ("--mode", "binary", "--litellm-url", provider.url, "--host", "0.0.0.0")
    said = failed_start(config_for(provider, general_settings=general), *arguments).lines[-1]
    assert said.startswith("error: --host") and (not key or key not in said)


def test_an_open_address_asks_for_the_key_but_for_health(provider: Provider) -> None:
    key = "a-master-key-0123456789"
    general = {"forward_client_headers_to_llm_api": True, "master_key": key}
    arguments = ("--mode", "binary", "--litellm-url", provider.url, "--host", "0.0.0.0")
    running = Proxy(config_for(provider, general_settings=general), *arguments)
    for path in ("/metrics", "/memory-routing/info", "/memory-routing/stats"):
        assert running.client.get(path).status_code == 401
        assert running.client.get(path, headers={"x-api-key": key}).status_code == 200
    assert running.client.get("/health").status_code == 200
    assert running.stop() == 0


def test_warnings_of_python_break_no_log_of_json_lines(provider: Provider) -> None:
    arguments = ("--mode", "binary", "--litellm-url", provider.url)
    running = Proxy(config_for(provider), *arguments, PYTHONWARNINGS="default")
    assert running.chat().status_code == 200 and running.stop() == 0
    assert all(line.startswith(("ready: ", "{")) for line in running.lines), running.output


def test_an_unusable_log_level_is_one_clear_line(shared_provider: Provider) -> None:
    assert failed_start(config_for(shared_provider), LOG_LEVEL="trace").lines[-1].startswith("error: LOG_LEVEL")


@pytest.mark.parametrize("flag", ["--allow-host=http://a", "--allow-host=a:80", "--allow-origin=chat.example"])
def test_an_unusable_host_or_origin_is_one_clear_line(shared_provider: Provider, flag: str) -> None:
    assert flag.partition("=")[2] in failed_start(config_for(shared_provider), flag).lines[-1]


@pytest.mark.parametrize("host", ["127.0.0.1:80", "[::1]:80", "http://127.0.0.1", ""])
def test_an_address_with_a_scheme_or_a_port_is_none_to_listen_on(capsys: pytest.CaptureFixture[str], host: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        proxy.main(["--host", host])
    assert f"argument --host: {host!r} is no address" in capsys.readouterr().err


def test_an_ipv6_address_to_listen_on_may_have_brackets() -> None:
    assert proxy.build_parser().parse_args(["--host", "[::1]"]).host == "::1"


def test_an_address_of_another_machine_is_one_clear_line_that_blames_no_port(shared_provider: Provider) -> None:
    key = "correct.horse-battery"
    refused = failed_start(config_for(shared_provider), "--host", "192.0.2.1", LITELLM_MASTER_KEY=key)
    assert re.fullmatch(
        "error: cannot listen on 192.0.2.1:[0-9]+: .*; --host must be an address of this machine", refused.lines[-1]
    )


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:4000",
        "http://h:99999",
        "http://h:0",
        "http://[::1",
        "http://h:abc",
        "ftp://h",
        "http://h?q",
        "http://h#f",
    ],
)
def test_an_unusable_litellm_url_is_one_clear_line_at_once(shared_provider: Provider, url: str) -> None:
    refused = failed_start(config_for(shared_provider), "--mode", "sdk", "--litellm-url", url)
    assert refused.lines[-1].startswith("error: --litellm-url must be http://HOST:PORT")
    assert "loading LiteLLM" not in refused.output


def test_a_litellm_url_with_a_password_is_refused_without_showing_it(shared_provider: Provider) -> None:
    url = shared_provider.url.replace("//", "//user:hunter22@")
    refused = failed_start(config_for(shared_provider), "--mode", "binary", "--litellm-url", url)
    assert (
        refused.lines[-1].startswith("error: --litellm-url takes no credentials") and "hunter22" not in refused.output
    )


@pytest.mark.parametrize(
    ("mode", "option"), [("sdk", "--port"), ("binary", "--port"), ("both", "--port"), ("both", "--sdk-port")]
)
def test_a_port_that_is_taken_is_one_clear_line_at_once(shared_provider: Provider, mode: str, option: str) -> None:
    taken = str(shared_provider.port)
    ports = chain(*{"--sdk-port": "0", option: taken}.items())
    refused = failed_start(config_for(shared_provider), "--mode", mode, "--litellm-url", shared_provider.url, *ports)
    assert re.fullmatch(
        f"error: cannot listen on 127.0.0.1:{taken}: .*; another {option} may be free", refused.lines[-1]
    )
    assert "loading LiteLLM" not in refused.output


@pytest.mark.parametrize(
    "ports",
    [("--mode", "binary", "--litellm-port"), ("--mode", "both", "--sdk-port"), ("--run-both", "--litellm-port")],
)
def test_one_port_for_two_is_one_clear_line(shared_provider: Provider, ports: tuple[str, ...]) -> None:
    port = str(free_port())
    said = failed_start(config_for(shared_provider), *ports, port, "--port", port).lines[-1]
    assert said.startswith("error: --port") and port in said


def test_the_start_tells_what_to_do_next(sdk: Proxy) -> None:
    for text in (
        "gpt",
        "demo",
        "claude-code",
        "default-dev",
        "ANTHROPIC_BASE_URL=",
        "OPENAI_BASE_URL=",
        "PyCharm",
        sdk.url,
        *(f"  {who:<42} -> {what}" for who, what in (("x-memory-user-id: ID", "ID"), ("anyone else", "default-dev"))),
    ):
        wait_until(lambda text=text: text in sdk.output)


def test_the_start_warns_where_the_config_would_lose_the_memory(shared_provider: Provider) -> None:
    config = config_for(shared_provider, general_settings={})
    running = Proxy(config, "--mode", "binary", "--litellm-url", shared_provider.url)
    said = re.compile(r'"level": "WARNING".*forward_client_headers_to_llm_api')
    wait_until(lambda: any(said.search(line) for line in running.lines))
    running.stop()


# ── real clients ─────────────────────────────────────────────────────────────────────────────────────────────────

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
RESPONSES_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}
ANTHROPIC_TOOL: Any = {"name": "get_weather", "input_schema": WEATHER}
OPENAI_ARRIVED = ("gpt-4o-mini", "sdk-OpenAI-Python")
ANTHROPIC_ARRIVED = ("claude-sonnet-4-5", "sdk-Anthropic-Python")


def arrived(got: Got) -> tuple[str, str | None]:
    """The model and the memory id that the provider was asked with."""
    return got.body["model"], got.header("x-sm-user-id")


def responses_call_stream(name: str, arguments: str) -> list[bytes]:
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": name, "arguments": arguments}
    done = {**item, "status": "completed"}
    place = {"item_id": "fc_1", "output_index": 0}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**response_object([]), "status": "in_progress"}},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "arguments": "", "status": "in_progress"},
        },
        {"type": "response.function_call_arguments.delta", **place, "delta": arguments},
        {"type": "response.function_call_arguments.done", **place, "name": name, "arguments": arguments},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {"type": "response.completed", "response": response_object([done])},
    ]
    return [sse({**event, "sequence_number": n}, event["type"]) for n, event in enumerate(events)]


def call_reply(got: Got, name: str, arguments: str) -> Reply:
    """A call of this tool, in the request's own API, whole or streamed."""
    if not got.path.partition("?")[0].endswith("/responses"):
        return tool_stream(got, name, [arguments]) if got.body.get("stream") else usual_answer(got)
    if got.body.get("stream"):
        return Reply(parts=responses_call_stream(name, arguments), headers=SSE)
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": name, "arguments": arguments}
    return Reply(json.dumps(response_object([{**item, "status": "completed"}])).encode())


def text_reply(got: Got, text: str) -> Reply:
    """This text, streamed in the request's own API."""
    path = got.path.partition("?")[0]
    if path.endswith("/messages"):
        return Reply(parts=anthropic_stream([text]), headers=SSE)
    return Reply(parts=responses_stream(text) if path.endswith("/responses") else openai_stream([text]), headers=SSE)


def weather_script(got: Got) -> Reply:
    """Asks for the weather until the tool's result is there."""
    if got.method != "POST":
        return usual_answer(got)
    if b"sunny" not in got.raw:
        return call_reply(got, "get_weather", '{"city": "Oslo"}')
    return usual_answer(Got(got.method, got.path, [], json.dumps({**got.body, "tools": None}).encode()))


@pytest.fixture(params=["sdk", "binary"])
def served(request: pytest.FixtureRequest, provider: Provider) -> Proxy:
    """Each mode in turn; in binary mode a real LiteLLM server answers."""
    running: Proxy = request.getfixturevalue(request.param)
    return running


@pytest.fixture
def openai_client(served: Proxy) -> Iterator[openai.OpenAI]:
    from openai import DefaultHttpxClient, OpenAI

    http_client = DefaultHttpxClient(trust_env=False)
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, http_client=http_client) as client:
        yield client


@pytest.fixture
def anthropic_client(served: Proxy) -> Iterator[anthropic.Anthropic]:
    from anthropic import Anthropic, DefaultHttpxClient

    http_client = DefaultHttpxClient(trust_env=False)
    with Anthropic(base_url=served.url, api_key="any", max_retries=0, http_client=http_client) as client:
        yield client


def test_openai_chat(openai_client: openai.OpenAI, provider: Provider) -> None:
    completion = openai_client.chat.completions.create(**chat_body(), temperature=0.5)
    assert completion.choices[0].message.content == "hello" and completion.choices[0].finish_reason == "stop"
    assert completion.usage and completion.usage.total_tokens == 5
    assert provider.last.body["temperature"] == 0.5
    assert arrived(provider.last) == OPENAI_ARRIVED


def test_openai_chat_streamed(openai_client: openai.OpenAI, provider: Provider) -> None:
    stream = openai_client.chat.completions.create(**chat_body(), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "hello"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 5
    assert provider.last.body["stream_options"] == {"include_usage": True}
    assert arrived(provider.last) == OPENAI_ARRIVED


@pytest.mark.parametrize("stream", [False, True])
def test_openai_chat_calls_a_tool(openai_client: openai.OpenAI, provider: Provider, stream: bool) -> None:
    provider.script = weather_script
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    options: dict[str, Any] = {"model": "gpt", "tools": [CHAT_TOOL]}
    if stream:
        with openai_client.chat.completions.stream(messages=messages, **options) as events:
            asked = events.get_final_completion().choices[0]
    else:
        asked = openai_client.chat.completions.create(messages=messages, **options).choices[0]
    (call,) = asked.message.tool_calls or ()
    assert asked.finish_reason == "tool_calls" and call.id == "call_1" and call.type == "function"
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Oslo"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages += [asked.message.model_dump(exclude_none=True, exclude={"parsed"}), result]
    answer = openai_client.chat.completions.create(messages=messages, **options)
    assert answer.choices[0].message.content == "hello"
    question, assistant, told = provider.last.body["messages"]
    assert (question["content"], assistant["tool_calls"][0]["id"], told) == ("weather?", "call_1", result)
    assert [arrived(got) for got in provider.posts] == [OPENAI_ARRIVED] * 2


def test_openai_models(openai_client: openai.OpenAI) -> None:
    assert {"gpt", "claude", "demo"} <= {found.id for found in openai_client.models.list()}
    found = openai_client.models.retrieve("gpt")
    assert (found.id, found.object) == ("gpt", "model")


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str)
def test_openai_embeddings(openai_client: openai.OpenAI, provider: Provider, options: dict[str, Any]) -> None:
    """The library asks for base64 unless told otherwise, and decodes it; told so itself, it leaves it as it is."""
    answer = openai_client.embeddings.create(model="gpt", input=["a", "b"], **options)
    expected: Any = VECTOR_TEXT if options.get("encoding_format") == "base64" else VECTOR
    assert [row.embedding for row in answer.data] == [expected, expected]
    assert answer.usage.total_tokens == 5
    assert provider.last.body["input"] == ["a", "b"]
    assert arrived(provider.last) == OPENAI_ARRIVED


def test_openai_completions(openai_client: openai.OpenAI, provider: Provider) -> None:
    answer = openai_client.completions.create(model="gpt", prompt="hello")
    assert answer.choices[0].text == "hello" and answer.usage and answer.usage.total_tokens == 5
    assert arrived(provider.last) == OPENAI_ARRIVED


@pytest.mark.parametrize("served", ["sdk"], indirect=True)
def test_openai_completions_streamed(openai_client: openai.OpenAI, provider: Provider) -> None:
    """Not in binary mode: the last chunk of LiteLLM's server has no text, which clients add to what they have."""
    chunks = list(openai_client.completions.create(model="gpt", prompt="hello", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "hello"
    assert arrived(provider.last) == OPENAI_ARRIVED


def test_openai_responses(openai_client: openai.OpenAI, provider: Provider) -> None:
    answer = openai_client.responses.create(model="gpt", input="hello", instructions="be short")
    assert answer.output_text == "hello" and answer.status == "completed"
    assert answer.usage and answer.usage.total_tokens == 5
    assert provider.last.body["instructions"] == "be short"
    assert arrived(provider.last) == OPENAI_ARRIVED


def test_openai_responses_streamed(openai_client: openai.OpenAI, provider: Provider) -> None:
    events = list(openai_client.responses.create(model="gpt", input="hello", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hello"
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "hello"
    assert arrived(provider.last) == OPENAI_ARRIVED


@pytest.mark.parametrize("stream", [False, True])
def test_openai_responses_call_a_function(openai_client: openai.OpenAI, provider: Provider, stream: bool) -> None:
    provider.script = weather_script
    talk: list[Any] = [{"role": "user", "content": "weather?"}]
    options: dict[str, Any] = {"model": "gpt", "tools": [RESPONSES_TOOL]}
    if stream:
        with openai_client.responses.stream(input=talk, **options) as events:
            asked: Any = events.get_final_response()
    else:
        asked = openai_client.responses.create(input=talk, **options)
    (call,) = asked.output
    assert (call.type, call.name, call.call_id) == ("function_call", "get_weather", "call_1")
    assert json.loads(call.arguments) == {"city": "Oslo"}
    made = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    assert openai_client.responses.create(input=[*talk, made, result], **options).output_text == "hello"
    assert provider.last.body["input"][1:] == [made, result]
    assert [arrived(got) for got in provider.posts] == [OPENAI_ARRIVED] * 2


def test_openai_async(served: Proxy, provider: Provider) -> None:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async def talk() -> tuple[str | None, str]:
        http_client = DefaultAsyncHttpxClient(trust_env=False)
        options: dict[str, Any] = {"api_key": "any", "max_retries": 0, "http_client": http_client}
        async with AsyncOpenAI(base_url=f"{served.url}/v1", **options) as client:
            whole = await client.chat.completions.create(**chat_body())
            stream = await client.chat.completions.create(**chat_body(), stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(talk()) == ("hello", "hello")
    assert [arrived(got) for got in provider.posts] == [OPENAI_ARRIVED] * 2


def test_anthropic_messages(anthropic_client: anthropic.Anthropic, provider: Provider) -> None:
    message = anthropic_client.messages.create(**messages_body(), system="be short")
    assert [(block.type, block.text) for block in message.content if block.type == "text"] == [("text", "hello")]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 3, 2)
    assert provider.last.body["system"] == "be short"
    assert arrived(provider.last) == ANTHROPIC_ARRIVED


def test_anthropic_messages_streamed(anthropic_client: anthropic.Anthropic, provider: Provider) -> None:
    with anthropic_client.messages.stream(**messages_body()) as stream:
        types = [event.type for event in stream]
        message = stream.get_final_message()
    assert types[0] == "message_start" and types[-1] == "message_stop" and types.count("text") == 2
    assert [block.text for block in message.content if block.type == "text"] == ["hello"]
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 2)
    assert arrived(provider.last) == ANTHROPIC_ARRIVED


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_thinks_and_calls_a_tool(
    anthropic_client: anthropic.Anthropic, provider: Provider, stream: bool
) -> None:
    provider.script = weather_script
    talk: list[Any] = [{"role": "user", "content": "weather?"}]
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    options: dict[str, Any] = {"model": "claude", "max_tokens": 3000, "tools": [ANTHROPIC_TOOL], "thinking": thinking}
    if stream:
        with anthropic_client.messages.stream(messages=talk, **options) as events:
            asked: Any = events.get_final_message()
    else:
        asked = anthropic_client.messages.create(messages=talk, **options)
    thought, use = asked.content
    assert (thought.type, thought.thinking, use.type, use.id) == ("thinking", "hm", "tool_use", "toolu_1")
    assert (use.name, use.input, asked.stop_reason) == ("get_weather", {"city": "Oslo"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    blocks = [block.model_dump(exclude_none=True) for block in asked.content]
    talk += [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    answer = anthropic_client.messages.create(messages=talk, **options)
    assert [block.text for block in answer.content if block.type == "text"] == ["hello"]
    _, assistant, told = provider.last.body["messages"]
    assert assistant["content"][0]["signature"] == thought.signature and told["content"] == [result]
    assert provider.last.body["thinking"] == thinking
    assert [arrived(got) for got in provider.posts] == [ANTHROPIC_ARRIVED] * 2


def test_anthropic_count_tokens(anthropic_client: anthropic.Anthropic, provider: Provider) -> None:
    provider.script = lambda got: Reply(json.dumps({"input_tokens": len(got.raw) // 4}).encode())
    short = {"model": "claude", "messages": [{"role": "user", "content": "hello"}]}
    long = {"model": "claude", "messages": [{"role": "user", "content": "hello " * 100}]}
    few, many = (anthropic_client.messages.count_tokens(**body).input_tokens for body in (short, long))
    assert 0 < few < 100 <= many


def test_anthropic_models(anthropic_client: anthropic.Anthropic) -> None:
    models = {found.id: found for found in anthropic_client.models.list()}
    assert {"gpt", "claude", "demo"} <= set(models)
    assert models["claude"].type == "model" and models["claude"].display_name and models["claude"].created_at


def test_anthropic_async(served: Proxy, provider: Provider) -> None:
    from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

    async def talk() -> tuple[str, str]:
        http_client = DefaultAsyncHttpxClient(trust_env=False)
        options: dict[str, Any] = {"api_key": "any", "max_retries": 0, "http_client": http_client}
        async with AsyncAnthropic(base_url=served.url, **options) as client:
            whole = await client.messages.create(**messages_body())
            async with client.messages.stream(**messages_body()) as stream:
                return text_of(MESSAGES, whole.model_dump()), await stream.get_final_text()

    assert asyncio.run(talk()) == ("hello", "hello")
    assert [arrived(got) for got in provider.posts] == [ANTHROPIC_ARRIVED] * 2


# ── recorded clients ─────────────────────────────────────────────────────────────────────────────────────────────
# What 20 set-ups of 15 clients put on the wire, each kind of request once: the same headers, the same fields of the
# body, only shorter texts and the models of the tests. Sent by http.client, which adds nothing to it.

COMPLETIONS, EMBEDDINGS, COUNT = "/v1/completions", "/v1/embeddings", "/v1/messages/count_tokens"
ASKS_FOR_THE_TOOL, TELLS_THE_RESULT = "TOOLCALL please", "sunny"
CALLED = ("", "get_weather", {"city": "Oslo"})  # text, name and arguments of a call
UUID = "01a20631-bd0b-75f1-9968-703e4aa7fe1f"
CACHED = {"cache_control": {"type": "ephemeral"}}


@dataclass(frozen=True)
class Recorded:
    """One kind of request of one client.

    Args:
        memory: the id that the shipped patterns give it.
        bodies: what it sends, one after the other on one connection.
        upgraded: it asks for a WebSocket, which LiteLLM's server speaks and sdk mode does not.
        defect: why it cannot work in binary mode.
    """

    client: str
    path: str
    agent: str
    memory: str
    headers: dict[str, str]
    bodies: Sequence[dict[str, Any]] = ()
    method: str = "POST"
    upgraded: bool = False
    defect: str = ""

    def __str__(self) -> str:
        streamed = " streamed" if any(body.get("stream") for body in self.bodies) else ""
        return f"{self.client} {self.method} {self.path}{streamed}".replace("/v1/", "")


def blocks(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def cached(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, **CACHED}]


def input_text(text: str) -> list[dict[str, Any]]:
    return [{"type": "input_text", "text": text}]


def call_and_result(path: str, **more: Any) -> list[dict[str, Any]]:
    """The two entries that follow once the tool was called; ``more`` is what else the client puts into the first."""
    if path == CHAT:
        asked = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL], **more}
        return [asked, {"role": "tool", "tool_call_id": "call_1", "content": TELLS_THE_RESULT}]
    if path == RESPONSES:
        function = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": "{}", **more}
        return [function, {"type": "function_call_output", "call_id": "call_1", "output": TELLS_THE_RESULT}]
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": TELLS_THE_RESULT}
    said = [*more.get("thoughts", ()), *blocks("I ask for the weather."), use]
    return [{"role": "assistant", "content": said}, {"role": "user", "content": [{**result, **more.get("mark", {})}]}]


PLACE_AND_TOOL = {
    CHAT: ("gpt", "messages", CHAT_TOOL),
    RESPONSES: ("gpt", "input", RESPONSES_TOOL),
    MESSAGES: ("claude", "messages", ANTHROPIC_TOOL),
}


def turns(
    path: str,
    say: Callable[[str], Any] = str,
    before: Sequence[dict[str, Any]] = (),
    after: Sequence[dict[str, Any]] = (),
    **fields: Any,
) -> list[dict[str, Any]]:
    """The bodies of a greeting, of a question that needs the tool, and of the tool's result.

    Args:
        say: makes a message's content of a text.
        before: the messages in front of each.
        after: the call and its result, where they have a shape of their own.
        fields: the same in each; ``tools`` go with the question and the result alone unless they are among them.
    """
    name, place, tool = PLACE_AND_TOOL[path.partition("?")[0]]
    hello, question = ({"role": "user", "content": say(text)} for text in ("hello", ASKS_FOR_THE_TOOL))
    called = after or call_and_result(path.partition("?")[0])
    talks: list[list[Any]] = [[hello], [question], [question, *called]]
    tools: list[dict[str, Any]] = [{}, {"tools": [tool]}, {"tools": [tool]}]
    return [{"model": name, place: [*before, *talk], **more, **fields} for talk, more in zip(talks, tools, strict=True)]


def stainless(lang: str, version: str, **more: str) -> dict[str, str]:
    """The headers of the SDKs that Stainless generates; ``more`` has underscores for dashes."""
    runtime = ("CPython", "3.11.7") if lang == "python" else ("node", "v20.20.2")
    values = {"lang": lang, "package-version": version, "os": "Linux", "arch": "x64", "retry-count": "0"}
    values |= {"runtime": runtime[0], "runtime-version": runtime[1]}
    values |= {name.replace("_", "-"): value for name, value in more.items()}
    return {
        "accept": "application/json",
        "accept-encoding": "gzip, deflate",
        **{f"x-stainless-{name}": value for name, value in values.items()},
        **({} if lang == "python" else NODE),
    }


NODE = {"accept-language": "*", "sec-fetch-mode": "cors"}
BEARER, API_KEY = {"authorization": "Bearer anything"}, {"x-api-key": "anything"}
ANTHROPIC_OLD = {**API_KEY, "anthropic-version": "2023-06-01"}
ANTHROPIC_NEW = {**BEARER, "anthropic-version": "2026-10-21"}
CONTEXT_BETA = {"anthropic-beta": "context-1m-2025-08-07"}
ANY_ENCODING = {"accept": "*/*", "accept-encoding": "gzip, deflate, br, zstd"}
STREAMED: dict[str, Any] = {"stream": True}
USAGE_TOO: dict[str, Any] = {**STREAMED, "stream_options": {"include_usage": True}}
THINKS = {"max_tokens": 3000, "thinking": {"type": "enabled", "budget_tokens": 1024}}
ANSWER_SCHEMA = {"properties": {"answer": {"type": "string"}}, "required": ["answer"], "type": "object"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "A", "strict": True, "schema": ANSWER_SCHEMA}}
EMBEDS = {"model": "gpt", "input": ["a", "b"], "encoding_format": "base64"}
COMPLETES = {"model": "gpt", "prompt": "hello"}
RESPONDS = {"model": "gpt", "input": "hello"}
BE_SHORT = {"role": "system", "content": "be short"}
COUNTS = {"model": "claude", "messages": chat_body()["messages"]}
NO_LAST_TEXT = "the last chunk of LiteLLM's server has no text, which clients add to what they have"


def openai_sdk(client: str, lang: str, version: str, **quirks: Any) -> list[Recorded]:
    """The OpenAI SDKs; ``quirks`` are what their messages with a tool call have beside it."""
    agent, memory = f"OpenAI/{lang} {version}", f"sdk-OpenAI-{lang}"
    headers = {**BEARER, **stainless(lang.lower(), version)}
    python = {"x-stainless-async": "false", "x-stainless-read-timeout": "600"} if lang == "Python" else {}
    headers |= python
    helper = {**headers, "x-stainless-helper-method": "chat.completions.stream" if python else "stream"}
    whole = [*turns(CHAT, after=call_and_result(CHAT, **quirks)), {**chat_body(), "response_format": FORMAT}]
    asynchronous = {**headers, "x-stainless-async": "async:asyncio"}
    item = call_and_result(RESPONSES, id="fc_1", status="completed")
    return [
        Recorded(client, CHAT, agent, memory, headers, whole),
        Recorded(client, CHAT, agent, memory, helper, turns(CHAT, **USAGE_TOO)),
        *([Recorded(f"{client} async", CHAT, f"Async{agent}", memory, asynchronous, turns(CHAT))] if python else []),
        Recorded(client, COMPLETIONS, agent, memory, headers, [COMPLETES]),
        Recorded(client, COMPLETIONS, agent, memory, headers, [{**COMPLETES, **STREAMED}], defect=NO_LAST_TEXT),
        Recorded(client, EMBEDDINGS, agent, memory, headers, [EMBEDS]),
        Recorded(client, RESPONSES, agent, memory, headers, [RESPONDS, *turns(RESPONSES, after=item)[1:]]),
        Recorded(client, RESPONSES, agent, memory, headers, [{**RESPONDS, **STREAMED}]),
        Recorded(client, "/v1/models", agent, memory, headers, method="GET"),
        Recorded(client, "/v1/models/gpt", agent, memory, headers, method="GET"),
    ]


def anthropic_sdk(client: str, lang: str, version: str, auth: dict[str, str]) -> list[Recorded]:
    """The Anthropic SDKs, which changed their authentication with 1.0 (JavaScript) and 2.0 (Python)."""
    agent, memory = f"Anthropic/{lang} {version}", f"sdk-Anthropic-{lang}"
    headers = {**auth, **stainless(lang.lower(), version, timeout="600")}
    helper = {**headers, "x-stainless-helper-method": "stream", "x-stainless-stream-helper": "messages"}
    streamed = [{**messages_body(), **STREAMED, "system": cached("be short")}, *turns(MESSAGES, **THINKS, **STREAMED)]
    return [
        Recorded(client, MESSAGES, agent, memory, headers, turns(MESSAGES, max_tokens=100, system="be short")),
        Recorded(client, MESSAGES, agent, memory, helper, streamed),
        Recorded(client, f"{MESSAGES}?beta=true", agent, memory, {**headers, **CONTEXT_BETA}, [messages_body()]),
        Recorded(client, COUNT, agent, memory, headers, [COUNTS]),
        Recorded(client, "/v1/models", agent, memory, headers, method="GET"),
    ]


def on_openai_for_python(client: str, version: str, *calls: tuple[str, list[dict[str, Any]]]) -> list[Recorded]:
    """A program that is built upon OpenAI's SDK for Python, and shows its User-Agent."""
    headers = {**BEARER, **stainless("python", version, raw_response="true", read_timeout="600.0")}
    return [Recorded(client, p, f"OpenAI/Python {version}", "sdk-OpenAI-Python", headers, b) for p, b in calls]


CLAUDE_BETAS = "claude-code-20250219,interleaved-thinking-2025-05-14,thinking-token-count-2026-05-13"
CLAUDE_BETAS += ",context-management-2025-06-27,prompt-caching-scope-2026-01-05"


def claude_code(client: str, entry: str, auth: dict[str, str], **fields: Any) -> list[Recorded]:
    """Claude Code: it asks whether anybody is there, talks, and counts tokens for ``/context``."""
    agent, memory = f"claude-cli/2.1.197 (external, {entry})", "claude-code"
    headers = {**stainless("js", "0.94.0", timeout="600"), **ANY_ENCODING, "accept": "application/json", **auth}
    headers |= {"x-claude-code-session-id": UUID, "x-app": "cli", "anthropic-version": "2023-06-01"}
    headers |= {"anthropic-dangerous-direct-browser-access": "true", "anthropic-beta": CLAUDE_BETAS}
    owner = {"device_id": "96f45325", "account_uuid": "", "session_id": UUID}
    body = {
        "system": [*blocks("x-header: a"), *cached("You are"), *cached("rules")],
        "tools": [{**ANTHROPIC_TOOL, "name": "Bash"}, ANTHROPIC_TOOL],
        "metadata": {"user_id": json.dumps(owner)},
        "max_tokens": 32000,
        "thinking": {"budget_tokens": 31999, "type": "enabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        **STREAMED,
    }
    after = call_and_result(MESSAGES, thoughts=[THINKING], mark=CACHED)
    path = f"{MESSAGES}?beta=true"
    title = {**messages_body(), "system": blocks("title"), "tools": [], "thinking": {"type": "disabled"}, **STREAMED}
    talk = turns(path, lambda text: [*blocks("reminder"), *cached(text)], after=after, **body, **fields)
    return [
        Recorded(client, "/", "Bun/1.4.0", "", ANY_ENCODING, method="HEAD"),
        Recorded(client, path, agent, memory, headers, [*talk, {**title, "temperature": 1}]),
        Recorded(client, f"{COUNT}?beta=true", agent, memory, headers, [{**COUNTS, "tools": [ANTHROPIC_TOOL]}]),
    ]


CODEX_IDS = {"session-id": UUID, "thread-id": UUID, "x-client-request-id": UUID, "x-codex-window-id": f"{UUID}:0"}
CODEX_TOOLS = [
    RESPONSES_TOOL,
    {"type": "namespace", "name": "multi_agent_v1", "description": "agents", "tools": [RESPONSES_TOOL]},
    {"type": "web_search", "external_web_access": True},
]


def codex(client: str) -> list[Recorded]:
    """Codex, whose built-in provider tries a WebSocket first and POSTs at once when it is told 426."""
    agent = "codex_exec/0.169.0 (Debian 12.0.0; x86_64) dumb (codex_exec; 0.169.0)"
    metadata = {"x-codex-turn-metadata": json.dumps({"session_id": UUID, "request_kind": "turn"})}
    headers = {**BEARER, **CODEX_IDS, **metadata, "originator": "codex_exec", "accept": "text/event-stream"}
    headers |= {"x-codex-beta-features": "remote_compaction_v2"}
    upgrade = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-version": "13"}
    upgrade |= {"sec-websocket-key": "I8D7W/S43U6ix7PnQLkKqw==", "openai-beta": "responses_websockets=2026-02-06"}
    developer = [{"type": "message", "role": "developer", "content": [*input_text("rules"), *input_text("more")]}]
    thought = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "c2VjcmV0"}
    body = {
        "instructions": "You are Codex.",
        "tools": CODEX_TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": UUID,
        "client_metadata": {"session_id": UUID, "turn_id": UUID},
        **STREAMED,
    }
    after = [thought, *call_and_result(RESPONSES, id="fc_1", status="completed")]
    talk = turns(RESPONSES, input_text, developer, after, **body)
    posts = Recorded(client, RESPONSES, agent, "codex", headers, talk)
    attempt = Recorded(client, RESPONSES, agent, "codex", {**headers, **upgrade}, method="GET", upgraded=True)
    return [attempt, posts] if client == "Codex, built-in" else [posts]


def opencode_calls() -> list[Recorded]:
    """opencode, with one provider each of the AI SDK."""
    agent, session = "opencode/1.18.33 ai-sdk/provider-utils/4.0.46 runtime/bun/1.3.14", f"ses_{UUID}"
    headers = {**ANY_ENCODING, "x-session-id": session, "x-session-affinity": session}
    betas = {"anthropic-beta": "structured-outputs-2025-11-13"}
    chat = turns(CHAT, before=[BE_SHORT], max_tokens=8000, tool_choice="auto", tools=[CHAT_TOOL], **USAGE_TOO)
    thinking = {"max_tokens": 48000, "thinking": {"type": "enabled", "budget_tokens": 16000}}
    messages = turns(MESSAGES, cached, system=cached("rules"), tool_choice={"type": "auto"}, **thinking, **STREAMED)
    more = {"store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": session}
    more |= {"max_output_tokens": 32000, "reasoning": {"summary": "auto"}, "tool_choice": "auto"}
    developer = {"role": "developer", "content": "rules"}
    responses = turns(RESPONSES, input_text, [developer], tools=[RESPONSES_TOOL], **more, **STREAMED)
    return [
        Recorded("opencode", CHAT, agent, "opencode", {**headers, **BEARER}, chat),
        Recorded("opencode", MESSAGES, agent, "opencode", {**headers, **ANTHROPIC_OLD, **betas}, messages[1:]),
        Recorded("opencode", RESPONSES, agent, "opencode", {**headers, **BEARER}, responses),
    ]


def ai_sdk() -> list[Recorded]:
    """Vercel's AI SDK, which has a User-Agent each for whole answers and for streams."""
    utils = "ai-sdk/provider-utils/4.0.64 runtime/node.js/v20.20.2"
    headers = {**NODE, "accept": "*/*", "accept-encoding": "gzip, deflate"}
    betas = {"anthropic-beta": "structured-outputs-2025-11-13"}
    whole, client = f"ai/6.0.326 {utils}", "AI SDK"
    chat, messages = f"ai-sdk/openai-compatible/2.0.91 {utils}", f"ai-sdk/anthropic/3.0.139 {utils}"
    openai, anthropic = {**headers, **BEARER}, {**headers, **ANTHROPIC_OLD, **betas}
    talk = turns(MESSAGES, blocks, max_tokens=128000)
    return [
        Recorded(client, CHAT, whole, "ai-sdk", openai, turns(CHAT)),
        Recorded(client, CHAT, chat, "ai-sdk", openai, turns(CHAT, **USAGE_TOO)),
        Recorded(client, MESSAGES, whole, "ai-sdk", anthropic, talk),
        Recorded(client, MESSAGES, messages, "ai-sdk", anthropic, [{**body, **STREAMED} for body in talk]),
        Recorded(client, EMBEDDINGS, whole, "ai-sdk", openai, [{**EMBEDS, "encoding_format": "float"}]),
    ]


def pydantic_ai() -> list[Recorded]:
    """pydantic-ai, which says its own name on OpenAI's SDK."""
    headers = {**BEARER, **stainless("python", "3.54.0", read_timeout="600", **{"async": "async:asyncio"})}
    bodies = [turns(path, before=[BE_SHORT], stream=False) for path in (CHAT, RESPONSES)]
    bodies += [turns(CHAT, before=[BE_SHORT], **USAGE_TOO), turns(RESPONSES, before=[BE_SHORT], **STREAMED)]
    name, memory = "pydantic-ai", "pydantic-ai"
    paths = (CHAT, RESPONSES, CHAT, RESPONSES)
    return [Recorded(name, p, f"{name}/2.68.0", memory, headers, b) for p, b in zip(paths, bodies, strict=True)]


def others() -> list[Recorded]:
    """Qwen Code and Continue, and LiteLLM's calls in Anthropic's API, its own and aider's."""
    qwen = {**BEARER, **stainless("js", "5.11.0")}
    before = [BE_SHORT, {"role": "user", "content": blocks("reminder")}, {"role": "assistant", "content": "I see."}]
    talk = turns(CHAT, blocks, before, tools=[CHAT_TOOL], max_tokens=8000, **USAGE_TOO)
    proceed = {**stainless("js", "5.23.2"), "accept-encoding": "gzip, deflate, br"}
    empty = call_and_result(CHAT, content="")
    betas = {**ANTHROPIC_OLD, "anthropic-beta": "prompt-caching-2024-07-31"}
    marked = {"system": cached("rules"), "tools": [{**ANTHROPIC_TOOL, **CACHED}], "max_tokens": 32000}
    litellm = {**ANTHROPIC_OLD, "accept": "*/*", "accept-encoding": "gzip, deflate"}
    custom = turns(MESSAGES, blocks, max_tokens=4096, tools=[{**ANTHROPIC_TOOL, "type": "custom"}])
    aider = {**messages_body(), "system": blocks("rules"), "temperature": 0, **STREAMED}
    rows = [
        ("Qwen Code", CHAT, "QwenCode/0.15.10 (linux; x64)", "qwen-code", qwen, talk),
        (
            *("Continue", CHAT, "ls/JS 5.23.2", "default-dev", {**proceed, **BEARER}),
            turns(CHAT, before=[BE_SHORT], after=empty, tools=[CHAT_TOOL], **USAGE_TOO),
        ),
        ("Continue", MESSAGES, "node-fetch", "default-dev", betas, turns(MESSAGES, cached, **marked, **STREAMED)),
        ("LiteLLM", MESSAGES, "litellm/1.106.2", "default-dev", litellm, custom),
        ("LiteLLM", MESSAGES, "litellm/1.106.2", "default-dev", litellm, [{**custom[0], **STREAMED}]),
        ("LiteLLM", RESPONSES, "litellm/1.106.2", "default-dev", {**litellm, **BEARER}, [RESPONDS]),
        ("aider", MESSAGES, "litellm/1.81.10", "default-dev", litellm, [aider]),
    ]
    return [Recorded(*row) for row in rows]


RECORDED = [
    *openai_sdk("OpenAI for Python 3", "Python", "3.54.0", annotations=[]),
    *openai_sdk("OpenAI for Python 1", "Python", "1.109.1", annotations=[]),
    *anthropic_sdk("Anthropic for Python 2", "Python", "2.12.0", ANTHROPIC_NEW),
    *anthropic_sdk("Anthropic for Python 0", "Python", "0.75.0", ANTHROPIC_OLD),
    *on_openai_for_python(
        *("LiteLLM", "2.54.0", (CHAT, turns(CHAT, after=call_and_result(CHAT, provider_specific_fields=None)))),
        *((CHAT, turns(CHAT, **STREAMED)), (EMBEDDINGS, [{"model": "gpt", "input": ["a"]}])),
    ),
    *on_openai_for_python(
        *("LangChain", "3.54.0", (CHAT, turns(CHAT, stream=False)), (CHAT, turns(CHAT, **STREAMED))),
        *((RESPONSES, turns(RESPONSES, stream=False)), (RESPONSES, turns(RESPONSES, **STREAMED))),
        (EMBEDDINGS, [EMBEDS]),
    ),
    *pydantic_ai(),
    *on_openai_for_python(
        *("llm", "3.54.0", (CHAT, turns(CHAT, before=[BE_SHORT], stream=False)), (CHAT, turns(CHAT, **USAGE_TOO))),
    ),
    *on_openai_for_python(
        "aider", "2.20.0", *((CHAT, [{**chat_body(), "temperature": 0, **more}]) for more in ({}, STREAMED))
    ),
    *openai_sdk("OpenAI for JS", "JS", "6.49.0"),
    *anthropic_sdk("Anthropic for JS 1", "JS", "1.12.0", ANTHROPIC_NEW),
    *anthropic_sdk("Anthropic for JS 0", "JS", "0.71.0", ANTHROPIC_OLD),
    *ai_sdk(),
    *claude_code("Claude Code -p", "sdk-cli", BEARER),
    *claude_code("Claude Code", "cli", API_KEY),
    *codex("Codex"),
    *codex("Codex, built-in"),
    *opencode_calls(),
    *others(),
]


def recorded_script(got: Got) -> Reply:
    """As the real providers: the tool where it is wanted and not yet told of, and gzip where that is asked for."""
    if got.method != "POST":
        return usual_answer(got)
    wants_tool = ASKS_FOR_THE_TOOL.encode() in got.raw and TELLS_THE_RESULT.encode() not in got.raw
    if got.path.partition("?")[0].endswith("/count_tokens"):
        reply = Reply(COUNTED)
    elif wants_tool:
        reply = call_reply(got, "get_weather", '{"city": "Oslo"}')
    else:
        reply = usual_answer(Got(got.method, got.path, [], json.dumps({**got.body, "tools": None}).encode()))
    if reply.parts is None and "gzip" in (got.header("accept-encoding") or ""):
        return Reply(gzip.compress(reply.body), headers={**reply.headers, "content-encoding": "gzip"})
    return reply


def pieces(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Text, and a call's name and arguments, of an answer or of an event of a stream, in any API."""
    for choice in document.get("choices", ()):
        said = choice.get("message", choice.get("delta"))
        if said is None:  # a text completion
            yield choice["text"], "", ""
            continue
        yield said.get("content") or "", "", ""
        for call in said.get("tool_calls") or ():
            yield "", call["function"].get("name") or "", call["function"].get("arguments") or ""
    delta = document.get("delta", {})
    if isinstance(delta, str):
        yield (delta, "", "") if document["type"] == "response.output_text.delta" else ("", "", delta)
        delta = {}
    for block in (*document.get("content", ()), document.get("content_block", {}), delta):
        arguments = json.dumps(block["input"]) if block.get("input") else block.get("partial_json", "")
        yield block.get("text", ""), block.get("name", ""), arguments
    for item in document.get("output", ()):
        yield (
            "".join(part["text"] for part in item.get("content") or ()),
            item.get("name", ""),
            item.get("arguments", ""),
        )
    if document.get("type") == "response.output_item.added":
        yield "", document["item"].get("name") or "", ""


def said_in(documents: Sequence[dict[str, Any]]) -> tuple[str, str, Any]:
    """Text, and the name and the arguments of a call, put together."""
    text, name, arguments = map("".join, zip(*chain.from_iterable(map(pieces, documents)), strict=True))
    return text, name, json.loads(arguments or "{}")


def said_in_stream(path: str, data: str) -> tuple[str, str, Any]:
    """The same of a stream, which must have its API's proper end."""
    lines = re.findall(r"^data: ?(.*)$", data, re.MULTILINE)
    documents = [json.loads(line) for line in lines if line != "[DONE]"]
    if path in (CHAT, COMPLETIONS):
        assert lines[-1] == "[DONE]"
        return said_in(documents)
    last = documents[-1]
    assert last["type"] == ("message_stop" if path == MESSAGES else "response.completed")
    said = said_in(documents)
    assert path == MESSAGES or said_in([last["response"]]) == said
    return said


def assert_answered(call: Recorded, body: dict[str, Any], response: http.client.HTTPResponse) -> None:
    """The answer to one recorded request is whole, and as the client asked for it."""
    data, path = response.read(), call.path.partition("?")[0]
    assert response.status == 200, data
    encoding = response.getheader("content-encoding", "identity")
    assert encoding in (*call.headers.get("accept-encoding", "").split(", "), "identity")
    text = (gzip.decompress(data) if encoding == "gzip" else data).decode()
    if body.get("stream"):
        assert response.getheader("content-type", "").startswith("text/event-stream")
        found: Any = said_in_stream(path, text)
    elif call.method == "POST":
        assert response.getheader("content-type", "").startswith("application/json")
        answer = json.loads(text)
        reading = {COUNT: lambda: answer["input_tokens"], EMBEDDINGS: lambda: [r["embedding"] for r in answer["data"]]}
        found = reading.get(path, lambda: said_in([answer]))()
    else:
        assert (call.path, text) == ("/", "") or '"gpt"' in text
        return
    assert found == expected_of(path, body)


def expected_of(path: str, body: dict[str, Any]) -> Any:
    """What is to be read out of the answer."""
    if path == COUNT:
        return json.loads(COUNTED)["input_tokens"]
    if path == EMBEDDINGS:
        return [VECTOR_TEXT if body.get("encoding_format") == "base64" else VECTOR] * len(body["input"])
    said = json.dumps(body)
    return CALLED if ASKS_FOR_THE_TOOL in said and TELLS_THE_RESULT not in said else ("hello", "", {})


@pytest.mark.parametrize(
    ("mode", "call"),
    [
        pytest.param(
            *(mode, call),
            id=f"{mode}-{call}",
            marks=pytest.mark.xfail(reason=call.defect) if call.defect and mode == "binary" else (),
        )
        for mode in ("sdk", "binary")
        for call in RECORDED
    ],
)
def test_what_a_client_was_recorded_to_send(
    request: pytest.FixtureRequest, provider: Provider, mode: str, call: Recorded
) -> None:
    provider.script = recorded_script
    running: Proxy = request.getfixturevalue(mode)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
        for body in call.bodies or [{}]:
            data = json.dumps(body).encode() if call.method == "POST" else b""
            connection.putrequest(call.method, call.path, skip_accept_encoding=True)
            for name, value in {"user-agent": call.agent, **call.headers}.items():
                connection.putheader(name, value)
            if data:
                connection.putheader("content-type", "application/json")
                connection.putheader("content-length", str(len(data)))
            connection.endheaders(data)
            response = connection.getresponse()
            if call.upgraded:
                assert response.status == {"sdk": 426, "binary": 101}[mode]
            else:
                assert_answered(call, body, response)
    memories = {got.header("x-sm-user-id") for got in provider.posts}
    # LiteLLM's server sends no client header along with a count of tokens.
    counts_without_memory = mode == "binary" and call.path.startswith(COUNT)
    assert memories == ({None if counts_without_memory else call.memory} if call.method == "POST" else set())


# ── the clients command ──────────────────────────────────────────────────────────────────────────────────────────

CLIENTS = HERE / ".clients"
TURN_SECONDS = 60
PLAIN_TEXT, FINAL_TEXT = "All is well here.", "The command has run."
# The result is not in the call: whoever has it has run the command.
SHELL_COMMAND, SHELL_RESULT = "echo result-$((40 + 2))", "result-42"


@dataclass(frozen=True)
class RealClient:
    """A client as its users run it; BASE stands for the proxy's URL, PROMPT for what is asked."""

    name: str
    package: str
    version: str
    command: tuple[str, ...]
    tool: str
    arguments: dict[str, str]
    memory: str
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # path under HOME → text
    setup: str | None = None  # the package's install script


# The provider is ours: what it has the clients run is SHELL_COMMAND, so that the sandbox, which is not everywhere, may
# be off.
CODEX = ("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "PROMPT")
CODEX_PROVIDER = """\
model = "gpt-5"
model_provider = "proxy"

[model_providers.proxy]
name = "proxy"
base_url = "BASE/v1"
wire_api = "responses"
env_key = "PROXY_KEY"
"""


def opencode(provider: str, name: str) -> RealClient:
    """opencode with one of its kinds of providers, each of which speaks an API of its own."""
    settings = {
        "npm": f"@ai-sdk/{provider}",
        "options": {"baseURL": "BASE/v1", "apiKey": "anything"},
        "models": {name: {}},
    }
    return RealClient(
        name=f"opencode, {provider}",
        package="opencode-ai",
        version="1.18.33",
        command=("opencode", "run", "--model", f"{provider}/{name}", "PROMPT"),
        tool="bash",
        arguments={"command": SHELL_COMMAND, "description": "Add"},
        memory="opencode",
        environment={"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"},
        files={".config/opencode/opencode.json": json.dumps({"provider": {provider: settings}})},
        setup="postinstall.mjs",
    )


CLIENT_SETUPS = [
    RealClient(
        name="Claude Code",
        package="@anthropic-ai/claude-code",
        version="2.1.332",
        command=("claude", "-p", "PROMPT", "--model", "claude-sonnet-4-5", "--allowedTools", "Bash"),
        tool="Bash",
        arguments={"command": SHELL_COMMAND, "description": "Add"},
        memory="claude-code",
        environment={
            "ANTHROPIC_BASE_URL": "BASE",
            "ANTHROPIC_AUTH_TOKEN": "anything",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        setup="install.cjs",
    ),
    RealClient(
        name="Codex, model_providers",
        package="@openai/codex",
        version="0.171.0",
        command=CODEX,
        tool="exec_command",
        arguments={"cmd": SHELL_COMMAND},
        memory="codex",
        environment={"PROXY_KEY": "anything"},
        files={".codex/config.toml": CODEX_PROVIDER},
    ),
    RealClient(  # tries a WebSocket first
        name="Codex, openai_base_url",
        package="@openai/codex",
        version="0.171.0",
        command=CODEX,
        tool="exec_command",
        arguments={"cmd": SHELL_COMMAND},
        memory="codex",
        environment={"CODEX_API_KEY": "anything"},
        files={".codex/config.toml": 'model = "gpt-5"\nopenai_base_url = "BASE/v1"\n'},
    ),
    opencode("openai-compatible", "gpt-5"),  # chat completions
    opencode("anthropic", "claude-sonnet-4-5"),  # messages
    opencode("openai", "gpt-5"),  # responses
]


def progress(said: str, command: str = "clients") -> None:
    print(f"{command}: {said}", file=sys.stderr, flush=True)


def install_clients() -> None:
    """The pinned versions from npm. Their install scripts are run by hand: npm's settings may forbid them."""
    wanted = list(dict.fromkeys(f"{client.package}@{client.version}" for client in CLIENT_SETUPS))
    stamp = CLIENTS / "installed"  # written last: an installation that was broken off is done again
    if stamp.exists() and stamp.read_text().split() == wanted:
        return
    progress(f"installing into {CLIENTS.name}: {' '.join(wanted)} (1 GB)")
    CLIENTS.mkdir(exist_ok=True)
    npm = ["npm", "install", "--prefix", str(CLIENTS), "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact"]
    subprocess.run([*npm, *wanted], cwd=CLIENTS, check=True, stdout=sys.stderr)
    for package, setup in {client.package: client.setup for client in CLIENT_SETUPS if client.setup}.items():
        subprocess.run(["node", setup], cwd=CLIENTS / "node_modules" / package, check=True, stdout=sys.stderr)
    stamp.write_text("\n".join(wanted))


def tool_names(body: dict[str, Any]) -> set[str | None]:
    return {tool.get("name") or tool.get("function", {}).get("name") for tool in body.get("tools") or ()}


def client_script(client: RealClient, calls_tool: bool) -> Callable[[Got], Reply]:
    """Answers the turn, with a call of the client's tool first; side calls, which offer no tools, get a title."""

    def script(got: Got) -> Reply:
        if got.method != "POST" or not got.body.get("stream"):
            return usual_answer(got)
        if client.tool not in tool_names(got.body):
            return text_reply(got, "A title")
        if not calls_tool:
            return text_reply(got, PLAIN_TEXT)
        if SHELL_RESULT.encode() in got.raw:
            return text_reply(got, FINAL_TEXT)
        return call_reply(got, client.tool, json.dumps(client.arguments))

    return script


def run_client(client: RealClient, base: str, prompt: str) -> tuple[int | None, str, str]:
    """One run in a fresh HOME and an empty folder: exit code (None: it took too long), output, errors."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home, work = Path(folder) / "home", Path(folder) / "work"
        work.mkdir()
        for name, text in client.files.items():
            (home / name).parent.mkdir(parents=True)
            (home / name).write_text(text.replace("BASE", base))
        home.mkdir(exist_ok=True)
        binary, *arguments = (prompt if part == "PROMPT" else part for part in client.command)
        node = Path(shutil.which("node") or "").parent
        environment = {name: value.replace("BASE", base) for name, value in client.environment.items()}
        environment |= {"HOME": str(home), "PATH": f"{node}{os.pathsep}{os.defpath}", "TMPDIR": folder}
        process = subprocess.Popen(
            [str(CLIENTS / "node_modules" / ".bin" / binary), *arguments],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=TURN_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # Codex and opencode start processes of their own
            return None, *process.communicate()
    return process.returncode, output, errors


def failure_of(client: RealClient, base: str, provider: Provider, calls_tool: bool) -> str | None:
    """Play one turn: what went wrong, with the last lines of the client's output."""
    provider.got.clear()
    provider.script = client_script(client, calls_tool)
    code, output, errors = run_client(client, base, "Run the command." if calls_tool else "How are things?")
    memories = {got.header("x-sm-user-id") for got in provider.posts}
    wrong = []
    if code != 0:
        wrong.append(f"no end within {TURN_SECONDS} s" if code is None else f"exit code {code}")
    if (FINAL_TEXT if calls_tool else PLAIN_TEXT) not in output:
        wrong.append("the answer was not printed")
    if calls_tool and not any(SHELL_RESULT.encode() in got.raw for got in provider.got):
        wrong.append("the tool's result did not reach the provider")
    if memories != {client.memory}:
        wrong.append(f"memory ids {sorted(map(str, memories))} instead of {client.memory}")
    return "\n".join([", ".join(wrong), *(output + errors).splitlines()[-15:]]) if wrong else None


def client_rows(mode: str, provider: Provider) -> Iterator[tuple[list[str], list[str]]]:
    """For each client its row of the table, and what failed."""
    models = (
        model("gpt-*", "openai/gpt-*", f"{provider.url}/v1"),
        model("claude-*", "anthropic/claude-*", provider.url, ANTHROPIC_KEY),
    )
    port = ["--litellm-port", str(free_port())] if mode == "binary" else []
    progress(f"starting the proxy in {mode} mode")
    running = Proxy(config_for(provider, *models), "--mode", mode, *port)
    try:
        for client in CLIENT_SETUPS:
            results, failures, requests = [], [], 0
            for kind in ("turn", "tool call"):
                progress(f"{client.name}, {mode}: {kind}")
                failure = failure_of(client, running.url, provider, kind == "tool call")
                requests += len(provider.got)
                results.append("FAILED" if failure else "ok")
                failures += [f"{client.name}, {mode}, {kind}: {failure}"] if failure else []
            yield [client.name, client.version, mode, *results, str(requests)], failures
    finally:
        running.stop()


def run_clients() -> int:
    """``./run.sh clients``: each client in each mode; 1 if one failed, 2 without Node."""
    missing = [name for name in ("node", "npm") if not shutil.which(name)]
    if missing:
        progress(f"{' and '.join(missing)} not found: install Node.js 20 or later")
        return 2
    install_clients()
    provider = Provider()
    found = [row for mode in ("sdk", "binary") for row in client_rows(mode, provider)]
    rows = [["client", "version", "mode", "turn", "tool call", "requests"], *(row for row, _ in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    failures = [failure for _, failed in found for failure in failed]
    print("\n".join(f"\n{failure}" for failure in failures), end="\n" if failures else "")
    return 1 if failures else 0


def test_the_clients_command_without_node_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "test_proxy.py"), "clients"]
    environment = {**clean_environment(), "PATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = "clients: node and npm not found: install Node.js 20 or later\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)


# ── the bench command ────────────────────────────────────────────────────────────────────────────────────────────
# What is compared is measured in turn, in short rounds of one run, so that a noisy machine hits all alike. The
# upstream, the load and the bare SDK's calls have a process each.

ROUNDS, ROUND_SECONDS = 7, 1.0
BENCH_MODELS = ("whole", "chunks-5-0", "chunks-2000-0", "chunks-20-1")  # chunks-COUNT-SECONDS between two
BENCH_MARKS = ("<!-- bench -->", "<!-- /bench -->")
STAMP = re.compile(rb'"content": ?"(\d+\.\d+)"')  # a chunk says when it was sent
MIB = 1024 * 1024
Poll = getattr(select, "epoll", select.poll)  # costs the same at any number of connections


def http_message(first_line: str, body: bytes) -> bytes:
    head = f"{first_line}\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def bench_request(name: str) -> bytes:
    body = {**chat_body(name), **({"stream": True} if name != "whole" else {})}
    return http_message("POST /v1/chat/completions HTTP/1.1", json.dumps(body).encode())


def is_whole(message: bytes) -> bool:
    """Whether a message is all there."""
    end = message.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = message[:end].lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    if length:
        return len(message) >= end + 4 + int(length)
    return message.startswith(b"GET ") or message.endswith(proxy.LAST_CHUNK)


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def serve_upstream(listener: socket.socket) -> None:
    """The upstream's process: one loop for whole answers; a connection that asks for a stream gets a thread."""
    whole = http_message("HTTP/1.1 200 OK", usual_answer(Got("POST", "/v1/chat/completions", [], b"{}")).body)
    poll, connections, unread = Poll(), {}, {}
    poll.register(listener, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = sock
                poll.register(sock, select.POLLIN)
                continue
            try:
                data = connections[number].recv(65536)
            except OSError:
                data = b""
            request = unread.pop(number, b"") + data
            if data and not is_whole(request):
                unread[number] = request
            elif data and b"chunks-" not in request:
                connections[number].send(whole)
            else:
                poll.unregister(number)
                sock = connections.pop(number)
                if data:
                    threading.Thread(target=serve_streams, args=(sock, request), daemon=True).start()
                else:
                    sock.close()


def serve_streams(sock: socket.socket, request: bytes) -> None:
    with sock, contextlib.suppress(OSError):
        while request:
            found = re.search(rb"chunks-(\d+)-(\d+)", request)
            assert found
            sock.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for number in range(int(found[1])):
                time.sleep(int(found[2]) if number else 0)
                sock.sendall(proxy.chunk(openai_chunk({"content": f"{time.time():.6f}"})))
            sock.sendall(proxy.chunk(openai_chunk({}, "stop") + b"data: [DONE]\n\n") + proxy.LAST_CHUNK)
            request = sock.recv(65536)
            while request and not is_whole(request):
                request += sock.recv(65536)


class Speed(NamedTuple):
    """Median latency in seconds, requests a second."""

    p50: float
    rate: float


def drive(port: int, connections: int, count: int = sys.maxsize) -> Speed:
    """Keep so many connections busy, for `ROUND_SECONDS` or for so many requests."""
    request, seconds = bench_request("whole"), ROUND_SECONDS if count == sys.maxsize else 600
    socks = {sock.fileno(): sock for sock in (connected(port) for _ in range(connections))}
    poll, unread, sent_at, latencies = Poll(), {}, {}, []
    began = now = time.perf_counter()
    for number, sock in socks.items():
        poll.register(sock, select.POLLIN)
        sent_at[number] = time.perf_counter()
        sock.send(request)
    left = count - connections
    while sent_at:
        for number, _ in poll.poll():
            data = socks[number].recv(65536)
            now = time.perf_counter()
            answer = unread.pop(number, b"") + data
            if data and not is_whole(answer):
                unread[number] = answer
                continue
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"port {port} answered {answer[:500]!r}")
            latencies.append(now - sent_at.pop(number))
            if now - began < seconds and left > 0:
                left -= 1
                sent_at[number] = now
                socks[number].send(request)
    for sock in socks.values():
        sock.close()
    return Speed(median(latencies), len(latencies) / (now - began))


class Streams(NamedTuple):
    """Median seconds to the first chunk, seconds by which the latest chunk was late, whole streams, CPU seconds."""

    first: float
    late: float
    whole: int
    cpu: float = 0.0


def drive_streams(port: int, name: str, at_once: int, pause: float = 0.0) -> Streams:
    """So many streams, begun with so many seconds between two."""
    poll, socks, unread, firsts, late, whole = select.poll(), {}, {}, {}, 0.0, 0
    began, sent_at = time.time(), {}
    while len(sent_at) < at_once or socks:
        if len(sent_at) < at_once and time.time() >= began + len(sent_at) * pause:
            sock = connected(port)
            key = len(sent_at)
            socks[sock.fileno()], unread[sock.fileno()] = (sock, key), b""
            poll.register(sock, select.POLLIN)
            sent_at[key] = time.time()
            sock.send(bench_request(name))
        for number, _ in poll.poll(0 if len(sent_at) < at_once and not pause else 5):
            sock, key = socks[number]
            data, now = sock.recv(65536), time.time()
            text, _, unread[number] = (unread[number] + data).rpartition(b"\n")
            for stamp in STAMP.findall(text):
                firsts.setdefault(key, now - sent_at[key])
                late = max(late, now - float(stamp))
            if not data or b"data: [DONE]" in text:
                whole += bool(data)
                poll.unregister(number)
                socks.pop(number)[0].close()
    return Streams(median(firsts.values()), late, whole)


def bench_config(port: int) -> dict[str, Any]:
    base = f"http://127.0.0.1:{port}/v1"
    return {
        "model_list": [model(name, f"openai/{name}", base) for name in BENCH_MODELS],
        "general_settings": {"forward_client_headers_to_llm_api": True},
    }


@functools.cache
def bare_router(port: int) -> tuple[asyncio.AbstractEventLoop, Any]:
    os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", NO_PROXY="*")
    import litellm

    return asyncio.new_event_loop(), litellm.Router(bench_config(port)["model_list"])


def bare_calls(port: int, at_once: int) -> Speed:
    """Calls of the bare Router, gathered so many at a time."""
    loop, router = bare_router(port)
    latencies = []

    async def call() -> None:
        began = time.perf_counter()
        await router.acompletion(**chat_body("whole"))
        latencies.append(time.perf_counter() - began)

    async def calls() -> None:
        while time.perf_counter() - began < ROUND_SECONDS:
            await asyncio.gather(*(call() for _ in range(at_once)))

    began = time.perf_counter()
    loop.run_until_complete(calls())
    return Speed(median(latencies), len(latencies) / (time.perf_counter() - began))


def bare_streams(port: int, name: str, at_once: int) -> Streams:
    """Streams of the bare Router."""
    loop, router = bare_router(port)
    firsts = []

    async def stream() -> None:
        began, first = time.perf_counter(), 0.0
        async for _ in await router.acompletion(**chat_body(name), stream=True):
            first = first or time.perf_counter() - began
        firsts.append(first)

    async def streams() -> None:
        await asyncio.gather(*(stream() for _ in range(at_once)))

    cpu = time.process_time()
    loop.run_until_complete(streams())
    return Streams(median(firsts), 0.0, len(firsts), time.process_time() - cpu)


NGINX_CONFIG = """\
daemon off; pid FOLDER/pid; error_log FOLDER/error.log; worker_processes auto;
events { worker_connections 1024; }
http {
    access_log FOLDER/access.log;
    client_body_temp_path FOLDER/body; proxy_temp_path FOLDER/proxy; fastcgi_temp_path FOLDER/fastcgi;
    uwsgi_temp_path FOLDER/uwsgi; scgi_temp_path FOLDER/scgi;
    keepalive_requests 1000000;
    upstream bench { server 127.0.0.1:UPSTREAM; keepalive 64; keepalive_requests 1000000; }
    server {
        listen 127.0.0.1:PORT backlog=1024;
        location / { proxy_pass http://bench; proxy_http_version 1.1; proxy_set_header Connection ""; }
    }
}
"""


class Absent(Exception):
    """What a row needs is not installed."""


class Bench:
    """What is measured, by name: the port of each, which is started when it is first asked for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._runs = stack, {}
        self._silent = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, self._silent)
        spawn = multiprocessing.get_context("spawn")
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        self.direct = listener.getsockname()[1]
        upstream = spawn.Process(target=serve_upstream, args=(listener,), daemon=True)
        upstream.start()
        stack.callback(upstream.terminate)
        self._driver, self._bare = (stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in "ab")

    def start(self, *arguments: str) -> Proxy:
        """A proxy in front of the upstream, its log to nowhere."""
        running = Proxy(bench_config(self.direct), *arguments, terminal=self._silent)
        self._stack.callback(running.stop)
        return running

    @functools.cached_property
    def proxies(self) -> dict[str, Proxy]:
        """Both modes, with nothing else behind them than the upstream."""
        url = f"http://127.0.0.1:{self.direct}"
        return {"sdk": self.start("--mode", "sdk"), "binary": self.start("--mode", "binary", "--litellm-url", url)}

    @property
    def sdk(self) -> int:
        return self.proxies["sdk"].port

    @property
    def binary(self) -> int:
        return self.proxies["binary"].port

    @functools.cached_property
    def pair(self) -> int:
        """Binary mode with LiteLLM's server behind it."""
        bench_progress("starting LiteLLM's server")
        self._server_port = free_port()
        return self.start("--mode", "binary", "--litellm-port", str(self._server_port)).port

    @property
    def server(self) -> int:
        """LiteLLM's server alone: the one behind the pair."""
        assert self.pair  # it starts the server
        return self._server_port

    @functools.cached_property
    def nginx(self) -> int:
        binary = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise Absent("nginx is not installed (apt-get install nginx-light)")
        folder, port = self._stack.enter_context(tempfile.TemporaryDirectory()), free_port()
        text = NGINX_CONFIG.replace("FOLDER", folder).replace("UPSTREAM", str(self.direct))
        (Path(folder) / "conf").write_text(text.replace("PORT", str(port)))
        command = [binary, "-p", folder, "-c", f"{folder}/conf", "-e", f"{folder}/error.log"]
        process = subprocess.Popen(command)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        wait_until(lambda: not refuses_connections(port))
        return port

    def load(self, name: str, connections: int, **limits: int) -> Speed:
        if name == "bare":
            return self._bare.submit(bare_calls, self.direct, connections).result()
        return self._driver.submit(drive, getattr(self, name), connections, **limits).result()

    def streams(self, name: str, of: str, at_once: int, pause: float = 0.0) -> Streams:
        if name == "bare":
            return self._bare.submit(bare_streams, self.direct, of, at_once).result()
        before = self.cpu_seconds(name)
        found = self._driver.submit(drive_streams, getattr(self, name), of, at_once, pause).result()
        return found._replace(cpu=self.cpu_seconds(name) - before)

    def cpu_seconds(self, name: str) -> float:
        return samples_of(self.proxies[name])["process_cpu_seconds_total"]

    def rounds(self, connections: int, *names: str) -> list[dict[str, Speed]]:
        """The loads of these, round by round; a first round warms up. Measured once for all the rows that ask."""
        names = tuple(sorted(names))
        key = (connections, *names)
        if key not in self._runs:
            bench_progress(f"{', '.join(names)} at {connections} connections")
            self._runs[key] = [{name: self.load(name, connections) for name in names} for _ in range(ROUNDS + 1)][1:]
        return self._runs[key]


class Measured(NamedTuple):
    """What is held against the target, and the figures behind it."""

    value: float
    figures: str


def added_latency(bench: Bench) -> Measured:
    rounds = bench.rounds(1, "direct", "nginx", "binary")
    added = {name: median(row[name].p50 - row["direct"].p50 for row in rounds) * 1000 for name in ("nginx", "binary")}
    return Measured(
        added["binary"] / added["nginx"], " over ".join(f"{added[name]:.3f} ms" for name in ("binary", "nginx"))
    )


def rate_ratio(connections: int, one: str, other: str, *beside: str) -> Callable[[Bench], Measured]:
    """Requests a second of the one over the other's, measured with those beside them."""

    def measure(bench: Bench) -> Measured:
        rounds = bench.rounds(connections, *beside, other, one)
        figures = " over ".join(f"{median(row[name].rate for row in rounds):,.0f}" for name in (one, other))
        return Measured(median(row[one].rate / row[other].rate for row in rounds), f"{figures} a second")

    return measure


def latency_ratio(one: str, other: str, *beside: str) -> Callable[[Bench], Measured]:
    """The median latency of the one over the other's, at one connection, measured with those beside them."""

    def measure(bench: Bench) -> Measured:
        rounds = bench.rounds(1, *beside, other, one)
        figures = " over ".join(f"{median(row[name].p50 for row in rounds) * 1000:.2f}" for name in (one, other))
        return Measured(median(row[one].p50 / row[other].p50 for row in rounds), f"{figures} ms")

    return measure


def binary_at_64_over_16(bench: Bench) -> Measured:
    at = {count: median(row["binary"].rate for row in bench.rounds(count, "nginx", "binary")) for count in (16, 64)}
    return Measured(at[64] / at[16], f"{at[64]:,.0f} over {at[16]:,.0f} a second")


def first_token(bench: Bench) -> Measured:
    rounds = [{name: bench.streams(name, "chunks-5-0", 1).first for name in ("bare", "sdk")} for _ in range(60)][10:]
    figures = " over ".join(f"{median(row[name] for row in rounds) * 1000:.2f}" for name in ("sdk", "bare"))
    return Measured(median(row["sdk"] - row["bare"] for row in rounds) * 1000, f"{figures} ms")


def chunk_cpu(bench: Bench) -> Measured:
    cpu = {name: bench.streams(name, "chunks-2000-0", 16).cpu / 32_000 * 1e6 for name in ("bare", "sdk")}
    return Measured(cpu["sdk"] / cpu["bare"], f"{cpu['sdk']:.0f} over {cpu['bare']:.0f} µs")


def many_streams(mode: str) -> Callable[[Bench], Measured]:
    """How late the latest chunk of 500 streams comes; 20 ms between two beginnings."""

    def measure(bench: Bench) -> Measured:
        bench.streams(mode, "chunks-5-0", 1)  # the first one imports what every one needs
        before = resident_bytes(bench.proxies[mode])
        peak = [before]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                peak.append(resident_bytes(bench.proxies[mode]))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            found = bench.streams(mode, "chunks-20-1", 500, pause=0.02)
        finally:
            done.set()
            watcher.join()
        return Measured(found.late, f"{found.whole} of 500 whole, {(max(peak) - before) / MIB:.0f} MB above idle")

    return measure


def idle_health(mode: str) -> Callable[[Bench], Measured]:
    """The slowest of 20 answers of ``/health`` beside 900 idle connections, in ms."""

    def measure(bench: Bench) -> Measured:
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with contextlib.ExitStack() as stack:
            for _ in range(900):
                sock = stack.enter_context(connected(getattr(bench, mode)))
                sock.sendall(ask)
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            took = []
            for _ in range(20):
                began = time.perf_counter()
                with connected(getattr(bench, mode)) as sock:
                    sock.sendall(ask)
                    assert sock.recv(65536).startswith(b"HTTP/1.1 200")
                took.append((time.perf_counter() - began) * 1000)
        return Measured(max(took), f"{max(took):.1f} ms at most, {median(took):.1f} ms in the middle")

    return measure


def seconds_to_run(*arguments: str) -> float:
    began = time.perf_counter()
    environment = clean_environment(LITELLM_LOCAL_MODEL_COST_MAP="True")
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def seconds_to_ready(bench: Bench, *arguments: str) -> float:
    began = time.perf_counter()
    running = bench.start(*arguments)
    took = time.perf_counter() - began
    running.stop()
    return took


def front_start(bench: Bench) -> Measured:
    took = [seconds_to_ready(bench, "--mode", "binary", "--litellm-url", "http://127.0.0.1:9") for _ in range(5)]
    return Measured(median(took), f"{median(took):.2f} s")


def help_start(_bench: Bench) -> Measured:
    took = [seconds_to_run(str(MODULE), "--help") for _ in range(5)]
    return Measured(median(took), f"{median(took):.2f} s")


def sdk_start(bench: Bench) -> Measured:
    rounds = [(seconds_to_ready(bench, "--mode", "sdk"), seconds_to_run("-c", "import litellm")) for _ in range(4)][1:]
    ready, imported = (median(column) for column in zip(*rounds, strict=True))
    return Measured(median(one / other for one, other in rounds), f"{ready:.2f} over {imported:.2f} s")


def binary_size(bench: Bench) -> Measured:
    running = bench.start("--mode", "binary", "--litellm-url", f"http://127.0.0.1:{bench.direct}")
    size = resident_bytes(running) / MIB
    running.stop()
    return Measured(size, f"{size:.1f} MB")


def sdk_size(bench: Bench) -> Measured:
    running = bench.start("--mode", "sdk")
    ours = resident_bytes(running) / MIB
    running.stop()
    program = (
        f"import litellm; router = litellm.Router({bench_config(bench.direct)['model_list']!r}); "
        "print(open('/proc/self/statm').read().split()[1])"
    )
    environment = clean_environment(LITELLM_LOCAL_MODEL_COST_MAP="True")
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment).stdout
    bare = int(output) * os.sysconf("SC_PAGE_SIZE") / MIB
    return Measured(ours / bare, f"{ours:.0f} over {bare:.0f} MB")


def kernel_figures(running: Proxy) -> tuple[int, int, int]:
    """Resident size in bytes, threads, descriptors."""
    time.sleep(1)  # until the load's connections are gone
    base = Path(f"/proc/{running.process.pid}")
    return resident_bytes(running), *(sum(1 for _ in (base / part).iterdir()) for part in ("task", "fd"))


def growth(mode: str) -> Callable[[Bench], Measured]:
    """How much of its size a mode grows by between request 2,000 and request 20,000, in percent."""

    def measure(bench: Bench) -> Measured:
        bench.load(mode, 16, count=2_000)
        before = kernel_figures(bench.proxies[mode])
        bench.load(mode, 16, count=18_000)
        after = kernel_figures(bench.proxies[mode])
        sizes, threads, descriptors = zip(before, after, strict=True)
        figures = (
            f"{sizes[0] / MIB:.1f} to {sizes[1] / MIB:.1f} MB, "
            f"threads {threads[0]} to {threads[1]}, descriptors {descriptors[0]} to {descriptors[1]}"
        )
        return Measured((sizes[1] / sizes[0] - 1) * 100, figures)

    return measure


@dataclass(frozen=True)
class Target:
    """A row of the table: what is measured, and the most (with ``least``, the least) that it should be."""

    what: str
    limit: float
    measure: Callable[[Bench], Measured]
    unit: str = ""
    least: bool = False

    def row(self, found: Measured) -> str:
        wanted = f"at {'least' if self.least else 'most'} {self.limit:g}{self.unit}"
        met = found.value >= self.limit if self.least else found.value <= self.limit
        return f"| {self.what} | {found.figures} | {found.value:.2f}{self.unit} | {wanted} | {'yes' if met else 'no'} |"


TARGETS = [
    Target("binary, 1 connection: added latency, p50, over nginx's", 2, added_latency),
    Target("binary, 16 connections: requests over nginx's", 0.2, rate_ratio(16, "binary", "nginx"), least=True),
    Target("binary, 64 connections: requests over nginx's", 0.2, rate_ratio(64, "binary", "nginx"), least=True),
    Target("binary, 64 connections: requests over those at 16", 1, binary_at_64_over_16, least=True),
    Target("binary before LiteLLM's server: p50 over the server's alone", 1.03, latency_ratio("pair", "server")),
    Target("sdk, 1 connection: p50 over the bare Router's", 1.1, latency_ratio("sdk", "bare", "server")),
    Target(
        "sdk, 16 connections: requests over the bare Router's", 0.9, rate_ratio(16, "sdk", "bare", "server"), least=True
    ),
    Target(
        "sdk, 1 connection: requests over LiteLLM's server's", 3, rate_ratio(1, "sdk", "server", "bare"), least=True
    ),
    Target(
        "sdk, 16 connections: requests over LiteLLM's server's", 3, rate_ratio(16, "sdk", "server", "bare"), least=True
    ),
    Target("sdk streams: time to first token, added to the bare Router's", 1, first_token, " ms"),
    Target("sdk streams: CPU a chunk over the bare Router's", 1.15, chunk_cpu),
    Target("sdk, 500 streams at once: the latest chunk", 0.5, many_streams("sdk"), " s"),
    Target("binary, 500 streams at once: the latest chunk", 0.5, many_streams("binary"), " s"),
    Target("sdk, 900 idle connections: /health", 100, idle_health("sdk"), " ms"),
    Target("binary, 900 idle connections: /health", 100, idle_health("binary"), " ms"),
    Target("start: binary front ready", 0.5, front_start, " s"),
    Target("start: --help", 0.3, help_start, " s"),
    Target("start: sdk ready over `import litellm`", 1.3, sdk_start),
    Target("resident: binary front", 40, binary_size, " MB"),
    Target("resident: sdk over a bare process with a Router", 1.15, sdk_size),
    Target("binary, 20,000 requests: growth after the first 2,000", 5, growth("binary"), " %"),
    Target("sdk, 20,000 requests: growth after the first 2,000", 5, growth("sdk"), " %"),
]
BENCH_HEAD = "| what | measured | ratio or figure | target | met |\n|---|---|---|---|---|"


bench_progress = functools.partial(progress, command="bench")


def run_bench(words: Sequence[str]) -> int:
    """``./run.sh bench [WORD…]``: the rows that have all these words, or all rows, which the README then shows."""
    wanted = [target for target in TARGETS if all(word in target.what for word in words)]
    if not wanted:
        bench_progress(f"no row has {' '.join(words)!r}; the rows are\n" + "\n".join(row.what for row in TARGETS))
        return 2
    rows = [BENCH_HEAD]
    print(BENCH_HEAD, flush=True)
    with contextlib.ExitStack() as stack:
        bench = Bench(stack)
        for target in wanted:
            bench_progress(target.what)
            try:
                rows.append(target.row(target.measure(bench)))
            except Absent as absent:
                bench_progress(f"left out: {absent}")
                continue
            print(rows[-1], flush=True)
    if not words:
        show_in_readme("\n".join(rows))
    return 0


def show_in_readme(table: str) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    versions = f"Python {python}, LiteLLM {proxy.version_of('litellm')}, {os.cpu_count()} cores."
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BENCH_MARKS[0])
    after = rest.partition(BENCH_MARKS[1])[2]
    readme.write_text("\n\n".join([before + BENCH_MARKS[0], table, versions, BENCH_MARKS[1]]) + after)


def bench_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "test_proxy.py"), "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=120)


def test_the_bench_measures_the_rows_that_are_asked_for() -> None:
    result = bench_command("start:", "--help")
    assert result.returncode == 0 and result.stdout.startswith(BENCH_HEAD + "\n| start: --help | ")
    assert result.stdout.count("\n") == 3


def test_the_bench_names_its_rows_where_none_is_meant() -> None:
    result = bench_command("nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0] == "bench: no row has 'nothing'; the rows are"


def test_the_readme_shows_the_rows_of_the_bench() -> None:
    table = (HERE / "README.md").read_text().partition(BENCH_MARKS[0])[2].partition(BENCH_MARKS[1])[0]
    shown = re.findall(r"^\| (.+?) \| ", table, re.M)[1:]
    assert shown and set(shown) <= {target.what for target in TARGETS}


# ── run.sh and README ────────────────────────────────────────────────────────────────────────────────────────────


def readme_commands() -> list[str]:
    text = (HERE / "README.md").read_text()
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.strip().split("\n")]


def test_the_readmes_own_commands_work(tmp_path: Path) -> None:
    """From a copy of the project, with the README's first commands as they stand there."""
    commands = readme_commands()
    assert commands[0] == "./run.sh" and "./run.sh test" in commands
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("litellm_memory_proxy.py", "config.yaml", "run.sh"):
        (folder / name).write_bytes((HERE / name).read_bytes())
    (folder / "run.sh").chmod(0o755)
    port = free_port()
    environment = clean_environment(PROXY_PORT=str(port), VENV=sys.prefix)
    stamp = Path(sys.prefix) / ".installed"
    assert stamp.exists() or os.environ.get("CI") is None
    process = subprocess.Popen(
        commands[0].split(), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == f"ready: sdk http://127.0.0.1:{port}\n"
        curl = next(command for command in commands if command.startswith("curl"))
        answer = subprocess.run(
            ["sh", "-c", curl.replace("8764", str(port))], capture_output=True, text=True, env=clean_environment()
        )
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"].startswith("Hello!")
    finally:
        process.terminate()
        assert process.wait(40) == 0


def test_run_sh_finds_its_files_by_a_symlink_and_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "proxy").symlink_to(HERE / "run.sh")
    command, environment = [tmp_path / "proxy", "check"], clean_environment(VENV=sys.prefix)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1].startswith(f"{HERE / 'config.yaml'}: ok, "), result.stderr


@pytest.mark.parametrize("name", ["python3", "python3.14", "python3.10"])
def test_run_sh_finds_a_python_that_is_new_enough(tmp_path: Path, name: str) -> None:
    """The only one on the PATH, which makes no virtual environment: nothing is installed."""
    python = tmp_path / name
    python.write_text('#!/bin/sh\n[ "$1" = -c ]\n')
    python.chmod(0o755)
    for tool in ("sh", "readlink", "dirname", "rm"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    environment = clean_environment(VENV=str(tmp_path / "venv"), PATH=str(tmp_path))
    result = subprocess.run([HERE / "run.sh", "check"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(f"run.sh: {name} -m venv failed")


NO_START = ["--host", "0.0.0.0"]  # without a master key that is refused


@pytest.mark.parametrize(
    ("arguments", "server"),
    [(["--help"], False), (["check", "--help"], False), (["--mode", "binary", *NO_START], True)],
)
def test_run_sh_installs_the_server_only_for_what_needs_it(tmp_path: Path, arguments: list[str], server: bool) -> None:
    """With a virtual environment that has all but the server, and whose Python notes what pip is to install."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    noted = '[ "${2-}" = pip ] && { echo "$@" >>"$0.pip"; exit; }'
    noted += '\ncase "$*" in *metadata*) [ -e "$0.pip" ] && echo 1.1 || echo 1.2; exit; esac'  # the server's is older
    python.write_text(f'#!/bin/sh\n{noted}\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    requirements = re.findall(r'^#   "(.*)",$', MODULE.read_text(), re.M)
    (tmp_path / ".installed").write_text("\n".join(requirements) + "\n")
    environment = clean_environment(VENV=str(tmp_path), PATH="/usr/bin:/bin")
    result = subprocess.run([HERE / "run.sh", *arguments], env=environment, capture_output=True, text=True)
    assert result.stdout.count("usage:") == ("--help" in arguments)
    assert Path(f"{python}.pip").exists() == server
    assert ("LiteLLM 1.2 is now 1.1: a proxy that runs from here fails" in result.stderr) == server


class WithoutServer:
    """Of the tests, those that show whether another version of LiteLLM's SDK will do, and need none of its server."""

    NAMES = re.compile("session|challenge|cookie|connections_to_a_provider|litellms_router")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left = [], []
        for item in items:
            fixtures = set(getattr(item, "fixturenames", ()))
            suits = self.NAMES.search(item.name) or ("sdk" in fixtures and "binary" not in fixtures)
            (kept if suits else left).append(item)
        config.hook.pytest_deselected(items=left)
        items[:] = kept


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        sys.exit(run_bench(sys.argv[2:]))
    if sys.argv[1:2] == ["sdk"]:
        sys.exit(pytest.main([str(HERE / "test_proxy.py"), *sys.argv[2:]], [WithoutServer()]))
    if sys.argv[1:] != ["clients"]:
        sys.exit("usage: test_proxy.py clients | bench [WORD...] | sdk [ARGS] (all tests: ./run.sh test)")
    sys.exit(run_clients())
