"""What features tell: a linear probe of the state, and where attention goes.

    python benchmark/studies/probe.py RUN_DIR ... > probe.csv
    python benchmark/studies/probe.py RUN_DIR ... --attention-off > off.csv

Runs on Atari: every agent plays `games` games with its own actions. On all these observations together a ridge
regression reads the state of the game from each run's features, and, to compare with, from those of a network that
was never trained and from the pixels. The state comes from the emulator: lives, and of BeamRider, from its memory, the
own ship's horizontal position and the enemies left in the sector. The score is R² on games that the regression has not
seen: 1 if the state can be read off, 0 if no better than its mean. A fifth of the games choose the penalty, a fifth are
for the score.

Runs on vectors trained with `--distractors k`: the share of each layer's attention that the n true entries receive,
over the share of a uniform map; mean over all entries that pay. 1 is no preference, (n + k) / n all of it on the n.

With `--attention-off`, on Atari or vectors: each layer's gate |γ|, in percent, and attention entropy (1: uniform), and
what becomes of the same agent if attention is switched off in it, all γ = 0, on the observations of its own game: the
change of the features, in percent of their norm, and of the policy, KL(π ‖ π without attention) in thousandths of a
nat.
"""

import csv
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1, 2)]

import gymnasium as gym
import numpy as np
import torch
import tyro
from blind import load_run
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from run import fail

# What the emulator's memory tells. The one byte moves with LEFT and RIGHT; the other falls from 15 by 1 with each enemy
# shot, and is 255, one below 0, while the ship that ends a sector passes.
MEMORY = {
    "beam_rider": {"own position": lambda ram: ram[41], "enemies left in the sector": lambda ram: ram[84] % 255},
}
PENALTIES = 10.0 ** np.arange(-2, 6)


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders, all on Atari or all on vectors"""
    games: int = 5
    """games that each agent plays; at least 5 in all"""
    steps: int = 1000
    """agent steps per game at most"""
    every: int = 4
    """one of so many observations is kept: neighbours tell the same"""
    attention_off: bool = False
    """measure what attention does in the agents instead"""
    seed: int = 0
    """seed of the games and actions"""


class FireReset(gym.Wrapper):
    """Presses FIRE for one frame to start the game, as AtariVectorEnv does."""

    def reset(self, **options):
        self.env.reset(**options)
        obs, *_, info = self.env.step(self.env.unwrapped.get_action_meanings().index("FIRE"))
        return obs, info


def make_game(script, args) -> gym.Env:
    """One game that shows its emulator, seen as in the scripts' vector environment; without no-ops at its start."""
    emulator = script.env_protocol(args)["emulator"]
    kept = {name: emulator[name] for name in ("repeat_action_probability", "full_action_space")}
    game = gym.make(args.env_id, frameskip=1, **kept)
    if "FIRE" in game.unwrapped.get_action_meanings():
        game = FireReset(game)
    return FrameStackObservation(AtariPreprocessing(game, noop_max=0, frame_skip=4), 4, padding_type="zero")


@torch.inference_mode()
def play(script, args, leader, follower, settings: Args, seed: int) -> tuple[np.ndarray, list[dict[str, float]]]:
    """One game: observations (T, 4, 84, 84) uint8, and the state of each."""
    game = make_game(script, args)
    ale, memory = game.unwrapped.ale, MEMORY.get(script.env_protocol(args)["emulator"]["game"], {})
    torch.manual_seed(seed)
    obs, _ = game.reset(seed=seed)
    seen, states = [], []
    for step in range(settings.steps):
        if step % settings.every == 0:
            seen.append(obs)
            ram = ale.getRAM()
            states.append({"lives": ale.lives()} | {name: int(read(ram)) for name, read in memory.items()})
        action = script.action_distribution(follower(leader(torch.from_numpy(obs)[None]))[0]).sample().item()
        obs, _, terminated, truncated, _ = game.step(action)
        if terminated or truncated:
            break
    game.close()
    return np.stack(seen), states


def probe(features: np.ndarray, targets: np.ndarray, part: np.ndarray) -> list[float]:
    """R² (targets,) on part 2 of a ridge regression fitted to part 0, its penalty chosen on part 1.

    features (T, F), targets (T, S), part (T,) in {0, 1, 2}. NaN for a target that is constant on any part.
    """
    fit, choose, score = (part == k for k in range(3))
    features = features.astype(np.float64) - features[fit].mean(0)
    features /= np.maximum(features[fit].std(0), 1e-6 + 1e-3 * features[fit].std())
    centre = targets[fit].mean(0)
    kernel = features @ features[fit].T / features.shape[1]  # (T, fit): fewer samples than features
    values, vectors = np.linalg.eigh(kernel[fit])
    rotated = vectors.T @ (targets[fit] - centre)

    def r2(weights, rows):  # (S,)
        error = ((kernel[rows] @ weights + centre - targets[rows]) ** 2).sum(0)
        spread = ((targets[rows] - targets[rows].mean(0)) ** 2).sum(0)
        return np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1), np.nan)

    candidates = [vectors @ (rotated / (np.maximum(values, 0) + penalty)[:, None]) for penalty in PENALTIES]
    best = np.argmax(np.nan_to_num([r2(weights, choose) for weights in candidates], nan=-1), axis=0)  # (S,)
    scores = np.array([r2(weights, score) for weights in candidates])[best, np.arange(len(best))]
    known = np.all([np.ptp(targets[rows], axis=0) > 0 for rows in (fit, choose, score)], axis=0)
    return np.where(known, scores, np.nan).tolist()


