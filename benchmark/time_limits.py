"""MuJoCo's tasks with their time limit told as an end, to see what bootstrapping at time limits is worth.

    python ppo_continuous_baseline.py --env-id benchmark.time_limits:HalfCheetahLimitEnds-v4

The scripts value the observation at which a time limit cuts an episode (Pardo et al. 2018, arXiv 1712.00378). On these
tasks they cannot: the limit looks like a termination, after which nothing follows, and that is how CleanRL's
ppo_continuous_action.py treats each. Importing this module registers the ids.
"""

import gymnasium as gym


class LimitEnds(gym.Wrapper):
    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, False, info


def make(task: str, **kwargs) -> gym.Env:
    return LimitEnds(gym.make(task, **kwargs))


for name in ("HalfCheetah", "Hopper", "Walker2d", "InvertedPendulum"):
    for version in ("v4", "v5"):
        gym.register(f"{name}LimitEnds-{version}", make, kwargs={"task": f"{name}-{version}"})
