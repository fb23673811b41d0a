"""evaluate: full unclipped games, seeds, intervals that cover."""
import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from atari_hrvq import evaluate as module
from atari_hrvq.core import BookError
from atari_hrvq.evaluate import RandomAgent, bootstrap_difference, bootstrap_interval, check_full_game, cool, decisive, evaluate, human_normalised, iqm, steps_to_reach, tournament, value_calibration, what_if
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


@pytest.mark.parametrize('call, message', [(lambda: human_normalised('tetris', 0), 'unknown game'), (lambda: evaluate(RandomAgent(), 'pong', 0), 'episodes must be positive'), (lambda: bootstrap_interval({}), 'at least one score'), (lambda: bootstrap_difference([], [1.]), 'at least one score'),
                                           (lambda: cool(RandomAgent(), ['pong'], (1., 0.)), 'temperatures above 0'), (lambda: what_if(None, 'pong', follow='dreams', ask=('game',)), 'whose advice'), (lambda: what_if(None, 'pong', draws=0), '1 or more'), (lambda: what_if(None, 'pong', ask=('tea',)), 'unknown asked')])
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


def test_the_best_temperature_of_each_game_is_kept(monkeypatch):
    class Player: games, temperature = ['pong', 'breakout'], {'pong': .9}
    best, seen = {'pong': .5, 'breakout': 1.}, []
    def play(agent, game, episodes, seed, max_steps, desc):
        seen.append(seed)
        return [{'return': -abs(agent.temperature[game] - best[game]) + i, 'steps': 10, 'finished': i > 0} for i in range(episodes)]
    monkeypatch.setattr(module, 'evaluate', play)
    rows = cool(player := Player(), episodes=3, temperatures=(1., .5))
    assert player.temperature == best and [(r['game'], r['temperature'], r['kept']) for r in rows] == [('pong', 1., False), ('pong', .5, True), ('breakout', 1., True), ('breakout', .5, False)]
    assert all(r['steps'] == 30 and r['cut short'] == 1 and r['lo'] <= r['score'] <= r['hi'] for r in rows) and set(seen) == {module.derive(0, 'cool')} != {0}
    def stop(agent, game, *rest, **more):
        if game == 'breakout': raise KeyboardInterrupt
        return play(agent, game, *rest, **more)
    monkeypatch.setattr(module, 'evaluate', stop)
    player.temperature = {'pong': .9}
    with pytest.raises(KeyboardInterrupt): cool(player, episodes=3, temperatures=(1., .5))
    assert player.temperature == {'pong': .9}            # a trial that was stopped leaves it as it was


class Twin:
    "A player of one game whose memory is what it was shown."
    def __init__(self, n): self.codes = self.actions = self.game = self.heat = torch.zeros(n, 1); self.mask, self.shown = torch.ones(n, 18), []
    def remember(self, frames, restart): self.shown.append((self.previous.clone(), frames.copy()))
    def opinion(self): return torch.zeros(len(self.codes), 18), torch.zeros(len(self.codes))
    def paid(self, game, reward): return 2 * reward


def test_twins_go_on_where_their_game_is_and_leave_it_alone():
    *envs, twin = (make_env('breakout', stack=0) for _ in range(3))
    for i, env in enumerate(envs):
        env.reset(seed=i)
        for t in range(30 + 20 * i): env.step(1 if t % 9 == 0 else 3)
    twin.reset(seed=9)
    world = module._Twins(Twin(2), envs, twin, torch.tensor([0, 0, 1, 1]), 'breakout')
    moves = [torch.tensor(x) for x in ([3, 4, 3, 4], [1, 1, 1, 1], *[[0, 4, 0, 4]] * 60)]
    told = [world.step(a) for a in moves]
    for row, env in ((0, envs[0]), (2, envs[1])):                       # the games themselves, which nobody touched, now do the same
        alive = True
        for k, a in enumerate(moves):
            if not alive: assert not any(x[row] for x in told[k]) and not world.agent.shown[k][1][row].any(); continue
            frame, reward, terminated, _, info = env.step(int(a[row]))
            assert (world.agent.shown[k][1][row] == frame[None]).all() and told[k][0][row] == 2 * reward and bool(told[k][1][row]) == (info['life_lost'] or terminated) == bool(told[k][2][row])
            alive = not told[k][1][row]
        assert not alive


def test_what_moves_lead_to_by_hand():
    "Two states, two moves: the first move pays 1 and ends the life with .5, the second pays nothing; later steps pay 1 in the second state only."
    class World:
        t = 0
        def step(self, act):
            self.t, state = self.t + 1, torch.arange(len(act)) // (len(act) // 2)
            if self.t == 1: return (act == 0).float(), (act == 0) * .5, (act == 0) * .5
            return state.float(), torch.zeros(len(act)), torch.zeros(len(act))
        def opinion(self): return torch.tensor([[9., -1e9]]).expand(12, 2), torch.full((12,), 4.)
    q, lost = module._futures(World(), torch.tensor([0, 1]), 2, 3, 3, .5, torch.Generator().manual_seed(0))
    assert np.allclose(lost, [[.5, 0], [.5, 0]]) and np.allclose(q, [[1 + .5 * .5, .5], [1 + .5 * (.5 + .25 + .5), .75 + .5]])


def test_decisive_states_say_what_the_advice_of_dreams_is_worth():
    lost = np.array([[0., 1.], [1., 0.], [.2, .3], [1., 0.]])
    told = {'lost_game': lost, 'policy': np.array([[.5, .5]] * 4), 'life': np.array([0, 1, 1, 2]), 'lost_dreams': lost * .5 + .1}
    r = decisive(told)
    assert (r['states'], r['decisive'], r['policy'], r['random'], r['dreams'], r['best']) == (4, 3, .5, .5, 0., 0.) and abs(r['correlation'] - 1) < 1e-9 and abs(r['lo'] - 1) < 1e-9
    assert decisive({**told, 'lost_dreams': 1 - lost})['dreams'] == 1 and decisive({**told, 'lost_dreams': 1 - lost})['correlation'] < -.999
    assert abs(r['danger'] - 1) < 1e-9 and decisive({**told, 'lost_dreams': .6 - lost * .5})['danger'] < -.999
    none = decisive({**told, 'lost_game': lost * 0})
    assert none['decisive'] == 0 and np.isnan([none[k] for k in ('policy', 'dreams', 'best', 'correlation', 'lo', 'danger')]).all()
