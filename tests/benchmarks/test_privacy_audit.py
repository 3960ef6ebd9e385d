"""What the benchmark of audits attacks; the attacks themselves are tested with the audit."""

import privacy_audit
import pytest

from clients import gradients
from clients.assignment import Clipping
from orchestrator.config import parse_config
from strategies.spends import ClientLevel


@pytest.mark.parametrize("setting", privacy_audit.SETTINGS, ids=lambda s: f"{s.name}-{s.epsilon}")
def test_every_claim_is_one_that_a_run_can_make_without_sampling(setting, tmp_path):
    config = parse_config(setting.document(tmp_path / "rows.jsonl"))
    assert config.privacy.epsilon == setting.epsilon <= 3
    assert (config.client_level is not None) == setting.of_clients
    assert config.batch_size > 4 * privacy_audit.CLIENTS
    assert privacy_audit.Attack().canaries == 1000


def test_the_noise_of_examples_and_of_clients_is_a_quarter_and_then_whole_again():
    terms, flat = ClientLevel(0.5, 2.0, 4), Clipping()
    for _ in range(2):
        with privacy_audit.too_little_noise():
            assert gradients.gradient_noise(flat, 2.0) == 0.5
            assert terms.sum_std == 0.25
            assert terms.spend.parameters["noise_multiplier"] == 2.0
        assert gradients.gradient_noise(flat, 2.0) == 2.0
        assert terms.sum_std == 1.0
