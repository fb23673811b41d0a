"""evaluate: full unclipped games, seeds, intervals that cover."""
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from atari_hrvq.core import BookError
from atari_hrvq.evaluate import RandomAgent, bootstrap_difference, bootstrap_interval, check_full_game, evaluate, human_normalised, iqm, steps_to_reach, tournament, value_calibration
from atari_hrvq.frames import make_env
from atari_hrvq.ppo import realised


def test_same_seed_same_games_and_other_seed_other_games():
    a, b, c = (evaluate(RandomAgent(), 'ms_pacman', 2, seed=s, max_steps=120) for s in (1, 1, 2))
    assert a == b != c


def test_a_match_is_the_same_wherever_it_is_played():
    matches = {(name, g): (RandomAgent(), g, False, n) for g in ('pong', 'breakout') for name, n in (('short', 20), ('long', 40))}
    here, there = tournament(matches, 2, seed=5), tournament(matches, 2, seed=5, workers=2)
    assert list(here) == list(there) == list(matches) and here == there
    assert here['long', 'pong'] == evaluate(RandomAgent(), 'pong', 2, seed=5, max_steps=40) and [e['steps'] for e in there['short', 'pong']] == [20, 20]


def test_a_whole_game_of_breakout_is_five_lives_unclipped():
    game, = evaluate(RandomAgent(), 'breakout', 1, seed=0)
    assert game['finished'] and game['return'] == int(game['return']) and game['steps'] > 50


@pytest.mark.parametrize('env', [lambda: make_env('breakout', life_loss_ends=True), lambda: gym.wrappers.TransformReward(make_env('pong'), np.sign)])
def test_other_environments_are_refused(env):
    with pytest.raises(AssertionError): check_full_game(env())


@pytest.mark.parametrize('statistic', [np.mean, iqm])
def test_intervals_cover_at_the_nominal_rate(statistic):
    rng = np.random.default_rng(0)
    hits = [lo <= 1 <= hi for i in range(300) for _, lo, hi in [bootstrap_interval({g: rng.normal(1, s, 30) for g, s in (('a', 1), ('b', 2), ('c', .5))}, statistic, 200, seed=i)]]
    assert .90 <= np.mean(hits) <= .99


def test_the_interval_of_a_difference_covers_at_the_nominal_rate():
    rng = np.random.default_rng(1)
    hits = [lo <= 2 <= hi for i in range(300) for _, lo, hi in [bootstrap_difference(rng.normal(3, 1, 30), rng.normal(1, 2, 20), i, 200)]]
    assert .90 <= np.mean(hits) <= .99


def test_steps_to_reach_a_score():
    curve = [np.nan, 2., 1., 4.]
    assert [steps_to_reach([1, 2, 3, 4], curve, x) for x in (1.5, 3., 5.)] == [2, 4, None]


def test_bootstrap_keeps_the_weight_of_each_game():
    _, lo, hi = bootstrap_interval({'a': [0.] * 5, 'b': [1.] * 5})
    assert lo == hi == .5


def test_an_episode_that_is_cut_says_so():
    cut, = evaluate(RandomAgent(), 'pong', 1, seed=0, max_steps=40)
    assert cut['steps'] == 40 and not cut['finished']


def test_reference_scores():
    assert human_normalised('ms_pacman', 6951.6) == 1 and human_normalised('breakout', 1.7) == 0


@pytest.mark.parametrize('call, message', [(lambda: human_normalised('tetris', 0), 'unknown game'), (lambda: evaluate(RandomAgent(), 'pong', 0), 'episodes must be positive'), (lambda: bootstrap_interval({}), 'at least one score'), (lambda: bootstrap_difference([], [1.]), 'at least one score')])
def test_bad_input(call, message):
    with pytest.raises(BookError, match=message): call()


def test_a_critic_that_knows_is_told_from_one_that_guesses():
    rng = np.random.default_rng(0)
    def game(know):
        paid, lost = rng.choice([0., 1.], 200, p=[.9, .1]), rng.random(200) < .02
        true = realised(paid, lost, .9)
        return {'finished': True, 'paid': paid.tolist(), 'lost': lost.tolist(), 'values': (true + .5 if know else rng.permutation(true)).tolist()}
    rows, r, lo, hi, bias = value_calibration([game(True) for _ in range(6)], .9)
    assert r > .999 and lo <= r <= hi + 1e-9 and abs(bias - .5) < 1e-9 and sum(n for _, _, n in rows) == 1200 and all(abs(v - g - .5) < 1e-9 for v, g, _ in rows)
    _, r, lo, hi, _ = value_calibration([game(False) for _ in range(6)], .9)
    assert lo < .05 and abs(r) < .2
    with pytest.raises(BookError, match='max_steps'): value_calibration([{**game(True), 'finished': False}], .9)


def test_an_evaluation_keeps_what_the_critic_said_and_which_steps_lost_a_life():
    game, = evaluate(RandomAgent(), 'breakout', 1, seed=0)
    assert len(game['values']) == len(game['paid']) == len(game['lost']) == game['steps'] and sum(game['lost']) == 5 and game['lost'][-1]
    assert sum(game['paid']) <= game['return'] and set(game['paid']) <= {0., 1.}
