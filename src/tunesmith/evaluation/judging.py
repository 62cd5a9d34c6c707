"""A third model compares pairs of answers without knowing whose they are, through any server that speaks OpenAI's API.

Judges prefer what they read first (Zheng et al. 2023, arXiv 2306.05685, section 3.3), so each pair is shown in both
orders, and only an answer that is preferred in both of them wins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tunesmith import loopback
from tunesmith.errors import MissingExtra, ModelError
from tunesmith.evaluation.evaluate import Answer
from tunesmith.language import said

_AT_ONCE = 4
_QUESTION = """\
Two assistants answered the same message. Which answer is closer to the example answer, in what it says and in how it \
says it? Do not prefer longer answers, nor the one that comes first. Reply with one letter: A, B, or C if neither is \
closer.

[Message]
{question}

[Example answer]
{reference}

[Answer A]
{first}

[Answer B]
{second}"""


def judge_at(url: str, model: str | None = None, key: str = "none") -> Callable[[Sequence[Answer]], list[str]]:
    """A judge for `evaluate`: for each answer `tuned`, `base` or `neither`.

    `url` is the server's base, for instance http://127.0.0.1:8000/v1; `model` is by default the first one that it
    lists. Raises MissingExtra without the openai package, ModelError when the server does not answer.
    """
    if importlib.util.find_spec("openai") is None:
        raise MissingExtra("eval --judge", "eval")
    import openai

    past_proxies = openai.DefaultHttpxClient(trust_env=False) if loopback.leads_to(url) else None
    client = openai.OpenAI(base_url=url, api_key=key, http_client=past_proxies)

    def ask(name: str, question: str) -> str:
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=8
        )
        return (reply.choices[0].message.content or "").strip().upper()[:1]

    def compare(name: str, answer: Answer) -> str:
        texts = {"question": answer.question, "reference": answer.reference}
        first = ask(name, _QUESTION.format(**texts, first=answer.base, second=answer.tuned))
        second = ask(name, _QUESTION.format(**texts, first=answer.tuned, second=answer.base))
        return {("A", "B"): "base", ("B", "A"): "tuned"}.get((first, second), "neither")

    def judge(answers: Sequence[Answer]) -> list[str]:
        try:
            name = model or next(iter(client.models.list())).id
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return list(pool.map(lambda answer: compare(name, answer), answers))
        except (openai.OpenAIError, StopIteration) as error:
            found = str(error).splitlines()[0] if str(error) else said("no model")
            fix = said("Is it running, and does its address end in /v1?")
            raise ModelError(url, found, said("a server that speaks OpenAI's API"), fix) from error

    return judge
