"""What different adapters in one batch cost, and what is lost while aliases move.

    python benchmarks/serving.py [--quick] [--json] [--requests 10000] [--threads 1] [--moves-only]

On a Llama made on the spot (hidden 512, 8 layers; LoRA of rank 8 on q and v). A request is a prompt
of 32 tokens with an answer of 16, greedy; 16 are computed at once. *Switching* takes the requests
in the order in which they came, so that the adapter changes with each. PEFT runs transformers'
``generate`` on the same requests in the same batches of 16, and one at a time where it switches.
The moves of an alias are measured over HTTP, on a smaller Llama, from the same process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _figures import Figure, show
from _served import adapter, make_base, publish, with_peft

from clients import models
from clients.serving.bank import Bank
from clients.serving.changes import changes_of
from clients.serving.generating import Generator, Prompt
from clients.serving.sampling import Sampling
from orchestrator.serving import command, server
from orchestrator.serving.engine import Engine
from orchestrator.serving.keys import ApiKeys
from orchestrator.workspace import open_workspace

BATCH, PROMPT, ANSWER = 16, 32, 16
GREEDY = Sampling(temperature=0.0)
COUNTS = (1, 16, 256)


def prompts(count: int) -> list[list[int]]:
    """Return random prompts, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 250, (count, PROMPT), generator=generator).tolist()


def answered(engine: Engine, asked: Sequence[list[int]], slots: Sequence[int]) -> list[float]:
    """Have all answered, and return the seconds that each took; BATCH are asked at a time."""
    took = [0.0] * len(asked)
    free = threading.Semaphore(BATCH)
    for number, (tokens, slot) in enumerate(zip(asked, slots, strict=True)):
        free.acquire()
        began = time.perf_counter()

        def tell(event: Any, number: int = number, began: float = began) -> None:
            if event.is_last:
                took[number] = time.perf_counter() - began
                free.release()

        engine.submit(Prompt(tuple(tokens), slot, ANSWER, GREEDY), 600.0, tell)
    for _ in range(BATCH):
        free.acquire()
    return took


def peft_answers(model: Any, asked: Sequence[list[int]], names: Sequence[str], size: int) -> None:
    """Have all answered by transformers' ``generate``, ``size`` at once."""
    for start in range(0, len(asked), size):
        ids = torch.tensor(asked[start : start + size])
        own = list(names[start : start + size])
        if size == 1:
            model.set_adapter(own[0])
        options = {"adapter_names": own} if size > 1 else {}
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **options,
            )


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of them is."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def batches(quick: bool, threads: int, folder: Path) -> list[Figure]:
    """Measure requests a second, of ours and of PEFT's, interleaved."""
    torch.set_num_threads(threads)
    spec = make_base(folder, 256 if quick else 512, 4 if quick else 8)
    repeats, count = (2, 32) if quick else (5, 64)
    base = models.load(spec)
    asked = prompts(count)
    bank = Bank(base.backbone)
    slots = [
        bank.put(changes_of(base.backbone, adapter(spec, number)[1]))
        for number in range(max(COUNTS))
    ]
    many = Engine(Generator(base.backbone, base.tokenizer, bank, BATCH, 1 << 20), 4096)
    one = Engine(Generator(base.backbone, base.tokenizer, bank, 1, 1 << 20), 4096)
    many.start(), one.start()
    latencies: dict[str, list[float]] = {}

    def ours(name: str, engine: Engine, adapters: int) -> Callable[[], None]:
        def work() -> None:
            chosen = [slots[number % adapters] for number in range(count)]
            latencies.setdefault(name, []).extend(answered(engine, asked, chosen))

        return work

    ways = {f"mixed {n}": ours(f"mixed {n}", many, n) for n in COUNTS}
    ways["switching 16"] = ours("switching 16", one, 16)
    rates = measured(ways, count, repeats)
    many.close(), one.close()
    bank.close()
    rates |= peft_rates(base.backbone, spec, asked, repeats)
    setting = f"{'256 x 4' if quick else '512 x 8'} Llama, batch {BATCH}, {threads} thread(s)"
    figures = [
        Figure(f"requests/s, {name}", statistics.median(found), "1/s", None, "higher", "", setting)
        for name, found in rates.items()
    ]
    for name, found in latencies.items():
        for share in (0.5, 0.99):
            title = f"p{round(100 * share)}, {name}"
            value = quantile(found, share)
            figures.append(Figure(title, value, "s", None, "lower", "", setting))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    for name, over, goal, peer in (
        ("mixed 16 / one adapter", "mixed 1", 0.8, ""),
        ("mixed 16 / switching", "switching 16", 4.0, ""),
        ("mixed 16 / PEFT set_adapter", "PEFT set_adapter 16", 4.0, "peft"),
        ("mixed 16 / PEFT adapter_names", "PEFT adapter_names 16", None, "peft"),
    ):
        ratio = middle["mixed 16"] / middle[over]
        figures.append(Figure(name, ratio, "x", goal, "higher", peer, setting))
    return figures


