"""nanochat's size rules against the numbers its own code gives at 12 tokens a parameter."""

import pytest

from nanovl.optim.scaling import decay_factor, horizon_tokens, size_rules

# depth, hidden, N, tokens (billions), batch tokens, steps, lr factor, weight decay from 0.28
TABLE = [
    (8, 512, 41_943_232, 0.503, 262_144, 1920, 0.707, 0.520),
    (10, 640, 70_123_820, 0.841, 524_288, 1605, 1.0, 0.440),
    (12, 768, 110_100_912, 1.321, 524_288, 2520, 1.0, 0.280),
    (16, 1024, 234_881_792, 2.819, 524_288, 5376, 1.0, 0.131),
    (20, 1280, 435_160_240, 5.222, 1_048_576, 4980, 1.414, 0.100),
    (24, 1536, 729_810_624, 8.758, 1_048_576, 8352, 1.414, 0.060),
    (32, 2048, 1_677_724_672, 20.13, 2_097_152, 9600, 2.0, 0.037),
]


@pytest.mark.parametrize(("depth", "hidden", "n", "tokens", "batch", "steps", "lr", "decay"), TABLE)
def test_the_table(
    depth: int, hidden: int, n: int, tokens: float, batch: int, steps: int, lr: float, decay: float
) -> None:
    rules = size_rules(n, hidden, ratio=12)
    assert rules.tokens == 12 * n
    assert rules.tokens / 1e9 == pytest.approx(tokens, abs=5e-3)
    assert rules.batch_tokens == batch
    assert rules.steps == steps
    assert rules.batch_factor == pytest.approx(lr, abs=5e-4)
    assert 0.28 * rules.decay_factor == pytest.approx(decay, abs=6e-4)
    assert rules.width_factor == pytest.approx((depth / 12) ** -0.5)


@pytest.mark.parametrize(
    ("hidden", "n", "tokens", "steps"), [(256, 11_534_384, 0.138, 528), (384, 23_199_852, 0.278, 1062)]
)
def test_small_models_keep_the_decay_of_depth_8(hidden: int, n: int, tokens: float, steps: int) -> None:
    rules = size_rules(n, hidden, ratio=12)
    assert rules.tokens / 1e9 == pytest.approx(tokens, abs=5e-4)
    assert (rules.batch_tokens, rules.steps) == (262_144, steps)
    assert rules.batch_factor == pytest.approx(0.7071, abs=1e-4)
    assert 0.28 * rules.decay_factor == pytest.approx(0.5197, abs=1e-4)


def test_a_given_batch_overrules_the_rule_and_scales_with_it() -> None:
    rules = size_rules(110_100_912, 768, ratio=8, batch_tokens=131_072)
    assert rules.batch_tokens == 131_072
    assert rules.steps == 8 * 110_100_912 // 131_072
    assert rules.batch_factor == pytest.approx(0.5)
    assert rules.decay_factor == pytest.approx(0.5)
    assert decay_factor(1000, 131_072) == pytest.approx(0.5 * 2.62500, abs=1e-4)
    assert horizon_tokens(729_810_624, 8) == pytest.approx(5.838e9, rel=1e-4)
