"""Orders and replies travel as canonical bytes, and nothing else is read back."""

import hashlib
import json
import math
import pickle
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from clients import orders, wire
from clients.assignment import (
    Assignment,
    Clipping,
    DataSpec,
    ModelSpec,
    NoiseShare,
    Past,
    PluginChoice,
    Privacy,
    Report,
    Shard,
)
from clients.evaluate import Evaluation
from clients.orders import (
    BadOrder,
    BadReply,
    Order,
    Packer,
    Refusal,
    Reply,
    Terms,
    pack_order,
    pack_reply,
    unpack_order,
    unpack_reply,
)
from clients.typed_json import canonical
from strategies.base import Broadcast, Update
from strategies.spends import ClientLevel, PrivacySpend

TERMS = Terms("fedsvd", "notes", "0.9.0", "1.41", 1_790_000_000.25)
TENSORS = {
    "q.lora_A.weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "q.lora_B.weight": torch.tensor([[0.1, -0.0], [math.inf, math.nan]], dtype=torch.bfloat16),
    "q.scaling": torch.tensor(2.0),
    "codes": torch.tensor([-128, 127], dtype=torch.int8),
    "chosen": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4, dtype=torch.float64),
}
ASKED = Assignment(
    action="consolidate",
    run="0123456789ab",
    client="clinic-7",
    round=3,
    base="f" * 64,
    model=ModelSpec(
        "org/model",
        "token-classification",
        revision="main",
        hash="a" * 64,
        labels=("cat", "dög"),
        pooling="cls",
        max_length=16,
        quantization="nf4",
        compute_dtype="bf16",
        gradient_checkpointing=True,
    ),
    adapter=PluginChoice("lora", {"r": 2, "layers": [0], "more": {"deep": [None, True, 0.5]}}),
    broadcast=Broadcast(
        TENSORS, r".*\.lora_B\..*", "head.*", {"m": torch.ones(2)}, {"e": torch.zeros(1)}
    ),
    data=DataSpec(
        "site:notes",
        {"text": "note"},
        Shard("column", 1, 3, 7, 0.25, "ward", "b2"),
        ("cat",),
        "patient",
        "train",
        0.1,
        "ward",
    ),
    optimizer=PluginChoice("sgd", {"lr": 0.1}),
    site="/home/coordinator/sites/clinic-7",
    underlay={"u": torch.ones(1, dtype=torch.uint8)},
    memory={"ewc/f": torch.ones(2, dtype=torch.float16)},
    num_examples=120,
    regularizers=(PluginChoice("ewc", {"weight": 1}), PluginChoice("proximal", {})),
    batch_size=4,
    steps=5,
    epochs=2,
    microbatch=8,
    labels=("cat",),
    head="personal",
    privacy=Privacy(
        1.1,
        0.5,
        0.01,
        "patient",
        7,
        Clipping("quantile", 0.02, 0.4, 0.3, 0.06),
        2,
        Report(2.0, True, 3),
    ),
    central=ClientLevel(0.5, 1.5, 4, 0.3),
    noise_share=NoiseShare(3, 9),
    seed=2**62,
    threads=2,
    device="cuda",
    public=True,
    uplink=(PluginChoice("top-k", {"share": 0.5}),),
    held={"tensors/x": "d" * 64},
    answer_tokens=9,
    past=Past("c" * 64, 5),
)
"""No field of it has its default, so that one that is forgotten shows."""

UPDATE = Update(
    "clinic-7",
    3,
    "f" * 64,
    {"q.lora_B.weight": torch.ones(2, 2)},
    12,
    {"loss": 0.1 + 0.2},
    {"ewc/f": torch.ones(1)},
    (PrivacySpend("gaussian", "example", "add-remove", {"steps": 3.0}),),
    "e" * 64,
)
EVALUATION = Evaluation("clinic-7", 3, 4, {"accuracy": 0.75}, {"cat": 1.0})
REFUSAL = Refusal("clinic-7", 3, "the noise is below this site's least", not_held=True)
NODE = {"weft": "0.9.0", "spends": [{"event": "e", "parameters": {"steps": 3.0}}], "seconds": 1.5}


