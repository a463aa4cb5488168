"""The twins differ by the algorithm alone, in text and in numbers."""

import copy
import functools
import re

import pytest
import torch
from conftest import CONTINUOUS, ROOT, TWINS, build, random_batch

import ppo_atari_baseline as ppo
import sprig_atari as sprig

BANNERS = [
    "Arguments", "Environment", "Leader", "Follower", "Rollout", "Advantages",
    "Losses", "Update", "Logging", "Evaluation", "Checkpoint", "Main", "Checks",
]  # fmt: skip
ALGORITHM = ("Arguments", "Leader", "Losses", "Update", "Checks")  # where the twins differ


def sections(path):
    """Banner -> text below it. What follows Main's "Checks and set-up" line has that line's first word for a banner."""
    parts = re.split(r"^# (?:=+\n# (\w+)\n# =+|-- (Checks) and set-up .*)\n", path.read_text(), flags=re.MULTILINE)
    return {a or b: text for a, b, text in zip(parts[1::3], parts[2::3], parts[3::3])}


FAMILIES = {"atari": list(TWINS), "continuous": list(CONTINUOUS)}


@pytest.mark.parametrize("name", [*TWINS, *CONTINUOUS])
def test_banners_stand_in_the_agreed_order(name):
    assert list(sections(ROOT / f"{name}.py")) == BANNERS


def definitions(name, banner):
    """Top-level definition -> its text."""
    text = sections(ROOT / f"{name}.py")[banner]
    return dict(re.findall(r"^((?:def|class) \w+)(.*?)(?=^\S|\Z)", text, re.M | re.S))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("banner", [b for b in BANNERS if b not in ALGORITHM])
def test_shared_sections_are_the_same_text(banner, family):
    a, b = (sections(ROOT / f"{name}.py")[banner] for name in FAMILIES[family])
    assert a == b


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("banner", ["Arguments", "Losses", "Update", "Checks"])
def test_sprig_keeps_every_top_level_definition_of_ppo(banner, family):
    """What both define is the same text, except where the algorithm is."""
    ppo_has, sprig_has = (definitions(name, banner) for name in FAMILIES[family])
    algorithm = {"class Args", "def check_args", "def learner_rewards", "def update", "def make_optimizer"}
    for key, text in ppo_has.items():
        assert key in sprig_has
        if key not in algorithm:
            assert sprig_has[key].rstrip() == text.rstrip(), key


@pytest.mark.parametrize("names", zip(TWINS, CONTINUOUS), ids=["ppo", "sprig"])
@pytest.mark.parametrize("banner", ["Rollout", "Advantages", "Losses", "Logging", "Evaluation", "Checkpoint"])
def test_continuous_shares_whole_sections_with_atari(banner, names):
    a, b = (sections(ROOT / f"{name}.py")[banner] for name in names)
    assert a == b


@pytest.mark.parametrize("names", zip(TWINS, CONTINUOUS), ids=["ppo", "sprig"])
def test_continuous_differs_from_atari_by_the_normaliser_alone(names):
    atari, continuous = (sections(ROOT / f"{name}.py")["Main"].splitlines() for name in names)
    assert atari == [line for line in continuous if "leader.normaliser." not in line]
    assert len(continuous) - len(atari) == 3
    for banner in ("Update", "Checks"):
        atari, continuous = (definitions(name, banner) for name in names)
        for key, text in atari.items():
            if key not in ("class Args", "def check_args", "def learner_rewards"):
                # The encoder in bfloat16 is for convolutions.
                text = "".join(line for line in text.splitlines(keepends=True) if '== "bfloat16"' not in line)
                assert continuous[key].rstrip() == text.rstrip(), key
    atari, continuous = (definitions(name, "Leader") for name in names)
    assert continuous.get("def attention_rows") == atari.get("def attention_rows")


