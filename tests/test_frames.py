"""frames: the same pictures everywhere, labels that follow the screen, protocols that are what they say."""
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from atari_hrvq.core import BookError, GAMES, Stage
from atari_hrvq.frames import (CONSOLES, LEGAL, PROTOCOLS, RandomPolicy, ReadingPolicy, collect, frame_cache, join_episodes, legal_actions, load_episodes, load_stored, make_env,
                               make_vec_env, regenerate, screen_positions, state_labels, store_episodes)


@pytest.mark.parametrize('game', GAMES)
@pytest.mark.parametrize('protocol', ['atari100k', 'sticky'])
def test_frames_regenerate_bit_for_bit(game, protocol):
    a = collect(game, RandomPolicy(game), 150, 3, protocol, shard=100)
    b = regenerate(game, protocol, a.seeds, a.actions, a.episode)
    assert a.hash() == b.hash() and (a.rewards == b.rewards).all() and (a.life_lost == b.life_lost).all() and (a.ram == b.ram).all()


def test_workers_shards_and_whole_games_change_nothing():
    "Two processes give the bytes of one; episodes that end inside a shard go on without a seed and still regenerate."
    one, two = (collect('breakout', RandomPolicy('breakout', .9), 900, 4, workers=w, shard=500) for w in (1, 2))
    assert one.hash() == two.hash() and np.array_equal(one.seeds, two.seeds) and np.array_equal(one.episode, two.episode)
    assert (one.seeds == -1).any() and (one.seeds >= 0).sum() == 2 and one.terminated.any()
    again = regenerate('breakout', one.protocol, one.seeds, one.actions, one.episode, workers=2)
    assert again.hashes() == one.hashes() and np.array_equal(again.seeds, one.seeds)
    tail = one.episode >= one.episode[500]                                   # the second shard alone
    alone = regenerate('breakout', one.protocol, one.seeds[one.episode[500]:], one.actions[500:], one.episode[500:] - one.episode[500])
    assert tail.sum() == 400 and np.array_equal(alone.frames, one.frames[500:])


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


def test_stored_frames_are_mapped_replayed_and_checked(tmp_path):
    stage = Stage('01_frames', tmp_path, 'smoke', ['breakout'], 0)
    frames = frame_cache(stage, 'frames-breakout-train', 500)
    e = store_episodes(stage, 'frames-breakout-train', collect('breakout', RandomPolicy('breakout'), 500, 0, frames=frames, shard=250))
    cache = stage.folder / 'cache' / 'frames-breakout-train.npy'
    assert e.frames.base is not None and isinstance(e.frames.base, np.memmap) and [p.name for p in cache.parent.iterdir()] == [cache.name]
    whole = e.hash()
    e.frames[:] = 0                                                          # a private copy: the file stays
    assert load_stored(stage, 'frames-breakout-train').hash() == whole
    for damage in (cache.unlink, lambda: cache.write_bytes(b'no array'), lambda: cache.write_bytes(cache.read_bytes()[:-1] + bytes([cache.read_bytes()[-1] ^ 1]))):
        damage()
        assert load_stored(stage, 'frames-breakout-train').hash() == whole
    tree = stage.load('frames-breakout-train'); last = int(tree['episode'][-1])
    tree['actions'][-40:] = 3; stage.save('frames-breakout-train', tree); cache.unlink()
    with pytest.raises(BookError, match=f'episode {last} of frames-breakout-train, played again .* differs .*1 of {last + 1} do.: its seeds or actions were altered'): load_stored(stage, 'frames-breakout-train')
    assert not list(cache.parent.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    import errno, os
    stage = Stage('01_frames', tmp_path, 'smoke', ['pong'], 0)
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    with pytest.raises(BookError, match=r'cannot write .*No space left on device; free 0.07 GB'): frame_cache(stage, 'frames-pong-train', 10_000)
    assert not list((tmp_path / 'cache').iterdir())


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    stage = Stage('01_frames', tmp_path, 'smoke', ['pong'], 0)
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / '.frames-pong-train.999999999.npy').write_bytes(b'')
    frame_cache(stage, 'frames-pong-train', 3)
    assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_another_game_by_name(tmp_path):
    stage = Stage('01_frames', tmp_path, 'smoke', ['pong'], 0)
    e = load_episodes(stage, 'freeway', steps=50)
    assert e.game == 'freeway' and e.frames.shape == (50, 84, 84) and set(e.actions.tolist()) <= set(legal_actions('freeway'))
    assert load_episodes(stage, 'freeway', steps=999).hash() == e.hash()
    with pytest.raises(BookError, match='RAM of freeway is not annotated'): state_labels('freeway', e.ram)


