"""frames: the same pictures everywhere, labels that follow the screen, protocols that are what they say."""
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from atari_hrvq.core import BookError, GAMES, Stage
from atari_hrvq.frames import LEGAL, RandomPolicy, collect, join_episodes, load_stored, make_env, make_vec_env, regenerate, state_labels, store_episodes


@pytest.mark.parametrize('game', GAMES)
@pytest.mark.parametrize('protocol', ['atari100k', 'sticky'])
def test_frames_regenerate_bit_for_bit(game, protocol):
    a = collect(game, RandomPolicy(game), 150, 3, protocol)
    b = regenerate(game, protocol, a.seeds, a.actions, a.episode)
    assert a.hash() == b.hash() and (a.rewards == b.rewards).all() and (a.life_lost == b.life_lost).all()


@pytest.mark.parametrize('game', GAMES)
def test_vector_and_single_see_the_same(game):
    single, vector = make_env(game), make_vec_env(game, 2)
    obs, _ = single.reset(seed=5); both, info = vector.reset(seed=[5, 6])
    assert np.array_equal(obs, both[0]) and info['action_mask'].shape == (2, 18)
    for t in range(25):
        a = LEGAL[game][t % len(LEGAL[game])]
        obs, r, *_ = single.step(a); both, rs, *_ = vector.step(np.array([a, a]))
        assert np.array_equal(obs, both[0]) and r == rs[0]


@pytest.mark.filterwarnings('ignore')
def test_gymnasium_accepts_it(): check_env(make_env('breakout'), skip_render_check=True)


def test_life_loss_ends_only_the_learning_episode():
    whole, lives = make_env('breakout', stack=0), make_env('breakout', stack=0, life_loss_ends=True)
    whole.reset(seed=0); lives.reset(seed=0)
    for t in range(400):
        a = (1, 0, 0)[t % 3]
        _, _, over, _, info = whole.step(a); _, _, ended, _, _ = lives.step(a)
        if info['life_lost']: break
    assert info['life_lost'] and not over and ended and info['lives'] == 4
    _, after = lives.reset()
    assert after['lives'] == 4


def test_pong_ball_label_follows_the_screen():
    e = collect('pong', RandomPolicy('pong'), 300, 1)
    labels, names, present = state_labels('pong', e.ram)
    background = np.median(e.frames, 0)
    box = np.abs(e.frames[:, 14:77, 11:71] - background[14:77, 11:71])
    seen = (box.max((1, 2)) > 30) & present[:, 0]
    column = box.reshape(len(box), -1).argmax(1) % 60 + 11
    assert seen.sum() > 50 and np.corrcoef(column[seen], labels[seen, names.index('ball_x')])[0, 1] > .99


def test_rewards_belong_to_the_action_before_the_frame():
    e = collect('breakout', RandomPolicy('breakout'), 400, 2)
    score = lambda ram: 100 * (ram[:, 76] & 15).astype(int) + 10 * (ram[:, 77] >> 4).astype(int) + (ram[:, 77] & 15)
    same = e.episode[1:] == e.episode[:-1]
    assert np.array_equal((score(e.ram)[1:] - score(e.ram)[:-1])[same], e.rewards[:-1][same]) and e.rewards.sum() > 0


def test_windows_and_joins_do_not_cross_episodes():
    a, b = (collect('breakout', RandomPolicy('breakout'), 80, s) for s in (0, 1))
    both = join_episodes([a, b])
    assert len(both) == 160 and not set(range(80 - 4, 80)) & set(both.windows(5).tolist())
    assert np.array_equal(both.stacks([80])[0], np.stack([b.frames[0]] * 4))


def test_changed_actions_are_noticed(tmp_path):
    stage = Stage('01_frames', tmp_path, 'smoke', ['breakout'], 0)
    e = collect('breakout', RandomPolicy('breakout'), 60, 0)
    store_episodes(stage, 'frames-breakout-train', e)
    assert np.array_equal(load_stored(stage, 'frames-breakout-train').frames, e.frames)
    (stage.folder / 'cache' / 'frames-breakout-train.npy').unlink()
    assert np.array_equal(load_stored(stage, 'frames-breakout-train').frames, e.frames)
    tree = stage.load('frames-breakout-train'); tree['actions'][:30] = 3; stage.save('frames-breakout-train', tree)
    (stage.folder / 'cache' / 'frames-breakout-train.npy').unlink()
    with pytest.raises(BookError, match='frames-breakout-train regenerated'): load_stored(stage, 'frames-breakout-train')


@pytest.mark.parametrize('call, message', [
    (lambda: make_env('tetris'), 'unknown game'), (lambda: make_env('pong', 'fast'), 'unknown protocol'),
    (lambda: make_env('pong').step(17), 'illegal in pong'), (lambda: collect('pong', RandomPolicy('pong'), 0, 0), 'steps must be positive'),
    (lambda: state_labels('pong', np.zeros((2, 64), np.uint8)), 'RAM must have shape')])
def test_bad_input(call, message):
    with pytest.raises(BookError, match=message): call()
