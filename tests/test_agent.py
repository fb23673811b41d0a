"""agent: a small loop is the same twice and the same when interrupted; what it remembers can be played again."""
import copy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from atari_hrvq import agent as module, world as world_module
from atari_hrvq.agent import CONTEXT, LOOPS, NEWEST, Agent, Games, GameVectorEnv, Imitation, LoopConfig, both_see, by_depth, dreaming_on, first_play, fresh_agent, given_play, going_on, head, imitate, improve, join_tokens, learn, play, real_advantages, real_returns, remembered, replay_frames, returns_to_hold, study, train_agent, what_was_done, with_new_eyes
from atari_hrvq.dream import Contexts, observation_size
from atari_hrvq.core import PROFILES, BookError, Stage, derive, load_checkpoint, save_tree
from atari_hrvq.evaluate import what_if
from atari_hrvq.frames import LEGAL, make_env, MIRROR, MIRRORED, RandomPolicy, action_mask, collect, load_stored, mirrored, pack_replay, store_episodes
from atari_hrvq.hrvq import Tokenizer, TokenizerConfig
from atari_hrvq.ppo import PPO, PPOConfig, rollout, train_ppo
from atari_hrvq.world import Tokens, WorldModel, load_tokens, tokenise

GAMES = ('pong', 'breakout')
LOOP = LoopConfig(rounds=1, real_steps=24, envs=2, world_steps=3, iterations=2, tokenizer_steps=2, frames=8, dreams=6, horizon=4, batch=4, window=5, real_rows=12, real_actions=24, asked=.5)


@pytest.fixture(scope='module')
def parts():
    episodes = {g: collect(g, RandomPolicy(g), 90, 0) for g in GAMES}
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(games=GAMES, codes=16, channels=(4, 4), hidden=16, cell_dim=8)).eval()
    tokenizer.background.measure(episodes)
    frames = torch.from_numpy(np.concatenate([e.frames[:, None] for e in episodes.values()]))
    with torch.no_grad(): tokenizer.quantizer.start(tokenizer.features(frames)[0].flatten(0, 1))
    return tokenizer, episodes


def fresh(parts):
    torch.manual_seed(1)
    tokenizer = copy.deepcopy(parts[0])
    world = WorldModel.for_tokenizer(tokenizer, dim=16, heads=2, experts=(1, 2), windows=(2, 4), hidden=16, shared_hidden=4, cell_hidden=8)
    agent = Agent.fresh(tokenizer, world, hidden=16, context=3)
    return agent, PPO(agent.policy), {g: [e] for g, e in parts[1].items()}


def loop(parts, folder, config=LOOP):
    stage = Stage('10_agent', folder, 'smoke', GAMES, 0)
    agent, ppo, replay = fresh(parts)
    history, curves = learn(stage, agent, ppo, replay, config)
    state = {f'{n}.{k}': v for n in ('tokenizer', 'world', 'policy') for k, v in getattr(agent, n).state_dict().items()}
    return history, curves, state, {g: np.concatenate([e.actions for e in d]) for g, d in replay.items()}, stage, agent


