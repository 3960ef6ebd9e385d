"""A gateway elsewhere, told over HTTP where to lead."""

from __future__ import annotations

from typing import Any

import httpx


class GatewayFailed(RuntimeError):
    """A gateway does not answer, or does not do what it was asked for."""


class GatewayUnavailable(ImportError):
    """A package that a gateway needs is not installed."""


class RemoteGateway:
    """A gateway elsewhere; a :class:`orchestrator.routes.Switch`.

    Args:
        url: of the gateway.
        key: its administrator's key.
        client: what speaks HTTP, instead of a new one.
    """

    def __init__(self, url: str, key: str | None = None, client: httpx.Client | None = None):
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = client or httpx.Client(timeout=10.0)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def flip(self, pointer: str, model: str) -> None:
        """Have ``model`` answer for ``pointer`` from now on.

        Raises:
            GatewayFailed: if it does not say that it does.
        """
        self._ask("PUT", f"/weft/routes/{pointer}", {"model": model})

    def drop(self, pointer: str) -> None:
        """Have nothing answer for ``pointer`` from now on.

        Raises:
            GatewayFailed: if it does not say that it does.
        """
        self._ask("DELETE", f"/weft/routes/{pointer}")

    def leads(self, pointer: str) -> str | None:
        """Return the model that answers for ``pointer``, or None.

        Raises:
            GatewayFailed: if it does not say.
        """
        found: str | None = self.routes()["routes"].get(pointer)
        return found

    def in_flight(self, model: str) -> int:
        """Return how many requests are being answered by ``model``.

        Raises:
            GatewayFailed: if it does not say.
        """
        return int(self.routes()["in_flight"].get(model, 0))

    def routes(self) -> dict[str, Any]:
        """Return where the gateway leads (``routes``) and who is being answered (``in_flight``).

        Raises:
            GatewayFailed: if it does not say.
        """
        found = self._ask("GET", "/weft/routes")
        if not isinstance(found, dict) or not {"routes", "in_flight"} <= found.keys():
            raise GatewayFailed(f"{self.url} is no gateway of weft's")
        return found

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._client.request(
                method, f"{self.url}{path}", json=body, headers=self._headers
            )
            document = answer.json()
        except httpx.HTTPError as error:
            raise GatewayFailed(
                f"no gateway answers at {self.url} ({error or type(error).__name__}); start it "
                "with: weft gateway"
            ) from error
        except ValueError:
            raise GatewayFailed(f"{self.url} is no gateway of weft's") from None
        if not answer.is_success:
            said = document.get("error", {}).get("message") if isinstance(document, dict) else None
            raise GatewayFailed(
                f"the gateway at {self.url} answers {answer.status_code}: {said or document}"
            )
        return document
