"""Conversations with a server that is a job: asked over HTTP, written to RUN/chat.jsonl.

A turn runs on a thread of its own, so it goes on while the page is reloaded; what it has said so
far is in memory and, once it has ended, in the file.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronos.common.disk.io import FileIO, write_error
from chronos.common.errors import ResourceError
from chronos.ui.jobs import Job
from chronos.ui.rows import Rows

LOG, EXPERTS = "chat.jsonl", "experts.jsonl"  # `chronos serve --stats` writes the second
_TIMEOUT_S = 60.0  # without a byte; the server says at least every ten seconds that it is alive
_LISTENS = re.compile(r"listening on http://(127\.0\.0\.1:\d+)")


def address(job: Job) -> str | None:
    """Where a server listens, once it says so."""
    for row in job.rows:
        if row["event"] == "out" and (found := _LISTENS.fullmatch(row["text"])):
            return found[1]
    return None


@dataclass
class Turn:
    """A reply on its way. state: of the server, while nothing has been said."""

    text: str = ""
    state: str = ""
    error: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    first: float = 0.0
    pieces: int = 0  # of text; about a token each
    over: bool = False


class Talk:
    """The conversation with one server."""

    def __init__(self, job: Job) -> None:
        self.folder = job.folder
        self.experts = Rows(job.folder / EXPERTS)
        self._rows = Rows(job.folder / LOG)
        self._connection: http.client.HTTPConnection | None = None
        self._mutex = threading.Lock()
        self.turn: Turn | None = None

    def messages(self) -> list[dict[str, str]]:
        """What was said, with the reply so far."""
        said = [{"role": row["role"], "content": row["content"]} for row in self._rows.read()]
        turn = self.turn
        if turn is not None and not turn.over:
            said.append({"role": "assistant", "content": turn.text})
        return said

    @property
    def busy(self) -> bool:
        return self.turn is not None and not self.turn.over

    def ask(self, where: str, text: str, *, max_tokens: int, temperature: float) -> None:
        """Say something to the server at `where`. Raises ResourceError while it answers."""
        with self._mutex:
            if self.busy:
                raise ResourceError("a reply is on its way", "", "wait for it, or stop it")
            self.turn = Turn()
        self._keep("user", text)
        body = {
            "messages": self.messages()[:-1],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        thread = threading.Thread(target=self._run, args=(where, body, self.turn), daemon=True)
        thread.start()

    def stop(self) -> None:
        """End the reply where it is. The server notes that its client has gone."""
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def clear(self) -> None:
        """Begin anew."""
        self.stop()
        (self.folder / LOG).unlink(missing_ok=True)

    def _run(self, where: str, body: dict[str, Any], turn: Turn) -> None:
        self._connection = http.client.HTTPConnection(where, timeout=_TIMEOUT_S)
        try:
            self._await(turn)
            head = {"content-type": "application/json"}
            self._connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
            response = self._connection.getresponse()
            if response.status != 200:
                turn.error = _problem(response.read())
            else:
                self._follow(response, turn)
        except (OSError, ValueError, http.client.HTTPException) as error:
            turn.error = "" if turn.text else f"{type(error).__name__}: {error}"
        finally:
            self._connection.close()
            self._connection = None
            if turn.text:
                self._keep("assistant", turn.text)
            turn.over = True

    def _await(self, turn: Turn) -> None:
        """Wait until the server's model is loaded, for the first message of a conversation."""
        connection = self._connection
        while connection is not None and not turn.over:
            connection.request("GET", "/health")
            response = connection.getresponse()
            found = json.loads(response.read())
            if response.status == 200 or found["status"] != "loading":
                return
            turn.state = str(found["status"])
            time.sleep(0.2)

    def _follow(self, response: http.client.HTTPResponse, turn: Turn) -> None:
        for line in response:
            text = line.decode("utf-8", "replace").strip()
            if text.startswith(": ping "):
                turn.state = text.removeprefix(": ping ")
            elif text.startswith("data: {"):
                event = json.loads(text.removeprefix("data: "))
                if "error" in event:
                    turn.error = str(event["error"].get("message", ""))
                for choice in event.get("choices", ()):
                    self._said(turn, choice["delta"])
                turn.usage = event.get("usage") or turn.usage

    def _said(self, turn: Turn, delta: dict[str, Any]) -> None:
        piece = delta.get("reasoning_content") or delta.get("content") or ""
        if piece:
            turn.first = turn.first or time.monotonic()
            turn.text += piece
            turn.pieces += 1

    def _keep(self, role: str, content: str) -> None:
        path = self.folder / LOG
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"role": role, "content": content}) + "\n")
        except OSError as error:
            raise write_error(path, error, FileIO()) from error


class Talks:
    """The conversation of each server, the same for all pages."""

    def __init__(self) -> None:
        self._talks: dict[Path, Talk] = {}
        self._mutex = threading.Lock()

    def of(self, job: Job) -> Talk:
        with self._mutex:
            return self._talks.setdefault(job.folder, Talk(job))


def _problem(body: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return body[:200].decode("utf-8", "replace")
