"""What an encoder's features tell: a linear probe of the game's state, and whether attention finds what is true.

    python benchmark/probe.py RUN_DIR ...
    python benchmark/probe.py RUN_DIR ... --attention-off

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

Runs called <task>__<arm>__<seed>, as run.py calls them, make one row: mean ± standard deviation over their seeds.
"""

import csv
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium as gym
import numpy as np
import torch
import tyro
from collect import fail, render
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from watch import is_atari, load_run

# What the emulator's memory tells. The one byte moves with LEFT and RIGHT; the other falls from 15 by 1 with each enemy
# shot, and is 255, one below 0, while the ship that ends a sector passes.
MEMORY = {
    "beam_rider": {"own position": lambda ram: ram[41], "enemies left in the sector": lambda ram: ram[84] % 255},
}
CONSTANT = "constant"  # a quantity that did not vary, in place of its R²
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
    output: Path | None = None
    """CSV to write as well, a row per run; plot.py puts benchmark/results/probe*.csv into the documents"""


class FireReset(gym.Wrapper):
    """Presses FIRE for one frame to start the game, as AtariVectorEnv does."""

    def reset(self, **options):
        self.env.reset(**options)
        obs, *_, info = self.env.step(self.env.unwrapped.get_action_meanings().index("FIRE"))
        return obs, info


def make_game(script, args) -> gym.Env:
    """One game that shows its emulator, seen as in the scripts' vector environment; without no-ops at its start."""
    import ale_py

    gym.register_envs(ale_py)
    protocol = script.env_protocol(args)
    sticky, actions = protocol["repeat_action_probability"], protocol["full_action_space"]
    game = gym.make(protocol["env_id"], frameskip=1, repeat_action_probability=sticky, full_action_space=actions)
    if "FIRE" in game.unwrapped.get_action_meanings():
        game = FireReset(game)
    game = AtariPreprocessing(game, noop_max=0, frame_skip=protocol["frame_skip"])
    return FrameStackObservation(game, 4, padding_type="zero")


def play(script, args, leader, follower, settings: Args, seed: int) -> tuple[np.ndarray, list[dict[str, float]]]:
    """One game: observations (T, 4, 84, 84) uint8, and the state of each."""
    game = make_game(script, args)
    ale, memory = game.unwrapped.ale, MEMORY.get(script.env_protocol(args)["game"], {})
    torch.manual_seed(seed)
    obs, _ = game.reset(seed=seed)
    seen, states = [], []
    for step in range(settings.steps):
        if step % settings.every == 0:
            seen.append(obs)
            ram = ale.getRAM()
            states.append({"lives": ale.lives()} | {name: int(read(ram)) for name, read in memory.items()})
        with torch.inference_mode():
            action = script.action_distribution(follower(leader(torch.from_numpy(obs)[None]))[0]).sample().item()
        obs, _, terminated, truncated, _ = game.step(action)
        if terminated or truncated:
            break
    game.close()
    return np.stack(seen), states


