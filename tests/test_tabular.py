"""What section 5 of the paper claims of T_S, what it does not, and the script that shows both."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import sprig_tabular as tabular
from sprig_tabular import TabularMdp, global_equilibrium, solve, stackelberg_bellman


def random_game(seed, num_states, lam=0.0, follower="cooperative", num_actions=2, live=False, max_cost=1, gamma=None):
    """((MDP, perceptions, costs of either sign, λ, follower), rng): zeros in P and, unless `live`, terminations."""
    rng = np.random.default_rng(seed)
    P = rng.random((num_states, num_actions, num_states)) * (rng.random((num_states, num_actions, num_states)) < 0.7)
    P[..., 0] += 1e-3  # no row is empty before some of them end the game
    P /= P.sum(-1, keepdims=True)
    P *= 1 if live else rng.choice([0, 0.5, 1], size=(num_states, num_actions, 1))
    mdp = TabularMdp(P, rng.normal(size=(num_states, num_actions)), rng.uniform(0.1, 0.95) if gamma is None else gamma)
    cells = rng.integers(0, num_states, size=(3, num_states))
    return (mdp, cells, rng.uniform(-max_cost, max_cost, size=(3, num_states)), lam, follower), rng


seeds, sizes, followers = st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from(["cooperative", "adversarial"])


def properties(*strategies):
    return lambda test: settings(max_examples=80, deadline=None, derandomize=True)(given(*strategies)(test))


any_game = properties(st.builds(random_game, seeds, sizes, st.floats(0, 2), followers))


def largest(x):
    return np.abs(x).max()


@properties(st.builds(random_game, seeds, st.integers(1, 4), st.floats(0, 2), followers, st.integers(1, 3)))
def test_operator_is_its_definition_by_enumeration(case):
    (mdp, perceptions, costs, lam, follower), rng = case
    q = rng.normal(size=mdp.R.shape)
    expected, choose = np.full(q.shape, -np.inf), {"cooperative": max, "adversarial": min}[follower]
    for (s, a), (cells, cost) in itertools.product(np.ndindex(q.shape), zip(perceptions, costs)):
        futures = [  # every map from cells to actions, written out
            sum(mdp.P[s, a, t] * q[t, answer[cells[t]]] for t in range(len(q)))
            for answer in itertools.product(range(q.shape[1]), repeat=int(cells.max()) + 1)
        ]
        expected[s, a] = max(expected[s, a], mdp.R[s, a] - lam * cost[s] + mdp.gamma * choose(futures))
    np.testing.assert_allclose(stackelberg_bellman(q, mdp, perceptions, costs, lam, follower), expected, atol=1e-12)
    small = perceptions.astype(np.uint8) + np.uint8(255 - perceptions.max())  # must not overflow
    np.testing.assert_allclose(stackelberg_bellman(q, mdp, small, costs, lam, follower), expected, atol=1e-12)


@properties(seeds, sizes, followers, st.booleans(), st.floats(0, 1e4), st.floats(0, 10))
def test_contraction_whatever_the_cost_and_sharp_where_nothing_ends(seed, num_states, follower, live, max_cost, lam):
    game, rng = random_game(seed, num_states, lam, follower, live=live, max_cost=max_cost)
    mdp, rounding = game[0], 1e-12 * (1 + lam * max_cost)
    f, g = rng.normal(size=(2, *mdp.R.shape))
    image = stackelberg_bellman(f, *game)
    assert largest(image - stackelberg_bellman(g, *game)) <= mdp.gamma * largest(f - g) + rounding
    above = f + rng.exponential(size=f.shape)  # monotone: a larger f has no smaller image
    assert (stackelberg_bellman(above, *game) >= image - rounding).all()
    worst = mdp.gamma * mdp.P.sum(-1).max()  # γ itself if some (s, a) never ends the game
    assert largest(image - stackelberg_bellman(f + 3, *game)) == pytest.approx(3 * worst, abs=rounding)


@any_game
def test_one_fixed_point_and_the_error_bounds(case):
    game, rng = case
    gamma, (f, residuals) = game[0].gamma, solve(*game, tol=1e-12)
    assert largest(stackelberg_bellman(f, *game) - f) < 1e-11
    assert largest(solve(*game, 1e-12, rng.normal(scale=100, size=f.shape))[0] - f) < 1e-11
    assert (residuals[1:] <= gamma * residuals[:-1] + 1e-12).all()
    assert largest(solve(*game, tol=1e-3)[0] - f) <= 1e-3
    q = inexact = rng.normal(size=f.shape)
    distance, first, epsilon = largest(q - f), largest(stackelberg_bellman(q, *game) - q), rng.uniform()
    for n in range(1, 10):
        previous, q = q, stackelberg_bellman(q, *game)
        assert largest(q - f) <= gamma**n * distance + 1e-10  # Eq. (14)
        assert largest(q - f) <= gamma**n / (1 - gamma) * first + 1e-10
        assert largest(q - f) <= gamma / (1 - gamma) * largest(q - previous) + 1e-10
        inexact = stackelberg_bellman(inexact, *game) + rng.choice([-epsilon, epsilon], size=f.shape)
        assert largest(inexact - f) <= gamma**n * distance + epsilon * (1 - gamma**n) / (1 - gamma) + 1e-10


@properties(seeds, sizes, followers, st.floats(0, 3), st.floats(0, 3))
def test_fixed_point_falls_with_the_price_and_is_lipschitz_in_it(seed, num_states, follower, low, rise):
    (mdp, perceptions, costs, *_), _ = random_game(seed, num_states)
    cheap, dear = (solve(mdp, perceptions, np.abs(costs), lam, follower, 1e-11)[0] for lam in (low, low + rise))
    bound = rise * largest(costs) / (1 - mdp.gamma)
    assert (cheap - dear >= -1e-10).all() and (cheap - dear <= bound + 1e-10).all()


@any_game
def test_a_fixed_choice_attains_the_fixed_point_and_a_greedy_one_loses_no_more_than_its_bound(case):
    game, rng = case
    mdp, perceptions, costs, lam, follower = game
    fixed_point, _ = solve(*game, tol=1e-12)
    states, choose = np.arange(len(fixed_point)), np.argmax if follower == "cooperative" else np.argmin
    for scale in (0.0, 0.3, 3.0):
        f = fixed_point + rng.uniform(-scale, scale, size=fixed_point.shape)
        k = tabular.make_operator(*game)(f).argmax(axis=0)  # (S, A) what T_S f picks
        transitions = np.zeros((*f.shape, *f.shape))  # the MDP over (s, a) that T_S is of
        for s, a in np.ndindex(f.shape):
            cells = perceptions[k[s, a]]
            answer = {z: choose(mdp.P[s, a, cells == z] @ f[cells == z]) for z in set(cells)}
            transitions[s, a, states, [answer[z] for z in cells]] = mdp.P[s, a]
        flow = np.eye(f.size) - mdp.gamma * transitions.reshape(f.size, f.size)
        attained = np.linalg.solve(flow, (mdp.R - lam * costs[k, states[:, None]]).ravel())
        bound = 2 * mdp.gamma * largest(f - fixed_point) / (1 - mdp.gamma)  # at scale 0: it is attained
        assert largest(fixed_point.ravel() - attained) <= bound + 1e-9


@any_game
def test_what_perception_is_worth_by_each_reading(case):
    (mdp, cells, costs, lam, _), rng = case
    cells[0], costs[0] = 0, costs.min(axis=0)  # blind, and no dearer than any other
    cells[1] = states = np.arange(len(mdp.R))  # identity
    every_state, operator = tabular.per_state(cells), tabular.make_operator
    per_state, cooperative, max_min = (
        solve(mdp, partitions, costs, lam, follower, tol=1e-11)[0]
        for partitions, follower in ((every_state, "cooperative"), (cells, "cooperative"), (cells, "adversarial"))
    )
    winners = tabular.cheapest_best(operator(mdp, every_state, costs, lam, "cooperative")(per_state), costs)
    assert (winners == 0).all(), "with an action per state the cheapest always wins"
    blind, _ = solve(mdp, cells[:1], costs[:1], lam, "adversarial", tol=1e-11)
    np.testing.assert_allclose(max_min, blind, atol=1e-9, err_msg="max-min pays for sight")
    assert (max_min <= cooperative + 1e-9).all() and (cooperative <= per_state + 1e-9).all()
    sure = TabularMdp(np.eye(len(states))[rng.choice(states, size=mdp.R.shape)], mdp.R, mdp.gamma)
    for game, price in ((mdp, 0.0), (sure, lam)):  # for nothing, or if nothing is random, f* is the ordinary optimum
        pair = (solve(game, partitions, costs, price, tol=1e-11)[0] for partitions in (cells, every_state))
        np.testing.assert_allclose(*pair, atol=1e-9)


def worth(mdp, cost, lam, policy):
    """(S,) of one perception of this cost (S,) and a policy (S, A), the probability of each action, for ever."""
    reward = ((mdp.R - lam * np.array(cost)[:, None]) * policy).sum(axis=1)
    return np.linalg.solve(np.eye(len(policy)) - mdp.gamma * np.einsum("sa,sat->st", policy, mdp.P), reward)


@properties(seeds, st.integers(1, 12), st.integers(1, 3))
def test_whole_game_equals_enumeration_and_is_bounded_by_the_fixed_point(seed, num_states, num_actions):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(num_states, 0.1), size=(num_states, num_actions)) * rng.choice([0.8, 1])
    mdp = TabularMdp(P, rng.normal(size=(num_states, num_actions)), 0.95)
    perceptions, costs = rng.integers(0, 5, size=(2, num_states)), rng.uniform(-0.1, 0.1, size=(2, num_states))
    start, game = rng.dirichlet(np.ones(num_states)), (mdp, perceptions, costs, 1.0)
    k, answer, value = global_equilibrium(*game, start)
    actions = np.eye(mdp.R.shape[1])
    every = [
        start @ worth(mdp, cost, 1.0, np.array(answers)[cells])
        for cells, cost in zip(perceptions, costs)
        for answers in itertools.product(actions, repeat=int(cells.max()) + 1)
    ]
    assert value == pytest.approx(max(every), abs=1e-7)
    assert value == pytest.approx(start @ worth(mdp, costs[k], 1.0, actions[answer[perceptions[k]]]), abs=1e-8)
    assert value <= start @ solve(*game, tol=1e-11)[0].max(axis=1) + 1e-8
    try:
        assert global_equilibrium(*game, start, max_nodes=2)[2] == pytest.approx(value)
    except ValueError as refusal:  # cut short, its bounds hold the value (they have 5 digits)
        low, high = json.loads(str(refusal).split(" in ")[1])
        assert low - 1e-3 <= value <= high + 1e-3


def test_whole_game_with_the_identity_is_an_mdp_and_needs_one_node_and_one_that_is_too_large_is_refused():
    (mdp, *_), _ = random_game(3, 60, num_actions=4, live=True, gamma=0.95)
    identity = np.arange(60)[None]
    best = solve(mdp, identity, 0.0 * identity, 0.0, tol=1e-11)[0][5].max()
    assert global_equilibrium(mdp, identity, 0.3 * (identity > 0), 0.0, 5, max_nodes=1)[2] == pytest.approx(best)
    with pytest.raises(ValueError, match=r"not found within 50 nodes; its value lies in \["):
        global_equilibrium(mdp, identity // 3, 0.0 * identity, 0.0, 5, max_nodes=50)


def test_counter_examples_have_the_values_worked_out_by_hand():
    games, loop = tabular.counter_examples(), 1 - 0.9**3
    records = {name: tabular.readings(*game, tol=1e-12) for name, game in games.items()}
    values = {name: [part["value"] for part in list(record.values())[1:]] for name, record in records.items()}
    # by T_S, an action per state, max-min, one (θ, φ): the fork pays 1 a step later, unseen half as often
    assert values["fork"] == pytest.approx([0.9 - 0.1, 0.9, 0.45, 0.9 - 0.19])
    assert values["circuit"] == pytest.approx([0.8 / loop, 0.9 / loop, 0.45 / loop, (0.9 - 0.1 * 2.71) / loop])
    assert values["clock"][::3] + values["rooms"][::3] == pytest.approx(
        [1 / 0.1, 1 / (1 - 0.81), 1 / 0.1, 1 - 0.9 / 0.1]
    )
    assert [records["fork"][name]["shares"]["blind"] for name in ("T_S", "per state", "max-min")] == [0, 1, 1]
    mdp, (_, cells, costs), lam = games["fork"]
    targets = mdp.R[0, 0] - lam * costs[:, 0] + mdp.gamma * solve(mdp, cells, costs, lam)[0].max(axis=1)[:, None]
    assert mdp.P[0, 0] @ targets.max(axis=1) == pytest.approx(0.9)  # T_S from one sampled s', on average
    assert solve(mdp, cells[1:], costs[1:], 0.0, "adversarial")[0][0].max() == 0  # max-min where all is seen
    blind = [worth(mdp, costs[0], lam, np.eye(2)[[action] * 3])[0] for action in (0, 1)]  # the follower deviates
    seeing = worth(mdp, costs[1], lam, np.eye(2)[[0, 0, 0]])[0]  # the leader deviates
    assert [*blind, seeing] == pytest.approx([0.45, 0.45, 0.45 - 0.19])
    assert worth(games["rooms"][0], [0, 0], 0.0, np.full((2, 2), 0.5))[0] == pytest.approx(0)  # a coin
    mdp, (_, cells, costs), lam = games["circuit"]  # a θ that pays only where it is used reaches f* alone
    cells, costs = np.vstack([cells, cells[1]]), np.vstack([costs, [1, 0, 0, 0]])
    assert global_equilibrium(mdp, cells, costs, lam, 0)[::2] == pytest.approx((2, 0.8 / loop))
    # The first action ends the game, the second pays a little and stays, which costs perception at every step
    stay = TabularMdp([[[0], [1]]], [[0, 0.01]], 0.9), np.array([[0]]), np.array([[1.0]]), 0.1
    assert solve(*stay)[0][0].max() == pytest.approx(-0.1) == global_equilibrium(*stay, 0)[2]
    assert worth(stay[0], [1.0], 0.1, np.array([[0.0, 1]]))[0] == pytest.approx((0.01 - 0.1) / (1 - 0.9))


@pytest.mark.parametrize("env_id, num_states", [("FrozenLake-v1", 16), ("CliffWalking-v1", 48), ("Taxi-v4", 500)])
def test_table_is_the_environments_and_perceptions_go_from_blind_to_identity(env_id, num_states):
    mdp, env = tabular.toy_text_mdp(env_id, 0.99), tabular.make_env(env_id)
    assert mdp.P.shape == (num_states, env.action_space.n, num_states) and mdp.start.sum() == pytest.approx(1)
    _, _, costs = tabular.toy_text_perceptions(env)
    assert costs[0].max() == 0 and costs[-1].min() == 1 and (np.diff(costs[:, 0]) >= 0).all()
    state, rng = env.reset(seed=0)[0], np.random.default_rng(0)
    for _ in range(3000):  # what it does is what the table says
        action = int(rng.integers(env.action_space.n))
        next_state, reward, terminated, _, _ = env.step(action)
        assert mdp.P[state, action].sum() < 1 - 1e-9 if terminated else mdp.P[state, action, next_state] > 0
        assert mdp.P[state, action].max() < 1 - 1e-9 or reward == pytest.approx(mdp.R[state, action])
        state = env.reset()[0] if terminated else next_state


def test_numbers_of_the_paper_page():
    """docs/paper.md quotes these; 0.542 is FrozenLake's known optimum, 13 steps lead along the cliff."""
    for env_id, lam, fixed, whole, best in [
        ("FrozenLake-v1", 0.0, 0.542, 0.542, "identity"),
        ("FrozenLake-v1", 0.003, 0.504, 0.438, "identity"),
        ("FrozenLake-v1", 0.03, 0.176, 0.045, "blind"),
        ("CliffWalking-v1", 0.01, -np.sum(0.99 ** np.arange(13)), -12.37, "identity"),
    ]:
        mdp, perceptions = tabular.toy_text_mdp(env_id, 0.99), tabular.toy_text_perceptions(tabular.make_env(env_id))
        record = tabular.readings(mdp, perceptions, lam, tol=1e-8)
        assert (record["T_S"]["value"], record["whole game"]["value"]) == pytest.approx((fixed, whole), rel=5e-3)
        assert record["whole game"]["perception"] == best
    assert global_equilibrium(mdp, perceptions.cells[:1], perceptions.costs[:1], 0.01, 36)[2] == pytest.approx(-100)


