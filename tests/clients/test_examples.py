from clients.data import Example

CANARY = "zyzzyva-7731"  # stands for what a patient said


def test_an_example_does_not_show_its_text():
    example = Example(text=CANARY, text_pair=CANARY, label=1)
    assert repr(example) == "Example(label=1)"
    assert CANARY not in repr(Example(prompt=CANARY, completion=CANARY))
