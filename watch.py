"""Watch a saved run: what the agent sees, what its leader attends to, a policy.

Writes watch.mp4, one game, and watch.png, six moments of it, into the run's folder. Left: what the agent sees, or for
vectors the rendered environment. Beside it, for each attention layer of SPRIG: on pixels how much attention each
location receives, on vectors which entry (row) attends to which (column); red: more than a uniform share, dark: less.
Below: the policy. A GIF of its first 15 seconds:

    ffmpeg -i watch.mp4 -t 15 -lavfi "fps=8,scale=880:-1,split[a][b];[a]palettegen=64[p];[b][p]paletteuse" watch.gif
"""

import ctypes.util
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import gymnasium as gym
import imageio.v2 as imageio
import matplotlib.style
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FULL = 0.1  # a layer is coloured at full strength if the features change by this share without its attention


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a saved run, finished or not, or of agents/
    output: Path | None = None  # folder of the video and the sheet (default: the run's)
    seed: int = 0  # seed of the game and of the actions
    greedy: bool = False  # take the most probable action instead of sampling it
    steps: int = 1200  # agent steps to show at most; one game is played
    fps: float = 20.0  # agent steps per second of video


def fail(message: object) -> NoReturn:
    raise SystemExit(f"error: {' '.join(str(message).split())}")


def load_run(run: Path):
    """(script, its arguments, leader, follower) of a saved run. SystemExit if there is none."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:  # read when MuJoCo is imported; disable: no pictures
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "disable")
    try:
        script = importlib.import_module(Path(json.loads((run / "args.json").read_text())["script"]).stem)
        load_agent = script.load_agent
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        fail(f"{run} is not a run of a script that is here and trains an agent: {type(error).__name__}: {error}")
    return script, *load_agent(run)


def label(envs: gym.vector.VectorEnv, args) -> tuple[list[str], list[str]]:
    """What entries of an observation (pixels: none) and actions are called, as far as that is known."""
    if hasattr(envs.unwrapped, "ale"):
        return [], [action.name for action in envs.unwrapped.ale.get_action_set()]
    task = envs.unwrapped.envs[0]
    core, entries, actions = task.unwrapped, [], []
    if args.env_id.startswith("MinAtar/"):
        return [], [core.game.env.action_map[i] for i in core.action_set]  # n, l, u, r, d, f: none, left, ..., fire
    if args.env_id == "CartPole-v1":
        entries, actions = ["position", "velocity", "angle", "angular velocity"], ["push left", "push right"]
    elif isinstance(shown := core.observation_space, gym.spaces.Dict):  # DM Control
        entries = [f"{key} {i}" for key in shown for i in range(gym.spaces.flatdim(shown[key]))]
    elif hasattr(core, "observation_structure"):  # MuJoCo: positions and velocities of joints, which its motors turn
        joints = [core.model.joint(i) for i in range(core.model.njnt)]
        places = [f"pos {joint.name}" for joint in joints for _ in joint.qpos0]
        entries = places[core.observation_structure.get("skipped_qpos", 0) :]
        entries += [f"vel {joint.name}" for joint in joints for _ in joint.damping]
        actions = [joints[i].name for i in core.model.actuator_trnid[:, 0] if i < len(joints)]
    sizes = task.observation_space.shape[0], gym.spaces.flatdim(task.env.action_space)  # a wrapper may change them
    entries = entries if len(entries) == sizes[0] else [f"entry {i}" for i in range(sizes[0])]
    actions = actions if len(actions) == sizes[1] else [f"action {i}" for i in range(sizes[1])]
    return entries + [f"noise {i}" for i in range(args.distractors)], actions


def overlay(grey: np.ndarray | float, share: np.ndarray, strength: float) -> np.ndarray:
    """Colour a grey picture (H, W) by attention as a multiple of the uniform share (H, W): red above 1, darker below,
    all of it times `strength` in [0, 1]. Returns (H, W, 3) uint8."""
    heat = 0.8 * strength * (1 - 1 / share.clip(1))  # what is attended to stays visible
    grey = grey * (1 - strength * (1 - share.clip(0.3, 1)))
    return np.stack([grey + (255 - grey) * heat, grey * (1 - heat), grey * (1 - heat)], -1).astype(np.uint8)


def spread(received: np.ndarray, convs, num_pixels: int) -> np.ndarray:
    """What the n locations of the last of `convs` receive, (n,), as a square picture of `num_pixels` rows: each value
    around the centre of its location's receptive field, 1 at the margin, on which no field is centred."""
    size, start, jump = math.isqrt(len(received)), 0.0, 1.0  # centre of the first field; pixels from one to the next
    for conv in convs:
        start += jump * ((conv.kernel_size[0] - 1) / 2 - conv.padding[0])
        jump *= conv.stride[0]
    nearest = np.floor((np.arange(num_pixels) - start) / jump + 0.5).astype(int)  # location of each row of pixels
    inside, nearest = (nearest >= 0) & (nearest < size), nearest.clip(0, size - 1)
    return np.where(np.outer(inside, inside), received.reshape(size, size)[np.ix_(nearest, nearest)], 1.0)