def measured(
    ways: dict[str, Callable[[], None]], count: int, repeats: int
) -> dict[str, list[float]]:
    """Return requests a second of each way, ``repeats`` times, interleaved, after one of each."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            if turn:
                rates[name].append(count / (time.perf_counter() - began))
    return rates


def peft_rates(
    backbone: Any, spec: Any, asked: Sequence[list[int]], repeats: int
) -> dict[str, list[float]]:
    """Return requests a second of PEFT's two ways, of 16 adapters."""
    model = with_peft(backbone, spec, 16)
    names = [f"a{number % 16}" for number in range(len(asked))]
    found = measured(
        {
            "PEFT adapter_names 16": lambda: peft_answers(model, asked, names, BATCH),
            "PEFT set_adapter 16": lambda: peft_answers(model, asked, names, 1),
        },
        len(asked),
        repeats,
    )
    model.unload()
    return found


def moves(requests: int, flips: int, folder: Path) -> list[Figure]:
    """Count what is lost and mixed up over HTTP while an alias moves."""
    spec = make_base(folder / "small", 64, 2)
    workspace = open_workspace(folder / "home")
    versions = [publish(workspace, spec, "bot", seed) for seed in range(3)]
    pointing(workspace, versions[0])
    up, address = threading.Event(), []

    def listening(where: str) -> None:
        address.append(where)
        up.set()

    stop: list[Any] = []
    place = command.Place(port=0, device="cpu", poll_s=0.05)
    serving = threading.Thread(
        target=command.serve_aliases,
        args=(
            workspace,
            ["bot@production"],
            place,
            server.Limits(waiting=4096),
            ApiKeys(),
            listening,
        ),
        daemon=True,
    )
    with keep_server(stop):
        serving.start()
        up.wait(120)
        found = asyncio.run(load(address[0], requests, flips, workspace, versions))
        stop[0].should_exit = True
        serving.join(120)
    statuses, wrong, took, seconds = found
    setting = f"{requests} requests over HTTP, {flips} moves"
    lost = requests - statuses.count(200)
    return [
        Figure("lost", lost, "requests", 0, "lower", "", setting),
        Figure("neither old nor new", wrong, "requests", 0, "lower", "", setting),
        Figure("requests/s", requests / seconds, "1/s", None, "higher", "", setting),
        Figure("p50", quantile(took, 0.5), "s", None, "lower", "", setting),
        Figure("p99", quantile(took, 0.99), "s", None, "lower", "", setting),
    ]


def pointing(workspace: Any, version: str) -> None:
    """Point the alias at a version."""
    workspace.store.promote("bot", "production", version, who="benchmark", why="")


def keep_server(stop: list[Any]) -> Any:
    """Return a context in which the server that is started is put into ``stop``."""
    from unittest.mock import patch

    import uvicorn

    class Kept(uvicorn.Server):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            stop.append(self)

    return patch.object(uvicorn, "Server", Kept)


async def load(
    address: str, requests: int, flips: int, workspace: Any, versions: Sequence[str]
) -> tuple[list[int], int, list[float], float]:
    """Ask while the alias moves; return statuses, how many were wrong, latencies and seconds."""
    import httpx

    statuses: list[int] = []
    took: list[float] = []
    wrong, allowed = 0, {versions[0]}
    body = {"model": "bot", "prompt": "weave", "max_tokens": 4, "temperature": 0}
    left = iter(range(requests))
    # httpx closes what was silent for keepalive_expiry, now and then as it gives it to a request,
    # whose ReadError would be none of the server's; without it only the server closes connections
    limits = httpx.Limits(max_connections=64, keepalive_expiry=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as client:

        async def ask() -> None:
            nonlocal wrong
            for _ in left:
                may = set(allowed)
                began = time.perf_counter()
                try:
                    answer = await client.post("/v1/completions", json=body)
                except httpx.TransportError as error:  # cut off: lost, and the others go on
                    traceback.print_exception(error)
                    statuses.append(0)
                    continue
                took.append(time.perf_counter() - began)
                statuses.append(answer.status_code)
                wrong += answer.headers.get("weft-version") not in may | allowed

        async def move() -> None:
            for flip in range(1, flips + 1):
                while len(statuses) < flip * requests // (flips + 1):
                    await asyncio.sleep(0.005)
                old, new = versions[(flip - 1) % 3], versions[flip % 3]
                allowed.clear()
                allowed.update({old, new})
                await asyncio.to_thread(pointing, workspace, new)
                while await current(client) != new:  # from now on the old one would be wrong
                    await asyncio.sleep(0.005)
                allowed.discard(old)

        began = time.perf_counter()
        await asyncio.gather(move(), *(ask() for _ in range(64)))
        return statuses, wrong, took, time.perf_counter() - began


async def current(client: Any) -> str:
    """Return the version that the server says it answers with."""
    answer = await client.get("/readyz")
    return str(answer.json()["models"]["bot@production"]["version"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--moves-only", action="store_true")
    arguments = parser.parse_args()
    requests = arguments.requests or (400 if arguments.quick else 10_000)
    with tempfile.TemporaryDirectory() as name:
        found = []
        if not arguments.moves_only:
            found += batches(arguments.quick, arguments.threads, Path(name) / "base")
        found += moves(requests, 20, Path(name))
    show("serving", found, arguments.json)


if __name__ == "__main__":
    main()
