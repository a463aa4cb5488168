"""Watch a saved run: a video of one game, what the agent sees beside what the leader attends to.

    python watch.py runs/<run>

Writes <run>/watch.mp4 and <run>/watch.png (a contact sheet). Every picture shows one moment. Of an Atari run: the
newest frame of the observation, upscaled; beside it, for each attention layer of SPRIG, the same with the attention on
each location (red: more than uniform, dark: less; see `attention_overlay`). Of a run on state vectors: the rendered
environment, and for each attention layer which entry of the observation (row) attends to which (see `attention_map`).
Below: the probability of each action, or the mean of each entry of the action; the value, and the score so far. A PPO
run has no attention to show.
"""

import ctypes.util
import dataclasses
import importlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent  # where the scripts are, and forks of them
TITLE = 26  # height of the strip above each picture, in screen pixels
PANEL = 130  # height of the panel below the pictures, in screen pixels
SIDE = 384  # height of the pictures of an environment and of its attention maps
FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a saved run"""
    steps: int = 2000
    """agent steps to record at most; one game is played"""
    seed: int = 0
    """seed of the game and of the actions"""
    greedy: bool = False
    """take the most probable action instead of sampling it"""
    fps: float = 15.0
    """pictures per second; 15 agent steps of 4 frames are one second of an Atari game"""
    sheet: int = 12
    """pictures on the contact sheet"""
    output: Path | None = None
    """folder of the video and the sheet (default: the run's)"""


class Moment(NamedTuple):
    """What one picture shows."""

    pictures: list[tuple[str, np.ndarray]]  # title and RGB image (H, W, 3) uint8, of one height
    actions: list[tuple[str, float, str]]  # name; its probability, or mean as a share of its bound; the same as text
    signed: bool  # whether bars go down as well
    value: float  # V of what is seen
    score: float  # sum of the raw rewards so far, this step's included


def is_atari(script) -> bool:
    return "ale-py" in script.SIMULATORS


def load_run(run: Path):
    """(script, its arguments, leader, follower, one game) of a saved run."""
    try:
        name = Path(json.loads((run / "args.json").read_text())["script"]).name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {run} is not the folder of a run: {error}") from None
    if not name.endswith(".py") or not (ROOT / name).is_file():
        raise SystemExit(f"error: {run} is a run of {name}, which is not in {ROOT}")
    if sys.platform == "linux":  # read when MuJoCo is imported; elsewhere its own choice is right
        without_display = "egl" if ctypes.util.find_library("EGL") else "disable"  # disable: grey pictures
        os.environ.setdefault("MUJOCO_GL", "glfw" if "DISPLAY" in os.environ else without_display)
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())  # SDL complains if it is missing
    script = importlib.import_module(Path(name).stem)
    if not hasattr(script, "load_agent"):
        raise SystemExit(f"error: {run} is a run of {name}, which cannot be watched")
    args = dataclasses.replace(script.read_args(run), num_envs=1, reward_delay=1)  # the score as it comes
    envs = script.make_envs(args, **({} if is_atari(script) else {"render_mode": "rgb_array"}))
    leader = script.Leader(envs.single_observation_space, args)
    follower = script.Follower(leader.num_features, envs.single_action_space)
    script.load_agent(run, leader, follower)
    script.set_matmul_precision(args.matmul_precision)  # as in training
    return script, args, leader, follower, envs


def play(script, run_args, leader, follower, envs, args: Args):
    """Yields a `Moment` for each step of one game: what the agent saw, and the score after its action."""
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=script.env_seeds(args.seed, 2, num_envs=1))  # stream 2: not training, not evaluation
    view = AtariView(script, envs) if is_atari(script) else VectorView(script, envs, run_args)
    score = 0.0
    for _ in range(args.steps):
        with torch.inference_mode():
            seen = torch.from_numpy(obs)
            logits, value = follower(leader(seen))
            policy = script.action_distribution(logits)
            action = policy.mode if args.greedy else script.sample(policy)
            pictures = view.pictures(seen, leader)
        obs, rewards, _, _, info = envs.step(action.numpy())
        score += float(rewards[0])
        yield Moment(pictures, view.actions(policy), not hasattr(policy, "probs"), value.item(), score)
        if "_episode" in info:
            return