def attention_tiles(script, leader, obs: torch.Tensor, grey: np.ndarray | float) -> Iterator[tuple[str, np.ndarray]]:
    """Title and picture of each attention layer: on `grey` (H, W) what its locations receive, or on vectors which entry
    (row) attends to which (column). A gate near 0 lets nothing through, whatever the weights look like: so colours
    fade to grey as the features change less when the gate is closed."""
    features, attention = leader(obs, num_rows=0)
    for k, weights in enumerate(attention):  # (1, n, n)
        gate, change, title = getattr(leader.blocks[k], "gate", None), 1.0, ""
        if gate is not None:
            opened = gate.item()
            gate.zero_()
            change = ((leader(obs) - features).norm() / (features.norm() + 1e-12)).item()
            gate.fill_(opened)
            title = f"gate {opened:.3f}, without it features change by {100 * change:.1f} %"
        share = weights[0].numpy() * weights.shape[-1]  # 1: uniform
        if hasattr(leader, "convs"):
            share = spread(share.mean(0), list(leader.convs)[: k + 1], len(grey))
        entropy = script.perception_cost([weights], "entropy").item()
        title = f"layer {k + 1}, entropy {entropy:.2f}{', pale: it does little' * (change < FULL)}\n{title}"
        yield title, overlay(grey, share, min(change / FULL, 1))


def draw(figure: Figure, tiles: list, bars: list, state: str, entries: list[str], actions: list[str]) -> np.ndarray:
    """Tiles (see attention_tiles) and bars (see play) as one picture (H, W, 3) uint8."""
    if not figure.axes:
        grid = figure.add_gridspec(2, len(tiles), height_ratios=(3, 1))
        for k, (_, picture) in enumerate(tiles):
            figure.add_subplot(grid[0, k], xticks=[], yticks=[]).imshow(picture)
        if len(tiles) > 1 and len(entries) <= 28:  # more names would lie on one another; all maps have the same
            figure.axes[1].set_xticks(range(len(entries)), entries, rotation=90)
            figure.axes[1].set_yticks(range(len(entries)), entries)
        figure.add_subplot(grid[1, :], ylim=(0, 1), yticks=[]).bar(range(len(actions)), 0)
    for (title, picture), axes in zip(tiles, figure.axes):
        axes.images[0].set_data(picture)
        axes.set_title(title)
    for (start, end, _), bar in zip(bars, figure.axes[-1].patches):
        bar.set(y=start, height=end - start)
    ticks = [f"{name}\n{number}" for name, (*_, number) in zip(actions, bars)]
    figure.axes[-1].set_xticks(range(len(actions)), ticks, rotation=90 * (len(actions) > 6))
    figure.suptitle(state, x=0.01, ha="left")
    figure.canvas.draw()
    figure.set_layout_engine("none")  # found once
    return np.array(figure.canvas.buffer_rgba())[..., :3]


def see(envs, obs: np.ndarray) -> tuple[str, np.ndarray]:
    """Title and picture (H, W, 3) uint8 of obs (C, H, W) or, for vectors, of the environment."""
    if obs.ndim == 3 and obs.shape[-1] > 10:
        return "what the agent sees: the newest of its frames", obs[-1, ..., None].repeat(3, -1)
    if obs.ndim == 3:  # MinAtar
        colours = matplotlib.colormaps["Set3"]((obs > 127).argmax(0), bytes=True)[..., :3]  # of the first plane set
        return "what the agent sees: a colour for each plane", colours * obs.any(0)[..., None]
    try:
        return "environment", np.asarray(envs.render()[0], np.uint8)
    except Exception as error:  # of any graphics library
        return f"cannot be rendered: {type(error).__name__}\n{str(error)[:60]}", np.full((480, 480, 3), 60, np.uint8)


