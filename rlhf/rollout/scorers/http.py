"""`kind: http`: a reward model, or any other judge, behind an address.

For each batch it gets POST {"prompts": […], "responses": […], "columns": {NAME: […]}} and answers {"scores": […]}. If
$RLHF_SCORER_TOKEN is set, it is sent as a bearer token; it is in no file, log or command line.
"""

import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

from rlhf.config.errors import DataError
from rlhf.config.schema import ScorerConfig

TOKEN = "RLHF_SCORER_TOKEN"
_SECRET = re.compile("key|token|secret|password|auth", re.IGNORECASE)
BUSY = (429, 500, 502, 503, 504)


def problems(config: ScorerConfig) -> list[str]:
    """An address that is missing or of another kind."""
    try:
        parts = urlsplit(config.url or "")
        _ = parts.port
    except ValueError as error:
        return [f"scorer.url={config.url}: is no address: {error}"]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"scorer.url={config.url}: give the scorer's address, as in http://127.0.0.1:8000/score"]
    secret = next((name for name, _ in parse_qsl(parts.query) if _SECRET.search(name)), None)
    if secret is not None:
        return [f"scorer.url: the value of {secret}= would be written to logs; set ${TOKEN} instead"]
    if parts.username or parts.password:
        return [f"scorer.url: an address with a password would be written to logs; set ${TOKEN} instead"]
    return []


def score_function(config: ScorerConfig) -> Callable[..., list[float]]:
    """A function that asks the address, `scorer.batch_size` responses at a time.

    Connections that fail and the codes 429, 500, 502, 503 and 504 are tried again `scorer.retries` times, after 0, 1,
    2, 4, … seconds. Everything else, and the last failure, raises DataError.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    url = str(config.url)
    retry = Retry(
        total=config.retries,
        backoff_factor=0.5,
        status_forcelist=BUSY,
        allowed_methods=None,
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.auth = _authorized(os.environ.get(TOKEN))

    def score(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(responses), config.batch_size):
            part = slice(start, start + config.batch_size)
            kept = {name: values[part] for name, values in columns.items()}
            content: Any = {"prompts": prompts[part], "responses": responses[part], "columns": kept}
            try:
                # What follows a redirection asks by GET, without the responses.
                answer = session.post(url, json=content, timeout=config.timeout_seconds, allow_redirects=False)
            except requests.RequestException as error:
                raise DataError(f"scorer.url={url}: no answer after {config.retries} retries: {error}") from error
            scores += _scores_of(answer, len(responses[part]), url=url)
        return scores

    return score


def _authorized(token: str | None) -> Callable[[Any], Any]:
    """What adds the token to a request; without one nothing is added, also not what ~/.netrc has for the host."""

    def authorize(request: Any) -> Any:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorize


def _scores_of(answer: Any, expected: int, *, url: str) -> list[float]:
    if answer.is_redirect:
        where = urlsplit(urljoin(url, answer.headers["location"]))._replace(query="").geturl()
        raise DataError(f"scorer.url={url}: is redirected (code {answer.status_code}) to {where}: set scorer.url to it")
    if answer.status_code != 200:
        raise DataError(f"scorer.url={url}: answered with code {answer.status_code}: {answer.text[:200]}")
    try:
        scores = answer.json()["scores"]
        found = [float(score) for score in scores]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'scorer.url={url}: answered {answer.text[:200]!r} instead of {{"scores": […]}}') from error
    if len(found) != expected:
        raise DataError(f"scorer.url={url}: gave {len(found)} scores for {expected} responses")
    return found
