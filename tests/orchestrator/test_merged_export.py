"""A version goes out as a whole model, with its manifest; what cannot is refused by name."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator import service
from orchestrator.manifest import check_manifest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

IDS = torch.tensor([[2, 9, 11, 40, 3]])


@pytest.fixture
def outside(tiny_decoder, tmp_path):
    """Make a folder as somebody would who has never heard of weft."""

    def make(config):
        torch.manual_seed(0)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_decoder), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
            logits = model.eval()(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "outside")
        return tmp_path / "outside", logits

    return make


def test_a_version_in_pefts_own_format_is_merged_signed_and_verified(
    home, outside, ok, read, tmp_path
):
    folder, logits = outside(peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    made = service.import_adapter(home, folder, "bot")
    ok("keys", "new", "alice")
    whole = tmp_path / "whole"
    arguments = ("--merge-into-base", "--dtype", "fp32", "--sign", "alice")
    merged = read("export", "bot", whole, *arguments)["merged"]
    assert merged["dtype"] == "fp32"
    assert merged["error"] < merged["tolerance"] == 1e-4 < merged["effect"]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(whole).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-4)
    assert json.loads((whole / "weft.json").read_text())["merged"] == merged
    assert f"is version {made.version}" in ok("verify", whole)
    checked = check_manifest(whole)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(checked.facts["files"])
    with (whole / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "model.safetensors was altered" in check_manifest(whole).problems[0]


def test_what_weft_trained_is_merged_with_all_that_lies_underneath(home, tiny, tmp_path):
    service.launch(home, tiny())
    service.launch(home, tiny(name="task-2", start_from="task-1", start="stack"))
    made = service.export(home, "task-2", tmp_path / "whole", to=service.IntoBase("fp32"))
    assert made.merged["error"] < 1e-5 < made.merged["effect"]
    names = {path.name for path in made.files}
    assert {"head.safetensors", "model.safetensors", "weft.json"} < names
    assert "adapter_model.safetensors" not in names


def test_what_is_no_matrix_is_refused_by_name_and_leaves_nothing(
    home, outside, refused, tmp_path, capsys
):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    folder, _ = outside(config)
    service.import_adapter(home, folder, "bot")
    capsys.readouterr()  # transformers' bars, of making the folder
    said = refused("export", "bot", tmp_path / "whole", "--merge-into-base")
    assert said == (
        "prompt_tuning cannot be merged into the base model: it changes what the model is given, "
        "and no weight; export it without --merge-into-base"
    )
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--merge-into-base", "--as", "lora"), "choose one"),
        (("--dtype", "fp32"), "are for --merge-into-base"),
        (("--dequantize",), "are for --merge-into-base"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(weft, tmp_path, options, message):
    code, _, err = weft("export", "bot", tmp_path / "whole", *options)
    assert code == 2
    assert message in err
