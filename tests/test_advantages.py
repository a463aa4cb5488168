"""Generalised advantage estimation against numbers worked out by hand."""

import torch


def columns(*numbers):
    """A first environment, and a second one with other numbers: they must stay apart. (T, 2)"""
    first = torch.tensor(numbers)
    return torch.stack([first, first.flip(0)], 1)


def test_gae_with_a_lost_life_a_truncation_and_a_game_over_in_one_rollout(script):
    # gamma = lambda = 0.5; six steps: on, life lost, on, truncated, game over, on.
    rewards = columns(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    values = columns(1.0, 1.0, 2.0, 2.0, 4.0, 4.0)
    # A lost life and a game over: whatever follows must not count (99). The truncated game's true
    # final observation is worth 10; the game that follows it starts at values[4] = 4.
    next_values = columns(1.0, 99.0, 2.0, 10.0, 99.0, 8.0)
    terminations = columns(0.0, 1.0, 0.0, 0.0, 1.0, 0.0)
    dones = columns(0.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    advantages, returns = script.compute_gae(rewards, values, next_values, terminations, dones, 0.5, 0.5)
    # delta: 1+.5-1=.5 | 2-1=1 | 3+1-2=2 | 4+5-2=7 | 5-4=1 | 6+4-4=6; trace decays by .25 unless done
    assert advantages[:, 0].tolist() == [0.5 + 0.25 * 1.0, 1.0, 2.0 + 0.25 * 7.0, 7.0, 1.0, 6.0]
    # The other way round: on, game over, truncated, on (to the lost life), life lost, on.
    assert advantages[:, 1].tolist() == [6.0 + 0.25 * 1.0, 1.0, 7.0, 2.0 + 0.25 * 1.0, 1.0, 0.5]
    assert torch.equal(returns, advantages + values)


def test_gae_with_lambda_one_is_the_discounted_return(script):
    rewards, values, nothing_ends = torch.randn(5, 1), torch.randn(5, 1), torch.zeros(5, 1)
    next_values = torch.cat([values[1:], torch.tensor([[2.0]])])
    _, returns = script.compute_gae(rewards, values, next_values, nothing_ends, nothing_ends, 0.9, 1.0)
    expected = sum(0.9**t * rewards[t] for t in range(5)) + 0.9**5 * 2.0
    torch.testing.assert_close(returns[0], expected)
