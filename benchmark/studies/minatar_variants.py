"""What moving first could be worth: variants of SPRIG and the controls they need, a function each.

    python benchmark/studies/minatar_variants.py --env-id MinAtar/Breakout-v1 --variant commit --leader-rate-factor 3

A fork of sprig_atari.py that replaces `update` by what --variant names (--update is not used):
A "heads-first", "encoder-first": the players take turns on PPO's full loss, each with a norm clip of its own.
B "commit": the leader moves first in earnest, for a whole rollout; the follower answers on cached features.
C --leader-ent-coef: an entropy bonus in the leader's utility, in any variant in which it has one.
D "value-phase": every few rollouts perception learns values, while the policy stays. Control: "ppg".
E --value-error variance: of the value error that A, or --leader-value-coef, shows to the leader, the variance alone.
F "fisher": the total derivative of Eq. (6), with the Fisher matrix in place of the Hessian.
Controls: "stackelberg" is SPRIG as it is, "joint" PPO, "frozen" a random encoder that is never trained.

One network for all, sprig_atari.py's for MinAtar: convolutions of 16, 32, 32 channels, 3x3, each with LayerNorm and
gated attention, 512 features; heads with 128 hidden units.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.distributions import kl_divergence
from torch.nn.utils import clip_grad_norm_

import sprig_atari as base
from sprig_atari import MAY_CHANGE, Batch, action_distribution, env_protocol, follower_loss, perceive  # noqa: F401

VARIANTS = "joint stackelberg heads-first encoder-first commit value-phase ppg fisher frozen".split()


@dataclass
class VariantArgs(base.SprigArgs):
    variant: Literal[*VARIANTS] = "stackelberg"  # see the head of this file
    steps_per_minibatch: base.Count = 1  # joint: steps on each minibatch
    clip_each: bool = False  # joint: clip the gradient's norm for each player, not for both together
    encoder_epochs: base.Amount = 0  # joint: after so many epochs the heads go on alone, on cached features (0: never)
    leader_epochs: base.Count = 1  # commit: most passes of the leader over a rollout, before --update-epochs of answers
    leader_max_kl: base.Positive = 0.02  # commit: the leader stops where its move has changed the policy by this
    leader_ent_coef: base.Weight = 0.0  # weight of the policy's entropy beside its return in u_L
    value_error: Literal["mean-square", "variance"] = "mean-square"  # what --leader-value-coef weighs
    phase_interval: base.Count = 16  # value-phase, ppg: rollouts from one phase to the next
    phase_epochs: base.Count = 3  # value-phase, ppg: passes over these rollouts
    phase_kl_coef: base.Weight = 1.0  # value-phase, ppg: weight of the KL to the policy of before


@dataclass
class Args(VariantArgs, base.Args):
    def __post_init__(self):
        super().__post_init__()
        for name in ("update", "leader_gradient", "norm_adv", "target_kl"):
            if getattr(self, name) != getattr(base.Args, name):
                raise ValueError(f"--{name.replace('_', '-')} does not vary here; see --variant")


def minibatches(batch: Batch, args: Args, epochs: int):
    """All of `batch`, `epochs` times, each time in another order."""
    for _ in range(epochs):
        for indices in torch.randperm(len(batch.obs)).to(batch.obs.device).split(args.minibatch_size):
            yield Batch(*(x[indices] for x in batch))


def descend(optimizer, loss, args: Args, *groups) -> torch.Tensor:
    """One step of the players in `groups`, lists of modules, down `loss`; the rest stays. Each group has its clip."""
    optimizer.zero_grad()
    groups = [[parameter for player in group for parameter in player.parameters()] for group in groups]
    loss.backward(inputs=sum(groups, []))
    norms = [clip_grad_norm_(group, args.max_grad_norm) for group in groups]
    optimizer.step()  # without a gradient a parameter stays
    return norms[-1]


@torch.no_grad()
def show(leader, obs: torch.Tensor) -> torch.Tensor:
    """The features of a whole rollout (B, F)."""
    return torch.cat([leader(part) for part in obs.split(256)])


def leader_loss(logits, values, cost, batch: Batch, args: Args):
    """sprig_atari.py's -u_L, which holds the mean square of the value error if that has a weight, with C and E."""
    loss, info = base.leader_loss(logits, values, cost, batch, args)
    if args.leader_ent_coef:  # C, weighed by α as the return is: so both players trade one for the other alike
        loss = loss - args.cooperation_weight * args.leader_ent_coef * action_distribution(logits).entropy().mean()
    if args.value_error == "variance":  # E: the mean square less the squared mean, an error that the heads can mend
        loss = loss - args.leader_value_coef * (values - batch.returns).mean() ** 2
    return loss, info