def features_of(leader, obs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return torch.cat([leader(torch.from_numpy(part)) for part in np.array_split(obs, -(-len(obs) // 64))]).numpy()


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


def probe_states(agents: dict, settings: Args) -> list[list[str]]:
    """Rows of the table: encoder, R² of each quantity."""
    observations, states, games = [], [], []
    for script, args, leader, follower in agents.values():
        for _ in range(settings.games):
            obs, state = play(script, args, leader, follower, settings, settings.seed + len(games))
            observations.append(obs)
            states += state
            games.append(len(obs))
    names = list(states[0])
    targets = np.array([list(state.values()) for state in states], dtype=np.float64)
    parts = np.array([(0, 1, 0, 2, 0)[i % 5] for i in range(len(games))])
    part, obs = np.repeat(parts, games), np.concatenate(observations)
    encoders = {str(run): leader for run, (_, _, leader, _) in agents.items()}
    for script, args, *_ in agents.values():
        torch.manual_seed(settings.seed)
        fresh = script.Leader(gym.spaces.Box(0, 255, obs.shape[1:], np.uint8), args)
        encoders.setdefault(f"{script.__name__}.py, not trained", fresh)
    rows = [["encoder", *(f"{name}, R²" for name in names)]]
    for name, leader in encoders.items():
        rows.append([name, *map(show, probe(features_of(leader, obs), targets, part))])
    rows.append(["pixels", *map(show, probe(obs.reshape(len(obs), -1) / 255, targets, part))])
    return rows


def show(r2: float) -> str:
    return CONSTANT if np.isnan(r2) else f"{r2:.2f}"


@torch.inference_mode()
def own_observations(script, args, leader, follower, settings: Args) -> torch.Tensor:
    """One of `settings.every` observations (M, ...) of `settings.steps` agent steps with the agent's own actions."""
    envs = script.make_envs(args)
    torch.manual_seed(settings.seed)
    obs, _ = envs.reset(seed=script.env_seeds(settings.seed, 2, num_envs=1))
    seen = []
    for _ in range(settings.steps):
        seen.append(torch.from_numpy(obs.copy()))
        obs = envs.step(script.sample(script.action_distribution(follower(leader(seen[-1]))[0])).numpy())[0]
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
        cells += [f"{script.perception_cost([rows], 'entropy').mean().item():.2f}" for rows in attention]
        for gate in gates:
            gate.zero_()
        without = leader(obs)
        policy, changed = (script.action_distribution(follower(x)[0]) for x in (features, without))
        cells.append(f"{100 * ((features - without).norm() / features.norm()).item():.1f}")
        cells.append(f"{1000 * torch.distributions.kl_divergence(policy, changed).mean().clamp_min(0).item():.1f}")
        rows.append([str(run), *cells])
    return rows


def attention_on_truth(agents: dict, settings: Args) -> list[list[str]]:
    """Rows of the table: run, distractors, then each layer's preference for the true entries."""
    rows = [["run", "true entries", "distractors", "layer 1", "layer 2", "layer 3"]]
    for run, (script, args, leader, follower) in agents.items():
        if not args.distractors:
            fail(f"{run} was trained without --distractors; there is nothing to ignore")
        obs = own_observations(script, args, leader, follower, settings)
        received = [layer.mean(0) for layer in leader.attention_received(obs)]  # 1: average
        true = obs.shape[-1] - args.distractors
        cells = [f"{layer[:true].mean():.2f}" for layer in received] or ["no attention"] * 3
        rows.append([str(run), str(true), str(args.distractors), *cells])
    return rows


def without_seed(name: str) -> str:
    """Of a run folder as run.py calls it, <task>__<arm>; any other name as it is."""
    *start, seed = name.split("__")
    return "__".join(start) if len(start) == 2 and seed.isdigit() else name


def over_seeds(rows: list[list[str]]) -> list[list[str]]:
    """The same table, with one row for all runs that differ in their seed alone."""
    head, *rows = rows
    groups = {}
    for name, *cells in rows:
        groups.setdefault(without_seed(name), []).append(cells)
    if len(groups) == len(rows):
        return [head, *rows]
    table = [[name, str(len(group)), *map(mean_cell, zip(*group))] for name, group in groups.items()]
    return [[head[0], "runs", *head[1:]], *table]


def mean_cell(cells: tuple[str, ...]) -> str:
    """ "1.00 ± 0.10" of several numbers, with as many digits; what all have in common, as it stands."""
    if len(set(cells)) == 1:
        return cells[0]
    known = [cell for cell in cells if cell != CONSTANT]
    digits, known = max(len(cell.partition(".")[2]) for cell in known), [*map(float, known)]
    mean = f"{statistics.mean(known):.{digits}f}"
    mean += f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return mean if len(known) == len(cells) else f"{mean} ({len(known)} of {len(cells)})"


def check(settings, *counts: str) -> None:
    """Ends with a one-line error before anything is loaded. `counts`: settings that must be at least 1."""
    for name in counts:
        if getattr(settings, name) < 1:
            fail(f"--{name} {getattr(settings, name)} is less than 1")
    if settings.seed < 0:
        fail(f"--seed {settings.seed} is negative")
    if settings.output and settings.output.exists():
        fail(f"{settings.output} exists; remove it, or choose another --output")
    if settings.output and not settings.output.parent.is_dir():
        fail(f"--output {settings.output}: there is no folder {settings.output.parent}")


def write_table(rows: list[list[str]], output: Path | None, summary=over_seeds) -> None:
    """Print a summary of the rows; write them as they are to `output`."""
    head, *table = summary(rows)
    print(render(head, table))
    if output:
        with output.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def main(settings: Args) -> None:
    if not settings.runs:
        fail("no run is given: python benchmark/probe.py RUN_DIR ...")
    check(settings, "games", "steps", "every")
    agents = {}
    for run in settings.runs:
        script, args, leader, follower, envs = load_run(run)
        envs.close()
        agents[run] = script, args, leader, follower
    atari = [is_atari(script) for script, *_ in agents.values()]
    if len(set(atari)) > 1:
        fail("some runs are on Atari, some on vectors; probe one kind at a time")
    if all(atari) and not settings.attention_off:
        if settings.games * len(agents) < 5:
            fail("fewer than 5 games in all: none would be left to score the probe on; raise --games")
        if len({(args.env_id, args.observation_noise, args.distractors) for _, args, *_ in agents.values()}) > 1:
            fail("the runs differ in --env-id, --observation-noise or --distractors; probe one kind at a time")
        if any(args.observation_noise or args.distractors for _, args, *_ in agents.values()):
            fail("runs with --observation-noise or --distractors on Atari cannot be probed: the games here are clean")
    measure = attention_at_work if settings.attention_off else probe_states if all(atari) else attention_on_truth
    write_table(measure(agents, settings), settings.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
