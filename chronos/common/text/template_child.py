"""Renders chat templates; run as a script, in a process that may use 1 s of CPU and 256 MiB.

A template is code from a model folder. Jinja's sandbox keeps it away from Python's internals but
not from `'a' * 10**10` or a nest of loops; the limits of a process of its own do. Standard
library and Jinja only: the script runs by its path, outside the package.

Reads {"source", "jobs": [variables, ...]} from stdin and writes a list of texts to stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 0.9
DATA_BYTES = 256 << 20


def render_all(source: str, jobs: list[dict[str, Any]]) -> list[str]:
    """Render one template with each job's variables, under the options Transformers uses."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(source)
    return [template.render(job) for job in jobs]


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _limit() -> None:
    try:
        import resource
        import signal
    except ImportError:  # not a Unix: the caller's time limit is what is left
        return
    # Anonymous memory only; RLIMIT_AS would count the libraries Python maps as well.
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # CPU time, so a busy machine fails no honest template; the signal's default action ends it.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


def main() -> int:
    """0 with the texts on stdout, or 1 with one line on stderr."""
    request = json.load(sys.stdin)
    _limit()
    try:
        json.dump(render_all(request["source"], request["jobs"]), sys.stdout)
    except Exception as error:  # whatever a template raises is the template's error
        sys.stderr.write(f"{type(error).__name__}: {error}"[:500])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
