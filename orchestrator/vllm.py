"""vLLM's HTTP contract: which adapters a server has, loading one while it runs, and unloading it.

From vLLM's documentation (docs/features/lora.md) and its OpenAI server: a server started with
``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` takes ``POST /v1/load_lora_adapter``
with ``lora_name`` and ``lora_path``, a folder that *it* can read, and ``POST
/v1/unload_lora_adapter`` with ``lora_name``; ``GET /v1/models`` lists the base model and what is
loaded. It answers 400 to a name that is loaded already, 404 to one that is not, and 400, 404 or 500
(which one changed between its releases) to what it cannot load. Errors are ``{"error": {"message":
…}}``, in older releases ``{"message": …}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

LOAD_TIMEOUT_S = 300.0
"""Within which an adapter must be loaded: a large one is read from a network's disk."""


class VllmUnreachable(ConnectionError):
    """No vLLM answers where it should."""


class VllmRefused(RuntimeError):
    """vLLM answers, and does not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a vLLM server answers for.

    Attributes:
        id: what requests call it.
        root: the folder or Hub id that it was loaded from.
        is_base: whether it is a base model, and no adapter.
    """

    id: str
    root: str
    is_base: bool


class Vllm:
    """One vLLM server.

    Args:
        url: of the server, without ``/v1``.
        key: its API key, or None.
        client: what speaks HTTP, instead of a new one to ``url``.
    """

    def __init__(self, url: str, key: str | None = None, client: httpx.Client | None = None):
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = client or httpx.Client(timeout=httpx.Timeout(10.0, read=LOAD_TIMEOUT_S))

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def models(self) -> list[Served]:
        """Return what the server answers for.

        Raises:
            VllmUnreachable: if it does not answer.
            VllmRefused: if it refuses the key, or is no OpenAI server.
        """
        answer = self._ask("GET", "/v1/models")
        try:
            return [
                Served(
                    str(row["id"]),
                    str(row.get("root") or row["id"]),
                    is_base=row.get("parent") is None,
                )
                for row in answer.json()["data"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VllmRefused(
                f"{self.url}/v1/models answers {answer.status_code} and no list of models; is it "
                "vLLM's OpenAI server?"
            ) from None

    def load(self, name: str, path: str) -> None:
        """Have the server load an adapter; one that it has under this name already is left.

        Args:
            name: what requests will call it; another adapter has another name.
            path: of its folder, as the server sees it.

        Raises:
            VllmUnreachable: if it does not answer.
            VllmRefused: if it does not load it, with its own reason.
        """
        answer = self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if answer.is_success:
            return
        reason = _message(answer)
        if "already been loaded" in reason:
            return
        self._check_dynamic(answer, reason)
        hint = ""
        if answer.status_code == 404 or "No adapter found" in reason:
            hint = "; if it sees the adapters in another folder, say which with --mounted-at"
        elif "max_lora_rank" in reason:
            hint = "; start it with a larger --max-lora-rank, or deploy with --rank R"
        elif "target modules" in reason or "size mismatch" in reason:
            hint = "; does it serve the base model that the adapter was trained on?"
        raise VllmRefused(f"vLLM at {self.url} does not load {name} from {path}: {reason}{hint}")

    def unload(self, name: str) -> None:
        """Have the server unload an adapter, if it has it.

        Raises:
            VllmUnreachable: if it does not answer.
            VllmRefused: if it does not unload it.
        """
        answer = self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if answer.is_success:
            return
        reason = _message(answer)
        self._check_dynamic(answer, reason)
        if answer.status_code != 404:
            raise VllmRefused(f"vLLM at {self.url} does not unload {name}: {reason}")

    def probe(self, name: str) -> None:
        """Have the server answer one token with an adapter: some fail only when they are used.

        Raises:
            VllmUnreachable: if it does not answer.
            VllmRefused: if it does not answer with a completion.
        """
        body = {"model": name, "prompt": "a", "max_tokens": 1, "temperature": 0}
        answer = self._ask("POST", "/v1/completions", body)
        if not answer.is_success:
            raise VllmRefused(f"vLLM at {self.url} has {name} and fails: {_message(answer)}")

    def _check_dynamic(self, answer: httpx.Response, reason: str) -> None:
        if answer.status_code == 404 and reason == "Not Found":
            raise VllmRefused(
                f"vLLM at {self.url} takes no adapters while it runs; start it with --enable-lora "
                "and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self._client.request(
                method, f"{self.url}{path}", json=body, headers=self._headers
            )
        except httpx.HTTPError as error:
            raise VllmUnreachable(
                f"no vLLM answers at {self.url} ({error or type(error).__name__}); is it running "
                "there?"
            ) from error
        if answer.status_code in (401, 403):
            raise VllmRefused(
                f"vLLM at {self.url} refuses the API key; give it with --api-key-file FILE"
            )
        return answer


def _message(answer: httpx.Response) -> str:
    """Return what an error says, whichever release of vLLM says it; at most a line of it."""
    try:
        body = answer.json()
        found = body.get("error", body)
        said = found if isinstance(found, str) else found.get("message", body.get("detail"))
    except (ValueError, AttributeError):
        said = answer.text
    lines = str(said).strip().splitlines() or [f"status {answer.status_code}"]
    return lines[0][:500]