class AtariView:
    """The newest frame, and on it the attention that each location receives."""

    def __init__(self, script, envs):
        self.overlay = getattr(script, "attention_overlay", None)
        self.names = [action.name for action in envs.unwrapped.ale.get_action_set()]

    def pictures(self, obs: torch.Tensor, leader) -> list[tuple[str, np.ndarray]]:
        frame = obs[0, -1].numpy()
        received = leader.attention_received(obs) if hasattr(leader, "attention_received") else []
        pictures = [("seen", cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB))]
        for layer, weights in enumerate(received):
            overlay = self.overlay(frame, weights[0].numpy(), *leader.locations[layer])
            pictures.append((f"layer {layer + 1} attends", overlay))
        scale = 4 if received else 8  # screen pixels per observed pixel
        return [(title, picture.repeat(scale, axis=0).repeat(scale, axis=1)) for title, picture in pictures]

    def actions(self, policy) -> list[tuple[str, float, str]]:
        probabilities = policy.probs[0].tolist()
        return [(name, p, f"{100 * p:.0f}%") for name, p in zip(self.names, probabilities)]


class VectorView:
    """The rendered environment, and beside it which entry attends to which."""

    def __init__(self, script, envs, args):
        self.attention_map = getattr(script, "attention_map", None)  # PPO's twin has none
        self.names = script.observation_names(args) if self.attention_map else []
        self.envs, self.can_render = envs, True

    def pictures(self, obs: torch.Tensor, leader) -> list[tuple[str, np.ndarray]]:
        pictures = [("environment", self.render())]
        maps = leader(obs, num_rows=0)[1] if self.attention_map else []  # K of (1, n, n)
        for layer, weights in enumerate(maps):
            names = self.names if layer == 0 else [""] * len(self.names)  # written once
            pictures.append((f"layer {layer + 1}", to_height(self.attention_map(weights[0].numpy(), names))))
        return pictures

    def render(self) -> np.ndarray:
        if self.can_render:
            try:
                picture = np.asarray(self.envs.render()[0])
                picture = np.stack([picture] * 3, -1) if picture.ndim == 2 else picture  # grey
                return to_height(np.ascontiguousarray(picture[..., :3]))  # without alpha
            except Exception as error:  # of any graphics library
                print(f"warning: the environment cannot be rendered: {type(error).__name__}: {error}", file=sys.stderr)
                self.can_render = False
        return np.full((SIDE, SIDE, 3), 60, dtype=np.uint8)

    def actions(self, policy) -> list[tuple[str, float, str]]:
        if hasattr(policy, "probs"):
            return [(f"action {i}", p, f"{100 * p:.0f}%") for i, p in enumerate(policy.probs[0].tolist())]
        space = self.envs.unwrapped.envs[0].unwrapped.action_space  # the environment clips actions to its bounds
        means = policy.mean[0].numpy()
        shares = np.clip(means / np.maximum(np.abs(space.low), np.abs(space.high)), -1, 1)
        return [(f"action {i}", float(share), f"{mean:.2f}") for i, (share, mean) in enumerate(zip(shares, means))]


def to_height(picture: np.ndarray) -> np.ndarray:
    """Scale to SIDE screen pixels of height."""
    height, width = picture.shape[:2]
    method = cv2.INTER_AREA if height > SIDE else cv2.INTER_NEAREST
    return cv2.resize(picture, (max(1, round(width * SIDE / height)), SIDE), interpolation=method)