def full_loss(args: Args) -> Args:
    """With these arguments `leader_loss` is PPO's whole loss."""
    return replace(args, cooperation_weight=1.0, leader_value_coef=args.vf_coef, leader_ent_coef=args.ent_coef)


def answer(follower, optimizer, features: torch.Tensor, batch: Batch, args: Args, epochs: int):
    """The follower's epochs on features that stay."""
    for minibatch in minibatches(batch._replace(obs=features), args, epochs):
        loss, info = follower_loss(*follower(minibatch.obs), minibatch, args)
        yield info | {"losses/grad_norm": descend(optimizer, loss, args, [follower])}


# ==== Variants: all steps on one rollout; each yields what to log ==================================
def joint(leader, follower, optimizer, batch: Batch, args: Args, stop_value: bool = False):
    """PPO. `stop_value`: no gradient of the value error to the leader."""
    groups = ([leader], [follower]) if args.clip_each else ([leader, follower],)
    epochs = min(args.encoder_epochs or args.update_epochs, args.update_epochs)
    for minibatch in minibatches(batch, args, epochs):
        for _ in range(args.steps_per_minibatch):
            logits, values = follower(features := leader(minibatch.obs))
            values = follower(features.detach())[1] if stop_value else values
            loss, info = follower_loss(logits, values, minibatch, args)
            yield info | {"losses/grad_norm": descend(optimizer, loss, args, *groups)}
    if epochs < args.update_epochs:
        yield from answer(follower, optimizer, show(leader, batch.obs), batch, args, args.update_epochs - epochs)


def stackelberg(leader, follower, optimizer, batch: Batch, args: Args, total: bool = False):
    """Algorithm 1: on each minibatch the leader moves, then the follower answers what it shows now. `total`: F."""
    for minibatch in minibatches(batch, args, args.update_epochs):
        features, cost = perceive(leader, minibatch.obs, args)
        logits, values = follower(features)
        loss, info = leader_loss(logits, values, cost, minibatch, args)
        if total:
            loss, info["leader/correction"] = anticipate(leader, follower, loss, logits, values, minibatch, args)
        info["leader/grad_norm"] = descend(optimizer, loss, args, [leader])
        loss, answer_info = follower_loss(*follower(show(leader, minibatch.obs)), minibatch, args)
        yield info | answer_info | {"losses/grad_norm": descend(optimizer, loss, args, [follower])}


def encoder_first(leader, follower, optimizer, batch: Batch, args: Args):
    """A: Algorithm 1's turns, with PPO's whole loss for the leader too."""
    yield from stackelberg(leader, follower, optimizer, batch, full_loss(args))


def heads_first(leader, follower, optimizer, batch: Batch, args: Args):
    """A, the roles of SCORER (arXiv 2508.07452): the heads lead, perception follows, from the same forward pass."""
    full = full_loss(args)
    for minibatch in minibatches(batch, args, args.update_epochs):
        features, cost = perceive(leader, minibatch.obs, args)
        loss, info = follower_loss(*follower(features.detach()), minibatch, args)
        info["losses/grad_norm"] = descend(optimizer, loss, args, [follower])
        loss, leader_info = leader_loss(*follower(features), cost, minibatch, full)
        yield info | leader_info | {"leader/grad_norm": descend(optimizer, loss, args, [leader])}


def commit(leader, follower, optimizer, batch: Batch, args: Args):
    """B: the leader takes one or two passes, up to a limit on the KL that they cause. Then it stays for the rollout:
    its features are computed once, and the follower takes all its epochs on them."""
    steps = 0
    for minibatch in minibatches(batch, args, args.leader_epochs):
        features, cost = perceive(leader, minibatch.obs, args)
        logits, values = follower(features)
        log_ratio = action_distribution(logits).log_prob(minibatch.actions).detach() - minibatch.logprobs  # (B,)
        kl = (log_ratio.expm1() - log_ratio).mean()  # the follower has not moved: all of it is the leader's doing
        if kl > args.leader_max_kl:
            break
        loss, info = leader_loss(logits, values, cost, minibatch, args)
        yield info | {"leader/grad_norm": descend(optimizer, loss, args, [leader])}
        steps += 1
    yield {"leader/kl": kl, "leader/steps": torch.tensor(float(steps))}
    yield from answer(follower, optimizer, show(leader, batch.obs), batch, args, args.update_epochs)


def value_phase(leader, follower, optimizer, batch: Batch, args: Args):
    """D: Algorithm 1, and a phase in which perception alone learns."""
    yield from stackelberg(leader, follower, optimizer, batch, args)
    yield from phase(leader, follower, optimizer, batch, args, [leader])


def ppg(leader, follower, optimizer, batch: Batch, args: Args):
    """D's control, PPG on one network: PPO whose value error stops at the encoder, and a phase in which all learn."""
    yield from joint(leader, follower, optimizer, batch, args, stop_value=True)
    yield from phase(leader, follower, optimizer, batch, args, [leader, follower])