def equal(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert all(torch.equal(x, b[2][k]) for k, x in a[2].items()) and all(np.array_equal(x, b[3][g]) for g, x in a[3].items())


@pytest.fixture(scope='module')
def whole(parts, tmp_path_factory): return loop(parts, tmp_path_factory.mktemp('whole'))


def test_same_seed_same_loop(parts, whole, tmp_path): equal(whole, loop(parts, tmp_path))


@pytest.mark.parametrize('steps', [0, 1])
def test_what_was_read_is_read_again_only_by_another_tokenizer(parts, tmp_path, monkeypatch, steps):
    counted = []
    monkeypatch.setattr(module, 'tokenise', lambda tokenizer, e: counted.append(len(e)) or tokenise(tokenizer, e))
    agent, _, replay = fresh(parts)
    stage, c, read = Stage('10_agent', tmp_path, 'smoke', GAMES, 0), replace(LOOP, world_steps=0, begin_world=0, tokenizer_steps=steps), {}
    study(stage, agent, replay, c, 0, 1, read)
    for g in GAMES: replay[g].append(head(parts[1][g], 60))
    data, _ = study(stage, agent, replay, c, 1, 1, read)
    assert counted == [90] * len(GAMES) + ([60] if not steps else [90, 60]) * len(GAMES)
    for g, d in data.items(): assert torch.equal(d.codes, torch.cat([tokenise(agent.tokenizer, e).codes for e in replay[g]]))      # and it is what the tokenizer says now


@pytest.mark.parametrize('where', ['improve', 'play', 'fit', 'fit again', 'save_checkpoint'])
def test_interrupted_anywhere_goes_on_the_same(parts, whole, tmp_path, monkeypatch, where):
    class Killed(Exception): pass
    where, at = where.split()[0], 2 if where in ('improve', 'fit again') else 1
    original, calls = getattr(module, where), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == at: raise Killed
        return original(*args, **kwargs)
    monkeypatch.setattr(module, where, dies)
    with pytest.raises(Killed): loop(parts, tmp_path)
    monkeypatch.setattr(module, where, original)
    equal(whole, loop(parts, tmp_path))


def test_a_longer_last_round_goes_on_from_the_rounds_before_it(parts, whole, tmp_path, monkeypatch):
    loop(parts, tmp_path)
    played, original = [], module.play
    monkeypatch.setattr(module, 'play', lambda *args, **kwargs: played.append(1) or original(*args, **kwargs))
    history, curves, _, actions, _, _ = loop(parts, tmp_path, replace(LOOP, last=3))
    assert not played and [h['round'] for h in curves] == [0] * 2 + [1] * 6 and [h['step'] for h in curves] == list(range(8))
    assert history[0] == whole[0][0] and curves[:2] == whole[1][:2] and all(np.array_equal(x, whole[3][g]) for g, x in actions.items())


def test_the_tokenizer_learns_and_the_others_follow(parts, whole):
    agent = whole[5]
    assert not torch.equal(agent.tokenizer.quantizer.levels[0].codebook, parts[0].quantizer.levels[0].codebook)
    agent.world.check_tokenizer(agent.tokenizer)
    books = torch.stack([q.codebook for q in agent.tokenizer.quantizer.levels])
    assert torch.allclose(agent.world.heads.codebook * agent.world.scale, books, atol=1e-6)


@pytest.mark.parametrize('foresight', [True, False])
def test_what_is_known_of_fresh_play_is_asked_as_the_dreams_pay(foresight, parts, tmp_path, monkeypatch):
    agent, ppo, _ = fresh(parts); asked = []
    monkeypatch.setattr(module, 'losses_told', lambda *a, **k: asked.append(k['foresight']) or (torch.tensor([.6, .2, .1]), np.array([True, False, False])))
    history, _ = learn(Stage('10_agent', tmp_path, 'smoke', GAMES, 0), agent, ppo, {g: [e] for g, e in parts[1].items()}, replace(LOOP, rounds=1, foresight=foresight))
    assert asked == len(asked) * [foresight] and asked and history[0]['told_apart_pong'] == 1 and np.isclose(history[0]['told_more_pong'], .45)


def test_half_of_the_frames_are_new(parts):
    a, b = parts[1]['pong'], parts[1]['breakout']
    old, new = head(a, 60), head(b, 20)
    frames, action, game = replay_frames({'breakout': [old, new]}, ['pong', 'breakout'], 40)(np.random.default_rng(0))
    assert frames.shape == (40, 1, 84, 84) and frames.dtype == torch.uint8 and game.tolist() == [1] * 40 and len(action) == 40
    share = sum(any(np.array_equal(f[0], x) for x in new.frames) for f in frames.numpy()) / 40
    assert .5 <= share <= .9
    frames, _, _ = replay_frames({'breakout': [old, old, new]}, ['pong', 'breakout'], 40, newest=2)(np.random.default_rng(0))      # now the new part is a quarter of the half
    assert sum(any(np.array_equal(f[0], x) for x in new.frames) for f in frames.numpy()) / 40 < share


def test_a_mirror_shows_a_half_of_the_frames_and_doubles_what_is_learned_from(parts, tmp_path):
    "Where a game has a mirror; what was seen comes behind its mirror picture, so that the newest steps are still the last."
    agent, replay = fresh(parts)[0], {g: [head(parts[1][g], 60), parts[1][g]] for g in GAMES}
    for g in GAMES:
        e = replay[g][1]
        frames = replay_frames({g: [e]}, GAMES, 60, mirror=True)(np.random.default_rng(0))[0].numpy()[:, 0]
        here, there = (np.array([any(np.array_equal(f, x) for x in seen) for f in frames]) for seen in (e.frames, MIRRORED[g](e.frames)))
        assert (here | there).all() and (there & ~here).any() and here.any()
    stage = Stage('10_agent', tmp_path, 'smoke', GAMES, 0)
    c = replace(LOOP, world_steps=0, begin_world=0, tokenizer_steps=0, mirror=True)
    data, recent = study(stage, agent, replay, c, 1)
    for g, d in data.items():
        assert len(d) == 300 and recent[g] == 120
        assert torch.equal(d.codes[-90:], tokenise(agent.tokenizer, replay[g][1]).codes) and torch.equal(d.actions[-90:], torch.from_numpy(replay[g][1].actions))
        assert torch.equal(d.actions[recent[g]:recent[g] + 90], torch.tensor(MIRROR)[d.actions[-90:]]) and torch.equal(d.codes[recent[g]:recent[g] + 90], tokenise(agent.tokenizer, mirrored(replay[g][1])).codes)


def test_after_a_study_the_policy_does_what_it_did(parts, tmp_path, monkeypatch):
    "The models move under a policy; taught by what it was, also in the mirror, it does through the new ones what it did through the old. Models that stay need no lesson."
    agent, _, c = fresh(parts); replay = {g: [e] for g, e in parts[1].items()}
    agent.policy.actor.weight.data.normal_(std=.3); old = copy.deepcopy(agent)
    for p in agent.world.parameters(): p.data += .05 * torch.randn_like(p)
    stage = Stage('10_agent', tmp_path, 'smoke', GAMES, 0)
    rows = both_see(agent, old, replay, 50, mirror=True)
    assert [len(x) for x in rows] == 5 * [200]                          # Pong, Pong in the mirror, Breakout, Breakout in the mirror
    assert torch.equal(rows[2][150:], rows[2][100:150][:, torch.tensor(MIRROR)]) and torch.equal(rows[3][150:], rows[3][100:150]) and not torch.equal(rows[0][150:], rows[0][100:150])                       # what to do in the mirror is the other way round
    away = lambda: Imitation(agent.policy).loss(rows[0].float(), *rows[1:])[1]['away'].item()
    before = away(); imitate(stage, agent, old, replay, 50, 'again', True, epochs=60, batch=64)
    assert away() < .5 * before
    asked = []
    monkeypatch.setattr(module, 'imitate', lambda stage, new, old, replay, newest, name, mirror: asked.append((newest, name, mirror)))
    agent, ppo, _ = fresh(parts)
    learn(stage, agent, ppo, {g: [e] for g, e in parts[1].items()}, replace(LOOP, rounds=1, imitate=40, mirror=True, half=True))
    assert asked == [(40, f'again-{r}', True) for r in (0, 1)]
    agent, ppo, _ = fresh(parts)
    learn(Stage('10_agent', tmp_path / 'still', 'smoke', GAMES, 0), agent, ppo, {g: [e] for g, e in parts[1].items()}, replace(LOOP, rounds=1, imitate=40, world_steps=0, tokenizer_steps=0))
    assert len(asked) == 2


def test_a_fresh_agent_sees_only_what_it_is_given(parts, tmp_path):
    loop = LoopConfig(rounds=1, real_steps=24, envs=2, world_steps=3, iterations=2, first=60, begin_tokenizer=9, frames=30, cell_hidden=32, cell_blocks=1, game_heads=True)
    replay = {g: [head(e, loop.first)] for g, e in parts[1].items()}
    assert all(len(p[0]) == 60 and len(p[0].seeds) == p[0].episode[-1] + 1 for p in replay.values())
    agent = fresh_agent(Stage('10_agent', tmp_path, 'smoke', GAMES, 0), replay, loop)
    assert agent.tokenizer.started and agent.world.config.tokenizer == agent.tokenizer.hash() and (heads := agent.world.heads.each)[0].place.shape[1] == 32 and len(heads[0].blocks) == 1 and len(heads) == len(GAMES)


@pytest.fixture
def shipped(parts, tmp_path, monkeypatch):
    "A shipped agent whose replay has two parts of 90 steps a game; returns a function that opens a run which starts from it."
    save_tree(tmp_path / 'shipped' / 'replay.safetensors', pack_replay({g: [e, e] for g, e in parts[1].items()}))
    monkeypatch.setattr(module, 'repo_path', lambda path: tmp_path); monkeypatch.setitem(module.SHIPPED, 'agent', 'shipped')
    return lambda start: Stage('10_agent', tmp_path / 'run', 'smoke', GAMES, 0, start)


def test_new_eyes(parts, shipped, monkeypatch):
    "Another grid: tokenizer and world model learn from the replay, the transformer is taken over, the policy does what the old one would; made once, and played with."
    stage, (old, _, _) = shipped('pretrained'), fresh(parts)
    old.policy.actor.weight.data.normal_(std=.3); old.policy.actor.bias.data[0] = 2.                  # it has a taste
    old.units, old.power, old.real_steps, replay = {'breakout': 2.}, .5, 180, remembered(stage)
    c = replace(LOOP, grid=4, begin_tokenizer=4, begin_world=2, frames=24, corrupt=0.)
    with pytest.raises(BookError, match='begin_tokenizer'): with_new_eyes(stage, old, replay, replace(c, begin_tokenizer=0))
    small = lambda t, **options: WorldModel(replace(old.world.config, grid=4, codes=256, cell_dim=64, tokenizer=t.hash()))
    monkeypatch.setattr(module.WorldModel, 'for_tokenizer', small)
    taught, fit = [], module.fit
    monkeypatch.setattr(module, 'fit', lambda m, *args, **kwargs: taught.append((m, copy.deepcopy(m.state_dict()))) or fit(m, *args, **kwargs))
    new = with_new_eyes(stage, old, replay, c, newest=50, epochs=60, batch=64)
    assert (new.tokenizer.config.grid, new.units, new.power, new.real_steps, new.policy.config.mix) == (4, old.units, .5, 180, old.policy.config.mix)
    assert new.policy.config.obs_shape != old.policy.config.obs_shape and all(torch.equal(v, taught[1][1][k]) for k, v in old.world.state_dict().items() if k.startswith(('blocks.', 'act.', 'proceed.')))
    rows = both_see(new, old, replay, 50)
    assert [len(x) for x in rows] == 5 * [50 * len(GAMES)]
    unlike = [Imitation(p).loss(rows[0].float(), *rows[1:])[1]['away'].item() for p in (new.policy, Agent.fresh(new.tokenizer, new.world, 16).policy)]
    assert unlike[0] < .5 * unlike[1], unlike                             # on the steps it learned from
    monkeypatch.setattr(module, 'fit', None)                              # it is there, and not made again
    again = with_new_eyes(stage, old, replay, c)
    assert all(torch.equal(v, again.policy.state_dict()[k]) for k, v in new.policy.state_dict().items())


def test_which_agents_get_new_eyes(parts, shipped, monkeypatch):
    "An agent keeps its cells whatever the profile says of fresh ones; asked for others it is made anew from its replay, for as long as the profile or the call says, and does not study again before it plays."
    old, asked, loops = fresh(parts)[0], [], []
    class Done(Exception): pass
    def learns(stage, agent, ppo, replay, loop, **kwargs): loops.append(loop); raise Done
    monkeypatch.setattr(module, 'LOOPS', {'smoke': replace(LOOP, rounds=0, grid=7, begin_tokenizer=9, begin_world=8, begin_lr=.002)})
    monkeypatch.setattr(module, 'with_new_eyes', lambda stage, agent, replay, c: asked.append(c) or agent); monkeypatch.setattr(module, 'learn', learns); monkeypatch.setattr(module, 'first_play', lambda *args: {})
    stage = shipped('pretrained'); monkeypatch.setattr(stage, 'shipped', lambda name, cls: old)
    for changes in ({}, {'grid': 3}, {'grid': 4}, {'grid': 4, 'begin_world': 20}):
        with pytest.raises(Done): train_agent(stage, **changes)
    assert [c.grid for c in loops] == [3, 3, 4, 4] and [c.begin_world for c in loops] == [LOOP.world_steps, LOOP.world_steps, 0, 0]
    assert [(c.grid, c.begin_tokenizer, c.begin_world, c.begin_lr) for c in asked] == [(4, 9, 8, .002), (4, 9, 20, .002)]


def test_an_agent_that_goes_on_plays_first_once_and_counts_on(parts, shipped, tmp_path, monkeypatch):
    "start='pretrained': what it had learned from stays in the replay and is not counted again; what it plays comes behind it, and is what is drawn from most."
    stage, (agent, ppo, _) = shipped('pretrained'), fresh(parts)
    agent.real_steps, config = 1000, going_on(replace(LOOP, rounds=3, first=60, begin_tokenizer=9))
    assert (config.rounds, config.iterations, config.first, config.begin_world, config.begin_lr) == (1, 4, 0, LOOP.world_steps, LOOP.world_lr)
    replay, new = remembered(stage), first_play(stage, agent, config)
    monkeypatch.setattr(module, 'play', None)                                                       # what is stored is not played again
    assert all(np.array_equal(first_play(stage, agent, config)[g].frames, new[g].frames) and len(new[g]) == 24 for g in GAMES)
    monkeypatch.undo()
    for g, e in new.items(): replay[g].append(e)
    data, recent = module.study(stage, agent, replay, replace(config, begin_world=0), 0)
    assert recent == {g: 180 for g in GAMES} and all(len(d) == 204 for d in data.values())
    assert [module.study(stage, agent, replay, replace(config, begin_world=0), 0, n)[1] for n in (2, 3)] == [{g: 90 for g in GAMES}, None]
    config, original, newest = replace(config, last=2), module.study, []
    def study(*args): newest.append(args[5]); return original(*args)
    monkeypatch.setattr(module, 'study', study)
    history, _ = learn(stage, agent, ppo, replay, config, known=180)
    assert newest == [1, 2]                                                                         # the last round, which studies twice as long, takes the newest two parts for new
    assert [h['real_steps'] for h in history] == [1024, 1048] and agent.real_steps == 1048 and not any('replayed' in h for h in history)
    assert Agent.from_pretrained(agent.save_pretrained(tmp_path / 'a')).real_steps == 1048


def test_the_newest_parts_are_enough_for_a_small_run(shipped):
    count = lambda newest: [len(es) for es in remembered(shipped('pretrained'), newest).values()]
    assert [count(n) for n in (0, 1, 90, 91, None)] == [[0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]


@pytest.mark.parametrize('whole', [False, True])
def test_dreaming_on_costs_no_real_step(parts, shipped, monkeypatch, whole):
    "start='replay': the shipped replay is regenerated once, nothing is played, and its steps are not counted again; the world model studies only what is the whole of its past."
    stage, (agent, ppo, _) = shipped('replay'), fresh(parts)
    agent.real_steps, config, old, model = 1000, dreaming_on(LOOP, whole), copy.deepcopy(agent.policy.state_dict()), copy.deepcopy(agent.world.state_dict())
    assert config.begin_world == (4 * LOOP.world_steps if whole else 0) and config.begin_lr == LOOP.world_lr
    assert {g: [e.hash() for e in es] for g, es in remembered(stage).items()} == {g: 2 * [e.hash()] for g, e in parts[1].items()}
    monkeypatch.setattr(module, 'play', lambda *a, **k: pytest.fail('it played')); monkeypatch.setattr(module, 'shipped_part', lambda *a: pytest.fail('regenerated twice'))
    history, curves = learn(stage, agent, ppo, remembered(stage), config, known=180)
    assert agent.real_steps == 1000 and [(h['real_steps'], h['replayed']) for h in history] == [(1000, True)] and len(curves) == 4 * LOOP.iterations
    assert any(not torch.equal(v, old[k]) for k, v in agent.policy.state_dict().items()) and all(torch.equal(v, model[k]) for k, v in agent.world.state_dict().items()) != whole


def test_in_the_last_round_the_learning_rate_falls_to_zero(parts, whole, tmp_path):
    assert load_checkpoint(whole[4].checkpoint('round-0'))['ppo']['opt']['param_groups'][0]['lr'] == 5e-4
    agent, ppo, replay = fresh(parts)
    learn(Stage('10_agent', tmp_path, 'smoke', GAMES, 0), agent, ppo, replay, LOOP)
    assert float(ppo.opt.param_groups[0]['lr']) == 5e-4 / LOOP.iterations                            # of the last iteration: one step above zero
    assert 'opt' not in load_checkpoint(whole[4].checkpoint('round-1'))['ppo']                       # nothing learns on from there
    *_, stage, _ = loop(parts, tmp_path / 'each', replace(LOOP, falling=True))
    assert load_checkpoint(stage.checkpoint('round-0'))['ppo']['opt']['param_groups'][0]['lr'] == 5e-4 / LOOP.iterations


def test_a_round_that_is_over_leaves_its_checkpoint_and_the_one_before(parts, whole, tmp_path):
    *_, stage, _ = loop(parts, tmp_path, replace(LOOP, rounds=2))
    names = {f.name.split('.')[0] for f in (stage.folder / 'checkpoints').glob('*.safetensors')}
    assert names == {'10_agent-round-1', '10_agent-round-2'}
    again = loop(parts, tmp_path, replace(LOOP, rounds=2))
    assert [h['round'] for h in again[0]] == [0, 1, 2] and all(len(a) == 90 + 2 * 24 for a in again[3].values())


def test_a_fresh_agent_begins_with_play_that_it_was_given(parts, tmp_path, monkeypatch):
    "It is played again once, cut where it is to be, counted as its own; a second call goes on, another replay or shipped weights are refused."
    played = {g: [e, collect(g, RandomPolicy(g), 50, 1)] for g, e in parts[1].items()}
    for name, order in (('a', 1), ('b', -1)): (tmp_path / name).mkdir(); save_tree(tmp_path / name / 'replay.safetensors', pack_replay({g: es[::order] for g, es in played.items()}))
    stage = lambda start='scratch': Stage('10_agent', tmp_path / f'run-{start}', 'smoke', GAMES, 0, start)
    small = dict(first=120, begin_tokenizer=9, frames=30, begin_world=2, world_steps=2, power=.5)
    agent, replay, history, _, loop = train_agent(stage(), tmp_path / 'a', **small)
    assert all([len(e) for e in replay[g]] == [90, 30, 60] and np.array_equal(replay[g][1].frames, played[g][1].frames[:30]) for g in GAMES)
    assert agent.real_steps == 180 and [h['real_steps'] for h in history] == [120, 180] and agent.power == .5 and agent.units['breakout'] == 1. and loop.begin_world == 2
    monkeypatch.setattr(module, 'shipped_part', lambda *a: pytest.fail('played again')); monkeypatch.setattr(module, 'fit', lambda *a, **k: pytest.fail('learned again')); monkeypatch.setattr(module, 'play', None)
    again = train_agent(stage(), tmp_path / 'a', **small)
    assert again[2] == history and all(torch.equal(v, again[0].policy.state_dict()[k]) for k, v in agent.policy.state_dict().items())
    for folder, steps in (('b', 120), ('a', 130)):
        with pytest.raises(BookError, match=f'began with another replay than that of .*{folder}, or with another number of its steps: choose another run folder'): train_agent(stage(), tmp_path / folder, **{**small, 'first': steps})
    with pytest.raises(BookError, match="start='pretrained' goes on from shipped weights"): train_agent(stage('pretrained'), tmp_path / 'a', **small)
    more = Stage('10_agent', tmp_path / 'more', 'smoke', GAMES, 0)
    with pytest.raises(BookError, match='holds 140 steps of pong, not the 200 that first asks for'): given_play(more, tmp_path / 'a', 200)
    with pytest.raises(BookError, match='say for how many steps with begin_tokenizer and begin_world'): train_agent(more, tmp_path / 'a', first=120)
    assert not more.index()                                                                            # what was refused leaves nothing that a later call would trip over


def test_what_was_done_is_what_the_best_parts_hold(parts):
    "The actions that were taken, the discounted rewards that followed in that life, of the part that earned most."
    agent, _, replay = fresh(parts)
    better = replace(replay['breakout'][0], rewards=np.ones_like(replay['breakout'][0].rewards))
    agent.measure({'breakout': [better]})
    seen, masks, log_probs, returns, spread = what_was_done(agent, {'pong': replay['pong'], 'breakout': [replay['breakout'][0], better]}, .5, best=1)
    d = tokenise(agent.tokenizer, better); t = d.windows(agent.context) + agent.context - 1; n = len(returns) - len(t)
    assert n == len(tokenise(agent.tokenizer, replay['pong'][0]).windows(agent.context)) and len(seen) == len(masks) == len(spread) == len(returns)
    assert torch.equal(log_probs[n:].argmax(-1), d.actions[t]) and torch.allclose(log_probs[n:].exp().sum(-1), torch.ones(len(t)), atol=1e-5)
    assert torch.allclose(log_probs[n:].exp()[:, 0][d.actions[t] != 0], torch.tensor(.1 / 4), atol=1e-6)                # a share of each of the four legal actions
    stop = d.stops().numpy(); left = np.array([np.argmax(stop[i:]) for i in t])                                          # steps to the end of the life
    assert torch.allclose(returns[n:], torch.tensor(2 - .5 ** left, dtype=torch.float32), atol=1e-5)


def test_the_whole_chapter_is_one_call_and_needs_no_other(tmp_path, monkeypatch):
    "From the first random step to the last dream; a second call goes on where the first one ended, whoever calls."
    stage = lambda: Stage('10_agent', tmp_path / 'run', 'smoke', GAMES, 0)
    small = dict(first=60, begin_tokenizer=9, frames=30, begin_world=2, world_steps=2)
    agent, replay, history, _, c = train_agent(stage(), **small)
    assert c == replace(LOOPS['smoke'], **small) and [len(e) for e in replay['pong']] == [60, 60] and agent.real_steps == 120 and agent.context == 4
    assert Agent.from_pretrained(stage().path('agent')).real_steps == 120
    whole = collect('pong', RandomPolicy('pong'), 90, module.derive(0, 'train'))
    assert np.array_equal(replay['pong'][0].frames, whole.frames[:60])                                # the beginning of what chapter 1 plays
    for name in ('play', 'improve', 'study', 'collect_split'): monkeypatch.setattr(module, name, lambda *a, name=name, **k: pytest.fail(f'{name} again'))
    again = train_agent(stage(), **small)
    assert again[2] == history and all(torch.equal(v, again[0].policy.state_dict()[k]) for k, v in agent.policy.state_dict().items())


def test_every_profile_has_a_loop(tmp_path):
    picked = {p: Stage('10_agent', tmp_path / p, p, GAMES, 0).pick for p in PROFILES}
    assert {p: [pick(**x) for x in (LOOPS, CONTEXT, NEWEST)] for p, pick in picked.items()} == {
        'smoke': [LOOPS['smoke'], 4, 0], 'laptop': [LOOPS['laptop'], 8, 10_000], 'overnight': [LOOPS['overnight'], 8, None], 'gpu': [LOOPS['gpu'], 8, None], 'paper': [LOOPS['gpu'], 8, None]}


def test_a_command_and_a_notebook_go_on_from_each_other(tmp_path):
    "The mark of a checkpoint does not ask for modules that only the one of them has loaded."
    say = lambda *names, of='"x"': subprocess.run([sys.executable, '-c', f'import {", ".join(f"atari_hrvq.{n}" for n in names)}\nfrom atari_hrvq.core import fingerprint\nprint(fingerprint({of}))'], capture_output=True, text=True, check=True).stdout
    assert say('agent') == say('agent', 'cli', 'pretrained', 'evaluate') != say('core')
    of = '"x", modules=("core", "world")'                                    # tokens that chapter 7 kept, which defines `world`, are those that chapter 8 finds, which imports it
    assert say('core', of=of) == say('agent', of=of) != say('core', of='"x", modules=("core", "hrvq")')


def test_checkpoints_are_small_and_without_pickle(whole):
    files = list((whole[4].folder / 'checkpoints').glob('*'))
    assert files and all(f.suffix == '.safetensors' and f.stat().st_size < 16 * 2**20 for f in files)
    assert {'world', 'ppo', 'history'} <= set(load_checkpoint(whole[4].checkpoint('round-1')))


def test_what_was_played_can_be_played_again(whole):
    for g in GAMES:
        before = load_stored(whole[4], f'agent-replay-{g}-0')
        (whole[4].folder / 'cache' / f'agent-replay-{g}-0.npy').unlink()
        assert np.array_equal(load_stored(whole[4], f'agent-replay-{g}-0').frames, before.frames) and len(before) == 24


def test_the_same_is_played_over_processes(parts):
    agent = fresh(parts)[0]
    here, there = (play(agent, GAMES, 3, 12, seed=2, workers=w) for w in (1, 4))
    for g in GAMES: assert here[g].hash() == there[g].hash() and np.array_equal(here[g].frames, there[g].frames) and np.array_equal(here[g].ram, there[g].ram)


def test_a_process_of_games_that_ends_is_one_sentence():
    games = Games(['pong', 'pong'], 'atari100k', workers=2)
    games.workers[0].terminate(); games.workers[0].join()
    with pytest.raises(BookError, match='ended before its time'): games.ask([(0, True, 1), (1, True, 2)])
    games.workers[1].terminate()


def test_only_legal_actions_and_saved_agent_acts_alike(parts, tmp_path):
    agent, _, _ = fresh(parts)
    torch.nn.init.normal_(agent.policy.actor.weight)
    twin = Agent.from_pretrained(agent.save_pretrained(tmp_path / 'a'))
    a, b = (play(x, GAMES, 2, 20, seed=3) for x in (agent, twin))
    for g in GAMES: assert set(a[g].actions.tolist()) <= set(LEGAL[g]) and a[g].hash() == b[g].hash()


def test_a_temperature_is_kept_and_left_aside_where_it_learns(parts, tmp_path):
    agent, frames = fresh(parts)[0], np.repeat(parts[1]['pong'].stacks([30]), 400, 0)
    torch.nn.init.normal_(agent.policy.actor.weight, std=.3)
    agent.temperature = {'pong': 1e-4}
    twin, plain = Agent.from_pretrained(agent.save_pretrained(tmp_path / 'a')), copy.copy(agent); plain.temperature = {}
    def drawn(a, **how): a.start(['pong'] * 200 + ['breakout'] * 200, 400, 0, **how); return a.act(frames, np.ones(400, bool))
    warm, cold = drawn(plain), drawn(twin)
    likeliest = int(twin.opinion()[0][0].argmax())
    assert twin.temperature == agent.temperature and set(cold[:200]) == {likeliest} < set(warm[:200]) and (cold[200:] == warm[200:]).all()
    assert (drawn(twin, learning=True) == warm).all()
    with pytest.raises(BookError, match='a temperature is more than 0'): Agent(agent.tokenizer, agent.world, agent.policy, temperature={'pong': 0.})


def test_what_if_asks_game_and_dreams_the_same_states(parts):
    agent = fresh(parts)[0]
    told = what_if(agent, 'breakout', games=2, steps=12, every=4, depth=5, draws=2, follow='game')
    assert {k: told[k].shape for k in ('q_game', 'lost_game', 'q_dreams', 'lost_dreams', 'policy')} == dict.fromkeys(('q_game', 'lost_game', 'q_dreams', 'lost_dreams', 'policy'), (6, 4))
    assert all((told[k] >= 0).all() and (told[k] <= 1).all() for k in ('lost_game', 'lost_dreams', 'policy')) and told['life'].tolist() == [0, 1] * 3 and (told['lost_dreams'] > 0).any()
    again, alone = (what_if(agent, 'breakout', games=2, steps=12, every=4, depth=5, draws=2, **how) for how in (dict(follow='game'), dict(ask=('dreams',), follow='dreams', beta=0.)))
    assert all((np.asarray(told[k]) == again[k]).all() for k in told) and 'q_game' not in alone


def test_memory_begins_anew_at_a_restart(parts):
    agent, _, _ = fresh(parts)
    frames = parts[1]['pong'].stacks([30, 60])
    agent.start('pong', 1, 0); agent.act(frames[:1], [True]); agent.act(frames[1:], [True]); restarted = agent.codes.clone()
    agent.start('pong', 1, 0); agent.act(frames[1:], [True])
    assert torch.equal(restarted, agent.codes) and (agent.actions == 0).all()


def test_what_the_critic_is_held_to(parts):
    agent = fresh(parts)[0]
    whole = tokenise(agent.tokenizer, parts[1]['breakout'])
    t = lambda *x: torch.tensor(x)
    tokens = Tokens(whole.codes[:12], whole.actions[:12], t(0., 3., 0., 0., 4., 0., -2., 0., 0., 0., 0., 5.), t(*[k in (4, 9) for k in range(12)]), t(*[0] * 10, 1, 1))       # two lives; an episode that is cut
    obs, returns, game = real_returns(agent, {'breakout': tokens}, .5, 100)
    known = {2: .25, 3: .5, 4: 1., 7: 0., 8: 0., 9: 0.}                  # a context is three frames in one life; what was cut off is not known
    assert returns.tolist() == pytest.approx(list(known.values())) and game.tolist() == [1] * 6
    for row, k in zip(obs, known, strict=True):
        assert torch.allclose(row, agent.sees(tokens.codes[None, k - 2:k + 1], tokens.actions[None, k - 2:k], t(1))[0], atol=1e-6)
    assert real_returns(agent, {'breakout': tokens}, .5, 100, {'breakout': 6})[1].tolist() == [0., 0.]           # of the newest play
    assert len(real_returns(agent, {'breakout': tokens}, .5, 2)[1]) == 2
    cut = replace(tokens, done=torch.zeros(12, dtype=torch.bool), episode=torch.zeros(12, dtype=torch.long))          # nothing ends, and step 11 is the last that was played
    assert len(real_returns(agent, {'breakout': cut}, .5, 100, settled=4)[1]) == len(range(2, 8)) and real_returns(agent, {'breakout': cut}, .5, 100) is None
    assert real_returns(agent, {'breakout': tokens}, .5, 100, {'breakout': 10}) is None
    held = lambda *since: returns_to_hold(agent, {'breakout': tokens}, .5, 100, *since)[1].tolist()
    assert held() == returns.tolist() and held({'breakout': 6}) == [0., 0., *returns.tolist()] and held({'breakout': 10}) == returns.tolist()      # the newest, and all
    agent.units = {'breakout': 2.}
    for agent.power, paid in ((.5, 2 ** .5), (1., 2.)): assert real_returns(agent, {'breakout': tokens}, .5, 100)[1].tolist()[:3] == pytest.approx([paid / 4, paid / 2, paid])     # 4 points where the smallest reward is 2


def test_the_critic_learns_what_the_real_game_paid(parts):
    agent, ppo, _ = fresh(parts)
    tokens, said = {g: tokenise(agent.tokenizer, e) for g, e in parts[1].items()}, []
    obs, returns, game = real_returns(agent, tokens, .9, 60)
    for real in (None, (obs, torch.full_like(returns, 2.), game)):
        pupil = copy.deepcopy(agent)
        improve(pupil, PPO(pupil.policy, ppo.config), Contexts(tokens, GAMES, agent.context), 30, 6, 4, 0, real=real, real_rows=24)
        with torch.no_grad(): said.append(float(pupil.policy(obs)[1].mean()))
    assert abs(said[0]) < .3 and said[1] > said[0] + .5, said            # the dreams pay next to nothing


def test_what_the_policy_is_held_to(parts):
    agent, ppo, _ = fresh(parts)
    whole = tokenise(agent.tokenizer, parts[1]['breakout'])
    t = lambda *x: torch.tensor(x)
    tokens = Tokens(whole.codes[:12], whole.actions[:12], t(0., 3., 0., 0., 4., 0., -2., 0., 0., 0., 0., 5.), t(*[k in (4, 9) for k in range(12)]), t(*[0] * 10, 1, 1))
    obs, masks, actions, log_probs, advantages = real_advantages(agent, {'breakout': tokens}, PPOConfig(gamma=.5, lam=.5))
    steps = list(range(2, 10))                                            # a context is three frames in one episode, as the agent sees it: a life may end inside
    assert actions.tolist() == tokens.actions[2:10].tolist() and (masks == torch.from_numpy(action_mask('breakout'))).all()
    for row, k in zip(obs, steps, strict=True): assert torch.allclose(row, agent.sees(tokens.codes[None, k - 2:k + 1], tokens.actions[None, k - 2:k], t(1))[0], atol=1e-6)
    with torch.no_grad(): logits, v = agent.policy(obs, masks)
    assert torch.allclose(log_probs, logits.log_softmax(-1)[range(8), actions])
    paid, by_hand, a = {4: 1., 6: -1.}, [], 0.
    for i, k in reversed(list(enumerate(steps))):
        over = k in (4, 9)
        a = paid.get(k, 0.) + (0. if over else .5 * float(v[i + 1])) - float(v[i]) + (0. if over else .25 * a)
        by_hand.insert(0, a)
    by_hand = np.array(by_hand)
    assert np.allclose(advantages.numpy(), (by_hand - by_hand.mean()) / by_hand.std(), atol=1e-4)
    assert len(real_advantages(agent, {'breakout': tokens}, ppo.config, {'breakout': 5})[0]) == 3 and real_advantages(agent, {'breakout': tokens}, ppo.config, {'breakout': 10}) is None


def test_the_policy_learns_what_it_played(parts):
    agent, ppo, _ = fresh(parts)
    tokens, moved = {g: tokenise(agent.tokenizer, e) for g, e in parts[1].items()}, []
    obs, masks, actions, then, _ = real_advantages(agent, tokens, ppo.config)
    for sign in (1., -1.):
        pupil = copy.deepcopy(agent)
        curve = improve(pupil, PPO(pupil.policy, ppo.config), Contexts(tokens, GAMES, agent.context), 20, 6, 4, 0, played=(obs, masks, actions, then, torch.full_like(then, sign)), real_actions=48)
        with torch.no_grad(): moved.append(float((pupil.policy(obs, masks)[0].log_softmax(-1).gather(1, actions[:, None])[:, 0] - then).mean()))
        assert 'loss_played' in curve[-1]
    assert moved[0] > 0 > moved[1] and moved[0] - moved[1] > .02, moved


def test_an_agent_knows_what_its_dreams_paid(parts, whole, tmp_path):
    agent = whole[5]
    assert agent.power == 0 and set(agent.units.values()) <= {1.} and agent.paid('pong', -1.) == -1 and agent.paid('breakout', 0.) == 0
    agent.power, agent.units = .5, {'breakout': 4.}                      # an agent that went on keeps its unit where no reward came
    again = Agent.from_pretrained(agent.save_pretrained(tmp_path / 'agent'))
    assert again.paid('breakout', np.array([0., -4., 16.])).tolist() == [0., -1., 2.] and again.power == .5
    agent.power, agent.units = 0., {'pong': 1., 'breakout': 1.}


def test_dreams_are_counted_by_depth(parts):
    agent = fresh(parts)[0]
    for net, bias in ((agent.world.proceed, [np.log(3)]), (agent.world.reward.net, [30. * (b == 3) for _ in range(agent.world.reward.ahead) for b in agent.world.reward.bins.round().tolist()])):
        net[-1].weight.data.zero_(); net[-1].bias.data = torch.tensor(bias, dtype=torch.float32)          # a quarter ends in every step; every step pays
    data = {g: tokenise(agent.tokenizer, e) for g, e in parts[1].items()}
    rows = by_depth(agent, data, (0, 2, 6), 400)
    assert [(r['game'], r['dreamt steps']) for r in rows] == [(g, d) for g in GAMES for d in ('0 to 2', '2 to 6')]
    for r in rows:
        assert r['dreamt reward'] == pytest.approx(1, abs=1e-3) and r['dreamt endings'] == pytest.approx(.25, abs=.05)      # of the dreams that still live
        assert r['alive'] == pytest.approx(1 if r['dreamt steps'] == '0 to 2' else .75 ** 2, abs=.07)
        assert r['real endings'] == pytest.approx(float(data[r['game']].done.float().mean())) and r['real reward'] == pytest.approx(float(data[r['game']].rewards.sign().mean()))


def test_who_returns_the_ball(parts, monkeypatch):
    "A dream and a game whose codes are the steps of a known path: to the player and back, then past the other side; with stretches by the step of the meeting, and what the last steps leave open uncounted."
    path = np.array([100., 110, 120, 130, 140, 130, 120, 110, 100, 90, 80, 70, *[np.nan] * 5, *[100.] * 4, 110, 120, 130, 140, *[130.] * 3])
    class Scripted:
        def __init__(self, world, contexts, dreams, horizon, tensors): self.dreams, self.size = dreams, observation_size(world)
        def look(self): self.cache = SimpleNamespace(codes=torch.full((self.dreams, 9, 3), self.at)); return torch.zeros(self.dreams, self.size)
        def reset(self, seed): self.at = 0; return self.look(), {'action_mask': torch.from_numpy(action_mask('pong')).repeat(self.dreams, 1)}
        def step(self, actions): self.at += 1; return self.look(), None, None, None, {'action_mask': torch.from_numpy(action_mask('pong')).repeat(self.dreams, 1)}
    monkeypatch.setattr(module, 'DreamVectorEnv', Scripted)
    monkeypatch.setattr(module, 'ball_readers', lambda tokenizer, game: {'ball_x': lambda codes: path[codes[:, 0, 0].long().numpy()]})
    steps = torch.arange(20).repeat(2)                                       # two games of twenty steps: the next serve is not the end of this one
    zeros = torch.zeros(40)
    tokens = Tokens(steps[:, None, None].expand(40, 9, 3).to(torch.uint8), steps * 0, zeros, zeros.bool(), torch.arange(2).repeat_interleave(20))
    agent = fresh(parts)[0]
    game, young, old = module.who_returns(agent, tokens, 'pong', (0, 8, 16), 5, wait=4)
    told = lambda row: [row[k] for k in ('to the player', 'the player returned', 'to the other side', 'the other side returned')]
    assert told(game) == [2, 1., 2, 0.] and told(young) == [5, 1., 0, None] and told(old) == [0, None, 5, 0.]
    assert (game['its error, player'], young['its error, other side']) == (0., None) and [r['where'] for r in (game, young, old)] == ['the game', 'dreams, steps 0 to 8', 'dreams, steps 8 to 16']


def test_bad_input(parts, tmp_path):
    agent, _, _ = fresh(parts)
    with pytest.raises(BookError, match='does not know'): agent.start('ms_pacman', 1)
    torch.manual_seed(5)
    other = Tokenizer(parts[0].config)
    other.quantizer.start(torch.randn(500, 8))
    with pytest.raises(BookError, match='load the two that belong together'): Agent(other, agent.world, agent.policy)
    with pytest.raises(BookError, match='does not hold an Agent'): Agent.from_pretrained(tmp_path)
    frames, begins = np.zeros((2, 1, 84, 84), np.uint8), np.ones(2, bool)
    with pytest.raises(BookError, match='one game or more to begin, got 0'): agent.start('pong', 0)
    agent.start('pong', 2)
    for f, b, expected in ((frames[:1], begins[:1], 'plays 2 games.*got 1 frames'), (frames, begins[:1], r'plays 2 games.*restart of shape \(1,\)'), (frames[:, 0], begins, r'got them of shape \[2, 84, 84\]')):
        with pytest.raises(BookError, match=expected): agent.act(f, b)
        assert agent.codes is None                                          # nothing was taken in
    with pytest.raises(BookError, match=r"games, copies of each and steps to play, got \['pong'\], 0 and 5"): play(agent, ['pong'], 0, 5, 0)
    with pytest.raises(BookError, match='no two sides.*expected one of pong'): module.who_returns(agent, None, 'breakout')


@pytest.mark.parametrize('field, value, expected', [('rounds', -1, '0 or more, got -1'), ('dreams', 0, '1 or more, got 0'), ('mix', 1.5, 'from 0 to 1, got 1.5'), ('window', 1, '2 or more'), ('real_steps', 1, '2 or more, got 1'), ('lr', -.1, '0 or more'), ('lr', float('nan'), 'got nan')])
def test_a_loop_of_impossible_numbers(field, value, expected):
    with pytest.raises(BookError, match=f'LoopConfig: {field} is .*{expected}'): replace(LOOP, **{field: value})


def test_tokens_are_encoded_once_a_tokenizer(parts, tmp_path, monkeypatch):
    stage, tokenizer, calls = Stage('07_world', tmp_path, 'smoke', GAMES, 0), copy.deepcopy(parts[0]), []
    store_episodes(stage, 'frames-pong-test', parts[1]['pong'])
    monkeypatch.setattr(world_module, 'tokenise', lambda t, e: calls.append(1) or tokenise(t, e))
    first, again = (load_tokens(stage, tokenizer, 'pong', 'test') for _ in range(2))
    expected = tokenise(tokenizer, parts[1]['pong'])
    assert len(calls) == 1 and all(torch.equal(v, vars(again)[k]) and torch.equal(v, vars(expected)[k]) and v.dtype == vars(expected)[k].dtype for k, v in vars(first).items())
    with torch.no_grad(): next(tokenizer.parameters()).add_(.1)
    load_tokens(stage, tokenizer, 'pong', 'test')
    assert len(calls) == 2


def test_where_dreams_begin(parts, tmp_path, monkeypatch):
    shares = []
    class Told(Contexts):
        def __init__(self, *a, **k): super().__init__(*a, **k); shares.append(self.share)
    monkeypatch.setattr(module, 'Contexts', Told)
    for hot in (0., .6):
        loop(parts, tmp_path / str(hot), replace(LOOP, hot=hot, real_rows=0, real_actions=0))
        assert shares and set(shares) == {hot}; shares.clear()


def test_the_game_stands_where_the_dream_was(parts):
    agent, ppo, _ = fresh(parts)
    agent.power, agent.units = .5, {'pong': 1., 'breakout': 1.}
    names, actions = ['breakout', 'pong', 'breakout'], np.random.default_rng(0)
    envs = GameVectorEnv(agent, names, tensors=False)
    with pytest.raises(BookError, match='call reset first'): envs.step(np.zeros(3, int))
    seen, info = envs.reset(seed=5)
    assert envs.metadata['autoreset_mode'] == AutoresetMode.NEXT_STEP and envs.observation_space.contains(seen) and np.array_equal(info['game'], [1, 0, 1])
    for wrong in (np.zeros(2, int), np.zeros(3)):
        with pytest.raises(BookError, match='expected 3 actions as whole numbers'): envs.step(wrong)
    mirror = [make_env(g, stack=0) for g in names]
    first = [m.reset(seed=derive(envs.seed, g, i, 0) % 2**31) for i, (g, m) in enumerate(zip(names, mirror, strict=True))]
    twin = copy.copy(agent); twin.start(names, 3, learning=True)
    frames, again, over = np.stack([f for f, _ in first])[:, None], np.ones(3, bool), np.zeros(3, bool)
    twin.remember(frames, again)
    lost = []
    for t in range(260):                                                                   # the same by hand, with the same agent's eyes
        assert np.allclose(seen, twin.sees(twin.codes, twin.actions, twin.game).detach().numpy(), atol=1e-5)
        move = np.array([actions.choice(np.flatnonzero(m)) for m in info['action_mask']])
        seen, paid, ended, cut, info = envs.step(move)
        done = [m.step(0 if o else int(a)) for m, a, o in zip(mirror, move, over, strict=True)]          # after a lost life: a no-op
        assert np.allclose(paid, [np.sign(d[1]) * abs(d[1]) ** .5 for d in done]) and np.allclose(info['points'], [d[1] for d in done])
        over = np.array([d[4]['life_lost'] for d in done]); lost.append(over)
        assert np.array_equal(ended, over) and not cut.any()
        twin.previous = torch.from_numpy(np.where(lost[-2] if t else False, 0, move))
        twin.remember(np.stack([d[0] for d in done])[:, None], np.zeros(3, bool))
        if np.sum(lost, 0).max() == 4: break                                                # before a game is over
    assert np.sum(lost) >= 4 and envs.steps == 3 * (t + 1)
    envs.close()


def test_a_game_that_is_over_begins_anew_and_a_policy_learns_from_games(parts):
    agent, ppo, _ = fresh(parts)
    envs = GameVectorEnv(agent, ['breakout', 'pong'])
    r = rollout(envs, agent.policy, 900, envs.reset(seed=1), torch.Generator().manual_seed(0))
    assert (r.terminated[:, 0] & r.ended[:, 0]).sum() >= 5 and envs.begun == [1 + int(r.terminated[:, 0].sum()) // 5, 1 + int(r.terminated[:, 1].sum())] and torch.equal(r.valid[1:], ~r.ended[:-1])
    assert envs.steps == 900 * 2 - sum(envs.begun) + 2                                           # a step that begins a game anew plays none
    envs.close()
    before, state = copy.deepcopy(agent.policy.state_dict()), {k: v.clone() for k, v in agent.world.state_dict().items()}
    def learned():
        torch.manual_seed(3); policy = copy.deepcopy(agent.policy)
        return train_ppo(lambda: GameVectorEnv(agent, ['breakout', 'pong']), policy, PPOConfig(minibatches=2), 64, seed=2, horizon=8, chunk=2, clip_rewards=False), policy
    (a, one), (b, two) = learned(), learned()
    assert a == b and all(torch.equal(x, two.state_dict()[k]) for k, x in one.state_dict().items()) and any(not torch.equal(x, before[k]) for k, x in one.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in agent.world.state_dict().items())
    with pytest.raises(BookError, match='does not know'): GameVectorEnv(agent, ['tetris'])