def test_main_draws_prints_and_saves(tmp_path, capsys):
    args = tabular.Args(run_dir=str(tmp_path / "run"), lambdas=(0.0, 0.01, 1.0), num_pairs=20, gamma=0.9, tol=1e-8)
    results = tabular.main(args)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "run" / "tabular.png").read_bytes().startswith(b"\x89PNG")
    assert results["starts_differ"] < 1e-7 and max(results["factors"]["random"]) <= 0.9 + 1e-12
    for curve in results["errors"].values():
        assert (np.array(curve) <= curve[0] * 0.9 ** np.arange(len(curve)) + 2e-8).all()
    assert [row["lambda"] for row in results["sweep"]] == [0, 0.003, 0.01, 1]
    for row in results["sweep"]:
        values = [row[reading]["value"] for reading in ("max-min", "whole game", "T_S", "per state")]
        assert (np.diff(values) >= -1e-7).all()
    assert results["sweep"][-1]["whole game"]["perception"] == "blind"
    assert "FrozenLake-v1" in (printed := capsys.readouterr().out) and "circuit" in printed
    with pytest.raises(ValueError, match="is not empty; nothing was changed"):
        tabular.main(args)


def run_script(*flags, redirect="", script="sprig_tabular.py"):
    shell = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, str(ROOT / script), *flags]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    return subprocess.run(shell, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("redirect", ["", ">&-", "2>&-", ">/dev/full"])
def test_a_stdout_that_takes_nothing_loses_nothing(tmp_path, redirect):
    done = run_script("--run-dir", str(tmp_path), redirect=redirect)
    assert done.returncode == 0 and done.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "tabular.png"}