@torch.inference_mode()
def probe_states(agents: dict, settings: Args) -> list[list[str]]:
    """Rows of the table: encoder, R² of each quantity."""
    observations, states = [], []
    for script, args, leader, follower in agents.values():
        for _ in range(settings.games):
            obs, state = play(script, args, leader, follower, settings, settings.seed + len(observations))
            observations.append(obs)
            states += state
    targets = np.array([list(state.values()) for state in states], dtype=np.float64)
    part = np.repeat([(0, 1, 0, 2, 0)[i % 5] for i in range(len(observations))], [len(obs) for obs in observations])
    obs = np.concatenate(observations)
    encoders = {str(run): leader for run, (_, _, leader, _) in agents.items()}
    for script, args, *_ in agents.values():
        torch.manual_seed(settings.seed)
        fresh = script.Leader(gym.spaces.Box(0, 255, obs.shape[1:], np.uint8), args)
        encoders.setdefault(f"{script.__name__}.py, not trained", fresh)
    encoders["pixels"] = lambda frames: frames.flatten(1) / 255
    rows = [["encoder", *(f"{name}, R²" for name in states[0])]]
    for name, encoder in encoders.items():
        features = torch.cat([encoder(frames) for frames in torch.from_numpy(obs).split(64)]).numpy()
        scores = probe(features, targets, part)
        rows.append([name, *("constant" if np.isnan(r2) else f"{r2:.2f}" for r2 in scores)])
    return rows


@torch.inference_mode()
def own_observations(script, args, leader, follower, settings: Args) -> torch.Tensor:
    """One of `settings.every` observations (M, ...) of `settings.steps` agent steps with the agent's own actions."""
    envs, obs = script.begin_games(dataclasses.replace(args, seed=settings.seed), 3, num_envs=1)
    seen = []
    for _ in range(settings.steps):
        seen.append(torch.from_numpy(obs.copy()))
        obs = envs.step(script.action_distribution(follower(leader(seen[-1]))[0]).sample().numpy())[0]
    envs.close()
    return torch.cat(seen[:: settings.every])


@torch.inference_mode()
def attention_at_work(agents: dict, settings: Args) -> list[list[str]]:
    """Rows of the table: run, |γ| and entropy of each layer, and what switching attention off does."""
    layers = [f"layer {k}" for k in (1, 2, 3)]
    rows = [["run", *(f"γ, %, {k}" for k in layers), *(f"entropy, {k}" for k in layers), "features, %", "policy, mnat"]]
    for run, (script, args, leader, follower) in agents.items():
        gates = [block.gate for block in getattr(leader, "blocks", []) if block is not None]
        if not gates or gates[0] is None:
            fail(f"{run} has no attention with a gate to switch off")
        obs = own_observations(script, args, leader, follower, settings)
        features, attention = leader(obs, num_rows=0)
        cells = [f"{100 * gate.abs().item():.1f}" for gate in gates]
        cells += [f"{script.perception_cost([weights], 'entropy').mean().item():.2f}" for weights in attention]
        for gate in gates:
            gate.zero_()
        without = leader(obs)
        policy, changed = (script.action_distribution(follower(x)[0]) for x in (features, without))
        cells.append(f"{100 * ((features - without).norm() / features.norm()).item():.1f}")
        cells.append(f"{1000 * torch.distributions.kl_divergence(policy, changed).mean().clamp_min(0).item():.1f}")
        rows.append([str(run), *cells])
    return rows


@torch.inference_mode()
def attention_on_truth(agents: dict, settings: Args) -> list[list[str]]:
    """Rows of the table: run, distractors, then each layer's preference for the true entries."""
    rows = [["run", "true entries", "distractors", "layer 1", "layer 2", "layer 3"]]
    for run, (script, args, leader, follower) in agents.items():
        if not args.distractors:
            fail(f"{run} was trained without --distractors; there is nothing to ignore")
        if not hasattr(leader, "blocks"):
            fail(f"{run} has no attention")
        attention = leader(own_observations(script, args, leader, follower, settings), num_rows=0)[1]
        received = [weights.sum(1).mean(0) for weights in attention]  # (n + k,) of each layer; 1: average
        true = len(received[0]) - args.distractors  # the distractors come last
        rows.append([str(run), true, args.distractors, *(f"{layer[:true].mean():.2f}" for layer in received)])
    return rows


def main(settings: Args) -> None:
    for name in ("games", "steps", "every"):
        if getattr(settings, name) < 1:
            fail(f"--{name} {getattr(settings, name)} is less than 1")
    if not settings.runs:
        fail("no run is given")
    if not 0 <= settings.seed < 2**32:
        fail(f"--seed {settings.seed} is not in [0, 2³²)")
    agents = {run: load_run(run) for run in settings.runs}
    atari = ["atari" in script.__name__ for script, *_ in agents.values()]
    if len(set(atari)) > 1:
        fail("some runs are on Atari, some on vectors; probe one kind at a time")
    if atari[0] and not settings.attention_off:
        if any(args.env_id.startswith("MinAtar/") for _, args, *_ in agents.values()):
            fail("what a MinAtar game holds is not read here; --attention-off works for it")
        if settings.games * len(agents) < 5:
            fail("fewer than 5 games in all: none would be left to score the probe on; raise --games")
        if len({args.env_id for _, args, *_ in agents.values()}) > 1:
            fail("the runs differ in --env-id; probe one game at a time")
        if any(args.observation_noise or args.distractors for _, args, *_ in agents.values()):
            fail("runs with --observation-noise or --distractors on Atari cannot be probed: the games here are clean")
    measure = attention_at_work if settings.attention_off else probe_states if atari[0] else attention_on_truth
    csv.writer(sys.stdout, lineterminator="\n").writerows(measure(agents, settings))


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
