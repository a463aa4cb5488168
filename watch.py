"""Watch a saved run: what the agent sees beside what its leader attends to.

    python watch.py runs/<run>

Writes watch.mp4, one game, and watch.png, six moments of it, into the run's folder. Left: what the agent sees, or for
vectors the rendered environment. Beside it, for each attention layer of SPRIG: on pixels how much attention each
location receives, on vectors which entry (row) attends to which (column); red: more than a uniform share, dark: less.
Below: the policy.
"""

import ctypes.util
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import gymnasium as gym
import imageio.v2 as imageio
import imageio_ffmpeg
import matplotlib.style
import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent  # of the scripts, and of forks of them
MARK = "made by watch.py"  # in each file that it writes: others are not overwritten
FULL = 0.1  # a layer is coloured at full strength if the features change by this share without its attention
NAMES = {  # entries and actions as Gymnasium documents them; MuJoCo, DM Control and the emulators can be asked
    "CartPole": ("position, velocity, angle, angular velocity", "push left, push right"),
    "Pendulum": ("cos angle, sin angle, angular velocity", "torque"),
    "MountainCar": ("position, velocity", "push left, do nothing, push right"),
    "Acrobot": ("cos 1, sin 1, cos 2, sin 2, angular velocity 1, angular velocity 2", "torque -1, no torque, torque 1"),
}
MINATAR = {"n": "no-op", "l": "left", "u": "up", "r": "right", "d": "down", "f": "fire"}


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a saved run, finished or not
    output: Path | None = None  # folder of the video and the sheet (default: the run's)
    seed: int = 0  # seed of the game and of the actions
    greedy: bool = False  # take the most probable action instead of sampling it
    steps: int = 1200  # agent steps to show at most; one game is played
    fps: float = 20.0  # agent steps per second of video
    gif: bool = False  # also write the first seconds as watch.gif, under 2 MB


def fail(message: object) -> NoReturn:
    raise SystemExit(f"error: {' '.join(str(message).split())}")


def load_run(run: Path):
    """(script, its arguments, leader, follower) of a saved run."""
    try:
        name = Path(json.loads((run / "args.json").read_text())["script"]).name
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} is not the folder of a run: {type(error).__name__}: {error}")
    if sys.platform == "linux":  # read when MuJoCo is imported; elsewhere its own choice is right
        without_display = "egl" if ctypes.util.find_library("EGL") else "disable"  # disable: no pictures
        os.environ.setdefault("MUJOCO_GL", "glfw" if "DISPLAY" in os.environ else without_display)
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())  # SDL complains if it is missing
    here = name.endswith(".py") and (ROOT / name).is_file()
    script = importlib.import_module(name.removesuffix(".py")) if here else None
    if not hasattr(script, "load_agent"):
        fail(f"{run} is a run of {name}, which is none of the scripts in {ROOT} that train an agent")
    return script, *script.load_agent(run)