def test_reading_policy_plays_better_than_chance():
    for game, margin in (('pong', 5), ('breakout', 3)):
        good, bad = (collect(game, policy(game), 1500, 0) for policy in (ReadingPolicy, RandomPolicy))
        assert good.rewards.sum() > bad.rewards.sum() + margin, game


def test_positions_on_the_screen_are_where_the_sprites_are():
    e = collect('pong', RandomPolicy('pong'), 400, 1)
    labels, names, present = state_labels('pong', e.ram)
    spots, background = screen_positions('pong', labels), np.median(e.frames, 0)
    for name in ('ball', 'enemy'):
        seen = present[:, 0] & present[:, 1] & (np.abs(spots[name] - 42).max(1) < 27) if name == 'ball' else e.ram[:, 50] > 60
        x, y = np.round(spots[name][seen]).astype(int).T
        near = np.abs(e.frames[seen].astype(float) - background)
        hit = np.mean([f[b - 2:b + 3, a - 2:a + 3].max() > 20 for f, a, b in zip(near, x, y, strict=True)])
        assert seen.sum() > 30 and hit > .95, (name, hit)


@pytest.mark.parametrize('call, message', [
    (lambda: make_env('tetriz'), "unknown game 'tetriz'.*did you mean 'tetris'"), (lambda: load_episodes(None, 'pong', 'spring'), 'unknown split'),
    (lambda: collect('pong', RandomPolicy('pong'), 9, 0, frames=np.zeros((3, 84, 84), np.uint8)), 'to hold 9 steps'), (lambda: regenerate('pong', 'atari100k', [-1], [0], [0]), 'a seed for the first'),
    (lambda: ReadingPolicy('freeway'), 'no reading policy'), (lambda: make_env('pong', 'fast'), 'unknown protocol'),
    (lambda: make_env('pong').step(17), 'illegal in pong'), (lambda: collect('pong', RandomPolicy('pong'), 0, 0), 'steps must be positive'),
    (lambda: make_vec_env('pong', 0), 'at least one copy of pong, got 0'), (lambda: state_labels('pong', np.zeros((2, 64), np.uint8)), 'RAM must have shape')])
def test_bad_input(call, message):
    with pytest.raises(BookError, match=message): call()


def test_a_closed_environment_leaves_its_console_and_serves_no_more():
    idle, twice = CONSOLES.setdefault(('breakout', PROTOCOLS['atari100k']), []), make_env('breakout')
    first, _ = twice.reset(seed=4); [twice.step(3) for _ in range(9)]
    console = twice.unwrapped
    twice.close(); twice.close()
    assert sum(c is console for c in idle) == 1                              # given back once, however often it is closed
    for use in (lambda: twice.reset(seed=4), lambda: twice.step(0)):
        with pytest.raises(BookError, match='this environment was closed: make another'): use()
    other = make_env('breakout')
    assert other.unwrapped is console and not any(c is console for c in idle) and make_env('breakout').unwrapped is not console
    with pytest.raises(gym.error.ResetNeeded): other.step(0)                 # and begins as a new one
    assert (other.reset(seed=4)[0] == first).all()
    sticky = make_env('breakout', 'sticky'); sticky.close()
    assert make_env('breakout', 'sticky').unwrapped is not sticky.unwrapped  # chance in the emulator: a new one each time