def phase(leader, follower, optimizer, batch: Batch, args: Args, players: list):
    """D: every --phase-interval rollouts `players` learn the values of all of them, under a KL penalty to the policy
    of before: the auxiliary phase of PPG (Cobbe et al. 2021, arXiv 2009.04416), with the same optimizer."""
    rollouts = vars(leader).setdefault("rollouts", [])  # gathered for a phase; no checkpoint holds them, see main
    rollouts.append(batch)
    if len(rollouts) < args.phase_interval:
        return
    data = Batch(*map(torch.cat, zip(*rollouts)))
    rollouts.clear()
    old = follower(show(leader, data.obs))[0].detach()  # (B, A)
    for minibatch in minibatches(data._replace(logprobs=old), args, args.phase_epochs):
        logits, values = follower(leader(minibatch.obs))
        error = ((values - minibatch.returns) ** 2).mean()
        kl = kl_divergence(action_distribution(minibatch.logprobs), action_distribution(logits)).mean()
        descend(optimizer, args.vf_coef * error + args.phase_kl_coef * kl, args, players)
        yield {"phase/value_loss": error.detach(), "phase/kl": kl.detach()}


def gradient(output, inputs: list, **options) -> torch.Tensor:
    """One vector for all inputs, zeros for those that do not matter."""
    parts = torch.autograd.grad(output, inputs, retain_graph=True, materialize_grads=True, **options)
    return torch.cat([part.flatten() for part in parts])


def fisher_product(logits: torch.Tensor, phi: list, damping: float):
    """x -> (F + damping·I) x, F the Fisher matrix in `phi` of the policies `logits` (B, A): the Hessian of their KL."""
    kl = kl_divergence(action_distribution(logits.detach()), action_distribution(logits)).mean()
    slope = gradient(kl, phi, create_graph=True)
    return lambda x: gradient(slope.dot(x), phi) + damping * x


def anticipate(leader, follower, loss, logits, values, batch: Batch, args: Args, damping: float = 5.0):
    """F: a loss whose gradient in θ is ∂f_L/∂θ - M (F + λI)⁻¹ ∂f_L/∂φ, M = ∇²_θφ f_F, the correction scaled down to the
    length of the direct gradient ∂f_L/∂θ where it is longer. Returns (loss, that scale)."""
    theta, phi = list(leader.parameters()), list(follower.parameters())
    slope = gradient(follower_loss(logits, values, batch, args)[0], phi, create_graph=True)  # ∂f_F/∂φ
    x = base.conjugate_gradients(fisher_product(logits, phi, damping), gradient(loss, phi), 10, 1e-3)
    direct, correction = gradient(loss, theta).norm(), gradient(slope.dot(x), theta).norm()
    scale = (direct / correction.clamp_min(1e-30)).clamp(max=1)
    return loss - scale * slope.dot(x), scale


def fisher(leader, follower, optimizer, batch: Batch, args: Args):
    """F: Algorithm 1 in which the leader anticipates the follower's answer."""
    yield from stackelberg(leader, follower, optimizer, batch, args, total=True)


def frozen(leader, follower, optimizer, batch: Batch, args: Args):
    """Control: the heads learn on a random encoder. Where this does as well, perception has nothing to learn."""
    yield from answer(follower, optimizer, show(leader, batch.obs), batch, args, args.update_epochs)


# ==== Main ========================================================================================
def update(leader, follower, optimizer, batch: Batch, args: Args) -> dict[str, float]:
    """As in sprig_atari.py: means over the steps, by tag. Raises FloatingPointError if one is not finite."""
    history = list(globals()[args.variant.replace("-", "_")](leader, follower, optimizer, batch, args))
    tags = dict.fromkeys(tag for info in history for tag in info)
    metrics = {tag: torch.stack([info[tag] for info in history if tag in info]).mean() for tag in tags}
    for name, value in (*metrics.items(), *leader.named_parameters(), *follower.named_parameters()):
        if not value.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
    return {tag: mean.item() for tag, mean in metrics.items()}


def main(args: Args) -> dict:
    """From now on sprig_atari is, in this process, this fork."""
    if args.resume is not None and args.variant in ("value-phase", "ppg"):
        step = base.load(Path(args.resume) / "checkpoint.pt", {})["step"]
        if step % (args.phase_interval * args.num_envs * args.num_steps):
            base.fail(f"{args.resume} holds no rollouts gathered for the next phase; begin {args.variant} anew")
    base.Args, base.update, base.__file__ = Args, update, __file__
    return base.main(args)


if __name__ == "__main__":
    base.SprigArgs, base.Args, base.__file__ = VariantArgs, Args, __file__  # what parse_args reads
    main(base.parse_args())