def label(envs: gym.vector.VectorEnv, args) -> tuple[list[str], list[str]]:
    """What entries of an observation (pixels: none) and actions are called, as far as that is known."""
    if hasattr(envs.unwrapped, "ale"):
        return [], [action.name for action in envs.unwrapped.ale.get_action_set()]
    task, space = envs.unwrapped.envs[0], envs.single_action_space
    core, shown = task.unwrapped, getattr(task.env, "env", task.env).observation_space
    if args.env_id.startswith("MinAtar/"):
        return [], [MINATAR[core.game.env.action_map[i]] for i in core.action_set]
    known = NAMES.get(args.env_id.rpartition(":")[2].rpartition("-")[0], ("", ""))
    entries, actions = (listed.split(", ") for listed in known)
    if isinstance(shown, gym.spaces.Dict):  # DM Control
        entries = [f"{key} {i}" for key, part in shown.items() for i in range(gym.spaces.flatdim(part))]
    elif hasattr(core, "observation_structure"):  # MuJoCo: positions and velocities of joints, then the rest
        parts, joints = dict(core.observation_structure), [core.model.joint(i) for i in range(core.model.njnt)]
        entries = [f"pos {joint.name}" for joint in joints for _ in joint.qpos0][parts.pop("skipped_qpos", 0) :]
        entries += [f"vel {joint.name}" for joint in joints for _ in joint.damping]
        entries += [f"{key} {i}" for key, n in parts.items() if key not in ("qpos", "qvel") for i in range(n)]
    physics = getattr(getattr(core, "_env", None), "physics", None)  # DM Control's
    model = physics.model.ptr if physics else getattr(core, "model", None)
    if isinstance(space, gym.spaces.Box) and hasattr(model, "actuator_trnid"):  # a motor without a name: its joint's
        joints = [model.joint(i).name for i in range(model.njnt)] + [""] * model.ntendon
        actions = [model.actuator(i).name or joints[model.actuator_trnid[i, 0]] for i in range(model.nu)]
    sizes = task.observation_space.shape[0], gym.spaces.flatdim(space)  # a wrapper may have changed them
    entries = entries if len(entries) == sizes[0] else [f"entry {i}" for i in range(sizes[0])]
    actions = actions if len(actions) == sizes[1] else [f"action {i}" for i in range(sizes[1])]
    return entries + [f"noise {i}" for i in range(args.distractors)], actions


def overlay(grey: np.ndarray, share: np.ndarray, strength: float) -> np.ndarray:
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


