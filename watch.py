"""Watch a saved run: a video of one game, what the agent sees beside what the leader attends to.

    python watch.py runs/<run>

Writes <run>/watch.mp4 and <run>/watch.png (a contact sheet). Every picture shows one moment: the newest frame of
the observation, upscaled; on it, for each attention layer of a SPRIG run, the attention that each location receives
(red: more than uniform, dark: less; see `attention_overlay`); below, the probability of each action, the value, and
the score so far. A PPO run has no attention to show.
"""

import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro

SCRIPTS = ("sprig_atari.py", "ppo_atari_baseline.py")
PANEL = 130  # height of the panel below the pictures, in screen pixels
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
    """pictures per second; 15 agent steps of 4 frames are one second of the game"""
    sheet: int = 12
    """pictures on the contact sheet"""
    output: Path | None = None
    """folder of the video and the sheet (default: the run's)"""


def load_run(run: Path):
    """(script, its arguments, leader, follower, one game) of a saved run."""
    try:
        name = json.loads((run / "args.json").read_text())["script"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {run} is not the folder of a run: {error}") from None
    if name not in SCRIPTS:
        raise SystemExit(f"error: {run} is a run of {name}, which cannot be watched; {', '.join(SCRIPTS)} can")
    script = importlib.import_module(Path(name).stem)
    args = dataclasses.replace(script.read_args(run), num_envs=1)
    envs = script.make_envs(args)
    leader = script.Leader(envs.single_observation_space, args)
    follower = script.Follower(leader.num_features, envs.single_action_space)
    script.load_agent(run, leader, follower)
    return script, args, leader, follower, envs


def play(script, leader, follower, envs, args: Args):
    """Yields (observation (4, 84, 84), attention received per layer, probabilities, value, score) of each step."""
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=script.env_seeds(args.seed, 2, num_envs=1))  # stream 2: neither training nor evaluation
    score = 0.0
    for _ in range(args.steps):
        with torch.inference_mode():
            seen = torch.from_numpy(obs)
            received = [layer[0].numpy() for layer in leader.attention_received(seen)]
            logits, value = follower(leader(seen))
            policy = script.action_distribution(logits)
            action = logits.argmax(-1) if args.greedy else policy.sample()
        yield obs[0], received, policy.probs[0].numpy(), value.item(), score
        obs, rewards, _, _, info = envs.step(action.numpy())
        score += float(rewards[0])
        if "_episode" in info:
            return


def draw(script, obs, received, probabilities, value, score, actions: list[str]) -> np.ndarray:
    """One picture (H, W, 3), RGB uint8."""
    frame, scale = obs[-1], 4 if received else 8  # screen pixels per observed pixel
    pictures = [("seen", cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB))]
    for layer, weights in enumerate(received):
        pictures.append((f"layer {layer + 1} attends", script.attention_overlay(frame, weights, layer)))
    tiles = []
    for title, picture in pictures:
        tile = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        cv2.putText(tile, title, (8, 18), FONT, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        tiles.append(tile)
    panel = np.full((PANEL, tiles[0].shape[1] * len(tiles), 3), 24, dtype=np.uint8)
    cv2.putText(panel, f"score {score:.0f}    value {value:.2f}", (8, 20), FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    width = panel.shape[1] // len(actions)
    for i, (name, probability) in enumerate(zip(actions, probabilities)):
        left, height = i * width + 4, round(float(probability) * 60)
        chosen = (120, 200, 255) if probability == max(probabilities) else (110, 110, 110)
        cv2.rectangle(panel, (left, 96 - height), (left + width - 8, 96), chosen, -1)
        size = min(0.4, 0.4 * (width - 6) / cv2.getTextSize(name, FONT, 0.4, 1)[0][0])
        cv2.putText(panel, name, (left, 110), FONT, size, (220, 220, 220), 1, cv2.LINE_AA)
        cv2.putText(panel, f"{100 * probability:.0f}%", (left, 124), FONT, size, (160, 160, 160), 1, cv2.LINE_AA)
    return np.vstack([np.hstack(tiles), panel])


def contact_sheet(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures in rows, at half size; the last row is filled with black."""
    small = [cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for picture in pictures]
    small += [np.zeros_like(small[0])] * (-len(small) % columns)
    return np.vstack([np.hstack(small[i : i + columns]) for i in range(0, len(small), columns)])


def main(args: Args) -> tuple[Path, Path]:
    """Play, draw, write. Returns the paths of the video and of the contact sheet."""
    if args.steps < 1 or args.sheet < 1 or not args.fps > 0:
        raise SystemExit("error: --steps, --sheet and --fps must be positive")
    script, _, leader, follower, envs = load_run(args.run)
    actions = [action.name for action in envs.env.ale.get_action_set()]
    output = args.output or args.run
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output {output} cannot be written: {error.strerror}") from None
    video_path, sheet_path = output / "watch.mp4", output / "watch.png"
    video, moments = None, []
    for moment in play(script, leader, follower, envs, args):
        picture = draw(script, *moment, actions)
        if video is None:
            size = (picture.shape[1], picture.shape[0])
            video = cv2.VideoWriter(str(video_path), cv2.VideoWriter_fourcc(*"mp4v"), args.fps, size)
            if not video.isOpened():
                raise SystemExit(f"error: {video_path} cannot be written")
        video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        moments.append(moment)
    video.release()
    envs.close()
    chosen = np.linspace(0, len(moments) - 1, min(args.sheet, len(moments))).round().astype(int)
    pictures = [draw(script, *moments[i], actions) for i in chosen]
    sheet = contact_sheet(pictures, columns=2 if pictures[0].shape[1] > 1000 else 4)
    if not cv2.imwrite(str(sheet_path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise SystemExit(f"error: {sheet_path} cannot be written")
    print(f"{len(moments)} steps in {video_path}, contact sheet in {sheet_path}")
    return video_path, sheet_path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(tyro.cli(Args, description=__doc__))
