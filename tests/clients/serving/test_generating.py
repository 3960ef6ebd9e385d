"""Answers that begin and end beside others are those that each adapter gives alone."""

import pytest
import torch
from transformers import GenerationConfig

from clients.serving.bank import BASE, Bank
from clients.serving.changes import Unservable, changes_of
from clients.serving.generating import Generator, Prompt
from clients.serving.sampling import Sampling, choose
from clients.serving.wording import Wording
from tests.clients.serving.conftest import attached

GREEDY = Sampling(temperature=0.0)
TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPTS = ("the cat sings", "a model learns the private data of a round", "dog", "thread rank")


@pytest.fixture
def bank(decoder):
    made = Bank(decoder.backbone)
    yield made
    made.close()


@pytest.fixture
def generator(decoder, bank):
    return Generator(decoder.backbone, decoder.tokenizer, bank, largest=4, cache_tokens=4096)


def ids_of(decoder, text):
    return tuple(decoder.tokenizer(text)["input_ids"])


def generated(decoder, model, prompt, most):
    """Return the tokens that transformers' own greedy ``generate`` gives after a prompt."""
    end = decoder.tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=most, do_sample=False, pad_token_id=end, eos_token_id=end
    )
    ids = torch.tensor([prompt])
    with torch.no_grad():
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
    return decoder.tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)


def run(generator, pieces, said):
    for key, piece in pieces:
        said.setdefault(key, []).append(piece)


def finished(generator, said):
    while generator.num_running:
        run(generator, generator.step(), said)
    return {key: "".join(piece.text for piece in pieces) for key, pieces in said.items()}


def test_answers_that_join_a_running_batch_are_those_of_generate(decoder, bank, generator):
    wanted, slots = [], []
    for seed, (kind, text) in enumerate(
        zip(("rank 2", "dora", "rslora", "rank 5"), PROMPTS, strict=True)
    ):
        adapter, model, tensors = attached(decoder.backbone, kind, seed, TARGETS)
        wanted.append(generated(decoder, model, ids_of(decoder, text), 8 + 3 * seed))
        adapter.detach(model)
        slots.append(bank.put(changes_of(decoder.backbone, tensors)))
    said = {}
    for key, text in enumerate(PROMPTS):  # each joins while those before are at work
        ask = Prompt(ids_of(decoder, text), slots[key], 8 + 3 * key, GREEDY)
        run(generator, generator.admit([(key, ask)]), said)
        for _ in range(2):
            run(generator, generator.step(), said)
    texts = finished(generator, said)
    assert [texts[key] for key in range(4)] == wanted
    assert len(set(wanted)) == 4
    assert [said[key][-1].finish for key in range(4)] == ["length"] * 4
    assert [said[key][-1].num_tokens for key in range(4)] == [8, 11, 14, 17]


def test_an_answer_does_not_depend_on_who_begins_or_is_cancelled_beside_it(decoder, generator):
    def prompt(text, seed):
        return Prompt(ids_of(decoder, text), BASE, 12, Sampling(0.9, 0.8, seed))

    alone = {}
    run(generator, generator.admit([(0, prompt(PROMPTS[0], 7))]), alone)
    wanted = finished(generator, alone)[0]
    said = {}
    others = [(key, prompt(text, key)) for key, text in enumerate(PROMPTS[1:], 1)]
    run(generator, generator.admit([*others, (0, prompt(PROMPTS[0], 7))]), said)
    run(generator, generator.step(), said)
    generator.cancel({1, 3})
    assert generator.num_running == 2
    assert finished(generator, said)[0] == wanted


def test_an_end_of_sequence_ends_an_answer_and_is_not_said(decoder, bank):
    end = decoder.tokenizer.eos_token_id
    head = decoder.backbone.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([end]), 1e4)
    )
    generator = Generator(decoder.backbone, decoder.tokenizer, bank, 2, 64)
    ((_, piece),) = generator.admit([(0, Prompt((5, 6), BASE, 9, GREEDY))])
    hook.remove()
    assert (piece.text, piece.finish, piece.num_tokens) == ("", "stop", 1)
    assert generator.num_running == 0


