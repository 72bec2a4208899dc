"""A judge behind HTTP on this machine, that does as it is told."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any, dict[str, str]]  # status, body (JSON, or bytes as they are), headers
SOON = {"retry-after-ms": "1"}


def said(text: Any, *, model: str = "judge-2026-01-01", tokens: tuple[int, int] = (100, 10)) -> Answer:
  """A completion."""
  return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": model,
               "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
               "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}}, {}


class Server:
  """Answers requests by a function of a request's body and its number, from 0, and remembers what it was sent."""

  def __init__(self, answer: Callable[[dict[str, Any], int], Answer]):
    self.answer, self.requests, self.headers = answer, [], []
    self.at_once = self.most_at_once = 0
    self.lock = threading.Lock()
    server = self

    class Handler(BaseHTTPRequestHandler):
      def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
          number = len(server.requests)
          server.requests.append(body)
          server.headers.append(self.headers)
          server.at_once += 1
          server.most_at_once = max(server.most_at_once, server.at_once)
        status, content, headers = server.answer(body, number)
        with server.lock:
          server.at_once -= 1
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
          self.send_response(status)
          for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(data)

      def log_message(self, *arguments: Any) -> None:
        pass

    self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Server]:
  """A server while the block lasts."""
  server = Server(answer)
  thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield server
  finally:
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def prompt_of(body: dict[str, Any]) -> str:
  """What the judge was asked."""
  return str(body["messages"][-1]["content"])


def slowly(seconds: float, answer: Answer) -> Answer:
  """An answer that takes its time."""
  time.sleep(seconds)
  return answer