@pytest.mark.parametrize("name", ["sprig_tabular", "watch", "benchmark/run", "benchmark/plot", "benchmark/speed"])
def test_help_fits_a_terminal(name):
    lines = run_script("--help", script=f"{name}.py").stdout.replace(str(ROOT), "").splitlines()
    assert any("--lambdas" in line for line in lines) == (name == "sprig_tabular") and max(map(len, lines)) <= 80


def test_mistakes_are_answered_in_one_line(tmp_path):
    for flags, message in {
        "--env-id Taxi-v3": "Please use `Taxi-v4` instead",
        "--env-id Taxi-v4 --map-name 8x8": "unexpected keyword argument 'map_name'",
        "--gamma nan": "--gamma must be at least 0 and less than 1",
        "--lambdas 0 inf": "a price lies between 0 and 1e100, unlike inf",
    }.items():
        done = run_script(*flags.split(), "--run-dir", str(tmp_path / "run"))
        assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_arrays_that_make_no_game_are_refused():
    zeros, blind = np.zeros((2, 1)), np.zeros((1, 2), int)
    mdp = TabularMdp(np.zeros((2, 1, 2)), zeros, 0.9)
    for message, function, *arguments in [
        ("sum to at most 1", TabularMdp, np.ones((2, 1, 2)), zeros, 0.9),
        (r"must be \(K, 2\)", stackelberg_bellman, zeros, mdp, np.zeros((1, 3), int), blind, 0.1),
        ("not negative", stackelberg_bellman, zeros, mdp, blind - 1, blind, 0.1),
        ("must be finite", stackelberg_bellman, zeros, mdp, blind, np.array([[0, np.inf]]), 0.1),
        ("cooperative or adversarial", stackelberg_bellman, zeros, mdp, blind, blind, 0.1, "neutral"),
        ("q must be finite and of shape", stackelberg_bellman, zeros * np.nan, mdp, blind, blind, 0.1),
        ("start must be a state", global_equilibrium, mdp, blind, blind, 0.1, 2),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*arguments)