def order(change=None, parts=None, asked=ASKED) -> Order:
    """Return an order with its header's JSON changed in place, or with other parts."""
    made = pack_order(asked, TERMS)
    document = json.loads(made.header)
    if change is not None:
        change(document)
    return Order(canonical(document), made.parts if parts is None else parts)


def asked_with(path, value):
    """Return an order in whose assignment one value is another; ... takes it out."""

    def change(document):
        *most, last = path.split(".")
        inner = document["assignment"]
        for step in most:
            inner = inner[step]
        inner.pop(last) if value is ... else inner.__setitem__(last, value)

    return order(change)


def same(ours, theirs) -> bool:
    """Return whether two values are equal, tensors bit for bit."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        raw = [t.reshape(-1).view(torch.uint8).tolist() for t in (ours, theirs)]
        return (ours.dtype, ours.shape, raw[0]) == (theirs.dtype, theirs.shape, raw[1])
    if is_dataclass(ours):
        return all(same(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    return bool(ours == theirs)


@pytest.mark.parametrize("name", [f.name for f in fields(Assignment) if f.name != "site"])
def test_every_field_of_an_assignment_comes_back_as_it_was(name):
    again, _ = unpack_order(pack_order(ASKED, TERMS))

    assert same(getattr(ASKED, name), getattr(again, name))


def test_no_field_of_the_assignment_that_is_looked_at_has_its_default():
    """A field that is left out on the way would otherwise not be missed."""

    def plain(value):
        for f in fields(value):
            own = getattr(value, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            default = {} if default is None and isinstance(own, dict) else default
            assert not same(own, default), f"{type(value).__name__}.{f.name}"
            if is_dataclass(own):
                plain(own)

    plain(ASKED)


def test_the_terms_come_back_and_the_folder_of_private_state_does_not():
    again, terms = unpack_order(pack_order(ASKED, TERMS))

    assert terms == TERMS
    assert again.site == ""


def test_an_assignment_has_the_same_digest_at_the_site():
    whole = replace(ASKED, held=None)

    assert unpack_order(pack_order(whole, TERMS))[0].digest() == whole.digest()


def test_the_same_assignment_is_the_same_bytes_however_its_tensors_lie():
    turned = {name: TENSORS[name] for name in reversed(TENSORS)}
    turned["q.lora_A.weight"] = turned["q.lora_A.weight"].T.contiguous().T
    sent = replace(ASKED.broadcast, tensors=turned)

    assert pack_order(replace(ASKED, broadcast=sent), TERMS) == pack_order(ASKED, TERMS)


def test_tensors_that_are_parts_of_one_another_travel_whole():
    one = torch.arange(6.0)
    sent = Broadcast({"all": one, "some": one[2:4], "other": one.reshape(2, 3).T})
    again, _ = unpack_order(pack_order(replace(ASKED, broadcast=sent), TERMS))

    assert same(dict(again.broadcast.tensors), sent.tensors)


def test_what_assignments_share_is_packed_once(monkeypatch):
    packed = []
    honest = orders._packed
    monkeypatch.setattr(orders, "_packed", lambda tensors: packed.append(1) or honest(tensors))
    packer = Packer()
    made = [pack_order(replace(ASKED, client=f"c-{n}"), TERMS, packer) for n in range(4)]

    assert len(packed) == 5  # tensors, mask, extra, underlay, memory
    assert all(made[0].parts[name] is one.parts[name] for one in made for name in one.parts)
    assert len({one.header for one in made}) == 4


def test_no_path_of_the_coordinator_is_in_an_order(tmp_path):
    (tmp_path / "model").mkdir()
    local = replace(ASKED.model, id=str(tmp_path / "model"))
    made = pack_order(replace(ASKED, model=local, site=str(tmp_path)), TERMS)

    assert str(tmp_path).encode() not in made.header
    assert unpack_order(made)[0].model == replace(ASKED.model, id="")


@pytest.mark.parametrize("uri", ["jsonl:/data/x.jsonl", "none:", "several:site:a;site:b", "hf:x"])
def test_an_order_names_data_as_the_site_does_and_never_by_a_place(uri):
    said = "an order names data as the site does, site:NAME"
    with pytest.raises(ValueError, match=said):
        pack_order(replace(ASKED, data=DataSpec(uri)), TERMS)
    with pytest.raises(BadOrder, match=said):
        unpack_order(asked_with("data.uri", uri))


def test_an_order_names_its_base_model_by_its_hash():
    with pytest.raises(ValueError, match="names its base model by the sha256 of the weights"):
        pack_order(replace(ASKED, model=replace(ASKED.model, hash="")), TERMS)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("action", "delete", "assignment.action must be one of init, train"),
        ("action", ["train"], "assignment.action must be one of"),
        ("client", "../../etc/cron.d/x", "its client cannot be called '../../etc/cron.d/x'"),
        ("client", 7, "assignment.client must be text, got 7"),
        ("client", "a" * 129, "its client cannot be called"),
        ("run", "", "its run cannot be called ''"),
        ("base", "a/b", "its base is no version's id"),
        ("past.update", "../key", "what it kept is not named by a sha256"),
        ("site", "/home/site", "it names a folder of the site"),
        ("model.id", "/models/x", "its model is a folder"),
        ("round", True, "assignment.round must be a whole number, got True"),
        ("round", 1.0, "assignment.round must be a whole number, got 1.0"),
        ("round", -1, "round must be >= 0 and <= 2"),
        ("round", 2**63, "round is a number beyond"),
        ("seed", -(10**400), "seed is a number beyond"),
        ("threads", 10**9, "threads must be >= 1 and <= 1024"),
        ("batch_size", 0, "batch_size must be >= 1, got 0"),
        ("privacy.noise_multiplier", 0, "privacy.noise_multiplier must be > 0 and <= 1"),
        ("privacy.noise_multiplier", -1.5, "privacy.noise_multiplier must be > 0"),
        ("privacy.sample_rate", 1.5, "privacy.sample_rate must be > 0 and <= 1, got 1.5"),
        ("privacy.max_grad_norm", "1", "privacy.max_grad_norm must be a number, got '1'"),
        ("privacy.clipping.share", 1.0, "privacy.clipping.share must be > 0 and < 1"),
        ("privacy", [], "assignment.privacy must be an object"),
        ("adapter", "lora", "assignment.adapter must be an object"),
        ("adapter.name", 5, "assignment.adapter.name must be text"),
        ("adapter.options", [1], "assignment.adapter.options must be an object"),
        ("regularizers", {"name": "ewc"}, "assignment.regularizers must be a list"),
        ("held", {"a": 1}, "assignment.held.a must be text"),
        ("labels", "cat", "assignment.labels must be a list"),
        ("public", 1, "assignment.public must be true or false"),
        ("hidden", "x", r"assignment.hidden is not known here \(it was made by weft 0.9.0\)"),
        ("epochs", ..., r"assignment.epochs is missing \(it was made by weft 0.9.0\)"),
        ("broadcast.trainable", "(", "'\\(' is not taken: it is no regular expression"),
        ("broadcast.personal", "(.*)*x", "is not taken: it repeats what is in parentheses"),
        ("adapter.options.target_modules", ["q", "(a|a)+"], "it repeats what is in parentheses"),
        ("adapter.options.rank_pattern", {".*.*.*.*.*": 4}, "more than 3 times in a row"),
        ("privacy.max_grad_norm", 1e-30, "privacy.max_grad_norm must be >= 1e-09 and <= 1e"),
        ("privacy.clipping.stability", 1e-30, "privacy.clipping.stability must be >= 1e-09"),
        ("round", 2**31, "round must be >= 0 and <= 2"),
        ("broadcast.tensors", "../x", "a part is not named by a sha256"),
        ("broadcast.tensors", "0" * 64, "part 000000000000 of its tensors is missing"),
        ("broadcast.tensors", {}, "assignment.broadcast.tensors must be text"),
        ("broadcast.mask", "", "it has a part that it does not name"),
        ("adapter.options.r", {"a": {"b": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}}, "nested more than 16"),
        ("adapter.name", "\ud800", "is broken text"),
    ],
)
def test_an_order_that_asks_for_what_cannot_be_is_refused_by_a_sentence(path, value, said):
    with pytest.raises(BadOrder, match=f"^the order cannot be used: .*{said}"):
        unpack_order(asked_with(path, value))


def test_terms_that_cannot_be_printed_are_refused():
    with pytest.raises(BadOrder, match="its terms cannot be printed"):
        unpack_order(order(lambda d: d["terms"].update(run_name="\x1b[2J")))


HEADER = pack_order(ASKED, TERMS).header


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"a":' * 50_000,
        b"[" * 900 + b"]" * 900,
        b" " + HEADER,
        HEADER + b"\n",
        HEADER[:-1],
        HEADER.replace(b'"round":3', b'"round":3,"round":3'),
        HEADER.replace(b'"epochs":2', b'"epochs":2e0'),
        HEADER.replace(b'"epochs":2', b'"epochs":NaN'),
        HEADER.replace(b'"epochs":2', b'"epochs":1e999'),
        HEADER.replace(b'"seed":4611686018427387904', b'"seed":' + b"9" * 5000),
        HEADER.replace(b"weft-order-1", b"weft-order-9"),
        HEADER.replace(b'"terms"', b'"turns"'),
        b'{"a":"' + b"x" * orders.MOST_HEADER_BYTES + b'"}',
    ],
    ids=lambda header: f"{header[:24]!r}-{len(header)}",
)
def test_a_header_that_is_no_order_is_refused(header):
    with pytest.raises(BadOrder, match=r"^the order cannot be used: "):
        unpack_order(Order(header, pack_order(ASKED, TERMS).parts))


def test_a_part_that_is_another_than_it_says_is_refused():
    parts = pack_order(ASKED, TERMS).parts
    name = next(iter(parts))
    for data, said in [(parts[name][:-1], "is not what it was"), (None, "is missing")]:
        others = {k: v for k, v in parts.items() if k != name}
        with pytest.raises(BadOrder, match=said):
            unpack_order(order(parts=others if data is None else others | {name: data}))
    with pytest.raises(BadOrder, match="has a part that it does not name"):
        unpack_order(order(parts={**parts, "0" * 64: b""}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        pickle.dumps(TENSORS),
        save({"x": torch.ones(4)})[:-1],
        (2).to_bytes(8, "little") + b"{}x",
        save({"x": torch.ones(4)}).replace(b"F32", b"Q32"),
        save({"x": torch.ones(4)}).replace(b"[4]", b"[9]"),
    ],
    ids=["nothing", "noise", "pickle", "cut-off", "longer", "no-type", "no-shape"],
)
def test_a_part_that_holds_no_tensors_is_refused_and_never_run(data):
    name = hashlib.sha256(data).hexdigest()
    made = asked_with("broadcast.tensors", name)
    parts = {k: v for k, v in made.parts.items() if k.encode() in made.header}
    with pytest.raises(BadOrder, match=f"part {name[:12]} holds no tensors"):
        unpack_order(Order(made.header, parts | {name: data}))


def test_an_order_with_more_bytes_than_any_site_takes_is_refused(monkeypatch):
    monkeypatch.setattr(orders, "MOST_PART_BYTES", 10)

    with pytest.raises(BadOrder, match="bytes, and too many"):
        unpack_order(order())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_orders_are_refused_and_nothing_else_happens(data):
    made = order()
    header, parts = bytearray(made.header), dict(made.parts)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(header) - 1))
        header[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        again, _ = unpack_order(Order(bytes(header), parts))
    except BadOrder as error:
        assert str(error).startswith("the order cannot be used: ")  # noqa: PT017
    else:
        assert again.client  # letters of a name, digits of a number: it is another order


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(field=st.sampled_from([f.name for f in fields(Assignment)]), value=JSON)
def test_whatever_stands_in_a_field_the_order_is_read_or_refused(field, value):
    document = json.loads(HEADER)
    document["assignment"][field] = value
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    try:
        unpack_order(Order(text, pack_order(ASKED, TERMS).parts))
    except BadOrder as error:
        assert str(error).startswith("the order cannot be used: ")  # noqa: PT017


@pytest.mark.parametrize("result", [UPDATE, EVALUATION, REFUSAL], ids=["update", "score", "no"])
def test_a_reply_comes_back_as_it_was(result):
    again = unpack_reply(pack_reply(Reply(result, NODE)))

    assert same(result, again.result)
    assert same(NODE, again.node)


def test_an_update_in_a_reply_is_the_bytes_that_the_site_keeps():
    assert pack_reply(Reply(UPDATE, NODE)).endswith(wire.pack(UPDATE))


def test_a_reason_travels_as_one_line_that_can_be_printed():
    said = Refusal("a", 1, "no\n  such\x1b[2J \u202etask " + "x" * 5000)
    result = unpack_reply(pack_reply(Reply(said))).result

    assert result.reason.startswith("no such[2J task xxx")
    assert len(result.reason) == 2000


@pytest.mark.parametrize(
    "result",
    [replace(EVALUATION, metrics={"loss": math.nan}), replace(UPDATE, metrics={"loss": math.inf})],
    ids=["score", "update"],
)
def test_a_number_that_is_not_finite_is_not_sent(result):
    with pytest.raises(BadReply, match="the reply of 'clinic-7' cannot be sent: "):
        pack_reply(Reply(result))


def reply(body=b"", **changes) -> bytes:
    """Return a refusal's bytes with another header, and what lies behind it."""
    document = json.loads(pack_reply(Reply(REFUSAL, NODE))[8:])
    text = json.dumps(document | changes, sort_keys=True, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + body


SAID = json.loads(reply()[8:])["result"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        b"\x00" * 8,
        pickle.dumps(UPDATE),
        wire.pack(UPDATE),
        pack_reply(Reply(UPDATE))[:-1],
        pack_reply(Reply(UPDATE)) + b"x",
        pack_reply(Reply(EVALUATION))[:-1],
        reply(b"x"),
        reply(kind="update"),
        reply(wire.pack(UPDATE), kind="update"),
        pack_reply(Reply(replace(UPDATE, fingerprint="x" * 64))),
        pack_reply(Reply(replace(UPDATE, metrics={"\x1b[2J": 1.0}))),
        pack_reply(Reply(replace(UPDATE, metrics={f"m{i}": 1.0 for i in range(10_001)}))),
        pack_reply(Reply(replace(EVALUATION, label_accuracy={"x" * 201: 1.0}))),
        pack_reply(Reply(replace(EVALUATION, num_examples=-1))),
        reply(kind="deletion"),
        reply(kind=["update"]),
        reply(kind="evaluation"),
        reply(format="weft-reply-2"),
        reply(node=[]),
        reply(node={"seconds": math.nan}),
        reply(node={"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}),
        reply(result=None),
        reply(result={**SAID, "round": "3"}),
        reply(result={**SAID, "reason": "\x1b[2J"}),
        reply(result={**SAID, "reason": "x" * 2001}),
        reply(result={**SAID, "more": 1}),
    ],
    ids=lambda data: f"{data[8:40]!r}-{len(data)}",
)
def test_bytes_that_are_no_reply_are_refused_by_a_sentence(data):
    with pytest.raises(BadReply, match=r"^the reply cannot be used: "):
        unpack_reply(data)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_replies_are_refused_and_nothing_else_happens(data):
    made = bytearray(pack_reply(Reply(data.draw(st.sampled_from([UPDATE, EVALUATION])), NODE)))
    place = data.draw(st.integers(0, len(made) - 1))
    made[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        unpack_reply(bytes(made))
    except BadReply as error:
        assert str(error).startswith("the reply cannot be used: ")  # noqa: PT017