@torch.no_grad()
def play(script, run_args, leader, follower, args: Args) -> Iterator[np.ndarray]:
    """A picture (H, W, 3) uint8 for each step of one game: what the agent saw, and the score after its action."""
    torch.manual_seed(args.seed)
    render = {"render_mode": "rgb_array"} if hasattr(script, "make_env") else {}
    envs = script.make_envs(replace(run_args, reward_delay=1), 1, **render)  # the score as it comes
    obs, _ = envs.reset(seed=script.env_seeds(args.seed, 2, num_envs=1))
    entries, actions = label(envs, run_args)
    matplotlib.style.use(["dark_background", {"font.size": 8, "axes.titlesize": 8}])
    figure, score = FigureCanvasAgg(Figure((16, 6.4), dpi=100, layout="constrained")).figure, 0.0
    for step in range(1, args.steps + 1):
        frames, tiles = torch.from_numpy(obs), [see(envs, obs[0])]
        if hasattr(script, "perception_cost"):  # SPRIG
            tiles += attention_tiles(script, leader, frames, 110.0 if entries else 0.7 * tiles[0][1].mean(-1))
        logits, (value,) = follower(leader(frames))
        policy = script.action_distribution(logits)
        if hasattr(policy, "probs"):  # the two ends of each action's bar, within [0, 1], and its number
            bars = [(0, p, f"{100 * p:.0f} %") for p in policy.probs[0].tolist()]
        else:  # from 0 to the mean, between the bounds of the wrapped task, at which actions are clipped
            space, mean = envs.unwrapped.envs[0].env.action_space, policy.mean[0].numpy()
            low, high = space.low.clip(-1e3), space.high.clip(None, 1e3)
            ends = [(x.clip(low, high) - low) / (high - low) for x in (0 * low, mean)]
            bars = [(*pair, f"{x:.2f}") for *pair, x in zip(*ends, mean)]
        obs, rewards, _, _, info = envs.step((policy.mode if args.greedy else policy.sample()).numpy())
        score += rewards[0]
        yield draw(figure, tiles, bars, f"step {step}, score {score:.5g}, value {value:.2f}", entries, actions)
        if "_episode" in info:
            break
    envs.close()


def main(args: Args) -> None:
    if args.steps < 1 or not 0.1 <= args.fps <= 240 or not 0 <= args.seed < 2**32:
        fail("--steps must be at least 1, --fps lie in [0.1, 240] and --seed in [0, 2**32)")
    agent, output = load_run(args.run), args.output or args.run
    options = ["-maxrate", "1200k", "-bufsize", "2400k", "-movflags", "+faststart"]  # 9 MB a minute; plays as it comes
    form = {"codec": "libx264", "quality": None, "macro_block_size": 2, "ffmpeg_log_level": "fatal"}
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".watch-") as folder:  # all or nothing
        film, sheet = Path(folder) / "watch.mp4", Path(folder) / "watch.png"
        with imageio.get_writer(film, fps=args.fps, output_params=options, **form) as video:
            for steps, picture in enumerate(play(*agent, args), 1):
                video.append_data(picture)
                if sys.stderr and sys.stderr.isatty():
                    print(f"\rstep {steps} of at most {args.steps} ", end="", file=sys.stderr, flush=True)
        chosen = np.linspace(0, steps - 1, 6).astype(int)
        with imageio.get_reader(film) as video:
            moments = {i: frame for i, frame in enumerate(video) if i in chosen}
        imageio.imwrite(sheet, np.vstack([np.hstack([moments[i] for i in pair]) for pair in chosen.reshape(3, 2)]))
        for path in (film, sheet):
            path.replace(output / path.name)
    print(f"{steps} steps (at most --steps {args.steps}) in {output / film.name} and {sheet.name}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (OSError, KeyboardInterrupt) as error:  # a full disk, a folder that cannot be written
        fail(f"nothing was written: {type(error).__name__}: {error}")
