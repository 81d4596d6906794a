"""The demo's model: shapes, size, causality, and the same sample for the same seed."""

import math

import torch

from shardstep.demo.gpt import GPT, GPTConfig, generate

TINY = GPTConfig(layers=2, width=16, heads=2, context=12)


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY)


def test_the_default_has_about_six_million_parameters() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert 6.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 6.6e6


def test_an_untrained_model_guesses_evenly() -> None:
    loss = tiny()(torch.randint(256, (3, 13)))
    assert loss.shape == ()
    assert abs(loss.item() - math.log(256)) < 0.1


def test_logits_are_asked_for_by_name() -> None:
    assert tiny()(torch.randint(256, (3, 12)), return_logits=True).shape == (3, 12, 256)


def test_no_position_sees_a_later_one() -> None:
    model = tiny()
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 6:] = 0
    before, after = (model(batch, return_logits=True) for batch in (tokens, changed))
    assert torch.equal(before[0, :6], after[0, :6])
    assert not torch.equal(before[0, 6:], after[0, 6:])


def test_dropout_is_off_in_eval_mode() -> None:
    model = GPT(GPTConfig(layers=1, width=16, heads=2, context=12, dropout=0.5))
    batch = torch.randint(256, (2, 13))
    assert model(batch) != model(batch)
    model.eval()
    assert model(batch) == model(batch)


def test_a_sample_continues_the_prompt_and_follows_the_seed() -> None:
    model = tiny()
    first, again, other = (generate(model, b"def ", 20, context=12, seed=seed) for seed in (1, 1, 2))
    assert first.startswith(b"def ")
    assert len(first) == 24
    assert first == again != other
