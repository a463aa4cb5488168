"""SPRIG on vectors whose leader commits for a rollout: B of minatar_variants.py, as a fork of sprig_continuous.py.

    python benchmark/studies/commit_vectors.py --env-id HalfCheetah-v5 --leader-rate-factor 3

Replaces `update`: the leader takes one pass over the rollout, which ends early once it has changed the policy by
--leader-max-kl; then the follower takes its epochs on features that are computed once. --update is not used.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn.utils import clip_grad_norm_

import sprig_continuous as base
from sprig_continuous import MAY_CHANGE, Batch, action_distribution, env_protocol, normalise, perceive  # noqa: F401


@dataclass
class CommitArgs(base.SprigArgs):
    leader_max_kl: base.Positive = 0.02  # the leader stops where its move has changed the policy by this


@dataclass
class Args(CommitArgs, base.Args):
    def __post_init__(self):
        super().__post_init__()
        for name in ("update", "leader_gradient"):
            if getattr(self, name) != getattr(base.Args, name):
                raise ValueError(f"--{name.replace('_', '-')} does not vary here")


def minibatches(batch: Batch, args: Args):
    """All of `batch`, in a random order."""
    for indices in torch.randperm(len(batch.obs)).to(batch.obs.device).split(args.minibatch_size):
        minibatch = Batch(*(x[indices] for x in batch))
        if args.norm_adv == "minibatch":
            minibatch = minibatch._replace(advantages=normalise(minibatch.advantages))
        yield minibatch


def descend(player, loss, optimizer, args: Args) -> torch.Tensor:
    """One step of `player` down `loss`; the other, without a gradient, stays. Returns the gradient's norm."""
    parameters = [parameter for parameter in player.parameters() if parameter.requires_grad]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    norm = clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    return norm


def update(leader, follower, optimizer, batch: Batch, args: Args) -> dict[str, float]:
    """As in sprig_continuous.py: means over the steps, by tag. Raises FloatingPointError if one is not finite."""
    history = []
    for minibatch in minibatches(batch, args):
        features, cost = perceive(leader, minibatch.obs, args)
        logits, values = follower(features)
        log_ratio = action_distribution(logits).log_prob(minibatch.actions).detach() - minibatch.logprobs  # (B,)
        kl = (log_ratio.expm1() - log_ratio).mean()  # the follower has not moved: all of it is the leader's doing
        if kl > args.leader_max_kl:
            break
        loss, info = base.leader_loss(logits, values, cost, minibatch, args)
        history.append(info | {"leader/grad_norm": descend(leader, loss, optimizer, args)})
    history.append({"leader/kl": kl, "leader/steps": torch.tensor(float(len(history)))})

    with torch.no_grad():  # the leader stays: its features, once for all epochs
        shown = batch._replace(obs=torch.cat([leader(part) for part in batch.obs.split(256)]))
    for _ in range(args.update_epochs):
        epoch = []
        for minibatch in minibatches(shown, args):
            loss, info = base.follower_loss(*follower(minibatch.obs), minibatch, args)
            epoch.append(info | {"losses/grad_norm": descend(follower, loss, optimizer, args)})
        history += epoch
        if args.target_kl and torch.stack([info["losses/approx_kl"] for info in epoch]).mean() > args.target_kl:
            break
    tags = dict.fromkeys(tag for info in history for tag in info)
    metrics = {tag: torch.stack([info[tag] for info in history if tag in info]).mean() for tag in tags}
    for name, value in (*metrics.items(), *leader.named_parameters(), *follower.named_parameters()):
        if not value.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
    return {tag: mean.item() for tag, mean in metrics.items()}


def main(args: Args) -> dict:
    """From now on sprig_continuous is, in this process, this fork."""
    base.Args, base.update, base.__file__ = Args, update, __file__
    return base.main(args)


if __name__ == "__main__":
    base.SprigArgs, base.Args, base.__file__ = CommitArgs, Args, __file__  # what parse_args reads
    main(base.parse_args())
