"""Generalised advantage estimation against numbers worked out by hand."""

import torch


def column(*numbers):
    return torch.tensor(numbers).unsqueeze(1)  # (T, 1)


def test_gae_with_a_lost_life_a_truncation_and_a_game_over_in_one_rollout(script):
    # gamma = lambda = 0.5; one environment, six steps: on, life lost, on, truncated, game over, on.
    rewards = column(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    values = column(1.0, 1.0, 2.0, 2.0, 4.0, 4.0)
    # A lost life and a game over: whatever follows must not count (99). The truncated game's true
    # final observation is worth 10; the game that follows it starts at values[4] = 4.
    next_values = column(1.0, 99.0, 2.0, 10.0, 99.0, 8.0)
    terminations = column(0.0, 1.0, 0.0, 0.0, 1.0, 0.0)
    dones = column(0.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    advantages, returns = script.compute_gae(rewards, values, next_values, terminations, dones, 0.5, 0.5)
    # delta: 1+.5-1=.5 | 2-1=1 | 3+1-2=2 | 4+5-2=7 | 5-4=1 | 6+4-4=6; trace decays by .25 unless done
    assert advantages.squeeze(1).tolist() == [0.5 + 0.25 * 1.0, 1.0, 2.0 + 0.25 * 7.0, 7.0, 1.0, 6.0]
    assert torch.equal(returns, advantages + values)


def test_gae_keeps_environments_apart(script):
    shape = (7, 3)
    rewards, values, next_values = torch.randn(3, *shape)
    terminations = (torch.rand(shape) < 0.2).float()
    dones = torch.maximum(terminations, (torch.rand(shape) < 0.2).float())
    together, _ = script.compute_gae(rewards, values, next_values, terminations, dones, 0.99, 0.95)
    for i in range(3):
        one = [x[:, i : i + 1] for x in (rewards, values, next_values, terminations, dones)]
        torch.testing.assert_close(script.compute_gae(*one, 0.99, 0.95)[0], together[:, i : i + 1])


def test_gae_with_lambda_one_is_the_discounted_return(script):
    rewards, values = torch.randn(5, 1), torch.randn(5, 1)
    next_values = torch.cat([values[1:], torch.tensor([[2.0]])])
    nothing_ends = torch.zeros(5, 1)
    _, returns = script.compute_gae(rewards, values, next_values, nothing_ends, nothing_ends, 0.9, 1.0)
    expected = sum(0.9**t * rewards[t] for t in range(5)) + 0.9**5 * 2.0
    torch.testing.assert_close(returns[0], expected)