def test_sprig_has_every_flag_of_ppo_with_the_same_default():
    assert vars(ppo.Args()).items() <= vars(sprig.Args()).items()
    ppo_continuous, sprig_continuous = CONTINUOUS.values()
    limit = {"target_kl": 0.015}  # SPRIG's alone, see docs/paper.md
    assert (vars(ppo_continuous.Args()) | limit).items() <= vars(sprig_continuous.Args()).items()
    assert vars(sprig.Args()).keys() ^ vars(sprig_continuous.Args()).keys() == {"norm_obs", "norm_rewards"}


@pytest.mark.parametrize("norm_adv", ["rollout", "minibatch"])
def test_joint_update_is_bit_identical_to_the_baselines(norm_adv):
    args = {"minibatch_size": 8, "update_epochs": 2, "norm_adv": norm_adv, "max_grad_norm": 0.1}
    sprig_args, ppo_args = sprig.Args(update="joint", **args), ppo.Args(**args)
    leader, follower, *_ = build(sprig, sprig_args)  # the attention encoder, in both
    batch = random_batch(sprig, leader, follower)
    results = []
    for script, script_args in ((sprig, sprig_args), (ppo, ppo_args)):
        players = copy.deepcopy((leader, follower))
        optimizers = [torch.optim.Adam(p.parameters(), lr=1e-3, eps=1e-5, fused=True) for p in players]
        torch.manual_seed(7)
        info = script.update(*players, *optimizers, script.Batch(*batch), script_args)
        results.append((players, info))
    for a, b in zip(results[0][0], results[1][0]):
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            assert torch.equal(p, q), name
    assert results[1][1].items() <= results[0][1].items()
    assert not torch.equal(results[0][0][0].convs[0].weight, leader.convs[0].weight), "nothing was trained"


@pytest.mark.parametrize("update", ["stackelberg", "joint"])
def test_ten_steps_of_one_vector_are_those_of_a_tensor_each(script, update):
    """make_optimizer and descend against PyTorch's own Adam and clipping on separate tensors."""
    game = {"update": update} if hasattr(script.Args, "update") else {}
    args = script.Args(max_grad_norm=0.1, learning_rate=1e-4, **game)
    leader, follower, *_ = build(script, args)
    batch = random_batch(script, leader, follower, 8)
    start = [p.clone() for player in (leader, follower) for p in player.parameters()]
    results = []
    for one_vector in (True, False):
        players = copy.deepcopy((leader, follower))
        adam = functools.partial(torch.optim.Adam, lr=1e-4, eps=1e-5)
        optimizers = [script.make_optimizer(p, args) if one_vector else adam(p.parameters()) for p in players]

        def plainly(optimizers, gradients, max_norm, **players):
            parameters = [p for player in players.values() for p in player.parameters()]
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            for optimizer in optimizers:
                optimizer.step()
            return norm

        torch.manual_seed(7)  # the rows that the cost samples
        with pytest.MonkeyPatch.context() as patch:
            if not one_vector:
                patch.setattr(script, "descend", plainly)
            step = script.joint_step if update == "joint" or not game else script.stackelberg_step
            norms = [step(*players, *optimizers, batch, args)["losses/grad_norm"] for _ in range(10)]
        assert max(norms) > args.max_grad_norm, "nothing was clipped"
        results.append([p for player in players for p in player.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert max((a - b).abs().max() for a, b in zip(results[0], start)) > 5e-4, "nothing was trained"


def test_target_kl_stops_between_epochs(script):
    args = script.Args(minibatch_size=8, update_epochs=50, learning_rate=1e-3, target_kl=1e-3)
    leader, follower, *optimizers = build(script, args)
    batch = random_batch(script, leader, follower)
    script.update(leader, follower, *optimizers, batch, args)
    steps = {int(state["step"]) for state in optimizers[1].state.values()}
    assert max(steps) < 200 and max(steps) % 4 == 0, "50 epochs are 200 steps"
