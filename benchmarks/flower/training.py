"""A Flower client that trains, with the loop of ../_plain_loop.py; its actor keeps the model."""

import os
from functools import lru_cache

from _plain_loop import PlainLoop
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@lru_cache(maxsize=1)
def loaded(job: str) -> PlainLoop:
    """Return the base model, the adapter and the data; loaded once an actor."""
    return PlainLoop(job)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client for one round."""
    loop = loaded(os.environ["BENCHMARK_JOB"])
    part = int(context.node_config["partition-id"])
    round_ = int(message.content["config"]["server-round"])
    tensors, loss, count = loop.train(message.content["arrays"].to_torch_state_dict(), part, round_)
    metrics = MetricRecord({"num-examples": count, "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(tensors), "metrics": metrics})
    return Message(content, reply_to=message)
