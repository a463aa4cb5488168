"""A visual task small enough to learn in half a minute: where a bright patch lies tells the right action."""

import gymnasium as gym
import numpy as np


class PatchEnvs(gym.vector.VectorEnv):
    """N games of 16 steps on 84x84 frames. Each step shows an 8x8 patch in one of four quadrants.

    The action that names the quadrant earns 1, any other 0: the optimum is 16, chance is 4. The
    patch jitters within its quadrant, so that only *where* it is matters, and the other three
    frames of the stack are noise.
    """

    length = 16
    optimum = 16.0

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.single_action_space = gym.spaces.Discrete(4)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        return self._draw(), {}

    def _draw(self):
        self.quadrant = self.rng.integers(4, size=self.num_envs)
        obs = self.rng.integers(0, 40, size=(self.num_envs, 4, 84, 84), dtype=np.uint8)
        offsets = self.rng.integers(2, 32, size=(self.num_envs, 2))
        for i, (quadrant, (y, x)) in enumerate(zip(self.quadrant, offsets)):
            y, x = y + 42 * (quadrant // 2), x + 42 * (quadrant % 2)
            obs[i, -1, y : y + 8, x : x + 8] = 255
        return obs

    def step(self, actions):
        rewards = (actions == self.quadrant).astype(np.float32)
        self.returns += rewards
        self.lengths += 1
        ended = self.lengths == self.length
        obs, info = self._draw(), {}
        if ended.any():
            info = {"episode": {"r": self.returns.copy(), "l": self.lengths.copy()}, "_episode": ended}
            self.returns[ended], self.lengths[ended] = 0, 0
        return obs, rewards, ended, np.zeros(self.num_envs, dtype=bool), info