@torch.no_grad()
def attention_tiles(script, leader, obs: torch.Tensor, grey: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    """Title and picture of each attention layer: on `grey` (H, W) what its locations receive, or without it which entry
    (row) attends to which (column). A gate near 0 lets nothing through, whatever the weights look like: so colours
    fade to grey as the features change less when the gate is closed."""
    features, attention = leader(obs, num_rows=0)
    for k, weights in enumerate(attention):  # (1, n, n)
        gate, opened, change = getattr(leader.blocks[k], "gate", None), None, 1.0
        if gate is not None:
            opened = gate.item()
            gate.zero_()
            change = ((leader(obs) - features).norm() / (features.norm() + 1e-12)).item()
            gate.fill_(opened)
        entropy = script.perception_cost([weights], "entropy").item()
        title = f"layer {k + 1}, {'no gate' if gate is None else f'gate {opened:.3f}'}, entropy {entropy:.2f}\n"
        title += f"without it features change by {100 * change:.1f} %" + ", so pale" * (change < FULL)
        share = weights[0].numpy() * weights.shape[-1]
        if grey is not None:
            share = spread(share.mean(0), list(leader.convs)[: k + 1], len(grey))
        yield title, overlay(np.full(share.shape, 110.0) if grey is None else grey, share, min(change / FULL, 1))


def ticks(entries: list[str]) -> dict[float, str]:
    """Where names stand beside a map. Of more than 28 entries, groups with the same first word are named together."""
    if len(entries) <= 28:
        return dict(enumerate(entries))
    places, start = {}, 0
    for word, group in itertools.groupby(name.split()[0] for name in entries):
        count = len(list(group))
        if count >= len(entries) / 28:  # else its name would lie on another
            places[start + (count - 1) / 2] = f"{word} x{count}"
        start += count
    return places


class Screen:
    """Pictures side by side and, below, the policy as bars. What does not move is drawn once."""

    def __init__(self, tiles: list[tuple[str, np.ndarray]], entries: list[str], actions: list[str]):
        style = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
        style |= {"font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left"}
        matplotlib.style.use(["dark_background", style])
        width = max(7, 4 * len(tiles))  # inches of 100 pixels
        self.figure = Figure(figsize=(width, 6.4), dpi=100, layout="constrained")
        self.canvas, self.pictures, self.titles = FigureCanvasAgg(self.figure), [], []
        grid = self.figure.add_gridspec(2, len(tiles), height_ratios=(3, 1))
        for k, (title, picture) in enumerate(tiles):
            axes = self.figure.add_subplot(grid[0, k], xticks=[], yticks=[])
            self.pictures.append(axes.imshow(picture, cmap="gray", vmin=0, vmax=255))
            self.titles.append(axes.set_title(title))
            if k and entries:
                places = ticks(entries)
                axes.set_xticks(list(places), places.values(), rotation=90)
                if k == 1:  # rows are named once
                    axes.set_yticks(list(places), places.values())
        axes = self.figure.add_subplot(grid[1, :], ylim=(0, 1.5), facecolor="none", yticks=[])
        room = width / len(actions)  # inches
        axes.set_xticks(range(len(actions)), actions, rotation=90 * (room < 1.1))
        self.bars = axes.bar(range(len(actions)), 0, 0.6)
        self.numbers = [axes.text(i, 1.05, "", ha="center", rotation=90 * (room < 0.4)) for i in range(len(actions))]
        self.state = self.figure.suptitle(" ", x=0.01, ha="left")
        self.canvas.draw()  # finds the layout
        self.figure.set_layout_engine("none")
        self.moving = [*self.pictures, *self.titles, *self.bars, *self.numbers, self.state]
        for artist in self.moving:
            artist.set_animated(True)
        self.canvas.draw()
        self.still = self.canvas.copy_from_bbox(self.figure.bbox)

    def draw(self, tiles: list[tuple[str, np.ndarray]], policy: list[tuple[float, float, str]], state: str):
        """One picture (H, W, 3) uint8. policy: the two ends of each action's bar, within [0, 1], and its number."""
        for (title, picture), shown, heading in zip(tiles, self.pictures, self.titles):
            shown.set_data(picture)
            heading.set_text(title)
        for (start, end, text), bar, number in zip(policy, self.bars, self.numbers):
            bar.set(y=start, height=end - start)
            number.set_text(text)
        self.state.set_text(state)
        self.canvas.restore_region(self.still)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        return np.array(self.canvas.buffer_rgba())[..., :3]


def play(script, run_args, leader, follower, args: Args) -> Iterator[np.ndarray]:
    """A picture (H, W, 3) uint8 for each step of one game: what the agent saw, and the score after its action."""
    run_args = replace(run_args, seed=args.seed, reward_delay=1)  # the score as it comes
    make_envs = script.make_envs
    if "render_mode" in inspect.signature(make_envs).parameters:  # begin_games calls it
        script.make_envs = functools.partial(make_envs, render_mode="rgb_array")
    envs, obs = script.begin_games(run_args, 2, num_envs=1)
    script.make_envs = make_envs
    entries, actions = label(envs, run_args)
    screen, score, space = None, 0.0, envs.single_action_space
    if isinstance(space, gym.spaces.Box):  # the bounds of the wrapped task, at which actions are clipped
        low, high = envs.unwrapped.envs[0].env.action_space.low, envs.unwrapped.envs[0].env.action_space.high
        actions = [f"{name}\n[{a:g}, {b:g}]" for name, a, b in zip(actions, low, high)]
        low, high = low.clip(-1e3), high.clip(None, 1e3)
    blank = None
    try:
        np.asarray(envs.render()[0], np.uint8) if entries else None
    except Exception as error:  # of any graphics library
        print(f"warning: the environment cannot be rendered: {type(error).__name__}: {error}", file=sys.stderr)
        blank = np.full((480, 480), 60, np.uint8)
    for step in range(1, args.steps + 1):
        seen, grey = torch.from_numpy(obs), None
        with torch.no_grad():
            logits, value = follower(leader(seen))
        policy = script.action_distribution(logits)
        action = policy.mode if args.greedy else policy.sample()
        if entries:
            tiles = [("environment", np.asarray(envs.render()[0]) if blank is None else blank)]
        elif run_args.env_id.startswith("MinAtar/"):
            palette = 255 * np.array(matplotlib.colormaps["Set3"].colors)  # 12; there are at most 10 planes
            first = (obs[0] > 127).argmax(0)  # of the planes that are set at a location: the player's is 0
            picture = (palette[first] * obs[0].any(0)[..., None]).astype(np.uint8)
            tiles, grey = [("what the agent sees: a colour for each plane", picture)], 0.6 * picture.mean(-1)
        else:
            tiles, grey = [("what the agent sees: the newest frame of its stack", obs[0, -1])], obs[0, -1]
        if "num_rows" in inspect.signature(leader.forward).parameters:  # not in PPO's
            tiles += attention_tiles(script, leader, seen, grey)
        if isinstance(space, gym.spaces.Box):
            means = policy.mean[0].numpy()
            ends = [(x.clip(low, high) - low) / (high - low) for x in (0 * means, means)]
            bars = list(zip(*ends, (f"{mean:.2f}" for mean in means)))
        else:
            bars = [(0, p, f"{100 * p:.0f} %") for p in policy.probs[0].tolist()]
        obs, rewards, _, _, info = envs.step(action.numpy())
        score += float(rewards[0])
        screen = screen or Screen(tiles, entries, actions)
        yield screen.draw(tiles, bars, f"step {step}, score {score:.5g}, value {value.item():.2f}")
        if "_episode" in info:
            break
    envs.close()


def main(args: Args) -> list[Path]:
    """Play, draw, write. Returns the paths of the video, the sheet and, if it is asked for, the GIF."""
    if args.steps < 1 or not 0.1 <= args.fps <= 240 or not 0 <= args.seed < 2**32:
        fail("--steps must be at least 1, --fps lie in [0.1, 240] and --seed in [0, 2**32)")
    output, names = args.output or args.run, ["watch.mp4", "watch.png", "watch.gif"][: 2 + args.gif]
    for path in (output / name for name in names):
        if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()):
            fail(f"{path} is not of watch.py's making and would be overwritten; give another folder as --output")
    agent, progress = load_run(args.run), sys.stderr and sys.stderr.isatty()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".watch-") as folder:  # all or nothing
        made = [Path(folder) / name for name in names]
        options = ["-maxrate", "1200k", "-bufsize", "2400k"]  # at most 9 MB a minute
        options += ["-movflags", "+faststart", "-metadata", f"comment={MARK}"]  # a browser need not wait for its end
        form = {"codec": "libx264", "pixelformat": "yuv420p", "quality": None, "macro_block_size": 2}
        form["ffmpeg_log_level"] = "fatal"  # it has nothing to say on an interrupt
        with imageio.get_writer(made[0], fps=args.fps, output_params=options, **form) as video:
            for steps, picture in enumerate(play(*agent, args), 1):
                video.append_data(picture)
                if progress:
                    print(f"\rstep {steps} of at most {args.steps}", end="", file=sys.stderr, flush=True)
        sheet = f"select=not(mod(n\\,{math.ceil(steps / 6)})),tile=2x3", "-frames:v", "1"
        small = "fps=8,scale=880:-1:flags=area,split[a][b];[a]palettegen=128[p];[b][p]paletteuse=dither=none"
        for path, recipe in zip(made[1:], (sheet, (small, "-fs", "1600k"))):  # which it passes by a little
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "fatal", "-i", made[0], "-lavfi", *recipe, path]
            subprocess.run(command, check=True)
            path.write_bytes(path.read_bytes() + MARK.encode())  # what follows its end is not shown
        for path in made:
            os.replace(path, output / path.name)
    over = "the whole game" if steps < args.steps else "--steps shows more"
    print("\n" * bool(progress) + f"{steps} steps ({over}) in {', '.join(str(output / name) for name in names)}")
    return [output / name for name in names]


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error.filename or 'the video'} cannot be written: {error.strerror or error}")
    except subprocess.CalledProcessError:
        fail("the video is not whole, is the disk full? Nothing was written")
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