def test_a_stop_text_ends_an_answer_and_nothing_of_it_is_said(decoder, generator):
    said = {}
    run(generator, generator.admit([(0, Prompt((5, 6), BASE, 20, GREEDY))]), said)
    whole = finished(generator, said)[0]
    stop = whole[6:9]
    run(generator, generator.admit([(1, Prompt((5, 6), BASE, 20, GREEDY, (stop,)))]), said)
    text = finished(generator, said)[1]
    assert text == whole[: whole.index(stop)]
    assert said[1][-1].finish == "stop"


def test_log_probabilities_are_those_of_the_model(decoder, generator):
    ask = Prompt((5, 6, 7), BASE, 1, GREEDY, alternatives=3)
    ((_, piece),) = generator.admit([(0, ask)])
    with torch.no_grad():
        logits = decoder.backbone(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    values = torch.log_softmax(logits, -1).topk(3).values.tolist()
    assert [one.logprob for one in piece.alternatives] == pytest.approx(values, abs=1e-5)
    assert piece.token == piece.alternatives[0]


def test_more_than_the_cache_holds_does_not_fit_but_one_alone_always_does(generator):
    small, large = Prompt((1,), BASE, 99, GREEDY), Prompt((1,), BASE, 4096, GREEDY)
    assert generator.fits([], large)
    assert generator.fits([small] * 3, small)
    assert not generator.fits([small] * 4, small)
    assert not generator.fits([small], large)


def test_a_model_that_mixes_examples_is_refused(decoder, bank):
    head = decoder.backbone.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: output - output.mean())
    with pytest.raises(Unservable, match="something else for a sequence in a batch"):
        Generator(decoder.backbone, decoder.tokenizer, bank, 2, 64)
    hook.remove()


def test_tokens_are_drawn_by_their_probabilities_within_top_p():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    ways = [Sampling(1.0, 0.75, seed) for seed in range(2000)]
    logits = probabilities.log().repeat(len(ways), 1)
    drawn = choose(logits, ways, [way.source() for way in ways])
    share = drawn.bincount(minlength=4) / len(ways)
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0, 0]), atol=0.04, rtol=0)


def test_a_temperature_sharpens_and_zero_takes_the_likeliest():
    ways = [Sampling(0.5, 1.0, seed) for seed in range(2000)] + [GREEDY]
    logits = torch.tensor([1.0, 0.0]).repeat(len(ways), 1)
    drawn = choose(logits, ways, [way.source() for way in ways])
    assert float((drawn == 0).float().mean()) == pytest.approx(1 / (1 + torch.e**-2), abs=0.03)
    assert drawn[-1] == 0


@pytest.mark.parametrize("way", [Sampling(1e-42), Sampling(1.0, 1e-60), Sampling(1e-60, 1e-60)])
def test_the_coldest_and_the_narrowest_sampling_take_the_likeliest_and_harm_nobody(way):
    logits = torch.tensor([[1.0, 30.0, -2.0], [0.0, 0.0, 50.0], [float("nan")] * 3])
    ways = [way, Sampling(1.0), Sampling(1.0)]
    assert choose(logits, ways, [one.source() for one in ways])[:2].tolist() == [1, 2]


@pytest.mark.parametrize("text", ["déjà vu, 東京 🙂 done", "plain words"])
def test_what_is_said_in_pieces_is_the_text_in_whole_characters(decoder, text):
    ids = decoder.tokenizer(text)["input_ids"]
    wording = Wording(decoder.tokenizer, (5,))
    pieces = [wording.add(token) for token in ids]
    assert "".join(pieces) + wording.end() == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_may_become_a_stop_text_is_held_back_until_it_is_none(decoder):
    ids = decoder.tokenizer("ab<en<end>c")["input_ids"]
    wording = Wording(decoder.tokenizer, (), ("<end>",))
    said = [wording.add(token) for token in ids]
    assert wording.stopped
    assert "".join(said) == "ab<en"
    assert not any("<end" in "".join(said[:i]) for i in range(len(said)))
    other = Wording(decoder.tokenizer, (), ("<end>",))
    held = "".join(other.add(token) for token in decoder.tokenizer("ab<en")["input_ids"])
    assert held + other.end() == "ab<en"
