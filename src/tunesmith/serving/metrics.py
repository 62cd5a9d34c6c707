"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from tunesmith.serving.service import Service


class Counted:
    """Counts answers by path and status."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._service.answers[path, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)


def metrics_text(service: Service) -> str:
    """All that is counted."""
    batch = service.batch
    gauges = {
        "tunesmith_replies_running": (batch.running, "Replies that are being written."),
        "tunesmith_replies_waiting": (batch.waiting, "Replies that wait for room."),
        "tunesmith_requests_followed": (service.following, "Requests whose replies are being written or wait."),
        "tunesmith_tokens_reserved": (batch.reserved, "Tokens of prompts and replies that room is kept for."),
        "tunesmith_tokens_budget": (batch.budget, "Tokens that there is room for."),
    }
    counters = {
        "tunesmith_prompt_tokens_total": (batch.n_prompt, "Tokens of prompts that were read."),
        "tunesmith_written_tokens_total": (batch.n_written, "Tokens of replies that were written."),
        "tunesmith_settled_tokens_total": (batch.settled, "Tokens that were computed again alone, as two were close."),
    }
    lines = []
    for kind, table in (("gauge", gauges), ("counter", counters)):
        for name, (value, text) in table.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    lines += ["# HELP tunesmith_answers_total Answers by path and status.", "# TYPE tunesmith_answers_total counter"]
    for (path, status), count in sorted(service.answers.items()):
        lines.append(f'tunesmith_answers_total{{path="{path}",status="{status}"}} {count}')
    return "\n".join(lines) + "\n"