def draw(moment: Moment) -> np.ndarray:
    """One picture (H, W, 3), RGB uint8."""
    tiles = []
    for title, picture in moment.pictures:
        strip = np.full((TITLE, picture.shape[1], 3), 24, dtype=np.uint8)
        cv2.putText(strip, title, (8, 18), FONT, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        tiles.append(np.vstack([strip, picture]))
    panel = np.full((PANEL, sum(tile.shape[1] for tile in tiles), 3), 24, dtype=np.uint8)
    line = f"score {moment.score:.5g}    value {moment.value:.2f}"
    cv2.putText(panel, line, (8, 20), FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    width = panel.shape[1] // len(moment.actions)
    base, full = (64, 30) if moment.signed else (96, 60)
    strongest = max(share for _, share, _ in moment.actions)
    for i, (name, share, label) in enumerate(moment.actions):
        left, end = i * width + 4, base - round(share * full)
        plain = (110, 150, 180) if moment.signed else (110, 110, 110)
        colour = (120, 200, 255) if share == strongest and not moment.signed else plain
        cv2.rectangle(panel, (left, min(base, end)), (left + width - 8, max(base, end)), colour, -1)
        size = min(0.4, 0.4 * (width - 6) / cv2.getTextSize(name, FONT, 0.4, 1)[0][0])
        cv2.putText(panel, name, (left, 110), FONT, size, (220, 220, 220), 1, cv2.LINE_AA)
        cv2.putText(panel, label, (left, 124), FONT, size, (160, 160, 160), 1, cv2.LINE_AA)
    return np.vstack([np.hstack(tiles), panel])


def contact_sheet(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures (H, W, 3) of one size in rows, at half size; the last row is filled with black."""
    small = [cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for picture in pictures]
    small += [np.zeros_like(small[0])] * (-len(small) % columns)
    return np.vstack([np.hstack(small[i : i + columns]) for i in range(0, len(small), columns)])


def main(args: Args) -> tuple[Path, Path]:
    """Play, draw, write. Returns the paths of the video and of the contact sheet."""
    if args.steps < 1 or args.sheet < 1:
        raise SystemExit("error: --steps and --sheet must be positive")
    if not 0.1 <= args.fps <= 240:
        raise SystemExit(f"error: --fps must lie in [0.1, 240], not {args.fps}")
    if not 0 <= args.seed < 2**32:
        raise SystemExit(f"error: --seed must lie in [0, 2**32), not {args.seed}")
    script, run_args, leader, follower, envs = load_run(args.run)
    output = args.output or args.run
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output {output} cannot be written: {error.strerror}") from None
    video_path, sheet_path = output / "watch.mp4", output / "watch.png"
    video, kept, stride = None, [], 1
    for step, moment in enumerate(play(script, run_args, leader, follower, envs, args)):
        picture = draw(moment)
        if video is None:
            size = (picture.shape[1], picture.shape[0])
            video = cv2.VideoWriter(str(video_path), cv2.VideoWriter_fourcc(*"mp4v"), args.fps, size)
            if not video.isOpened():
                raise SystemExit(f"error: {video_path} cannot be written")
        video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        if step % stride == 0:  # for the sheet: evenly spaced, however long the game will be
            kept.append(picture)
        if len(kept) > 4 * args.sheet:
            kept, stride = kept[::2], 2 * stride  # those at multiples of the new stride
    video.release()
    envs.close()
    chosen = np.linspace(0, len(kept) - 1, min(args.sheet, len(kept))).round().astype(int)
    columns = 4 if kept[0].shape[1] < 1000 else 1 if len(chosen) < 5 else 2
    sheet = contact_sheet([kept[i] for i in chosen], columns)
    if not cv2.imwrite(str(sheet_path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise SystemExit(f"error: {sheet_path} cannot be written")
    print(f"{step + 1} steps in {video_path}, contact sheet in {sheet_path}")
    return video_path, sheet_path


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted; the video is cut short and has no contact sheet") from None
