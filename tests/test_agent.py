"""agent: a small loop is the same twice and the same when interrupted; what it remembers can be played again."""
import numpy as np
import pytest
import torch
from atari_hrvq import agent as module
from atari_hrvq.agent import Agent, LoopConfig, learn, play
from atari_hrvq.core import BookError, Stage, load_tree
from atari_hrvq.frames import LEGAL, RandomPolicy, collect, load_stored
from atari_hrvq.hrvq import Tokenizer, TokenizerConfig
from atari_hrvq.ppo import PPO
from atari_hrvq.world import WorldModel, tokenise

GAMES = ('pong', 'breakout')
LOOP = LoopConfig(rounds=1, real_steps=24, envs=2, world_steps=3, iterations=2, dreams=6, horizon=4, batch=4, window=5)


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
    world = WorldModel.for_tokenizer(parts[0], dim=16, heads=2, experts=(1, 2), windows=(2, 4), hidden=16, shared_hidden=4, cell_hidden=8)
    agent = Agent.fresh(parts[0], world, hidden=16, context=3)
    return agent, PPO(agent.policy), {g: tokenise(parts[0], e) for g, e in parts[1].items()}


def loop(parts, folder):
    stage = Stage('10_agent', folder, 'smoke', GAMES, 0)
    agent, ppo, data = fresh(parts)
    history, curves = learn(stage, agent, ppo, data, LOOP)
    state = {**{f'w.{k}': v for k, v in agent.world.state_dict().items()}, **{f'p.{k}': v for k, v in agent.policy.state_dict().items()}}
    return history, curves, state, {g: d.actions for g, d in data.items()}, stage


def equal(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert all(torch.equal(x, b[2][k]) for k, x in a[2].items()) and all(torch.equal(x, b[3][g]) for g, x in a[3].items())


@pytest.fixture(scope='module')
def whole(parts, tmp_path_factory): return loop(parts, tmp_path_factory.mktemp('whole'))


def test_same_seed_same_loop(parts, whole, tmp_path): equal(whole, loop(parts, tmp_path))


@pytest.mark.parametrize('where', ['improve', 'play', 'fit', 'save_checkpoint'])
def test_interrupted_anywhere_goes_on_the_same(parts, whole, tmp_path, monkeypatch, where):
    class Killed(Exception): pass
    original, calls = getattr(module, where), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if where == 'improve' else 1): raise Killed
        return original(*args, **kwargs)
    monkeypatch.setattr(module, where, dies)
    with pytest.raises(Killed): loop(parts, tmp_path)
    monkeypatch.setattr(module, where, original)
    equal(whole, loop(parts, tmp_path))


def test_checkpoints_are_small_and_without_pickle(whole):
    files = list((whole[4].folder / 'checkpoints').glob('*'))
    assert files and all(f.suffix == '.safetensors' and f.stat().st_size < 16 * 2**20 for f in files)
    assert {'world', 'ppo', 'history'} <= set(load_tree(whole[4].checkpoint('round-1')))


def test_what_was_played_can_be_played_again(whole):
    for g in GAMES:
        before = load_stored(whole[4], f'agent-replay-{g}-0')
        (whole[4].folder / 'cache' / f'agent-replay-{g}-0.npy').unlink()
        assert np.array_equal(load_stored(whole[4], f'agent-replay-{g}-0').frames, before.frames) and len(before) == 24


def test_only_legal_actions_and_saved_agent_acts_alike(parts, tmp_path):
    agent, _, _ = fresh(parts)
    torch.nn.init.normal_(agent.policy.actor.weight)
    twin = Agent.from_pretrained(agent.save_pretrained(tmp_path / 'a'))
    a, b = (play(x, GAMES, 2, 20, seed=3) for x in (agent, twin))
    for g in GAMES: assert set(a[g].actions.tolist()) <= set(LEGAL[g]) and a[g].hash() == b[g].hash()


def test_memory_begins_anew_at_a_restart(parts):
    agent, _, _ = fresh(parts)
    frames = parts[1]['pong'].stacks([30, 60])
    agent.start('pong', 1, 0); agent.act(frames[:1], [True]); agent.act(frames[1:], [True]); restarted = agent.codes.clone()
    agent.start('pong', 1, 0); agent.act(frames[1:], [True])
    assert torch.equal(restarted, agent.codes) and (agent.actions == 0).all()


def test_bad_input(parts, tmp_path):
    agent, _, _ = fresh(parts)
    with pytest.raises(BookError, match='does not know'): agent.start('ms_pacman', 1)
    torch.manual_seed(5)
    other = Tokenizer(parts[0].config)
    other.quantizer.start(torch.randn(500, 8))
    with pytest.raises(BookError, match='load the two that belong together'): Agent(other, agent.world, agent.policy)
    with pytest.raises(BookError, match='does not hold an Agent'): Agent.from_pretrained(tmp_path)
